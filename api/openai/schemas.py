"""How much a JSON schema may ask of the engine, which makes a grammar of it.

The engine compiles grammars one after the other on a small machine, and gives none of them up: one that takes minutes
holds up every other client's. Where it follows a schema, or a regular expression in one, too deep, its stack ends and
vLLM's front end with it. So what is compiled is bounded here.

Rules:

- What is bounded is counted over all the schemas of a request, before anything is kept or sent.
- A schema within the bounds is not judged: the engine says what it does not know.
- The bounds on choices and on texts are OpenAI's own for structured outputs, those on patterns and on numbers are ours.
- No I/O.
"""

from collections.abc import Iterable, Mapping
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
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", *_PROPERTY_COUNTS)


def check_schemas(param: str, schemas: Iterable[Mapping[str, Any]]) -> None:
    """Refuse what would keep the engine busy for everybody else.

    Raises:
        RequestError: names `param`, the bound and what there is.
    """
    values = choices = characters = deepest = 0
    referred_to: set[str] = set()
    left: list[tuple[Any, int]] = [(schema, 1) for schema in schemas]
    while left:
        value, depth = left.pop()
        values += 1
        deepest = max(deepest, depth)
        if isinstance(value, dict):
            _check_object(param, value)
            characters += sum(map(len, value))
            choices += sum(len(value[name]) for name in _CHOICES if isinstance(value.get(name), list))
            if isinstance(reference := value.get("$ref"), str):
                referred_to.add(reference)
            left.extend((within, depth + 1) for within in value.values())
        elif isinstance(value, list):
            left.extend((within, depth + 1) for within in value)
        elif isinstance(value, str):
            characters += len(value)
    _bound(param, "values", values, MOST_VALUES)
    _bound(param, "choices (enum, anyOf and the like)", choices, MOST_CHOICES)
    _bound(param, "characters of names and texts", characters, MOST_CHARACTERS)
    _bound(param, "levels times what it refers to", deepest * len(referred_to), MOST_DEPTH)


def _check_object(param: str, value: Mapping[str, Any]) -> None:
    pattern, named = value.get("pattern"), value.get("patternProperties")
    if isinstance(pattern, str):
        _check_pattern(param, pattern)
    for name in named if isinstance(named, dict) else ():
        _check_pattern(param, name)
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


def _check_pattern(param: str, pattern: str) -> None:
    _bound(param, "characters in a pattern", len(pattern), MOST_PATTERN_CHARACTERS)
    if "\0" in pattern:
        raise _refusal(param, "a pattern has the character U+0000")


def _bound(param: str, counted: str, there: int, allowed: int) -> None:
    if there > allowed:
        raise _refusal(param, f"its schema has {there} {counted}; allowed are {allowed}")


def _refusal(param: str, cause: str) -> RequestError:
    return RequestError(f"{param} cannot be used", cause=cause, remedy="Make the schema simpler", param=param)
