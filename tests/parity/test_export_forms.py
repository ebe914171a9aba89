"""What goes out besides checkpoints: adapters, by PEFT's definition and in PEFT itself; the page that picks."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lifelong_moe.data.tokens.pick import Picker
from lifelong_moe.data.tokens.tokenizer import train_tokenizer
from lifelong_moe.errors import ConfigError
from lifelong_moe.interop import adapter
from lifelong_moe.interop.agreement import compare, read_by_transformers, rounding
from lifelong_moe.interop.export import Source, write_folder, write_picker
from lifelong_moe.interop.layout.kept import Kept
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Generation
from tests.checkpoints import fill_changes

pytest.importorskip("transformers", reason="parity needs the extra `transformers`")
Make = Callable[..., LanguageModel]

TEXTS = ["apple pear plum cherry ripe sweet", "def return self value index", "wave tide salt sail anchor", "<|bos|> –é"]
TOKENIZER = train_tokenizer(TEXTS * 3, 300)


def source(model: LanguageModel, dtype: torch.dtype = torch.float32) -> Source:
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in model.state_dict().items()}
    return Source(model.architecture, tensors, [TOKENIZER.text], Kept({}.get))


def logits(model: LanguageModel, ids: Tensor, domain: int) -> Tensor:
    domains = torch.full_like(ids, domain)
    with torch.no_grad():
        return model.eval().head.logits(model(TokenBatch(ids, domain_ids_BS=domains)).hidden_BSD, domains)


@pytest.fixture(params=[0, 1, 3, "tied"])
def low_rank(request: pytest.FixtureRequest, make_model: Make) -> LanguageModel:
    """Two later generations that have the first one's experts, and low-rank changes of their own; 0 is one expert that
    has changes too, of another rank than the trunk's, "tied" the same where head and embedding are one matrix."""
    if request.param in (0, "tied"):
        born = (1, Generation("s1", 1, delta_rank=2, rank=1), Generation("s2", 1, rank=3))
        model = make_model("labelled_bundles", born, model={"tie_embeddings": request.param == "tied"})
        fill_changes(model)
        return model
    num = request.param
    born = (num, Generation("s1", num, delta_rank=2), Generation("s2", num, delta_rank=3))
    model = make_model("labelled_bundles", born)
    state = model.state_dict()
    for name, tensor in state.items():
        head, _, rest = name.partition(".experts.")
        number, _, matrix = rest.partition(".")
        if rest:
            tensor.copy_(state[f"{head}.experts.{int(number) % num}.{matrix}"])
        elif ".router.rows." in name:
            tensor.copy_(state[name[:-1] + "0"])
    return model


