"""Tools that a conversation may offer, how people ask for them, what they return and what is said about it.

Rules:

- Standard library only.
- A tool is a dict as an OpenAI client sends it; a call carries its arguments as a JSON string, as a client returns it.
- What is said about a result follows from the result alone: a JSON object is read out as "key value" pairs without the
  argument's own, anything else is repeated.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from appliance.engine.demo.vocabulary import CITIES, COLOURS, NAMES, THINGS, UNITS, invented_word, listed_word

Message = dict[str, Any]
Tool = dict[str, Any]
Result = dict[str, Any] | str


@dataclass(frozen=True, slots=True)
class Family:
    """Tools that do one job under various names.

    `asks` hold `{}` where the argument goes. `argument` is told whether a word that is in no list will do. `finding`
    says how the answer begins; `{}` is the argument.
    """

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[str, ...]
    parameter_type: str
    asks: tuple[str, ...]
    argument: Callable[[random.Random, bool], Any]
    result: Callable[[random.Random], Result]
    finding: str


@dataclass(frozen=True, slots=True)
class OfferedTool:
    """A tool as one conversation offers it."""

    family: Family
    name: str
    parameter: str
    schema: Tool

    def call(self, argument: Any, call_id: str) -> Message:
        """The assistant's message that calls the tool."""
        arguments = json.dumps({self.parameter: argument}, ensure_ascii=False)
        function = {"name": self.name, "arguments": arguments}
        return {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": call_id, "type": "function", "function": function}],
        }


def offer(rng: random.Random, family: Family) -> OfferedTool:
    """One tool of a family with a name, a parameter and a schema such as clients write them."""
    name = rng.choice(family.names)
    parameter = rng.choice(family.parameters)
    properties: dict[str, Any] = {parameter: {"type": family.parameter_type}}
    if rng.random() < 0.4:
        properties[parameter]["description"] = "The " + parameter
    if rng.random() < 0.15:
        properties["unit"] = {"type": "string", "enum": ["a", "b"]}
    function: dict[str, Any] = {"name": name}
    if rng.random() < 0.8:
        function["description"] = rng.choice(family.descriptions)
    function["parameters"] = {"type": "object", "properties": properties, "required": [parameter]}
    return OfferedTool(family, name, parameter, {"type": "function", "function": function})


def result_text(rng: random.Random, tool: OfferedTool, argument: Any, result: Result) -> str:
    """A result as a harness sends it back: JSON in one of the usual spellings, or plain text."""
    if isinstance(result, str):
        return result
    echoed = {tool.parameter: argument, **result} if rng.random() < 0.4 else result
    return json.dumps(echoed, ensure_ascii=False, separators=(",", ":") if rng.random() < 0.25 else None)


def said_about(tool: OfferedTool, argument: Any, result: Result) -> str:
    """What is said about a result."""
    if isinstance(result, str):
        told = result.removesuffix(".")
    else:
        told = ", ".join(f"{key} {_spoken(value)}" for key, value in result.items())
    return f"{tool.family.finding.format(argument)}: {told}."


