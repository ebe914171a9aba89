"""Models as folders that transformers, vLLM and others read: weights, ``config.json`` and the tokenizer's files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lifelong_moe.config.parts import document_centroids
from lifelong_moe.interop.checkpoint import tensors_of, written
from lifelong_moe.interop.layout.families import read_family
from lifelong_moe.interop.layout.folder import CONFIG, INDEX, TOKENIZER, WEIGHTS
from lifelong_moe.interop.layout.kept import Kept
from lifelong_moe.interop.layout.tensors import Stored
from lifelong_moe.interop.layout.texts import default_texts, exported_tokenizer
from lifelong_moe.interop.single import config_of, single_architecture, single_tensors
from lifelong_moe.plan.architecture import Architecture

MOST_SHARD_BYTES = 5 * 10**9
"""Bytes of a file of weights, as transformers writes them; a larger model comes in several."""

PAGE = "pick.py"
"""Picks a generation without our package."""


@dataclass(frozen=True)
class Source:
    """A whole model, and what goes out with each of its generations."""

    architecture: Architecture
    tensors: Mapping[str, Tensor]
    """As they are stored."""
    tokenizers: Sequence[str]
    """Text of each vocabulary's ``tokenizer.json``, the oldest first."""
    kept: Kept
    """Of the checkpoint that it was grown from."""


def write_folder(
    source: Source, generation: int | None, folder: Path, most_bytes: int = MOST_SHARD_BYTES
) -> Mapping[str, Any]:
    """Write what the tokens of one generation use as a checkpoint.

    Args:
        source: The model.
        generation: Counted from 0. None is all together, in a model without bundles or with one generation.
        folder: Is there, and empty.
        most_bytes: Of a file of weights, but for a tensor that is larger.

    Returns:
        Its ``config.json``. Numbers are those of the stored tensors where these are of one kind, float32 otherwise.

    Raises:
        ConfigError: No architecture that others read has all of it.
    """
    single = single_architecture(source.architecture, generation)
    ours = single_tensors(source.architecture, source.tensors, generation)
    config = config_of(single, source.kept.config)
    stored = [*tensors_of(single, read_family(config, CONFIG))]
    kinds = {ours[name].dtype for one in stored for name in one.ours}
    dtype = kinds.pop() if len(kinds) == 1 else torch.float32
    config["dtype"] = str(dtype).removeprefix("torch.")
    shards = [*_shards(stored, dtype.itemsize, most_bytes)]
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        # One at a time: no more than one file's copies are in memory.
        save_file({one.name: written(one, ours, dtype) for one in shard}, folder / name, metadata={"format": "pt"})
        places |= {one.name: name for one in shard}
    if len(shards) > 1:
        total = sum(one.numel for one in stored) * dtype.itemsize
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    _write_json(folder / CONFIG, config)
    write_tokenizer(source, generation, config, folder)
    return config


def write_tokenizer(source: Source, generation: int | None, config: Mapping[str, Any], folder: Path) -> None:
    """Write the tokenizer's files, and how to generate: those of the checkpoint, or what follows from the model."""
    tokenizer = source.tokenizers[source.architecture.vocabulary(generation or 0)]
    texts = {TOKENIZER: exported_tokenizer(tokenizer, source.architecture.bos_id)}
    texts |= default_texts(tokenizer, config, source.architecture.bos_id) | source.kept.going_out()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def write_picker(source: Source, folders: Sequence[str], folder: Path) -> bool:
    """Write the page that picks a generation, and what it reads: the choice that the model makes by itself.

    Args:
        source: A model with bundles.
        folders: Of its generations, oldest first.
        folder: Theirs.

    Returns:
        Whether there is anything to pick by: a model whose generations are told apart by label has none.
    """
    routing = source.architecture.routing
    settings: dict[str, Any] = {
        "folders": list(folders),
        "labels": {name: folders[i] for name, i in source.architecture.labels},
    }
    centroids = [source.tensors.get(document_centroids(i)) for i in range(len(folders))]
    # Zeros stand for centroids that are not fitted.
    fitted = [one.float().contiguous() for one in centroids if one is not None and bool(one.any())]
    if fitted:
        settings |= {"chunk_tokens": routing.chunk_tokens, "margin": routing.margin}
        settings |= {"bos_id": source.architecture.bos_id}
        save_file({f"generation_{i}": one for i, one in enumerate(fitted)}, folder / "centroids.safetensors")
        (folder / PAGE).write_bytes(resources.files("lifelong_moe.data.tokens").joinpath(PAGE).read_bytes())
    _write_json(folder / "generations.json", settings)
    return bool(fitted)


def _shards(stored: list[Stored], itemsize: int, most_bytes: int) -> Iterator[list[Stored]]:
    shard: list[Stored] = []
    held = 0
    for one in stored:
        if shard and held + one.numel * itemsize > most_bytes:
            yield shard
            shard, held = [], 0
        shard.append(one)
        held += one.numel * itemsize
    yield shard


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
