"""A GGUF file of a Llama as a folder in Hugging Face's layout, which ``model.from`` takes.

Torch-free; the package ``gguf``, an extra, dequantizes.

Source:
    llama.cpp's ``convert_hf_to_gguf.py``, whose inverse this is; transformers' ``integrations/ggml.py`` reads the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from lifelong_moe.errors import CheckpointError, ConfigError
from lifelong_moe.interop.layout.folder import (
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
    read_checkpoint,
)
from lifelong_moe.interop.layout.gguf import Block, Gguf, read_gguf
from lifelong_moe.interop.layout.kept import CARD, TEMPLATE
from lifelong_moe.interop.layout.texts import exported_tokenizer
from lifelong_moe.storage.directories import new_directory

ARCHITECTURE = "llama"
DTYPE = np.float16
"""Of the numbers written. A quantized one is a scale in float16 times a small whole number, at times plus an offset in
float16, so float16 keeps 11 of its bits, bfloat16 would keep 8, and float32 would take twice the space."""
SHAPE = {
    "vocab_size": None,
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": None,
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.dimension_count": None,
    "rope.freq_base": "rope_theta",
}
"""Keys after ``llama.``, and what ``config.json`` calls them; None is checked and left out."""
TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROTATED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
"""Matrices whose rows llama.cpp reorders, and the number of their heads."""
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS: Mapping[str, Any] = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
}
"""How text is cut before merging, by ``tokenizer.ggml.pre``."""
_CONTROL, _USER_DEFINED = 3, 4
_FLOATS = ("rms_norm_eps", "rope_theta")
_NAME = re.compile(r"(blk\.(?P<layer>\d+)\.)?(?P<kind>\w+)\.weight")


def convert_gguf(source: Path, target: Path) -> None:
    """Write a GGUF file as ``config.json``, ``model.safetensors``, ``tokenizer.json`` and the small files beside them.

    The folder is there whole or not at all, and was read back as ``model.from`` reads it.

    Args:
        source: A Llama, quantized or not, with its tokenizer.
        target: Is not there yet.

    Raises:
        ConfigError: The file asks for something that we cannot express, or ``gguf`` is not installed.
        CheckpointError: The file is damaged, or lacks something.
    """
    file = read_gguf(source)
    config = _config(file)
    texts = _texts(file, config)
    tensors = dict(_tensors(file, config))
    with new_directory(target) as work:
        save_file(tensors, work / WEIGHTS, metadata={"format": "pt"})
        for name, text in texts.items():
            (work / name).write_text(text, encoding="utf-8")
        try:
            read_checkpoint(work)
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {str(error).replace(f'{work}/', '')}") from None


def _config(file: Gguf) -> Mapping[str, Any]:
    kind = file.keys.get("general.architecture")
    if kind != ARCHITECTURE:
        raise ConfigError(f"{file.path}: general.architecture={kind} is not supported; there is {ARCHITECTURE}.")
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    for name, value in file.keys.items():
        prefix, _, key = name.partition(".")
        if prefix != ARCHITECTURE:
            continue
        if key not in SHAPE:
            raise ConfigError(f"{file.path}: {name}={value} is nothing that we can express.")
        if theirs := SHAPE[key]:
            config[theirs] = value
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
        if type(config.get(name)) is not int or config[name] < 1:
            raise CheckpointError(f"{file.path}: has no {name}, or it is no number.")
    width = config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := file.keys.get(f"{ARCHITECTURE}.{key}", width)) != width:
            raise ConfigError(f"{file.path}: {ARCHITECTURE}.{key}={found} must be the width of a head, {width}.")
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    # A float32 in the file, and a short decimal in the model that it was made of.
    config |= {key: float(np.format_float_positional(np.float32(config[key]))) for key in _FLOATS if key in config}
    config |= {"vocab_size": _embedding(file).shape[0], "tie_word_embeddings": "output.weight" not in file.tensors}
    return config | _special_ids(file) | {"torch_dtype": np.dtype(DTYPE).name}


def _embedding(file: Gguf) -> Block:
    if (found := file.tensors.get("token_embd.weight")) is None or len(found.shape) != 2:
        raise CheckpointError(f"{file.path}: lacks token_embd.weight.")
    return found


def _special_ids(file: Gguf) -> dict[str, int]:
    found = {f"{one}_token_id": file.keys.get(f"tokenizer.ggml.{one}_token_id") for one in ("bos", "eos")}
    return {key: cast(int, value) for key, value in found.items() if value is not None}


def _tensors(file: Gguf, config: Mapping[str, Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    for name, block in file.tensors.items():
        found = _NAME.fullmatch(name)
        if found is None or (kind := found["kind"]) not in TENSORS:
            raise ConfigError(f"{file.path}: {name} is nothing that we can express.")
        tensor = _dequantized(file, name, block)
        if kind in ROTATED:
            tensor = rotated_halves(tensor, config[ROTATED[kind]])
        layer = "" if found["layer"] is None else f"model.layers.{found['layer']}."
        yield f"{layer}{TENSORS[kind]}.weight", tensor


def rotated_halves(pairs_OI: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Rows of a matrix of queries or keys as Hugging Face orders them.

    llama.cpp rotates neighbouring rows of a head together, Hugging Face row ``i`` and row ``i + width / 2``.
    """
    if num_heads < 1 or pairs_OI.shape[0] % (2 * num_heads):
        raise CheckpointError(f"{pairs_OI.shape[0]} rows of queries or keys are no {num_heads} heads.")
    split = pairs_OI.reshape(num_heads, -1, 2, pairs_OI.shape[1])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(pairs_OI.shape)


