"""What is timed: our training step, and transformers' from the same weights on the same batches.

On a GPU, where there is one, weights, gradients and optimizer state are in bfloat16 on both sides; else in float32.

Ours is the step as a stage takes it, loss, router losses, clipping and guard included; only the loop around it is not
Lightning's, and what that costs is measured apart (``overhead``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from lifelong_moe.config.load import build_config
from lifelong_moe.config.model import ModelConfig
from lifelong_moe.config.retention import DistillConfig, ReplayConfig
from lifelong_moe.config.routing.topk import LearnedConfig
from lifelong_moe.interop.checkpoint import to_checkpoint
from lifelong_moe.model.transformer import LanguageModel, initialize
from lifelong_moe.plan.architecture import Architecture, Generation
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.training.loop.module import StageModule
from lifelong_moe.training.loop.shares import with_shares

Step = Callable[[], float]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
BATCHES = 4
"""Distinct batches that steps take in turn."""


@dataclass(frozen=True)
class Size:
    """One model and its batch; by default a CPU's reference."""

    experts: int = 8
    layers: int = 4
    width: int = 256
    expert_width: int = 512
    top_k: int = 2
    vocab: int = 8192
    context: int = 256
    sequences: int = 16

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.context * self.sequences

    def model_config(self) -> ModelConfig:
        """The shape; heads of 64."""
        heads = self.width // 64
        return ModelConfig(
            layers=self.layers, width=self.width, heads=heads, kv_heads=max(1, heads // 2),
            expert_width=self.expert_width, experts=self.experts, context=self.context,
        )  # fmt: skip

    def architecture(self, generations: tuple[int, ...] = (), frozen: int = 0) -> Architecture:
        """With ``generations`` experts were born in stages, of which so many are frozen; else all train."""
        born = tuple(Generation(f"stage-{i}", num) for i, num in enumerate(generations or (self.experts,)))
        return Architecture(self.model_config(), LearnedConfig(top_k=self.top_k), self.vocab, 0, born, frozen)

    def model(self, generations: tuple[int, ...] = (), frozen: int = 0) -> LanguageModel:
        """Our model, initialized."""
        model = LanguageModel(self.architecture(generations, frozen))
        initialize(model, seed=0)
        return model

    def flops(self) -> float:
        """Of a training step's matrix products: three times the forward pass's, attention causal."""
        head_width, heads = 64, self.width // 64
        kv_heads = max(1, heads // 2)
        projections = 2 * self.tokens * self.width * head_width * (2 * heads + 2 * kv_heads)
        core = 2 * 2 * self.tokens * self.context * head_width * heads // 2
        experts = 2 * self.tokens * (self.top_k * 3 * self.width * self.expert_width + self.width * self.experts)
        return 3 * (self.layers * (projections + core + experts) + 2 * self.tokens * self.width * self.vocab)


REFERENCE = Size()
"""The model and the batch of what is not measured over several sizes."""
if DEVICE == "cuda":
    REFERENCE = Size(layers=4, width=2048, expert_width=1536, vocab=32_768, context=2048, sequences=8)


def stage_spec(size: Size) -> StageSpec:
    """A first stage's settings as a user gets them."""
    raw = {
        "run": "bench",
        "distributions": {"text": {"builtin": "english_docs"}},
        "stages": [{"data": "text", "tokens": 1000 * size.tokens}],
        "stage_defaults": {"optim": {"batch_tokens": size.tokens}},
        "model": {"context": size.context},
    }
    spec = stage_specs(build_config(OmegaConf.create(raw)))[0]
    return replace(spec, model=size.model_config(), routing=LearnedConfig(top_k=size.top_k))


def batches(size: Size, replayed: int = 0) -> list[dict[str, Tensor]]:
    """Blocks of random tokens, as the data module makes them; the first ``replayed`` of each batch are old text."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(BATCHES):
        ids = torch.randint(1, size.vocab, (size.sequences, size.context + 1), generator=generator)
        zeros = torch.zeros(size.sequences, size.context, dtype=torch.int64)
        found.append(
            {
                "token_ids": ids[:, :-1].contiguous(),
                "target_ids": ids[:, 1:].contiguous(),
                "document_ids": zeros,
                "domain_ids": zeros,
                "teacher_domain_ids": zeros,
                "mask": torch.ones_like(zeros, dtype=torch.bool),
                "scored": torch.ones_like(zeros, dtype=torch.bool),
                "replayed": torch.arange(size.sequences) < replayed,
                "ordinal": torch.arange(size.sequences),
            }
        )
    return found


def our_step(
    size: Size,
    *,
    model: LanguageModel | None = None,
    teacher: LanguageModel | None = None,
    distill: DistillConfig | None = None,
    replayed: int = 0,
) -> Step:
    """Our training step; returns its loss."""
    model = (size.model() if model is None else model).to(DEVICE, DTYPE).train()
    if teacher is not None:
        teacher.to(DEVICE, DTYPE)
    spec = replace(stage_spec(size), distill=distill, replay=ReplayConfig(fraction=replayed / size.sequences))
    module = StageModule(model, spec, spec.phases()[0], teacher)
    optimizer = module.configure_optimizers()["optimizer"]
    data = [with_shares(batch, spec) for batch in batches(size, replayed)]  # as the data module, on the CPU
    data = [{k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in data]
    number = 0

    def step() -> float:
        nonlocal number
        result = module.training_step(data[number % BATCHES], number)
        number += 1
        result["loss"].backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        return float(result["parts"]["loss"])

    return step


def peer_step(size: Size, implementation: str) -> Step:
    """Transformers' ``MixtralForCausalLM`` with our weights, its router loss, clipping and fused AdamW."""
    import transformers

    config, tensors = to_checkpoint(size.model())
    config = {**config, "output_router_logits": True, "use_cache": False}
    model = transformers.MixtralForCausalLM._from_config(
        transformers.MixtralConfig(**config), experts_implementation=implementation, attn_implementation="sdpa"
    )
    if model.config._experts_implementation != implementation:
        raise RuntimeError(f"transformers does not have experts_implementation={implementation}")
    load_mixtral(model, tensors)
    model = model.to(DEVICE, DTYPE).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    data = [(batch["token_ids"].to(DEVICE), batch["target_ids"].to(DEVICE)) for batch in batches(size)]
    number = 0

    def step() -> float:
        nonlocal number
        ids, targets = data[number % BATCHES]
        number += 1
        loss = model(input_ids=ids, labels=ids, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def load_mixtral(model: Any, tensors: dict[str, Tensor]) -> None:
    """Our exported weights into a model in memory, where a layer's experts are fused."""
    state = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{layer}.block_sparse_moe.experts"
        experts = range(model.config.num_local_experts)
        gate_up = [torch.cat([tensors[f"{prefix}.{e}.w1.weight"], tensors[f"{prefix}.{e}.w3.weight"]]) for e in experts]
        state[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        down = [tensors[f"{prefix}.{e}.w2.weight"] for e in experts]
        state[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(down)
        state[f"model.layers.{layer}.mlp.gate.weight"] = state.pop(f"model.layers.{layer}.block_sparse_moe.gate.weight")
    model.load_state_dict(state, strict=True)
