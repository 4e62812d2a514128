"""What KV is made by, in 32 bytes: KV of another model, or laid out otherwise, must not be taken for this one's.

A model is told by its files' names, sizes and times, not by their content: that would be hundreds of gigabytes to read
at a start. Whoever copies a model anew begins with an empty tier.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path


def fingerprint(model: Path, made_with: Mapping[str, object]) -> bytes:
    """The fingerprint of a model's folder and of all else that decides what KV is, and how it lies in a chunk.

    Args:
        made_with: of JSON's types: versions, types, sizes, layout.

    Raises:
        OSError: the folder cannot be read.
    """
    files = [
        [path.relative_to(model).as_posix(), found.st_size, found.st_mtime_ns]
        for path in sorted(model.rglob("*"))
        if path.is_file()
        for found in [path.stat()]
    ]
    told = json.dumps({"files": files, "made_with": dict(made_with)}, sort_keys=True).encode()
    return hashlib.sha256(b"holdfast-kv-layout-1\0" + told).digest()
