"""Tells one chat template from another.

Rule: what cannot be read is not known, and no error: a model's name instead of a folder, a folder without a template.
"""

from hashlib import sha256
from pathlib import Path
from typing import Final

_FILES: Final = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")  # where transformers looks


def template_fingerprint(model: Path | str) -> str | None:
    """16 hexadecimal digits of a hash of the files that a model's chat template can be in; None: there are none.

    Reads files: blocks.
    """
    hashed, found = sha256(), False
    for name in _FILES:
        try:
            content = (Path(model) / name).read_bytes()
        except OSError:
            continue
        found = True
        hashed.update(f"{name} {len(content)}\n".encode() + content)
    return hashed.hexdigest()[:16] if found else None
