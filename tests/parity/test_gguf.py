"""A GGUF file as llama.cpp writes it, converted: the model and the tokenizer that it was made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from lifelong_moe.data.tokens.tokenizer import Tokenizer, train_tokenizer
from lifelong_moe.errors import LifelongError
from lifelong_moe.interop.from_gguf import TENSORS, convert_gguf
from lifelong_moe.interop.layout.folder import read_checkpoint
from lifelong_moe.interop.layout.kept import Kept, kept_texts
from lifelong_moe.interop.pretrained import load_pretrained
from lifelong_moe.model.tokens import TokenBatch
from pipelines.cli import exit_code
from pipelines.convert import convert
from tests.checkpoints import made

transformers = pytest.importorskip("transformers", reason="parity needs the extra `transformers`")
gguf = pytest.importorskip("gguf", reason="GGUF files are converted with the extra `gguf`")

VOCAB, CONTEXT, HEADS, KV_HEADS, WIDTH = 300, 48, 4, 2, 32
TEXTS = ["one 23 two\n\n 45", "naïve 漢字 🙂", "tabs\t\t and   spaces 7", "<|bos|> is text"]
TO_GGUF = {theirs: ours for ours, theirs in TENSORS.items()}
Change = Callable[[dict[str, Any], dict[str, Any]], None]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars of transformers."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def permuted(halves_OI: np.ndarray, heads: int) -> np.ndarray:
    """Rows as ``convert_hf_to_gguf.py`` orders them, in its own words."""
    shape = halves_OI.shape
    return halves_OI.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def written(path: Path, kind: str = "F16", pre: str = "gpt-2", change: Change | None = None) -> Any:
    """A random Llama as a GGUF file, and the model."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_attention_heads": HEADS, "vocab_size": VOCAB}
    theirs = made("llama_tied", **sizes, num_key_value_heads=KV_HEADS, max_position_embeddings=CONTEXT)
    tokenizer = train_tokenizer(TEXTS * 30, VOCAB)
    model = tokenizer_json(tokenizer)["model"]
    words = sorted(model["vocab"], key=model["vocab"].__getitem__)
    words += [f"unused{i}" for i in range(VOCAB - len(words))]
    keys: dict[str, Any] = {
        "general.name": "tiny",
        "general.license": "apache-2.0",
        "llama.block_count": 3,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-4,
        "llama.rope.freq_base": 10_000.0,
        "llama.rope.dimension_count": WIDTH // HEADS,
        "llama.vocab_size": VOCAB,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3] + [1] * (VOCAB - 1),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
    }
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        if name == "lm_head.weight":
            continue
        module, array = name.removesuffix(".weight"), tensor.numpy()
        parts = module.split(".", 3)
        layer, stem = (f"blk.{parts[2]}.", parts[3]) if parts[1] == "layers" else ("", module)
        stem = TO_GGUF[stem]
        if stem in ("attn_q", "attn_k"):
            array = permuted(array, HEADS if stem == "attn_q" else KV_HEADS)
        tensors[f"{layer}{stem}.weight"] = array
    if change is not None:
        change(keys, tensors)
    write(path, kind, keys, tensors)
    return theirs


