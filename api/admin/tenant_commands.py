"""`holdfast tenant` and `holdfast key`.

Rules:

- The secret of a new key is the only thing that `key create` prints to stdout, so that it can go straight to where it
  is kept; it is not shown again.
- Shredding asks for the tenant's name again.
"""

import re
import time
from typing import TYPE_CHECKING

import click

from appliance.cli import Console, Group, ago, api_key_option, in_words, moment, pass_console, printable, table

if TYPE_CHECKING:
    from api.admin import types
    from api.admin.client import AdminClient

_ISOLATION = click.Choice(["session", "tenant-prefix", "tenant"])
_IN_WORDS = {
    "session": "its sessions share nothing outside a session tree",
    "tenant-prefix": "its sessions share tools and system messages, and nothing after them",
    "tenant": "its sessions share everything",
}
_ROTATION_DEADLINE_S = 600.0  # it takes a while where there are many sessions
_SHREDDING_DEADLINE_S = 3600.0  # it takes longer where there are many turns
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


class _Duration(click.ParamType[float]):
    """`90s`, `30m`, `12h`, `30d`, `4w`; in seconds."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d{1,6})([smhdw])", str(value))
        if match is None or not int(match[1]):
            self.fail(f"{value!r} is no duration: give a number with its unit, such as 12h or 30d", param, ctx)
        return float(int(match[1]) * _UNITS_S[match[2]])


@click.group(cls=Group)
def tenant() -> None:
    """Create, set, list and shred tenants."""


@tenant.command("create")
@click.argument("name")
@click.option(
    "--idle-timeout",
    "idle_timeout_s",
    type=_Duration(),
    metavar="DURATION",
    help="How long a session's KV outranks others' after a turn, such as 15s.  [default: what the settings say]",
)
@click.option(
    "--isolation",
    type=_ISOLATION,
    default="session",
    show_default=True,
    help="What its sessions share on the engine: `tenant isolation` says more.",
)
@api_key_option
@pass_console
def create_tenant(console: Console, name: str, idle_timeout_s: float | None, isolation: "types.IsolationMode") -> None:
    """Create a tenant with keys of its own."""
    created = console.admin().create_tenant(name, idle_timeout_s=idle_timeout_s, isolation=isolation)
    console.result(created, f"Created the tenant {created.name} ({created.tenant_id}); {_IN_WORDS[created.isolation]}.")
    console.say(f"Next: {console.suggest(f'key create --tenant {created.name} --principal NAME')}")


@tenant.command("set")
@click.argument("name")
@click.option(
    "--audit-digests",
    type=click.Choice(["on", "off"]),
    help="Have keyed digests of what its turns ask and answer in the audit log.",
)
@click.option(
    "--take-out-harness-lines",
    type=click.Choice(["on", "off"]),
    help="Take lines of a harness's own accounting, another one for every call, out of system messages.",
)
@api_key_option
@pass_console
def set_tenant(
    console: Console,
    name: str,
    audit_digests: str | None,
    take_out_harness_lines: str | None,
) -> None:
    """Set what a tenant chose; NAME may be its id. In force for the next request."""
    if audit_digests is None and take_out_harness_lines is None:
        raise click.UsageError("say what to set: --audit-digests or --take-out-harness-lines")
    admin = console.admin()
    changed = admin.change_tenant(
        _tenant_id(admin, name),
        audit_digests=None if audit_digests is None else audit_digests == "on",
        take_out_harness_lines=None if take_out_harness_lines is None else take_out_harness_lines == "on",
    )
    digests = "carry keyed digests of their texts" if changed.audit_digests else "carry no digests"
    lines = "are taken out of" if changed.takes_out_harness_lines else "stay in"
    console.result(
        changed,
        f"The turns of {changed.name} {digests} in the audit log; harness lines {lines} system messages.",
    )


@tenant.command("isolation")
@click.argument("name")
@click.argument("mode", type=_ISOLATION)
@api_key_option
@pass_console
def set_isolation(console: Console, name: str, mode: "types.IsolationMode") -> None:
    """Set what a tenant's sessions share on the engine; NAME may be its id. In force for the next request.

    MODE is session (nothing outside a session tree), tenant-prefix (the tools and system messages; everything after
    them is the session's own) or tenant (everything). Sharing saves computing what was computed before; whoever shares
    can tell by the time an answer takes whether somebody of the tenant sent the same before. What was shared under the
    mode before is out of reach, and computed anew. Tenants never share anything with each other.
    """
    admin = console.admin()
    changed = admin.change_tenant(_tenant_id(admin, name), isolation=mode)
    console.result(changed, f"{changed.name}: {_IN_WORDS[changed.isolation]}.")


@tenant.command("list")
@api_key_option
@pass_console
def list_tenants(console: Console) -> None:
    """List tenants, and how long what of their sessions is kept."""
    listed = console.admin().tenants()
    rows = [
        (
            each.name,
            each.tenant_id,
            _kept_in_short(each.keeping),
            each.isolation,
            "on" if each.audit_digests else "off",
            "taken out" if each.takes_out_harness_lines else "kept",
            moment(each.created_at),
        )
        for each in listed.tenants
    ]
    console.result(
        listed,
        table(
            ("name", "id", "kept", "isolation", "audit digests", "harness lines", "created (UTC)"),
            rows,
            empty="There are no tenants.",
        ),
    )
    for each in listed.damaged:
        console.say(f"DAMAGED: {each.tenant_id}: {printable(each.why)}")
    if listed.damaged:
        console.say(
            "Restore their rows from a backup; one that cannot be restored can still be destroyed: "
            f"{console.suggest('tenant shred ID')}"
        )


@tenant.command("show")
@click.argument("name")
@api_key_option
@pass_console
def show_tenant(console: Console, name: str) -> None:
    """Show what is in force for a tenant; NAME may be its id."""
    admin = console.admin()
    shown = admin.tenant(_tenant_id(admin, name))
    console.result(shown, _tenant_text(shown))


@tenant.command("shred")
@click.argument("name")
@click.option("--yes", metavar="NAME", help="The tenant's name again, instead of being asked for it.")
@api_key_option
@pass_console
def shred_tenant(console: Console, name: str, yes: str | None) -> None:
    """Destroy all keys of a tenant and all of its sessions, for good; NAME may be its id.

    A tenant whose row is damaged, so that its name cannot be read, is named by its id: `tenant list` shows it.

    Its API keys are refused from the next request on, and turns that run are broken off. The audit log still verifies;
    what it has of the tenant can be read by nobody, and that the tenant was shredded, and by whom, is in it. Backups
    that were made before still hold the tenant. Its name can be given to another one.
    """
    admin = console.admin(deadline_s=_SHREDDING_DEADLINE_S)
    damaged = next((each for each in admin.tenants().damaged if each.tenant_id == name), None)
    if damaged is None:
        found = admin.tenant(_tenant_id(admin, name))
        tenant_id, called, who = found.tenant_id, found.name, f"{found.name} ({found.tenant_id})"
        what = f"{who}, made {moment(found.created_at)}"
    else:
        tenant_id = called = who = damaged.tenant_id
        what = f"{who}, whose name cannot be read ({damaged.why})"
    console.confirm_name(
        f"{printable(what)}: its keys, its sessions and its API keys, all of them. Nothing brings them back.",
        called,
        yes,
    )
    shredded = admin.shred_tenant(tenant_id)
    had = f"{shredded.sessions} sessions with {shredded.turns} turns"
    if shredded.erased:
        done = f"its keys are destroyed, and erased from the database files with its {had}."
    else:
        done = (
            f"nobody can reach its {had} any more. Its wrapped keys may be in the database files still: the appliance"
            " erases them as soon as it can, also after a restart. `holdfast logs gateway` says what is in the way."
        )
    console.result(shredded, f"Shredded {printable(who)}: {done}")
    if not shredded.leases_released:
        console.say(
            "The engine could not be told; what it still holds cannot be reached any more and is overwritten in use."
        )


@click.group(cls=Group)
def key() -> None:
    """Create, list and revoke API keys; rotate encryption keys."""


@key.command("create")
@click.option("--principal", required=True, metavar="NAME", help="Who uses it: a program, a team, a person.")
@click.option("--tenant", "tenant_name", metavar="TENANT", help="A name or an id.  [default: the only one]")
@click.option("--appliance", is_flag=True, help="For a principal of the appliance instead of a tenant's; needs --role.")
@click.option(
    "--role",
    type=click.Choice(["client", "auditor", "operator", "admin"]),
    default="client",
    show_default=True,
    help="What the principal may do; one that exists has to have it. A client is always a tenant's.",
)
@click.option("--label", help="A note on what the key is for.")
@click.option(
    "--model", "models", multiple=True, metavar="MODEL", help="Allow this model; again for more. [default: every model]"
)
@click.option("--requests-per-minute", type=click.IntRange(min=1), metavar="N")
@click.option("--concurrent-requests", type=click.IntRange(min=1), metavar="N")
@click.option("--tokens-per-day", type=click.IntRange(min=1), metavar="N", help="Prompt and answer, per UTC day.")
@click.option(
    "--grant",
    "permissions",
    multiple=True,
    type=click.Choice(["transcript:read"]),
    help="transcript:read allows reading what other principals said: the tenant's, with --appliance everybody.",
)
@click.option("--expires", "expires_in_s", type=_Duration(), metavar="DURATION", help="Such as 30d. [default: never]")
@api_key_option
@pass_console
def create_key(
    console: Console,
    principal: str,
    tenant_name: str | None,
    appliance: bool,
    role: "types.RoleName",
    label: str | None,
    models: tuple[str, ...],
    requests_per_minute: int | None,
    concurrent_requests: int | None,
    tokens_per_day: int | None,
    permissions: tuple[str, ...],
    expires_in_s: float | None,
) -> None:
    """Create an API key for a principal, who is made if the tenant has none of that name.

    With --appliance, for an administrator, an operator or an auditor of the whole appliance; an administrator of the
    appliance can do that. The key is printed to stdout, once: it is kept nowhere.
    """
    limits = {
        "models": list(models) or None,
        "requests_per_minute": requests_per_minute,
        "concurrent_requests": concurrent_requests,
        "tokens_per_day": tokens_per_day,
    }
    if appliance:
        if tenant_name is not None:
            raise click.UsageError("say whose key: --tenant TENANT or --appliance")
        if role == "client":
            raise click.UsageError("a client is always a tenant's: with --appliance give --role admin|operator|auditor")
        if any(limit is not None for limit in limits.values()):
            raise click.UsageError("a key of the appliance asks for no turns: with --appliance give no limits on them")
        created = console.admin().create_appliance_key(
            principal=principal, role=role, label=label, permissions=permissions, expires_in_s=expires_in_s
        )
    else:
        created = console.admin().create_key(
            tenant=tenant_name,
            principal=principal,
            role=role,
            label=label,
            limits=limits | {"permissions": list(permissions)},
            expires_in_s=expires_in_s,
        )
    whose = f"{principal}, {created.key.role} of {created.key.tenant or 'the appliance'}"
    console.say(f"Created {created.key.key_id} for {printable(whose)}. This is the key; it is not shown again:")
    console.result(created, created.secret)


@key.command("list")
@click.option("--tenant", "tenant_name", help="Only this tenant's: a name or an id.")
@api_key_option
@pass_console
def list_keys(console: Console, tenant_name: str | None) -> None:
    """List API keys. Their secrets are kept nowhere."""
    listed = console.admin().keys(tenant=tenant_name)
    now = time.time()
    rows = [
        (
            each.key_id,
            each.principal or each.principal_id,
            each.role or "-",
            each.tenant or "(appliance)",
            each.label or "-",
            _limits_in_words(each.limits),
            _key_state(each, now),
            ago(each.created_at, now),
        )
        for each in listed.keys
    ]
    console.result(
        listed,
        table(
            ("id", "principal", "role", "tenant", "label", "limits", "state", "created"),
            rows,
            empty="There are no API keys.",
        ),
    )


@key.command("revoke")
@click.argument("key_id")
@api_key_option
@pass_console
def revoke_key(console: Console, key_id: str) -> None:
    """Revoke an API key; it holds for the very next request."""
    revoked = console.admin().revoke_key(key_id)
    console.result(revoked, f"Revoked {revoked.key_id}; requests with it are refused from now on.")


@key.command("rotate")
@click.option("--tenant", "tenant_name", metavar="TENANT", help="This tenant's encryption keys: a name or an id.")
@click.option("--system", is_flag=True, help="The appliance's own.")
@api_key_option
@pass_console
def rotate_keys(console: Console, tenant_name: str | None, system: bool) -> None:
    """Put encryption keys under another key; what they encrypted stays as it is.

    The key that wrapped them opens none of them any more: a copy of it, or of the database from before, is of no use
    with what is written from now on. API keys and the passphrase stay the same.
    """
    if system == (tenant_name is not None):
        raise click.UsageError("say whose keys: --tenant TENANT or --system")
    rotated = console.admin(deadline_s=_ROTATION_DEADLINE_S).rotate_keys(tenant_name)
    whose = "the system" if rotated.tenant_id is None else f"{tenant_name} ({rotated.tenant_id})"
    console.result(rotated, f"{rotated.keys} keys of {printable(whose)} are under a new key; no data was written anew.")
    if not rotated.erased:
        console.say(
            "What the old key wrapped may be in the database files still: the appliance erases it as soon as it can,"
            " also after a restart. `holdfast logs gateway` says what is in the way."
        )


def _tenant_text(shown: "types.Tenant") -> str:
    kept = shown.keeping
    strict = kept.retention == "strict"
    idle = f"{in_words(kept.idle_timeout_s)}, and {in_words(kept.idle_timeout_after_tool_use_s)} after a tool call"
    quota = (
        f"others leave it {kept.kv_share:.0%}; its idle sessions hold {kept.kv_cap:.0%} together at most, "
        f"one of them {kept.session_kv_cap:.0%}"
    )
    of_model = "no model is served now" if kept.model is None else f"with {printable(kept.model)}"
    lines = [
        f"{printable(shown.name)} ({shown.tenant_id}), made {moment(shown.created_at)}",
        "",
        f"retention      {'strict: everything is dropped at the idle timeout' if strict else 'soft'}",
        f"idle timeout   {idle} ({of_model})",
        f"in each tier   {quota}",
        f"isolation      {shown.isolation}: {_IN_WORDS[shown.isolation]}",
        f"audit digests  {'on' if shown.audit_digests else 'off'}",
        f"harness lines  {'taken out' if shown.takes_out_harness_lines else 'kept'}",
    ]
    return "\n".join(lines)


def _kept_in_short(kept: "types.TenantKeeping") -> str:
    """`soft 15 s, 2 min after tools; share 10%`: what everybody has is left out of shares and caps."""
    parts = [
        f"{kept.retention} {in_words(kept.idle_timeout_s)}, {in_words(kept.idle_timeout_after_tool_use_s)} after tools",
        f"share {kept.kv_share:.0%}" if kept.kv_share else "",
        f"cap {kept.kv_cap:.0%}" if kept.kv_cap < 1 else "",
        f"a session's cap {kept.session_kv_cap:.0%}" if kept.session_kv_cap < 1 else "",
    ]
    return "; ".join(part for part in parts if part)


def _tenant_id(admin: "AdminClient", name: str) -> str:
    """The id of a tenant: the audit log names what was asked for by its id, so that is what is asked with."""
    return next((each.tenant_id for each in admin.tenants().tenants if each.name == name), name)


def _key_state(each: "types.Key", now: float) -> str:
    if each.revoked_at is not None:
        return f"revoked {ago(each.revoked_at, now)}"
    if each.expires_at is None:
        return "valid"
    if each.expires_at <= now:
        return f"expired {ago(each.expires_at, now)}"
    return f"valid for {in_words(each.expires_at - now)}"


def _limits_in_words(limits: "types.Limits") -> str:
    parts = [
        f"models {', '.join(limits.models)}" if limits.models is not None else "",
        f"{limits.requests_per_minute} requests/min" if limits.requests_per_minute is not None else "",
        f"{limits.concurrent_requests} at once" if limits.concurrent_requests is not None else "",
        f"{limits.tokens_per_day} tokens/day" if limits.tokens_per_day is not None else "",
        *limits.permissions,
    ]
    return "; ".join(part for part in parts if part) or "none"
