"""Stands in for vLLM in the cage: answers /health on `engine.sock` and leaves behind all that a killed engine would.

Usage: `fake_engine.py MARK BEHAVIOUR`, where MARK stands in the command line of each of its processes, and BEHAVIOUR is

- `serve`: with a child that ignores SIGTERM and has left the session, a TCP port, shared memory, temporary files;
- `crash`: write a traceback and end with status 1; `refuse`: the same, of a kind that no other start would change;
- `sick`: healthy once, silent afterwards; `deaf`: never ready, ignores SIGTERM.

What is posted to `/say` it writes to descriptors 1 and 2, as it is, and so does a child. What is posted elsewhere kills
it.
"""

import http.server
import json
import os
import resource
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
from pathlib import Path


class _Handler(http.server.BaseHTTPRequestHandler):
    answered = 0

    def do_GET(self) -> None:
        _Handler.answered += 1
        if sys.argv[2] == "sick" and _Handler.answered > 1:
            self.close_connection = True
            return
        body = json.dumps(_seen()).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        if self.path != "/say":
            os.kill(os.getpid(), signal.SIGKILL)
        said = self.rfile.read(int(self.headers["Content-Length"])).decode()
        for descriptor in (1, 2):
            os.write(descriptor, f"regex: {said}\n{said}".encode())
            subprocess.run(["sh", "-c", f'echo "$0" >&{descriptor}', said], check=True)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def address_string(self) -> str:
        return "gateway"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class's name
        pass


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


def _seen() -> dict[str, object]:
    """What the engine sees of the host, for the tests to read through `/metrics`."""
    return {
        "environment": dict(os.environ),
        "interfaces": sorted(name for _, name in socket.if_nameindex()),
        "tmp": sorted(entry.name for entry in Path("/tmp").iterdir()),
        "processes": sum(entry.name.isdigit() for entry in Path("/proc").iterdir()),
        "files": {name: _read(name) for name in _look_at()},
        "core_limit": resource.getrlimit(resource.RLIMIT_CORE),
        "rights": next(line.split()[1] for line in Path("/proc/self/status").open() if line.startswith("CapEff")),
    }


def _look_at() -> list[str]:
    wanted = Path("look-at")  # a test's: paths, one a line
    return wanted.read_text().splitlines() if wanted.exists() else []


def _read(name: str) -> str:
    """What a file holds, what is in a folder, "connected" for a socket; else the name of the error."""
    path = Path(name)
    try:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(name)
                return "connected"
        return " ".join(sorted(entry.name for entry in path.iterdir())) if path.is_dir() else path.read_text()
    except OSError as error:
        return type(error).__name__


def main() -> None:
    """Behave as told."""
    mark, behaviour = sys.argv[1:]
    sys.stdout.write(f"fake engine {mark}\n")
    sys.stdout.flush()
    if behaviour == "crash":
        raise RuntimeError("the device is busy")
    if behaviour == "refuse":
        raise ModuleNotFoundError("No module named 'vllm'")
    if behaviour == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Event().wait()
    Path(f"/dev/shm/psm_{mark}").write_text("KV")
    Path(tempfile.gettempdir(), f"{mark}.ipc").write_text("KV")
    port = socket.create_server(("127.0.0.1", 0))
    stubborn = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    child = subprocess.Popen(
        [sys.executable, "-c", stubborn, mark], start_new_session=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    assert child.stdout is not None
    child.stdout.readline()
    with port, _Server("engine.sock", _Handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
