from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from lifelong_moe.config.growth import VocabularyConfig
from lifelong_moe.config.model import LATER, RopeScaling
from lifelong_moe.config.retention import ReplayConfig, ReplaySource
from lifelong_moe.config.routing.capacity import CapacityConfig
from lifelong_moe.config.run import RunConfig
from lifelong_moe.config.training import FinetuneConfig
from lifelong_moe.data.tokens.identity import DataIdentity, TokenizerIdentity
from lifelong_moe.plan.cost import forward_flops_per_token
from lifelong_moe.plan.flops import loop_flops, stage_flops
from lifelong_moe.plan.key import stage_key
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.plan.phase import Phase, Trains
from lifelong_moe.plan.spec import StageSpec, own_text
from lifelong_moe.storage.plain import PlainError
from tests.conftest import routing_of

MakeRun = Callable[..., RunConfig]
TOKENIZER = TokenizerIdentity({"vocab_size": 300}, "t")
HASHES = {"english": "e", "python": "p", "poems": "o"}


def later_spec(make_run: MakeRun, *overrides: str) -> StageSpec:
    return stage_specs(make_run(*overrides))[1]


@pytest.fixture(scope="module")
def later(make_run: MakeRun) -> StageSpec:
    """The second stage of a run in which every section asks for something."""
    sections = ("penalty.kind=ewc", "review.fraction=0.2", "grow.old_lr_scale=0.1")
    return later_spec(make_run, *(f"stage_defaults.{section}" for section in sections))


def key_of(
    spec: StageSpec,
    parent: str | None = "parent",
    hashes: dict[str, str] = HASHES,
    tokenizer: TokenizerIdentity = TOKENIZER,
) -> str:
    return stage_key(spec, parent, DataIdentity(hashes, tokenizer, vocab_size=300, bos_id=0))


def test_what_is_written_is_read_again(later: StageSpec) -> None:
    grow = dataclasses.replace(later.grow, layers=[1]) if later.grow else None
    routing = routing_of(mode="my.Router", options={"a": [1]})
    capped = dataclasses.replace(later.routing, capacity=CapacityConfig())
    finetune = FinetuneConfig(patience=3)
    for changes in ({}, {"grow": grow, "routing": routing}, {"routing": capped, "finetune": finetune}):
        spec = dataclasses.replace(later, **changes)
        assert StageSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_earlier_versions_trained_in_one_process_and_measured_on_the_text_they_name(later: StageSpec) -> None:
    spec = later.to_json() | {"replay_source": "generated", "fisher_data": ["english"]}
    del spec["processes"]
    read = StageSpec.from_json(spec)
    assert (read.processes, read.measures_generated) == (1, False)


WRITTEN = ReplayConfig(fraction=0.5, source=ReplaySource.generated)
SCALARS: dict[str, Any] = {
    "average": 0.5,
    "name": "other",
    "replayed": (),
    "replay_weights": (2,),
    "replay": ReplayConfig(fraction=0.5),
    "fisher_data": (),
    "tokens": 10_000_000,
    "seed": 9,
    "precision": "bf16-mixed",
    "gradient_clip": 9.0,
    "accumulate": 4,
    "grow": None,
    "continues": "english",
    "trunk": None,
    "distill": None,
    "penalty": None,
    "review": None,
    "finetune": FinetuneConfig(),
    "vocabulary": VocabularyConfig(add=2),
    "text_ends": (3,),
    "mixed": ("poems",),
    "mix_weights": (7, 2),
}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(StageSpec) if f.name not in ("parent", "data")])
def test_every_field_of_the_stage_is_in_the_key(later: StageSpec, field: str) -> None:
    # Text that nobody writes has no ends, and all other stages the keys that they had.
    before = dataclasses.replace(later, replay=WRITTEN) if field == "text_ends" else later
    if field.startswith("mix"):
        before = dataclasses.replace(later, mixed=("english",), mix_weights=(3, 1))
    if field in SCALARS:
        assert key_of(dataclasses.replace(before, **{field: SCALARS[field]})) != key_of(before)
    else:  # sections: key by key in test_effective.py; processes: below
        assert field in {"optim", "model", "routing", "processes"}


