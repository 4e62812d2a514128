"""Makes an appliance: root key, database, keys, first tenant, first administrator. Offline, before any gateway runs.

Rules:

- It is built beside its place and put there by one rename: there is a whole appliance or none.
- What is there already is never overwritten.
- The first administrator is whoever runs this, known by uid. Reading transcripts has to be granted by name.
- The key file of a demonstration, and its API key, are made here once and kept with mode 0600.
"""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from api.private_files import new_private_file, sync_folder
from api.roots import KEY_FILE, SEALED_ROOT
from appliance.errors import Fault, HoldfastError
from appliance.identity import Identity, Permission, Role, Scopes
from appliance.settings import Settings
from appliance.store import DatabaseKeys, Store
from appliance.vault import RootKey, Vault, create_key_file_seal, create_passphrase_seal

SETTINGS_FILE = "holdfast.toml"
DATABASE = "holdfast.db"
_ADMINISTRATOR = "local administrator"
_DEMO_PRINCIPAL = "demonstration"


class AlreadyInitialised(HoldfastError, FileExistsError):
    """There is an appliance, or something else, where one was to be made."""

    code: ClassVar[str] = "already_initialised"
    fault: ClassVar[Fault] = Fault.CONFLICT


class CannotInitialise(HoldfastError, OSError):
    """The state directory cannot be written."""

    code: ClassVar[str] = "cannot_initialise"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


@dataclass(frozen=True, slots=True)
class Made:
    """A new appliance."""

    state_dir: Path
    seal: str
    root_id: str
    tenant_id: str
    administrator_uid: int
    permissions: list[str]


def is_initialised(state_dir: Path) -> bool:
    """Whether `state_dir` holds an appliance."""
    return (state_dir / SEALED_ROOT).exists()


def refuse_to_overwrite(state_dir: Path) -> None:
    """Raises `AlreadyInitialised` unless `state_dir` is missing or empty."""
    if not state_dir.exists() or not any(state_dir.iterdir()):
        return
    what = "an appliance" if is_initialised(state_dir) else "something that is no appliance"
    raise AlreadyInitialised(
        f"{state_dir} is in use",
        cause=f"it holds {what}, and nothing is ever overwritten",
        remedy="Start it with `holdfast up`, or choose another place with --state-dir",
    )


def initialise(
    settings: Settings,
    *,
    passphrase: bytearray | None,
    tenant_name: str,
    permissions: Collection[str] = (),
    demo_key_file: str | None = None,
) -> Made:
    """Make the appliance that `settings` describe, in `settings.state_dir`.

    Args:
        passphrase: seals the root key, and is overwritten; None: a key file does.
        permissions: what the first administrator may do besides administering.
        demo_key_file: the name of a file in the state directory for the API key of a demonstration.

    Raises:
        AlreadyInitialised: there is something in its place.
        CannotInitialise: its place cannot be written.
    """
    refuse_to_overwrite(settings.state_dir)
    place = settings.state_dir
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}.init-"))
        try:
            made = _build(settings, staged, passphrase, tenant_name, permissions, demo_key_file)
            sync_folder(staged)
            staged.rename(place)
            sync_folder(place.parent)
        finally:
            shutil.rmtree(staged, ignore_errors=True)  # gone already, unless something failed
    except HoldfastError:
        raise
    except OSError as error:
        raise CannotInitialise(
            f"no appliance was made in {place}",
            cause=f"{error.filename or place}: {error.strerror}",
            remedy="Choose a place that you may write to, with room, with --state-dir",
        ) from None
    return made


def _build(
    settings: Settings,
    staged: Path,
    passphrase: bytearray | None,
    tenant_name: str,
    permissions: Collection[str],
    demo_key_file: str | None,
) -> Made:
    root = RootKey.generate()
    if passphrase is None:
        seal = create_key_file_seal(root, staged / KEY_FILE)
    else:
        seal = create_passphrase_seal(root, passphrase)
        passphrase[:] = bytes(len(passphrase))
    _write(staged / SEALED_ROOT, seal)
    _write(staged / SETTINGS_FILE, settings_text(settings).encode())
    store = Store.open(settings.store.url or f"sqlite:///{staged / DATABASE}")
    try:
        vault = Vault(DatabaseKeys(store))
        vault.open(root)
        return asyncio.run(_people(settings, store, vault, staged, tenant_name, permissions, demo_key_file))
    finally:
        store.close()


