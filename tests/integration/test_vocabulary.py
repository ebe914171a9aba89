"""Runs whose stages add tokens to the vocabulary: old text is read as it was, new text in fewer tokens."""

from __future__ import annotations

import io
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from lifelong_moe.config.load import read_config
from lifelong_moe.data.tokens.merges import add_tokens, pieces_of
from lifelong_moe.errors import ConfigError, CorruptError
from lifelong_moe.interop.layout.complete import with_checkpoint
from lifelong_moe.interop.layout.folder import read_checkpoint
from lifelong_moe.interop.pretrained import load_pretrained
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.retraining import load_retraining
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.training import preparation
from lifelong_moe.training.callbacks.progress import StepCheckpoint
from lifelong_moe.training.restore import load_model
from pipelines.export.export import export_run
from pipelines.inspect.evaluate import evaluate_text
from pipelines.inspect.generate import generate_text
from pipelines.inspect.inspect import inspect_stage
from pipelines.inspect.lineage import show_lineage
from pipelines.run.plan import plan
from pipelines.shared.options import ExportFormat, ExportRequest, InspectionRequest, SamplingOptions
from pipelines.shared.output import SafeConsole
from pipelines.versions.drop import drop
from tests.checkpoints import config_of, write_checkpoint
from tests.tiny import fork, hashes, kill_self, tiny_config, train, working_in, write_config, write_corpora

pytestmark = pytest.mark.xdist_group("vocabulary")  # one process trains what most of them copy

SILENT = Console(quiet=True)
NAMES = ("fruit", "code", "sea")
IDS = torch.randint(1, 300, (2, 32), generator=torch.Generator().manual_seed(1))


def growing(*adds: int, trunk: str = "deltas") -> dict[str, Any]:
    """A stage for each number of tokens that it adds, told apart by label."""
    config = tiny_config(NAMES[: len(adds)], routing={"bundles": "label"})
    config["model"]["document_mask"] = True
    config["stage_defaults"] |= {"trunk": {"train": trunk}, "distill": {"weight": 0.0}, "replay": {"fraction": 0.0}}
    config["stages"] = [{"data": name, "vocabulary": {"add": add}} for name, add in zip(NAMES, adds, strict=False)]
    return config


def committed() -> tuple[StageStore, list[CommittedStage]]:
    head, store = json.loads(Path("mlruns/runs/tiny/head.json").read_text()), StageStore(Path("mlruns"))
    return store, store.chain(head["stages"][-1])


@torch.no_grad()
def logits(model: LanguageModel, domain: int) -> Tensor:
    domains = torch.full_like(IDS, domain)
    return model.eval().head.logits(model(TokenBatch(IDS, domain_ids_BS=domains)).hidden_BSD, domains)[..., :300]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run whose second and third stage add 20 and 10 tokens, and its report; to be copied."""
    root = tmp_path_factory.mktemp("vocabulary") / "lab"
    root.mkdir()
    with working_in(root):
        write_corpora(root)
        report, _ = train(write_config(growing(0, 20, 10)))
    return root, report


@pytest.fixture
def run(trained: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The report of that run, a copy of which is the current directory."""
    shutil.copytree(trained[0], tmp_path / "lab")
    monkeypatch.chdir(tmp_path / "lab")
    return trained[1]


def test_what_an_old_generation_predicts_never_changes(run: dict[str, Any]) -> None:
    store, chain = committed()
    models = [load_model(store, stage) for stage in chain]
    assert [stage.architecture.num_tokens for stage in chain] == [300, 320, 330]
    for old, later in ((0, 1), (0, 2), (1, 2)):
        for domain in range(old + 1):
            assert torch.equal(logits(models[old], domain), logits(models[later], domain))
    # Rows of the loss matrix: a distribution's losses are the same, to the bit, until it is learned and ever after.
    for j, column in enumerate(zip(*run["loss_nats_per_token"], strict=True)):
        assert len(set(column[:j])) <= 1 and len(set(column[j:])) == 1
    assert run["loss_nats_per_token"][1][1] < run["loss_nats_per_token"][0][1] - 0.5
    # Old tensors are stored once.
    borrowed = store.holders(chain[2])
    assert borrowed["embedding.added.1"] == chain[1].key and "embedding.added.2" not in borrowed
    assert borrowed["head.weight"] == chain[0].key


