"""A client of the admin API: what the command line and the screens know of a running appliance.

Rules:

- The socket is reached through a descriptor of its directory, so that its path may be longer than the 108 bytes of
  sockaddr_un.
- Every call has a deadline. An error that the appliance answers keeps its code, cause and remedy.
- No web framework is imported here.

    client = AdminClient(state_dir)
    client.status().ready
"""

import http.client
import json
import os
import socket
import struct
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from api.admin import types
from appliance.errors import Fault, HoldfastError

ADMIN_SOCKET = Path("run") / "admin.sock"
_UCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid
_CHUNK = 1 << 20
_MAX_ANSWER_BYTES = 1 << 30
_MAX_ERROR_BYTES = 64 << 10

_Answer = TypeVar("_Answer", bound=types.Wire)


class ApplianceDown(HoldfastError, ConnectionError):
    """Nothing answers on the admin socket."""

    code: ClassVar[str] = "appliance_down"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE


class ApplianceSilent(HoldfastError, TimeoutError):
    """The appliance is there and did not answer in time, or broke off."""

    code: ClassVar[str] = "appliance_silent"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE


class AdminSocketDenied(HoldfastError, PermissionError):
    """The admin socket is another user's."""

    code: ClassVar[str] = "admin_socket_denied"
    fault: ClassVar[Fault] = Fault.DENIED


class Refused(HoldfastError):
    """What the appliance answered instead of doing what was asked; carries the code and fault of the answer."""

    code: ClassVar[str] = "refused"

    def __init__(self, body: types.ErrorBody) -> None:
        super().__init__(body.message, cause=body.cause, remedy=body.remedy)
        # An error from another process keeps the name and the fault that it had there.
        vars(self).update(code=body.code, fault=Fault(body.fault))


