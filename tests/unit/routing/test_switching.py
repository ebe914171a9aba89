"""One key switches a run from one router to another, or the refusal lists what else is needed, to be copied."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lifelong_moe.config.load import read_config
from lifelong_moe.config.routing.modes import FOR_ENCODERS, ROUTERS
from lifelong_moe.config.run import RunConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.plan.methods import stage_specs

ROOT = Path(__file__).parents[3]
MODES = [mode for mode in ROUTERS if mode not in FOR_ENCODERS]
PRESETS = sorted(f"presets/{path.stem}" for path in (ROOT / "configs/presets").glob("*.yaml"))
NO_BUNDLES = "routing.bundles=none stage_defaults.trunk.train=full stage_defaults.replay.fraction=0.25"
NONCAUSAL = "routing.allow_noncausal=true"


def documented() -> dict[str, tuple[str, str]]:
    """The table of docs/systems.md: what a mode needs beside its key, on presets and on the quickstart."""
    found = {}
    for line in (ROOT / "docs/systems.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        modes = re.findall(r"`(\w+)`", cells[0])
        if len(cells) == 3 and modes and set(modes) <= set(MODES) and (cells[1] == "one key" or NONCAUSAL in cells[1]):
            preset = "" if cells[1] == "one key" else cells[1].strip("`")
            both = f"{NO_BUNDLES} {preset}" if cells[2] == "the same" else cells[2].strip("`")
            found |= {mode: (preset, "" if both == "one key" else both) for mode in modes}
    return found


def needs(path: Path, mode: str) -> str:
    """What else is needed to plan a file's run in a mode; with it, it plans."""
    missing = ""
    try:
        config = read_config(path, [f"routing.mode={mode}"]).config
    except ConfigError as error:
        assert error.exit_code == 2 and "\n" not in str(error)
        asked = re.search(r"(?:Add|Set) (.+?)(?: to try it nevertheless)?\.$", str(error))
        assert asked is not None, error
        missing = asked[1]
        config = read_config(path, [f"routing.mode={mode}", *missing.split(" ")]).config
    assert config.routing.mode == mode and len(stage_specs(config)) == len(config.stages)
    return missing


def test_the_table_has_every_mode() -> None:
    assert sorted(documented()) == sorted(MODES)


@pytest.mark.parametrize("mode", MODES)
def test_the_quickstart_takes_every_mode(mode: str) -> None:
    assert needs(ROOT / "configs/quickstart.yaml", mode) == documented()[mode][1]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_take_every_mode(name: str) -> None:
    path = ROOT / f"configs/{name}.yaml"
    allowed = yaml.safe_load(path.read_text(encoding="utf-8"))["routing"].get("allow_noncausal", False)
    for mode in MODES:
        assert needs(path, mode) == ("" if allowed else documented()[mode][0]), mode


