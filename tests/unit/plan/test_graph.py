"""Each method's stages by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lifelong_moe.config.retention import DistillText, PenaltyKind, ReplaySource
from lifelong_moe.config.run import Method, RunConfig
from lifelong_moe.data.tokens.identity import DataIdentity, TokenizerIdentity
from lifelong_moe.data.tokens.shards import TokenizedCorpus, TokenShard
from lifelong_moe.errors import ConfigError
from lifelong_moe.plan.methods import RECIPES, stage_specs
from lifelong_moe.plan.planned import PlannedStage
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.plan.stages import chain, check_shares, plan_stages

MakeRun = Callable[..., RunConfig]
TOKENIZER = TokenizerIdentity({"vocab_size": 300}, "t")
STREAM = [{"data": "english"}, {"data": "python"}, {"data": "poems"}]
EVERYTHING = {
    "tokens": 640,
    "grow": {"experts": 2},
    "trunk": {"train": "gentle"},
    "distill": {"weight": 1.0, "text": "replay"},
    "replay": {"fraction": 0.25},
    "penalty": {"kind": "l2"},
    "review": {"fraction": 0.2},
    "optim": {"batch_tokens": 64},
}


@pytest.fixture(scope="module")
def specs_of(make_run: MakeRun) -> Callable[..., list[StageSpec]]:
    """Stages of a run of three distributions in which every section asks for something."""

    def specs(method: str, *overrides: str, stages: list[dict[str, Any]] = STREAM) -> list[StageSpec]:
        return stage_specs(everything(make_run, method, *overrides, stages=stages))

    return specs


Specs = Callable[..., list[StageSpec]]


def everything(make_run: MakeRun, method: str, *overrides: str, stages: list[dict[str, Any]] = STREAM) -> RunConfig:
    distributions = {name: {"builtin": "english_docs"} for name in ("english", "python", "poems")}
    sections = {"distributions": distributions, "stage_defaults": EVERYTHING, "stages": stages}
    return make_run(f"method={method}", *overrides, **sections)


def plan(config: RunConfig) -> list[PlannedStage]:
    return plan_stages(
        config, DataIdentity({"english": "e", "python": "p", "poems": "o"}, TOKENIZER, vocab_size=300, bos_id=0)
    )


def parts(spec: StageSpec) -> set[str]:
    """What is on in a stage."""
    return {
        name
        for name, on in {
            "grow": spec.grow,
            "trunk": spec.trunk,
            "distill": spec.distill,
            "replay": spec.replay.fraction,
            "penalty": spec.penalty,
            "review": spec.review,
        }.items()
        if on
    }


CHAINS: dict[str, set[str]] = {
    "lifelong": {"grow", "trunk", "distill", "replay", "penalty", "review"},
    "sequential": set(),
    "static_moe": set(),
    "replay": {"replay"},
    "l2": {"penalty"},
    "ewc": {"penalty"},
    "lwf": {"distill"},
}


@pytest.mark.parametrize("method", CHAINS)
def test_chains(specs_of: Specs, method: str) -> None:
    specs = specs_of(method)
    assert [spec.name for spec in specs] == [spec.data for spec in specs] == ["english", "python", "poems"]
    assert [spec.parent for spec in specs] == [None, 0, 1]
    assert [parts(spec) for spec in specs] == [set(), CHAINS[method], CHAINS[method]]
    reads = "replay" in CHAINS[method]
    assert [spec.replayed for spec in specs] == [(), ("english",) * reads, ("english", "python") * reads]
    assert all(spec.replay_weights == (1,) * len(spec.replayed) for spec in specs)
    assert all(spec.learns == (spec.data,) for spec in specs)
    experts = 8 if method == "static_moe" else 4  # 4 and twice 2
    assert [spec.model.experts for spec in specs] == [experts] * 3


def test_there_are_nine(specs_of: Specs) -> None:
    assert {*CHAINS, "joint", "unrestrained"} == set(Method) == set(RECIPES)


def test_experts_of_lifelong_and_static_moe(make_run: MakeRun) -> None:
    grown, static = (plan(everything(make_run, method, "stages[2].grow.experts=3")) for method in
                     ("lifelong", "static_moe"))  # fmt: skip
    assert [stage.architecture.num_experts for stage in grown] == [4, 6, 9]
    assert [stage.architecture.num_experts for stage in static] == [9, 9, 9]
    assert all(len(stage.architecture.generations) == 1 and not stage.architecture.frozen for stage in static)


def test_penalties(specs_of: Specs) -> None:
    for method, kind, factor in (("l2", PenaltyKind.l2, 0.1), ("ewc", PenaltyKind.ewc, 1000.0)):
        first, *later = specs_of(method)
        assert first.penalty is None
        assert [(s.penalty.kind, s.penalty.factor) for s in later if s.penalty] == [(kind, factor)] * 2
    assert [spec.fisher_data for spec in specs_of("ewc")] == [(), ("english",), ("english", "python")]
    assert [spec.fisher_data for spec in specs_of("l2")] == [(), (), ()]
    found = specs_of("lifelong", "stage_defaults.penalty.kind=ewc", "stage_defaults.penalty.weight=7")
    assert [s.penalty.factor for s in found if s.penalty] == [7.0, 7.0]
    for off in ("penalty.kind=none", "penalty.weight=0"):
        assert not any(spec.penalty for spec in specs_of("lifelong", f"stage_defaults.{off}"))
    assert not any(s.penalty for s in specs_of("lifelong", "stages[1].penalty={kind: none, weight: 5}")[:2])


def test_ewc_without_other_text_measures_nothing_and_pulls_at_nothing(specs_of: Specs) -> None:
    again = [{"data": "english"}, {"data": "english"}, {"data": "python"}]
    specs = specs_of("ewc", stages=again)
    assert [(spec.penalty is None, spec.fisher_data) for spec in specs] == [
        (True, ()), (True, ()), (False, ("english",)),
    ]  # fmt: skip
    assert [spec.penalty is None for spec in specs_of("l2", stages=again)] == [True, False, False]


def test_distillation(specs_of: Specs) -> None:
    for spec in specs_of("lwf", "stage_defaults.distill.fraction=0.5")[1:]:
        assert spec.distill is not None and spec.distill.text == DistillText.new and spec.replayed == ()
        assert spec.distilled_share == 0.5 and spec.teacher_tokens == 320
    for spec in specs_of("lifelong")[1:]:
        assert spec.distill is not None and spec.distill.text == DistillText.replay
        # Ten steps, two of them review, a quarter of eight steps' 64 tokens replayed.
        assert (spec.steps, spec.review_steps, spec.teacher_tokens) == (10, 2, 128)


def test_replay(specs_of: Specs) -> None:
    generated = specs_of("replay", "stage_defaults.replay.source=generated")
    assert [(spec.generates, spec.reads) for spec in generated] == [(False, ()), (True, ()), (True, ())]
    assert [spec.replay.source for spec in generated] == [ReplaySource.stored] + [ReplaySource.generated] * 2
    assert [spec.teacher_tokens for spec in generated] == [0, 160, 160]  # a quarter of 640 is written by the parent
    buffered = specs_of("replay", "stage_defaults.replay.buffer_tokens=99")
    assert [(spec.replay.buffer_tokens, spec.reads) for spec in buffered] == [
        (None, ()), (99, ("english",)), (99, ("english", "python")),
    ]  # fmt: skip


def test_a_review_needs_no_replay_in_the_stage_itself(specs_of: Specs) -> None:
    off = ["stage_defaults.replay.fraction=0", "stage_defaults.distill.text=new"]
    spec = specs_of("lifelong", *off)[2]
    assert spec.review is not None and spec.replay.fraction == 0.0 and spec.replayed == ("english", "python")
    assert [phase.replay_fraction for phase in spec.phases()] == [0.0, 0.5]
    again = specs_of("lifelong", *off, stages=[{"data": "english"}, {"data": "english"}])[1]
    assert again.review is None and again.replayed == () and len(again.phases()) == 1


def test_joint(specs_of: Specs) -> None:
    stages = [
        {"data": "english"}, {"data": "python", "tokens": 960},
        {"data": "english", "tokens": 320}, {"data": "poems", "tokens": 1280},
    ]  # fmt: skip
    (spec,) = specs_of("joint", stages=stages)
    assert (spec.name, spec.data, spec.parent, parts(spec)) == ("joint", "english", None, {"replay"})
    # English 640 + 320, Python 960, poems 1280; the first comes by its share, the others three turns to four.
    assert spec.tokens == 3200 and spec.replay.fraction == pytest.approx(0.7)
    assert spec.replayed == ("python", "poems") and spec.replay_weights == (3, 4)
    assert spec.learns == ("english", "python", "poems") and spec.replay.buffer_tokens is None
    assert spec.model.experts == 4 + 3 * 2


def test_joint_of_equal_shares(specs_of: Specs) -> None:
    (spec,) = specs_of("joint")
    assert (spec.tokens, spec.replay_weights) == (1920, (1, 1)) and spec.replay.fraction == pytest.approx(2 / 3)


@pytest.mark.parametrize("stages", [[{"data": "english"}], [{"data": "english"}, {"data": "english"}]])
def test_joint_of_one_distribution(specs_of: Specs, stages: list[dict[str, Any]]) -> None:
    (spec,) = specs_of("joint", stages=stages)
    assert (spec.replayed, spec.replay_weights, spec.replay.fraction) == ((), (), 0.0)
    assert spec.tokens == 640 * len(stages)


def test_joint_of_shares_without_a_common_measure(specs_of: Specs) -> None:
    tokens = {"english": 640, "python": 500_009, "poems": 1_000_003}
    (spec,) = specs_of("joint", stages=[{"data": name, "tokens": count} for name, count in tokens.items()])
    # A round of at most a thousand turns: one for every 1501 tokens, so 333.1 and 666.2.
    assert spec.replay_weights == (333, 666)


MIXED: list[dict[str, Any]] = [
    {"data": {"english": 0.7, "python": 0.3}},
    {"data": {"python": 1, "poems": 3}},
    {"data": "english"},
]


def test_a_mixture_in_a_chain(specs_of: Specs) -> None:
    first, second, third = specs_of("lifelong", "stage_defaults.penalty.kind=ewc", stages=MIXED)
    assert (first.name, first.data, first.mixed, first.mix_weights) == (
        "english-python",
        "english",
        ("python",),
        (7, 3),
    )
    # The largest share first, and what is learned is not replayed beside it.
    assert (second.name, second.new, second.shares) == ("poems-python", ("poems", "python"), (3, 1))
    assert second.replayed == second.fisher_data == ("english",)
    assert (third.mixed, third.mix_weights, third.replayed) == ((), (), ("python", "poems"))


def test_the_same_mixture_has_one_form(specs_of: Specs) -> None:
    forms = ({"english": 0.75, "python": 0.25}, {"python": 1, "english": 3}, {"english": 30, "python": 10.0})
    first, *others = [specs_of("sequential", stages=[{"data": form}])[0] for form in forms]
    assert all(other == first for other in others)


def test_each_distribution_of_a_mixture_gets_the_generations_label(make_run: MakeRun) -> None:
    keys = ("routing.mode=label", "routing.top_k=2", "model.document_mask=true", "stage_defaults.penalty.kind=none")
    sections = ("stage_defaults.review.fraction=0", *keys)
    found = plan(everything(make_run, "lifelong", *sections, stages=MIXED[:2]))
    assert found[0].architecture.labels == (("english", 0), ("python", 0))
    assert dict(found[1].architecture.labels) == {"english": 0, "python": 1, "poems": 1}


def test_joint_of_mixtures(specs_of: Specs) -> None:
    (spec,) = specs_of("joint", stages=MIXED)
    # English 448 + 640, Python 192 + 160, poems 480.
    assert (spec.new, spec.replayed, spec.tokens) == (("english",), ("python", "poems"), 1920)
    assert spec.replay.fraction == pytest.approx(1 - 1088 / 1920) and spec.replay_weights == (11, 15)


def test_a_mixture_is_learned_from_scratch_as_a_whole(make_run: MakeRun) -> None:
    found = plan(everything(make_run, "unrestrained", stages=MIXED))
    assert [(one.spec.name, one.spec.new) for one in found if one.is_from_scratch] == [
        ("poems-python.scratch", ("poems", "python")),
        ("english.scratch", ("english",)),
    ]


def test_a_share_of_less_than_a_block_is_refused(make_run: MakeRun) -> None:
    config = everything(make_run, "sequential", stages=[{"data": {"english": 39, "python": 1}, "tokens": 640}])
    check_shares(plan(config), config, {})  # 640 tokens are 40 blocks of 16
    with pytest.raises(ConfigError, match=r"^stages\[0\].data.python: its share of the new text is less than a block"):
        everything(make_run, "sequential", stages=[{"data": {"english": 40, "python": 1}, "tokens": 640}])
    # A quarter is replayed.
    stages: list[dict[str, Any]] = [{"data": "poems"}, {"data": {"english": 39, "python": 1}}]
    config = everything(make_run, "replay", stages=stages)
    with pytest.raises(ConfigError, match=r"^stages\[1\].data.python: its share"):
        check_shares(plan(config), config, {})


def test_more_passes_than_allowed_are_refused(make_run: MakeRun) -> None:
    shard = TokenShard(np.zeros(64, dtype=np.uint16), np.array([0, 64]), np.array([64]))
    corpora = {name: TokenizedCorpus(name, shard, shard, "t", "h", "s") for name in ("english", "python")}
    stage: dict[str, Any] = {"data": {"english": 3, "python": 1}, "tokens": 640}
    for most, name, passes in ((7.5, None, None), (7.4, "english", "7.5"), (2.5, "english", "7.5")):
        config = everything(make_run, "sequential", stages=[stage | {"max_epochs": most}])
        if name is None:
            check_shares(plan(config), config, corpora)
            continue
        with pytest.raises(ConfigError, match=rf"^stages\[0\].max_epochs={most}: {name} .* {passes} times"):
            check_shares(plan(config), config, corpora)
    config = everything(make_run, "sequential", stages=[{"data": "python", "tokens": 640, "max_epochs": 9}])
    with pytest.raises(ConfigError, match=r"max_epochs=9: python would be gone through 10.0 times"):
        check_shares(plan(config), config, corpora)


def test_unrestrained(make_run: MakeRun) -> None:
    found = plan(everything(make_run, "unrestrained"))
    assert [stage.spec.name for stage in found] == ["english", "python.scratch", "python", "poems.scratch", "poems"]
    assert [stage.spec.parent for stage in found] == [None, None, 0, None, 2]
    assert [stage.is_from_scratch for stage in found] == [False, True, False, True, False]
    assert [stage.depth for stage in found] == [0, 0, 1, 0, 2]
    assert [stage.spec.data for stage in found] == ["english", "python", "python", "poems", "poems"]
    assert all(parts(stage.spec) == set() and stage.architecture.num_experts == 4 for stage in found)
    # Each from scratch has the tokens, and costs what, its stage does.
    assert all(a.tokens == b.tokens and a.flops == b.flops for a, b in zip(found[1::2], found[2::2], strict=True))


def test_unrestrained_has_sequential_s_stages(make_run: MakeRun) -> None:
    chained = [stage.key for stage in chain(plan(everything(make_run, "unrestrained")))]
    assert chained == [stage.key for stage in plan(everything(make_run, "sequential"))]


def test_a_stage_from_scratch_does_not_depend_on_what_came_before(make_run: MakeRun) -> None:
    (_, scratch, _, other, _) = plan(everything(make_run, "unrestrained"))
    reordered = plan(everything(make_run, "unrestrained", stages=[STREAM[2], STREAM[1], STREAM[0]]))
    assert reordered[1].key == scratch.key and reordered[0].key != other.key  # its name is another


def test_appended_stages_come_last(make_run: MakeRun) -> None:
    for method in set(Method) - {"joint", "static_moe"}:
        short, long = ([stage.key for stage in plan(everything(make_run, method, stages=STREAM[:n]))] for n in (2, 3))
        assert long[: len(short)] == short, method


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [{"data": "english"}, {"data": "python"}, {"data": "english", "name": "python.scratch"}]},
         r"^stages\[1\]: method=unrestrained .* python\.scratch, which is taken; set stages\[1\]\.name"),
        ({"distributions": {name: {"builtin": "english_docs"} for name in ("english", "python", "python.scratch")}},
         r"^stages\[1\]: .* python\.scratch, which is taken"),
        ({"stages": [{"data": "english"}, {"data": "python", "name": "p" * 57}]},
         r"^stages\[1\]: .* p{57}\.scratch, which is over 64 characters"),
    ],
)  # fmt: skip
def test_names_beside_the_chain_are_free_and_short(make_run: MakeRun, changes: dict[str, Any], message: str) -> None:
    assert make_run("method=sequential", **changes)  # nothing is beside that one
    with pytest.raises(ConfigError, match=message):
        make_run("method=unrestrained", **changes)


def test_the_first_stage_has_no_model_beside_it(make_run: MakeRun) -> None:
    stages = [{"data": "english", "name": "e" * 64}, {"data": "python", "name": "p" * 56}]
    assert stage_specs(make_run("method=unrestrained", stages=stages))[1].name == "p" * 56 + ".scratch"


def test_ewc_reads_what_is_kept_and_no_more(make_run: MakeRun) -> None:
    def of(*overrides: str, method: str = "ewc") -> PlannedStage:
        return plan(everything(make_run, method, "stage_defaults.penalty.kind=ewc", *overrides))[1]

    buffer = "stage_defaults.replay.buffer_tokens=64"
    assert of().spec.replay.buffer_tokens is None and of(buffer).spec.replay.buffer_tokens == 64
    assert of().key != of(buffer).key and of(method="lifelong").key != of(buffer, method="lifelong").key


def test_ewc_on_generated_text_reads_nothing_stored(make_run: MakeRun) -> None:
    both = ["stage_defaults.penalty.kind=ewc", "stage_defaults.replay.source=generated"]
    for method in ("lifelong", "ewc"):
        spec = plan(everything(make_run, method, *both))[1].spec
        assert spec.measures_generated and spec.fisher_data == () and spec.uses == (spec.data,)
    labels = ["routing.bundles=label", "model.document_mask=true", *both, "stage_defaults.review.fraction=0"]
    with pytest.raises(ConfigError, match=r"replay\.source=generated: text that a model wrote has no label"):
        everything(make_run, "lifelong", *labels, "stage_defaults.distill.weight=0")
