"""Runs that begin with a checkpoint: it is generation 0, as it came, and stays so."""

from __future__ import annotations

import io
import json
import pickle
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lifelong_moe.config.data import TokenizerConfig
from lifelong_moe.config.load import read_config
from lifelong_moe.data.tokens.prepare import prepare_data
from lifelong_moe.data.tokens.tokenizer import Tokenizer
from lifelong_moe.errors import ConfigError, LifelongError
from lifelong_moe.interop.layout.complete import checkpoint_hash, with_checkpoint
from lifelong_moe.interop.layout.folder import read_checkpoint
from lifelong_moe.interop.pretrained import load_pretrained
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.retention import generated
from lifelong_moe.retention.generated import generate_blocks
from lifelong_moe.serving.pyfunc import _load_pyfunc
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.loop.module import StageModule
from lifelong_moe.training.restore import load_model
from pipelines.inspect.lineage import show_lineage
from pipelines.inspect.opening import check_label
from pipelines.inspect.trace import expert
from pipelines.run.plan import plan
from pipelines.shared.output import SafeConsole
from tests.checkpoints import config_of, made, write_checkpoint
from tests.known_stages import train_all_stages
from tests.retrain_lab import TOKENS, arrive, tick, write_retraining
from tests.tiny import STEPS, fork, hashes, kill_self, train, write_config

pytestmark = pytest.mark.usefixtures("known_stages")

transformers = pytest.importorskip("transformers", reason="checkpoints are made by the extra `transformers`")

