"""A store from somebody else: attacks of every kind, at places drawn from all places, against every command.

``python -m tests.benchmarks.fuzz_store`` goes on for hours; here each command meets each kind of link, and some of them
each kind of value.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests.hostile import COMMANDS, HOSTILE, configuration_attacks, copy_scene, json_attacks, link_attacks, make_store
from tests.watched import attempt, complaint, fingerprint

# The run was moved on by `drop`; only a learned router without bundles can be consolidated; the spool's address is not
# the user's, so its records stay.
ENDS = {"run": 2, "consolidate": 2, "sync": 75}
SAMPLE = 5
"""Commands that meet each kind of value; 0.2 s each."""
LINKS = ("a link to the outside", "a link to nothing", "a link to itself", "a link to a copy", "a FIFO", "a new link")


@pytest.fixture(scope="session")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which :func:`make_store` worked."""
    root = tmp_path_factory.mktemp("intact")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        make_store(root)
    return root


@pytest.mark.parametrize("command", COMMANDS)
def test_an_intact_store_serves(command: str, intact: Path, tmp_path: Path) -> None:
    scene = copy_scene(intact, tmp_path)
    before = fingerprint(scene.outside)

    outcome = attempt(COMMANDS[command], scene.work, scene.outside)

    assert (outcome.code, complaint(outcome)) == (ENDS.get(command, 0), None)
    assert fingerprint(scene.outside) == before


@pytest.mark.parametrize("kind", LINKS)
def test_no_link_of_a_store_is_followed(kind: str, intact: Path, tmp_path: Path) -> None:
    for number, command in enumerate(COMMANDS):
        scene = copy_scene(intact, tmp_path / str(number))
        attacks = [one for one in link_attacks(scene.store, scene.outside) if one.kind == kind]
        attack = random.Random(f"{kind} {command}").choice(attacks)
        attack.apply(scene.store)
        before = fingerprint(scene.outside)

        outcome = attempt(COMMANDS[command], scene.work, scene.outside)

        assert (outcome.code, complaint(outcome)) == (7, None), f"{command} on {attack}: {outcome.err}"
        assert fingerprint(scene.outside) == before, f"{command} on {attack} changed its surroundings"


@pytest.mark.parametrize("kind", [*HOSTILE, "nothing", "no text", "a cycle"])
def test_no_value_of_a_store_leads_out_of_it(kind: str, intact: Path, tmp_path: Path) -> None:
    attacks = [one for one in json_attacks(intact / "mlruns") if one.kind == kind]
    for number, command in enumerate(random.Random(kind).sample(list(COMMANDS), SAMPLE)):
        attack = random.Random(f"{kind} {command}").choice(attacks)
        scene = copy_scene(intact, tmp_path / str(number))
        attack.apply(scene.store)
        before = fingerprint(scene.outside)

        outcome = attempt(COMMANDS[command], scene.work, scene.outside)

        # It may succeed: not every command reads every value, and some other values are as good.
        assert complaint(outcome) is None, f"{command} on {attack}: {complaint(outcome)}"
        assert fingerprint(scene.outside) == before, f"{command} on {attack} changed its surroundings"


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_value_of_a_configuration_ends_in_a_traceback(kind: str, intact: Path, tmp_path: Path) -> None:
    attacks = [one for one in configuration_attacks(intact) if one.kind == kind]
    for number, command in enumerate(("run", "plan", "retrain")):
        # A name is no secret, wherever it came from: a run may well be called after `${oc.env:USER}`.
        fitting = [a for a in attacks if a.concerns(COMMANDS[command]) and not a.place.endswith((":run", ".data"))]
        attack = random.Random(f"{kind} {command}").choice(fitting)
        scene = copy_scene(intact, tmp_path / str(number))
        attack.apply(scene.store)

        outcome = attempt(COMMANDS[command], scene.work, scene.outside)

        # What a user writes may name other folders and addresses.
        assert complaint(replace(outcome, forbidden=[])) is None, f"{command} on {attack}: {outcome.err}"
