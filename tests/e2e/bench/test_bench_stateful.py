"""`holdfast bench stateful` on real vLLM, as a person runs it: a few turns of the loop, on the demonstration model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TURNS = 4
BLOCK = 32


@pytest.mark.timeout(300)
def test_state_saves_all_but_what_is_new_and_changes_no_answer(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("holdfast")), "--json", "--state-dir", str(tmp_path / "state")]
    command += ["bench", "stateful", "--turns", str(TURNS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout)
    assert figures["identical_output"] is True
    assert figures["stateless"]["prefill_tokens_per_turn"] == figures["stateless"]["prompt_tokens_per_turn"] > 1500
    assert figures["stateful"]["prefill_tokens_per_turn"] == figures["vanilla"]["prefill_tokens_per_turn"]
    for arm in ("vanilla", "stateful"):
        account = figures[arm]["account_per_turn"]
        assert sum(account.values()) == figures[arm]["prefill_tokens_per_turn"]
        assert account["lost"] == account["template"] == 0
        assert account["tail"] <= BLOCK
    assert not (tmp_path / "state").exists()
    assert all(f"{turn}/{TURNS}" in done.stderr for turn in range(1, TURNS + 1))
