"""How much a JSON schema may ask of the engine, which makes a grammar of it.

The engine compiles grammars one after the other on a small machine, and gives none of them up: one that takes minutes
holds up every other client's. Where it follows a schema, or a regular expression in one, too deep, its stack ends and
vLLM's front end with it. So what is compiled is bounded here.

Rules:

- What is bounded is counted over all the schemas of a request, before anything is kept or sent.
- A schema within the bounds is not judged: the engine says what it does not know. Except where it does not say so: one
  that nothing can fulfil because it is defined by itself alone (the engine compiles it, and fails when no token may
  come), and what xgrammar leaves out of a grammar without a word to the client: a pattern that looks ahead or behind,
  and a reference to somewhere else than the schema itself.
- The bounds on choices and on texts are OpenAI's own for structured outputs, those on patterns and on numbers are ours.
- No I/O.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from api.openai.errors import RequestError

MOST_VALUES: Final = 20_000  # objects, lists and plain values
MOST_CHOICES: Final = 1_000  # of all lists to choose from
MOST_CHARACTERS: Final = 120_000  # of names and texts
MOST_PATTERN_CHARACTERS: Final = 512  # of one regular expression
MOST_COUNTED_PROPERTIES: Final = 2_500  # an object's properties times how many of them it must or may have
MOST_COUNT: Final = (1 << 31) - 1

# Half of where it was first seen to end: 40 definitions of 50 arrays in one another, each referring to the next.
MOST_DEPTH: Final = 1_000  # levels, of the deepest schema, times the number of what schemas refer to

_CHOICES = ("enum", "anyOf", "oneOf", "allOf", "prefixItems")
_PROPERTY_COUNTS = ("minProperties", "maxProperties")
# An escaped character, a class of characters, or what begins to look ahead or behind.
_LOOKING = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|(?P<looks>\(\?<?[=!])", re.DOTALL)
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", *_PROPERTY_COUNTS)


def check_schemas(param: str, schemas: Iterable[Mapping[str, Any]]) -> None:
    """Refuse what would keep the engine busy for everybody else.

    Raises:
        RequestError: names `param`, the bound and what there is.
    """
    values = choices = characters = deepest = 0
    referred_to: set[str] = set()
    objects: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []  # each with the schema that it is in
    left: list[tuple[Any, int, Mapping[str, Any]]] = [(schema, 1, schema) for schema in schemas]
    while left:
        value, depth, root = left.pop()
        values += 1
        deepest = max(deepest, depth)
        if isinstance(value, dict):
            _check_object(param, value)
            characters += sum(map(len, value))
            choices += sum(len(value[name]) for name in _CHOICES if isinstance(value.get(name), list))
            if isinstance(reference := value.get("$ref"), str):
                _check_reference(param, reference)
                referred_to.add(reference)
            objects.append((value, root))
            left.extend((within, depth + 1, root) for within in value.values())
        elif isinstance(value, list):
            left.extend((within, depth + 1, root) for within in value)
        elif isinstance(value, str):
            characters += len(value)
    _bound(param, "values", values, MOST_VALUES)
    _bound(param, "choices (enum, anyOf and the like)", choices, MOST_CHOICES)
    _bound(param, "characters of names and texts", characters, MOST_CHARACTERS)
    _bound(param, "levels times what it refers to", deepest * len(referred_to), MOST_DEPTH)
    if _some_is_itself_alone(objects):
        raise _refusal(param, "a reference of its schema leads back to itself and to nothing else")


def _check_object(param: str, value: Mapping[str, Any]) -> None:
    pattern, named = value.get("pattern"), value.get("patternProperties")
    if isinstance(pattern, str):
        _check_pattern(param, "pattern", pattern)
    for name in named if isinstance(named, dict) else ():
        _check_pattern(param, "name in patternProperties", name)
    counts: dict[str, int] = {}
    for name in _COUNTS:
        count = value.get(name)
        if isinstance(count, float) or (isinstance(count, int) and not 0 <= count <= MOST_COUNT):
            raise _refusal(param, f"{name} must be a whole number from 0 to {MOST_COUNT}")
        if isinstance(count, int):
            counts[name] = count
    properties = value.get("properties")
    if isinstance(properties, dict):
        most = max((counts[name] for name in _PROPERTY_COUNTS if name in counts), default=0)
        _bound(
            param,
            "properties times their minProperties or maxProperties",
            len(properties) * min(most, len(properties)),
            MOST_COUNTED_PROPERTIES,
        )


def _some_is_itself_alone(objects: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> bool:
    """Whether whatever some schema may be leads back to it. Looks at each once."""
    open_ids: set[int] = set()
    closed_ids: list[int] = []  # of what has an end, and was not looked at from there
    led_to_by: dict[int, list[int]] = {}
    for value, root in objects:
        ways = _ways(value, root)
        if any(not isinstance(way, dict) for way in ways) or not ways:
            closed_ids.append(id(value))
            continue
        open_ids.add(id(value))
        for way in ways:
            led_to_by.setdefault(id(way), []).append(id(value))
    while closed_ids:
        now_closed = open_ids.intersection(led_to_by.pop(closed_ids.pop(), ()))
        open_ids -= now_closed
        closed_ids += now_closed
    return bool(open_ids)


def _ways(value: Mapping[str, Any], root: Mapping[str, Any]) -> Sequence[Any]:
    """What an answer follows in a schema's place; beside a reference nothing counts, as in the engine."""
    if isinstance(reference := value.get("$ref"), str):
        return [_referred_to(reference, root)]
    return next((value[name] for name in ("anyOf", "oneOf", "allOf") if isinstance(value.get(name), list)), ())


def _referred_to(reference: str, root: Any) -> Any:
    """What a reference within a schema names (RFC 6901); None: nothing is there."""
    at = root
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(at, dict):
            at = at.get(name)
        elif isinstance(at, list) and name.isascii() and name.isdecimal() and int(name) < len(at):
            at = at[int(name)]
        else:
            return None
    return at


def _check_pattern(param: str, what: str, pattern: str) -> None:
    _bound(param, f"characters in a {what}", len(pattern), MOST_PATTERN_CHARACTERS)
    if "\0" in pattern:
        raise _refusal(param, f"a {what} has the character U+0000")
    if looks := next((found["looks"] for found in _LOOKING.finditer(pattern) if found["looks"]), None):
        raise _refusal(param, f"a {what} looks ahead or behind with {looks}…), to which no answer can be held")


def _check_reference(param: str, reference: str) -> None:
    if reference != "#" and not reference.startswith("#/"):
        raise _refusal(
            param, "a $ref is neither # nor begins with #/: no answer can be held to what is not in the schema itself"
        )


def _bound(param: str, counted: str, there: int, allowed: int) -> None:
    if there > allowed:
        raise _refusal(param, f"its schema has {there} {counted}; allowed are {allowed}")


def _refusal(param: str, cause: str) -> RequestError:
    return RequestError(f"{param} cannot be used", cause=cause, remedy="Make the schema simpler", param=param)
