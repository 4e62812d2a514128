"""How `holdfast kv` reads: every number with its unit, every picture with its age."""

from typing import Any

import pytest

from api.admin import types
from api.admin.kv_commands import _that_fits, status_text

TIER = types.KvTier(
    tier="device",
    state="ok",
    detail="",
    block_bytes=1 << 20,
    capacity_blocks=1000,
    used_blocks=400,
    leased_blocks=300,
    sessions=2,
    free_blocks=600,
    capacity_bytes=1000 << 20,
    used_bytes=400 << 20,
    found_tokens=800,
    found_share=0.8,
)
WARM = types.FirstTokens(turns=3, p50_s=0.12, p90_s=0.3, p99_s=1.5, since=1_800_000_000.0)
SESSION = types.KvSession(
    session_id="ses_1",
    tenant_id="ten_1",
    worth_hits_per_s=0.0234,
    kept=[types.KvHeld(tier="device", blocks=30, tokens=960, kept_for="lease", ends_in_s=12.4)],
    last_turn=types.KvLastTurn(
        ended_at=1_800_000_098.0,
        prompt_tokens=1000,
        found_tokens={"device": 800},
        computed_tokens={"new": 45, "evicted": 155},
        first_token_s=0.456,
    ),
)
TENANT = types.KvTenant(
    tenant_id="ten_1",
    kept_sessions=2,
    leased_sessions=1,
    worths_hits_per_s=[0.001, 0.02, 0.5],
    reclaimed_blocks_total=1070,
    expired_leases_total=4,
    kept=[types.KvTenantTier(tier="device", blocks=30, share_blocks=0, cap_blocks=None)],
    turns=4,
    prompt_tokens=1000,
    repeated_tokens=850,
    found_tokens={"device": 800},
    computed_tokens={"new": 45, "evicted": 155},
    warm=WARM,
    cold=None,
)
STATUS = types.KvStatus(
    observed_at=1_800_000_100.0,
    age_s=0.25,
    counted_since=1_800_000_000.0,
    block_size_tokens=32,
    tiers=[TIER],
    disk=None,
    canary=None,
    recall=None,
    kept_sessions=2,
    leased_sessions=1,
    worths_hits_per_s=[0.001, 0.02, 0.5],
    reclaimed_blocks_total=70,
    reclaimed_blocks_per_s=1.5,
    reclaimed_over_s=58.0,
    expired_leases_total=4,
    ignored_leases_total=0,
    turns=4,
    prompt_tokens=1000,
    repeated_tokens=850,
    found_tokens={"device": 800},
    computed_tokens={"new": 45, "evicted": 155},
    warm=WARM,
    cold=None,
    tenants=[TENANT],
    sessions=[SESSION],
)


def test_a_picture_says_what_is_kept_why_and_until_when() -> None:
    text = status_text(STATUS)
    for part in (
        "seen 250 ms before; the gateway counts for 1 min 40 s",
        "1,000 blocks, 1000.0 MiB",
        "400 (40.0 %)",
        "800 tokens (80.0 %)",
        "On the device: 2 sessions, 1 of them with a lease that runs; worth 0.0010 to 0.5000 hits/s",
        "1.5 blocks/s over the last 58 s; since the engine began 70 blocks; 4 leases ran out",
        "Replicated: 85.0 % of them had been sent with the turn before, too",
        "Computed: 15.5 % evicted, 4.5 % new",
        "First token, warm: P50 120 ms, P90 300 ms, P99 1.5 s (3 turns since 2027-01-15 08:00:00Z)",
        "First token, cold: no streamed turn yet",
        "155 evicted, 45 new",
        "At least 1 sessions more keep something (--sessions).",
    ):
        assert part in text
    session = next(line for line in text.splitlines() if line.startswith("ses_1"))
    assert [cell.strip() for cell in session.split("  ") if cell.strip()][:2] == ["ses_1", "ten_1"]
    tenant = next(line for line in text.splitlines() if line.startswith("ten_1"))
    assert [cell.strip() for cell in tenant.split("  ") if cell.strip()] == [
        "ten_1",
        "2 (1 leased)",
        "30",
        "0.0010 to 0.5000",
        "1,070",
        "80.0 %",
        "85.0 %",
        "15.5 % evicted, 4.5 % new",
        "120 ms / 300 ms / 1.5 s",
        "-",
        "4",
        "1,000",
    ]
    assert "0.0234" in session
    assert "960 (lease, 12 s)" in session
    assert "2 s ago" in session
    assert session.endswith(" 456")


def test_without_the_engine_what_was_counted_stands_and_nothing_is_made_up() -> None:
    gone: dict[str, object] = {
        "age_s": None,
        "tiers": [],
        "sessions": [],
        "kept_sessions": None,
        "leased_sessions": None,
    }
    text = status_text(STATUS.model_copy(update=gone))
    assert text.splitlines()[1] == "What it keeps is not known now: `holdfast status` says why"
    assert "the engine did not answer" in text
    assert "blocks/s" not in text
    assert "ses_1" not in text
    assert "Found: 80.0 % device" in text


