"""What an appliance is set to: what changed since its last start, and what of it weakens security, as events.

Rules:

- A setting is compared in its canonical form: JSON, by the path of its key. No secret is in it: a password in an
  address is masked before anything looks at it.
- What the last start was set to lies beside the log, sealed. A copy that was changed is worth what a lost one is: that
  start is recorded as a first one, and says why. A copy that was put back to an older one shows in the digest that each
  `gateway.started` carries.
- Events first, then the copy: a start that is killed in between tells again.
- A model's fingerprint is cheap: names and sizes of its files, small ones whole, of large ones the first and the last
  bytes. It tells a model from another one; that it is the supplier's is for its bundle's signature.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from appliance.audit.events import CONFIG_CHANGED, CONFIG_RECORDED, MODEL_CHANGED, SYSTEM, Event, Outcome
from appliance.audit.files import write_whole
from appliance.settings import SIX_MONTHS_DAYS, Settings, is_loopback
from appliance.vault import SYSTEM_SCOPE, Binding, KeyMissing, KeyPurpose, TamperedValue, Vault

LAST_START: Final = "last-start"
ABSENT: Final = "absent"
_BINDING: Final = Binding("audit", "last_start", "log", SYSTEM_SCOPE, 1)
_WHOLE_BYTES: Final = 1 << 20
_END_BYTES: Final = 64 << 10
_MOST_FILES: Final = 10_000
_SECRET_PARTS: Final = ("password", "passwd", "secret", "token")


@dataclass(frozen=True, slots=True)
class Model:
    """The model that a gateway has its engine serve. `name` is empty where somebody else runs the engine."""

    name: str
    path: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Configuration:
    """What one start was set to. `settings`: canonical values by the paths of their keys."""

    settings: Mapping[str, str]
    model: Model

    def to_bytes(self) -> bytes:
        """To be sealed."""
        model = {"name": self.model.name, "path": self.model.path, "fingerprint": self.model.fingerprint}
        return _canonical({"settings": dict(self.settings), "model": model})

    @classmethod
    def from_bytes(cls, opened: bytes) -> "Configuration":
        """Again from `to_bytes`."""
        said = json.loads(opened)
        return cls(said["settings"], Model(**said["model"]))


def effective(settings: Settings) -> dict[str, str]:
    """Every setting that is in force, without secrets: canonical values by the paths of their keys."""
    tree = settings.model_dump(mode="json")
    if settings.store.url is not None:
        tree["store"]["url"] = without_secrets(settings.store.url)
    return {path: _canonical(value).decode() for path, value in _leaves(tree)}


def digest(settings: Mapping[str, str]) -> str:
    """SHA-256 of what `effective` told: what every start carries."""
    return hashlib.sha256(_canonical(dict(settings))).hexdigest()


def without_secrets(url: str) -> str:
    """The address of a database without what lets somebody in."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        return "an address that cannot be read"
    query = {
        name: "***" if any(part in name.lower() for part in _SECRET_PARTS) else value
        for name, value in parsed.query.items()
    }
    return parsed.set(query=query).render_as_string(hide_password=True)


def weaknesses(settings: Settings) -> dict[str, str]:
    """The settings that give up something of security, and what."""
    gateway, engine = settings.gateway, settings.engine
    found = {
        "demo": settings.demo and "the root key and an API key lie in files beside the data",
        "gateway.tls_certificate": gateway.tls_certificate is None
        and "TLS is off: whoever sees the loopback reads all",
        "gateway.host": not is_loopback(gateway.host) and "the gateway can be reached from outside of this machine",
        "vault.seal": settings.vault.seal == "key-file" and "the root key opens without a person",
        "vault.plaintext_swap": settings.vault.plaintext_swap == "warn"
        and "memory may be swapped to a disk in plaintext",
        "engine.socket": engine.socket is not None and "the engine is somebody else's to start and to cage",
        "engine.isolation": engine.isolation == "where-allowed" and "the engine may run without namespaces of its own",
        "audit.retention_days": settings.audit.retention_days < SIX_MONTHS_DAYS
        and "the audit log is kept for less than six months",
        "audit.witness": not settings.audit.witness
        and "no witness is asked: a log that is cut off or put back to an old copy is found by nobody at once",
    }
    return {key: told for key, told in found.items() if told}


def changes(before: Configuration, now: Configuration, weak: Mapping[str, str]) -> list[Event]:
    """What is to be recorded of a start that knows the last one."""
    events = []
    for key in sorted(before.settings.keys() | now.settings.keys()):
        old, new = before.settings.get(key, ABSENT), now.settings.get(key, ABSENT)
        if old != new:
            details = {"old": old, "new": new, **({"weakens": weak[key]} if key in weak else {})}
            events.append(Event(CONFIG_CHANGED, SYSTEM, target=("setting", key), details=details))
    if before.model != now.model:
        both = {
            "old": before.model.name,
            "old_path": before.model.path,
            "old_fingerprint": before.model.fingerprint,
            "new": now.model.name,
            "new_path": now.model.path,
            "new_fingerprint": now.model.fingerprint,
        }
        events.append(Event(MODEL_CHANGED, SYSTEM, target=("model", now.model.name), details=both))
    return events


def recorded(now: Configuration, weak: Mapping[str, str], *, why: str) -> Event:
    """What is to be recorded of a start that knows of none before. `why`: an error's code; empty: it is the first."""
    details = {
        "digest": digest(now.settings),
        "model": now.model.name,
        "model_path": now.model.path,
        "model_fingerprint": now.model.fingerprint,
        **({"weak": ", ".join(sorted(weak))} if weak else {}),
    }
    outcome = Outcome.FAILURE if why else Outcome.SUCCESS
    return Event(CONFIG_RECORDED, SYSTEM, outcome, reason=why, target=("settings", ""), details=details)


def last_start(directory: Path, vault: Vault) -> Configuration | None:
    """What the last start was set to; None: there was none. Blocks.

    Raises:
        TamperedValue: what is kept of it was changed, or is another appliance's.
        HoldfastError: the vault is sealed.
    """
    try:
        opened = vault.decrypt((directory / LAST_START).read_bytes(), _BINDING)
    except FileNotFoundError:
        return None
    except KeyMissing:
        raise TamperedValue(_BINDING) from None
    try:
        return Configuration.from_bytes(opened)
    except (ValueError, KeyError, TypeError):
        raise TamperedValue(_BINDING) from None


def remember(directory: Path, vault: Vault, now: Configuration) -> None:
    """Keep what this start is set to. Blocks.

    Raises:
        OSError: it says what it said before.
        HoldfastError: the vault is sealed.
    """
    sealed = vault.encrypt(SYSTEM_SCOPE, KeyPurpose.RECORDS, now.to_bytes(), _BINDING)
    write_whole(directory / LAST_START, sealed)


def fingerprint(model: Path) -> str:
    """What tells a folder of a model from another one, as the rules say; empty: it cannot be read. Blocks."""
    seen = hashlib.sha256()
    try:
        files = sorted(path for path in model.rglob("*") if path.is_file())
        for path in files[:_MOST_FILES]:
            size = path.stat().st_size
            seen.update(_canonical([path.relative_to(model).as_posix(), size]))
            with path.open("rb") as file:
                if size <= _WHOLE_BYTES:
                    seen.update(file.read(_WHOLE_BYTES))
                else:
                    seen.update(file.read(_END_BYTES))
                    file.seek(-_END_BYTES, os.SEEK_END)
                    seen.update(file.read(_END_BYTES))
    except OSError:
        return ""
    return seen.hexdigest() if files else ""


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _canonical(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":")).encode()
