"""Folders that we write, read by transformers: the same logits; read by us and written again: the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lifelong_moe.config.model import Activation, QKNorm
from lifelong_moe.data.tokens.tokenizer import BOS, train_tokenizer
from lifelong_moe.errors import CheckpointError, ConfigError
from lifelong_moe.interop.checkpoint import from_checkpoint, to_checkpoint
from lifelong_moe.interop.export import Source, write_folder
from lifelong_moe.interop.layout.folder import read_checkpoint
from lifelong_moe.interop.layout.kept import Kept, kept_texts
from lifelong_moe.interop.pretrained import load_pretrained
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Generation
from tests.checkpoints import CHECKPOINTS, fill_changes, made

transformers = pytest.importorskip("transformers", reason="parity needs the extra `transformers`")
Make = Callable[..., LanguageModel]

TOKENIZER = train_tokenizer(["apple pear plum " * 3], 257).text


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars of transformers."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def logits(model: LanguageModel, ids: Tensor, domain: int = 0) -> Tensor:
    domains = torch.full_like(ids, domain)
    with torch.no_grad():
        return model.eval().head.logits(model(TokenBatch(ids, domain_ids_BS=domains)).hidden_BSD, domains)


def source(model: LanguageModel, texts: Mapping[str, str] | None = None) -> Source:
    return Source(model.architecture, model.state_dict(), [TOKENIZER], Kept((texts or {}).get))


def written(folder: Path, model: LanguageModel, generation: int | None = None, **more: Any) -> dict[str, bytes]:
    """Write a model; returns the files."""
    folder.mkdir()
    write_folder(source(model, more.pop("texts", None)), generation, folder, **more)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def theirs(folder: Path, ids: Tensor) -> Tensor:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(info.values())
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


def random_ids(vocab: int, length: int = 16) -> Tensor:
    return torch.randint(0, vocab, (3, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_goes_out_as_it_came(tmp_path: Path, name: str) -> None:
    came = made(name, vocab_size=270, bos_token_id=0)
    came.save_pretrained(tmp_path / "came")
    (tmp_path / "came" / "tokenizer.json").write_text(TOKENIZER)
    texts = kept_texts(tmp_path / "came")
    model, ids = load_pretrained(read_checkpoint(tmp_path / "came")), random_ids(270)
    first = written(tmp_path / "out", model, texts=texts)
    assert json.loads(first["config.json"])["architectures"] == [type(came).__name__]
    expected = load_file(tmp_path / "came" / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    torch.testing.assert_close(logits(model, ids), theirs(tmp_path / "out", ids), atol=1e-5, rtol=0)
    back = load_pretrained(read_checkpoint(tmp_path / "out"))
    assert back.architecture.model.effective() == model.architecture.model.effective()
    assert written(tmp_path / "again", back, texts=kept_texts(tmp_path / "out")) == first


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("Mixtral", {}),
    "grown": ("Mixtral", {"generations": (4, 2, 3)}),
    "tied": ("Mixtral", {"model": {"tie_embeddings": True}}),
    "one_kv_head_other_base": ("Mixtral", {"model": {"kv_heads": 1, "rope_base": 500.0, "norm_eps": 1e-3}}),
    "three_experts_a_token": ("Mixtral", {"routing": {"top_k": 3}}),
    "dense": ("Llama", {"generations": (1,)}),
    "dense_with_a_window": ("Mistral", {"generations": (1,), "model": {"window": 5, "head_width": 6}}),
    "dense_with_biases": ("Qwen2", {"generations": (1,), "model": {"attention_bias": True}}),
    "dense_with_norms": ("Qwen3", {"generations": (1,), "model": {"qk_norm": QKNorm.head}}),
    "grown_from_dense": ("Mixtral", {"generations": (1, 3)}),
    "gates_as_they_are": ("Olmoe", {"model": {"qk_norm": QKNorm.full}, "routing": {"renormalize": False}}),
    "gates_without_norms": ("Qwen2Moe", {"routing": {"renormalize": False}}),
    "grown_from_qwen2": ("Qwen2Moe", {"generations": (1, 3), "model": {"attention_bias": True}}),
    "grown_from_qwen2_with_a_window": ("Qwen2Moe", {"model": {"attention_bias": True, "window": 5}}),
    "some_layers_dense": ("Qwen3Moe", {"model": {"qk_norm": QKNorm.head, "dense_layers": 1}}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_simplest_architecture_that_has_a_model(make_model: Make, tmp_path: Path, shape: str) -> None:
    name, keys = SHAPES[shape]
    if keys.get("model", {}).get("dense_layers"):
        keys = keys | {"generations": (Generation("s0", 4, layers=(1,)),)}
    model, ids = make_model(**keys), random_ids(61)
    files = written(tmp_path / "out", model)
    assert json.loads(files["config.json"])["architectures"] == [f"{name}ForCausalLM"]
    expected = theirs(tmp_path / "out", ids)
    assert expected.std() > 0.5  # otherwise equality within 1e-5 says little
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=0)


def test_shards_are_one_checkpoint(make_model: Make, tmp_path: Path) -> None:
    model, ids = make_model(), random_ids(61)
    files = written(tmp_path / "out", model, most_bytes=6_000)
    index = json.loads(files["model.safetensors.index.json"])
    shards = {name: len(files[name]) for name in index["weight_map"].values()}
    assert len(shards) > 2 and "model.safetensors" not in files
    assert (
        sum(t.nbytes for name in shards for t in load_file(tmp_path / "out" / name).values())
        == (index["metadata"]["total_size"])
    )
    torch.testing.assert_close(logits(model, ids), theirs(tmp_path / "out", ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("generation", [0, 1, 2])
def test_a_generation_of_bundles_is_a_checkpoint(make_model: Make, tmp_path: Path, generation: int) -> None:
    born = (1, Generation("s1", 3, delta_rank=2), Generation("s2", 2, delta_rank=3))
    model, ids = make_model("labelled_bundles", born), random_ids(61)
    files = written(tmp_path / "out", model, generation)
    assert json.loads(files["config.json"])["model_type"] == ("mixtral" if generation else "llama")
    expected = theirs(tmp_path / "out", ids)
    torch.testing.assert_close(logits(model, ids, generation), expected, atol=1e-5, rtol=0)
    assert (logits(model, ids, (generation + 1) % 3) - expected).abs().max() > 0.1


@pytest.mark.parametrize("generation", [0, 1, 2])
def test_low_rank_experts_go_out_whole(make_model: Make, tmp_path: Path, generation: int) -> None:
    born = (2, Generation("s1", 3, rank=2), Generation("s2", 2, rank=3, delta_rank=2))
    model, ids = make_model("labelled_bundles", born), random_ids(61)
    fill_changes(model)
    for layer in model.moe_layers():
        for place, one in enumerate(layer.banks.born[1:]):
            one.base.copy_(torch.arange(len(one)).add(place) % 2)  # type: ignore[union-attr, operator]
    written(tmp_path / "out", model, generation)
    torch.testing.assert_close(logits(model, ids, generation), theirs(tmp_path / "out", ids), atol=1e-5, rtol=0)


def test_a_tied_head_that_changes_goes_out_untied(make_model: Make, tmp_path: Path) -> None:
    born = (1, Generation("s1", 2, delta_rank=2))
    model, ids = make_model("labelled_bundles", born, model={"tie_embeddings": True}), random_ids(61)
    assert not json.loads(written(tmp_path / "out", model, 1)["config.json"])["tie_word_embeddings"]
    torch.testing.assert_close(logits(model, ids, 1), theirs(tmp_path / "out", ids), atol=1e-5, rtol=0)


def test_halves_stay_halves_until_something_is_added_to_them(make_model: Make, tmp_path: Path) -> None:
    model = make_model("labelled_bundles", (2, Generation("s1", 2, delta_rank=2)))
    tensors = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    (tmp_path / "0").mkdir()
    write_folder(Source(model.architecture, tensors, [TOKENIZER], Kept({}.get)), 0, tmp_path / "0")
    assert {t.dtype for t in load_file(tmp_path / "0" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "0" / "config.json").read_text())["dtype"] == "bfloat16"
    tensors["blocks.0.attention_norm.weight"] = tensors["blocks.0.attention_norm.weight"].float()
    (tmp_path / "1").mkdir()
    write_folder(Source(model.architecture, tensors, [TOKENIZER], Kept({}.get)), 1, tmp_path / "1")
    assert {t.dtype for t in load_file(tmp_path / "1" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("whole", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("change", [{"delta_rank": 2}, {"rank": 2}])
def test_what_is_added_in_halves_goes_out_unrounded(
    make_model: Make, tmp_path: Path, change: dict[str, int], whole: torch.dtype
) -> None:
    model, ids = make_model("labelled_bundles", (2, Generation("s1", 2, **change))), random_ids(61)
    fill_changes(model)
    parts = (".deltas.", "_a", "_b")
    tensors = {
        name: tensor.to(torch.bfloat16 if any(part in name for part in parts) else whole)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(tensors)
    write_folder(Source(model.architecture, tensors, [TOKENIZER], Kept({}.get)), 1, tmp_path)
    torch.testing.assert_close(logits(model, ids, 1), theirs(tmp_path, ids), atol=1e-5, rtol=0)


def test_the_tokenizer_puts_its_first_token_before_a_text(make_model: Make, tmp_path: Path) -> None:
    written(tmp_path / "out", make_model())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (
        tokenizer("apple")["input_ids"][0] == 0 and tokenizer.decode(tokenizer("apple")["input_ids"]) == f"{BOS}apple"
    )
    assert (tokenizer.bos_token, tokenizer.eos_token_id, tokenizer.model_max_length) == (BOS, 0, 16)


def test_settings_of_the_checkpoint_go_out_again(tmp_path: Path) -> None:
    made("llama", vocab_size=270, bos_token_id=0, eos_token_id=[4, 5]).save_pretrained(tmp_path / "came")
    (tmp_path / "came" / "tokenizer_config.json").write_text('{"chat_template": "é"}')
    (tmp_path / "came" / "generation_config.json").write_text('{"temperature": 0.5}')
    (tmp_path / "came" / "README.md").write_text("---\nlicense: apache-2.0\n---\nlicense: mit\n")
    texts = kept_texts(tmp_path / "came")
    model = load_pretrained(read_checkpoint(tmp_path / "came"))
    # The run's own, smaller context is none of the model's.
    model.architecture.model.context = 16
    files = written(tmp_path / "out", model, texts=texts)
    assert files["tokenizer_config.json"].decode() == '{"chat_template": "é"}'
    assert json.loads(files["generation_config.json"]) == {"temperature": 0.5}
    config = json.loads(files["config.json"])
    assert config["eos_token_id"] == [4, 5] and config["max_position_embeddings"] == 48
    assert Kept(texts.get).license == "apache-2.0" and Kept({}.get).license is None
    assert Kept({"checkpoint-README.md": "license: mit\n"}.get).license is None


def test_tokens_that_end_a_text_are_those_that_its_files_name() -> None:
    config, generation = "checkpoint-config.json", "checkpoint-generation_config.json"
    cases: list[tuple[dict[str, str], set[int]]] = [
        ({}, set()),
        ({config: '{"eos_token_id": 5}'}, {5}),
        ({config: '{"eos_token_id": 5}', generation: '{"eos_token_id": [7, 9]}'}, {7, 9}),
        ({config: '{"eos_token_id": 5}', generation: '{"eos_token_id": null}'}, set()),
    ]
    for texts, ends in cases:
        assert Kept(texts.get).ends == ends


def test_theirs_read_by_us_in_memory(tmp_path: Path) -> None:
    came = made("mixtral", rope_parameters={"rope_type": "default", "rope_theta": 750.0}, initializer_range=0.1)
    came.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    ours = from_checkpoint(json.loads((tmp_path / "config.json").read_text()), tensors, stage="imported")
    assert ours.architecture.expert_births(0) == ["imported"] * 5
    assert ours.architecture.model.rope_base == 750.0 and ours.architecture.bos_id == 1
    assert len(ours.architecture.generations) == 1 and ours.architecture.frozen == 0
    assert all(p.requires_grad for p in ours.parameters())
    _, again = to_checkpoint(ours)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    for tensor in again.values():  # copies
        tensor.zero_()
    assert all(p.abs().sum() > 0 for p in ours.parameters())


def test_the_old_form_of_the_rotary_base_is_read(make_model: Make) -> None:
    config, tensors = to_checkpoint(make_model(model={"rope_base": 123.0}))
    assert config["rope_theta"] == 123.0 and "rope_parameters" not in config
    assert from_checkpoint(config, tensors).architecture.model.rope_base == 123.0
    assert (
        from_checkpoint(config | {"rope_scaling": {"type": "default"}}, tensors).architecture.model.rope_base == 123.0
    )


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "clusters": ("token_hidden", {}, r"routing\.mode=cluster is in no architecture that others read"),
    "labels": ("label", {}, r"routing\.mode=label is in no architecture"),
    "bundles": ("bundles", {}, r"routing\.bundles=cluster: each token uses one of 2 generations"),
    "sigmoid": ("sigmoid", {}, r"routing\.score=sigmoid is in no architecture"),
    "capacity": ("by_choice", {}, r"routing\.capacity is in no architecture"),
    "gates": (
        "learned",
        {"routing": {"renormalize": False}, "model": {"sandwich_norms": True}},
        r"Mixtral.* lacks model\.sandwich_norms=True, routing\.renormalize=False; Olmoe.* lacks model\.qk_norm=none,",
    ),
    "one": (
        "learned",
        {"routing": {"renormalize": False, "top_k": 1}, "model": {"sandwich_norms": True}},
        r"Mixtral.* lacks routing\.renormalize=False with top_k=1; Olmoe",
    ),
    "activation": (
        "learned",
        {"model": {"activation": Activation.gelu}},
        r"MixtralForCausalLM lacks model\.activation=gelu;",
    ),
    "shared": ("learned", {"model": {"shared_experts": 1}}, r"lacks model\.shared_experts=1;"),
    "softcap": ("learned", {"model": {"attention_softcap": 9.0}}, r"lacks model\.attention_softcap=9\.0;"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_architecture_has(make_model: Make, name: str) -> None:
    kind, keys, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        to_checkpoint(make_model(kind, (4, 2), **keys))


def test_layers_that_grew_differently(make_model: Make) -> None:
    with pytest.raises(ConfigError, match=r"layers have different numbers of experts \(4, 6\), by .*grow\.layers"):
        to_checkpoint(make_model("learned", (4, Generation("s1", 2, layers=(1,)))))


def test_a_window_that_transformers_does_not_look_at(tmp_path: Path) -> None:
    """A Llama's config may hold a window, which its class ignores."""
    came = made("llama", sliding_window=3)
    came.save_pretrained(tmp_path)
    ids = random_ids(61)
    with torch.no_grad():
        expected = came(ids).logits
    torch.testing.assert_close(logits(load_pretrained(read_checkpoint(tmp_path)), ids), expected, atol=1e-5, rtol=0)


def test_tensors_that_do_not_fit(make_model: Make) -> None:
    config, tensors = to_checkpoint(make_model())
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    without = {n: t for n, t in tensors.items() if n != name}
    with pytest.raises(CheckpointError, match=rf"{name} is missing"):
        from_checkpoint(config, without)
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(2, 2\), its config asks for \(16, 8\)"):
        from_checkpoint(config, without | {name: torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match=r"odd\.bias is no tensor of a model with its config"):
        from_checkpoint(config, tensors | {"odd.bias": torch.zeros(2)})