def test_a_mixture_is_in_the_key_with_the_text_of_each_distribution(later: StageSpec) -> None:
    mixed = dataclasses.replace(later, mixed=("english",), mix_weights=(3, 1))
    assert not {"mixed", "mix_weights"} & later.to_json().keys()
    assert StageSpec.from_json(json.loads(json.dumps(mixed.to_json()))) == mixed
    assert key_of(mixed) != key_of(later)
    assert key_of(mixed) != key_of(mixed, hashes=HASHES | {"english": "other"})
    assert (mixed.new, mixed.learns, mixed.shares, later.shares) == (("python", "english"),) * 2 + ((3, 1), (1,))
    assert set(mixed.uses) == {"python", "english"}


@pytest.mark.parametrize(
    "changes",
    [
        {"mixed": ["english"]},
        {"mixed": ["english"], "mix_weights": [1]},
        {"mixed": ["english"], "mix_weights": [1, 0]},
        {"mixed": ["python"], "mix_weights": [1, 1]},
        {"mix_weights": [1]},
    ],
)
def test_a_stored_mixture_that_cannot_be_is_refused(later: StageSpec, changes: dict[str, Any]) -> None:
    with pytest.raises(PlainError, match="mixture"):
        StageSpec.from_json(json.loads(json.dumps(later.to_json())) | changes)


def test_a_stage_is_judged_by_what_no_earlier_stage_learned() -> None:
    assert own_text(["code", "web"], ["web"]) == ("code",)
    # All of it comes back.
    assert own_text(["code", "web"], ["web", "code", "sea"]) == ("code", "web")
    assert own_text(["code"], ["code"]) == own_text(["code"], []) == ("code",)


def test_where_nobody_writes_text_its_ends_have_no_effect(later: StageSpec) -> None:
    changed = dataclasses.replace(later, text_ends=(3,))
    assert key_of(changed) == key_of(later) and "text_ends" not in later.to_json()
    writes = dataclasses.replace(changed, replay=WRITTEN)
    assert StageSpec.from_json(json.loads(json.dumps(writes.to_json()))) == writes


@pytest.mark.parametrize("key", LATER)
def test_a_later_key_of_the_model_is_in_the_key_where_it_is_set(later: StageSpec, key: str) -> None:
    # Stages from before it do not name it, and keep their keys.
    assert key not in later.model.to_json()
    values = {"attention_bias": True, "qkv_clip": 2.0, "window": 4, "rope_scaling": RopeScaling(factor=2.0)}
    changed = dataclasses.replace(later, model=dataclasses.replace(later.model, **{key: values[key]}))
    assert key_of(changed) != key_of(later)
    assert StageSpec.from_json(json.loads(json.dumps(changed.to_json()))) == changed


@pytest.mark.parametrize("change", [{"fraction": 0.3}, {"source": ReplaySource.generated}, {"buffer_tokens": 64}])
def test_all_of_replay_is_in_the_key(later: StageSpec, change: dict[str, Any]) -> None:
    replay = dataclasses.replace(later.replay, **change)
    assert key_of(dataclasses.replace(later, replay=replay)) != key_of(later)


@pytest.mark.parametrize(
    ("settings", "depends"),
    [
        ({}, False),
        ({"mode": "relu"}, False),
        ({"mode": "gshard", "second": "threshold"}, False),
        ({"mode": "gshard"}, True),  # whose second expert is drawn
        ({"mode": "switch"}, True),  # which jitters
        ({"mode": "noisy_topk"}, True),
        ({"mode": "vmoe", "allow_noncausal": True}, True),
        ({"mode": "base", "allow_noncausal": True}, True),  # assigns a process's tokens all at once
        ({"capacity": {"priority": "random"}, "allow_noncausal": True}, True),
        ({"mode": "somebody.elses.Router"}, True),
    ],
)
def test_processes_are_in_the_key_where_they_change_the_result(
    make_run: MakeRun, settings: dict[str, Any], depends: bool
) -> None:
    spec = stage_specs(make_run(routing=settings))[1]
    assert (key_of(dataclasses.replace(spec, processes=2)) != key_of(spec)) is depends
    for tuned, also in ((FinetuneConfig(), depends), (FinetuneConfig(expert_dropout=0.1), True)):
        one = dataclasses.replace(spec, finetune=tuned)
        assert (key_of(dataclasses.replace(one, processes=2)) != key_of(one)) is also


