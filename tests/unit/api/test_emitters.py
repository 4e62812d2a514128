"""Every event that the source makes has only counts and details that its class declares.

The source is read, not run: the names in dictionaries are followed through variables, parameters and what functions
return. What cannot be followed fails the test, unless `BY_HAND` says which names it has.
"""

import ast
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest

from appliance.audit import events
from appliance.audit.events import (
    ADMIN_REFUSED,
    AUTHENTICATED,
    CATALOGUE,
    MALFORMED,
    NOT_AUTHENTICATED,
    OF_ANY_REQUEST,
    REQUEST_REFUSED,
)
from appliance.audit.search import Query

ROOT: Final = Path(__file__).parents[3]
PLACES: Final = ("counts", "details")
# What makes an event of a class, of counts or of details that it is given, and its positional parameters.
MAKERS: Final = {
    "Event": ["kind"],
    "did": ["kind"],
    "was_cut_off": ["kind", "target", "sent_bytes", "error"],
    "_doing": ["kind", "target", "outcome", "reason", "tenant_id", "counts", "details"],
    "_for_proof": ["kind"],
    "_of_caller": ["request", "kind"],
    "ended": ["request"],
    "made": ["kind", "target", "tenant_id", "details"],
    "_tell_of": ["name", "what", "kind"],
}
# The names in the dictionary of a function's variable.
_WITNESSED: Final = ({"witnesses"}, {"size", "begun_anew"})  # `NodeAudit.keep_cosignature`
BY_HAND: Final = {
    ("_audit_entries", "given"): {field.name for field in fields(Query)},
    **{
        (function, name): names
        for function in ("_audit_witness_reply", "_take_up")
        for name, names in zip(PLACES, _WITNESSED, strict=True)
    },
}

_Function = ast.FunctionDef | ast.AsyncFunctionDef
Names = dict[str, set[str]]


@dataclass(frozen=True)
class Scope:
    """A function, with those around it, innermost first."""

    path: Path
    module: ModuleType
    functions: tuple[_Function, ...]

    @property
    def name(self) -> str:
        return self.functions[0].name

    def assigned(self, name: str) -> list[ast.expr]:
        """What a variable of the function is given, or of the nearest one around it that has it."""
        for function in self.functions:
            found = list(_assigned(function, name))
            if found or _has_parameter(function, name):
                return found
        return []


def _has_parameter(function: _Function, name: str) -> bool:
    given = function.args
    return name in [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]


def _assigned(function: _Function, name: str) -> Iterator[ast.expr]:
    for node in _nodes(function):
        match node:
            case ast.Assign(targets=[ast.Name(id=found)], value=value) if found == name:
                yield value
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
                yield from (to for each, to in zip(names, values, strict=True) if ast.unparse(each) == name)
            case ast.Assign(targets=[ast.Subscript(value=ast.Name(id=found), slice=key)]) if found == name:
                yield ast.Dict([key], [ast.Constant("")])


def _nodes(function: _Function) -> Iterator[ast.AST]:
    """Those of the function that are of no function in it."""
    waiting: list[ast.AST] = [*function.body]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, _Function):
            yield node
            waiting += ast.iter_child_nodes(node)


def _scopes() -> Iterator[Scope]:
    for path in sorted([*(ROOT / "appliance").rglob("*.py"), *(ROOT / "api").rglob("*.py")]):
        text = path.read_text(encoding="utf-8")
        if path.name == "events.py" or not any(f"{maker}(" in text for maker in MAKERS):
            continue
        if "appliance.audit" in text or "api.trail" in text or "api.admin.asking" in text or "import trail" in text:
            module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
            yield from _scopes_in(ast.parse(text), path, module, ())


def _scopes_in(node: ast.AST, path: Path, module: ModuleType, around: tuple[_Function, ...]) -> Iterator[Scope]:
    for each in ast.iter_child_nodes(node):
        inner = (each, *around) if isinstance(each, _Function) else around
        if isinstance(each, _Function):
            yield Scope(path, module, inner)
        yield from _scopes_in(each, path, module, inner)


SCOPES: Final = list(_scopes())


def _called(node: ast.expr) -> str:
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="asyncio"))):
            return ""
        case ast.Call(func=ast.Name(id=name)) | ast.Call(func=ast.Attribute(attr=name)):
            return name
    return ""


def _makings(scope: Scope) -> Iterator[ast.Call]:
    calls = (_whole(node, scope) for node in _nodes(scope.functions[0]) if isinstance(node, ast.Call))
    return (call for call in map(_made_by_partial, calls) if _called(call) in MAKERS)


