"""Readers of CEF and LEEF, written from the formats' specifications alone: they know nothing of who writes them.

CEF: ArcSight's implementation standard, header and character encoding. LEEF: IBM's event components.
"""

from typing import NamedTuple


class Cef(NamedTuple):
    """An event as a receiver has it."""

    header: list[str]
    extension: dict[str, str]


class Leef(NamedTuple):
    """An event as a receiver has it."""

    header: list[str]
    attributes: dict[str, str]


def parse_cef(line: str) -> Cef:
    """Seven header fields divided by pipes, then keys and values: a value ends at the space before the next key."""
    header, rest = [], line
    for _ in range(7):
        field, rest = _up_to_pipe(rest)
        header.append(field)
    extension: dict[str, str] = {}
    signs = [at for at, character in enumerate(rest) if character == "=" and not _is_escaped(rest, at)]
    begins = [rest.rfind(" ", 0, at) + 1 for at in signs]
    for number, (begin, sign) in enumerate(zip(begins, signs, strict=True)):
        end = begins[number + 1] - 1 if number + 1 < len(begins) else len(rest)
        key = rest[begin:sign]
        assert key.isalnum(), key
        assert key not in extension, key
        extension[key] = _unescaped(rest[sign + 1 : end])
    return Cef(header, extension)


def parse_leef(line: str) -> Leef:
    """Five header fields and the delimiter, divided by pipes, then attributes: the first equals sign ends a key."""
    *header, delimiter, rest = line.split("|", 6)
    if len(delimiter) > 1:
        delimiter = chr(int(delimiter.removeprefix("0").removeprefix("x"), 16))
    attributes: dict[str, str] = {}
    for attribute in rest.split(delimiter):
        key, sign, value = attribute.partition("=")
        assert key.isalnum(), key
        assert sign, key
        assert key not in attributes, key
        attributes[key] = value
    return Leef(header, attributes)


def _up_to_pipe(text: str) -> tuple[str, str]:
    at = next(at for at, character in enumerate(text) if character == "|" and not _is_escaped(text, at))
    return text[:at].replace(r"\|", "|").replace(r"\\", "\\"), text[at + 1 :]


def _is_escaped(text: str, at: int) -> bool:
    backslashes = 0
    while at > backslashes and text[at - 1 - backslashes] == "\\":
        backslashes += 1
    return backslashes % 2 == 1


def _unescaped(value: str) -> str:
    made, characters = "", iter(value)
    for character in characters:
        if character == "\\":
            escaped = next(characters)
            made += {"\\": "\\", "=": "=", "n": "\n", "r": "\r"}[escaped]
        else:
            made += character
    return made
