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
_INDEX: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,254}")
_JSON: Final = ("ecs", "ocsf")


class DestinationInvalid(HoldfastError, ValueError):
    """A destination that cannot be one."""

    code: ClassVar[str] = "audit_export_invalid"
    fault: ClassVar[Fault] = Fault.CALLER


class Destination(NamedTuple):
    """Where the log goes to.

    Attributes:
        name: what it is called here: small letters, digits, `-`.
        url: `syslog+tls://host:port`, `relp+tls://host:port`, `splunk+https://host:port`,
            `elasticsearch+https://host:port/index`, `file:///folder`.
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
        """The files that it names, and the folder."""
        url = urllib.parse.urlsplit(self.url)
        folder = _folder(url) if url.scheme == "file" else None
        named = (self.ca, self.certificate, self.private_key, self.token_file, folder)
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


def _syslog(destination: "Destination", url: urllib.parse.SplitResult) -> Transport:
    _refuse_rest(url, path="")
    return syslog.SyslogTls(
        _receiver(destination, url, syslog.PORT, needs_certificate=True),
        hostname=platform.node(),
        max_message_bytes=destination.max_message_bytes or syslog.MAX_MESSAGE_BYTES,
    )


def _relp(destination: "Destination", url: urllib.parse.SplitResult) -> Transport:
    from appliance.audit.siem import relp

    _refuse_rest(url, path="")
    return relp.RelpTls(
        _receiver(destination, url, relp.PORT, needs_certificate=True),
        hostname=platform.node(),
        max_message_bytes=destination.max_message_bytes or syslog.MAX_MESSAGE_BYTES,
    )


# What speaks HTTP is imported when it is wanted: a receiver's `verify-export` needs none of it.
def _splunk(destination: "Destination", url: urllib.parse.SplitResult) -> Transport:
    from appliance.audit.siem import splunk

    _refuse_rest(url, path="")
    return splunk.SplunkHec(
        _receiver(destination, url, splunk.PORT, needs_certificate=False),
        needed(destination, "token_file"),
        hostname=platform.node(),
        max_payload_bytes=destination.max_message_bytes or splunk.MAX_MESSAGE_BYTES,
    )


def _elasticsearch(destination: "Destination", url: urllib.parse.SplitResult) -> Transport:
    from appliance.audit.siem import elastic

    index = url.path.removeprefix("/")
    if not _INDEX.fullmatch(index):
        raise _invalid("its url cannot be used", "its path is the name of an index or a data stream, and nothing else")
    if destination.format not in _JSON:
        raise _invalid(f"Elasticsearch takes no {destination.format}", f"what it takes is JSON: {', '.join(_JSON)}")
    _refuse_rest(url, path=url.path)
    return elastic.Elasticsearch(
        _receiver(destination, url, elastic.PORT, needs_certificate=False),
        needed(destination, "token_file"),
        index=index,
        max_payload_bytes=destination.max_message_bytes or elastic.MAX_MESSAGE_BYTES,
    )


def _files(destination: "Destination", url: urllib.parse.SplitResult) -> Transport:
    """`file:///folder?bytes=N&seconds=N`: how large and how old a batch becomes."""
    from appliance.audit.siem import diode

    if url.netloc or url.fragment or not url.path.startswith("/") or not str(_folder(url)).isprintable():
        raise _invalid("its url cannot be used", "a folder of this machine is written file:///folder")
    try:
        given = dict(urllib.parse.parse_qsl(url.query, strict_parsing=True)) if url.query else {}
        limits = diode.Limits(
            max_bytes=int(given.pop("bytes", diode.MAX_BYTES)), max_age_s=float(given.pop("seconds", diode.MAX_AGE_S))
        )
    except ValueError:
        raise _invalid("its url cannot be used", "behind the folder there is ?bytes=N&seconds=N, or nothing") from None
    if given or not 1 << 12 <= limits.max_bytes <= 1 << 30 or not 1 <= limits.max_age_s <= 86_400:
        raise _invalid("its url cannot be used", "a batch has 4096 to 1073741824 bytes and 1 to 86400 seconds")
    key = needed(destination, "private_key")
    return diode.DiodeFiles(_folder(url), key, name=f"diode.{destination.name}", limits=limits)


# Each raises DestinationInvalid for what it cannot work with, or lacks.
TRANSPORTS: Final[Mapping[str, Callable[[Destination, urllib.parse.SplitResult], Transport]]] = {
    "syslog+tls": _syslog,
    "relp+tls": _relp,
    "splunk+https": _splunk,
    "elasticsearch+https": _elasticsearch,
    "file": _files,
}


def _receiver(
    destination: Destination, url: urllib.parse.SplitResult, usual: int, *, needs_certificate: bool
) -> syslog.Receiver:
    shows = needs_certificate or destination.certificate is not None or destination.private_key is not None
    return syslog.Receiver(
        host=host_of(url),
        port=port_of(url, usual),
        server_name=_host_name(destination.server_name, "its server name") if destination.server_name else host_of(url),
        ca=needed(destination, "ca"),
        certificate=needed(destination, "certificate") if shows else None,
        private_key=needed(destination, "private_key") if shows else None,
    )


def _refuse_rest(url: urllib.parse.SplitResult, *, path: str) -> None:
    if url.path.rstrip("/") != path.rstrip("/") or url.query or url.fragment:
        raise _invalid("its url cannot be used", "there is something behind the host that says nothing here")


def _folder(url: urllib.parse.SplitResult) -> Path:
    return Path(urllib.parse.unquote(url.path))


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
    transport_of(destination)
    for path in destination.files:
        if not path.is_absolute():
            raise _invalid(f"{path} cannot be used", "it is not an absolute path")
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
        DestinationInvalid: it has none, or one that no name server can be asked for.
    """
    if not url.hostname:
        raise _invalid("its url cannot be used", "it names no host")
    return _host_name(url.hostname, "its url")


def _host_name(name: str, whose: str) -> str:
    try:
        name.encode("idna")
    except UnicodeError:
        raise _invalid(f"{whose} cannot be used", f"{name[:64]!r} cannot be the name of a host") from None
    return name


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