def test_the_parent_s_index_is_not_its_content_is(later: StageSpec) -> None:
    assert key_of(dataclasses.replace(later, parent=5)) == key_of(later)
    assert key_of(later, parent="other") != key_of(later)


@pytest.mark.parametrize(
    "change",
    [
        {"hashes": HASHES | {"python": "x"}},
        {"hashes": HASHES | {"english": "x"}},
        {"tokenizer": dataclasses.replace(TOKENIZER, hash="x")},
        {"tokenizer": dataclasses.replace(TOKENIZER, recipe={"vocab_size": 301})},
    ],
)
def test_what_it_reads_is_in_the_key(later: StageSpec, change: dict[str, Any]) -> None:
    assert key_of(later, **change) != key_of(later)


def test_text_that_is_not_replayed_is_not(make_run: MakeRun, later: StageSpec) -> None:
    assert later.replayed == ("english",)
    assert key_of(later, hashes=HASHES | {"poems": "x"}) == key_of(later)
    none = later_spec(make_run, "stage_defaults.replay.fraction=0", "stage_defaults.distill.text=new")
    assert key_of(none, hashes={"python": "p"}) == key_of(none)
    generated = later_spec(make_run, "stage_defaults.replay.source=generated")
    assert generated.replayed == ("english",)
    assert key_of(generated, hashes={"python": "p"}) == key_of(generated)


def test_text_that_the_fisher_information_is_measured_on_is(make_run: MakeRun) -> None:
    measured, pulled = (later_spec(make_run, f"method={method}") for method in ("ewc", "l2"))
    assert key_of(measured, hashes=HASHES | {"english": "x"}) != key_of(measured)
    assert key_of(pulled, hashes={"python": "p"}) == key_of(pulled)


def test_a_key_is_a_function_of_the_config(make_run: MakeRun) -> None:
    key = key_of(later_spec(make_run))
    assert len(key) == 64 and set(key) <= set("0123456789abcdef")
    assert key_of(later_spec(make_run)) == key


def test_sizes_by_hand(make_run: MakeRun) -> None:
    spec = later_spec(make_run, "stage_defaults.tokens=1000")  # 64 tokens a step, 16 a sequence
    assert (spec.steps, spec.global_batch) == (15, 4)


def test_teacher_tokens_by_hand(make_run: MakeRun) -> None:
    tokens = 640
    half = ["stage_defaults.replay.fraction=0.25", "stage_defaults.distill.fraction=0.5"]
    assert later_spec(make_run, *half, "stage_defaults.distill.text=replay").teacher_tokens == tokens // 8
    assert later_spec(make_run, *half, "stage_defaults.distill.text=new").teacher_tokens == 240
    assert later_spec(make_run, "stage_defaults.distill.weight=0").teacher_tokens == 0


def test_flops_include_the_teacher_s(make_run: MakeRun) -> None:
    spec = later_spec(make_run, "stage_defaults.replay.fraction=0.25", "stage_defaults.distill.text=replay")
    parent = stage_specs(make_run())[0].architecture(None, 300, 0)
    after = spec.architecture(parent, 300, 0)
    alone = dataclasses.replace(spec, distill=None)
    assert stage_flops(spec, after, parent) == stage_flops(alone, after, parent) + 160 * forward_flops_per_token(parent)


@pytest.mark.parametrize(
    ("penalty", "buffer", "measured"),
    [
        ("{kind: ewc, fisher_tokens: 200}", "null", 192),  # whole blocks of 16
        ("{kind: ewc, fisher_tokens: 9}", "null", 16),
        ("{kind: ewc, fisher_tokens: 200}", "100", 96),
        ("{kind: ewc, fisher_tokens: 48}", "100", 48),
        ("{kind: l2, fisher_tokens: 200}", "null", 0),
    ],
)
def test_flops_include_the_fisher_pass(make_run: MakeRun, penalty: str, buffer: str, measured: int) -> None:
    """Forward and backward through the parent's model, on each earlier distribution."""
    off = ["stage_defaults.distill.weight=0", f"stage_defaults.replay={{fraction: 0.25, buffer_tokens: {buffer}}}"]
    stages = [{"data": "english"}, {"data": "python"}, {"data": "python", "name": "again"}, {"data": "english"}]
    specs = stage_specs(make_run(*off, f"stage_defaults.penalty={penalty}", stages=stages))
    parent = specs[0].architecture(None, 300, 0)
    after = specs[1].architecture(parent, 300, 0)
    loop = loop_flops(specs[1], after, parent)
    assert stage_flops(specs[1], after, parent) == loop + 3 * measured * forward_flops_per_token(parent)
    assert [spec.fisher_measured_tokens for spec in specs] == [0, measured, measured, measured]
    # Three passes' worth but for the weight gradients that frozen experts leave out.
    assert 2 * 640 * forward_flops_per_token(after) < loop < 3 * 640 * forward_flops_per_token(after)