IDS = torch.randint(1, 250, (2, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars of transformers."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def logits(model: LanguageModel, domain: int = 0) -> Tensor:
    domains = torch.full_like(IDS, domain)
    with torch.no_grad():
        batch = TokenBatch(IDS, domain_ids_BS=domains)
        return model.eval().head.logits(model(batch).hidden_BSD, domains)


@pytest.mark.parametrize(
    ("name", "trunk", "rank"),
    [
        ("llama_tied", "deltas", 0),
        ("llama_tied", "deltas", 2),
        ("llama_tied", "frozen", 0),
        ("qwen2", "frozen", 0),
        ("mixtral", "frozen", 0),
        ("mixtral", "frozen", 2),
        ("qwen3_moe_some_dense", "frozen", 2),
    ],
)
def test_generation_0_keeps_the_bits_of_the_checkpoint(
    lab: Path, monkeypatch: pytest.MonkeyPatch, name: str, trunk: str, rank: int
) -> None:
    train_all_stages(monkeypatch)
    write_checkpoint(name)
    config = config_of(bundles=True)
    config["stage_defaults"]["trunk"] = {"train": trunk}
    config["stage_defaults"]["grow"]["rank"] = rank
    report, _ = train(write_config(config))
    assert [stage["name"] for stage in report["stages"]] == ["fruit", "code"]
    head = json.loads(Path("mlruns/runs/tiny/head.json").read_text())
    store = StageStore(Path("mlruns"))
    chain = store.chain(head["stages"][-1])
    assert [stage.name for stage in chain] == ["base", "fruit", "code"]
    theirs, ours = load_pretrained(read_checkpoint(Path("ck"))), load_model(store, chain[-1])
    assert torch.equal(logits(ours), logits(theirs))
    assert not torch.equal(logits(ours, 1), logits(theirs))
    # Text that no stage has learned is evaluated by the checkpoint, before anything trains and afterwards.
    assert report["loss_nats_per_token"][0][1] == report["loss_at_init"][1]
    assert store.holders(chain[-1])["embedding.weight"] == chain[0].key  # stored once
    assert "Nothing to train" in train("tiny.yaml")[1]


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", ["llama", "olmoe"])
def test_without_bundles_a_checkpoint_grows_and_is_distilled(lab: Path, name: str, rank: int) -> None:
    write_checkpoint(name)
    report, _ = train(write_config(config_of()), f"stage_defaults.grow.rank={rank}")
    assert [stage["experts_per_layer"] for stage in report["stages"]] == ([4, 7] if name == "llama" else [9, 12])


def clustered(rank: int = 0) -> dict[str, Any]:
    """Bundles that are told apart by text, of which the checkpoint writes its own."""
    config = config_of(bundles=True)
    config["routing"] = {"bundles": "cluster", "sample_tokens": 1_024, "chunk_tokens": 8}
    config["stage_defaults"]["grow"]["rank"] = rank
    return config


def test_a_checkpoint_s_text_is_recognized_by_what_it_writes(lab: Path) -> None:
    write_checkpoint("llama")
    report, _ = train(write_config(clustered(rank=2)))
    store = StageStore(Path("mlruns"))
    head = json.loads(Path("mlruns/runs/tiny/head.json").read_text())
    chain, fitted = store.chain(head["stages"][-1]), store.get(head["centroids"])
    assert fitted.parent == chain[0].key and fitted.derived is not None and not fitted.data
    assert (fitted.derived["written_tokens"], fitted.derived["seed"]) == (1_024, 0)
    # Its files end a text with another token than the one that begins a document.
    assert fitted.derived["text_ends"] == [2] and list(chain[0].spec.text_ends) == [2]
    model = load_model(store, chain[-1])
    assert model.document_clusters is not None
    assert torch.equal(store.tensors(fitted)["document_clusters.centroids_0"], model.document_clusters.centroids_0)
    assert torch.equal(logits(model), logits(load_pretrained(read_checkpoint(Path("ck")))))
    # Nothing but a document's first chunk goes to the checkpoint; text that it writes does.
    tokenizer = store.tokenizer(chain[0])
    for number, name in enumerate(("fruit", "code"), start=1):
        line = json.loads(Path(f"{name}.jsonl").read_text().splitlines()[3])["text"]
        ids = np.array([0, *tokenizer.encode(line)])
        assert set(model.document_clusters.domain_ids(ids)[8:].tolist()) == {number}
    (written,) = generate_blocks(load_model(store, chain[0]), 1, context=32, seed=5)
    assert (model.document_clusters.domain_ids(written) == 0).mean() > 0.9
    assert report["loss_nats_per_token"][0][1] is not None


def test_what_a_checkpoint_writes_is_a_function_of_the_seed_also_after_a_kill(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_all_stages(monkeypatch)
    write_checkpoint("llama")
    write_config(clustered())
    train()
    whole, keys = hashes(), json.loads(Path("mlruns/runs/tiny/head.json").read_text())["stages"]
    shutil.rmtree("mlruns")
    draws, draw = iter(range(10**6)), generated.sample_tokens

    def die(*args: Any) -> Tensor:
        if next(draws) == 20:
            kill_self()
        return draw(*args)

    with monkeypatch.context() as patched:
        patched.setattr(generated, "sample_tokens", die)
        assert fork(train).wait() == -signal.SIGKILL
    assert [path.name[:4] for path in Path("mlruns/stages").iterdir() if path.is_dir()] == ["base"]
    # The text of the distributions says nothing of the checkpoint's own.
    train("tiny.yaml", "stages=[{data: code}]", "run=other")
    fitted = json.loads(Path("mlruns/runs/other/head.json").read_text())["centroids"]
    train()
    assert hashes() == whole and json.loads(Path("mlruns/runs/tiny/head.json").read_text())["centroids"] == fitted
    # The number of tokens is the user's, and belongs to the stages that it changes.
    train("tiny.yaml", "run=more", "routing.sample_tokens=2048")
    assert not set(json.loads(Path("mlruns/runs/more/head.json").read_text())["stages"]) & set(keys)


def test_a_checkpoint_writes_the_text_that_it_is_replayed(lab: Path) -> None:
    write_checkpoint("llama")
    config = config_of()
    config["stage_defaults"] |= {"replay": {"fraction": 0.25}, "distill": {"text": "replay", "weight": 1.0}}
    _, printed = train(write_config(config))
    assert (
        "stages[0] (fruit): replay, distillation on replayed text: off, because no text of the checkpoint is here"
        in (" ".join(printed.split()))
    )
    config["stage_defaults"]["replay"]["source"] = "generated"
    _, printed = train(write_config(config), replace=True)
    assert "off, because" not in printed
    head = json.loads(Path("mlruns/runs/tiny/head.json").read_text())
    first = StageStore(Path("mlruns")).get(head["stages"][0])
    assert first.spec.replayed == ("base",) and first.spec.distill is not None and first.metrics["active_flops"] > 0
    assert first.spec.text_ends == (2,)


@pytest.mark.parametrize(("at", "rank"), [(2, 0), (STEPS + 3, 0), (STEPS + 6, 2)])
def test_a_killed_run_goes_on_bit_for_bit(lab: Path, monkeypatch: pytest.MonkeyPatch, at: int, rank: int) -> None:
    train_all_stages(monkeypatch)
    write_checkpoint("llama")
    config = config_of()
    config["stage_defaults"]["grow"]["rank"] = rank
    write_config(config)
    train()
    whole = hashes()
    shutil.rmtree("mlruns")
    steps, step = iter(range(10**6)), StageModule.on_before_optimizer_step

    def die(self: StageModule, *args: Any) -> None:
        if next(steps) == at:
            kill_self()
        step(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(StageModule, "on_before_optimizer_step", die)
        assert fork(train).wait() == -signal.SIGKILL
    train()
    assert hashes() == whole


def test_halves_are_stored_as_they_came_and_continued(lab: Path) -> None:
    write_checkpoint("llama", dtype=torch.bfloat16)
    train(write_config(config_of(bundles=True)))
    (stored,) = Path("mlruns/stages").glob("base-*/model.safetensors")
    with safe_open(stored, "pt") as file:
        assert {str(file.get_slice(name).get_dtype()) for name in file.keys()} == {"BF16"}  # noqa: SIM118
    store = StageStore(Path("mlruns"))
    chain = store.chain(json.loads(Path("mlruns/runs/tiny/head.json").read_text())["stages"][-1])
    assert store.holders(chain[-1])["embedding.weight"] == chain[0].key
    theirs = load_pretrained(read_checkpoint(Path("ck"))).float()
    assert torch.equal(logits(load_model(store, chain[-1])), logits(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("frozen_weights", ["full", "int8"])
def test_training_in_bf16_leaves_the_checkpoint_in_its_own_numbers(
    lab: Path, dtype: torch.dtype, frozen_weights: str
) -> None:
    write_checkpoint("llama", dtype=dtype)
    config = config_of(bundles=True)
    config["trainer"]["precision"] = "bf16-true"
    config["stage_defaults"]["grow"]["frozen_weights"] = frozen_weights
    train(write_config(config))
    store = StageStore(Path("mlruns"))
    chain = store.chain(json.loads(Path("mlruns/runs/tiny/head.json").read_text())["stages"][-1])
    holders, tensors = store.holders(chain[-1]), store.tensors(chain[-1])
    theirs = load_pretrained(read_checkpoint(Path("ck")))
    assert all(torch.equal(tensors[n], t) for n, t in theirs.state_dict().items() if holders[n] == chain[0].key)
    assert holders["embedding.weight"] == holders["norm.weight"] == chain[0].key
    assert torch.equal(logits(load_model(store, chain[-1])), logits(theirs.float()))
    assert {tensors[n].dtype for n, key in holders.items() if key != chain[0].key} == {torch.bfloat16}


def test_a_checkpoint_is_known_by_its_numbers_and_not_by_its_place(lab: Path) -> None:
    write_checkpoint("llama")
    train(write_config(config_of(bundles=True)))
    before = hashes()
    shutil.move("ck", "elsewhere")
    with pytest.raises(LifelongError, match="ck: no such folder"):
        train("tiny.yaml")
    assert "Nothing to train" in train("tiny.yaml", "model.from=elsewhere")[1] and hashes() == before
    weights = load_file("elsewhere/model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, "elsewhere/model.safetensors")
    with pytest.raises(LifelongError, match=r"run=tiny exists with another configuration"):
        train("tiny.yaml", "model.from=elsewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["model.from=3"], r"model\.from=3 must be the folder"),
        (["model.width=32"], r"model\.width=32 differs from model\.from, which has 24; leave it out"),
        (["model.shared_experts=1"], r"model\.shared_experts=1 differs from model\.from, which has 0"),
        (["model.window=4"], r"model\.window=4 is nothing that the checkpoint of model\.from has"),
        (["model.context=128"], r"model\.context=128 is above the 64 of ck"),
        (["routing.top_k=2"], r"routing\.top_k=2 differs from model\.from, which has 3"),
        (["routing.mode=hash"], r"routing\.mode=hash differs from model\.from, which has learned"),
        (["routing.gate_scale=2.0"], r"needs routing\.mode=learned with score=softmax and gate_scale=1"),
        (
            ["routing={bundles: cluster, sample_tokens: 250}", "model.document_mask=true"],
            r"routing\.sample_tokens=250 are 7 documents .*, and 8 clusters need as many\. Set it to 256 or more",
        ),
        (["method=joint"], r"method=joint begins with random weights"),
        (["stages[0].name=base"], r"stages\[0\]\.name=base is the name of the checkpoint's experts"),
        (["base={path: ck}"], r"base stands beside model\.from, which fills it in; leave it out"),
        (["tokenizer.from=ck"], r"tokenizer\.from=ck must be model"),
    ],
)
def test_what_does_not_go_with_a_checkpoint(lab: Path, change: list[str], message: str) -> None:
    write_checkpoint("olmoe")
    with pytest.raises(LifelongError, match=message) as caught:
        train(write_config(config_of()), *change)
    assert caught.value.exit_code == 2 and not Path("mlruns").exists()


def test_numbers_that_are_refused_are_found_before_anything_is_written(lab: Path) -> None:
    write_checkpoint("olmoe")
    config = write_config(config_of())
    weights = load_file("ck/model.safetensors")
    whole = weights["model.norm.weight"].clone()
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, "ck/model.safetensors")
    quiet = SafeConsole(io.StringIO())
    for command in (lambda: train(config), lambda: plan(read_config(config, (), with_checkpoint), quiet)):
        with pytest.raises(LifelongError, match=r"model\.norm\.weight holds a number that is not finite") as caught:
            command()
        assert caught.value.exit_code == 2 and not Path("mlruns").exists() and not Path("data").exists()
    save_file(weights | {"model.norm.weight": whole}, "ck/model.safetensors")
    assert train(config)[0]["stages"]


@pytest.mark.parametrize("value", ["x", "\x1b[31m", ["x"], 7, True, "${oc.env:ABSENT_HERE}", {"x": ["x"]}])
def test_no_section_beside_a_checkpoint_ends_in_a_traceback(lab: Path, value: object) -> None:
    write_checkpoint("olmoe")
    keys = ("model", "routing", "tokenizer", "base", "model.context", "model.revision", "model.store", "routing.mode")
    for key in keys:
        config = config_of()
        section, _, name = key.partition(".")
        if name:
            config[section][name] = value
        else:
            config[section] = value
        with pytest.raises(LifelongError) as refused:
            read_config(write_config(config), [], with_checkpoint)
        assert "\n" not in str(refused.value)


def test_a_plan_says_what_comes_in_and_what_stages_add(lab: Path) -> None:
    write_checkpoint("llama_tied", dtype=torch.bfloat16)
    config = config_of(bundles=True)
    config["stage_defaults"]["grow"]["rank"] = 2
    out = io.StringIO()
    found = plan(read_config(write_config(config), (), with_checkpoint), SafeConsole(out, width=300))
    theirs = sum(p.numel() for p in made("llama_tied", vocab_size=304, max_position_embeddings=64).parameters())
    came, (first, second) = found["from"], found["stages"]
    rows = 3 * 24  # of the router, which a dense checkpoint does not have
    assert came["parameters"] == theirs + rows and came["bytes"] == 2 * theirs and came["context"] == 64
    # Three layers; three experts of three matrices of 24 by 20; and a row each.
    new = 3 * 3 * (3 * 2 * (24 + 20) + 24)
    assert first["parameters_added"] == second["parameters_added"] == first["parameters_trainable"] == new
    assert first["parameters_frozen"] == came["parameters"]
    assert sum(first["memory"].values()) == first["memory_bytes"]
    lines = out.getvalue().splitlines()
    what = f"ck: LlamaForCausalLM, {came['parameters'] / 1e6:.2f}M parameters, bfloat16 ({2 * theirs / 1e6:.1f} MB)"
    assert f"{what}, vocabulary 304, context 64 (32 here)" in lines
    (line,) = [one for one in lines if one.startswith("code: adds")]
    share = new / (came["parameters"] + new)
    assert line.startswith(f"code: adds 0.00M parameters ({share:+.1%}), trains 0.00M, freezes 0.02M; holds at least")


def test_another_beginning_of_documents_is_told(lab: Path) -> None:
    write_checkpoint("llama")
    write_config(config_of())
    assert "by the files of" not in train("tiny.yaml", "stages=[{data: fruit}]")[1]
    keys = json.loads(Path("ck/config.json").read_text())
    Path("ck/config.json").write_text(json.dumps(keys | {"bos_token_id": 7}))
    _, printed = train("tiny.yaml", "stages=[{data: fruit}]", replace=True)
    assert "documents begin with token 0 of the tokenizer, and with 7 by the files of ck" in " ".join(printed.split())


def test_documents_begin_with_what_the_files_say(lab: Path) -> None:
    write_checkpoint("llama")
    usual = Tokenizer.load(Path("ck/tokenizer.json"))
    content = json.loads(Path("ck/tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 300, "content": "<|start|>"})
    Path("ck/tokenizer.json").write_text(json.dumps(content))
    Path("ck/tokenizer_config.json").write_text(json.dumps({"bos_token": "<|start|>"}))
    write_config(config_of(bundles=True) | {"stages": [{"data": "fruit"}]})
    _, printed = train("tiny.yaml", "tokenizer.bos=<|bos|>", "run=other")
    said = " ".join(printed.split())
    assert "documents begin with token 0 (<|bos|>)" in said and "and with 300 by the files of ck" in said
    _, printed = train()
    said = " ".join(printed.split())
    assert "documents begin with token 300 (<|start|>)" in said and "by the files of" not in said
    store = StageStore(Path("mlruns"))
    stage = store.get(json.loads(Path("mlruns/runs/tiny/head.json").read_text())["stages"][-1])
    tokenizer = store.tokenizer(stage)
    assert stage.architecture.bos_id == tokenizer.bos_id == 300 and tokenizer.encode("<|start|>")[0] != 300
    assert pickle.loads(pickle.dumps(tokenizer)).bos_id == 300
    # The tokens of both are on disk side by side.
    read = read_config("tiny.yaml", (), with_checkpoint).config
    for bos, first in (("<|bos|>", 0), ("<|start|>", 300)):
        found = prepare_data(
            read.distributions, TokenizerConfig(file="ck/tokenizer.json", bos=bos), ["fruit"], 32, Path("data/cache")
        )
        assert {int(found.corpora["fruit"].train.document(i)[0]) for i in range(3)} == {first}
    assert usual.bos_id == 0


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"bos": "<s>"}, r"tokenizer\.bos=<s> is no special token; there are <\|bos\|>"),
        ({"bos": "a"}, r"tokenizer\.bos=a is no special token"),
    ],
)
def test_what_cannot_begin_a_document(lab: Path, tokenizer: dict[str, str], message: str) -> None:
    write_checkpoint("llama")
    with pytest.raises(LifelongError, match=message) as caught:
        train(write_config(config_of() | {"tokenizer": tokenizer}))
    assert caught.value.exit_code == 2 and not Path("mlruns/runs").exists()


def test_a_tokenizer_has_to_be_there_or_named(lab: Path) -> None:
    write_checkpoint("llama")
    shutil.move("ck/tokenizer.json", "other.json")
    with pytest.raises(LifelongError, match=r"ck has no tokenizer\.json; name one by tokenizer\.file"):
        train(write_config(config_of()))
    train("tiny.yaml", "tokenizer.file=other.json", "stages=[{data: fruit}]")


def test_a_stage_is_averaged_with_the_checkpoint(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a kill, and as a stage of another key than without."""
    train_all_stages(monkeypatch)
    write_checkpoint("llama")
    config = config_of() | {"stages": [{"data": "fruit"}]}
    config["stage_defaults"] |= {"grow": {"experts": 0}, "trunk": {"train": "full"}, "distill": {"weight": 0.0}}
    write_config(config)
    tensors = {}
    for share in (0.0, 0.5):
        train("tiny.yaml", f"stage_defaults.average={share}", f"run=r{share}")
        store = StageStore(Path("mlruns"))
        chain = store.chain(json.loads(Path(f"mlruns/runs/r{share}/head.json").read_text())["stages"][0])
        tensors[share] = store.tensors(chain[-1])
    before = store.tensors(chain[0])
    assert any(not torch.equal(tensors[0.0][name], before[name]) for name in before)
    for name, old in before.items():
        torch.testing.assert_close(tensors[0.5][name], (tensors[0.0][name] + old) / 2, atol=1e-7, rtol=0)
    whole = hashes(run_name="r0.5")
    shutil.rmtree("mlruns")
    steps, step = iter(range(10**6)), StageModule.on_before_optimizer_step

    def die(self: StageModule, *args: Any) -> None:
        if next(steps) == STEPS - 2:
            kill_self()
        step(self, *args)

    def again() -> None:
        train("tiny.yaml", "stage_defaults.average=0.5", "run=r0.5")

    with monkeypatch.context() as patched:
        patched.setattr(StageModule, "on_before_optimizer_step", die)
        assert fork(again).wait() == -signal.SIGKILL
    again()
    assert hashes(run_name="r0.5") == whole


def test_lineage_begins_with_the_checkpoint(lab: Path) -> None:
    write_checkpoint("llama")
    train(write_config(config_of(bundles=True)))
    printed = io.StringIO()
    first, second, third = show_lineage("tiny", SafeConsole(printed, width=200))["stages"]
    assert (first["name"], first["parent"], first["data"]) == ("base", None, {}) and second["parent"] == first["key"]
    sha256 = checkpoint_hash(read_checkpoint(Path("ck")))
    assert first["checkpoint"] == {"architecture": "LlamaForCausalLM", "sha256": sha256}
    assert second["checkpoint"] is None is third["checkpoint"] and first["experts"] == "base/L0..2/E0"
    assert "LlamaForCausalLM" in printed.getvalue() and f"files {sha256[:12]}" in printed.getvalue()


def test_text_without_a_label_is_the_checkpoint_s(lab: Path) -> None:
    write_checkpoint("llama")
    train(write_config(config_of(bundles=True)))
    store = StageStore(Path("mlruns"))
    stage = store.get(json.loads(Path("mlruns/runs/tiny/head.json").read_text())["stages"][-1])
    printed = io.StringIO()
    check_label(stage, None, SafeConsole(printed, width=200))
    assert printed.getvalue().strip() == "no --label: routed as base; there are fruit, code"


def test_a_tick_goes_on_from_a_checkpoint_s_run(lab: Path) -> None:
    write_checkpoint("llama")
    config = config_of()
    config["stage_defaults"] |= {"tokens": TOKENS, "replay": {"fraction": 0.25}}
    config["evaluate"] = {"tokens": 2_000}
    train(write_config(config))
    write_retraining()
    Path("inbox").mkdir()
    arrive("sea")
    # Without bundles old text loses something and leaks, which is not the point here.
    outcome = tick("gate.tolerance=9", "gate.max_leak=1.0")
    assert outcome["outcome"] == "promoted", outcome
    chain = StageStore(Path("mlruns")).chain(outcome["champion"]["key"])
    assert [stage.name for stage in chain][:3] == ["base", "fruit", "code"] and len(chain) == 4


def test_the_stages_after_a_checkpoint_are_recorded(lab: Path, template: Path) -> None:
    from mlflow import MlflowClient

    write_checkpoint("llama")
    Path("mlruns").mkdir()
    shutil.copy(template, "mlruns/mlflow.db")
    report, _ = train(write_config(config_of(bundles=True) | {"tracking": {"enabled": True}}))
    client = MlflowClient(f"sqlite:///{Path('mlruns/mlflow.db').absolute()}")
    versions = sorted(client.search_model_versions("name = 'lifelong-moe.tiny'"), key=lambda one: int(one.version))
    assert [one.tags["stage_key"] for one in versions] == [stage["key"] for stage in report["stages"]]
    for version, title in zip(versions, ("Stage 0 fruit", "Stage 1 code"), strict=True):
        assert title in version.description
    runs = [client.get_run(version.run_id) for version in versions]
    assert [run.info.run_name for run in runs] == ["tiny · 0 fruit", "tiny · 1 code"]
    (run,) = [one for one in runs if one.data.params["stage"] == "2"]
    parent = run.data.tags["mlflow.parentRunId"]
    history = client.get_metric_history(parent, "heldout_bits_per_byte/code")
    assert [(point.step, point.value) for point in history][-1] == (1, report["bits_per_byte"][1][1])
    # All that the last stage needs: the checkpoint, and the two stages after it.
    (reference,) = Path("mlruns/artifacts").glob("*/artifacts/models/code-*/data/pointer.json")
    assert len(json.loads(reference.read_text())["manifests"]) == 3
    texts = ["1 apple", "def return"]
    losses = _load_pyfunc(str(reference.parent)).predict(pandas.DataFrame([[t] for t in texts]), {"output": "loss"})
    assert [0 < loss["nats_per_token"] < 12 for loss in losses] == [True, True]


def test_a_tick_trains_the_nearest_label_on_and_its_hook_exports_the_champion(
    lab: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint("llama")
    config = config_of(bundles=True)
    config["stage_defaults"]["grow"] |= {"experts": 2, "rank": 2}
    config["evaluate"] = {"tokens": 2_000}
    train(write_config(config))
    export = f"{shlex.quote(sys.executable)} -m pipelines.cli export tiny --generation code --to out --force"
    # As docs/scheduling.md has it.
    script = f'if grep -q "\\"outcome\\": \\"promoted\\""; then exec {export}; fi'
    write_retraining(stage={"tokens": TOKENS}, hooks={"command": ["sh", "-c", script], "seconds": 120})
    Path("inbox").mkdir()
    arrive("code")
    # All of it is read by the checkpoint's own experts, which never train on: it has no label yet.
    outcome = tick("gate.tolerance=9", "decision.min_structure=0.01")
    assert (outcome["outcome"], outcome["action"]) == ("promoted", "continue"), outcome
    stage = StageStore(Path("mlruns")).get(outcome["champion"]["key"])
    assert stage.spec.continues == "code" and dict(stage.architecture.labels)[stage.spec.data] == 2
    assert stage.key[:16] in Path("out/README.md").read_text(), capfd.readouterr().err


def test_only_generations_of_the_run_train_on(lab: Path) -> None:
    write_checkpoint("llama")
    config = config_of()
    config["stages"] = [{"data": "fruit", "grow": {"experts": 0}}, {"data": "code", "continues": "fruit"}]
    with pytest.raises(ConfigError, match=r"stages\[1\]\.continues=fruit is unknown"):
        train(write_config(config))


def test_a_checkpoint_s_experts_are_traced_as_imported(lab: Path) -> None:
    write_checkpoint("llama")
    train(write_config(config_of(bundles=True)))
    printed = io.StringIO()
    found = expert("tiny", "base/L1/E0", SafeConsole(printed, width=200))
    assert (found["born"]["began"], [one["tensors"] for one in found["stages"]]) == (
        "imported",
        ["imported", "borrowed", "borrowed"],
    )
    assert "from a checkpoint; initialized: imported" in printed.getvalue()
