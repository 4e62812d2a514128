"""An entry of the log as an event of LEEF 2.0, QRadar's Log Event Extended Format, and back.

Rules:

- What `formats` asks of every format. The number of the mapping is `MAPPING`; the proof is in `HoldfastAuditProof`, the
  last attribute.
- Attributes are divided by `^`, which prints: a tab would not come through a syslog relay that escapes what does not.
  LEEF has no escapes. So a `^` is written `<U+005E>`, in the proof `\\u005e` (it is JSON), and a `|` in the header
  `<U+007C>`; what is not to be seen is written as `facts.shown` does.
- Each key comes once, and predefined ones are used where there are any.

IBM QRadar: LEEF event components, predefined event attributes, custom event date format.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

from appliance.audit.siem.facts import (
    PRODUCT,
    PROOF_KEY,
    VENDOR,
    Facts,
    facts_of_checkpoint,
    facts_of_entry,
    facts_of_trial,
    made_again,
    object_text,
    proof_text,
    read_object,
    shown,
    utc_moment,
)
from appliance.audit.siem.formats import Carried, CheckpointEvent, Disclosed, invalid
from appliance.audit.siem.transport import Message

MAPPING: Final = 1
DELIMITER: Final = "^"
_BEGIN: Final = f"LEEF:2.0|{VENDOR}|{PRODUCT}|"
_MAX_HEADER: Final = 255
_MAX_NAME: Final = 255
_MAX_TEXT: Final = 1024
_MAX_OBJECT: Final = 4096


class Attribute(NamedTuple):
    """An attribute: `predefined` by LEEF, or one of ours. `limit`: its longest text, in characters."""

    name: str
    predefined: bool
    limit: int
    holds: str
    value: Callable[[Facts], str]


ATTRIBUTES: Final = (
    Attribute("devTime", True, 40, "when it happened, UTC", lambda facts: f"{utc_moment(facts.wall_ms)}+0000"),
    Attribute("devTimeFormat", True, 40, "how `devTime` is written", lambda _: "yyyy-MM-dd'T'HH:mm:ss.SSSZ"),
    Attribute("sev", True, 2, "severity, 1 to 10", lambda facts: str(facts.severity.of_ten)),
    Attribute("cat", True, _MAX_TEXT, "outcome: success, failure, refused", lambda facts: facts.outcome),
    Attribute("src", True, 39, "`source`, an address", lambda facts: str(facts.address or "")),
    Attribute("identSrc", True, 39, "the same: whose it is, is known by it", lambda facts: _known_by_address(facts)),
    Attribute("usrName", True, _MAX_NAME, "`actor.id`, or `actor.kind`", lambda facts: facts.actor),
    Attribute("accountName", True, _MAX_NAME, "`tenant_id`", lambda facts: facts.tenant_id),
    Attribute("role", True, _MAX_TEXT, "`actor.role`", lambda facts: facts.actor_role),
    Attribute("resource", True, _MAX_TEXT, "`target`: kind/id", lambda facts: _target(facts)),
    Attribute("msg", False, _MAX_TEXT, "what the event means", lambda facts: facts.meaning),
    Attribute("reason", False, _MAX_TEXT, "`reason`: an error's code", lambda facts: facts.reason),
    Attribute("sourceName", False, _MAX_TEXT, "`source`, where it is no address", lambda facts: _source_name(facts)),
    Attribute("requestId", False, _MAX_TEXT, "`request_id`", lambda facts: facts.request_id),
    Attribute("sessionId", False, _MAX_TEXT, "`session_id`", lambda facts: facts.session_id),
    Attribute("logEntry", False, _MAX_TEXT, "origin/sequence: what to know a repeat by", lambda facts: facts.id),
    Attribute("logOrigin", False, _MAX_NAME, "origin of the log", lambda facts: facts.origin),
    Attribute("logSequence", False, 20, "sequence in the log", lambda facts: _sequence(facts)),
    Attribute("counts", False, _MAX_OBJECT, "`counts`, JSON", lambda facts: object_text(facts.counts)),
    Attribute("details", False, _MAX_OBJECT, "`details`, JSON", lambda facts: object_text(facts.details)),
    Attribute("withheld", False, _MAX_TEXT, "why the record is withheld", lambda facts: facts.withheld),
)


class Leef:
    """The format, as `formats.Format` has it."""

    name: Final = "leef"

    def entry(self, origin: str, disclosed: Disclosed) -> Message:
        """See `Format.entry`."""
        return _message(facts_of_entry(origin, disclosed, MAPPING))

    def checkpoint(self, origin: str, checkpoint: CheckpointEvent, wall_ms: int) -> Message:
        """See `Format.checkpoint`."""
        return _message(facts_of_checkpoint(origin, checkpoint, wall_ms, MAPPING))

    def trial(self, origin: str, wall_ms: int) -> Message:
        """See `Format.trial`."""
        return _message(facts_of_trial(origin, wall_ms, MAPPING))

    def find(self, line: str) -> int:
        """See `Format.find`."""
        return line.find(_BEGIN)

    def read(self, text: str) -> Carried:
        """See `Format.read`."""
        proof = text.partition(f"{DELIMITER}{PROOF_KEY}=")[2]
        carried, made = made_again(self, read_object(proof), MAPPING)
        if (expected := made.payload.decode()) != text:
            pairs = zip(expected.split(DELIMITER), text.split(DELIMITER), strict=False)
            named = next((one.partition("=")[0] for one, other in pairs if one != other), "its end")
            where = "its header" if named.startswith(_BEGIN) else named
            raise invalid(f"what it says is not what its entry and record say: {where}"[:300])
        return carried


def _message(facts: Facts) -> Message:
    header = "|".join(_plain(text, _MAX_HEADER, "|", DELIMITER) for text in (facts.version or "unknown", facts.action))
    attributes = [
        f"{attribute.name}={_plain(value, attribute.limit, DELIMITER)}"
        for attribute in ATTRIBUTES
        if (value := attribute.value(facts))
    ]
    attributes.append(f"{PROOF_KEY}={proof_text(facts).replace(DELIMITER, _IN_JSON)}")
    line = f"{_BEGIN}{header}|{DELIMITER}|{DELIMITER.join(attributes)}"
    return Message(line.encode(), facts.wall_ms, facts.severity.value, facts.action, facts.id)


_IN_JSON: Final = f"\\u{ord(DELIMITER):04x}"


def _plain(text: str, limit: int, *without: str) -> str:
    """A text as it may be shown, without the characters that would end it."""
    for each in without:
        text = text.replace(each, f"<U+{ord(each):04X}>")
    return shown(text, limit)


def _known_by_address(facts: Facts) -> str:
    """QRadar takes it that this address is that user's: only for one who has shown who it is."""
    return str(facts.address or "") if facts.actor_id else ""


def _target(facts: Facts) -> str:
    return f"{facts.target_kind}/{facts.target_id}" if facts.target_id else facts.target_kind


def _source_name(facts: Facts) -> str:
    return "" if facts.address else facts.source


def _sequence(facts: Facts) -> str:
    return "" if facts.sequence is None else str(facts.sequence)
