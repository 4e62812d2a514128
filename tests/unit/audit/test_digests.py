"""A digest is of the exact text, under the tenant's key: who has both can check it, nobody else can say a thing."""

import hashlib
import hmac
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.audit.digests import Text, answer_hash, keyed_digest, prompt_hash
from appliance.vault import KeyMissing, KeyPurpose, RootKey, Vault, VaultSealed
from tests.unit.vault.keystore import MemoryKeys

MESSAGES = [{"role": "user", "content": "Grüße"}, {"content": None, "role": "assistant", "tool_calls": []}]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.fixture
def keys() -> MemoryKeys:
    return MemoryKeys()


@pytest.fixture
def vault(keys: MemoryKeys) -> Vault:
    vault = Vault(keys)
    vault.open(RootKey(b"r" * 32))
    for tenant in ("ten_1", "ten_2"):
        keys.add(vault.new_tenant_keys(tenant))
    return vault


def test_messages_are_hashed_in_their_one_spelling() -> None:
    spelled = '[{"content":"Grüße","role":"user"},{"content":null,"role":"assistant","tool_calls":[]}]'
    assert prompt_hash(MESSAGES) == hashlib.sha256(spelled.encode()).digest()
    assert prompt_hash(json.loads(json.dumps(MESSAGES, indent=3))) == prompt_hash(MESSAGES)
    assert prompt_hash(MESSAGES[::-1]) != prompt_hash(MESSAGES)


def test_a_text_is_hashed_as_it_is() -> None:
    assert prompt_hash("Grüße") == answer_hash(["Grüße"]) == hashlib.sha256("Grüße".encode()).digest()
    assert prompt_hash("Grüße\n") != prompt_hash("Grüße")
    assert answer_hash(["one", "two"]) == hashlib.sha256(b'["one","two"]').digest()
    assert len(answer_hash([""])) == len(prompt_hash("\ud800")) == 32


@given(JSON)
def test_whatever_can_be_asked_has_a_hash(value: object) -> None:
    assert len(prompt_hash(value)) == 32


def test_a_digest_is_an_hmac_under_the_tenants_key_one_for_prompts_and_one_for_answers(vault: Vault) -> None:
    hashed = prompt_hash(MESSAGES)
    digests = {
        keyed_digest(vault, tenant, text, hashed)
        for tenant in ("ten_1", "ten_2")
        for text in (Text.PROMPT, Text.ANSWER)
    }
    assert len(digests) == 4
    assert all(len(digest) == 64 for digest in digests)
    assert keyed_digest(vault, "ten_1", Text.PROMPT, hashed) in digests
    assert not hmac.compare_digest(hashed.hex(), keyed_digest(vault, "ten_1", Text.PROMPT, hashed))
    assert (
        keyed_digest(vault, "ten_1", Text.PROMPT, hashed)
        == vault.mac("ten_1", KeyPurpose.AUDIT, "digest-prompt", hashed).hex()
    )


def test_a_shredded_tenants_digests_can_be_made_by_nobody(vault: Vault, keys: MemoryKeys) -> None:
    hashed = prompt_hash("hello")
    before = keyed_digest(vault, "ten_1", Text.PROMPT, hashed)
    keys.shred("ten_1")
    again = Vault(keys)
    again.open(RootKey(b"r" * 32))
    with pytest.raises(KeyMissing):
        keyed_digest(again, "ten_1", Text.PROMPT, hashed)
    keys.add(again.new_tenant_keys("ten_1"))
    assert keyed_digest(again, "ten_1", Text.PROMPT, hashed) != before
    again.seal()
    with pytest.raises(VaultSealed):
        keyed_digest(again, "ten_1", Text.PROMPT, hashed)
