"""Python's front: ``lifelong_moe.load``, ``report`` and ``run`` do what the commands do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

import lifelong_moe
from lifelong_moe.errors import ConfigError, CorruptError
from lifelong_moe.serving.model import StageModel
from pipelines.versions.drop import drop
from tests.tiny import CONTEXT, SEQUENCES, tiny_config, train, working_in, write_config, write_corpora

TEXT = "apple pear def return self apple plum"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages whose generations predict together."""
    root = tmp_path_factory.mktemp("load")
    with working_in(root):
        write_corpora(root)
        defaults = {
            "tokens": 8 * SEQUENCES * CONTEXT,
            "replay": {"fraction": 0.0},
            "distill": {"weight": 0.0},
            "trunk": {"train": "deltas", "rank": 4},
        }
        routing = {"bundles": "cluster", "chunk_tokens": 8}
        train(write_config(tiny_config(routing=routing, model={"document_mask": True}, stage_defaults=defaults)))
    return root


@pytest.fixture
def model(trained: Path, monkeypatch: pytest.MonkeyPatch) -> StageModel:
    monkeypatch.chdir(trained)
    return lifelong_moe.load("tiny")


def test_a_model_says_what_it_is(model: StageModel) -> None:
    assert repr(model).startswith("StageModel(code, ") and repr(model).endswith("generations: fruit, code)")
    assert "\n" not in repr(model)
    assert not model.model.training and not any(p.requires_grad for p in model.model.parameters())


def test_logits_losses_and_texts_agree(model: StageModel) -> None:
    ids = model.tokenizer().encode(TEXT)
    assert len(ids) > CONTEXT // 2
    logits = model.logits(ids)
    assert logits.shape == (len(ids) + 1, model.model.architecture.num_tokens)
    torch.testing.assert_close(logits.exp().sum(dim=-1), torch.ones(len(ids) + 1))
    nats = -logits[torch.arange(len(ids)), ids]
    found = model.loss(TEXT)
    assert (found.tokens, found.bytes) == (len(ids), len(TEXT.encode()))
    assert found.nats_per_token == pytest.approx(float(nats.mean()), rel=1e-5)
    # No row depends on what follows it.
    torch.testing.assert_close(model.logits(ids[:9]), logits[:10])
    prompt, greedy = "apple", list[int]()
    for _ in range(4):
        row = model.logits([*model.tokenizer().encode(prompt), *greedy])[-1]
        greedy.append(int(row[: model.model.tokenizer_size].argmax()))
    assert model.generate(prompt, max_new_tokens=4, temperature=0) == model.tokenizer().decode(greedy)


def test_experts_of_each_token(model: StageModel) -> None:
    seen = model.experts(TEXT)
    assert seen.token_ids_T.tolist() == model.tokenizer().encode(TEXT)
    assert [ids_TK.shape for ids_TK in seen.expert_ids] == [(len(seen), 1)] * 2
    assert seen.shares_TG is not None and seen.shares_TG.sum(axis=1) == pytest.approx(1)


def test_stages_and_versions_are_named(trained: Path, model: StageModel) -> None:
    first = lifelong_moe.load("tiny", "fruit", store=trained / "mlruns")
    assert repr(first).endswith("generations: fruit)") and first.loss(TEXT) != model.loss(TEXT)
    assert lifelong_moe.load("tiny", version="champion").stage.key == model.stage.key


@pytest.mark.usefixtures("model")
def test_versions_are_named(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    drop("tiny", "code", Console(quiet=True), ungated=True)
    names = [lifelong_moe.load("tiny", version=version).stage.name for version in (0, 1, "1", "champion")]
    assert names == ["code", "fruit", "fruit", "fruit"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"run": "none"}, "none"),
        ({"run": "tiny", "stage": "none"}, "no committed stage none; there are fruit, code"),
        ({"run": "tiny", "version": 7}, "no version 7"),
        ({"run": "tiny", "version": "best"}, "no version best"),
        ({"run": "tiny", "version": False}, "no version False"),
        ({"run": "tiny", "stage": "fruit", "version": 0}, "both name a model"),
    ],
)
@pytest.mark.usefixtures("model")
def test_what_is_not_there(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lifelong_moe.load(**arguments)  # type: ignore[arg-type]


def test_what_cannot_be_asked(model: StageModel) -> None:
    for ask in (model.loss, model.experts):
        with pytest.raises(ConfigError, match="without a character"):
            ask("")
    for token in (-1, model.model.architecture.num_tokens):
        with pytest.raises(ConfigError, match=f"token {token}: the model has tokens 0 to"):
            model.logits([1, token])
    with pytest.raises(ConfigError, match="label=fruit"):
        model.loss(TEXT, label="fruit")


def test_links_in_a_store_are_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "mlruns/runs").symlink_to(trained / "mlruns/runs")
    with pytest.raises(CorruptError, match="symbolic link"):
        lifelong_moe.load("tiny", store=tmp_path / "mlruns")


