"""Which configuration key has an effect on which stage: its key changes if, and only if, the stage would."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from omegaconf import OmegaConf

from lifelong_moe.config.evaluation import EvaluateConfig
from lifelong_moe.config.growth import GrowConfig, VocabularyConfig
from lifelong_moe.config.load import build_config
from lifelong_moe.config.model import ModelConfig
from lifelong_moe.config.retention import DistillConfig, PenaltyConfig, ReplayConfig, ReviewConfig, TrunkConfig
from lifelong_moe.config.routing.modes import ROUTERS, keys_of
from lifelong_moe.config.run import StageConfig
from lifelong_moe.config.training import CheckpointConfig, FinetuneConfig, FrozenConfig, OptimConfig, TrainerConfig
from lifelong_moe.data.tokens.identity import DataIdentity, TokenizerIdentity
from lifelong_moe.plan.key import stage_key
from lifelong_moe.plan.methods import stage_specs

MASKED = ("model.document_mask=true",)
FROZEN = (*MASKED, "stage_defaults.trunk.train=frozen")
BUNDLES = (*FROZEN, "routing.bundles=cluster")
CLUSTER = ("routing.mode=cluster",)
DOCUMENTS = (*MASKED, *CLUSTER, "routing.level=document")
NO_GROWTH = ("stage_defaults.grow.experts=0",)
HASH = (*NO_GROWTH, "routing.mode=hash", "routing.top_k=1")
CLUSTERED_TABLE = (*HASH, "routing.table=clustered")
NOISY = ("routing.mode=noisy_topk",)
VMOE = ("routing.mode=vmoe", "routing.allow_noncausal=true")
NO_REPLAY = ("stage_defaults.replay.fraction=0", "stage_defaults.distill.weight=0")
LABELLED = (*FROZEN, *NO_REPLAY, "routing.bundles=label")
REVIEW = ("stage_defaults.review.fraction=0.2",)
PYTHON = "distributions.python."
PAIRS = (f"{PYTHON}builtin=null", f"{PYTHON}files=p.jsonl", f"{PYTHON}answer_field=a")
FINETUNE = (*NO_GROWTH, *NO_REPLAY, *PAIRS, "stages[1].kind=finetune")
STOPS = (*FINETUNE, "stages[1].finetune.patience=3")

Case = tuple[tuple[str, ...], str, str]
"""What is set in both runs, the key that is changed with its new value, and which of the two stages that touches."""
OF_STAGES = "stage_defaults."


def both(section: str, *changes: str, context: tuple[str, ...] = ()) -> list[Case]:
    return [(context, f"{section}{change}", "12") for change in changes]


def second(section: str, *changes: str, context: tuple[str, ...] = ()) -> list[Case]:
    return [(context, f"{section}{change}", "2") for change in changes]


def none(section: str, *changes: str, context: tuple[str, ...] = ()) -> list[Case]:
    return [(context, f"{section}{change}", "") for change in changes]


MODEL = [
    *both("model.", "layers=3", "width=32", "heads=2", "kv_heads=4", "expert_width=16", "experts=5", "moe_every=2"),
    *both("model.", "activation=gelu", "dense_layers=1", "shared_experts=1", "context=32", "rope_base=100.0"),
    *both("model.", "norm_eps=1e-6", "head_width=8", "qk_norm=head", "attention_softcap=30.0", "embedding_scale=2.0"),
    *both("model.", "attention_bias=true", "qkv_clip=0.5", "window=8", "rope_scaling={factor: 2.0}"),
    *both("model.", "logit_scale=0.5", "sandwich_norms=true", "tie_embeddings=true", "document_mask=true"),
    *both("model.", "init_std=0.1"),
    *both("model.", "shared_mix=learned", context=("model.shared_experts=1",)),
    *both("model.", "dense_width=24", "dense_activation=gelu", context=("model.dense_layers=1",)),
    *none("model.", "dense_width=24", "dense_activation=gelu"),
]
ROUTING = [
    *both("routing.", "mode=hash", "top_k=3", "renormalize=false", "score=sigmoid", "gate_scale=2.0", "jitter=0.1"),
    *both("routing.", "bias_rate=0.1", "capacity={factor: 2.0}", "z_loss=0.1", "balance_loss=0.1"),
    *both("routing.", "balance_counts=first", "balance_scope=sequence"),
    *both("routing.", "expert_groups=2", context=NO_GROWTH),
    *both("routing.", "top_groups=2", context=(*NO_GROWTH, "routing.expert_groups=2")),
    *both("routing.", "competitive=true", context=("routing.mode=dense",)),
    *both("routing.", "table=balanced", context=HASH),
    *both("routing.", "second=all", context=("routing.mode=gshard",)),
    *both("routing.", "importance_loss=0.5", "load_loss=0.5", context=NOISY),
    *both("routing.", "importance_loss=0.5", "load_loss=0.5", "capacity.priority=choice", context=VMOE),
    *both("routing.", "options={x: 1}", context=("routing.mode=my.Router",)),
    *both("routing.", "features=hidden", "feature_width=8", "scale=2.0", "centroids=random", context=CLUSTER),
    *both("routing.", "sample_tokens=999", "level=document", context=(*MASKED, *CLUSTER)),
    *both("routing.", "clusters=1", "chunk_tokens=8", "feature_width=8", "centroids=random", context=DOCUMENTS),
    *both("routing.", "feature_width=8", context=CLUSTERED_TABLE),
    # With one generation of experts there is nothing to tell apart.
    *second("routing.", "bundles=cluster", "bundles=label", context=FROZEN),
    *second("routing.", "margin=1.0", "clusters=2", "chunk_tokens=8", "feature_width=8", context=BUNDLES),
    *second("routing.", "mixture=null", "mixture.likelihood=0.5", "mixture.drop=0.5", context=BUNDLES),
    *second("routing.", "centroids=random", context=BUNDLES),
    *none("routing.", "mixture=null", "mixture.drop=0.5"),
    *second("routing.", "balance_over=active"),
    *none("routing.", "bundles=cluster", context=(*MASKED, "method=sequential")),
    *none("routing.", "bundles=cluster", context=(*MASKED, *NO_GROWTH)),
    *none("routing.", "margin=1.0", "feature_width=8"),
    *none("routing.", "centroids=random", "clusters=2", "chunk_tokens=8", "allow_noncausal=true"),
    *none("routing.", "sample_tokens=999", "scale=2.0", "features=hidden", "margin=1.0", context=DOCUMENTS),
    *none("routing.", "balance_loss=0", "z_loss=0", context=CLUSTER),
    *none("routing.", "renormalize=false", context=(*CLUSTER, "routing.top_k=1")),
    *none("routing.", "balance_scope=sequence", "balance_over=active", context=("routing.balance_loss=0",)),
    *none("routing.", "balance_counts=first", context=("routing.balance_loss=0",)),
    *none("routing.", "balance_over=active", context=NO_GROWTH),
    *none("routing.", "balance_scope=microbatch"),
    *none("routing.", "balance_scope=sequence", context=("routing.capacity={factor: 2.0}",)),
]
OPTIM = [
    *both("stage_defaults.optim.", "lr=0.1", "schedule=constant", "warmup_fraction=0.5", "min_lr_fraction=0.5"),
    *both("stage_defaults.optim.", "batch_tokens=128", "weight_decay=0.5", "beta1=0.5", "beta2=0.5"),
    *both("stage_defaults.optim.", "decay_fraction=0.5", context=("stage_defaults.optim.schedule=wsd",)),
    *second("stage_defaults.optim.", "rewarm=0.5", "router_until=0.5"),
    *none("stage_defaults.optim.", "decay_fraction=0.5"),
    *none("stage_defaults.optim.", "min_lr_fraction=0.5", context=("stage_defaults.optim.schedule=constant",)),
    *none("stage_defaults.optim.", "router_until=0.5", context=CLUSTER),
]
GROW = [
    *second(
        "stage_defaults.grow.", "experts=3", "init=random", "rank=2", "noise=0.5", "router=copy", "sample_tokens=99"
    ),
    *second("stage_defaults.grow.", "layers=[0]", "frozen_weights=int8", "old_lr_scale=0.1"),
    *second("stage_defaults.grow.", "old_until=0.5", context=("stage_defaults.grow.old_lr_scale=0.1",)),
    *none("stage_defaults.grow.", "layers=[0, 1]", "old_until=0.5", "min_share=0.5"),
    *none("stage_defaults.grow.", "noise=0.5", context=("stage_defaults.grow.init=random",)),
    *none("stage_defaults.grow.", "noise=0.5", context=("stage_defaults.grow.rank=2",)),
    *none("stage_defaults.grow.", "rank=0"),
    *none("stage_defaults.grow.", "router=copy", context=CLUSTER),
    *none("stage_defaults.grow.", "experts=3", "init=random", "sample_tokens=99", context=("method=sequential",)),
]
VOCABULARY = [
    *second("stages[1].vocabulary.", "add=5", context=LABELLED),
    *none("stages[1].vocabulary.", "add=0", context=LABELLED),
    *none("stages[1].vocabulary.", "add=5", context=("method=sequential",)),
]
HOLD = [
    *second("stage_defaults.trunk.", "train=frozen", "train=full", "lr_scale=0.5"),
    *second("stage_defaults.trunk.", "rank=2", context=(*BUNDLES, "stage_defaults.trunk.train=deltas")),
    *none("stage_defaults.trunk.", "rank=2"),
    *none("stage_defaults.trunk.", "lr_scale=0.5", context=("stage_defaults.trunk.train=full",)),
    *none("stage_defaults.trunk.", "train=full", context=("stage_defaults.trunk.lr_scale=1.0",)),
    *second("stage_defaults.distill.", "weight=0.5", "temperature=1.0", "text=new", "fraction=0.5", "until=0.5"),
    *second("stages[1].distill.", "student=[0]"),
    *none("stage_defaults.distill.", "temperature=1.0", "text=new", "fraction=0.5", "until=0.5", context=NO_REPLAY),
    *second("stage_defaults.replay.", "fraction=0.5", "source=generated", "buffer_tokens=64"),
    *none("stage_defaults.replay.", "source=generated", "buffer_tokens=64", context=NO_REPLAY),
    *second("stage_defaults.penalty.", "kind=l2", "kind=ewc"),
    *second("stage_defaults.penalty.", "weight=0.5", context=("stage_defaults.penalty.kind=l2",)),
    *second("stage_defaults.penalty.", "fisher_tokens=99", context=("stage_defaults.penalty.kind=ewc",)),
    *none("stage_defaults.penalty.", "weight=0.5", "fisher_tokens=99"),
    *none("stage_defaults.penalty.", "weight=0.1", "fisher_tokens=99", context=("stage_defaults.penalty.kind=l2",)),
    *second("stage_defaults.review.", "fraction=0.2"),
    *second("stage_defaults.review.", "replay_fraction=0.1", "old_loss=0.5", "lr_scale=0.5", context=REVIEW),
    *none("stage_defaults.review.", "replay_fraction=0.1", "old_loss=0.5", "lr_scale=0.5"),
]
FINETUNING = [
    *second("stages[1].finetune.", "trainable=moe", "expert_dropout=0.1", "patience=3", context=FINETUNE),
    *second("stages[1].finetune.", "every_steps=3", "held_out_tokens=99", context=STOPS),
    *none("stages[1].finetune.", "every_steps=3", "held_out_tokens=99", context=FINETUNE),
    *none("stages[1].finetune.", "trainable=moe", "expert_dropout=0.1", "patience=3"),
]
RUN = [
    *both("", "seed=1", "stage_defaults.tokens=704", "trainer.precision=bf16-mixed", "trainer.gradient_clip=0.5"),
    *both("", "trainer.accumulate_grad_batches=2"),
    *second("", "stages[1].average=0.5"),
    *none("", "stages[1].average=0.5", context=("method=sequential",)),
    *second("", "stages[1].name=other", "stages[1].data=english", "stages[1].continues=english"),
    *none("", "run=other", "stage_defaults.tokens=641"),
    *none("", "method=replay", context=(*NO_GROWTH, *NO_REPLAY[1:], "stage_defaults.trunk.train=full")),
    *none("trainer.", "accelerator=cpu", "devices=2", "num_nodes=2", "strategy=ddp", "experts_implementation=readable"),
    *none("trainer.", "expert_parallel=2", context=("trainer.devices=2",)),
    *none("trainer.", "cache_teacher=true", "activation_checkpointing=true", "compile=true", "num_workers=1"),
    *none("trainer.", "log_every_n_steps=1", "enable_progress_bar=false", "deterministic=true", "benchmark=true"),
    *none("trainer.", "detect_anomaly=true", "profiler=simple"),
    *none("trainer.", "callbacks=[{class_path: a.B}]", "logger=[{class_path: a.B, init_args: {c: 1}}]"),
    *none("", "stages[1].max_epochs=99"),
    *none("checkpoint.", "every_steps=1", "keep=1"),
    *none("frozen.", "offload=cpu"),
    *none("evaluate.", "also=[python]", "tokens=9", "batch_tokens=9", "watch=0.5", "keep_heldout=false"),
]  # fmt: skip
CASES = [*MODEL, *ROUTING, *OPTIM, *GROW, *VOCABULARY, *HOLD, *FINETUNING, *RUN]


@pytest.fixture(scope="module")
def keys(make_raw: Callable[..., dict[str, object]]) -> Callable[[tuple[str, ...]], tuple[str, str]]:
    """Keys of both stages of a run with some overrides; the second's as if its parent were always the same."""
    found: dict[tuple[str, ...], tuple[str, str]] = {}

    def call(overrides: tuple[str, ...]) -> tuple[str, str]:
        if overrides not in found:
            raw = OmegaConf.create(make_raw())
            for override in overrides:
                key, _, value = override.partition("=")
                OmegaConf.update(
                    raw, key, OmegaConf.from_dotlist([f"value={value}"])._get_node("value"), force_add=True
                )
            data = DataIdentity({"english": "e", "python": "p"}, TokenizerIdentity({}, "t"), 300, 0)
            one, two = stage_specs(build_config(raw))
            found[overrides] = stage_key(one, None, data), stage_key(two, "parent", data)
        return found[overrides]

    return call


