"""Folders as transformers writes them: the same logits, and nothing that is amiss is taken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lifelong_moe.errors import LifelongError
from lifelong_moe.interop.layout.folder import read_checkpoint
from lifelong_moe.interop.pretrained import load_pretrained, require_sound
from lifelong_moe.model.tokens import TokenBatch
from tests.checkpoints import CHECKPOINTS, CONTEXT, VOCAB, made

transformers = pytest.importorskip("transformers", reason="parity needs the extra `transformers`")

IDS = torch.randint(VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars of transformers."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def logits(folder: Path) -> Tensor:
    model = load_pretrained(read_checkpoint(folder)).float().eval()
    with torch.no_grad():
        return model.head.logits(model(TokenBatch(IDS)).hidden_BSD)


def logits_of(theirs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = theirs(IDS).logits
    return found


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_folder_gives_the_same_logits(tmp_path: Path, name: str) -> None:
    theirs = made(name)
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(tmp_path), logits_of(theirs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "olmoe"])
def test_shards_are_one_checkpoint(tmp_path: Path, name: str) -> None:
    theirs = made(name)
    theirs.save_pretrained(tmp_path, max_shard_size="12KB")
    assert not (tmp_path / WEIGHTS).exists() and len(list(tmp_path.glob("*.safetensors"))) > 2
    torch.testing.assert_close(logits(tmp_path), logits_of(theirs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe_some_dense"])
def test_fused_experts_are_read_too(tmp_path: Path, name: str) -> None:
    theirs = made(name)
    theirs.config.save_pretrained(tmp_path)
    tensors = {key: tensor.contiguous() for key, tensor in theirs.state_dict().items()}
    assert any(tensor.dim() == 3 for tensor in tensors.values())
    save_file(tensors, tmp_path / WEIGHTS)
    torch.testing.assert_close(logits(tmp_path), logits_of(theirs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_stay_as_they_are_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    theirs = made("olmoe").to(dtype)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(read_checkpoint(tmp_path))
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    assert torch.equal(ours.embedding.weight, theirs.model.embed_tokens.weight)
    # Not `theirs.float()`, whose rotary frequencies have been halves.
    whole = transformers.OlmoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(logits(tmp_path), logits_of(whole.eval()), atol=1e-5, rtol=0)
    # A norm in float32 among halves: all is held in what holds all.
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-6
    save_file(tensors, tmp_path / WEIGHTS)
    mixed = load_pretrained(read_checkpoint(tmp_path))
    assert torch.equal(mixed.norm.weight, tensors["model.norm.weight"])
    assert torch.equal(mixed.embedding.weight, theirs.model.embed_tokens.weight.float())


def test_what_early_files_hold_besides_is_passed_over(tmp_path: Path) -> None:
    theirs = made("llama_tied")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(3)}
    save_file(tensors, tmp_path / WEIGHTS)
    torch.testing.assert_close(logits(tmp_path), logits_of(theirs), atol=1e-5, rtol=0)
    tensors["lm_head.weight"][3, 4] += 1e-3
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(LifelongError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_pretrained(read_checkpoint(tmp_path))


def write_tokenizer(folder: Path, size: int, processor: Any = None, **special: Any) -> None:
    words = {f"w{i}": i for i in range(size - 2)}
    added = [{"content": "<s>", "id": size - 2}, {"content": "</s>", "id": size - 1}]
    text = json.dumps(
        {"model": {"type": "BPE", "vocab": words, "merges": []}, "added_tokens": added, "post_processor": processor}
    )
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
}
LLAMA_3S = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, TEMPLATE]}


@pytest.mark.parametrize(
    ("special", "keys", "expected"),
    [
        ({"bos_token": "<s>"}, {}, VOCAB - 2),
        ({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}, {}, VOCAB - 2),
        ({"eos_token": "</s>"}, {}, 1),
        ({"eos_token": "</s>"}, {"bos_token_id": None, "eos_token_id": [4, 5]}, VOCAB - 1),
        ({}, {"bos_token_id": None, "eos_token_id": [4, 5]}, 4),
        # What the tokenizer itself puts before a text goes before what names it.
        ({"bos_token": "</s>", "processor": {"type": "RobertaProcessing", "cls": ["<s>", 59]}}, {}, VOCAB - 2),
        ({"bos_token": "</s>", "processor": LLAMA_3S}, {}, VOCAB - 2),
        ({"bos_token": "</s>", "processor": {"type": "ByteLevel"}}, {}, VOCAB - 1),
        ({"processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}]}}, {}, 1),
        # Neither of both in config.json: of generation_config.json, which has 2 and 3.
        ({}, {"bos_token_id": None}, 2),
    ],
)
def test_the_token_that_begins_a_document(
    tmp_path: Path, special: dict[str, Any], keys: dict[str, Any], expected: int
) -> None:
    made("llama").save_pretrained(tmp_path)
    write_tokenizer(tmp_path, VOCAB, **special)
    change_json(tmp_path / "config.json", lambda config: config | keys)
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 2, "eos_token_id": 3}')
    found = read_checkpoint(tmp_path)
    assert found.family.separator == expected and found.vocabulary is not None and found.vocabulary.size == VOCAB


@pytest.mark.parametrize(
    ("ends", "expected"), [(2, [2]), ([5, 2, 2], [2, 5]), (1, []), ([1, 3], [3]), (None, []), ([VOCAB, 2], [2])]
)
def test_the_other_tokens_that_end_a_text(tmp_path: Path, ends: Any, expected: list[int]) -> None:
    made("llama").save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", lambda config: config | {"bos_token_id": 1, "eos_token_id": ends})
    assert read_checkpoint(tmp_path).family.ends == expected


@pytest.mark.parametrize("fault", ["not finite", "a head that is not the embedding", "a shared expert"])
def test_numbers_that_are_refused_are_found_without_a_model(tmp_path: Path, fault: str) -> None:
    name = "qwen2_moe" if fault == "a shared expert" else "llama_tied"
    theirs = made(name)
    theirs.bfloat16().save_pretrained(tmp_path)
    table = load_file(tmp_path / WEIGHTS)["model.embed_tokens.weight"]
    if name == "llama_tied":  # of another kind, and the same numbers
        change_tensors(tmp_path, lambda t: t | {"lm_head.weight": table.float()})
    require_sound(read_checkpoint(tmp_path))
    wrong = {
        "not finite": {"model.norm.weight": torch.full((24,), float("inf"), dtype=torch.float16)},
        "a head that is not the embedding": {"lm_head.weight": table.float() + 1e-3},
        "a shared expert": {"model.layers.1.mlp.shared_expert.down_proj.weight": torch.ones(24, 32)},
    }
    change_tensors(tmp_path, lambda t: t | wrong[fault])
    told = []
    for reads in (require_sound, load_pretrained):
        with pytest.raises(LifelongError) as caught:
            reads(read_checkpoint(tmp_path))
        told.append(str(caught.value))
    assert told[0] == told[1]


def test_a_file_where_a_folder_should_be_is_told_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(LifelongError, match=r"model\.gguf: a file; python -m pipelines\.convert makes a folder"):
        read_checkpoint(tmp_path / "model.gguf")


def test_both_names_of_the_activation_are_read(tmp_path: Path) -> None:
    theirs = made("llama")
    theirs.config.hidden_act = "swish"
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(tmp_path), logits_of(theirs), atol=1e-5, rtol=0)


def test_a_shared_expert_that_does_something_is_refused(tmp_path: Path) -> None:
    made("qwen2_moe").save_pretrained(tmp_path)
    name = "model.layers.1.mlp.shared_expert.down_proj.weight"
    change_tensors(tmp_path, lambda t: t | {name: t[name].fill_(1e-3)})
    with pytest.raises(LifelongError, match=rf"{name} is not all zeros; shared experts of Qwen2-MoE are not") as caught:
        load_pretrained(read_checkpoint(tmp_path))
    assert caught.value.exit_code == 2


def test_an_embedding_may_have_rows_that_no_token_has_and_not_the_other_way_round(tmp_path: Path) -> None:
    made("qwen2").save_pretrained(tmp_path)
    write_tokenizer(tmp_path, VOCAB - 3)
    assert load_pretrained(read_checkpoint(tmp_path)).architecture.vocab_size == VOCAB
    write_tokenizer(tmp_path, VOCAB + 1)
    with pytest.raises(LifelongError, match=r"tokenizer\.json: ids reach 61, and the embedding has vocab_size=61 rows"):
        read_checkpoint(tmp_path)


def change_json(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file({name: t.contiguous() for name, t in change(load_file(folder / WEIGHTS)).items()}, folder / WEIGHTS)


def change_header(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]], more: bytes = b"") -> None:
    data = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(change(json.loads(data[8 : 8 + length]))).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :] + more)


Q = "model.layers.1.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.experts.2.up_proj.weight"


def renamed(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {new if name == old else name: tensor for name, tensor in tensors.items()}


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "no such folder"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: cannot be read: No such file"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json:1: malformed JSON"),
    "config is a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        r"config\.json: cannot be read: a directory",
    ),
    "config twice a key": (lambda f: (f / "config.json").write_text('{"a": 1, "a": 2}'), "'a' occurs twice"),
    "config of another model": (
        lambda f: change_json(f / "config.json", lambda c: c | {"model_type": "mamba"}),
        "model_type=mamba is not supported",
    ),
    "unknown rope type": (
        lambda f: change_json(f / "config.json", lambda c: c | {"rope_parameters": {"rope_type": "longrope"}}),
        r"rope_parameters\.rope_type: must be one of default, linear, llama3, yarn, not 'longrope'",
    ),
    "norm_topk_prob of a wrong type": (
        lambda f: change_json(f / "config.json", lambda c: c | {"norm_topk_prob": "false"}),
        "norm_topk_prob: must be true or false, not 'false'",
    ),
    "millions of experts": (
        lambda f: change_json(f / "config.json", lambda c: c | {"num_experts": 10**6}),
        r"model\.layers\.0\.mlp\.gate\.weight has shape \(6, 24\), its config asks for \(1000000, 24\)",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), rf"has neither {WEIGHTS} nor {INDEX}\.$"),
    "pickled weights": (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "are never loaded"),
    "missing": (lambda f: change_tensors(f, lambda t: {n: x for n, x in t.items() if n != UP}), f"{UP} is missing"),
    "extra": (lambda f: change_tensors(f, lambda t: t | {"odd.bias": torch.zeros(2)}), r"odd\.bias is no tensor"),
    "a head beside a tied one of another shape": (
        lambda f: (
            change_json(f / "config.json", lambda c: c | {"tie_word_embeddings": True}),
            change_tensors(f, lambda t: t | {"lm_head.weight": torch.zeros(2, 24)}),
        ),
        r"lm_head\.weight is no tensor",
    ),
    "renamed": (lambda f: change_tensors(f, lambda t: renamed(t, Q, Q.replace("q_", "z_"))), f"{Q} is missing"),
    "transposed": (
        lambda f: change_tensors(f, lambda t: t | {UP: t[UP].t()}),
        rf"{UP} has shape \(24, 20\), its config asks for \(20, 24\)",
    ),
    "not finite": (
        lambda f: change_tensors(f, lambda t: t | {UP: t[UP].fill_(float("nan"))}),
        f"{UP} holds a number that is not finite",
    ),
    "integers": (lambda f: change_tensors(f, lambda t: t | {UP: t[UP].int()}), r"dtype: must be one of F32.*not 'I32'"),
    "cut off": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-5]), "cut off within model"),
    "cut off early": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:99]),
        "cut off within its header",
    ),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "not a safetensors file"),
    "something else": (lambda f: (f / WEIGHTS).write_bytes(b"\x80\x02PK" * 99), "not a safetensors file"),
    "more than it says": (lambda f: change_header(f, dict, b"more"), "4 bytes after its last tensor"),
    "a place that overlaps": (
        lambda f: change_header(f, lambda h: h | {UP: h[UP] | {"data_offsets": [0, 1920]}}),
        "does not begin where the tensor before it ends",
    ),
    "a place of another size": (
        lambda f: change_header(f, lambda h: h | {UP: h[UP] | {"shape": [20, 23]}}),
        rf"{UP} of shape \(20, 23\) takes no 1,920 bytes",
    ),
    "a negative shape": (
        lambda f: change_header(f, lambda h: h | {UP: h[UP] | {"shape": [-20, -24]}}),
        rf"{UP} of shape \(-20, -24\) takes no",
    ),
    "a shape of text": (
        lambda f: change_header(f, lambda h: h | {UP: h[UP] | {"shape": "20"}}),
        rf"{UP}\.shape: must be a list, not '20'",
    ),
    "tokenizer without words": (
        lambda f: (f / "tokenizer.json").write_text('{"model": {}}'),
        r"tokenizer\.json: has no vocabulary",
    ),
    "tokens without ids": (
        lambda f: (f / "tokenizer.json").write_text('{"model": {"vocab": {"a": true}}}'),
        r"tokenizer\.json: not all tokens have ids",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    made("olmoe").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_that_names_it(whole: Path, tmp_path: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    damage(folder)
    with pytest.raises(LifelongError, match=message) as caught:
        load_pretrained(read_checkpoint(folder))
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


SHARD_FAULTS: dict[str, tuple[Callable[[dict[str, str]], dict[str, str]], str]] = {
    "elsewhere": (lambda w: w | {Q: "../x.safetensors"}, r"'\.\./x\.safetensors' is no name of a file beside it"),
    "no such file": (lambda w: w | {Q: "a.safetensors"}, r"a\.safetensors: cannot be read: No such file"),
    "unknown place": (lambda w: w | {"odd": max(w.values())}, r"lacks odd, which .*index\.json places there"),
    "not placed": (lambda w: {n: f for n, f in w.items() if n != Q}, f"holds {Q}, which .* does not place there"),
    "no names": (lambda w: w | {Q: 3}, r"weight_map\..*must be a text, not 3"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_a_fault_of_an_index_names_it(tmp_path: Path, fault: str) -> None:
    change, message = SHARD_FAULTS[fault]
    made("llama").save_pretrained(tmp_path, max_shard_size="12KB")
    change_json(tmp_path / INDEX, lambda index: index | {"weight_map": change(index["weight_map"])})
    with pytest.raises(LifelongError, match=message) as caught:
        read_checkpoint(tmp_path)
    assert caught.value.exit_code == 2


MEASURE = r"""
import re, sys, torch
from pathlib import Path
from lifelong_moe.interop.layout.folder import read_checkpoint
from lifelong_moe.interop.pretrained import load_pretrained, require_sound
torch.set_num_threads(1)
load_pretrained(read_checkpoint(Path(sys.argv[1])))  # what a first call imports
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
model = load_pretrained(read_checkpoint(Path(sys.argv[2])))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are Linux's")
def test_reading_takes_little_more_than_the_model(tmp_path: Path, whole: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    made("llama", **sizes, vocab_size=20_000).save_pretrained(tmp_path)
    size = (tmp_path / WEIGHTS).stat().st_size
    command = [sys.executable, "-c", MEASURE, str(whole), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.8 * size < int(done.stdout) * 1024 < 1.2 * size
