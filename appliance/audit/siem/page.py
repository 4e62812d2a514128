"""The page that says what each event looks like in each format: `docs/siem-formats.md`, made from the catalogue."""

from typing import Final

from appliance.audit.events import CATALOGUE, EventClass, Outcome
from appliance.audit.siem import cef, ecs, leef
from appliance.audit.siem.facts import PROOF_KEY
from appliance.audit.siem.severity import Severity, severity_of


def formats_page() -> str:
    """The whole page."""
    return _PAGE.format(
        proof=PROOF_KEY,
        classes="\n".join(_class_row(known) for known in CATALOGUE.values()),
        severities="\n".join(f"| {each.name.lower()} | {each.value} | {each.of_ten} |" for each in Severity),
        cef="\n".join(
            f"| `{each.name}` | {f'`{each.label}`' if each.label else ''} | {each.holds} | {each.limit} |"
            for each in cef.FIELDS
        ),
        leef="\n".join(
            f"| `{each.name}` | {'LEEF' if each.predefined else 'ours'} | {each.holds} | {each.limit} |"
            for each in leef.ATTRIBUTES
        ),
        ecs="\n".join(f"| {_code(names)} | {holds} |" for names, holds in ecs.FIELDS),
    )


def _class_row(known: EventClass) -> str:
    category = ecs.categories(known.ocsf)
    named = "" if category is None else f"{category[0]} / {category[1]}"
    graves = {severity_of(known.number, outcome).name.lower(): None for outcome in (Outcome.SUCCESS, Outcome.FAILURE)}
    return f"| `{known.action}` | {known.ocsf[0]}:{known.ocsf[1]} | {named} | {', '.join(graves)} |"


def _code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))


_PAGE: Final = """\
# Formats of the SIEM export

Made from the catalogue in `appliance/audit/events.py` and the formats in `appliance/audit/siem/`; a test compares the
two. How a destination is set up is in [siem-transports.md](siem-transports.md), what the events mean in
[audit-events.md](audit-events.md).

    holdfast audit export add NAME URL --format ocsf|cef|leef|ecs …

Every format says the same, and every event carries the proof of it: the log's origin, the entry's sequence, its leaf
hash, the entry's bytes, the record as it was sealed, and the salt that opens the entry's commitment to it. So whoever
has the log's public key checks what arrived, in any format, one or many in one file:

    holdfast audit verify-export FILE --key 'holdfast.1f…+0422a5b5+ATqG…'

The proof is `unmapped.holdfast` in OCSF, `holdfast.proof` in ECS, and `{proof}` in CEF and LEEF, where it is JSON and
the last field. An event is one line. What ends a line, moves a cursor or turns the direction of writing is shown as
`<U+202E>` in CEF and LEEF and escaped in JSON, where only a NUL is shown as `<U+0000>`: receivers take it for the end
of a text. A text that is longer than its field is cut and ends in `…`. The exact text is in the record of the proof. A
record is withheld when its tenant was shredded, when the event would be too long
for the destination, or when what is on the disk is not what the entry names; the event says which (a claim of
the sender's, no more), and the entry counts.

An event may come more than once: it is known by `origin/sequence` (`metadata.uid` in OCSF, `event.id` in ECS,
`flexString1` in CEF, `logEntry` in LEEF). Behind the entries come events `audit.checkpoint`, with the log's signature
of all that was sent: keep them. `audit.export.test` is what a destination is tried with.

## Classes and severities

*ECS*: `event.category` / `event.type`. *Severity*: of one that succeeded, and of one that failed or was refused where
that differs.

| action | OCSF | ECS | severity |
|---|---|---|---|
{classes}

| severity | OCSF `severity_id` | CEF, LEEF, ECS |
|---|---|---|
{severities}

## OCSF 1.8.0

Class and activity are in the table above. [schema.ocsf.io](https://schema.ocsf.io/1.8.0) says what each class holds;
what it has no place for is in `unmapped`.

## CEF

`CEF:0|Holdfast|Holdfast|version|action|meaning|severity|extension`, for ArcSight and what reads its format. In the
header `\\` and `|` are escaped, in the extension `\\`, `=` and the ends of lines. A field is there when there is
something to say.

| key | label | what it holds | characters |
|---|---|---|---|
{cef}
| `{proof}` | | the proof | |

## LEEF 2.0

`LEEF:2.0|Holdfast|Holdfast|version|action|^|attributes`, for QRadar. Attributes are divided by `^`, which prints and
so comes through a relay that escapes tabs. LEEF has no escapes: a `^` is written `<U+005E>`, in the proof
`\\u005e`. `identSrc` is there only for a caller who has shown who it is: QRadar takes the address for that user's.

| key | from | what it holds | characters |
|---|---|---|---|
{leef}
| `{proof}` | ours | the proof | |

## ECS 8.17

A document for Elasticsearch. `refused` is the outcome `failure`, in the category `api` with the type `denied` besides;
what it was called is in `holdfast.outcome`.

| field | what it holds |
|---|---|
{ecs}

Nothing of `holdfast.proof` need be searched. A template that leaves it out of the index and keeps documents as they
were sent, which a check needs:

    PUT _index_template/holdfast-audit
    {{"index_patterns": ["logs-holdfast.audit-*"], "data_stream": {{}}, "priority": 500, "template": {{
      "settings": {{"index.mode": "standard"}}, "mappings": {{"date_detection": false, "properties": {{
      "holdfast": {{"properties": {{"proof": {{"type": "object", "enabled": false}}}}}}}}}}}}}}

Without `date_detection` the first text of a field that looks like a date would make it one, and a later text be
refused: then the export stands still.
"""
