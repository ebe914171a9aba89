"""`lifelong-moe export`: runs that go out as checkpoints, and come in again."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lifelong_moe.data.tokens.pick import Picker
from lifelong_moe.errors import ConfigError, CorruptError
from lifelong_moe.interop.layout.folder import read_checkpoint
from lifelong_moe.storage.signing import PRIVATE, SigningKeys, fingerprint
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.restore import load_model
from pipelines.export import write as writing
from pipelines.export.export import export_run
from pipelines.shared.options import ExportFormat, ExportRequest
from pipelines.shared.output import SafeConsole
from tests.checkpoints import config_of, write_checkpoint
from tests.tiny import VOCABULARIES, fork, kill_self, tiny_config, train, working_in, write_config, write_corpora

pytestmark = pytest.mark.xdist_group("export")  # one process trains what most of them copy

transformers = pytest.importorskip("transformers", reason="both sides are compared with the extra `transformers`")


def exported(**asked: Any) -> tuple[Any, str]:
    """Export the run ``tiny`` to ``out``; returns the result and what was printed."""
    printed = io.StringIO()
    result = export_run("tiny", ExportRequest(**{"to": "out"} | asked), SafeConsole(printed, width=200))
    return json.loads(json.dumps(result)), printed.getvalue()


def files(folder: str) -> dict[str, bytes]:
    """All but the card, which tells of the run."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != "README.md"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that grew two generations on a dense checkpoint; to be copied."""
    root = tmp_path_factory.mktemp("bundled") / "lab"
    root.mkdir()
    return _trained(root, bundles=True)


def _trained(root: Path, **keys: Any) -> Path:
    with working_in(root):
        write_corpora(root)
        write_checkpoint("llama")
        Path("ck/README.md").write_text("---\nlicense: apache-2.0\n---\n")
        config = config_of(**keys)
        config["stage_defaults"]["trunk"] = {"train": "deltas", "rank": 2}
        train(write_config(config))
    return root


