"""Our decoder is Mixtral's: the same logits from the same weights, both ways, through files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lifelong_moe.errors import CheckpointError, ConfigError
from lifelong_moe.interop.checkpoint import from_checkpoint
from lifelong_moe.interop.mixtral import to_mixtral
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Generation

transformers = pytest.importorskip("transformers")
Make = Callable[..., LanguageModel]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars of transformers."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def logits(model: LanguageModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.head.logits(model(TokenBatch(ids)).hidden_BSD)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grown": {"generations": (4, 2, 3)},
    "tied": {"model": {"tie_embeddings": True}},
    "one_kv_head_other_base": {"model": {"kv_heads": 1, "rope_base": 500.0, "norm_eps": 1e-3}},
    "three_experts_a_token": {"routing": {"top_k": 3}},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_ours_read_by_transformers_and_back(make_model: Make, tmp_path: Path, shape: str) -> None:
    model = make_model(**SHAPES[shape])
    ids = torch.randint(0, 61, (3, 16), generator=torch.Generator().manual_seed(1))
    write(tmp_path / "ours", *to_mixtral(model))
    theirs, info = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        expected = theirs(ids).logits
    assert expected.std() > 0.5  # otherwise equality within 1e-5 says little
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=0)

    theirs.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    back = from_checkpoint(config, load_file(tmp_path / "theirs" / "model.safetensors"))
    assert back.architecture.num_experts == model.architecture.num_experts
    assert len(back.architecture.generations) == 1 and back.architecture.frozen == 0
    assert all(p.requires_grad for p in back.parameters())
    ours, again = to_mixtral(model)[1], to_mixtral(back)[1]
    assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in ours)
    # A router makes one product a generation, so a grown model's last bits may differ from those of one generation.
    torch.testing.assert_close(logits(back, ids), logits(model, ids), atol=1e-6, rtol=0)


def test_theirs_read_by_us(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        num_local_experts=5,
        max_position_embeddings=32,
        initializer_range=0.1,  # at 0.15 some processors' rounding alone exceeds 1e-5
        rope_parameters={"rope_type": "default", "rope_theta": 750.0},
    )
    theirs = transformers.MixtralForCausalLM(config)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    ours = from_checkpoint(json.loads((tmp_path / "config.json").read_text()), tensors, stage="imported")
    assert ours.architecture.expert_births(0) == ["imported"] * 5
    assert ours.architecture.model.rope_base == 750.0 and ours.architecture.bos_id == 1
    ids = torch.randint(0, 61, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(logits(ours, ids), theirs(ids).logits, atol=1e-5, rtol=0)
    _, again = to_mixtral(ours)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_layers_that_grew_differently_have_no_mixtral_form(make_model: Make) -> None:
    with pytest.raises(ConfigError, match=r"grow\.layers has no Mixtral form"):
        to_mixtral(make_model("learned", (4, Generation("s1", 2, layers=(1,)))))


def test_exported_tensors_are_copies(make_model: Make) -> None:
    model = make_model()
    _, tensors = to_mixtral(model)
    for tensor in tensors.values():
        tensor.zero_()
    assert all(p.abs().sum() > 0 for p in model.parameters())


def test_the_old_form_of_the_rotary_base_is_read(make_model: Make) -> None:
    config, tensors = to_mixtral(make_model(model={"rope_base": 123.0}))
    assert config["rope_theta"] == 123.0 and "rope_parameters" not in config
    assert from_checkpoint(config, tensors).architecture.model.rope_base == 123.0
    assert (
        from_checkpoint(config | {"rope_scaling": {"type": "default"}}, tensors).architecture.model.rope_base == 123.0
    )


@pytest.mark.parametrize(
    ("kind", "routing", "message"),
    [
        ("token_hidden", {}, "routing.mode=cluster has no Mixtral form"),
        ("label", {}, "routing.mode=label has no Mixtral form"),
        ("bundles", {}, "routing.bundles=cluster has no Mixtral form"),
        ("learned", {"renormalize": False}, "routing.renormalize=false has no Mixtral form"),
    ],
)
def test_what_mixtral_cannot_express(make_model: Make, kind: str, routing: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_mixtral(make_model(kind, (4, 2), routing=routing))


def test_tensors_that_do_not_fit(make_model: Make) -> None:
    config, tensors = to_mixtral(make_model())
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    without = {n: t for n, t in tensors.items() if n != name}
    with pytest.raises(CheckpointError, match=rf"{name} is missing"):
        from_checkpoint(config, without)
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(2, 2\), its config asks for \(16, 8\)"):
        from_checkpoint(config, without | {name: torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match=r"odd\.bias is no tensor of a model with its config"):
        from_checkpoint(config, tensors | {"odd.bias": torch.zeros(2)})
