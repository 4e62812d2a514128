"""Stands in for the gateway: keeps a fake engine running until it is killed. `gateway.py FOLDER MARK PYTHON`."""

import asyncio
import sys
from pathlib import Path

from appliance.engine.client import EngineClient
from appliance.engine.command_line import EngineSpec
from appliance.engine.launcher import EngineProcess

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")


async def _main(folder: Path, mark: str, python: Path) -> None:
    spec = EngineSpec(
        python=python,
        model=folder / "model",
        served_name="model",
        run_dir=folder / "run",
        log_path=folder / "engine.log",
    )
    async with EngineClient(spec.socket) as client:
        engine = EngineProcess(
            spec, client, command=lambda _: [sys.executable, str(FAKE_ENGINE), mark, "serve"], base_environment={}
        )
        await engine.start()
        await engine.wait_ready(30)
        sys.stdout.write(f"{engine.pid} {engine.isolated}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