@pytest.fixture
def run(bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that to work in."""
    shutil.copytree(bundled, tmp_path / "lab")
    monkeypatch.chdir(tmp_path / "lab")
    return tmp_path / "lab"


def test_a_generation_goes_out_and_comes_in_again(run: Path) -> None:
    result, printed = exported(generation="base")
    (found,) = result["exported"]
    assert found["architecture"] == "LlamaForCausalLM" and found["difference"] < 1e-5
    assert found["ours"] == found["theirs"] and "largest difference of logits" in printed
    came, out = (load_file(f"{name}/model.safetensors") for name in ("ck", "out"))
    assert came.keys() == out.keys() and all(torch.equal(came[name], out[name]) for name in came)
    # The checkpoint's context, not the run's.
    assert read_checkpoint(Path("out")).model.context == 64
    card = Path("out/README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\nlicense: apache-2.0\n---")
    for said in ("| fruit | ", "Held-out loss", "licence of its card: apache-2.0", "AutoTokenizer.from_pretrained"):
        assert said in card
    config = config_of(bundles=True)
    config["model"]["from"] = "out"
    config["run"] = "second"
    train(write_config(config | {"stages": [{"data": "fruit"}]}))
    printed_too = io.StringIO()
    export_run("second", ExportRequest(to="again", generation="base"), SafeConsole(printed_too))
    assert files("again") == files("out")


def test_a_grown_generation_goes_out_with_its_changes_merged(run: Path) -> None:
    result, _ = exported(generation="code")
    (found,) = result["exported"]
    assert found["architecture"] == "MixtralForCausalLM" and found["difference"] < 1e-5
    assert result["warnings"] == [
        "llama.cpp cannot quantize rows that are no multiples of 32: hidden_size=24, intermediate_size=20, head_dim=4."
    ]
    # An earlier stage has the same generation, and fewer.
    exported(generation="fruit", to="now")
    exported(generation="fruit", to="then", stage="fruit")
    assert files("now") == files("then")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, r"Give --all, or --generation with one of base, fruit, code"),
        ({"generation": "sea"}, r"--generation=sea is unknown\. Give --all"),
        ({"generation": "code", "every": True}, r"--all and --generation exclude each other"),
        ({"generation": "code", "stage": "sea"}, r"no committed stage sea"),
        ({"generation": "code", "to": "a/b"}, r"--to=a/b: no such directory"),
        ({"generation": "code", "to": "mlruns/out"}, r"--to=mlruns/out lies in the store"),
        ({"generation": "code", "to": "ck"}, r"--to=ck: there is something else than an export"),
        ({"generation": "code", "to": "ck", "force": True}, r"--to=ck: there is something else than an export"),
        ({"generation": "code", "to": "tiny.yaml", "force": True}, r"there is something else than an export"),
    ],
)
def test_what_is_refused_before_anything_is_written(run: Path, asked: dict[str, Any], message: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    with pytest.raises(ConfigError, match=message):
        exported(**asked)
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


def test_force_replaces_an_export_and_nothing_else(run: Path) -> None:
    exported(generation="base")
    with pytest.raises(ConfigError, match=r"--to=out: there is an export; name another folder, or --force"):
        exported(generation="code")
    exported(generation="code", force=True)
    assert json.loads(Path("out/config.json").read_text())["model_type"] == "mixtral"
    Path("out/mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"there is something else than an export"):
        exported(generation="code", force=True)
    assert Path("out/mine.txt").read_text() == "mine"


def test_what_differs_is_not_left_there(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = writing.write_folder

    def damage(source: Any, generation: int | None, folder: Path) -> Any:
        config = write(source, generation, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][3] *= 1.001
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return config

    exported(generation="base")
    before = files("out")
    monkeypatch.setattr(writing, "write_folder", damage)
    with pytest.raises(CorruptError, match=r"logits of it that differ by up to \d.*It was removed") as caught:
        exported(generation="code", force=True)
    assert caught.value.exit_code == 7 and files("out") == before
    assert not [path for path in Path().iterdir() if path.name.startswith(".tmp")]


def test_without_transformers_nothing_is_compared_and_that_is_said(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "find_spec", lambda _: None)
    result, printed = exported(generation="base")
    assert result["exported"][0]["difference"] is None and "not compared: transformers is not installed" in printed
    assert "It was not compared" in Path("out/README.md").read_text()


def test_others_may_not_read_it(run: Path) -> None:
    before = os.umask(0o022)
    try:
        exported(generation="base")
    finally:
        os.umask(before)
    assert Path("out").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in Path("out").iterdir()} == {0o640}


def test_it_is_signed_beside_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("model_signing", reason="the extra signing is not installed")
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    key = ec.generate_private_key(ec.SECP256R1())
    Path("k").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    Path("k").chmod(0o600)
    Path("k.pub").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    monkeypatch.setenv(PRIVATE, "k")
    exported(every=True)
    keys = SigningKeys(public={fingerprint(key.public_key()): Path("k.pub")})
    keys.verify(Path("out"), Path("out.sig"))
    with Path("out/fruit/config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(CorruptError, match="not what"):
        keys.verify(Path("out"), Path("out.sig"))
    Path("another.sig").write_text("mine")
    with pytest.raises(ConfigError, match=r"there is a another\.sig; name another folder, or remove it"):
        exported(every=True, to="another")


def test_all_generations_go_out_in_folders(run: Path) -> None:
    result, _ = exported(every=True)
    assert [one["folder"] for one in result["exported"]] == ["base", "fruit", "code"]
    assert all(one["difference"] < 1e-5 for one in result["exported"])
    exported(every=True, force=True)
    exported(generation="code", to="one")
    assert {f"code/{name}": data for name, data in files("one").items()}.items() <= files("out").items()


def test_a_run_that_picks_goes_out_with_the_page_that_picks(lab: Path) -> None:
    config = tiny_config(
        model={"document_mask": True},
        routing={"top_k": 2, "renormalize": True, "bundles": "cluster", "chunk_tokens": 4, "clusters": 2},
    )
    config["stage_defaults"] |= {"trunk": {"train": "deltas", "rank": 2}, "replay": {"fraction": 0.0}}
    config["stage_defaults"]["distill"] = {"weight": 0.0}
    train(write_config(config))
    result, _ = exported(every=True)
    assert [(one["folder"], one["architecture"]) for one in result["exported"]] == [
        ("fruit", "MixtralForCausalLM"),
        ("code", "MixtralForCausalLM"),
    ]
    page = Path("out/README.md").read_text(encoding="utf-8")
    assert "`python pick.py TEXT`" in page and "| code | MixtralForCausalLM |" in page
    store = StageStore(Path("mlruns"))
    stage = store.get(json.loads(Path("mlruns/runs/tiny/head.json").read_text())["stages"][-1])
    clusters, tokenizer = load_model(store, stage).document_clusters, store.tokenizer(stage)
    assert clusters is not None
    picker, picked = Picker(Path("out")), []
    for words in VOCABULARIES.values():
        ids = np.array([tokenizer.bos_id, *tokenizer.encode(words), 1])
        picked.append(picker.pick(words))
        assert picked[-1] == ("fruit", "code")[clusters.domain_ids(ids)[-1]]
    assert picked[:2] == ["fruit", "code"]


def test_adapters_of_a_run(run: Path) -> None:
    before = {*Path().rglob("*")}
    with pytest.raises(ConfigError, match="generation fruit has experts of its own") as caught:
        exported(every=True, format=ExportFormat.peft)
    assert caught.value.exit_code == 2 and {*Path().rglob("*")} == before
    config = config_of(bundles=True)
    config |= {"run": "tiny", "stages": [{"data": "fruit"}]}
    config["routing"] |= {"top_k": 1, "renormalize": False}
    config["stage_defaults"]["grow"] |= {"experts": 1, "rank": 2}
    config["stage_defaults"]["trunk"] = {"train": "deltas", "rank": 3}
    train(write_config(config), replace=True)
    result, _ = exported(every=True, format=ExportFormat.peft)
    assert [one["base"] for one in result["exported"]] == [None, "out/base"]
    assert all(one["difference"] < 1e-5 for one in result["exported"])
    assert {path.name for path in Path("out/fruit").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    card = Path("out/fruit/README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card and 'PeftModel.from_pretrained(base, "out/fruit")' in card
    exported(generation="fruit", format=ExportFormat.peft, to="one")
    with pytest.raises(ConfigError, match="the first generation is what adapters are for"):
        exported(generation="base", format=ExportFormat.peft, to="two")


def test_a_killed_export_leaves_nothing_for_long(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".tmp-0123456789abcdef").mkdir()  # of somebody else, since no machine is named
    with monkeypatch.context() as patched:
        patched.setattr(writing, "write_card", lambda *args: kill_self())
        assert fork(lambda: exported(generation="base")).wait() == -signal.SIGKILL
    (left,) = Path().glob(".tmp-*@*")
    assert (left / "model.safetensors").is_file() and not Path("out").exists()
    with locked_directory(left):  # as one that is under way
        exported(generation="base")
    assert left.is_dir()
    exported(generation="base", force=True)
    assert [path.name for path in Path().glob(".tmp-*")] == [".tmp-0123456789abcdef"]


@contextmanager
def locked_directory(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)
