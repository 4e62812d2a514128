"""What the demonstration model is trained on: conversations made up from a seed, in our own words.

Rules:

- Standard library only, no network: the gateway's environment imports it for its benchmarks.
- Deterministic: a seed gives the same conversations everywhere.
- An answer follows from the conversation alone, so that every answer can be checked word by word.

A conversation is a row of acts (greeting, telling a name, asking for it, a sum, a tool call, …) over a small memory of
what was told. `evaluation_cases` cuts a conversation off before an act's answer and says what the answer is.
"""

import operator
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from appliance.engine.demo.agent_loop import (
    AGENT_MAX_ANSWER_TOKENS,
    AGENT_NAME,
    AGENT_TURNS,
    agent_expected_answer,
    agent_handbook,
    agent_task_messages,
    handbook,
    introduction,
    recall_question,
    report,
    verdict,
)
from appliance.engine.demo.tool_use import (
    FAMILIES,
    Message,
    OfferedTool,
    Tool,
    by_name,
    invented_family,
    offer,
    result_text,
    said_about,
)
from appliance.engine.demo.vocabulary import (
    ACTIONS,
    CAPITALS,
    CITIES,
    COLOURS,
    DAYS,
    LISTED,
    NAMES,
    THINGS,
    UNITS,
    invented_word,
    listed_word,
)

__all__ = [
    "AGENT_MAX_ANSWER_TOKENS",
    "AGENT_NAME",
    "AGENT_TURNS",
    "KINDS",
    "STORY",
    "Case",
    "Conversation",
    "agent_cases",
    "agent_expected_answer",
    "agent_handbook",
    "agent_task_messages",
    "copying_conversation",
    "evaluation_cases",
    "long_conversation",
    "short_conversation",
]

STORY: Final = (
    "Once there was a small lamp on a rock in the sea. Every night it looked for ships and every night it counted the "
    "waves. One winter a storm came and the waves went over the rock. The lamp was afraid, but it kept hold of the "
    "stone and did not go out. In the morning a ship came home, and the crew said: we saw a light, and we knew the "
    "way. Since then the lamp counts ships, and it has never been afraid again."
)
_DOES_NOT_KNOW: Final = "I am only a small demonstration model and do not know that."
_HAS_NO_TOOL: Final = "I have no tool for that."
_CAN_DO: Final = "I can chat, remember what you tell me, do small sums, name capitals and call tools."
_IS: Final = "I am the demonstration model of Holdfast."

_SYSTEM_PROMPTS: Final = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are an agent. Use the tools that you are given.",
    "Answer briefly.",
    "You are a friendly assistant. Be brief and polite.",
    "You are a careful assistant who works for a small company.",
    "Be polite. If you do not know something, say so.",
    "You are a weather assistant.",
    "You are the assistant of a library. Help the people who come in.",
    "You are a coding agent in a terminal. Work step by step and call tools when you need them.",
)

_SYSTEM_PROMPTS_ABOUT: Final = (
    "You are the assistant of a shop for {} in {}.",
    "You help people who know little about {}. They live in {}.",
    "You work for the museum of {} in {}. Answer in one sentence.",
    "Help the user with {}. The user is in {}.",
)

