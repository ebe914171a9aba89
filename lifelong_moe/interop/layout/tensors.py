"""Names and shapes of a checkpoint's tensors, and what of ours each is: one table to read and to write by.

Torch-free.

Legend: V vocabulary, D model width, E experts, F expert width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lifelong_moe.config.model import ModelConfig, QKNorm
from lifelong_moe.config.parts import expert_tensor, router_rows
from lifelong_moe.errors import CheckpointError
from lifelong_moe.interop.layout.families import Family


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint."""

    name: str
    """On disk."""
    shape: tuple[int, ...]
    ours: tuple[str, ...]
    """Names in our state dictionary: one; or experts, stacked; or none, of what is zeros."""
    half: int | None = None
    """Which half of our rows it is, 0 or 1; None is all. Ours hold gate and up matrices as one, gate first."""
    stacked: bool = False
    """Whether the first dimension counts experts, each of which is a tensor of ours."""

    @property
    def numel(self) -> int:
        """Its numbers."""
        return math.prod(self.shape)


def stored_tensors(
    family: Family, model: ModelConfig, experts: Sequence[int], *, fused: bool = False
) -> Iterator[Stored]:
    """All tensors of a checkpoint, which is a model of one generation here.

    Args:
        family: Its architecture, for names.
        model: Its shape.
        experts: Experts of each layer; 0 for a dense one, 1 in all layers of a dense model.
        fused: Whether a layer's experts are two tensors of three dimensions, as in transformers' memory; if not, they
            have three matrices each, as on its disks.
    """
    table = (family.vocab_size, model.width)
    yield Stored("model.embed_tokens.weight", table, ("embedding.weight",))
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}"
        yield from _attention(model, f"{prefix}.self_attn", f"blocks.{layer}.attention")
        for theirs, ours in (("input_layernorm", "attention_norm"), ("post_attention_layernorm", "moe_norm")):
            yield Stored(f"{prefix}.{theirs}.weight", (model.width,), (f"blocks.{layer}.{ours}.weight",))
        if family.is_mixture and experts[layer]:
            network = f"{prefix}.{'mlp' if fused else family.network}"
            yield Stored(f"{network}.gate.weight", (experts[layer], model.width), (router_rows(layer, 0),))
            yield from _experts(family, model, f"{network}.experts", layer, range(experts[layer]), fused=fused)
            if (unused := family.unused_width) is not None:
                shape = (unused, model.width)
                for one in _network(f"{network}.shared_expert", ("", ""), family.matrices, shape):
                    yield Stored(one.name, one.shape, ())
                yield Stored(f"{network}.shared_expert_gate.weight", (1, model.width), ())
        else:
            shared = f"blocks.{layer}.moe.shared.gate_up", f"blocks.{layer}.moe.shared.down"
            inner, width = shared, model.dense_width or 0  # a family that has dense layers says how wide they are
            if experts[layer]:
                inner, width = _matrices_of(layer, 0), model.expert_width
            yield from _network(f"{prefix}.mlp", inner, family.matrices, (width, model.width))
    yield Stored("model.norm.weight", (model.width,), ("norm.weight",))
    if not model.tie_embeddings:
        yield Stored("lm_head.weight", table, ("head.weight",))


def _matrices_of(layer: int, expert: int) -> tuple[str, str]:
    return expert_tensor(layer, expert, "gate_up"), expert_tensor(layer, expert, "down")


def _attention(model: ModelConfig, theirs: str, ours: str) -> Iterator[Stored]:
    wide, narrow = (heads * model.attention_width for heads in (model.heads, model.kv_heads))
    for name, rows in (("query", wide), ("key", narrow), ("value", narrow)):
        projection = f"{theirs}.{name[0]}_proj"
        yield Stored(f"{projection}.weight", (rows, model.width), (f"{ours}.{name}.weight",))
        if model.attention_bias:
            yield Stored(f"{projection}.bias", (rows,), (f"{ours}.{name}.bias",))
    yield Stored(f"{theirs}.o_proj.weight", (model.width, wide), (f"{ours}.output.weight",))
    if model.qk_norm != QKNorm.none:
        widths = (wide, narrow) if model.qk_norm == QKNorm.full else (model.attention_width,) * 2
        for name, width in zip(("query", "key"), widths, strict=True):
            yield Stored(f"{theirs}.{name[0]}_norm.weight", (width,), (f"{ours}.{name}_norm.weight",))


def _network(
    theirs: str, ours: tuple[str, str], matrices: tuple[str, str, str], shape: tuple[int, int]
) -> Iterator[Stored]:
    """Gate, up and down matrices of one feed-forward network; ``shape`` is ``(F, D)``."""
    gate, up, down = matrices
    yield Stored(f"{theirs}.{gate}.weight", shape, ours[:1], half=0)
    yield Stored(f"{theirs}.{up}.weight", shape, ours[:1], half=1)
    yield Stored(f"{theirs}.{down}.weight", shape[::-1], ours[1:])


def _experts(
    family: Family, model: ModelConfig, theirs: str, layer: int, experts: range, *, fused: bool
) -> Iterator[Stored]:
    """Three matrices of each expert; or fused, gates and ups ``(E, 2 F, D)``, gate first, and downs ``(E, D, F)``."""
    born = [_matrices_of(layer, expert) for expert in experts]
    shape = model.expert_width, model.width
    if not fused:
        for expert, ours in zip(experts, born, strict=True):
            yield from _network(f"{theirs}.{expert}", ours, family.matrices, shape)
        return
    into, down = zip(*born, strict=True)
    yield Stored(f"{theirs}.gate_up_proj", (len(born), 2 * model.expert_width, model.width), into, stacked=True)
    yield Stored(f"{theirs}.down_proj", (len(born), *shape[::-1]), down, stacked=True)


def has_fused_experts(names: Iterable[str]) -> bool:
    """Whether a checkpoint with these tensors has a layer's experts in two tensors."""
    return any(name.endswith(".mlp.experts.gate_up_proj") for name in names)


def matched(
    expected: Iterable[Stored], found: Mapping[str, tuple[int, ...]], model: ModelConfig, source: str
) -> list[Stored]:
    """The expected tensors, each of which a checkpoint must have in its shape, and no other.

    Rotary frequencies, which early files of Llama hold, and a tied head stored beside the embedding may be there.

    Args:
        expected: Asked for one by one: what a hostile config asks for ends with the first that the files lack.
        found: Shapes of the checkpoint's tensors.
        model: Its shape.
        source: What messages call it.

    Raises:
        CheckpointError: With the name of a tensor.
    """
    there = []
    for one in expected:
        if one.name not in found:
            raise CheckpointError(f"{source}: {one.name} is missing.")
        if found[one.name] != one.shape:
            raise CheckpointError(f"{source}: {one.name} has shape {found[one.name]}, its config asks for {one.shape}.")
        there.append(one)
    if extra := sorted(found.keys() - {one.name for one in there}):
        for name in extra:
            # The embedding is the first.
            is_copy = name == "lm_head.weight" and model.tie_embeddings and found[name] == there[0].shape
            if not is_copy and not name.endswith(".rotary_emb.inv_freq"):
                raise CheckpointError(f"{source}: {name} is no tensor of a model with its config.")
    return there
