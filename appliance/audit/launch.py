"""Starts the appender of this node's log, and connects with it.

Rules:

- The socket is bound here, in a directory that only the appliance's user can enter, and handed to the appender as its
  standard input: there is no moment at which a stranger's socket could be connected with.
- The appender ends when its last producer has gone. One that is told to stop and does not is killed.
"""

import asyncio
import contextlib
import json
import os
import socket
import sys
from asyncio.subprocess import Process
from pathlib import Path
from typing import ClassVar, Final

from appliance.errors import Fault, HoldfastError

SOCKET_NAME: Final = "audit.sock"
_READY_S: Final = 30.0
_STOP_S: Final = 10.0
PASSED_ON: Final = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE")


class AppenderFailed(HoldfastError):
    """The appender did not start."""

    code: ClassVar[str] = "audit_appender_failed"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


class Launcher:
    """The appender of one log, as a child of this process.

    Args:
        directory: the log.
        run_dir: where the socket is.
    """

    def __init__(self, directory: Path, run_dir: Path) -> None:
        self._directory = directory
        self._run_dir = run_dir
        self._process: Process | None = None

    @property
    def pid(self) -> int | None:
        """The appender's process, while there is one."""
        process = self._process
        return None if process is None or process.returncode is not None else process.pid

    async def connect(self, producer: asyncio.Protocol) -> None:
        """Start an appender if there is none, and connect with it.

        Raises:
            AppenderFailed: says in its own words what is in the way.
            OSError: it started, and cannot be reached.
        """
        directory = os.open(self._run_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # By the directory's descriptor: the path itself may be longer than `sockaddr_un` allows.
            path = f"/proc/self/fd/{directory}/{SOCKET_NAME}"
            if self.pid is None:
                await self._start(path, directory)
            await asyncio.get_running_loop().create_unix_connection(lambda: producer, path)
        finally:
            os.close(directory)

    async def stop(self) -> None:
        """Have it publish a last checkpoint and end."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(_STOP_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        with contextlib.suppress(FileNotFoundError):
            (self._run_dir / SOCKET_NAME).unlink()

    async def _start(self, path: str, directory: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(SOCKET_NAME, dir_fd=directory)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            mask = os.umask(0o177)
            try:
                listener.bind(path)
            finally:
                os.umask(mask)
            listener.listen()
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "appliance.audit.appender",
                str(self._directory),
                stdin=listener.fileno(),
                stdout=asyncio.subprocess.PIPE,
                env={name: os.environ[name] for name in PASSED_ON if name in os.environ},
                start_new_session=True,
            )
        await self._until_ready(self._process)

    async def _until_ready(self, process: Process) -> None:
        assert process.stdout is not None  # noqa: S101
        try:
            async with asyncio.timeout(_READY_S):
                line = (await process.stdout.readline()).decode().strip()
        except TimeoutError:
            process.kill()
            line = ""
        if line == "ready":
            return
        await process.wait()
        if line:
            said = json.loads(line)
            raise AppenderFailed(said["message"], cause=said["cause"], remedy=said["remedy"])
        raise AppenderFailed(
            "the audit log's appender did not start",
            cause=f"it ended with {process.returncode} before it was ready",
            remedy="`holdfast logs gateway` has what it said",
        )