def test_the_package_has_a_version_and_nothing_else() -> None:
    assert lifelong_moe.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'none'"):
        _ = lifelong_moe.none


def test_a_report_is_data_frames(trained: Path) -> None:
    written = json.loads((trained / "mlruns/runs/tiny/report.json").read_text())
    found = lifelong_moe.report("tiny", store=trained / "mlruns")
    assert repr(found) == "RunTables(tiny: bits_per_byte, nats_per_token, stages, distributions)"
    for frame, key in ((found.bits_per_byte, "bits_per_byte"), (found.nats_per_token, "loss_nats_per_token")):
        assert list(frame.index) == ["(before)", "fruit", "code"] and list(frame.columns) == ["fruit", "code"]
        assert frame.iloc[1:].to_numpy().tolist() == written[key]
    assert found.bits_per_byte.iloc[0].tolist() == written["bits_per_byte_at_init"]
    assert found.stages.index.tolist() == ["fruit", "code"]
    assert found.stages["tokens"].tolist() == [stage["tokens"] for stage in written["stages"]]
    assert "training" not in found.stages.columns
    row = found.distributions.loc["fruit"]
    assert row["forgetting_bits_per_byte"] == written["forgetting_bits_per_byte"]["fruit"]
    assert row["final_bits_per_byte"] == written["bits_per_byte"][-1][0]
    # Nothing came after the last one that could be forgotten.
    assert found.distributions["forgetting_bits_per_byte"].isna().tolist() == [False, True]


def test_what_is_not_there_has_no_report(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run tinny does not exist under .*\. Did you mean tiny\?"):
        lifelong_moe.report("tinny", store=trained / "mlruns")
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "mlruns/x").symlink_to("/")
    with pytest.raises(CorruptError, match="a symbolic link"):
        lifelong_moe.report("tiny", store=tmp_path / "mlruns")


def test_a_run_in_python_is_that_of_the_command(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    before = {path.name for path in Path("mlruns/stages").iterdir()}
    again = lifelong_moe.run("tiny.yaml", quiet=True)
    assert capsys.readouterr().out == ""
    assert again.bits_per_byte.equals(lifelong_moe.report("tiny").bits_per_byte)
    content = yaml.safe_load(Path("tiny.yaml").read_text())
    # A file's content, and overrides; its stages are those that are there.
    other = lifelong_moe.run(content, "run=other")
    assert other.run == "other" and other.bits_per_byte.equals(again.bits_per_byte)
    assert "Nothing to train: all 2 stages of other are committed." in capsys.readouterr().out
    assert {path.name for path in Path("mlruns/stages").iterdir()} == before
    for config, more, message in (
        (content, "optim.lr=1", "key optim is unknown. Did you mean stage_defaults.optim.lr"),
        ({**content, "seed": "x"}, "run=y", "seed: Value 'x'"),
        ({"arms": {}}, "run=y", "config: has arms, so it is a file for lifelong-moe compare"),
        ({"run": object()}, "seed=1", "run: Value 'object' is not"),
        ("nosuch.yaml", "seed=1", "nosuch.yaml: no such file"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            lifelong_moe.run(config, more)
    with pytest.raises(ConfigError, match="or --replace"):
        lifelong_moe.run("tiny.yaml", "seed=1")


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, lifelong_moe\nassert dir(lifelong_moe) == ['__version__', 'load', 'report', 'run']\n"
        "lifelong_moe.report\nassert not {'torch', 'pandas', 'mlflow', 'lightning'} & set(sys.modules)\n"
        "lifelong_moe.run\nassert not {'torch', 'pandas', 'mlflow', 'lightning'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