FILE = """\
run: tiny
distributions: {a: {builtin: english_docs}, b: {builtin: python_code}}
model: {layers: 2, width: 16, heads: 4, kv_heads: 2, expert_width: 8, experts: 8, context: 16, document_mask: true}
routing: ROUTING
stage_defaults: {tokens: 640, grow: {experts: 4}, optim: {batch_tokens: 64}}
stages: [{data: a}, {data: b}]
"""
Load = Callable[..., RunConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Build the configuration of a file whose routing is as said, with overrides."""

    def load(routing: str, *overrides: str) -> RunConfig:
        (tmp_path / "run.yaml").write_text(FILE.replace("ROUTING", routing), encoding="utf-8")
        return read_config(tmp_path / "run.yaml", list(overrides)).config

    return load


def test_what_the_file_says_for_both_modes_stays(load: Load) -> None:
    routing = load("{mode: learned, top_k: 3, balance_loss: 0.5, score: sigmoid, z_loss: 0.1}", "routing.mode=relu")
    assert (routing.routing.top_k, routing.routing.balance_loss, routing.routing.z_loss) == (3, 0.5, 0.1)
    assert "score" not in routing.routing.settings()  # relu has no scores of that kind


def test_what_the_mode_cannot_have_has_its_value(load: Load) -> None:
    found = load("{top_k: 4, renormalize: true, balance_scope: global_batch}", "routing.mode=switch").routing
    assert (found.top_k, found.renormalize, found.balance_scope) == (1, False, None)
    assert load("{mode: switch, top_k: 1}", "routing.mode=learned").routing.top_k == 2
    assert load("{mode: switch, top_k: 1}", "routing={mode: noisy_topk}").routing.top_k == 2
    assert load("{mode: learned, top_k: 1, renormalize: false}", "routing.mode=hierarchical").routing.top_k == 4
    grouped = load("{mode: hierarchical, top_k: 4, expert_groups: 4, top_groups: 2}", "routing.mode=learned").routing
    assert (grouped.top_k, grouped.expert_groups, grouped.top_groups) == (4, 1, 1)


def test_an_override_is_never_left_out(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"routing\.mode=switch chooses 1 expert"):
        load("{top_k: 2}", "routing.mode=switch", "routing.top_k=2")
    with pytest.raises(ConfigError, match=r"routing\.chunk_tokens is for .*, not for hash"):
        load("{top_k: 2}", "routing={mode: hash, chunk_tokens: 8}")
    with pytest.raises(ConfigError, match=r"routing\.bundles=label needs routing\.mode=learned"):
        load("{top_k: 2}", "routing.mode=label", "routing.bundles=label")


def test_a_file_is_taken_at_its_word(load: Load) -> None:
    """Without an override of the mode nothing is left out, and what it takes is named at once."""
    with pytest.raises(ConfigError) as caught:
        load("{mode: vmoe, bundles: cluster}")
    assert str(caught.value) == (
        "routing.mode=vmoe needs more than one key here. Add routing.bundles=none routing.allow_noncausal=true."
    )
    with pytest.raises(ConfigError) as caught:
        load("{mode: base, top_k: 2, bundles: cluster}")
    assert str(caught.value).endswith("Add routing.bundles=none routing.top_k=1 routing.allow_noncausal=true.")
    with pytest.raises(ConfigError, match=r"routing\.chunk_tokens is for .*, not for hash"):
        load("{mode: hash, chunk_tokens: 8}", "routing.mode=hash")  # the same mode


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(FILE.replace("ROUTING", "{top_k: 2, score: sigmoid}"), encoding="utf-8")
    path = str(tmp_path / "run.yaml")
    said = f"routing.mode=switch does without routing.top_k of {path}; docs/systems.md"
    assert read_config(path, ["routing.mode=switch"]).left_behind == (said,)
    assert read_config(path, ["routing.mode=relu"]).left_behind == (
        f"routing.mode=relu does without routing.score of {path}; docs/systems.md",
    )
    assert read_config(path, ["routing.top_k=3"]).left_behind == ()


def test_a_section_that_an_override_removes_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(FILE.replace("ROUTING", "{top_k: 1, renormalize: false}"), encoding="utf-8")
    loaded = read_config(tmp_path / "run.yaml", ["routing=null"])
    assert (loaded.config.routing.mode, loaded.config.routing.settings()["top_k"]) == ("learned", 2)


def test_stages_with_deltas_of_their_own_are_named(load: Load) -> None:
    with pytest.raises(ConfigError) as caught:
        load("{bundles: cluster}", "routing.mode=hash", "stages[1].trunk={train: deltas}")
    assert str(caught.value) == (
        "routing.mode=hash needs more than one key here. Add routing.bundles=none stages[1].trunk.train=full."
    )


def test_a_router_of_ones_own_is_switched_to_like_any_other(load: Load) -> None:
    found = load("{mode: relu, top_k: 2, allow_noncausal: false}", "routing.mode=mine.Router").routing
    assert (found.mode, found.top_k) == ("mine.Router", 2)
    with pytest.raises(ConfigError) as caught:
        load("{bundles: cluster, chunk_tokens: 8}", "routing.mode=mine.Router", "stages[1].trunk={train: deltas}")
    assert str(caught.value) == (
        "routing.mode=mine.Router needs more than one key here. Add routing.bundles=none stages[1].trunk.train=full."
    )


def test_what_every_mode_once_recorded_may_stand_at_its_value(load: Load) -> None:
    """Earlier versions logged every key for every mode; such a file is read again, one with another value is not."""
    every = load("{mode: hash}").routing.to_json()
    assert load(json.dumps(every)).routing == load("{mode: hash}").routing
    with pytest.raises(ConfigError, match=r"routing\.jitter is for .*, not for hash"):
        load(json.dumps(every | {"jitter": 0.1, "scale": 3.0}))


@pytest.mark.parametrize("mode", ["[hash]", "{hash: 1}", "1", "null", "nothing"])
def test_a_mode_that_is_none_is_refused_in_a_line(mode: str, tmp_path: Path) -> None:
    quickstart = ROOT / "configs/quickstart.yaml"
    written = yaml.safe_load(quickstart.read_text(encoding="utf-8"))
    written["routing"]["mode"] = yaml.safe_load(mode)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(written), encoding="utf-8")
    for given in ((quickstart, [f"routing.mode={mode}"]), (path, []), (path, ["routing.mode=hash", "seed=1"])):
        with pytest.raises(ConfigError, match=r"^routing\.mode"):
            read_config(*given)