def written(model: LanguageModel, generation: int, root: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    base, change = root / "base", root / "change"
    base.mkdir()
    change.mkdir()
    config = write_folder(source(model, dtype), 0, base)
    adapter.require_adapter(model.architecture, generation)
    adapter.require_only_low_rank(source(model, dtype), generation)
    adapter.write_adapter(source(model, dtype), generation, config, str(base), change)
    return base, change


def ids_of() -> Tensor:
    return torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("generation", [1, 2])
def test_an_adapter_is_the_generation_s_change_of_the_base(
    low_rank: LanguageModel, tmp_path: Path, generation: int
) -> None:
    base, change = written(low_rank, generation, tmp_path)
    settings = json.loads((change / "adapter_config.json").read_text())
    factors = load_file(change / "adapter_model.safetensors")
    assert settings["r"] == settings["lora_alpha"] == generation + 1 and settings["peft_type"] == "LORA"
    born = low_rank.architecture.generations[generation]
    trunk = ["embed_tokens", "k_proj", "lm_head", "o_proj", "q_proj", "v_proj"] if born.delta_rank else []
    network = ["down_proj", "gate_proj", "up_proj"] if born.rank else []
    assert settings["target_modules"] == sorted(trunk + network)
    # By hand, from PEFT's definition: W + B A alpha / r.
    weights = load_file(base / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj" if trunk else "model.layers.1.mlp.up_proj"
    a, b = (factors[f"base_model.model.{name}.lora_{one}.weight"] for one in "AB")
    assert a.shape == (settings["r"], 16) and b.shape == (8, settings["r"])
    layer: Any = low_rank.blocks[1]
    expected = layer.attention.key.weight_of(generation) if trunk else layer.moe.banks.matrices()[2][0][8:]
    torch.testing.assert_close(weights[f"{name}.weight"] + b @ a, expected, atol=1e-6, rtol=0)
    with read_by_transformers(base) as theirs:
        adapter.apply_adapter(theirs, change)
        agreement = compare(low_rank, generation, theirs, [0, 1])
    assert agreement.difference < 1e-5 and agreement.ours == agreement.theirs


@pytest.mark.parametrize("generation", [1, 2])
def test_an_adapter_in_halves_is_added_in_float32(low_rank: LanguageModel, tmp_path: Path, generation: int) -> None:
    low_rank.load_state_dict(source(low_rank, torch.bfloat16).tensors)
    base, change = written(low_rank, generation, tmp_path, torch.bfloat16)
    assert {t.dtype for t in load_file(change / "adapter_model.safetensors").values()} == {torch.bfloat16}
    with read_by_transformers(base) as theirs:
        adapter.apply_adapter(theirs, change)
        assert compare(low_rank, generation, theirs, [0, 1]).difference < 1e-5


# It asks for what a later version of transformers calls otherwise, and says that tied matrices are not to be merged.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("generation", [1, 2])
def test_peft_loads_it(low_rank: LanguageModel, tmp_path: Path, generation: int) -> None:
    peft: Any = pytest.importorskip("peft", reason="peft belongs to the extra `dev`")
    base, change = written(low_rank, generation, tmp_path)
    with read_by_transformers(base) as theirs, torch.no_grad():
        tuned = peft.PeftModel.from_pretrained(theirs, change)
        expected = logits(low_rank, ids_of(), generation)
        torch.testing.assert_close(tuned(ids_of()).logits, expected, atol=1e-5, rtol=0)
        assert not torch.allclose(logits(low_rank, ids_of(), 0), expected, atol=1e-3)


def test_what_is_no_adapter(make_model: Make, low_rank: LanguageModel) -> None:
    born = (2, Generation("s1", 2, delta_rank=2), Generation("s2", 3, delta_rank=2), Generation("s3", 2))
    model = make_model("labelled_bundles", born)
    for generation, message in (
        (0, "the first generation is what adapters are for"),
        (2, "generation s2 has experts of its own"),
        (3, "generation s3 has no low-rank changes"),
    ):
        with pytest.raises(ConfigError, match=message):
            adapter.require_adapter(model.architecture, generation)
    with pytest.raises(ConfigError, match="generation s1 has experts of its own"):
        adapter.require_only_low_rank(source(model), 1)
    born = (1, Generation("s1", 2, rank=2))
    with pytest.raises(ConfigError, match=r"generation s1 routes each token .* or train it with grow\.experts=1"):
        adapter.require_adapter(make_model("labelled_bundles", born).architecture, 1)
    born = (2, Generation("s1", 1, rank=2))
    with pytest.raises(ConfigError, match="generation s1 has a low-rank expert of one expert among 2"):
        adapter.require_adapter(make_model("labelled_bundles", born).architecture, 1)
    born = (1, Generation("s1", 1, delta_rank=2), Generation("s2", 1, rank=2))
    tied = make_model("labelled_bundles", born, model={"tie_embeddings": True}).architecture
    (said,) = adapter.unread_adapter(tied, 1)
    assert "generation s1 changes each by itself: do not merge this adapter" in said
    assert not adapter.unread_adapter(tied, 2)
    if low_rank.architecture.generations[1].rank:
        return
    with torch.no_grad():
        last = dict(low_rank.named_parameters())["blocks.1.moe.banks.generations.1.down"]
        last[-1, -1, -1] += 1
    with pytest.raises(ConfigError, match="generation s1 has experts of its own"):
        adapter.require_only_low_rank(source(low_rank), 1)


def test_the_page_picks_as_the_model_does(make_model: Make, tmp_path: Path) -> None:
    vocab = TOKENIZER.vocab_size
    model = make_model("bundles", (2, 2, 2), routing={"margin": 1.0})
    clusters = model.document_clusters
    assert clusters is not None
    draw = np.random.default_rng(0)
    tensors = dict(model.state_dict())
    for i, text in enumerate(TEXTS[:3]):
        counts = np.bincount(TOKENIZER.encode(text), minlength=vocab) + 0.2 * draw.random((2, vocab))
        table = torch.from_numpy(np.log(counts / counts.sum(1, keepdims=True)).astype(np.float32))
        tensors[f"document_clusters.centroids_{i}"] = table
        setattr(clusters, f"centroids_{i}", table)
        folder = tmp_path / f"s{i}"
        folder.mkdir()
        (folder / "tokenizer.json").write_text(TOKENIZER.text)
    full = Source(model.architecture, tensors, [TOKENIZER.text], Kept({}.get))
    assert write_picker(full, ["s0", "s1", "s2"], tmp_path)
    picker, seen = Picker(tmp_path), set()
    for text in [*TEXTS, "", "a", f"{TEXTS[1]} {TEXTS[2]} {TEXTS[0]}", "wave def pear tide value self sail"]:
        ids = np.array([TOKENIZER.bos_id, *TOKENIZER.encode(text), 5])  # and one that is to come
        expected = clusters.domain_ids(ids)
        found = picker.chunks(text)
        assert found == [f"s{expected[at]}" for at in range(0, len(ids), model.architecture.routing.chunk_tokens)]
        seen |= {*found}
    assert seen == {"s0", "s1", "s2"}
    # By itself, where our packages cannot be imported.
    alone = "import sys, runpy; sys.modules.update(lifelong_moe=None, pipelines=None); del sys.argv[0]; "
    alone += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-I", "-c", alone, str(tmp_path / "pick.py"), TEXTS[1]]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert shown.stdout == "s1\n"


def test_labels_are_told_and_not_picked(make_model: Make, tmp_path: Path) -> None:
    assert not write_picker(source(make_model("labelled_bundles", (2, 2))), ["s0", "s1"], tmp_path)
    assert json.loads((tmp_path / "generations.json").read_text()) == {
        "folders": ["s0", "s1"],
        "labels": {"d0": "s0", "d1": "s1"},
    }
    assert [path.name for path in tmp_path.iterdir()] == ["generations.json"]


def test_rounding_grows_with_the_numbers_and_has_a_bound() -> None:
    assert [rounding(largest) for largest in (0.0, 1.0, 30.0, math.inf)] == pytest.approx([1e-4, 1e-4, 3e-4, 1e-2])
    assert not math.inf <= rounding(math.inf) and not math.nan <= rounding(math.nan)
