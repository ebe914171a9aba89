"""Every mode against every key of ``routing``: a value that a run may have changes what is computed or learned, or it
is refused. What it changes is looked for in outputs, gradients and state, not in the configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from lifelong_moe.config.methods import without_written_text
from lifelong_moe.config.routing.base import RoutingConfig
from lifelong_moe.config.routing.modes import FOR_ENCODERS, ROUTERS, keys_of, settings_of
from lifelong_moe.config.routing.switching import drop_foreign_keys
from lifelong_moe.config.rules import require_consistent
from lifelong_moe.config.run import RunConfig
from lifelong_moe.config.sections import section
from lifelong_moe.config.yaml_file import apply_override
from lifelong_moe.errors import ConfigError
from lifelong_moe.growth.clusters import fit_clusters
from lifelong_moe.model.next_token import Prompts, texts_of
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel, initialize
from lifelong_moe.plan.architecture import Architecture, Generation, first_generation

MODES = [mode for mode in ROUTERS if mode not in FOR_ENCODERS]
KEYS = {key for mode in (*ROUTERS, "a.Router") for key in keys_of(mode)} - {"mode"}
VOCAB, LENGTH, ROWS, EXPERTS, GROWN = 61, 16, 6, 12, 6
WHOLE = (
    f"model.experts={EXPERTS}", f"model.context={LENGTH}", "model.init_std=0.3", "model.document_mask=true",
    "model.layers=1", "stage_defaults.grow.experts=0", "stage_defaults.optim.batch_tokens=16",
)  # fmt: skip
BALANCED, BUNDLES = ("balance_loss=1.0",), ("bundles=cluster", "chunk_tokens=4")
DOCUMENTS, TABLE = ("level=document", "chunk_tokens=4"), ("top_k=1", "renormalize=false", "table=clustered")
NOTHING: tuple[str, ...] = ()
VALUES: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "top_k": [("3", NOTHING), ("6", NOTHING), ("7", NOTHING), ("2", NOTHING)],
    "renormalize": [("false", NOTHING), ("true", NOTHING)],
    "score": [("sigmoid", NOTHING)],
    "gate_scale": [("2.0", NOTHING)],
    "bias_rate": [("0.1", NOTHING)],
    "expert_groups": [("4", NOTHING), ("2", NOTHING)],
    "top_groups": [("2", ("expert_groups=4",)), ("3", ("expert_groups=3", "top_k=6")), ("2", ("expert_groups=2",))],
    "jitter": [("0.2", NOTHING)],
    "competitive": [("true", NOTHING)],
    "table": [("balanced", ("top_k=1", "renormalize=false")), ("clustered", ("top_k=1", "renormalize=false"))],
    "slots": [("2", NOTHING)],
    "second": [("all", NOTHING), ("threshold", NOTHING)],
    "capacity": [("{factor: 0.4, eval_factor: 0.4, least: 1, multiple: 1}", NOTHING)],
    "balance_loss": [("1.0", NOTHING)],
    "balance_counts": [("first", BALANCED), ("all", BALANCED)],
    "balance_scope": [("sequence", BALANCED), ("global_batch", BALANCED)],
    "importance_loss": [("1.0", NOTHING)],
    "load_loss": [("1.0", NOTHING)],
    "balance_over": [("active", BALANCED)],
    "z_loss": [("1.0", NOTHING)],
    "bundles": [("label", NOTHING), ("cluster", NOTHING)],
    "mixture": [("null", BUNDLES), ("{likelihood: 0.5, drop: 0.5}", BUNDLES)],
    "margin": [("400.0", BUNDLES)],
    "level": [("document", ("chunk_tokens=4",))],
    "features": [("hidden", NOTHING)],
    "feature_width": [("1", NOTHING), ("1", BUNDLES), ("1", TABLE)],
    "scale": [("1.0", NOTHING)],
    "centroids": [("random", NOTHING), ("random", BUNDLES)],
    "clusters": [("2", DOCUMENTS), ("2", BUNDLES)],
    "chunk_tokens": [("2", DOCUMENTS), ("2", BUNDLES)],
    "sample_tokens": [("40", NOTHING), ("40", TABLE)],
    "options": [("{x: 1}", NOTHING)],
}
"""Of each key values that a mode may not have by itself, and what has to be set for the key to have something to do."""

Make = Callable[..., RunConfig]
Build = Callable[..., RunConfig | str]


@pytest.fixture(scope="module")
def build(make_run: Make) -> Callable[..., RunConfig | str]:
    """The run with a mode and keys of ``routing``, or why there is none."""
    whole, known = make_run(*WHOLE), dict[tuple[str, ...], RunConfig | str]()

    def call(mode: str, *keys: str) -> RunConfig | str:
        allowed = ("allow_noncausal=true",) if mode in ("base", "expert_choice", "vmoe") else ()
        written = (f"mode={mode}", *allowed, *keys)
        if written not in known:
            node = OmegaConf.create()
            for one in written:
                apply_override(node, one)
            try:
                routing = section(settings_of(mode), drop_foreign_keys(node), "routing")
                without_written_text(routing, is_stored=False)
                routing.require_gate_gradient()
                made = dataclasses.replace(whole, routing=routing)
                require_consistent(made)
                known[written] = made
            except ConfigError as error:
                known[written] = str(error)
        return known[written]

    return call


def document(seed: int, length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """BOS and tokens of one of two kinds."""
    low = 1 if seed % 2 else 30
    return np.append(0, np.random.default_rng(seed).integers(low, low + 30, length - 1))


def domains_of(model: LanguageModel, rows: list[np.ndarray[Any, np.dtype[np.int64]]]) -> Tensor:
    """As the data gives them: by clusters of text, or by label."""
    if model.document_clusters is not None:
        return torch.from_numpy(np.stack([model.document_clusters.domain_ids(row) for row in rows]))
    return (torch.arange(len(rows)) % 2).unsqueeze(1).expand(-1, LENGTH)


def grown(routing: RoutingConfig, config: RunConfig, generations: int) -> LanguageModel:
    """A model of fixed weights, its clusters fitted generation by generation."""
    made = Architecture(config.model, routing, VOCAB, 0, (first_generation("s0", config.model),))
    model = LanguageModel(made)
    initialize(model, 0)
    documents = [document(seed, 40) for seed in range(20)]
    blocks = torch.from_numpy(np.stack([document(seed, LENGTH) for seed in range(8)]))
    for generation in range(generations):
        if generation:
            model.add_generation(Generation("s1", GROWN))
            model.architecture = made.grown(Generation("s1", GROWN))
            initialize(model, 0)
        sample = {
            "token_ids": blocks,
            "document_ids": torch.zeros_like(blocks),
            "domain_ids": torch.zeros_like(blocks),
            "mask": torch.ones_like(blocks, dtype=torch.bool),
        }
        kind = documents[generation::2] if generations > 1 else documents
        if routing.is_clustered:
            fit_clusters(model, kind, kind, sample, generation)
    return model


def answers(config: RunConfig, generations: int) -> list[Tensor]:
    """Outputs and gradients of a training step of two micro-batches, state after it, and outputs in evaluation."""
    model, found = grown(config.routing, config, generations), []
    rows = [document(seed, LENGTH) for seed in range(ROWS)]
    ids, domains = torch.from_numpy(np.stack(rows)), domains_of(model, rows)
    torch.manual_seed(0)
    model.train()
    for part in (slice(0, ROWS // 2), slice(ROWS // 2, ROWS)):
        output = model(TokenBatch(ids[part], document_ids_BS=torch.zeros_like(ids[part]), domain_ids_BS=domains[part]))
        hidden, target = output.hidden_BSD[:, :-1].flatten(0, 1), ids[part, 1:].flatten()
        loss = model.head.cross_entropy(hidden, target, domains[part, 1:].flatten())
        for routing in output.routings:
            loss = loss + sum(one.coefficient * one.value for one in routing.losses.values())
        loss.backward()
        found.append(output.hidden_BSD)
    for layer in model.moe_layers():
        layer.router.end_step(True)
    found += [p.grad for p in model.parameters() if p.grad is not None]
    found += [buffer for _, buffer in sorted(model.named_buffers()) if buffer.is_floating_point()]
    model.eval()
    with torch.no_grad():  # by all generations of a mixture
        prompts = Prompts([row.tolist() for row in rows])
        found.append(texts_of(model, prompts, LENGTH + 1).next_logits(np.stack(rows)).softmax(dim=-1))
    return [*found, model(TokenBatch(ids, document_ids_BS=torch.zeros_like(ids), domain_ids_BS=domains)).hidden_BSD]


ANSWERS: dict[str, list[Tensor]] = {}
"""Of what was asked already."""


def differ(one: RunConfig, other: RunConfig) -> bool:
    """By more than rounding."""
    fixed = one.routing.fixed_by or other.routing.fixed_by
    generations, pairs = 1 if fixed else 2, []
    for config in (one, other):
        key = f"{config.routing} {generations}"
        if key not in ANSWERS:
            ANSWERS[key] = answers(config, generations)
        pairs.append(ANSWERS[key])
    return len(pairs[0]) != len(pairs[1]) or any(
        a.shape != b.shape or not torch.allclose(a, b, rtol=1e-4, atol=1e-9) for a, b in zip(*pairs, strict=True)
    )


def test_no_key_is_left_out() -> None:
    assert set(VALUES) | {"allow_noncausal"} == KEYS


@pytest.mark.parametrize("key", VALUES)
@pytest.mark.parametrize("mode", MODES)
def test_a_value_changes_something_or_is_refused(mode: str, key: str, build: Build) -> None:
    plain, accepted, effective = build(mode), False, False
    assert isinstance(plain, RunConfig)
    for value, context in VALUES[key]:
        alone = build(mode, f"{key}={value}")
        accepted |= isinstance(alone, RunConfig) and alone.routing != plain.routing
        before, after = build(mode, *context), build(mode, *context, f"{key}={value}")
        if isinstance(before, str) or (isinstance(after, RunConfig) and after.routing == before.routing):
            continue
        if isinstance(after, str):
            assert f"routing.{key}" in after or "routing.top_k" in after, after
            continue
        if key == "balance_scope" and after.routing.capacity is not None:
            assert value == "sequence"  # what capacity implies may be said again
            return
        changes = differ(before, after)
        assert changes or not context, f"{key}={value} is accepted and does nothing"
        effective |= changes
    assert effective or not accepted, f"{key} is accepted and does nothing"


@pytest.mark.parametrize("mode", MODES)
def test_a_permission_is_for_modes_that_may_need_it(mode: str, build: Build) -> None:
    permitted = build(mode, "allow_noncausal=true")
    contexts = [(), ("capacity={priority: choice}",)]
    needed = any(
        isinstance(build(mode, "allow_noncausal=false", *context), str)
        and isinstance(build(mode, "allow_noncausal=true", *context), RunConfig)
        for context in contexts
    )
    assert isinstance(permitted, RunConfig) == needed


def test_what_is_as_true_of_any_mode_may_stand(build: Build) -> None:
    """A coefficient of 0, and that one fixed weight is not divided: so one key leads from one mode to another."""
    for mode in MODES:
        assert isinstance(build(mode, "balance_loss=0", "z_loss=0"), RunConfig)
    for mode in ("hash", "label", "cluster"):
        assert isinstance(build(mode, "top_k=1", "renormalize=false"), RunConfig)


def test_a_refusal_names_the_modes_that_have_the_key(build: Build) -> None:
    assert build("hash", "gate_scale=2.5") == (
        "routing.gate_scale is for routing.mode=learned or switch or gshard, not for hash. Leave it out."
    )
    assert "learned or gshard, not for hierarchical" in str(build("hierarchical", "renormalize=true"))
    assert "learned or cluster, not for hash" in str(build("hash", "clusters=3"))