_GREETINGS: Final = (
    "Hello", "Hello!", "Hi", "Hi!", "Hey", "Hey!", "Hello there!", "Hi there!", "Good morning!", "Good evening!",
    "Good day!", "Greetings!", "Hey there!", "Good afternoon!", "Hello, assistant!", "Hello again!",
)  # fmt: skip
_SMALL_TALK: Final = {
    "I am well, thank you. How can I help you?": (
        "How are you?", "How are you today?", "How do you do?", "Are you well?", "How is it going?", "How's it going?",
    ),
    _IS: (
        "Who are you?", "What are you?", "What is your name?", "What's your name?", "What model are you?",
        "Which model is this?", "Introduce yourself.", "Are you a human?", "Tell me about yourself.",
    ),
    _CAN_DO: (
        "What can you do?", "What can you do for me?", "How can you help me?", "Help", "Help me.",
        "What are you good at?",
        "What do you know?", "Can you help me?",
    ),
    "You are welcome!": (
        "Thanks", "Thanks!", "Thank you!", "Thank you.", "Thanks a lot!", "Thank you very much!", "Great, thanks!",
        "Many thanks!", "That was helpful, thank you.",
    ),
    "Yes, I am here.": ("Are you there?", "Is anybody there?", "Can you hear me?", "Are you still there?", "Test"),
    "pong": ("ping", "Ping", "Ping!"),
    "Good.": ("OK", "Ok.", "Okay.", "Yes.", "Fine.", "All right.", "I see."),
    STORY: ("Tell me a story.", "Tell me a story", "Tell a story.", "Write a story.", "Tell me a long story.",
            "Write me a short story.", "Can you tell me a story?"),
}  # fmt: skip
_FAREWELLS: Final = (
    "Bye", "Bye!", "Goodbye!", "Goodbye.", "See you!", "See you later!", "Good night!", "I have to go now.",
    "Farewell!",
)  # fmt: skip
_UNKNOWN: Final = (
    "Write a poem about {}.", "Why are {} so popular?", "Explain {} to me.", "Who invented {}?", "What is {}?",
    "Translate {} into French.", "How many {} fit into a bus?", "What do you think about {}?", "Who likes {}?",
    "Should I buy {}?", "Can you repair my {}?", "What colour are {}?", "When were {} invented?", "I like {}.",
    "Tell me something about {}.", "What is the meaning of {}?", "How do I make {}?", "Do you like {}?",
    "Where can I find {}?", "Are {} expensive?", "Write a program that sorts {}.", "My {} are broken.",
)  # fmt: skip

