"""Keyed digests of what was asked and answered, for tenants that choose to have them in the audit log.

Rules:

- A digest is HMAC-SHA-256 of the SHA-256 of a text, under a subkey (HKDF) of the tenant's AUDIT key, another one for
  prompts than for answers. Who has the text and asks the appliance can check it; nobody else can so much as guess, and
  with the tenant's key it means nothing to anybody.
- The texts are exact: one of them that differs in a byte has another digest. What is no single text is JSON with sorted
  keys and no spaces, in UTF-8.
"""

import enum
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from appliance.vault import KeyPurpose, Vault


class Text(enum.StrEnum):
    """What a digest is of."""

    PROMPT = "prompt"
    ANSWER = "answer"


def prompt_hash(prompt: object) -> bytes:
    """SHA-256 of a request's messages, or of a completion's prompt; a prompt that is a text is itself."""
    return _hash(prompt)


def answer_hash(texts: Sequence[str]) -> bytes:
    """SHA-256 of an answer's text; of a list of the texts, where several choices were asked for."""
    return _hash(texts[0] if len(texts) == 1 else list(texts))


def keyed_digest(vault: Vault, tenant_id: str, text: Text, hashed: bytes) -> str:
    """The digest, in hexadecimal.

    Raises:
        VaultSealed, KeyMissing: the tenant's key is not to be had.
    """
    return vault.mac(tenant_id, KeyPurpose.AUDIT, f"digest-{text.value}", hashed).hex()


def _hash(value: Any) -> bytes:
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(value.encode("utf-8", "surrogatepass")).digest()
