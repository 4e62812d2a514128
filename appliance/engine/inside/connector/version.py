"""The one version of vLLM that this package is written for."""

from appliance.engine.protocol import VLLM_VERSION


class UnsupportedEngine(RuntimeError):
    """This vLLM is not the version that this package was written for."""


def check_version(version: str) -> None:
    """Refuse any version of vLLM but ours; a local build label (`+cpu`) may follow it.

    Raises:
        UnsupportedEngine: names both versions.
    """
    if version.partition("+")[0] != VLLM_VERSION:
        raise UnsupportedEngine(
            f"Holdfast's leases are written for vLLM {VLLM_VERSION}, this is {version}. "
            f"Install the engine's environment from its lock file."
        )