async def _people(
    settings: Settings,
    store: Store,
    vault: Vault,
    staged: Path,
    tenant_name: str,
    permissions: Collection[str],
    demo_key_file: str | None,
) -> Made:
    """The system's keys, the first tenant and the first administrator."""
    identity = Identity(store, vault)
    await identity.establish()
    tenant = await identity.create_tenant(tenant_name)
    await identity.create_principal(
        None,
        _ADMINISTRATOR,
        Role.ADMIN,
        uid=os.getuid(),
        permissions=frozenset(Permission(permission) for permission in permissions),
    )
    if demo_key_file is not None:
        client = await identity.create_principal(tenant, _DEMO_PRINCIPAL, Role.CLIENT)
        _, secret = await identity.create_key(client, Scopes(), label="made by `holdfast up --demo`")
        _write(staged / demo_key_file, f"{secret}\n".encode())
    return Made(
        state_dir=settings.state_dir,
        seal=settings.vault.seal,
        root_id=vault.root_id,
        tenant_id=tenant.tenant_id,
        administrator_uid=os.getuid(),
        permissions=list(permissions),
    )


def settings_text(settings: Settings) -> str:
    """What a new `holdfast.toml` says: what this appliance was made with, and every default as a comment."""
    return _SETTINGS.format(demo="demo = true\n" if settings.demo else "# demo = false\n", seal=settings.vault.seal)


def _write(path: Path, content: bytes) -> None:
    with new_private_file(path) as file:
        file.write(content)


_SETTINGS = """\
# The settings of this appliance. What is commented out is the default. The environment can say otherwise
# (HOLDFAST_GATEWAY__PORT=8400), and flags have the last word. `holdfast doctor` tells whether this can be read.

{demo}
[gateway]
# host = "127.0.0.1"        # another than a loopback address needs the two TLS files
# port = 8321
# allowed_hosts = ["localhost", "127.0.0.1", "[::1]"]
# tls_certificate = ""      # a path
# tls_private_key = ""      # a path
# max_body_bytes = 16777216
# max_header_bytes = 65536
# max_json_values = 250000  # in a body; counted by its brackets, braces and commas
# max_messages = 20000
# max_streams = 1024
# request_timeout_s = 600.0
# drain_timeout_s = 30.0    # how long a stop lets what runs finish
# unread_timeout_s = 10.0   # how long an answer waits for a client that does not read it

[vault]
seal = "{seal}"             # how this appliance was made; changing it here changes nothing
# plaintext_swap = "warn"   # or "refuse": do not start where memory may be swapped to a disk in plaintext

[store]
# url = ""                  # a PostgreSQL server's; by default SQLite in this directory

[engine]
# python = ""               # the interpreter of the engine's environment; found beside the gateway's by default
# model = ""                # a folder with a model; the demonstration model by default
# served_name = ""          # what clients call it; the folder's name by default; the demonstration's is holdfast-demo
# socket = ""               # of an engine that somebody else runs
# tool_call_parser = ""     # one of vLLM's, for a model that calls tools
# block_size = 32           # tokens
# kv_cache_bytes = 1073741824
# max_model_len = 0         # tokens; what the model says by default
# max_num_seqs = 16
# isolation = "where-allowed"  # or "required"
# eager = true              # start quicker, run slower; by default on a CPU
# ready_timeout_s = 600.0
# restart_backoff_s = 1.0
# lease_fraction = 0.9      # of the device's blocks, the most that leases may hold

[tiers]
# dram_bytes = 0            # of this machine's memory, for KV that does not fit on the device; taken at the start
# disk_bytes = 0            # of encrypted files, for KV that does not fit there either
# disk_dir = ""             # in the state directory by default; elsewhere, in a folder holdfast-kv in there
# disk_ttl_s = 43200.0      # how long a file is kept that nobody asks for

[sessions]
# idle_timeout_s = 15.0     # how long a session's KV outranks others' after a turn
# idle_timeout_s_by_model = {{ }}
# idle_timeout_after_tool_use_s = 120.0  # the same, where the turn ended because the model called a tool
# idle_timeout_after_tool_use_s_by_model = {{ }}
# session_kv_cap = 1.0      # of each tier's blocks, the most that one idle session holds
# tenants = {{ }}  # by name: retention ("strict": all is dropped at the idle timeout), kv_share, kv_cap, ...

[admission]
# most_waiting = 256        # turns that wait for the engine; more are refused
# longest_wait_s = 60.0     # after which a turn goes before others
# weight_by_tenant = {{ }}    # a tenant's share when the engine is full, by name; others have 1
# most_priority = 10        # the highest that agents may ask for among their tenant's turns
# most_priority_by_tenant = {{ }}

[audit]
# retention_days = 400      # how long the audit log's entries are kept; under 183 only with an override
# retention_override = {{ by = "", reason = "" }}  # whose word it is and why; both are recorded in the log
# witness = {{ }}  # by name: who co-signs it over the network: url, vkey, ca, ...; docs/audit.md
"""