def write(path: Path, kind: str, keys: dict[str, Any], tensors: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, keys.pop("general.architecture", "llama"))
    for key, value in keys.items():
        add: Any = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        add.get(type(value), writer.add_string)(key, value)
    for name, array in tensors.items():
        stored = kind if array.ndim == 2 else "F32"
        number = gguf.GGMLQuantizationType[stored]
        raw = gguf.quants.quantize(array.astype(np.float32), number)
        writer.add_tensor(name, raw, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(tokenizer.text)
    return content


def test_a_converted_file_is_the_model_that_it_was_made_of(tmp_path: Path) -> None:
    theirs = written(tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "tiny")
    ids_BS = torch.randint(VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
    ours = load_pretrained(read_checkpoint(tmp_path / "tiny")).float().eval()
    with torch.no_grad():
        found = ours.head.logits(ours(TokenBatch(ids_BS)).hidden_BSD)
        for parameter in theirs.parameters():
            parameter.copy_(parameter.half())
        expected = theirs(ids_BS).logits
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tiny", dtype=torch.float32)
        torch.testing.assert_close(found, again.eval()(ids_BS).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert Kept(kept_texts(tmp_path / "tiny").get).license == "apache-2.0"


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0", "Q4_1"])
def test_quantized_numbers_are_those_that_gguf_makes_of_them(tmp_path: Path, kind: str) -> None:
    theirs = written(tmp_path / "tiny.gguf", kind)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "tiny")
    number = gguf.GGMLQuantizationType[kind]
    for name, found in load_file(tmp_path / "tiny" / "model.safetensors").items():
        expected = theirs.state_dict()[name].numpy()
        if expected.ndim == 2:  # by rows, so that their order does not matter
            expected = gguf.quants.dequantize(gguf.quants.quantize(expected, number), number)
        assert found.dtype == np.float16
        np.testing.assert_array_equal(found, expected.astype(np.float16))


def test_the_tokenizer_is_the_one_that_it_was_made_of(tmp_path: Path) -> None:
    written(tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "tiny")
    expected, found = train_tokenizer(TEXTS * 30, VOCAB), Tokenizer.load(tmp_path / "tiny" / "tokenizer.json")
    assert found.encode_batch(TEXTS) == expected.encode_batch(TEXTS)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tiny")
    assert [theirs(text)["input_ids"] for text in TEXTS[:3]] == [[0, *ids] for ids in expected.encode_batch(TEXTS[:3])]
    assert theirs.chat_template == "{{ messages }}"


def test_smollm_takes_digits_apart_before_white_space(tmp_path: Path) -> None:
    written(tmp_path / "tiny.gguf", pre="smollm")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "tiny")
    tokenizer = Tokenizer.load(tmp_path / "tiny" / "tokenizer.json")
    assert [tokenizer.decode([one]) for one in tokenizer.encode("23")] == ["2", "3"]
    # GPT-2's pattern leaves the last of several blanks to the word after it; a digit is no part of that word.
    assert tokenizer.encode("two\n\n45") == [
        *tokenizer.encode("two\n\n"),
        *tokenizer.encode("4"),
        *tokenizer.encode("5"),
    ]


def set_key(name: str, value: Any) -> Change:
    return lambda keys, _: keys.update({name: value})


def set_tensor(name: str, array: np.ndarray) -> Change:
    return lambda _, tensors: tensors.update({name: array})


AMISS: dict[str, tuple[Change, str]] = {
    "architecture": (set_key("general.architecture", "qwen2"), "general.architecture=qwen2"),
    "experts": (set_key("llama.expert_count", 8), "llama.expert_count=8"),
    "rope": (set_key("llama.rope.scaling.type", "yarn"), "llama.rope.scaling.type=yarn"),
    "half of a head": (set_key("llama.rope.dimension_count", 4), "llama.rope.dimension_count=4"),
    "pre-tokenizer": (set_key("tokenizer.ggml.pre", "tekken"), "tokenizer.ggml.pre=tekken"),
    "sentencepiece": (set_key("tokenizer.ggml.model", "llama"), "tokenizer.ggml.model=llama"),
    "no tokens": (lambda keys, _: keys.pop("tokenizer.ggml.tokens"), "tokenizer.ggml.tokens"),
    "no width": (lambda keys, _: keys.pop("llama.embedding_length"), "hidden_size"),
    "another tensor": (set_tensor("blk.0.attn_q.bias", np.zeros(WIDTH)), "blk.0.attn_q.bias"),
    "frequencies": (set_tensor("rope_freqs.weight", np.ones(4)), "rope_freqs.weight"),
    "a missing one": (lambda _, tensors: tensors.pop("blk.1.ffn_up.weight"), "model.layers.1.mlp.up_proj.weight"),
    "another shape": (set_tensor("blk.1.ffn_up.weight", np.zeros((32, 64))), "model.layers.1.mlp.up_proj.weight"),
    "a layer too many": (set_tensor("blk.7.ffn_up.weight", np.zeros((64, 32))), "model.layers.7.mlp.up_proj.weight"),
    "not finite": (set_tensor("output_norm.weight", np.full(WIDTH, np.nan)), "output_norm.weight"),
    "beyond float16": (set_tensor("output_norm.weight", np.full(WIDTH, 1e5)), "output_norm.weight"),
}


@pytest.mark.parametrize("name", AMISS)
def test_what_is_amiss_is_named_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    change, said = AMISS[name]
    written(tmp_path / "tiny.gguf", "F32", change=change)
    with pytest.raises(LifelongError) as told:
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "tiny")
    assert said in str(told.value) and told.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "tiny.gguf")
    data, cut = (tmp_path / "tiny.gguf").read_bytes(), tmp_path / "cut.gguf"
    for end in range(1, len(data), len(data) // 97):
        cut.write_bytes(data[:end])
        with pytest.raises(LifelongError) as told:
            convert_gguf(cut, tmp_path / "tiny")
        assert told.value.exit_code == 2
    assert not (tmp_path / "tiny").exists()


def test_the_command_takes_a_file_and_a_folder_that_is_not_there(tmp_path: Path, capfd: Any) -> None:
    written(tmp_path / "tiny.gguf")
    arguments = [str(tmp_path / "tiny.gguf"), str(tmp_path / "tiny")]
    assert exit_code(lambda: convert(arguments)) == 0
    assert exit_code(lambda: convert(arguments)) == 2
    assert exit_code(lambda: convert(arguments[:1])) == 2
    err = capfd.readouterr().err
    assert "is there already" in err and "usage:" in err
