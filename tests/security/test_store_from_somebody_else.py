"""A store from somebody else: attacks of every kind, at places drawn from all places, against every command.

``python -m tests.benchmarks.fuzz_store`` goes on for hours; here each command meets each kind of link, and some of them
each kind of value.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MadeOnce
from tests.full_store import make_store
from tests.hostile import (
    COMMANDS,
    HOSTILE,
    LARGE,
    Tree,
    carry_out,
    configuration_attacks,
    json_attacks,
    link_attacks,
)
from tests.pictures import draw_once
from tests.watched import import_named

# Else a process would wait for half a minute while another one makes the store that all of them attack.
pytestmark = pytest.mark.xdist_group("somebody else's store")

# The run was moved on by `drop`; only a learned router without bundles can be consolidated; the address of one spool is
# not the user's, so its records stay; no run has learned a batch that was put beside them.
ENDS = {"run": 2, "consolidate": 2, "sync": 75, "lineage of a document": 2, "promote": 2}
SLOW = {"compare", "tick", "inspect", "export", *(name for name in COMMANDS if "recorded" in name)}
"""Commands that draw, train, or open a database; the benchmark attacks them too."""
SAMPLE = 5
"""Commands that meet each kind of value; 0.1 s each."""
LINKS = ("a link to the outside", "a link to nothing", "a link to itself", "a link to a copy", "a FIFO", "a new link")


@pytest.fixture(scope="session")
def untouched(made_once: MadeOnce, template: Path) -> Path:
    """The directory in which :func:`make_store` worked."""

    def make(root: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            draw_once(patch)
            make_store(root, template)

    return made_once("full-store", make)


Served = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def served(untouched: Path, made_once: MadeOnce) -> Served:
    """What each command did with it, once for all processes: exit code, what is wrong, and what it imported."""

    def make(root: Path) -> None:
        found: Served = {}
        for number, command in enumerate(COMMANDS):
            outcome, wrong = carry_out(command, untouched, root / f"copy-{number}")
            import_named(outcome.imported)
            found[command] = {"code": outcome.code, "wrong": wrong, "imported": outcome.imported}
        (root / "served.json").write_text(json.dumps(found))

    found: Served = json.loads((made_once("full-store-served", make) / "served.json").read_text())
    return found


@pytest.fixture(scope="session")
def intact(untouched: Path, served: Served) -> Path:
    """The same, to be copied by attempts that need not import anything."""
    for one in served.values():
        import_named(one["imported"])
    return untouched


@pytest.mark.parametrize("command", COMMANDS)
def test_an_intact_store_serves(command: str, served: Served) -> None:
    assert (served[command]["code"], served[command]["wrong"]) == (ENDS.get(command, 0), None)


@pytest.mark.parametrize("kind", LINKS)
def test_no_link_of_a_store_is_followed(kind: str, intact: Path, tmp_path: Path) -> None:
    attacks = [attack for attack in link_attacks(intact) if attack.kind == kind]
    for command in COMMANDS:
        if command in SLOW:
            continue
        attack = random.Random(f"{kind} {command}").choice(attacks)
        outcome, wrong = carry_out(command, intact, tmp_path / command, attack)
        assert (outcome.code, wrong) == (7, None), f"{command} on {attack}: {outcome.err}"


@pytest.mark.parametrize("kind", [*HOSTILE, *LARGE, "nothing", "no text", "a cycle"])
def test_no_value_of_a_store_leads_out_of_it(kind: str, intact: Path, tmp_path: Path) -> None:
    attacks = Tree(json_attacks(intact, [kind]))
    for command in random.Random(kind).sample([name for name in COMMANDS if name not in SLOW], SAMPLE):
        attack = attacks.draw(random.Random(f"{kind} {command}"))
        _, wrong = carry_out(command, intact, tmp_path / command, attack)
        # It may succeed: not every command reads every value, and some other values are as good.
        assert wrong is None, f"{command} on {attack}: {wrong}"


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_value_of_a_configuration_ends_in_a_traceback(kind: str, intact: Path, tmp_path: Path) -> None:
    attacks = [attack for attack in configuration_attacks(intact) if attack.kind == kind]
    for command in ("run", "plan", "retrain"):
        fitting = [attack for attack in attacks if attack.concerns(COMMANDS[command])]
        attack = random.Random(f"{kind} {command}").choice(fitting)
        _, wrong = carry_out(command, intact, tmp_path / command, attack)
        assert wrong is None, f"{command} on {attack}: {wrong}"