def _spoken(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _city(rng: random.Random, invents: bool) -> str:
    return listed_word(rng, CITIES, invents=invents)


def _person(rng: random.Random, invents: bool) -> str:
    return listed_word(rng, NAMES, invents=invents)


def _unit(rng: random.Random, invents: bool) -> str:
    return listed_word(rng, UNITS, invents=invents)


def _thing(rng: random.Random, _invents: bool) -> str:
    return rng.choice(THINGS)


def _phrase(rng: random.Random, _invents: bool) -> str:
    return " ".join(rng.sample((*THINGS, *COLOURS), rng.choice((1, 2, 2, 3))))


def _minutes(rng: random.Random, _invents: bool) -> int:
    return rng.randint(1, 60)


def _anything(rng: random.Random, invents: bool) -> str:
    return rng.choice((_city, _person, _unit, _thing))(rng, invents)


def _weather(rng: random.Random) -> Result:
    degrees = rng.randint(-9, 38)
    sky = rng.choice(("sunny", "cloudy", "rain", "snow", "clear", "fog", "windy", "storm"))
    plain = (
        f"{degrees} degrees and {sky}",
        f"{sky}, {degrees} degrees",
        f"{degrees} C, {sky}",
        f"It is {sky} and {degrees} degrees.",
    )
    if rng.random() < 0.45:
        return rng.choice(plain)
    pairs: dict[str, Any] = {
        rng.choice(("temperature", "temp", "degrees", "temperature_c")): degrees,
        rng.choice(("sky", "condition", "conditions", "weather", "summary")): sky,
    }
    if rng.random() < 0.3:
        pairs[rng.choice(("wind", "humidity"))] = rng.randint(0, 99)
    return _shuffled(rng, pairs)


def _time(rng: random.Random) -> Result:
    clock = f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    return {"time": clock} if rng.random() < 0.6 else clock


def _record(rng: random.Random) -> Result:
    pairs = {
        "room": rng.randint(1, 99),
        "team": rng.choice(COLOURS),
        "city": rng.choice(CITIES),
        "phone": rng.randint(100, 999),
        "status": rng.choice(("here", "away", "busy")),
    }
    chosen = dict(rng.sample(list(pairs.items()), rng.randint(1, 3)))
    return chosen if rng.random() < 0.7 else f"room {rng.randint(1, 99)}, team {rng.choice(COLOURS)}"


def _price(rng: random.Random) -> Result:
    amount = rng.randint(1, 200) if rng.random() < 0.6 else rng.randint(1, 200) + 0.5
    return {"price": amount} if rng.random() < 0.6 else f"{amount} euros"


def _done(rng: random.Random) -> Result:
    if rng.random() < 0.4:
        return rng.choice(("ok", "done", "started", "saved", "accepted"))
    return rng.choice(
        ({"ok": True}, {"status": "ok"}, {"status": "started"}, {"saved": True}, {"id": rng.randint(1, 99)})
    )


def _found(rng: random.Random) -> Result:
    text = f"{rng.randint(2, 90)} {_phrase(rng, False)} in {rng.choice(CITIES)}"
    return {rng.choice(("result", "text", "answer")): text} if rng.random() < 0.5 else text


def _reading(rng: random.Random) -> Result:
    state = rng.choice(("steady", "hot", "cold", "leaking", "silent", "noisy"))
    if rng.random() < 0.4:
        return f"{state}, {rng.randint(1, 99)} degrees"
    return _shuffled(rng, {"state": state, rng.choice(("degrees", "temperature", "level")): rng.randint(1, 99)})


def _any_result(rng: random.Random) -> Result:
    if rng.random() < 0.1:
        return {"error": rng.choice(("not found", "unknown city", "timeout", "no answer"))}
    return rng.choice((_weather, _time, _record, _price, _done, _found, _reading))(rng)


def _shuffled(rng: random.Random, pairs: dict[str, Any]) -> dict[str, Any]:
    items = list(pairs.items())
    rng.shuffle(items)
    return dict(items)


FAMILIES: Final = (
    Family(
        ("get_weather", "get_weather", "current_weather"),
        ("The weather in a city", "Get the current weather", "Tells the weather of a place.", "Get weather for a city"),
        ("city",),
        "string",
        (
            "What is the weather in {}?",
            "What's the weather in {}?",
            "What is the weather like in {}?",
            "How is the weather in {}?",
            "Tell me the weather in {}.",
            "Weather in {}?",
            "Check the weather in {}.",
            "Is it raining in {}?",
            "How warm is it in {}?",
        ),
        _city,
        _weather,
        "For {} I found",
    ),
    Family(
        ("get_time", "local_time"),
        ("The local time of a city", "Get the time in a place."),
        ("city",),
        "string",
        ("What time is it in {}?", "What is the time in {}?", "Tell me the time in {}.", "How late is it in {}?"),
        _city,
        _time,
        "For {} I found",
    ),
    Family(
        ("find_person", "lookup_person"),
        ("Find a person by name", "Looks up a person."),
        ("name",),
        "string",
        ("Find {}.", "Look up {}.", "Where is {}?", "What do we know about {}?", "Find the person {}."),
        _person,
        _record,
        "For {} I found",
    ),
    Family(
        ("get_price", "lookup_price"),
        ("The price of an item", "Get a price."),
        ("item",),
        "string",
        ("What do {} cost?", "What is the price of {}?", "How much are {}?", "Get the price of {}."),
        _thing,
        _price,
        "For {} I found",
    ),
    Family(
        ("search", "web_search"),
        ("Search for something", "Search the web."),
        ("query",),
        "string",
        ("Search for {}.", "Look for {}.", "Please search for {}.", "Find pages about {}."),
        _phrase,
        _found,
        "For {} I found",
    ),
    Family(
        ("read_unit", "get_reading"),
        ("Read a unit of the works", "Read a meter."),
        ("unit",),
        "string",
        ("Read {}.", "Read the unit {}.", "How is unit {}?", "What does {} say?", "Get the reading of {}."),
        _unit,
        _reading,
        "For {} I found",
    ),
    Family(
        ("set_timer", "start_timer"),
        ("Start a timer", "Set a timer in minutes."),
        ("minutes",),
        "integer",
        ("Set a timer for {} minutes.", "Start a timer of {} minutes.", "Wake me in {} minutes."),
        _minutes,
        _done,
        "Done",
    ),
    Family(
        ("save_note", "add_note"),
        ("Save a note", "Write a note down."),
        ("text",),
        "string",
        ("Save a note: {}", "Note down: {}", "Write a note: {}", "Add a note: {}"),
        _phrase,
        _done,
        "Done",
    ),
)

# Asking for a tool by its own name works with tools that no list knows.
_BY_NAME: Final = (
    "Use {tool} with {}.",
    "Call {tool} with {}.",
    "Call the tool {tool} for {}.",
    "Use the {tool} tool with {}.",
    "Call {tool} for {}.",
)


def invented_family(rng: random.Random) -> Family:
    """Tools that exist in no list and are called by their name."""
    verb = rng.choice(("get", "run", "check", "open", "list", "fetch", invented_word(rng).lower()))
    name = f"{verb}_{rng.choice((*THINGS, invented_word(rng).lower()))}"
    parameter = rng.choice(("name", "value", "key", "id", "target", "path", "city", invented_word(rng).lower()))
    asks = tuple(ask.replace("{tool}", name) for ask in _BY_NAME)
    description = f"Works with {rng.choice(THINGS)}"
    return Family((name,), (description,), (parameter,), "string", asks, _anything, _any_result, "For {} I found")


def by_name(rng: random.Random, tool: OfferedTool) -> str:
    """A way to ask for a tool by its name, with `{}` where the argument goes."""
    return rng.choice(_BY_NAME).replace("{tool}", tool.name)
