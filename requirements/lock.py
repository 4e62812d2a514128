"""Writes the lock files: `make lock`, in the gateway's environment.

Rules:

- A lock names no host, and every requirement in it has its hashes. Where files come from is pip's configuration, read
  here because uv does not read it.
- One lock serves Python 3.11 and 3.12. Each is resolved for 3.11, without markers; the tests of packaging hold that
  nothing is missing on the other.
- PyTorch's CPU build is pinned to the two files that PyTorch publishes for us. Another one is refused.
- Versions that are locked stay, unless `--upgrade` is given.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# torch 2.13.0+cpu for x86_64, manylinux_2_28, as published by PyTorch.
TORCH_CPU_HASHES = {
    "cp311": "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
    "cp312": "4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2",
}
# In this order: what one is held to must be there before it.
LOCKS: dict[str, tuple[str, ...]] = {
    "build": (),
    "gateway": (),
    "dev": ("--constraints", "gateway.txt"),
    "engine-cpu": ("--overrides", "engine-cpu.overrides"),
    "engine-cuda": (),
    "engine-test": ("--constraints", "engine-cpu.txt", "--constraints", "engine-cuda.txt"),
}
_FIXED = (
    "--quiet", "--generate-hashes", "--no-emit-index-url", "--no-emit-find-links", "--no-header",
    "--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_35",
    "--index-strategy", "unsafe-best-match",  # as pip has it: every place that it is told of counts the same
)  # fmt: skip
_TORCH = re.compile(r"^torch==[^\n]*\\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", re.MULTILINE)


def sources(configuration: str, *, find_links: bool) -> list[str]:
    """uv's flags for where pip looks, from what `pip config list` says.

    Args:
        find_links: name the folders of loose files too; only the CPU engine wants those, for its build of torch.
    """
    known = {"index-url": "--index-url", "extra-index-url": "--extra-index-url"}
    if find_links:
        known["find-links"] = "--find-links"
    pairs: dict[tuple[str, str], None] = {}
    for line in configuration.splitlines():
        name, _, value = line.partition("=")
        flag = known.get(name.rpartition(".")[2])
        if flag is not None:
            pairs.update({(flag, place): None for place in value.strip().strip("'").replace("\\n", " ").split()})
    if find_links and not any(flag == "--find-links" for flag, _ in pairs):
        pairs["--find-links", f"{TORCH_CPU_INDEX}/torch/"] = None
    return [part for pair in pairs for part in pair]


def pin_torch(lock: str) -> str:
    """The lock with the CPU build of torch pinned to PyTorch's own two files.

    Raises:
        ValueError: what was resolved is none of the two.
    """
    stanza = _TORCH.search(lock)
    if stanza is None or not set(re.findall(r"sha256:([0-9a-f]{64})", stanza[0])) & set(TORCH_CPU_HASHES.values()):
        raise ValueError("the torch that was resolved is not the CPU build that PyTorch publishes")
    hashes = " \\\n".join(f"    --hash=sha256:{TORCH_CPU_HASHES[tag]}" for tag in sorted(TORCH_CPU_HASHES))
    return f"{lock[: stanza.start()]}torch==2.13.0+cpu \\\n{hashes}\n{lock[stanza.end() :]}"


def compile_lock(name: str, flags: list[str]) -> None:
    """Write one lock, or leave it as it is.

    Raises:
        subprocess.CalledProcessError: uv could not resolve it, and has said why.
    """
    lock = HERE / f"{name}.txt"
    draft = HERE / f"{name}.txt.new"
    if lock.exists():
        draft.write_bytes(lock.read_bytes())
    try:
        subprocess.run(
            [sys.executable, "-m", "uv", "pip", "compile", *flags, f"{name}.in", "--output-file", draft.name],
            check=True,
            cwd=HERE,
            stdout=subprocess.DEVNULL,
        )
        text = draft.read_text(encoding="utf-8")
        draft.write_text(pin_torch(text) if name == "engine-cpu" else text, encoding="utf-8")
        draft.replace(lock)
    finally:
        draft.unlink(missing_ok=True)


def main() -> int:
    """Compile the locks named on the command line, all of them by default."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("locks", nargs="*", metavar="LOCK", help=f"of: {', '.join(LOCKS)}")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    chosen = parser.parse_args()
    unknown = set(chosen.locks) - set(LOCKS)
    if unknown:
        parser.error(f"no such lock: {', '.join(sorted(unknown))}")
    listing = [sys.executable, "-m", "pip", "config", "list"]
    configuration = subprocess.run(listing, check=True, capture_output=True, text=True).stdout
    for name, own_flags in LOCKS.items():
        if chosen.locks and name not in chosen.locks:
            continue
        print(f"requirements/{name}.txt", file=sys.stderr, flush=True)
        flags = [*_FIXED, *own_flags, *sources(configuration, find_links=name == "engine-cpu")]
        compile_lock(name, [*flags, "--upgrade"] if chosen.upgrade else flags)
    return 0


if __name__ == "__main__":
    sys.exit(main())
