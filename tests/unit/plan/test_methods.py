from __future__ import annotations

from collections.abc import Callable

import pytest

from lifelong_moe.config.run import Method, RunConfig
from lifelong_moe.data.tokens.identity import DataIdentity, TokenizerIdentity
from lifelong_moe.plan.cost import count_parameters
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.plan.planned import PlannedStage
from lifelong_moe.plan.stages import plan_stages

MakeRun = Callable[..., RunConfig]
HASHES = {"english": "e", "python": "p"}
TOKENIZER = TokenizerIdentity({"vocab_size": 300}, "t")


def plan(config: RunConfig, **hashes: str) -> list[PlannedStage]:
    return plan_stages(config, DataIdentity(HASHES | hashes, TOKENIZER, vocab_size=300, bos_id=0))


def keys(config: RunConfig) -> list[str]:
    return [stage.key for stage in plan(config)]


def test_methods_that_begin_with_the_same_experts_share_their_first_stage(make_run: MakeRun) -> None:
    found = {method: keys(make_run(f"method={method}")) for method in Method}
    larger = {Method.static_moe, Method.joint}  # these begin with all experts there will be
    assert len({stages[0] for method, stages in found.items() if method not in larger}) == 1
    assert len({stages[0] for stages in found.values()}) == 1 + len(larger)
    # Of what follows, unrestrained has sequential's stage; no other is another method's.
    assert found[Method.unrestrained][-1] == found[Method.sequential][-1]
    later = [stages[-1] for method, stages in found.items() if method != Method.unrestrained]
    assert len(set(later)) == len(Method) - 1


IN_EVERY_KEY = [
    "seed=1", "model.layers=3", "model.width=32", "model.experts=5", "model.context=32", "model.tie_embeddings=true",
    "routing.top_k=3", "routing.balance_loss=0.02", "routing.mode=label", "trainer.precision=bf16-mixed",
    "trainer.gradient_clip=0.5", "trainer.accumulate_grad_batches=2", "stage_defaults.tokens=1280",
    "stage_defaults.optim.lr=0.5",
    "stage_defaults.optim.batch_tokens=128", "stages[0].optim.schedule=constant", "stages[0].optim.schedule=wsd",
]  # fmt: skip
FROM_THE_SECOND_ON = [
    "stage_defaults.grow.experts=3", "stage_defaults.grow.experts=0", "stage_defaults.grow.init=random",
    "stage_defaults.grow.router=centroid", "stage_defaults.trunk.train=frozen", "stage_defaults.trunk.lr_scale=0.2",
    "stage_defaults.distill.weight=0.5", "stage_defaults.distill.weight=0", "stage_defaults.distill.temperature=3",
    "stage_defaults.distill.text=new", "stage_defaults.distill.fraction=0.5", "stage_defaults.replay.fraction=0.5",
    "stages[1].tokens=704", "stages[1].name=second", "method=sequential", "method=replay", "method=l2", "method=ewc",
    "method=lwf", "stage_defaults.replay.source=generated", "stage_defaults.replay.buffer_tokens=64",
    "stage_defaults.penalty.kind=l2", "stage_defaults.penalty.kind=ewc", "stage_defaults.review.fraction=0.2",
    "stage_defaults.grow.layers=[1]", "stage_defaults.grow.layers=[0]", "stage_defaults.grow.old_lr_scale=0.1",
    "stage_defaults.optim.rewarm=0.5", "stage_defaults.optim.router_until=0.5",
]  # fmt: skip
IN_NO_KEY = [
    "tracking.uri=sqlite:///x.db", "tracking.experiment=x", "trainer.accelerator=cpu", "trainer.strategy=ddp",
    "trainer.num_workers=3", "stage_defaults.trunk.rank=3", "stage_defaults.grow.old_until=0.5",
    "stage_defaults.grow.min_share=0.2", "stage_defaults.penalty.weight=3", "stage_defaults.penalty.fisher_tokens=64",
    "stage_defaults.review.old_loss=0.5", "stage_defaults.review.lr_scale=0.5", "method=lifelong",
    "run=other", "evaluate.tokens=5", "evaluate.also=[python]", "evaluate.batch_tokens=64", "tracking.enabled=false",
    "trainer.log_every_n_steps=3", "trainer.enable_progress_bar=false", "checkpoint.every_steps=7",
    "checkpoint.keep=1", "distributions.python.heldout_fraction=0.2",
]  # fmt: skip


