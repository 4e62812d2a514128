"""Schemas that would keep the engine from everybody else are refused before it sees them."""

import json
from typing import Any

import pytest

from api.openai.errors import RequestError
from api.openai.schemas import (
    MOST_CHARACTERS,
    MOST_CHOICES,
    MOST_COUNT,
    MOST_COUNTED_PROPERTIES,
    MOST_PATTERN_CHARACTERS,
    MOST_VALUES,
    check_schemas,
)
from api.openai.wire import Asked, read_chat
from appliance.sessions import SessionHints


def chat(**fields: Any) -> Asked:
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], **fields}
    return read_chat(json.dumps(body).encode(), lambda _: SessionHints(), max_messages=10)


def of_a(**fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": {"type": "string", **fields}}}


def tool(schema: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": schema, **fields}}


def chain(links: int, arrays: int) -> dict[str, Any]:
    """Definitions of so many arrays in one another, each referring to the next."""
    definitions: dict[str, Any] = {f"d{links}": {"type": "integer"}}
    for number in range(links):
        nested: dict[str, Any] = {"$ref": f"#/$defs/d{number + 1}"}
        for _ in range(arrays):
            nested = {"type": "array", "items": nested}
        definitions[f"d{number}"] = nested
    return {"$ref": "#/$defs/d0", "$defs": definitions}


TOO_MUCH = [
    pytest.param(chain(40, 50), id="references that end vLLM's front end"),
    pytest.param(chain(1000, 1), id="many references that may end it"),
    pytest.param({"enum": list(range(MOST_CHOICES + 1))}, id="choices"),
    pytest.param({"allOf": [{"anyOf": [{}] * (MOST_CHOICES // 2)}] * 3}, id="choices of choices"),
    pytest.param(of_a(pattern="(" * 100_000 + "a" + ")" * 100_000), id="a pattern that ends vLLM's front end"),
    pytest.param(of_a(pattern="a" * (MOST_PATTERN_CHARACTERS + 1)), id="a long pattern"),
    pytest.param(of_a(pattern="a\0b"), id="a pattern with a NUL"),
    pytest.param({"patternProperties": {"a\0b": {}}}, id="a name's pattern with a NUL"),
    pytest.param({"const": "x" * MOST_CHARACTERS}, id="texts"),
    pytest.param({"const": [0] * MOST_VALUES}, id="values"),
    pytest.param(of_a(minLength=-1), id="a count below zero"),
    pytest.param(of_a(maxLength=MOST_COUNT + 1), id="a count that the engine cannot hold"),
    pytest.param(of_a(minLength=0.5), id="half a character"),
    pytest.param(
        {"properties": {f"p{number}": {} for number in range(MOST_COUNTED_PROPERTIES // 40)}, "minProperties": 50},
        id="so many of so many properties",
    ),
]


@pytest.mark.parametrize("schema", TOO_MUCH)
def test_a_schema_that_asks_for_too_much_is_refused_wherever_it_would_be_compiled(schema: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as refused:
        chat(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}})
    assert refused.value.param == "response_format.json_schema.schema"
    for tools, choice in (
        ([tool(schema)], "required"),
        ([tool(schema)], {"type": "function", "function": {"name": "f"}}),
        ([tool({}), tool(schema, strict=True)], "auto"),
    ):
        with pytest.raises(RequestError) as refused:
            chat(tools=tools, tool_choice=choice)
        assert refused.value.param == "tools"


@pytest.mark.parametrize("schema", TOO_MUCH)
def test_a_schema_that_is_only_shown_to_the_model_may_ask_for_anything(schema: dict[str, Any]) -> None:
    assert chat(tools=[tool(schema)], tool_choice="auto").turn.parameters["tools"] == [tool(schema)]
    assert chat(tools=[tool(schema, strict=False)]).turn.parameters["tools"] == [tool(schema, strict=False)]


def test_what_a_request_has_the_engine_compile_is_counted_together() -> None:
    half = tool({"enum": list(range(MOST_CHOICES // 2 + 1))})
    chat(tools=[half], tool_choice="required")
    with pytest.raises(RequestError, match="allowed are 1000"):
        chat(tools=[half, half], tool_choice="required")


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": list(range(MOST_CHOICES))},
        of_a(pattern="a" * MOST_PATTERN_CHARACTERS, maxLength=MOST_COUNT),
        {"properties": {"pattern": {"type": "string"}, "enum": {"type": "string"}, "minLength": {"type": "integer"}}},
        {"properties": {f"p{number}": {"type": "string"} for number in range(5000)}, "minProperties": 0},
        {"type": "object", "maxProperties": 1000},
        {"type": "array", "items": {"$ref": "#"}},
        {"anyOf": [{"$ref": "#"}, {"type": "string"}]},
        {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "object", "properties": {"c": {"$ref": "#/$defs/a~1b"}}}}},
        {"properties": {"$ref": {"type": "string"}, "anyOf": {"$ref": "#"}}},
        chain(100, 5),
        chain(15, 50),
        {},
    ],
)
def test_a_schema_within_the_bounds_passes_as_it_is(schema: dict[str, Any]) -> None:
    check_schemas("schema", [schema])


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "#", "type": "object"},
        {"anyOf": [{"$ref": "#"}]},
        {"oneOf": [{"$ref": "#"}, {"allOf": [{"$ref": "#"}]}]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"properties": {"x": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}},
    ],
)
def test_a_schema_that_is_defined_by_itself_alone_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="leads back to itself"):
        check_schemas("schema", [schema])


def test_whether_a_schema_is_itself_alone_is_soon_known() -> None:
    twice = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{(n + 1) % 100}"}] * 2} for n in range(100)}
    with pytest.raises(RequestError, match="leads back to itself"):
        check_schemas("schema", [{"$ref": "#/$defs/d0", "$defs": twice}])


@pytest.mark.parametrize("looks", ["(?=", "(?!", "(?<=", "(?<!"])
@pytest.mark.parametrize("pattern", ["{}Zanzibar)a", "a|(b{}c))", r"\\{}a)", "[(?a]{}b)", r"[\]]{}b)"])
def test_a_pattern_that_looks_ahead_or_behind_is_refused(pattern: str, looks: str) -> None:
    pattern = pattern.format(looks)
    for schema, what in ((of_a(pattern=pattern), "pattern"), ({"patternProperties": {pattern: {}}}, "patternProp")):
        with pytest.raises(RequestError, match=what) as refused:
            check_schemas("schema", [schema])
        assert f"with {looks}…)" in refused.value.cause
        assert "Zanzibar" not in str(refused.value.record())


@pytest.mark.parametrize("pattern", [r"\(?=a", "[(?=]a", "(?:a)", "(?<name>a)", "a=!", r"[\](?=]", "^a$"])
def test_a_pattern_that_only_seems_to_look_ahead_passes(pattern: str) -> None:
    check_schemas("schema", [of_a(pattern=pattern)])


@pytest.mark.parametrize("reference", ["http://Zanzibar", "Zanzibar", "#Zanzibar", "", "/$defs/Zanzibar"])
def test_a_reference_to_somewhere_else_than_the_schema_is_refused(reference: str) -> None:
    schema = {"properties": {"a": {"items": {"$ref": reference}}}, "$defs": {"Zanzibar": {"$anchor": "Zanzibar"}}}
    with pytest.raises(RequestError, match=r"\$ref") as refused:
        check_schemas("schema", [schema])
    assert "Zanzibar" not in str(refused.value.record())


def test_a_refusal_repeats_nothing_of_the_schema() -> None:
    with pytest.raises(RequestError) as refused:
        check_schemas("schema", [of_a(pattern="Zanzibar" * 100)])
    assert "Zanzibar" not in str(refused.value.record())