def train(steps: int, share: float = 0.0, *, fits: bool = False, follows: bool = False) -> Phase:
    return Phase(name="train", steps=steps, replay_fraction=share, fits_clusters=fits, follows=follows)


@pytest.mark.parametrize(
    ("routing", "first", "later"),
    [
        ({}, [train(10)], [train(10, 0.05)]),
        ({"mode": "label"}, [train(10)], [train(10, 0.05)]),
        ({"mode": "cluster"}, [train(10, fits=True)], [train(10, 0.05, fits=True)]),
        (
            {"mode": "cluster", "features": "hidden"},
            [Phase(name="hash", steps=1, replay_fraction=0.0), train(9, fits=True, follows=True)],
            [train(10, 0.05, fits=True)],
        ),
    ],
)
def test_phases(make_run: MakeRun, routing: dict[str, Any], first: list[Phase], later: list[Phase]) -> None:
    specs = stage_specs(make_run(routing=routing))
    assert [spec.phases() for spec in specs] == [first, later]


def test_clusters_of_documents_are_fitted_before_the_stage(make_run: MakeRun) -> None:
    run = make_run("model.document_mask=true", routing={"mode": "cluster", "level": "document"})
    assert [spec.phases() for spec in stage_specs(run)] == [[train(10, fits=True)], [train(10, 0.05, fits=True)]]


@pytest.mark.parametrize(("bundles", "fits"), [("none", False), ("label", False), ("cluster", True)])
def test_bundles_that_are_clusters_are_fitted_when_there_are_two(make_run: MakeRun, bundles: str, fits: bool) -> None:
    run = make_run("model.document_mask=true", "stage_defaults.trunk.train=frozen", f"routing.bundles={bundles}")
    assert [[phase.fits_clusters for phase in spec.phases()] for spec in stage_specs(run)] == [[False], [fits]]


def test_labelled_bundles_know_their_distributions(make_run: MakeRun) -> None:
    frozen = "stage_defaults.trunk.train=frozen"
    first, second = stage_specs(make_run("model.document_mask=true", "routing.bundles=label", frozen))
    architecture = second.architecture(first.architecture(None, 300, 0), 300, 0)
    assert architecture.labels == (("english", 0), ("python", 1))


def test_without_growth_old_clusters_stay(make_run: MakeRun) -> None:
    spec = later_spec(make_run, "routing.mode=cluster", "stage_defaults.grow.experts=0")
    assert spec.grow is None and spec.phases() == [train(10, 0.05)]


def test_a_review_is_the_last_phase(make_run: MakeRun) -> None:
    review = "{fraction: 0.3, replay_fraction: 0.25, old_loss: 0.5, lr_scale: 2.0}"
    spec = later_spec(make_run, f"stage_defaults.review={review}", "stage_defaults.replay.fraction=0.5")
    assert spec.phases() == [
        train(7, 0.5),
        Phase(name="review", steps=3, replay_fraction=0.25, trains=Trains.router, lr_scale=2.0, old_loss=0.5),
    ]
    # 64 tokens a step: half of seven steps, a quarter of three; the teacher is asked about the former only.
    assert (spec.steps, spec.review_steps, spec.replayed_tokens, spec.teacher_tokens) == (10, 3, 224 + 48, 224)


