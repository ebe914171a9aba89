"""What training holds at once, at least; numbers by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lifelong_moe.config.run import RunConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.ops import losses
from lifelong_moe.plan import memory
from lifelong_moe.plan.cost import count_parameters
from lifelong_moe.plan.memory import LOADER_BYTES, MemoryNeed, machine_bytes, memory_needs, require_memory
from lifelong_moe.plan.methods import stage_specs

MakeRun = Callable[..., RunConfig]


def needs(config: RunConfig) -> list[MemoryNeed]:
    return [need for _, need in memory_needs(config)]


def test_a_first_stage_by_hand(make_run: MakeRun) -> None:
    """Two layers of width 16: 4 heads of 4 and 2 for keys and values, experts of width 8; 64 tokens a step."""
    config = make_run("tokenizer.vocab_size=300")
    parameters = count_parameters(stage_specs(config)[0].architecture(None, 300, 0)).total
    need = needs(config)[0]
    assert (need.weights, need.training) == (4 * parameters, 3 * 4 * parameters)
    assert need.activations == 4 * 64 * 2 * (4 * 16 + 4 * (2 * 4 + 2 * 2) + config.routing.top_k * (2 * 16 + 3 * 8))
    assert need.logits == 2 * 4 * 64 * 300 and (need.text, need.loaders) == (0, 0)
    assert need.total == need.weights + need.training + need.activations + need.logits


def test_precision_micro_batches_and_processes(make_run: MakeRun) -> None:
    plain = needs(make_run())[0]
    half = needs(make_run("trainer.precision=bf16-true"))[0]
    assert (half.weights, half.training) == (plain.weights // 2, plain.training // 2)
    assert needs(make_run("trainer.precision=auto"))[0] == plain  # as on a CPU, which is the most
    assert 2 * needs(make_run("trainer.precision=bf16-mixed"))[0].activations == plain.activations
    assert 2 * needs(make_run("trainer.accumulate_grad_batches=2"))[0].activations == plain.activations
    two = needs(make_run("trainer.devices=2", "trainer.num_workers=3"))[0]
    assert (two.training, two.activations) == (2 * plain.training, plain.activations)
    assert two.loaders == 6 * LOADER_BYTES
    sharded = needs(make_run("trainer.devices=2", "trainer.strategy=fsdp"))[0]
    assert (sharded.weights, sharded.training) == (plain.weights, plain.training)
    experts = 2 * 4 * 3 * 16 * 8  # two layers of four
    spread = needs(make_run("trainer.devices=2", "trainer.expert_parallel=2"))[0]
    assert two.training - spread.training == 3 * 4 * experts
    both = needs(make_run("trainer.devices=2", "trainer.expert_parallel=2", "trainer.strategy=fsdp"))[0]
    assert both.training == plain.training
    again = needs(make_run("trainer.activation_checkpointing=true"))[0]
    assert again.activations == 4 * 64 * 2 * 16


def test_frozen_weights_are_neither_trained_nor_copied(make_run: MakeRun) -> None:
    frozen = ("stage_defaults.trunk.train=frozen", "routing.bundles=none")
    first, second = needs(make_run(*frozen))
    new = 2 * (2 * 3 * 16 * 8 + 2 * 16)  # two layers: two experts and their rows of the router
    assert second.training == 3 * 4 * new and second.weights == first.weights + 4 * new
    eighth = needs(make_run(*frozen, "stage_defaults.grow.frozen_weights=int8"))[1]
    assert eighth.weights == first.weights // 4 + 4 * new
    half = needs(make_run(*frozen, "stage_defaults.grow.frozen_weights=half"))[1]
    assert half.weights == first.weights // 2 + 4 * new
    # Below the only layer that grows nothing is kept for a backward pass.
    upper = needs(make_run(*frozen, "stage_defaults.grow.layers=[1]"))[1]
    assert 2 * upper.activations == second.activations
    # Low-rank experts do not keep hidden units, of which there are 8 a token and expert.
    low = needs(make_run(*frozen, "stage_defaults.grow.rank=2", "routing.top_k=2"))[1]
    whole = needs(make_run(*frozen, "routing.top_k=2"))[1]
    assert whole.activations - low.activations == 4 * 64 * 2 * 2 * 8


def test_text_that_the_model_writes_is_counted(make_run: MakeRun) -> None:
    need = needs(make_run("stage_defaults.replay={fraction: 0.5, source: generated}"))[1]
    assert need.text == 8 * 320


def test_what_this_machine_cannot_hold_is_refused(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_run("trainer.accelerator=cpu")
    most = max(need.total for need in needs(config))
    monkeypatch.setattr(memory, "machine_bytes", lambda: most)
    require_memory(config)
    monkeypatch.setattr(memory, "machine_bytes", lambda: most - 1)
    with pytest.raises(ConfigError, match=r"^stage \w+ needs at least 0\.\d GB of memory, .* Set \S+"):
        require_memory(config)
    # On an accelerator with memory of its own, weights alone are compared.
    require_memory(make_run("trainer.accelerator=gpu"))
    monkeypatch.setattr(memory, "machine_bytes", lambda: 1)
    with pytest.raises(ConfigError, match="needs at least"):
        require_memory(make_run("trainer.accelerator=gpu"))


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("model.experts=4000", "model.experts, model.expert_width or grow.experts lower"),
        ("tokenizer.vocab_size=100000", "tokenizer.vocab_size or model.width lower"),
        ("trainer.num_workers=9", "trainer.num_workers lower"),
        ("model.head_width=2000", "model.width or model.layers lower"),
        (
            "stage_defaults.optim={batch_tokens: 64000}",
            "optim.batch_tokens lower, or trainer.accumulate_grad_batches higher",
        ),
    ],
)
def test_the_remedy_is_the_largest_part(make_run: MakeRun, override: str, remedy: str) -> None:
    assert needs(make_run(override, "stage_defaults.tokens=64000"))[0].remedy == remedy


def test_low_rank_changes_are_named(make_run: MakeRun) -> None:
    overrides = ("routing.bundles=label", "model.document_mask=true", "stage_defaults.trunk={train: deltas, rank: 999}")
    assert needs(make_run(*overrides))[1].remedy == "trunk.rank lower"


def test_a_container_s_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = machine_bytes()
    for text, expected in (("max\n", whole), (f"{2**63}\n", whole), ("4096\n", 4096)):
        limit = tmp_path / "memory.max"
        limit.write_text(text)
        monkeypatch.setattr(memory, "_CGROUPS", (limit, tmp_path / "nowhere"))
        assert machine_bytes() == expected


def test_chunks_are_those_of_the_loss() -> None:
    expected = {1: 1024, 16_384: 1024, 49_152: 341, 1 << 30: 1}
    assert {vocabulary: losses.chunk_tokens(vocabulary) for vocabulary in expected} == expected
    assert {vocabulary: memory.chunk_tokens(vocabulary) for vocabulary in expected} == expected