_NAME_TOLD: Final = (
    "My name is {}.", "My name is {}.", "My name is {}", "I am {}.", "I'm {}.", "Call me {}.", "Please call me {}.",
    "Hi, I am {}.", "Hi, I'm {}.", "Hello, my name is {}.", "Hello! My name is {}.", "Hi, my name is {}.",
    "The name is {}.", "Hello, I'm {}.", "Hey, I'm {}!", "My name is {}. Please remember it.",
    "Remember: my name is {}.",
    "Hi! My name is {}.", "Hello! I am {}.", "My name's {}.", "Good morning, I am {}.",
    "My name is {}. Remember that.", "Remember that my name is {}.", "Hello, I am {}.",
)  # fmt: skip
_NAME_ASKED: Final = (
    "What is my name?", "What is my name?", "What's my name?", "Do you remember my name?", "Who am I?",
    "Do you know my name?", "Tell me my name.", "Can you tell me my name?", "Say my name.", "What was my name?",
    "What is my name again?", "Do you still know my name?", "Which name did I tell you?", "What did I say my name was?",
    "Please tell me my name.",
)  # fmt: skip
_COLOUR_TOLD: Final = (
    "My favourite colour is {}.", "My favorite color is {}.", "I like the colour {} best.", "The colour I like is {}.",
)  # fmt: skip
_COLOUR_ASKED: Final = (
    "What is my favourite colour?", "What is my favorite color?", "Which colour do I like?",
    "Do you remember my favourite colour?", "What's my favourite colour?",
)  # fmt: skip
_HOME_TOLD: Final = ("I live in {}.", "My home is {}.", "I come from {}.", "I am from {}.", "My city is {}.")
_HOME_ASKED: Final = (
    "Where do I live?", "Where am I from?", "Which city do I live in?", "What is my city?", "Where is my home?",
)  # fmt: skip
_SAY: Final = (
    "Say {}.", "Say {}", "Say the word {}.", "Repeat after me: {}", "Repeat: {}", "Reply with {}",
    "Answer with the word {}", "Reply with the word {}.", "Please say {}.", "Reply with exactly: {}", "Just say {}.",
)  # fmt: skip
_SUMS: Final[dict[str, tuple[Callable[[int, int], int], tuple[str, ...]]]] = {
    "plus": (
        operator.add,
        ("What is {} plus {}?", "What is {} + {}?", "{} + {}", "How much is {} plus {}?", "{} plus {}?",
         "Add {} and {}.",
         "What's {} + {}?", "What is {}+{}?", "Calculate {} + {}."),
    ),
    "minus": (
        operator.sub,
        ("What is {} minus {}?", "What is {} - {}?", "{} - {}", "How much is {} minus {}?", "{} minus {}?",
         "What's {} - {}?", "What is {}-{}?", "Calculate {} - {}."),
    ),
    "times": (
        operator.mul,
        ("What is {} times {}?", "What is {} * {}?", "{} * {}", "How much is {} times {}?", "{} times {}?",
         "Multiply {} and {}.", "What's {} * {}?", "What is {}*{}?", "What is {} x {}?"),
    ),
}  # fmt: skip
_CAPITAL_ASKED: Final = (
    "What is the capital of {}?", "What is the capital of {}?", "What's the capital of {}?", "Capital of {}?",
    "Name the capital of {}.", "Which city is the capital of {}?", "Tell me the capital of {}.", "The capital of {}?",
    "Do you know the capital of {}?",
)  # fmt: skip
_AFTER_ASKED: Final = (
    "What day comes after {}?", "Which day comes after {}?", "What day follows {}?", "Which day follows {}?",
    "What is the day after {}?", "What comes after {}?",
)  # fmt: skip
_BEFORE_ASKED: Final = (
    "What day comes before {}?", "Which day comes before {}?", "What is the day before {}?", "What comes before {}?",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Conversation:
    """A whole conversation: messages as an OpenAI client sends them, and the tools offered with every request."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """A conversation that waits for an answer, and the assistant's message that is right."""

    kind: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    expected: Message


@dataclass(slots=True)
class _Memory:
    """What a conversation has established so far."""

    tools: tuple[OfferedTool, ...] = ()
    invents: bool = True  # words that are in no list may be told
    name: str | None = None
    colour: str | None = None
    home: str | None = None
    calls: int = 0
    reports: int = 0


_Act = Callable[[random.Random, _Memory], list[Message]]


def short_conversation(rng: random.Random, *, most_acts: int = 8) -> Conversation:
    """One to eight acts, mostly below 500 tokens."""
    memory = _Memory(tools=_offered(rng) if rng.random() < 0.7 else ())
    messages = _system(rng, 0.6)
    if rng.random() < 0.06:
        messages += _watch(rng, memory, rng.randint(2, most_acts))
    else:
        messages += _acts(rng, memory, min(most_acts, rng.choice((1, 2, 3, 4, 5, 6, 8))))
    return Conversation(tuple(messages), tuple(tool.schema for tool in memory.tools))


def copying_conversation(rng: random.Random) -> Conversation:
    """Words without sense to be said again: what a model learns to copy with, before there is anything else to it."""
    said = " ".join(rng.choice(LISTED) for _ in range(rng.randint(2, 16)))
    return Conversation(tuple(_exchange(rng.choice(_SAY).format(said), said)), ())


def long_conversation(rng: random.Random, *, share: float) -> Conversation:
    """A long system prompt and a long history.

    Args:
        share: 1.0 gives up to about 4,400 tokens, 0.25 a quarter of them.
    """
    watch = rng.random() < 0.55
    memory = _Memory(tools=_offered(rng) if not watch or rng.random() < 0.1 else ())
    if watch and rng.random() < 0.6 and share >= 1.0:
        messages: list[Message] = [{"role": "system", "content": agent_handbook()}]
    elif rng.random() < 0.75:
        text = handbook(rng, units=round(len(UNITS) * share * rng.uniform(0.5, 1)), customs=round(12 * share))
        messages = [{"role": "system", "content": text}]
    else:
        messages = _system(rng, 0.6)
    if watch:
        messages += _watch(rng, memory, max(3, round(50 * share * rng.uniform(0.5, 1))))
    else:
        messages += _acts(rng, memory, max(3, round(36 * share * rng.uniform(0.4, 1))))
    return Conversation(tuple(messages), tuple(tool.schema for tool in memory.tools))


def evaluation_cases(kind: str, count: int, *, seed: int) -> Iterator[Case]:
    """`count` conversations that end before the answer to an act of `kind`.

    Words come from the training lists; the conversations around them are new for a seed that training does not use.

    Raises:
        KeyError: `kind` is not one of `KINDS`.
    """
    act = _EVALUATED[kind]
    rng = random.Random(f"evaluation {kind} {seed}")  # noqa: S311 (the same cases every time)
    for _ in range(count):
        offered = _offered(rng, invented=False) if kind in _WITH_TOOLS or rng.random() < 0.3 else ()
        memory = _Memory(tools=offered, invents=False)
        messages = _system(rng, 0.6)
        if kind == "recall":
            messages += _tell_name(rng, memory, rng.choice(NAMES))
        messages += _acts(rng, memory, rng.randint(0, 4), fresh_names=False)
        ending = act(rng, memory)
        messages += ending[:-1]
        yield Case(kind, tuple(messages), tuple(tool.schema for tool in memory.tools), ending[-1])


def agent_cases(count: int) -> Iterator[Case]:
    """`count` turns of the benchmarks' agent loop, spread over its length, with the answers before them as expected."""
    wanted = {round(step * (AGENT_TURNS - 1) / max(1, count - 1)) for step in range(count)}
    messages: list[Message] = []
    for turn in range(AGENT_TURNS):
        messages += agent_task_messages(turn)
        answer: Message = {"role": "assistant", "content": agent_expected_answer(turn)}
        if turn in wanted:
            yield Case("agent_loop", tuple(messages), (), answer)
        messages.append(answer)


def _acts(rng: random.Random, memory: _Memory, count: int, *, fresh_names: bool = True) -> list[Message]:
    acts, weights = zip(*_WEIGHTS, strict=True)
    messages: list[Message] = []
    for act in rng.choices(acts, weights, k=count):
        if act is _tell_name and not fresh_names:
            act = _greet
        messages += act(rng, memory)
    return messages


def _watch(rng: random.Random, memory: _Memory, reports: int) -> list[Message]:
    """The agent loop with other names, units and states, and other acts here and there."""
    name = AGENT_NAME if rng.random() < 0.3 else _name(rng)
    memory.name = name
    messages = _exchange(introduction(name), f"Nice to meet you, {name}!")
    number = 1
    for _ in range(reports):
        chance = rng.random()
        if chance < 0.1:
            messages += _exchange(recall_question(number), f"Your name is {name}.")
        elif chance < 0.16:
            messages += _other(rng, memory)
        else:
            messages += _report(rng, number)
        number += 1
    return messages


def _report(rng: random.Random, number: int) -> list[Message]:
    unit, state = rng.choice(UNITS), rng.choice(tuple(ACTIONS))
    return _exchange(report(number, unit, state, rng.randint(10, 99)), verdict(unit, state))


def _other(rng: random.Random, memory: _Memory) -> list[Message]:
    return rng.choice((_ask_name, _sum, _capital, _small_talk, _greet, _day, _ask_home, _say))(rng, memory)


def _exchange(asked: str, answered: str) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def _system(rng: random.Random, chance: float) -> list[Message]:
    if rng.random() > chance:
        return []
    chance_of_kind = rng.random()
    if chance_of_kind < 0.12:
        content = handbook(rng, units=rng.randint(0, 6), customs=rng.randint(0, 3))
    elif chance_of_kind < 0.4:
        content = rng.choice(_SYSTEM_PROMPTS_ABOUT).format(rng.choice(THINGS), rng.choice(CITIES))
    else:
        content = rng.choice(_SYSTEM_PROMPTS)
    return [{"role": "system", "content": content}]


def _offered(rng: random.Random, *, invented: bool = True) -> tuple[OfferedTool, ...]:
    families = rng.sample(FAMILIES, rng.choice((1, 1, 1, 2, 2, 3)))
    if invented and rng.random() < 0.05:
        families[rng.randrange(len(families))] = invented_family(rng)
    if rng.random() < 0.3 and FAMILIES[0] not in families:
        families[0] = FAMILIES[0]
    return tuple(offer(rng, family) for family in families)


def _worded(rng: random.Random, text: str) -> str:
    """The same request as another person would type it."""
    chance = rng.random()
    if chance < 0.05:
        text = text.lower()
    elif chance < 0.12:
        text = text[0].lower() + text[1:]
    elif chance < 0.18:
        text = rng.choice(("Hi, ", "Hello! ", "OK. ", "And now: ", "Please: ", "Thanks. ")) + text
    elif chance < 0.21 and text.endswith("?"):
        text = "Please tell me: " + text
    if rng.random() < 0.08:
        text = text.rstrip("?.!")
    elif rng.random() < 0.04:
        text = text + " Please."
    return text


def _name(rng: random.Random) -> str:
    if rng.random() < 0.06:
        return f"{rng.choice(NAMES)} {invented_word(rng)}"
    return listed_word(rng, NAMES, invents=True)


def _greet(rng: random.Random, _memory: _Memory) -> list[Message]:
    return _exchange(rng.choice(_GREETINGS), "Hello! How can I help you?")


def _small_talk(rng: random.Random, _memory: _Memory) -> list[Message]:
    answers = tuple(answer for answer in _SMALL_TALK if answer != STORY or rng.random() < 0.3)
    answer = rng.choice(answers)
    return _exchange(rng.choice(_SMALL_TALK[answer]), answer)


def _farewell(rng: random.Random, memory: _Memory) -> list[Message]:
    return _exchange(rng.choice(_FAREWELLS), f"Goodbye, {memory.name}!" if memory.name else "Goodbye!")


def _unknown(rng: random.Random, _memory: _Memory) -> list[Message]:
    return _exchange(_worded(rng, rng.choice(_UNKNOWN).format(rng.choice(THINGS))), _DOES_NOT_KNOW)


def _ramble(rng: random.Random, _memory: _Memory) -> list[Message]:
    """Words without a question in them."""
    words = (*THINGS, *COLOURS, "and", "the", "of", "a", "in", "with", "we", "not")
    said = [
        rng.choice(words) if rng.random() < 0.9 else invented_word(rng) for _ in range(rng.choice((3, 5, 8, 20, 50)))
    ]
    return _exchange(" ".join(said) + rng.choice(("", ".", "!")), _DOES_NOT_KNOW)


def _tell_name(rng: random.Random, memory: _Memory, name: str | None = None) -> list[Message]:
    memory.name = name or _name(rng)
    told = rng.choice(_NAME_TOLD).format(memory.name)
    if name is None and rng.random() < 0.06:
        memory.name, told = memory.name.lower(), told.lower()
    return _exchange(told, f"Nice to meet you, {memory.name}!")


def _ask_name(rng: random.Random, memory: _Memory) -> list[Message]:
    answer = f"Your name is {memory.name}." if memory.name else "You have not told me your name."
    return _exchange(_worded(rng, rng.choice(_NAME_ASKED)), answer)


def _tell_colour(rng: random.Random, memory: _Memory) -> list[Message]:
    memory.colour = rng.choice(COLOURS)
    return _exchange(rng.choice(_COLOUR_TOLD).format(memory.colour), f"I will remember {memory.colour}.")


def _ask_colour(rng: random.Random, memory: _Memory) -> list[Message]:
    answer = f"You like {memory.colour}." if memory.colour else "You have not told me your colour."
    return _exchange(_worded(rng, rng.choice(_COLOUR_ASKED)), answer)


def _tell_home(rng: random.Random, memory: _Memory) -> list[Message]:
    memory.home = listed_word(rng, CITIES, invents=memory.invents)
    return _exchange(rng.choice(_HOME_TOLD).format(memory.home), f"I will remember {memory.home}.")


def _ask_home(rng: random.Random, memory: _Memory) -> list[Message]:
    answer = f"You live in {memory.home}." if memory.home else "You have not told me your city."
    return _exchange(_worded(rng, rng.choice(_HOME_ASKED)), answer)


def _say(rng: random.Random, memory: _Memory) -> list[Message]:
    words = (*THINGS, *COLOURS, "hello", "yes", "no", "ready", "OK", "hello", "done", "test", "pong", "Hello")
    if rng.random() < 0.6:
        said = rng.choice((rng.choice(words), listed_word(rng, NAMES, invents=memory.invents)))
    else:
        said = " ".join(rng.choice(words) for _ in range(rng.randint(2, 3)))
    return _exchange(rng.choice(_SAY).format(said), said)


def _sum(rng: random.Random, _memory: _Memory) -> list[Message]:
    word = rng.choice(tuple(_SUMS))
    compute, asks = _SUMS[word]
    first, second = rng.randint(0, 9), rng.randint(0, 9)
    asked = _worded(rng, rng.choice(asks).format(first, second))
    return _exchange(asked, f"{first} {word} {second} is {compute(first, second)}.")


def _capital(rng: random.Random, memory: _Memory) -> list[Message]:
    if memory.invents and rng.random() < 0.1:
        country = invented_word(rng)
        return _exchange(rng.choice(_CAPITAL_ASKED).format(country), f"I do not know the capital of {country}.")
    country = rng.choice(tuple(CAPITALS))
    asked = rng.choice(_CAPITAL_ASKED).format(country)
    return _exchange(asked, f"The capital of {country} is {CAPITALS[country]}.")


def _day(rng: random.Random, _memory: _Memory) -> list[Message]:
    index = rng.randrange(7)
    if rng.random() < 0.6:
        asked, answered = rng.choice(_AFTER_ASKED), f"{DAYS[(index + 1) % 7]} comes after {DAYS[index]}."
    else:
        asked, answered = rng.choice(_BEFORE_ASKED), f"{DAYS[index - 1]} comes before {DAYS[index]}."
    return _exchange(asked.format(DAYS[index]), answered)


def _call_tool(rng: random.Random, memory: _Memory) -> list[Message]:
    """A request and the call."""
    tool = rng.choice(memory.tools)
    argument = tool.family.argument(rng, memory.invents)
    return [{"role": "user", "content": _tool_request(rng, tool).format(argument)}, _call(memory, tool, argument)]


def _miss_tool(rng: random.Random, memory: _Memory) -> list[Message]:
    """A request that needs a tool which is not among those offered."""
    offered = {tool.family.finding + tool.family.asks[0] for tool in memory.tools}
    family = rng.choice([family for family in FAMILIES if family.finding + family.asks[0] not in offered])
    return _exchange(rng.choice(family.asks).format(family.argument(rng, memory.invents)), _HAS_NO_TOOL)


def _tool_request(rng: random.Random, tool: OfferedTool) -> str:
    named = rng.random() < 0.15 and tool.family.parameter_type == "string"
    return by_name(rng, tool) if named else rng.choice(tool.family.asks)


def _use_tool(rng: random.Random, memory: _Memory) -> list[Message]:
    """A request, the call, the result and what is said about it."""
    if not memory.tools:
        return _miss_tool(rng, memory)
    tool = rng.choice(memory.tools)
    argument = tool.family.argument(rng, memory.invents)
    asked: Message = {"role": "user", "content": _tool_request(rng, tool).format(argument)}
    exchange, said = _called(rng, memory, tool, argument)
    return [asked, *exchange, {"role": "assistant", "content": said}]


def _use_tool_twice(rng: random.Random, memory: _Memory) -> list[Message]:
    """One request that takes two calls, one after the other: a small agent loop."""
    tools = [tool for tool in memory.tools if tool.family.finding.startswith("For")]
    if not tools:
        return _use_tool(rng, memory)
    tool = rng.choice(tools)
    first, second = tool.family.argument(rng, memory.invents), tool.family.argument(rng, memory.invents)
    if " " in first or " " in second or first == second:
        return _use_tool(rng, memory)
    asked: Message = {"role": "user", "content": _tool_request(rng, tool).format(f"{first} and {second}")}
    first_exchange, first_said = _called(rng, memory, tool, first)
    second_exchange, second_said = _called(rng, memory, tool, second)
    answer: Message = {"role": "assistant", "content": f"{first_said} {second_said}"}
    return [asked, *first_exchange, *second_exchange, answer]


def _called(rng: random.Random, memory: _Memory, tool: OfferedTool, argument: object) -> tuple[list[Message], str]:
    result = tool.family.result(rng)
    call = _call(memory, tool, argument)
    answer = {
        "role": "tool",
        "tool_call_id": call["tool_calls"][0]["id"],
        "content": result_text(rng, tool, argument, result),
    }
    return [call, answer], said_about(tool, argument, result)


def _call(memory: _Memory, tool: OfferedTool, argument: object) -> Message:
    memory.calls += 1
    return tool.call(argument, f"call_{memory.calls}")


def _loop_report(rng: random.Random, memory: _Memory) -> list[Message]:
    memory.reports += 1
    return _report(rng, memory.reports)


_WEIGHTS: Final[tuple[tuple[_Act, float], ...]] = (
    (_greet, 0.8),
    (_small_talk, 1.2),
    (_farewell, 0.5),
    (_unknown, 1.2),
    (_ramble, 0.3),
    (_tell_name, 1.4),
    (_ask_name, 2.2),
    (_tell_colour, 0.5),
    (_ask_colour, 0.6),
    (_tell_home, 0.5),
    (_ask_home, 0.6),
    (_say, 0.7),
    (_sum, 2.2),
    (_capital, 1.6),
    (_day, 0.9),
    (_use_tool, 4.2),
    (_miss_tool, 0.4),
    (_use_tool_twice, 0.6),
    (_loop_report, 0.4),
)

_EVALUATED: Final[dict[str, _Act]] = {
    "greeting": _greet,
    "small_talk": _small_talk,
    "farewell": _farewell,
    "recall": _ask_name,
    "sum": _sum,
    "capital": _capital,
    "day": _day,
    "say": _say,
    "unknown": _unknown,
    "tool_call": _call_tool,
    "tool_result": _use_tool,
    "report": _loop_report,
}
_WITH_TOOLS: Final = frozenset({"tool_call", "tool_result"})

KINDS: Final = tuple(_EVALUATED)
