"""A destination as an administrator names it: where to, in which format, and with which files.

Rules:

- One line says where to: the scheme of `url` chooses the transport, `TRANSPORTS` lists them; `FORMATS` the formats.
- No secret is in it: certificates, keys and tokens are files that it names, and are read when they are used.
- `transport_of` reads nothing and connects with nobody; it refuses what cannot work.
"""

import platform
import re
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

from appliance.audit.siem import syslog
from appliance.audit.siem.cef import Cef
from appliance.audit.siem.ecs import Ecs
from appliance.audit.siem.formats import Format
from appliance.audit.siem.leef import Leef
from appliance.audit.siem.ocsf import Ocsf
from appliance.audit.siem.transport import Transport
from appliance.errors import Fault, HoldfastError

MOST_DESTINATIONS: Final = 8
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_MAX_URL: Final = 1024


class DestinationInvalid(HoldfastError, ValueError):
    """A destination that cannot be one."""

    code: ClassVar[str] = "audit_export_invalid"
    fault: ClassVar[Fault] = Fault.CALLER


class Destination(NamedTuple):
    """Where the log goes to.

    Attributes:
        name: what it is called here: small letters, digits, `-`.
        url: `syslog+tls://host:port`; the other schemes are in `TRANSPORTS`.
        format: one of `FORMATS`.
        server_name: what the receiver's certificate must be for; empty: the host of the url.
        ca: a file with the certificates that the receiver's may be from, PEM.
        certificate, private_key: ours, PEM files.
        token_file: a file with what some receivers want to be shown.
        max_message_bytes: what the receiver takes in one message; 0: what is usual for the transport.
    """

    name: str
    url: str
    format: str = "ocsf"
    server_name: str = ""
    ca: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None
    token_file: Path | None = None
    max_message_bytes: int = 0

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that it names."""
        named = (self.ca, self.certificate, self.private_key, self.token_file)
        return tuple(path for path in named if path is not None)

    def record(self) -> dict[str, Any]:
        """For a file or a program: what `Destination.read` takes."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in self._asdict().items()}

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Destination":
        """What `record` made.

        Raises:
            DestinationInvalid: it cannot be a destination.
        """
        try:
            given = {name: value for name, value in record.items() if value is not None}
            for name in ("ca", "certificate", "private_key", "token_file"):
                if name in given:
                    given[name] = Path(given[name])
            return checked(cls(**given))
        except TypeError as error:
            raise _invalid("a destination has other fields", str(error)) from None


FORMATS: Final[Mapping[str, Format]] = {each.name: each for each in (Ocsf(), Cef(), Leef(), Ecs())}

# A transport's own factory raises DestinationInvalid for what it cannot work with, or lacks.
TRANSPORTS: Final[Mapping[str, Callable[[Destination, urllib.parse.SplitResult], Transport]]] = {
    "syslog+tls": lambda destination, url: syslog.SyslogTls(
        syslog.Receiver(
            host=host_of(url),
            port=port_of(url, syslog.PORT),
            server_name=destination.server_name or host_of(url),
            ca=needed(destination, "ca"),
            certificate=needed(destination, "certificate"),
            private_key=needed(destination, "private_key"),
        ),
        hostname=platform.node(),
        max_message_bytes=destination.max_message_bytes or syslog.MAX_MESSAGE_BYTES,
    ),
}


def checked(destination: Destination) -> Destination:
    """The same destination.

    Raises:
        DestinationInvalid: it cannot be one; says why.
    """
    if not _NAME.fullmatch(destination.name):
        raise _invalid(f"{destination.name[:64]!r} cannot be its name", "it is 1 to 32 small letters, digits and `-`")
    if destination.format not in FORMATS:
        raise _invalid(f"there is no format {destination.format[:64]!r}", f"there are {', '.join(FORMATS)}")
    if destination.max_message_bytes and not 1 << 12 <= destination.max_message_bytes <= 1 << 20:
        raise _invalid("messages cannot be bounded like that", "max_message_bytes is 4096 to 1048576, or 0")
    for path in destination.files:
        if not path.is_absolute():
            raise _invalid(f"{path} cannot be used", "it is not an absolute path")
    transport_of(destination)
    return destination


def format_of(destination: Destination) -> Format:
    """What it is written in."""
    return FORMATS[destination.format]


def transport_of(destination: Destination) -> Transport:
    """What carries it.

    Raises:
        DestinationInvalid: there is none for its url.
    """
    if len(destination.url) > _MAX_URL:
        raise _invalid("its url cannot be used", f"it has more than {_MAX_URL} characters")
    try:
        url = urllib.parse.urlsplit(destination.url)
        make = TRANSPORTS[url.scheme]
    except (ValueError, KeyError):
        raise _invalid("its url cannot be used", f"it begins with none of {', '.join(TRANSPORTS)}") from None
    if url.username is not None or url.password is not None or "@" in url.netloc:
        raise _invalid("its url cannot be used", "a secret is never part of it: name a file")
    return make(destination, url)


def host_of(url: urllib.parse.SplitResult) -> str:
    """Its host.

    Raises:
        DestinationInvalid: it has none.
    """
    if not url.hostname:
        raise _invalid("its url cannot be used", "it names no host")
    return url.hostname


def port_of(url: urllib.parse.SplitResult, usual: int) -> int:
    """Its port, or the usual one.

    Raises:
        DestinationInvalid: it is no port.
    """
    try:
        return url.port or usual
    except ValueError:
        raise _invalid("its url cannot be used", "its port is not one of 1 to 65535") from None


def needed(destination: Destination, name: str) -> Path:
    """One of its files.

    Raises:
        DestinationInvalid: it does not name it.
    """
    path = getattr(destination, name)
    if not isinstance(path, Path):
        option = "--" + name.replace("_", "-")
        raise _invalid(f"{destination.url} needs a file more", f"{option} is not given")
    return path


def _invalid(message: str, cause: str) -> DestinationInvalid:
    return DestinationInvalid(
        message, cause=cause, remedy="`holdfast audit export add --help` and docs/siem.md tell what there is"
    )