def test_tokens_that_the_parent_writes_count_as_the_teacher_s(make_run: MakeRun) -> None:
    spec = later_spec(make_run, "stage_defaults.replay={fraction: 0.25, source: generated}")
    assert spec.teacher_tokens == 160 + 160  # written, and distilled on
    parent = stage_specs(make_run())[0].architecture(None, 300, 0)
    after = spec.architecture(parent, 300, 0)
    written = 160 * forward_flops_per_token(parent)
    assert stage_flops(spec, after, parent) - loop_flops(spec, after, parent) == written  # before the training loop
    alone = dataclasses.replace(spec, distill=None)
    assert loop_flops(spec, after, parent) == loop_flops(alone, after, parent) + written  # distilled on


def test_the_architecture_at_the_end(make_run: MakeRun) -> None:
    first, second = stage_specs(make_run("routing.mode=label"))
    begun = first.architecture(None, 300, 2)
    grown = second.architecture(begun, 300, 2)
    assert (begun.vocab_size, begun.bos_id, begun.frozen) == (300, 2, 0)
    assert [(g.stage, g.experts) for g in grown.generations] == [("english", 4), ("python", 2)]
    assert grown.frozen == 1 and grown.labels == (("english", 0), ("python", 1))


def test_losses_are_the_stage_s_and_the_rest_is_its_parent_s(make_run: MakeRun) -> None:
    """Of a parent with several generations; an earlier version's coefficient, a mean's, must not live on."""
    first, second = stage_specs(make_run())
    grown = second.architecture(first.architecture(None, 300, 2), 300, 2)
    routing = dataclasses.replace(grown.routing, balance_loss=0.01, z_loss=0.001, gate_scale=2.0)
    third = second.architecture(dataclasses.replace(grown, routing=routing), 300, 2).routing
    assert (third.balance_loss, third.z_loss, third.gate_scale) == (0.0025, 0.00025, 2.0)
    other = dataclasses.replace(routing, mode="noisy_topk")  # whose keys another mode may refuse
    assert routing.with_losses_of(other) is routing


def test_what_the_parent_writes_by_hand(make_run: MakeRun) -> None:
    """16 tokens a block; a quarter of 640 tokens is replayed, and 100 are to be measured on: 10 and 6 blocks."""
    quarter, generated = "stage_defaults.replay.fraction=0.25", "stage_defaults.replay.source=generated"
    measuring = ("stage_defaults.penalty.kind=ewc", "stage_defaults.penalty.fisher_tokens=100")
    assert later_spec(make_run, quarter).written_blocks == (0, 0)
    assert later_spec(make_run, quarter, generated).written_blocks == (10, 0)
    assert later_spec(make_run, quarter, generated, *measuring).written_blocks == (10, 6)
    pulled = later_spec(make_run, quarter, generated, "stage_defaults.penalty.kind=l2", measuring[1])
    assert (pulled.measures_generated, pulled.written_blocks, pulled.fisher_measured_tokens) == (False, (10, 0), 0)
    little = later_spec(make_run, "stage_defaults.replay.fraction=0.01", generated)
    assert little.written_blocks == (1, 0)  # a block at least
    of_old_text = later_spec(make_run, quarter, *measuring)
    assert (of_old_text.measures_generated, of_old_text.fisher_measured_tokens) == (False, 96)
    assert (
        later_spec(make_run, quarter, *measuring, "stage_defaults.replay.buffer_tokens=32").fisher_measured_tokens == 32
    )
    assert later_spec(make_run, quarter, "stage_defaults.penalty.kind=l2").fisher_measured_tokens == 0
    assert later_spec(make_run, quarter).fisher_measured_tokens == 0


def test_hidden_states_are_learned_before_they_are_clustered(make_run: MakeRun) -> None:
    """A tenth of the steps, and one at least; only in the stage that has nothing before it."""
    of_hidden = ("routing.mode=cluster", "routing.level=token", "routing.features=hidden")
    for tokens, steps in ((6400, (10, 90)), (128, (1, 1))):
        first, second = stage_specs(make_run(*of_hidden, f"stage_defaults.tokens={tokens}"))
        phases = [(phase.name, phase.steps, phase.fits_clusters, phase.follows) for phase in first.phases()]
        assert phases == [("hash", steps[0], False, False), ("train", steps[1], True, True)]
        assert [phase.name for phase in second.phases()] == ["train"]
