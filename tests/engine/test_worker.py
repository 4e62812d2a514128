"""Who copies between the device and DRAM: vLLM's own worker, but for a device that is a CPU."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from appliance.engine.inside.connector.memory import TierSpec


def test_where_the_device_is_no_cpu_vllms_own_worker_copies_and_its_memory_is_ours_to_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    region = SimpleNamespace(base_tensor=torch.zeros(8, dtype=torch.int8), _creator=True)
    own = SimpleNamespace(_mmap_region=region)
    monkeypatch.setattr(TieringOffloadingSpec, "create_worker", lambda _spec, _caches: own)
    caches = SimpleNamespace(tensors=[SimpleNamespace(tensor=SimpleNamespace(device=torch.device("cuda")))])
    assert TierSpec.create_worker(object.__new__(TierSpec), caches) is own
    assert not region._creator  # its file has no name once everybody has it open: see `TierSpec`