def test_what_each_tier_has_of_a_session_and_of_a_tenant_is_told_with_its_reason_and_its_end() -> None:
    tiers = [TIER, TIER.model_copy(update={"tier": "dram"}), TIER.model_copy(update={"tier": "disk", "sessions": 9})]
    kept = [
        types.KvHeld(tier="dram", blocks=30, tokens=960, kept_for="worth", ends_in_s=None),
        types.KvHeld(tier="disk", blocks=40, tokens=1280, kept_for="share", ends_in_s=7200.0),
    ]
    session = SESSION.model_copy(update={"session_id": None, "kept": kept, "worth_hits_per_s": None, "last_turn": None})
    quotas = [
        types.KvTenantTier(tier="device", blocks=30, share_blocks=250, cap_blocks=500),
        types.KvTenantTier(tier="disk", blocks=40, share_blocks=None, cap_blocks=None),
    ]
    tenant = TENANT.model_copy(update={"kept": quotas})
    status = STATUS.model_copy(update={"tiers": tiers, "sessions": [session], "tenants": [tenant]})
    lines = status_text(status).splitlines()
    line = next(line for line in lines if line.startswith("not known"))
    cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
    assert cells[:6] == ["not known", "ten_1", "-", "960 (worth)", "1,280 (share, 2 h)", "in use"]
    line = next(line for line in lines if line.startswith("ten_1"))
    cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
    assert cells[:5] == ["ten_1", "2 (1 leased)", "30 (share 250, cap 500)", "-", "40"]
    assert lines[-1] == "At least 8 sessions more keep something (--sessions)."


def test_what_needs_somebody_stands_before_everything_else() -> None:
    broken = TIER.model_copy(update={"tier": "disk", "state": "failed", "detail": "it cannot be used now: EIO"})
    lines = status_text(STATUS.model_copy(update={"tiers": [TIER, broken]})).splitlines()
    assert lines[1] == "disk FAILED: it cannot be used now: EIO"
    assert "FAILED" not in status_text(STATUS)


def test_a_session_is_found_among_the_tenants_by_the_beginning_of_its_tenants_id() -> None:
    session = SESSION.model_copy(update={"tenant_id": "ten_fe3ffd42d420e7a1137d533098cfb342"})
    assert "  ten_fe3ffd42…  " in status_text(STATUS.model_copy(update={"sessions": [session]}))


def test_what_a_terminal_has_no_room_for_is_said_to_be_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda: (20, 4))
    text = "\n".join(["short", "x" * 20, "y" * 21, "four", "five"])
    assert _that_fits(text).splitlines() == ["short", "x" * 20, "… 3 lines more"]
    monkeypatch.setattr("shutil.get_terminal_size", lambda: (20, 9))
    assert _that_fits(text).splitlines() == ["short", "x" * 20, "y" * 19 + "…", "four", "five"]


DISK = types.KvDisk(
    stored_blocks_total=50,
    loaded_blocks_total=20,
    evicted_blocks_total=3,
    expired_blocks_total=2,
    waiting_bytes=3 << 20,
    not_stored_total={"slow": 4, "off": 0},
    faults_total={"damaged": 1, "lost": 0},
    last_error="Input/output error (EIO)",
    last_error_age_s=61.0,
)


def test_what_went_wrong_on_the_disk_is_told_with_its_cause_and_age() -> None:
    lines = status_text(STATUS.model_copy(update={"disk": DISK})).splitlines()
    for line in (
        "On the disk: 50 blocks written, 20 read, 3 evicted, 2 expired; 3.0 MiB wait to be written",
        "Not written: 4 blocks, the disk is too slow",
        "Could not be read: 1 blocks, damaged",
        "Last error of the disk: Input/output error (EIO), 1 min 1 s before",
    ):
        assert line in lines


def test_what_came_back_wrong_is_told_aloud() -> None:
    def line(canary: types.KvCanary) -> str:
        text = status_text(STATUS.model_copy(update={"canary": canary}))
        return next(line for line in text.splitlines() if line.startswith("Restored against computed"))

    def canary(compared: int, worst: float | None, age_s: float | None, **more: Any) -> types.KvCanary:
        said = {"quarantined": False, "dropped_samples_total": 0, **more}
        return types.KvCanary(compared_blocks_total=compared, worst_error=worst, compared_age_s=age_s, **said)

    good = line(canary(32, 0.0021, 61.0))
    assert good.endswith("agrees; 32 blocks compared, largest error 0.21 %, the last 1 min 1 s before")
    assert "DIFFERS: nothing is restored any more; 33" in line(canary(33, None, 1.0, quarantined=True))
    assert "DIFFERS" in line(canary(0, 0.0, None, quarantined=True))
    assert line(canary(0, 0.0, None)).endswith("nothing was compared yet")
    busy = line(canary(0, 0.0, None, dropped_samples_total=7))
    assert busy.endswith("nothing was compared yet; 7 times what was noted went uncompared")


def test_what_was_recalled_is_told_with_what_came_of_it() -> None:
    def line(recall: types.KvRecall) -> str:
        text = status_text(STATUS.model_copy(update={"recall": recall}))
        return next(line for line in text.splitlines() if line.startswith("Recalled ahead"))

    counts = {"recalled_blocks_total": 90, "used_blocks_total": 60, "in_vain_blocks_total": 10}
    assert line(types.KvRecall(**counts, paused_for_s=0.0)).endswith(
        "90 blocks, of them 60 used, 10 in vain, 20 in DRAM still"
    )
    assert line(types.KvRecall(**counts, paused_for_s=12.0)).endswith("paused for 12 s, the disk is slow")
