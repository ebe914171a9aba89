"""The exit codes that are documented for a command are those that its code can come to."""

from __future__ import annotations

import ast
import functools
import re
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from lifelong_moe import errors
from lifelong_moe.training.callbacks.interrupt import EXIT_CODES as ON_SIGNALS
from pipelines.cli import app
from pipelines.exit_codes import BESIDES, MEANINGS, OF_ALL, OUTCOMES, epilog

ROOT = Path(__file__).parents[3]
ERRORS = {
    name: kind.exit_code
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.LifelongError) and kind is not errors.LifelongError
}
OFFLINE = ("init", "evaluate", "generate", "export")
NOT_REACHED = {("drop", 6), ("consolidate", 6), ("promote", 3), *((command, 75) for command in OFFLINE)}
"""The first two hold a bench of candidates; its ``train`` is not called, but modules have a method of that name, too.
Who rejects a version by hand gets what was asked for, which is no failure. The others read folders, or look for a model
of the hub in its cache alone; the same code asks the hub for other commands."""
Place = tuple[str, str]


class Calls:
    """What a function can come to, by the names in the source: too much rather than too little.

    A name is what the module defines or imports under it, unless a parameter hides it. A class brings of its methods
    those with double underscores and those whose name stands after a dot in anything that is reached.
    """

    def __init__(self, trees: dict[str, ast.Module]) -> None:
        self.imported = {module: dict(imports(tree)) for module, tree in trees.items()}
        self.defined = {(module, name): node for module, tree in trees.items() for name, node in definitions(tree)}
        self._read: dict[int, tuple[list[Place], set[str]]] = {}

    def reached(self, start: Place) -> list[ast.AST]:
        """Functions, methods and statements of modules that can be run from there."""
        names, seen, dotted = [start], set(), set()
        waiting: dict[str, list[Place | tuple[str, ast.AST]]] = defaultdict(list)
        bodies: list[tuple[str, ast.AST]] = []
        nodes: list[ast.AST] = []
        while names or bodies:
            if bodies:
                module, node = bodies.pop()
                nodes.append(node)
                further, attributes = self._named(module, node)
                names += further
                for attribute in attributes - dotted:
                    bodies += waiting.pop(attribute, [])  # type: ignore[arg-type]
                dotted |= attributes
            elif (place := names.pop()) in self.defined and place not in seen:
                seen.add(place)
                node = self.defined[place]
                for part in (*node.bases, *node.body) if isinstance(node, ast.ClassDef) else (node,):
                    late = isinstance(part, ast.FunctionDef) and not part.name.startswith("__")
                    late = late and isinstance(node, ast.ClassDef) and part.name not in dotted
                    (waiting[part.name] if late else bodies).append((place[0], part))
        return nodes

    def _named(self, module: str, node: ast.AST) -> tuple[list[Place], set[str]]:
        """What a piece of code names, and the names after dots."""
        if id(node) not in self._read:
            local = dict(imports(node))
            hidden = {a.arg for n in ast.walk(node) if isinstance(n, ast.arguments) for a in (*n.args, *n.kwonlyargs)}
            known = {name: place for name, place in self.imported[module].items() if name not in hidden} | local
            names, dotted = [], set()
            for one in code(node):
                if isinstance(one, ast.Attribute):
                    dotted.add(one.attr)
                    if isinstance(one.value, ast.Name) and one.value.id in known:
                        names.append((".".join(known[one.value.id]), one.attr))
                elif isinstance(one, ast.Name) and (one.id in known or one.id not in hidden):
                    names.append(known.get(one.id, (module, one.id)))
            self._read[id(node)] = names, dotted
        return self._read[id(node)]


def definitions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """What a module defines at its top."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((target.id, node) for target in targets if isinstance(target, ast.Name))


def imports(node: ast.AST) -> Iterator[tuple[str, Place]]:
    """What is imported in a piece of code, or at the top of a module; ``from a import b`` is all that we write."""
    parts = [n for n in node.body if not isinstance(n, ast.FunctionDef)] if isinstance(node, ast.Module) else [node]
    for one in (one for part in parts for one in ast.walk(part)):
        if isinstance(one, ast.ImportFrom) and one.module:
            yield from ((alias.asname or alias.name, (one.module, alias.name)) for alias in one.names)


def code(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all below it but annotations and the keys of a table."""
    yield node
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "keys"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from code(child)


def exit_codes(nodes: list[ast.AST]) -> set[int]:
    """Codes that the code ends with: errors that it raises, SIGTERM that it handles, outcomes that it names."""
    return set().union(*(codes_of(node) for node in nodes))


@functools.cache
def codes_of(piece: ast.AST) -> set[int]:
    """Those of one piece."""
    found = set()
    for node in code(piece):
        if isinstance(node, ast.Raise) and node.exc is not None:
            found |= {ERRORS[n.id] for n in ast.walk(node.exc) if isinstance(n, ast.Name) and n.id in ERRORS}
        elif isinstance(node, ast.Name) and node.id == "handling_signals":
            found.add(ON_SIGNALS[signal.SIGTERM])
        elif isinstance(node, ast.Constant) and node.value in OUTCOMES:
            found.add(OUTCOMES[node.value])
    return found


@pytest.fixture(scope="module")
def calls() -> Calls:
    paths = [*ROOT.glob("lifelong_moe/**/*.py"), *ROOT.glob("pipelines/**/*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return Calls({name: ast.parse(path.read_text("utf-8")) for name, path in zip(names, paths, strict=True)})


def test_reached_code_on_a_small_program() -> None:
    source = """
from b import helper, other
LIMIT = other
class C:
    def __init__(self): raise ConfigError
    def used(self): raise StalePlanError
    def unused(self): raise CorruptError
def go(x: C, other):
    helper(other).used
"""
    small = Calls({"a": ast.parse(source), "b": ast.parse("from a import C\ndef helper(y):\n    return C()\n")})
    assert exit_codes(small.reached(("a", "go"))) == {2, 5}
    assert exit_codes(small.reached(("b", "helper"))) == {2}
    assert exit_codes(small.reached(("a", "LIMIT"))) == set()


def test_every_exit_code_of_every_command_is_documented(calls: Calls) -> None:
    assert list(BESIDES) == [command.callback.__name__ for command in app.registered_commands]  # type: ignore[union-attr]
    for command, documented in BESIDES.items():
        found = exit_codes(calls.reached(("pipelines.commands", command))) - set(OF_ALL)
        assert set(documented) == found - {code for name, code in NOT_REACHED if name == command}, command
        assert list(documented) == sorted(documented)


def test_every_meaning_is_that_of_a_code() -> None:
    zero_bug_interrupt = {0, 1, 130}
    assert set(MEANINGS) == zero_bug_interrupt | set(ERRORS.values()) | set(OUTCOMES.values())
    assert set(OF_ALL) | {code for codes in BESIDES.values() for code in codes} == set(MEANINGS)


def test_the_page_on_scheduling_names_the_codes_of_a_tick() -> None:
    page = (ROOT / "docs/scheduling.md").read_text(encoding="utf-8")
    rows = {int(code) for code in re.findall(r"^\| (\d+) \|", page, flags=re.MULTILINE)}
    assert rows == {0, 2, 8, *BESIDES["retrain"]}


def test_what_a_code_means_for_one_command_is_said_by_that_one() -> None:
    about_export = [command for command in BESIDES if "an export does not" in epilog(command)]
    assert about_export == ["export"] and "an export does not" in MEANINGS[7]
    assert epilog("init").endswith("the line names it.")