def _dequantized(file: Gguf, name: str, block: Block) -> NDArray[Any]:
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise ConfigError("GGUF files need the package gguf: pip install 'lifelong-moe[gguf]'.") from None
    try:
        kind = GGMLQuantizationType(block.kind)
        together, num_bytes = GGML_QUANT_SIZES[kind]
    except (KeyError, ValueError):
        raise ConfigError(f"{file.path}: {name} is quantized in a way (ggml_type {block.kind}) not known.") from None
    if not block.shape or block.shape[-1] % together:
        raise CheckpointError(f"{file.path}: {name} of shape {block.shape} is no whole number of blocks of {together}.")
    length = block.size // together * num_bytes
    if block.start + length > len(file.data):
        raise CheckpointError(f"{file.path}: cut off within {name}, at byte {len(file.data):,}.")
    raw = np.frombuffer(file.data, np.uint8, length, block.start).reshape(*block.shape[:-1], -1)
    try:
        numbers = dequantize(raw, kind)
    except NotImplementedError:
        raise ConfigError(f"{file.path}: {name} is quantized as {kind.name}, which gguf does not undo.") from None
    # A number beyond float16 becomes infinite.
    with np.errstate(over="ignore"):
        kept = numbers.reshape(block.shape).astype(DTYPE)
    if not np.isfinite(kept).all():
        raise CheckpointError(f"{file.path}: {name} holds a number that is not finite in {np.dtype(DTYPE).name}.")
    return kept


def _texts(file: Gguf, config: Mapping[str, Any]) -> dict[str, str]:
    tokens = _strings(file, "tokenizer.ggml.tokens")
    names = {
        f"{one}_token": tokens[number]
        for one, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if type(number := file.keys.get(f"tokenizer.ggml.{key}_token_id")) is int and 0 <= number < len(tokens)
    }
    settings = names | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.get("max_position_embeddings"),
        "clean_up_tokenization_spaces": False,
    }
    found = {
        CONFIG: _json(config),
        TOKENIZER: _tokenizer(file, tokens),
        TOKENIZER_CONFIG: _json(settings),
        GENERATION_CONFIG: _json(_special_ids(file)),
        CARD: _card(file),
    }
    template = file.keys.get("tokenizer.chat_template")
    return found | ({TEMPLATE: template} if isinstance(template, str) else {})


def _card(file: Gguf) -> str:
    name, licence = file.keys.get("general.name"), file.keys.get("general.license")
    header = f"---\nlicense: {licence}\n---\n\n" if isinstance(licence, str) and licence.isprintable() else ""
    return f"{header}Converted from `{file.path.name}`, a GGUF file that calls itself {json.dumps(name)}.\n"


def _tokenizer(file: Gguf, tokens: list[str]) -> str:
    """Text of ``tokenizer.json``: byte-level BPE, in the order of the file's merges."""
    for key, known in (("tokenizer.ggml.model", ("gpt2",)), ("tokenizer.ggml.pre", tuple(PRE_TOKENIZERS))):
        if file.keys.get(key) not in known:
            raise ConfigError(f"{file.path}: {key}={file.keys.get(key)} is not supported; there are {known}.")
    kinds = file.keys.get("tokenizer.ggml.token_type", [])
    added = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for number, (token, kind) in enumerate(zip(tokens, cast("list[int]", kinds), strict=False))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[str(file.keys["tokenizer.ggml.pre"])],
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in _strings(file, "tokenizer.ggml.merges")],
        },
    }
    text = json.dumps(content, ensure_ascii=False)
    bos_id = file.keys.get("tokenizer.ggml.bos_token_id")
    adds_bos = file.keys.get("tokenizer.ggml.add_bos_token") is True and type(bos_id) is int
    return exported_tokenizer(text, cast(int, bos_id)) if adds_bos else text


def _strings(file: Gguf, key: str) -> list[str]:
    found = file.keys.get(key)
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise CheckpointError(f"{file.path}: has no {key}.")
    return cast("list[str]", found)


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
