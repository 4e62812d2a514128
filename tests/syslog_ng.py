"""A real syslog-ng for the tests, in the foreground: takes syslog over mutual TLS, and writes what it took to a file.

Rule: Debian lets a machine have rsyslog or syslog-ng. `make` unpacks syslog-ng into the environment, beside the other.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.rsyslog import Pki, Receiver

_UNPACKED = Path(sys.prefix) / "syslog-ng"
_CONFIG = """@version: 3.35
options {{ log-msg-size(65536); stats-freq(0); }};
source network_tls {{
  syslog(ip("127.0.0.1") port({port}) transport("tls") tls(
    key-file("{pki}/server.key") cert-file("{pki}/server.pem") ca-file("{pki}/ca.pem") peer-verify(required-trusted)));
}};
destination lines {{ file("{folder}/received" template("${{MSG}}\\n")); }};
log {{ source(network_tls); destination(lines); flags(flow-control); }};
"""


class SyslogNg(Receiver):
    """The receiver; see `Receiver`."""

    def __init__(self, folder: Path, pki: Pki) -> None:
        super().__init__(folder)
        (folder / "syslog-ng.conf").write_text(_CONFIG.format(folder=folder, pki=pki.folder, port=self.port))

    def command(self) -> tuple[list[str], dict[str, str]]:
        """See `Receiver`."""
        program = _UNPACKED / "usr" / "sbin" / "syslog-ng"
        modules = next((_UNPACKED / "usr" / "lib" / "syslog-ng").glob("[0-9]*"), None)
        if modules is None or not program.exists():
            raise RuntimeError(
                f"the tests need syslog-ng in {_UNPACKED}: python3 requirements/install.py gateway --tests"
            )
        options = [("-f", "syslog-ng.conf"), ("-R", "persist"), ("-p", "pid"), ("-c", "control")]
        command = [str(program), "-F", "-e", "--no-caps", f"--module-path={modules}"]
        for option, name in options:
            command += [option, str(self.folder / name)]
        return command, {"LD_LIBRARY_PATH": str(modules.parent)}


@contextlib.contextmanager
def running_syslog_ng(folder: Path, pki: Pki) -> Iterator[SyslogNg]:
    """A receiver for as long as the context lasts."""
    receiver = SyslogNg(folder, pki)
    receiver.start()
    try:
        yield receiver
    finally:
        receiver.stop()
