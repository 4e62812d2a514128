"""`prove isolation` on a real engine whose tiers behind the device are broken on purpose: it says which, and how.

That the product passes in all three is shown in tests/e2e/tiers.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.running import REPOSITORY
from tests.e2e.appliance.conftest import holdfast

pytestmark = pytest.mark.timeout(1200)

BLOCK_BYTES = 64 << 10  # of the demonstration's model
DEVICE_BLOCKS = 96
DRAM_BLOCKS = 256  # less than all of the proof: what it asked for first leaves for what it asks for last
DISK_BLOCKS = 4096
TIERS = {
    "HOLDFAST_ENGINE__KV_CACHE_BYTES": str(DEVICE_BLOCKS * BLOCK_BYTES),
    "HOLDFAST_ENGINE__MAX_MODEL_LEN": "640",
    "HOLDFAST_TIERS__DRAM_BYTES": str(DRAM_BLOCKS * BLOCK_BYTES),
    "HOLDFAST_TIERS__DISK_BYTES": str(DISK_BLOCKS * 2 * BLOCK_BYTES),
}
MODES = ("session", "tenant-prefix", "tenant")
CHOSEN = {(mode, pair) for mode in ("tenant-prefix", "tenant") for pair in ("same tenant", "other key")}

# What the gateway runs first: its engine runs something first, too.
IN_THE_GATEWAY = f"""
from pathlib import Path
import appliance.engine.launcher as launcher
environment = launcher.environment
def with_sabotage(spec, base):
    sabotage = Path(__file__).with_name("sabotage.py").read_text()
    (spec.run_dir / "sitecustomize.py").write_text(sabotage)
    return {{**environment(spec, base), "PYTHONPATH": f"{{spec.run_dir}}:{REPOSITORY}"}}
launcher.environment = with_sabotage
"""
# What lies behind the device does what the file `wrong` says, in the engine's folder.
IN_THE_ENGINE = """
import importlib.util
import sys
from pathlib import Path

BROKEN = "appliance.engine.inside.connector.dram"
WRONG = Path(__file__).with_name("wrong")


def is_wrong(what):
    return WRONG.exists() and WRONG.read_text() == what


class WhenImported:
    def find_spec(self, name, path=None, target=None):
        if name != BROKEN:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_and_break(module):
            run(module)
            only_who_stored_it_finds(module)
            whoever_says_the_same_finds()

        spec.loader.exec_module = run_and_break
        return spec


def only_who_stored_it_finds(dram):
    lookup, prepare_store, stored_by = dram.TieredManager.lookup, dram.TieredManager.prepare_store, {}

    def remembered(self, keys, context):
        for key in keys:
            stored_by.setdefault(key, dram.owner_of(context))
        return prepare_store(self, keys, context)

    def of_its_own(self, key, context, **how):
        if is_wrong("missing") and stored_by.get(key) != dram.owner_of(context):
            return dram.LookupResult.MISS
        return lookup(self, key, context, **how)

    dram.TieredManager.lookup, dram.TieredManager.prepare_store = of_its_own, remembered


def whoever_says_the_same_finds():
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading import scheduler
    from vllm.v1.core import kv_cache_utils

    salted, make_key, unsalted_of = kv_cache_utils.hash_block_tokens, scheduler.make_offload_key, {}

    def hash_block(function, parent, tokens, extra_keys=None):
        block_hash = salted(function, parent, tokens, extra_keys)
        unsalted_of[block_hash] = salted(function, unsalted_of.get(parent), tokens)
        return block_hash

    def key_of(block_hash, group):
        return make_key(unsalted_of[block_hash] if is_wrong("shared") else block_hash, group)

    kv_cache_utils.hash_block_tokens, scheduler.make_offload_key = hash_block, key_of


sys.meta_path.insert(0, WhenImported())
"""

Prove = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An appliance whose tiers behind the device can be broken."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "sitecustomize.py").write_text(IN_THE_GATEWAY)
    (folder / "sabotage.py").write_text(IN_THE_ENGINE)
    settings = {**TIERS, "PYTHONPATH": f"{folder}:{REPOSITORY}"}
    holdfast(folder / "state", ("up", "--demo", "--detach", "--timeout", "270"), settings=settings)
    yield folder / "state"
    holdfast(folder / "state", ("down",))


@pytest.fixture
def prove(state_dir: Path) -> Iterator[Prove]:
    """The checks of a proof, of each tier, while something is wrong behind the device."""
    wrong = state_dir / "run" / "engine" / "wrong"

    def run(what: str) -> list[dict[str, Any]]:
        wrong.write_text(what)
        proof = holdfast(state_dir, ("prove", "isolation", "--rounds", "8"), check=False, timeout_s=900)
        assert proof.get("verdict") == "FAIL", proof
        return [check for check in proof["checks"] if check["tier"]]

    yield run
    wrong.unlink()


def with_verdict(checks: list[dict[str, Any]], tier: str, *verdicts: str) -> set[tuple[str, str]]:
    return {(each["mode"], each["name"]) for each in checks if each["tier"] == tier and each["verdict"] in verdicts}


def test_a_tier_that_gives_nothing_to_who_should_find_it_is_found_and_named(prove: Prove) -> None:
    checks = prove("missing")
    missing = {(mode, "sibling in the tree") for mode in MODES} | CHOSEN
    for tier in ("dram", "disk"):
        assert with_verdict(checks, tier, "FAIL") == missing, "\n".join(map(str, checks))
        assert with_verdict(checks, tier, "UNKNOWN") == set()
    assert with_verdict(checks, "device", "FAIL", "UNKNOWN") == set()


def test_a_tier_that_gives_to_who_must_not_find_it_is_found_and_named(prove: Prove) -> None:
    checks = prove("shared")
    of_a_tenant = {(mode, pair) for mode in ("session", "tenant-prefix") for pair in ("same tenant", "other key")}
    of_another = {(mode, "other tenant") for mode in MODES}
    for tier in ("dram", "disk"):
        assert of_a_tenant <= with_verdict(checks, tier, "FAIL"), "\n".join(map(str, checks))
        assert {(mode, "same session") for mode in MODES} <= with_verdict(checks, tier, "PASS")
    assert of_another <= with_verdict(checks, "dram", "FAIL")
    assert of_another <= with_verdict(checks, "disk", "PASS"), "the disk keeps tenants apart whatever a key says"
    # What was asked for a moment ago is behind the device as well, and what came from there is said to.
    assert all(
        "from dram" in each["found"] for each in checks if each["tier"] == "device" and each["verdict"] == "FAIL"
    )
