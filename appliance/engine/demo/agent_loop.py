"""The agent loop that benchmarks run: an operations handbook as system prompt, then fifty short turns.

Rules:

- Standard library only: the gateway's environment imports it without the engine's packages.
- Fixed: the same text on every machine and in every run, so that token counts can be accounted for.
- With the demonstration model's tokenizer the system prompt is about 1,850 tokens, a turn adds about 46 (what comes in,
  the template around it and the answer), and fifty turns end at about 4,150.

Usage:

    history = []
    for turn in range(AGENT_TURNS):
        history += agent_task_messages(turn)
        history.append({"role": "assistant", "content": ask(history)})
"""

import random
from typing import Final

from appliance.engine.demo.vocabulary import ACTIONS, UNIT_KINDS, UNITS

AGENT_TURNS: Final = 50
AGENT_NAME: Final = "Mara"
AGENT_MAX_ANSWER_TOKENS: Final = 16
AGENT_LONG_FROM: Final = 4  # from this turn on the prompt has more than 2,000 tokens

_HALLS: Final = 6
_RECALL_EVERY: Final = 10
_INTRODUCTION: Final = (
    "You are the watch assistant of the water works. You read one report at a time and answer in one short line. "
    "Name the unit, name its state, and say what the handbook says to do about it. Say nothing else."
)
_RULES: Final = (
    "A unit that is steady needs nothing: keep watching it and go on to the next report.",
    "A unit that is hot runs too fast: slow it down and read it again after a few minutes.",
    "A unit that is cold has stood still for too long: warm it up before it is put back to work.",
    "A unit that is leaking loses water: close it at once, then tell the hall what was closed.",
    "A unit that is silent sends no numbers: check the sensor first, the unit itself is often well.",
    "A unit that is noisy may be about to break: call the crew and stay away from it until they come.",
)
_CUSTOMS: Final = (
    (
        "The watch begins at six in the morning and ends at six in the evening. Who takes the watch says so by "
        "name, and the name stands in the book until the next watch begins."
    ),
    (
        "Reports come in the order in which the halls are walked. A report has a number, a unit, a state and a "
        "temperature. When one of them is missing, ask for it and do not guess."
    ),
    (
        "The book is kept in ink. A wrong line is struck through once, so that it can still be read, and the right "
        "line is written below it with the hour."
    ),
    ("Nobody opens a door in hall 4 alone. Two people go, one works and one watches, and both come back together."),
    (
        "When the lights go out, stand still and count to ten. The second line takes over before you are done. If "
        "it does not, take the lamp from the wall and walk to the gate."
    ),
    (
        "Water that leaves the works is tested three times a day. The glass is held against the window: it must be "
        "clear, without colour and without smell. The result goes into the book, good or bad."
    ),
    (
        "Visitors stay with their guide. They may look at everything and touch nothing. A visitor who asks for "
        "numbers is sent to the office."
    ),
    (
        "The crew has its room beside the gate. Call them by the bell, not by the telephone, for the telephone is "
        "kept free for the town."
    ),
    (
        "Every spring the tanks are emptied one after the other, washed, and filled again. While a tank is empty "
        "its neighbour carries the load and is read twice as often."
    ),
    (
        "Tools go back to the place that they came from. A tool that is not on its hook at the end of the watch is "
        "looked for until it is found."
    ),
    "When two reports about one unit differ, the later one counts. Write both down.",
    ("In a storm the outer doors are closed and the fans run slowly. Read the outer halls first, then the inner ones."),
    ("Whoever finds a dead bird at the fence writes down the place and the hour. The town asks for it every month."),
    (
        "A number that looks wrong is read again before it is written down. Two readings that agree count, one does "
        "not. A sensor that gives a third number is taken from its unit and hung on the wall of the crew's room until "
        "somebody has looked at it."
    ),
)


def handbook(rng: random.Random, *, units: int, customs: int) -> str:
    """An operations handbook that no watch has read yet: the rules with some of the customs and units, shuffled."""
    return _bind(rng.sample(_CUSTOMS, min(customs, len(_CUSTOMS))), rng.sample(UNITS, min(units, len(UNITS))))


def agent_handbook() -> str:
    """The system prompt of the agent loop: about 1,850 tokens of plain text."""
    return _bind(list(_CUSTOMS), list(UNITS))


def agent_task_messages(turn: int) -> list[dict[str, str]]:
    """What the harness adds to the conversation before turn `turn`, counted from 0.

    Raises:
        ValueError: the loop has `AGENT_TURNS` turns.
    """
    if not 0 <= turn < AGENT_TURNS:
        raise ValueError(f"turn {turn} is outside the loop's {AGENT_TURNS} turns")
    if turn == 0:
        return [
            {"role": "system", "content": agent_handbook()},
            {"role": "user", "content": introduction(AGENT_NAME)},
        ]
    if _asks_for_the_name(turn):
        return [{"role": "user", "content": recall_question(turn)}]
    return [{"role": "user", "content": report(turn, *_reported(turn))}]


def agent_expected_answer(turn: int) -> str:
    """What a model that follows the handbook answers at turn `turn`."""
    if turn == 0:
        return f"Nice to meet you, {AGENT_NAME}!"
    if _asks_for_the_name(turn):
        return f"Your name is {AGENT_NAME}."
    unit, state, _ = _reported(turn)
    return verdict(unit, state)


def agent_history(turns: int) -> list[dict[str, str]]:
    """The conversation up to before turn `turns`, answered as a model that follows the handbook would."""
    history: list[dict[str, str]] = []
    for turn in range(turns):
        history += [*agent_task_messages(turn), {"role": "assistant", "content": agent_expected_answer(turn)}]
    return history


def introduction(name: str) -> str:
    """How whoever has the watch begins it."""
    return f"My name is {name}. I have the watch from now on and will send you the reports one by one."


def recall_question(turn: int) -> str:
    """A pause between two reports in which the assistant is asked what it was told at the beginning."""
    return f"Before report {turn + 1} comes in from the next hall, tell me one thing: what is my name?"


def report(number: int, unit: str, state: str, degrees: int) -> str:
    """One report as it comes in."""
    place = f"the {_kind(unit)} {unit} in hall {_hall(unit)}"
    return f"Report {number}: {place} is {state}, {degrees} degrees, as last read. What now?"


def verdict(unit: str, state: str) -> str:
    """What the handbook says to a report."""
    return f"{unit} is {state}: {ACTIONS[state]}."


def _bind(customs: list[str], units: list[str]) -> str:
    register = [f"{unit} is a {_kind(unit)} in hall {_hall(unit)}. It is read {_reading(unit)}." for unit in units]
    return "\n".join((_INTRODUCTION, "", "Rules", *_RULES, "", "Customs", *customs, "", "Units", *register))


def _kind(unit: str) -> str:
    return UNIT_KINDS[UNITS.index(unit) % len(UNIT_KINDS)]


def _hall(unit: str) -> int:
    return 1 + UNITS.index(unit) // (len(UNITS) // _HALLS)


def _reading(unit: str) -> str:
    return ("once a day", "twice a day", "every hour")[UNITS.index(unit) % 3]


def _asks_for_the_name(turn: int) -> bool:
    return turn > 0 and turn % _RECALL_EVERY == 0


def _reported(turn: int) -> tuple[str, str, int]:
    states = tuple(ACTIONS)
    return UNITS[turn * 7 % len(UNITS)], states[turn * 5 // 3 % len(states)], 20 + turn * 13 % 60