class AdminClient:
    """The admin API of the appliance in `state_dir`.

    Args:
        api_key: act as this key's principal; by default as the local user, whom the kernel vouches for.
        deadline_s: for each call, from connecting to the last byte.
    """

    def __init__(self, state_dir: Path, *, api_key: str | None = None, deadline_s: float = 30.0) -> None:
        self._socket = state_dir / ADMIN_SOCKET
        self._state_dir = state_dir
        self._api_key = api_key
        self._deadline_s = deadline_s

    def gateway_pid(self) -> int:
        """The process that listens on the admin socket, as the kernel tells it."""
        with self._connected(self._deadline_s) as connection:
            pid, _, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            return int(pid)

    def status(self) -> types.Status:
        """Every part, what it is in and why."""
        return self._call(types.Status, "GET", "/v1/status")

    def ready(self) -> bool:
        """Whether everything serves: told to the appliance's own user, and to a key of the appliance."""
        try:
            with self._answer("GET", "/readyz"):
                return True
        except (ApplianceDown, ApplianceSilent):
            raise
        except HoldfastError:
            return False

    def unseal(self, passphrase: bytes | bytearray) -> types.VaultState:
        """Open the vault."""
        return self._call(types.VaultState, "POST", "/v1/vault/unseal", raw=passphrase)

    def seal(self) -> types.VaultState:
        """Close the vault."""
        return self._call(types.VaultState, "POST", "/v1/vault/seal")

    def rotate_keys(self, tenant: str | None) -> types.RotatedKeys:
        """Put a tenant's encryption keys under another key, or the system's (None). No data is written anew."""
        return self._call(types.RotatedKeys, "POST", "/v1/vault/rotate", body={"tenant": tenant})

    def create_tenant(
        self, name: str, *, idle_timeout_s: float | None = None, isolation: types.IsolationMode = "session"
    ) -> types.Tenant:
        """Create a tenant and its keys. The fields are those of `types.NewTenant`."""
        body = {"name": name, "idle_timeout_s": idle_timeout_s, "isolation": isolation}
        return self._call(types.Tenant, "POST", "/v1/tenants", body=body)

    def tenants(self) -> types.Tenants:
        """The tenants that the caller may know of."""
        return self._call(types.Tenants, "GET", "/v1/tenants")

    def tenant(self, tenant_id: str) -> types.Tenant:
        """One of them."""
        return self._call(types.Tenant, "GET", f"/v1/tenants/{_quote(tenant_id)}")

    def change_tenant(
        self,
        tenant_id: str,
        *,
        audit_digests: bool | None = None,
        isolation: types.IsolationMode | None = None,
        take_out_harness_lines: bool | None = None,
    ) -> types.Tenant:
        """Set what a tenant chose. The fields are those of `types.TenantChoices`."""
        body = {
            "audit_digests": audit_digests,
            "isolation": isolation,
            "take_out_harness_lines": take_out_harness_lines,
        }
        return self._call(types.Tenant, "POST", f"/v1/tenants/{_quote(tenant_id)}", body=body)

    def shred_tenant(self, tenant_id: str) -> types.ShreddedTenant:
        """Shred a tenant: all of its keys, its rows, what the engine holds of it."""
        return self._call(types.ShreddedTenant, "POST", f"/v1/tenants/{_quote(tenant_id)}/shred")

    def create_key(
        self,
        *,
        principal: str,
        tenant: str | None = None,
        role: str = "client",
        label: str | None = None,
        limits: Mapping[str, object] | None = None,
        expires_in_s: float | None = None,
    ) -> types.CreatedKey:
        """Create an API key, and its principal where there is none of that name. The fields are `types.NewKey`'s."""
        body = {
            "tenant": tenant,
            "principal": principal,
            "role": role,
            "label": label,
            "limits": dict(limits or {}),
            "expires_in_s": expires_in_s,
        }
        return self._call(types.CreatedKey, "POST", "/v1/keys", body=body)

    def create_appliance_key(
        self,
        *,
        principal: str,
        role: types.ApplianceRole,
        label: str | None = None,
        permissions: Sequence[str] = (),
        expires_in_s: float | None = None,
    ) -> types.CreatedKey:
        """Create an API key for a principal of the appliance. The fields are those of `types.NewApplianceKey`."""
        body = {
            "principal": principal,
            "role": role,
            "label": label,
            "permissions": list(permissions),
            "expires_in_s": expires_in_s,
        }
        return self._call(types.CreatedKey, "POST", "/v1/appliance/keys", body=body)

    def keys(self, *, tenant: str | None = None) -> types.Keys:
        """The API keys that the caller may know of."""
        return self._call(types.Keys, "GET", "/v1/keys", query={"tenant": tenant})

    def revoke_key(self, key_id: str) -> types.Key:
        """Revoke an API key; it holds for the very next request."""
        return self._call(types.Key, "POST", f"/v1/keys/{_quote(key_id)}/revoke")

    def sessions(self, *, tenant: str | None = None, limit: int = 50) -> types.SessionPage:
        """The sessions last used, at most `limit`."""
        return self._call(types.SessionPage, "GET", "/v1/sessions", query={"tenant": tenant, "limit": limit})

    def session(self, session_id: str) -> types.Session:
        """What may be known of one session without reading it."""
        return self._call(types.Session, "GET", f"/v1/sessions/{_quote(session_id)}")

    def transcript(self, session_id: str, *, before: int | None = None, limit: int | None = None) -> types.Transcript:
        """What was said in a session, in its newest turns, or the newest before one; at most `limit`."""
        query = {"before": before, "limit": limit}
        return self._call(types.Transcript, "GET", f"/v1/sessions/{_quote(session_id)}/transcript", query=query)

    def why(self, session_id: str, *, limit: int | None = None) -> types.Explanation:
        """Why a session's prompts had to be computed, in its newest turns, at most `limit`."""
        return self._call(types.Explanation, "GET", f"/v1/sessions/{_quote(session_id)}/why", query={"limit": limit})

    def kv(self, *, sessions: int = 50) -> types.KvStatus:
        """What is kept of sessions, with at most so many of them."""
        return self._call(types.KvStatus, "GET", "/v1/kv", query={"sessions": sessions})

    def forget(self, session_id: str) -> types.Forgotten:
        """Shred a session: its key, its rows, what the engine holds of it."""
        return self._call(types.Forgotten, "POST", f"/v1/sessions/{_quote(session_id)}/forget")

    def prove_isolation(self, *, rounds: int) -> types.IsolationProof:
        """Have it proved what crosses between sessions."""
        return self._call(types.IsolationProof, "POST", "/v1/prove/isolation", body={"rounds": rounds})

    def audit_status(self) -> types.AuditStatus:
        """How long the audit log is, and what is in its way."""
        return self._call(types.AuditStatus, "GET", "/v1/audit")

    def acknowledge_older_copy(self) -> types.OlderCopyAcknowledged:
        """End the alarm of an older copy."""
        return self._call(types.OlderCopyAcknowledged, "POST", "/v1/audit/acknowledge")

    def audit_exports(self) -> types.AuditExports:
        """How far behind each destination of the audit log is."""
        return self._call(types.AuditExports, "GET", "/v1/audit/exports")

    def add_audit_export(self, **wanted: str | int | None) -> types.AuditExport:
        """Try a destination of the audit log and add it. The fields are those of `types.NewAuditExport`."""
        return self._call(types.AuditExport, "POST", "/v1/audit/exports", body=wanted)

    def remove_audit_export(self, name: str) -> types.AuditExport:
        """End a destination; how it was."""
        return self._call(types.AuditExport, "POST", f"/v1/audit/exports/{_quote(name)}/remove")

    @contextmanager
    def audit_excerpt(self, *, first: int, end: int | None) -> Iterator[Iterator[bytes]]:
        """The pieces of a file with the events [first, end) of the audit log."""
        with self._answer("GET", "/v1/audit/excerpt", query={"first": first, "end": end}) as response:
            yield iter(lambda: self._read(response, _CHUNK), b"")

    def try_audit_export(self, name: str) -> types.AuditExport:
        """Send a test event to a destination."""
        return self._call(types.AuditExport, "POST", f"/v1/audit/exports/{_quote(name)}/test")

    def audit_entries(self, **wanted: str | float | None) -> types.AuditPage:
        """Entries of the audit log, the newest first. `since` and `until` are epoch seconds."""
        return self._call(types.AuditPage, "GET", "/v1/audit/entries", query=wanted)

    def audit_entry(self, sequence: int) -> types.AuditEntry:
        """One entry of the audit log."""
        return self._call(types.AuditEntry, "GET", f"/v1/audit/entries/{sequence}")

    def audit_digest(self, *, tenant: str, text: str, sha256: str) -> types.AuditDigest:
        """The keyed digest of a text of that SHA-256; `text` is `prompt` or `answer`."""
        body = {"tenant": tenant, "text": text, "sha256": sha256}
        return self._call(types.AuditDigest, "POST", "/v1/audit/digest", body=body)

    def audit_witness_request(self, *, witness: str | None, old_size: int | None) -> types.AuditWitnessAsked:
        """What to carry to a witness."""
        query = {"witness": witness, "old_size": old_size}
        return self._call(types.AuditWitnessAsked, "GET", "/v1/audit/witness", query=query)

    def audit_witness_reply(self, *, request: str, reply: str, witness: str) -> types.AuditWitnessed:
        """Keep what a witness replied."""
        body = {"request": request, "reply": reply, "witness": witness}
        return self._call(types.AuditWitnessed, "POST", "/v1/audit/witness", body=body)

    @contextmanager
    def backup(self) -> Iterator[Iterator[bytes]]:
        """The pieces of a backup file, made while the appliance serves."""
        with self._answer("POST", "/v1/backup") as response:
            yield iter(lambda: self._read(response, _CHUNK), b"")

    def _call(
        self,
        answer: type[_Answer],
        method: str,
        path: str,
        *,
        body: Mapping[str, object] | None = None,
        raw: bytes | bytearray | None = None,
        query: Mapping[str, str | float | None] | None = None,
    ) -> _Answer:
        with self._answer(method, path, body=body, raw=raw, query=query) as response:
            if (response.length or 0) > _MAX_ANSWER_BYTES:
                raise self._silent(http.client.HTTPException(f"its answer is longer than {_MAX_ANSWER_BYTES} bytes"))
            return answer.model_validate_json(self._read(response))

    @contextmanager
    def _answer(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, object] | None = None,
        raw: bytes | bytearray | None = None,
        query: Mapping[str, str | float | None] | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        given = {name: value for name, value in (query or {}).items() if value is not None}
        target = f"{path}?{urllib.parse.urlencode(given)}" if given else path
        headers = {"Host": "localhost", "Connection": "close"}
        payload: bytes | bytearray | None = raw
        if body is not None:
            payload = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        with self._connected(self._deadline_s) as raw_socket:
            connection = http.client.HTTPConnection("localhost")
            connection.sock = raw_socket
            try:
                connection.request(method, target, body=payload, headers=headers)
                response = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                raise self._silent(error) from error
            with response:
                if response.status >= 400:
                    raise _refusal(response.status, self._read(response, _MAX_ERROR_BYTES))
                yield response

    def _read(self, response: http.client.HTTPResponse, at_most: int | None = None) -> bytes:
        try:
            return response.read(at_most)
        except (OSError, http.client.HTTPException) as error:
            raise self._silent(error) from error

    @contextmanager
    def _connected(self, deadline_s: float) -> Iterator[socket.socket]:
        connection = _DeadlineSocket(time.monotonic() + deadline_s)
        try:
            self._connect(connection)
            yield connection
        finally:
            connection.close()

    def _connect(self, connection: socket.socket) -> None:
        try:
            directory = os.open(self._socket.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                connection.connect(f"/proc/self/fd/{directory}/{self._socket.name}")
            finally:
                os.close(directory)
        except PermissionError:
            raise AdminSocketDenied(
                "the admin socket may not be used",
                cause=f"{self._socket} belongs to another user",
                remedy="Run the command as the user who ran `holdfast init`",
            ) from None
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            raise ApplianceDown(
                "the appliance is not running",
                cause=f"nothing answers on {self._socket}",
                remedy="Start it with `holdfast up`, or name another state directory with --state-dir",
            ) from None
        except OSError as error:
            raise self._silent(error) from error

    def _silent(self, error: Exception) -> ApplianceSilent:
        told = "nothing came in time" if isinstance(error, TimeoutError) else f"{type(error).__name__}: {error}"
        return ApplianceSilent(
            "the appliance did not answer",
            cause=f"within {self._deadline_s:g} s on {self._socket}: {told}",
            remedy="`holdfast logs gateway` tells what it is busy with; `holdfast status` asks again",
        )


class _DeadlineSocket(socket.socket):
    """A Unix socket that allows each operation what is left until one deadline, so that a slow trickle ends too."""

    def __init__(self, deadline: float) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self._deadline = deadline
        self.settimeout(max(0.001, deadline - time.monotonic()))

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        self._shorten()
        return super().recv_into(*args, **kwargs)

    def sendall(self, *args: Any, **kwargs: Any) -> None:
        self._shorten()
        super().sendall(*args, **kwargs)

    def _shorten(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline passed")
        self.settimeout(left)


def _refusal(status: int, answer: bytes) -> HoldfastError:
    try:
        return Refused(types.ErrorBody.model_validate(json.loads(answer)["error"]))
    except (ValueError, KeyError, TypeError):
        return HoldfastError(
            "the appliance answered with an error that cannot be read",
            cause=f"HTTP status {status}",
            remedy="`holdfast logs gateway` tells what happened",
        )


def _quote(text: str) -> str:
    return urllib.parse.quote(text, safe="")
