"""Texts beside a checkpoint's weights: its tokenizer, and how to generate with it. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lifelong_moe.data.formats.strict_json import parse_object
from lifelong_moe.interop.layout.folder import GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG
from lifelong_moe.storage.keys import canonical_json


def exported_tokenizer(text: str, bos_id: int) -> str:
    """A ``tokenizer.json`` that puts the token which begins a document before each text.

    One that says itself what stands around a text, as those of checkpoints do, stays as it is.
    """
    content = parse_object(text, Path(TOKENIZER))
    if content.get("post_processor") is not None:
        return text
    name = _name(content, bos_id)
    begins, first = {"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begins, first],
        "pair": [begins, first, begins, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [bos_id], "tokens": [name]}},
    }
    return canonical_json(content)


def default_texts(tokenizer: str, config: Mapping[str, Any], bos_id: int) -> dict[str, str]:
    """``tokenizer_config.json`` and ``generation_config.json`` where no checkpoint has brought any.

    Args:
        tokenizer: Text of ``tokenizer.json``.
        config: The ``config.json``.
        bos_id: Begins a document, and so ends the one before.
    """
    name = _name(parse_object(tokenizer, Path(TOKENIZER)), bos_id)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name,
        "eos_token": name,
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
    found = {TOKENIZER_CONFIG: settings, GENERATION_CONFIG: ids}
    return {key: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for key, value in found.items()}


def _name(tokenizer: Mapping[str, Any], token: int) -> str:
    """Text of an added token."""
    names = [str(one["content"]) for one in tokenizer.get("added_tokens") or () if one.get("id") == token]
    return names[0]
