"""Writes the locks anew from the `.in` files: `make lock`.

uv resolves, for every Python that the project runs on; it does not read pip's configuration, so where pip looks is handed
to it. No lock names an address: a lock is as good behind a mirror as in front of it.
"""

import os
import subprocess
import sys
from pathlib import Path

LOCKS = Path(__file__).resolve().parent
UV = Path(sys.executable).with_name("uv")
ENGINE_PLATFORM = ("--python-platform", "x86_64-manylinux_2_35")
# PyTorch's CPU build for Python 3.12; the resolver sees the wheel of its own Python only.
TORCH_CPU_CP312 = "sha256:4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2"


def main() -> None:
    """Compile every lock."""
    compile_lock("build", "--universal")
    compile_lock("gateway", "--universal")
    compile_lock("dev", "--universal", "--constraint", "gateway.txt")
    compile_lock("engine-test", "--universal", "--constraint", "dev.txt")
    compile_lock("engine-cpu", *ENGINE_PLATFORM, "--overrides", "engine-overrides.txt")
    compile_lock("engine-cuda", *ENGINE_PLATFORM)
    add_torch_for_312(LOCKS / "engine-cpu.txt")


def compile_lock(name: str, *options: str) -> None:
    """Compile one lock, from scratch."""
    command = [
        *(str(UV), "pip", "compile", "--quiet", "--upgrade", "--generate-hashes", "--python-version", "3.11"),
        *("--no-emit-index-url", "--no-emit-find-links", "--no-header", "--no-annotate"),
        *options,
        *find_links(),
        *("--output-file", f"{name}.txt", f"{name}.in"),
    ]
    print(f"{name}.txt", file=sys.stderr, flush=True)
    subprocess.run(command, cwd=LOCKS, check=True)


def find_links() -> list[str]:
    """Where pip is told to look besides its index."""
    asked = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    places = f"{said} {os.environ.get('PIP_FIND_LINKS', '')}".split()
    return [argument for place in dict.fromkeys(places) for argument in ("--find-links", place)]


def add_torch_for_312(lock: Path) -> None:
    """Let the CPU build of torch for Python 3.12 satisfy the lock, too."""
    lines = lock.read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("torch=="))
    lines.insert(at + 1, f"    --hash={TORCH_CPU_CP312} \\")
    lock.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