@pytest.fixture(scope="module")
def before(make_run: MakeRun) -> list[str]:
    """Keys of the run as it is."""
    return keys(make_run())


@pytest.mark.parametrize("override", IN_EVERY_KEY)
def test_in_the_first_key_and_hence_in_every_later_one(make_run: MakeRun, before: list[str], override: str) -> None:
    after = keys(make_run(override))
    assert before[0] != after[0] and before[1] != after[1]


@pytest.mark.parametrize("override", FROM_THE_SECOND_ON)
def test_the_first_stage_has_nothing_to_grow_hold_or_replay(
    make_run: MakeRun, before: list[str], override: str
) -> None:
    after = keys(make_run(override))
    assert before[0] == after[0] and before[1] != after[1]


@pytest.mark.parametrize("override", IN_NO_KEY)
def test_in_no_key(make_run: MakeRun, before: list[str], override: str) -> None:
    assert keys(make_run(override)) == before


DELTAS = "model.document_mask=true routing.bundles=label stage_defaults.trunk.train=deltas"


@pytest.mark.parametrize(
    ("base", "override", "matters"),
    [
        ("stage_defaults.penalty.kind=l2", "stage_defaults.penalty.weight=3", True),
        ("stage_defaults.penalty.kind=l2", "stage_defaults.penalty.weight=0.1", False),  # its default, said aloud
        ("stage_defaults.penalty.kind=l2", "stage_defaults.penalty.fisher_tokens=64", False),
        ("stage_defaults.penalty.kind=ewc", "stage_defaults.penalty.weight=1000", False),
        ("stage_defaults.penalty.kind=ewc", "stage_defaults.penalty.fisher_tokens=64", True),
        ("stage_defaults.review.fraction=0.2", "stage_defaults.review.fraction=0.4", True),
        ("stage_defaults.review.fraction=0.2", "stage_defaults.review.old_loss=0.5", True),
        ("stage_defaults.review.fraction=0.2", "stage_defaults.review.lr_scale=0.5", True),
        ("stage_defaults.review.fraction=0.2", "stage_defaults.review.replay_fraction=0.25", True),
        (DELTAS, "stage_defaults.trunk.rank=3", True),
        (DELTAS, "stage_defaults.trunk.lr_scale=0.5", False),  # of a gentle trunk
        ("stage_defaults.grow.old_lr_scale=0.1", "stage_defaults.grow.old_until=0.5", True),
        ("stage_defaults.replay.fraction=0 stage_defaults.distill.weight=0", "stage_defaults.replay.source=generated",
         False),
        ("stage_defaults.replay.fraction=0 stage_defaults.distill.weight=0", "stage_defaults.replay.buffer_tokens=64",
         False),
        ("method=sequential", "stage_defaults.grow.experts=3", False),
        ("method=sequential", "stage_defaults.penalty.kind=l2", False),
        ("method=sequential", "stage_defaults.review.fraction=0.2", False),
        ("method=replay", "stage_defaults.replay.source=generated", True),
        ("method=replay", "stage_defaults.penalty.kind=l2", False),
        ("method=l2", "stage_defaults.penalty.kind=ewc", False),
        ("method=l2", "stage_defaults.penalty.weight=3", True),
        ("method=lwf", "stage_defaults.distill.text=new", False),
        ("method=lwf", "stage_defaults.distill.temperature=3", True),
    ],
)  # fmt: skip
def test_what_matters_under_what(make_run: MakeRun, base: str, override: str, matters: bool) -> None:
    """A key changes with whatever is used, and only then."""
    settings = base.split(" ")
    before, after = keys(make_run(*settings)), keys(make_run(*settings, override))
    assert before[0] == after[0] and (before[1] != after[1]) is matters


def test_data_is_in_the_key_of_its_stage_and_of_later_ones(make_run: MakeRun) -> None:
    base, python, english = (plan(make_run(), **h) for h in ({}, {"python": "x"}, {"english": "x"}))
    assert [a.key == b.key for a, b in zip(base, python, strict=True)] == [True, False]
    assert [a.key == b.key for a, b in zip(base, english, strict=True)] == [False, False]