@pytest.mark.parametrize(
    ("context", "change", "touched"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_key_changes_just_where_its_stage_does(
    keys: Callable[[tuple[str, ...]], tuple[str, str]], context: tuple[str, ...], change: str, touched: str
) -> None:
    before, after = keys(context), keys((*context, change))
    assert "".join(str(i + 1) for i in (0, 1) if before[i] != after[i]) == touched


def test_every_key_of_the_configuration_has_a_case() -> None:
    sections: dict[str, type] = {
        "model.": ModelConfig, "optim.": OptimConfig, "grow.": GrowConfig, "vocabulary.": VocabularyConfig,
        "trunk.": TrunkConfig, "distill.": DistillConfig, "replay.": ReplayConfig, "penalty.": PenaltyConfig,
        "review.": ReviewConfig, "finetune.": FinetuneConfig, "trainer.": TrainerConfig,
        "checkpoint.": CheckpointConfig, "frozen.": FrozenConfig, "evaluate.": EvaluateConfig,
    }  # fmt: skip
    wanted = {f"{name}{f.name}" for name, section in sections.items() for f in dataclasses.fields(section)}
    wanted |= {f"routing.{key}" for mode in (*ROUTERS, "a.Router") for key in keys_of(mode)}
    wanted |= {f.name for f in dataclasses.fields(StageConfig)} - {name.rstrip(".") for name in sections}
    changed = {
        change.partition("=")[0].removeprefix("stage_defaults.").removeprefix("stages[1].") for _, change, _ in CASES
    }
    assert wanted - changed == {
        "routing.slots",  # of a mode that no run may have
        "kind",  # text is pretrained on and pairs are fine-tuned on; the data says which
    }
