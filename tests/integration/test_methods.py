"""Each method to the end on one stream, in one place, so that what they have in common is trained once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lifelong_moe.config.load import read_config
from lifelong_moe.config.run import Method
from lifelong_moe.store.checks import require_own_key
from lifelong_moe.store.record import StageRecord
from lifelong_moe.store.stages import StageStore
from pipelines.run.run import stage_births
from pipelines.shared.workspace import prepare
from tests.tiny import CONTEXT, SEQUENCES, tiny_config, train, write_config, write_corpora

pytestmark = pytest.mark.xdist_group("methods")  # one process trains each method

STREAM = ("fruit", "code", "sea")
STEPS = 6
TOKENS = STEPS * SEQUENCES * CONTEXT
SECTIONS = {
    "tokens": TOKENS,
    "penalty": {"fisher_tokens": 256},
    "distill": {"weight": 0.5},
}


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]], dict[str, str]]:
    """A directory in which each method has been run, the report of each, and what each said."""
    before, root = os.getcwd(), tmp_path_factory.mktemp("methods")
    threads = torch.get_num_threads()
    os.chdir(root)
    torch.set_num_threads(1)
    reports, said = {}, {}
    try:
        write_corpora(root)
        write_config(tiny_config(STREAM, stage_defaults=SECTIONS))
        for method in Method:
            reports[method.value], said[method.value] = train("tiny.yaml", f"run={method}", f"method={method}")
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        os.chdir(before)
    return root, reports, said


@pytest.fixture
def reports(
    everywhere: tuple[Path, dict[str, dict[str, Any]], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> dict[str, dict[str, Any]]:
    """The reports, in the directory that they were made in."""
    monkeypatch.chdir(everywhere[0])
    return everywhere[1]


def head(run: str) -> dict[str, Any]:
    return json.loads(Path(f"mlruns/runs/{run}/head.json").read_text())


CHAINS = [method.value for method in Method if method != Method.joint]


@pytest.mark.parametrize("method", CHAINS)
def test_a_chain_has_a_row_after_each_stage(reports: dict[str, dict[str, Any]], method: str) -> None:
    report = reports[method]
    assert [stage["name"] for stage in report["stages"]] == list(STREAM)
    assert [stage["learns"] for stage in report["stages"]] == [[name] for name in STREAM]
    assert [len(row) for row in report["loss_nats_per_token"]] == [3, 3, 3]
    assert all(stage["tokens"] == TOKENS for stage in report["stages"])
    experts = {"lifelong": [2, 4, 6], "static_moe": [6, 6, 6]}.get(method, [2, 2, 2])
    assert [stage["experts_per_layer"] for stage in report["stages"]] == experts
    for i in (1, 2):  # each learned something
        assert report["loss_nats_per_token"][i][i] < report["loss_nats_per_token"][i - 1][i]
    assert set(report["forgetting"]) == set(STREAM) and report["forgetting"]["sea"] == 0.0


def test_every_stage_is_trained_by_one_run_only(reports: dict[str, dict[str, Any]]) -> None:
    keys = {stage["key"] for report in reports.values() for stage in report["stages"]}
    trained = [stage["key"] for report in reports.values() for stage in report["stages"] if not stage["shared"]]
    assert len(trained) == len(set(trained)) and set(trained) == keys
    # The beginning: one for those that begin with two experts, one for those that begin with six.
    assert len({reports[method]["stages"][0]["key"] for method in CHAINS}) == 2
    assert reports["lifelong"]["stages"][0]["key"] == reports["ewc"]["stages"][0]["key"]


def test_joint(reports: dict[str, dict[str, Any]]) -> None:
    report = reports["joint"]
    (stage,) = report["stages"]
    assert (stage["name"], stage["learns"], stage["tokens"]) == ("joint", list(STREAM), 3 * TOKENS)
    assert stage["experts_per_layer"] == 6 and not stage["shared"]
    assert [len(row) for row in report["loss_nats_per_token"]] == [3] and report["distributions"] == list(STREAM)
    (row,) = report["loss_nats_per_token"]
    assert all(after < before for after, before in zip(row, report["loss_at_init"], strict=True))
    assert report["forgetting"] == dict.fromkeys(STREAM, 0.0) and report["from_scratch"] == {}
    assert report["backward_transfer"] is None and report["forward_transfer"] is None
    assert all(statistics["leak"] == 0.0 for statistics in report["routing"].values())
    # It read each text as often as its stage would have: a third of the tokens are the first one's.
    corpus = prepare(read_config("tiny.yaml")).data.corpora["fruit"].train
    assert stage["epochs"] == pytest.approx(TOKENS / corpus.num_tokens, rel=0.01)


def test_tokens_that_fill_no_step_are_left_out_and_the_stage_is_read_again(reports: dict[str, dict[str, Any]]) -> None:
    """Its record held them, where its key is of whole steps, so that every later command refused it."""
    arguments = ("tiny.yaml", "run=uneven", "method=joint", "seed=7", f"stage_defaults.tokens={TOKENS + 1}")
    first, _ = train(*arguments)
    again, printed = train(*arguments)
    assert again == first and "Nothing to train" in printed
    (stage,) = again["stages"]
    assert stage["tokens"] == 3 * TOKENS
    # As it was recorded before.
    path = next(Path("mlruns/stages").glob(f"joint-{stage['key'][:16]}")) / "config.json"
    record = json.loads(path.read_text())
    record["spec"]["tokens"] += 3
    require_own_key(StageRecord.from_json(record), record["spec"])


def test_unrestrained(
    reports: dict[str, dict[str, Any]], everywhere: tuple[Path, dict[str, dict[str, Any]], dict[str, str]]
) -> None:
    report, sequential = reports["unrestrained"], reports["sequential"]
    # Not a step of the chain was trained again.
    assert [stage["key"] for stage in report["stages"]] == [stage["key"] for stage in sequential["stages"]]
    assert [stage["shared"] for stage in report["stages"]] == [True] * 3
    assert report["loss_nats_per_token"] == sequential["loss_nats_per_token"]
    assert head("unrestrained")["names"] == ["fruit", "code.scratch", "code", "sea.scratch", "sea"]
    assert len(head("unrestrained")["trained"]) == 2
    # What was learned from the second stage on, alone and at the same tokens.
    assert set(report["from_scratch"]) == {"code", "sea"} and sequential["from_scratch"] == {}
    store = StageStore(Path("mlruns"))
    for i, name in enumerate(STREAM[1:], start=1):
        alone = report["from_scratch"][name]
        assert alone["tokens"] == TOKENS
        assert report["loss_at_init"][i] > alone["nats_per_token"] != report["loss_nats_per_token"][i][i]
        stage = store.get(head("unrestrained")["plan"][2 * i - 1])
        assert stage.parent is None and set(stage.data) == {name}
    assert "code.scratch: committed as" in everywhere[2]["unrestrained"]


def test_a_repeated_run_trains_nothing(reports: dict[str, dict[str, Any]]) -> None:
    for method, stages in (("unrestrained", 5), ("joint", 1)):
        again, printed = train("tiny.yaml", f"run={method}", f"method={method}")
        assert again == reports[method]
        assert f"Nothing to train: all {stages} stages of {method} are committed." in printed


def test_what_each_holds_on_to_is_in_its_losses(reports: dict[str, dict[str, Any]]) -> None:
    def final(method: str, stage: int) -> set[str]:
        return {name.removeprefix("train/") for name in reports[method]["stages"][stage]["training"]["final"]}

    plain = {"loss", "balance_loss", "z_loss", "imbalance"}
    for method in CHAINS:
        assert final(method, 0) == plain, method
        extra = {"lifelong": {"distill_loss"}, "lwf": {"distill_loss"}, "l2": {"penalty"}, "ewc": {"penalty"}}
        assert final(method, 1) - plain <= extra.get(method, set()) and plain <= final(method, 1), method
    assert all(reports[m]["stages"][2]["training"]["final"]["train/penalty"] > 0 for m in ("l2", "ewc"))


def test_births_are_places_in_the_chain(reports: dict[str, dict[str, Any]]) -> None:
    store, births = StageStore(Path("mlruns")), {}
    for method in ("lifelong", "unrestrained", "joint"):
        plan = prepare(read_config("tiny.yaml", [f"run={method}", f"method={method}"])).plan
        births[method] = stage_births(store.get(plan[-1].key), plan)
    assert births == {
        "lifelong": [[0, 0, 1, 1, 2, 2]] * 2, "unrestrained": [[0, 0]] * 2, "joint": [[0] * 6] * 2,
    }  # fmt: skip


def test_a_stage_appended_to_an_unrestrained_run_continues_it(lab: Path) -> None:
    """Stages from scratch do not come in between."""
    write_config(tiny_config(STREAM[:2], stage_defaults=SECTIONS, method="unrestrained"))
    train()
    longer = tiny_config(STREAM, stage_defaults=SECTIONS, method="unrestrained")
    report, _ = train(write_config(longer))
    assert len(report["stages"]) == 3 and set(report["from_scratch"]) == {"code", "sea"}