def test_lifelong_by_hand(make_run: MakeRun) -> None:
    first, second = stage_specs(make_run("stage_defaults.replay.fraction=0.25"))
    assert (first.parent, first.grow, first.trunk, first.distill, first.replayed) == (None, None, None, None, ())
    assert first.replay.fraction == 0.0
    assert second.parent == 0 and second.replayed == ("english",) and second.replay.fraction == 0.25
    assert second.grow is not None and second.trunk is not None and second.distill is not None


def test_sequential_by_hand(make_run: MakeRun) -> None:
    for spec in stage_specs(make_run("method=sequential")):
        assert (spec.grow, spec.trunk, spec.distill, spec.replayed, spec.replay.fraction) == (None, None, None, (), 0.0)


def test_what_is_replayed_when_a_distribution_comes_back(make_run: MakeRun) -> None:
    stages = [{"data": "english"}, {"data": "python"}, {"data": "english"}, {"data": "english"}]
    specs = stage_specs(make_run(stages=stages))
    assert [spec.replayed for spec in specs] == [(), ("english",), ("python",), ("python",)]
    assert [spec.name for spec in specs] == ["english", "python", "english-2", "english-3"]
    assert [spec.parent for spec in specs] == [None, 0, 1, 2]


def test_the_same_text_again_has_nothing_to_replay(make_run: MakeRun) -> None:
    spec = stage_specs(make_run(stages=[{"data": "english"}, {"data": "english"}]))[1]
    assert spec.replayed == () and spec.replay.fraction == 0.0


def test_a_plan_by_hand(make_run: MakeRun) -> None:
    first, second = plan(make_run())
    assert (first.index, first.parent_key, second.parent_key) == (0, None, first.key)
    assert [stage.architecture.num_experts for stage in (first, second)] == [4, 6]
    assert first.tokens == second.tokens == 640 and first.routing == "learned"
    assert first.trainable == first.parameters.total
    # Two new experts of 3 * 16 * 8 with a row of 16 each, in two layers, and the trunk.
    assert second.parameters.unfrozen == 2 * 2 * (384 + 16)
    assert second.trainable == second.parameters.trunk + second.parameters.unfrozen < second.parameters.total
    frozen = plan(make_run("stage_defaults.trunk.train=frozen"))[1]
    assert first.flops > second.flops > frozen.flops > 0  # what is frozen has no weight gradients
    assert frozen.trainable == frozen.parameters.unfrozen == count_parameters(frozen.architecture).unfrozen
    assert plan(make_run("routing.mode=cluster"))[0].routing == "cluster/token"


def test_a_plan_without_growth(make_run: MakeRun) -> None:
    second = plan(make_run("method=sequential"))[1]
    assert second.architecture.num_experts == 4 and second.architecture.frozen == 0
    assert second.trainable == second.parameters.total


@pytest.mark.parametrize(
    ("overrides", "trained"),
    [
        # Experts a layer: 4, then 2, then 2; a frozen trunk leaves experts and rows alone.
        ([], [4, 2, 2]),
        (["stages[2].grow.experts=0"], [4, 2, 2]),  # nothing new: the newest go on
        (["stages[1].grow.experts=0", "stages[1].average=0.1"], [4, 4, 2]),
        (["stage_defaults.grow.old_lr_scale=0.1"], [4, 6, 8]),
        (["stages[2].grow.old_lr_scale=0.1"], [4, 2, 4]),  # the second stage froze the first one's, for good
        (["stage_defaults.grow.layers=[1]"], [4, 1, 1]),  # two experts in one of two layers
    ],
)
def test_trainable_parameters_by_hand(make_run: MakeRun, overrides: list[str], trained: list[float]) -> None:
    stages = [{"data": "english"}, {"data": "python"}, {"data": "english"}]
    frozen = [
        "stage_defaults.trunk.train=frozen",
        "stage_defaults.replay.fraction=0",
        "stage_defaults.distill.weight=0",
    ]
    found = plan(make_run(*frozen, *overrides, stages=stages))
    assert [stage.trainable - (i == 0) * stage.parameters.trunk for i, stage in enumerate(found)] == [
        experts * 2 * (384 + 16) for experts in trained
    ]