def test_each_stage_s_tokenizer_goes_on_where_its_parent_s_ended(run: dict[str, Any]) -> None:
    store, chain = committed()
    tokenizers = store.tokenizers(chain[2])
    assert [one.vocab_size for one in tokenizers] == [300, 320, 330]
    assert [one.hash for one in tokenizers] == [stage.tokenizer.hash for stage in chain]
    assert [stage.spec.vocabulary and stage.spec.vocabulary.add for stage in chain] == [None, 20, 10]
    text = json.loads(Path("code.jsonl").read_text().splitlines()[3])["text"]
    lengths = [len(one.encode(text)) for one in tokenizers]
    assert lengths[1] < lengths[0] - 20
    assert [len(store.tokenizer(chain[2], label).encode(text)) for label in (None, *NAMES)] == [lengths[0], *lengths]
    assert "vocabulary" not in chain[0].spec.to_json()
    assert "tokens" not in str(chain[0].architecture.to_json()["generations"])


def test_before_it_trains_a_new_stage_reads_old_text_with_the_same_loss(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And new text with rows that are the means of those of its pieces."""
    seen: list[LanguageModel] = []
    prepare = preparation.grow

    def grow(model: LanguageModel, *rest: Any) -> int:
        before = logits(model, 0)
        ties = prepare(model, *rest)
        assert torch.equal(logits(model, 0), before)
        own, pieces = model.embedding.added["1"], rest[-1]
        assert torch.allclose(own, torch.stack([model.embedding.weight[ids].mean(dim=0) for ids in pieces]))
        seen.append(model)
        return ties

    monkeypatch.setattr(preparation, "grow", grow)
    train(write_config(growing(0, 20, trunk="frozen")))
    store, chain = committed()
    assert len(seen) == 1 and pieces_of(store.tokenizers(chain[1])[1], 300)
    # The rows of tokens that come in the text have been trained.
    assert not torch.equal(load_model(store, chain[1]).head.added["1"], torch.zeros(20, 32))


def test_losses_are_by_tokens_of_the_first_vocabulary(run: dict[str, Any]) -> None:
    """So that before and after a stage that adds tokens they compare, as bits per byte do."""
    for nats, bits in zip(run["loss_nats_per_token"], run["bits_per_byte"], strict=True):
        ratios = [a / b for a, b in zip(nats, bits, strict=True)]
        first = [a / b for a, b in zip(run["loss_nats_per_token"][0], run["bits_per_byte"][0], strict=True)]
        assert ratios == pytest.approx(first)


def test_commands_read_a_text_with_the_vocabulary_of_its_label(run: dict[str, Any]) -> None:
    found = {
        label: evaluate_text("tiny", None, "code.jsonl", label, SILENT) for label in (None, "fruit", "code", "sea")
    }
    assert found[None]["tokens"] == found["fruit"]["tokens"] > 1.2 * found["code"]["tokens"]
    assert found[None]["bits_per_byte"] == found["fruit"]["bits_per_byte"] > found["code"]["bits_per_byte"]
    assert found["sea"]["tokens"] <= found["code"]["tokens"]
    for label in ("fruit", "code"):
        written = generate_text("tiny", None, "def", SamplingOptions(max_new_tokens=20), SILENT, label=label)
        assert written["tokens"] and isinstance(written["text"], str)
    result: Any = inspect_stage("tiny", None, InspectionRequest(text="def return self", label="code"), SILENT)
    assert max(token["token_id"] for token in result["tokens"]) >= 300
    with pytest.raises(ConfigError, match=r"stages of it added tokens \(vocabulary\.add\).*inspect a --text"):
        inspect_stage("tiny", None, InspectionRequest(), SILENT)
    assert len({row["tokenizer"] for row in show_lineage("tiny", SILENT)["stages"]}) == 3


def test_an_old_generation_writes_no_new_token(run: dict[str, Any]) -> None:
    from lifelong_moe.model.sampling import sample

    store, chain = committed()
    model = load_model(store, chain[2])
    tokens: list[int] = []
    for label, most in (("fruit", 300), ("code", 320)):
        tokens = [t for seed in range(4) for t in sample(model, [3], max_new_tokens=40, temperature=3.0, top_p=1.0,
                                                         seed=seed, distribution=label)]  # fmt: skip
        assert max(tokens) < most
    assert any(t >= 300 for t in tokens)


def test_the_newest_stage_is_dropped_and_one_whose_tokens_others_read_is_not(run: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"stage code added tokens \(vocabulary\.add\), which later stages read"):
        drop("tiny", "code", SILENT, ungated=True)
    assert drop("tiny", "sea", SILENT)["key"] == committed()[1][1].key


def test_a_stage_without_tokens_is_dropped_from_between(lab: Path) -> None:
    train(write_config(growing(0, 0, 10)))
    made: Any = drop("tiny", "code", SILENT, ungated=True)
    store = StageStore(Path("mlruns"))
    stage, before = store.get(made["key"]), committed()[1][2]
    assert [one.tokens for one in stage.architecture.generations] == [0, 10]
    assert [one.vocab_size for one in store.tokenizers(stage)] == [300, 310]
    assert torch.equal(logits(load_model(store, stage), 1), logits(load_model(store, before), 2))
    assert store.tokenizer(stage, "sea").vocab_size == 310 and store.tokenizer(stage, "code").vocab_size == 300


def test_a_later_stage_adds_none_and_another_continues_a_generation(lab: Path) -> None:
    config = growing(0, 20, 0)
    config["stage_defaults"]["grow"]["frozen_weights"] = "int8"
    config["stages"].append({"data": "sea", "name": "more", "continues": "code", "grow": {"experts": 0}})
    report, _ = train(write_config(config))
    store, chain = committed()
    assert [stage.architecture.num_tokens for stage in chain] == [300, 320, 320, 320]
    # In memory they are not held in 8 bits.
    assert store.holders(chain[2])["embedding.added.1"] == chain[1].key
    # The label of the sea moves to the generation of the code, which trains on, its tokens' rows included.
    assert chain[3].architecture.label("sea") == 1 and "embedding.added.1" not in store.holders(chain[3])
    assert all(value is not None for row in report["loss_nats_per_token"] for value in row)
    assert "Nothing to train" in train("tiny.yaml")[1]


def test_a_tokenizer_in_the_store_that_is_another_is_refused(run: dict[str, Any]) -> None:
    store, chain = committed()
    first, second, _ = store.tokenizers(chain[2])
    other = add_tokens(first, [Path("sea.jsonl").read_text()], 20, 300)
    read = StageStore._text
    for text in (other.text, first.text):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StageStore, "_text", lambda self, stage, name, text=text:
                          text if stage.key == chain[1].key else read(self, stage, name))  # fmt: skip
            with pytest.raises(CorruptError, match="but stage code was trained with"):
                store.tokenizers(chain[2])
    assert store.tokenizers(chain[1])[1].hash == second.hash


def test_killed_and_continued_it_has_the_same_bits(lab: Path) -> None:
    config = growing(0, 20)
    config["model"]["tie_embeddings"] = True
    train(write_config(config))
    whole = hashes()
    shutil.rmtree("mlruns")

    def die_in_the_second_stage() -> None:
        end = StepCheckpoint.on_train_batch_end

        def on_train_batch_end(self: StepCheckpoint, trainer: Any, module: Any, *rest: Any) -> None:
            end(self, trainer, module, *rest)
            if (module.spec.name, trainer.global_step) == ("code", 6):
                kill_self()

        StepCheckpoint.on_train_batch_end = on_train_batch_end  # type: ignore[assignment]
        train()

    assert fork(die_in_the_second_stage).wait() == -signal.SIGKILL
    assert "code: continuing from step-0-00000004" in train()[1]
    assert hashes() == whole


def test_a_run_goes_on_when_its_text_is_gone(lab: Path) -> None:
    train(write_config(growing(0, 20)))
    for name in ("fruit", "code"):
        Path(f"{name}.jsonl").unlink()
    shutil.rmtree("data/cache")
    report, _ = train(write_config(growing(0, 20, 10)))
    _, chain = committed()
    assert [stage.architecture.num_tokens for stage in chain] == [300, 320, 330]
    assert all(value is not None for row in report["loss_nats_per_token"] for value in row)


def test_plan_tells_what_is_added(lab: Path) -> None:
    printed = io.StringIO()
    loaded = read_config(write_config(growing(0, 20)), [], with_checkpoint)
    result = plan(loaded, SafeConsole(printed, width=200))
    before, after = result["stages"]
    assert (before["tokens_added"], after["tokens_added"]) == (0, 20)
    none = plan(read_config(write_config(growing(0, 0)), [], with_checkpoint), SILENT)["stages"][1]
    assert after["parameters_added"] - none["parameters_added"] == 2 * 20 * 32
    assert after["parameters_trainable"] - none["parameters_trainable"] == 2 * 20 * 32
    assert after["active_flops"] > none["active_flops"] and after["memory"]["logits"] > none["memory"]["logits"]
    assert after["key"] != none["key"]
    assert "parameters" in printed.getvalue() and "and 20 tokens, trains" in printed.getvalue()
    assert "stages[1] adds 20 tokens to it" in printed.getvalue() and not Path("mlruns/stages").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages[0].vocabulary.add=5"], r"stages\[0\]\.vocabulary\.add=5: the first stage has a tokenizer of its own"),
        (["routing.bundles=cluster"], r"stages\[1\]\.vocabulary\.add=20: text of an old generation .*bundles=label"),
        (
            ["routing.bundles=none", "stage_defaults.trunk.train=frozen"],
            r"Set routing\.bundles=label, or routing\.mode",
        ),
        (["stages[1].grow.experts=0", "stage_defaults.trunk.train=frozen"], r"stages\[1\]\.grow\.experts above 0"),
        (
            ["stage_defaults.distill.weight=0.5", "stage_defaults.distill.text=new"],
            r"stages\[1\]\.distill\.weight=0\.5",
        ),
        (["stages[1].vocabulary.add=-1"], r"vocabulary\.add=-1 must not be negative"),
        (["stages[1].vocabulary.add=1000001"], r"vocabulary\.add=1000001 must be at most 1,000,000"),
    ],
)
def test_what_is_refused_at_once(lab: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(write_config(growing(0, 20)), overrides, with_checkpoint)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_retraining_is_refused_at_once(lab: Path) -> None:
    Path("retrain.yaml").write_text("base: tiny.yaml\n")
    write_config(growing(0, 20))
    with pytest.raises(ConfigError, match=r"stages\[1\]\.vocabulary\.add=20: retraining measures all text in one"):
        load_retraining("retrain.yaml")
    with pytest.raises(ConfigError, match=r"vocabulary\.add=5: retraining measures all text in one vocabulary"):
        load_retraining("retrain.yaml", ["stages[1].vocabulary.add=0", "when_growing={vocabulary: {add: 5}}"])


def test_other_methods_add_no_tokens(lab: Path) -> None:
    """As they take no other part of growth from a configuration, so that arms of a comparison share one."""
    train(write_config(growing(0, 20, trunk="frozen")), "method=sequential")
    assert [stage.architecture.num_tokens for stage in committed()[1]] == [300, 300]


@pytest.mark.parametrize(("name", "trunk"), [("llama_tied", "deltas"), ("llama_tied", "frozen"), ("mixtral", "deltas")])
def test_a_checkpoint_s_vocabulary_grows_beyond_its_padding(lab: Path, name: str, trunk: str) -> None:
    pytest.importorskip("transformers", reason="checkpoints are made by the extra `transformers`")
    write_checkpoint(name)
    config = config_of(bundles=True)
    config["stage_defaults"]["trunk"] = {"train": trunk}
    config["stages"] = [{"data": "fruit"}, {"data": "code", "vocabulary": {"add": 20}}]
    train(write_config(config))
    store, chain = committed()
    # 304 rows, of which 300 have a token: four rows of the checkpoint stay as they were.
    assert [one.vocab_size for one in store.tokenizers(chain[2])] == [300, 324]
    model = load_model(store, chain[2])
    assert torch.equal(logits(model, 0), logits(load_pretrained(read_checkpoint(Path("ck"))), 0))
    for generation, size in (("base", 304), ("fruit", 304), ("code", 324)):
        asked = ExportRequest(to=f"out-{generation}", generation=generation)
        (found,) = export_run("tiny", asked, SafeConsole(io.StringIO()))["exported"]
        assert found["difference"] < 1e-5 and found["ours"] == found["theirs"]
        assert json.loads(Path(f"out-{generation}/config.json").read_text())["vocab_size"] == size
        came = read_checkpoint(Path(f"out-{generation}"))
        assert came.vocabulary is not None and came.vocabulary.size == (324 if size == 324 else 300)
    # And back in: the same numbers for the same ids.
    again = load_pretrained(read_checkpoint(Path("out-code")))
    assert torch.allclose(logits(again, 0), logits(model, 2), atol=1e-5)
    with pytest.raises(ConfigError, match=r"--format=peft: generation code reads tokens added to the vocabulary"):
        export_run("tiny", ExportRequest(to="p", generation="code", format=ExportFormat.peft), SILENT)