def _made_by_partial(call: ast.Call) -> ast.Call:
    """What `partial` makes is a call too: somebody else may be given it."""
    match call:
        case ast.Call(
            func=ast.Name(id="partial") | ast.Attribute(attr="partial"), args=[maker, *first], keywords=given
        ):
            return ast.copy_location(ast.Call(maker, first, given), call)
    return call


def _whole(call: ast.Call, scope: Scope) -> ast.Call:
    """The call; of what `partial` has made, as a call of what that was made of."""
    for each in scope.assigned(call.func.id) if isinstance(call.func, ast.Name) else []:
        match each:
            case ast.Call(func=ast.Name(id="partial"), args=[maker, *first], keywords=given):
                return ast.copy_location(ast.Call(maker, [*first, *call.args], [*given, *call.keywords]), call)
    return call


def _is_handed_on(node: ast.expr, scope: Scope) -> bool:
    return isinstance(node, ast.Name) and scope.name in MAKERS and _has_parameter(scope.functions[0], node.id)


def _returned(call: ast.expr) -> list[tuple[ast.expr, Scope]]:
    returns = [
        (node.value, scope)
        for scope in SCOPES
        if scope.name == _called(call)
        for node in _nodes(scope.functions[0])
        if isinstance(node, ast.Return) and node.value is not None
    ]
    assert returns, f"what does {ast.unparse(call)} return?"
    return returns


def _classes(node: ast.expr, scope: Scope) -> set[int]:
    """The numbers of the classes that an expression may be."""
    match node:
        case ast.IfExp(body=body, orelse=orelse):
            return _classes(body, scope) | _classes(orelse, scope)
        case ast.Call():
            return {number for each, inner in _returned(node) for number in _classes(each, inner)}
        case ast.Name(id=name) if hasattr(scope.module, name):
            return {vars(scope.module)[name].number}
        case ast.Name() if _is_handed_on(node, scope):
            return set()
        case ast.Name(id=name) if assigned := scope.assigned(name):
            return {number for each in assigned for number in _classes(each, scope)}
    raise AssertionError(f"{scope.path.name}: of which class is {ast.unparse(node)}?")


def _keys(node: ast.expr, scope: Scope, around: tuple[str, ...] = ()) -> set[str]:
    """The names that a dictionary may have, but for those that a maker is given.

    Args:
        around: the variables that it is a part of.
    """
    match node:
        case ast.Constant(value=None) | ast.Dict(keys=[]):
            return set()
        case ast.Dict(keys=keys, values=values):
            parts = [to for key, to in zip(keys, values, strict=True) if key is None]
            named = {_key(key, scope) for key in keys if key is not None}
            return named.union(*(_keys(part, scope, around) for part in parts))
        case ast.IfExp(body=left, orelse=right) | ast.BoolOp(values=[left, right]) | ast.BinOp(left=left, right=right):
            return _keys(left, scope, around) | _keys(right, scope, around)
        case ast.DictComp(generators=[ast.comprehension(iter=ast.Call(func=ast.Attribute(value=of, attr="items")))]):
            return _keys(of, scope, around)
        case ast.Name(id=name) if (scope.name, name) in BY_HAND:
            return BY_HAND[scope.name, name]
        case ast.Name(id=name) if name not in around and (assigned := scope.assigned(name)):
            return set().union(*(_keys(each, scope, (*around, name)) for each in assigned))
        case ast.Name() if _is_handed_on(node, scope):
            return set()
        case ast.Call():
            return set().union(*(_keys(each, inner) for each, inner in _returned(node)))
    raise AssertionError(f"{scope.path.name}: which names has {ast.unparse(node)}?")


def _key(node: ast.expr, scope: Scope) -> str:
    found = node.value if isinstance(node, ast.Constant) else vars(scope.module)[ast.unparse(node)]
    assert isinstance(found, str)
    return found


def _made(call: ast.Call, scope: Scope) -> tuple[set[int], Names]:
    """The classes that an event may be of, and the names that it may have; of a maker's, what it adds itself."""
    given: Mapping[str | None, ast.expr] = {
        **dict(zip(MAKERS[_called(call)], call.args, strict=False)),
        **{each.arg: each.value for each in call.keywords},
    }
    classes = _classes(given["kind"], scope) if "kind" in given else set()
    names: Names = {place: _keys(given[place], scope) if place in given else set() for place in PLACES}
    for maker in [each for each in SCOPES if each.name == _called(call)]:
        for inner in _makings(maker):
            more, added = _made(inner, maker)
            classes |= more
            names = {place: names[place] | added[place] for place in PLACES}
    return classes, names


