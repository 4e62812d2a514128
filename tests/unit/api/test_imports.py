"""What starting the gateway loads, and what it must not wait for."""

import json
import subprocess
import sys


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a new interpreter has after `statement`."""
    program = (
        f"{statement}\nimport json, sys; print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=60)
    return set(json.loads(found.stdout))


def test_the_lists_of_fields_need_the_standard_library_alone() -> None:
    beyond = loaded_by("import api.openai.fields") - loaded_by("pass") - set(sys.stdlib_module_names)
    assert beyond == {"api"}


def test_the_gateway_starts_without_what_it_seldom_or_never_needs() -> None:
    loaded = loaded_by("import api.server")
    assert not loaded & {
        "openai",
        "anthropic",
        "alembic",
        "aiohttp",
        "psycopg",
        "torch",
        "vllm",
        "transformers",
    }