def _undeclared(call: ast.Call, scope: Scope) -> list[str]:
    classes, names = _made(call, scope)
    assert classes or scope.name in MAKERS, f"{scope.path.name}:{call.lineno} makes an event of no class"
    return [
        f"{scope.path.name}:{call.lineno}: {kind.action} has no {place}.{name}"
        for kind in map(CATALOGUE.__getitem__, sorted(classes))
        for place, declared in (("counts", kind.counts), ("details", kind.details))
        for name in sorted(names[place] - declared.keys())
    ]


def test_every_event_that_the_source_makes_has_only_names_that_its_class_declares() -> None:
    made = [(call, scope) for scope in SCOPES for call in _makings(scope)]
    assert not [told for call, scope in made for told in _undeclared(call, scope)]
    # None was passed over: who makes events is found, and so is each class that is made anywhere.
    assert {number for call, scope in made for number in _made(call, scope)[0]} == set(CATALOGUE)
    assert MAKERS.keys() - {"Event"} == {scope.name for _, scope in made} & MAKERS.keys()


def test_nothing_makes_events_under_another_name() -> None:
    """A maker is called, or given to `partial`; what is called otherwise would not be found here."""
    for path in {scope.path for scope in SCOPES}:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        seen = {id(call.func) for call in calls} | {id(call.args[0]) for call in calls if _called(call) == "partial"}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in (
                "did",
                "was_cut_off",
                "_doing",
                "_of_caller",
                "_for_proof",
            ):
                assert id(node) in seen, f"{path.name}:{node.lineno}"
            if isinstance(node, ast.ImportFrom):
                assert not [each for each in node.names if each.name == "Event" and each.asname], path.name


def test_no_class_declares_what_nobody_makes() -> None:
    names: dict[int, Names] = {number: {"counts": set(), "details": set()} for number in CATALOGUE}
    for scope in SCOPES:
        for call in _makings(scope):
            classes, made = _made(call, scope)
            for number in classes:
                names[number] = {place: names[number][place] | made[place] for place in PLACES}
    # What `Recorder.count` adds when it tells.
    for counted in (AUTHENTICATED, NOT_AUTHENTICATED, MALFORMED, REQUEST_REFUSED, ADMIN_REFUSED):
        names[counted.number]["counts"].add("count")
    for number, kind in CATALOGUE.items():
        made, of_any = names[number], OF_ANY_REQUEST.keys()
        assert (made["counts"] | of_any, made["details"]) == (set(kind.counts), set(kind.details)), kind.action


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ('Event(GATEWAY_STOPPED, SYSTEM, counts={"n": 1})', "gateway.stopped has no counts.n"),
        (
            'details = {"pid": "1"}\n    details["n"] = ""\n    Event(GATEWAY_STARTED, SYSTEM, details=details)',
            "details.n",
        ),
        (
            'kind = GATEWAY_STARTED if lost else ENGINE_LOST\n    Event(kind, SYSTEM, details={"pid": ""})',
            "engine.lost has",
        ),
        ('asker.did(AUDIT_READ, ("", ""), details={**({"n": ""} if lost else {})})', "audit.read has no details.n"),
        ('asker.did(GATEWAY_STOPPED, ("", ""))', "gateway.stopped has no details.key_id"),
        ('read = partial(asker.did, AUDIT_READ, ("", ""))\n    read(counts={"n": 1})', "audit.read has no counts.n"),
    ],
)
def test_an_emitter_with_an_undeclared_name_is_found(source: str, told: str) -> None:
    (function,) = ast.parse(f"def emit(asker, lost):\n    {source}\n").body
    assert isinstance(function, ast.FunctionDef)
    scope = Scope(Path("here.py"), events, (function,))
    (found,) = [found for call in _makings(scope) for found in _undeclared(call, scope)]
    assert told in found


@pytest.mark.parametrize("source", ["Event(GATEWAY_STARTED, SYSTEM, details=lost)", "Event(lost, SYSTEM)"])
def test_an_emitter_that_cannot_be_followed_fails(source: str) -> None:
    (function,) = ast.parse(f"def emit(lost):\n    {source}\n").body
    assert isinstance(function, ast.FunctionDef)
    scope = Scope(Path("here.py"), events, (function,))
    (call,) = _makings(scope)
    with pytest.raises(AssertionError, match="here"):
        _undeclared(call, scope)
