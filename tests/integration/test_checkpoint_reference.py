"""``model.store=reference``: a stage that holds where a checkpoint's numbers lie, and not the numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lifelong_moe.errors import CheckpointError, CorruptError
from lifelong_moe.interop.layout import place
from lifelong_moe.storage.keys import canonical_json
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.restore import load_model
from tests.checkpoints import config_of, made, write_checkpoint
from tests.hostile import _mend as mend
from tests.tiny import train, write_config

transformers = pytest.importorskip("transformers", reason="checkpoints are made by the extra `transformers`")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars of transformers."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Forget what configurations named, as another command does that is given none."""
    return lambda: monkeypatch.setattr(place, "_named", {})


def referring(**keys: Any) -> dict[str, Any]:
    config = config_of(bundles=True)
    config["model"] |= {"store": "reference"} | keys
    return config


def opened(name: str = "base") -> tuple[StageStore, Any]:
    """The store as a command opens it, and one of its stages."""
    store = StageStore(Path("mlruns"))
    (folder,) = Path("mlruns/stages").glob(f"{name}-*")
    return store, store.get(json.loads((folder / "config.json").read_text())["key"])


def base_files() -> dict[str, int]:
    (folder,) = Path("mlruns/stages").glob("base-*")
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def grown() -> bytes:
    """The weights of the stage that was trained."""
    (path,) = Path("mlruns/stages").glob("fruit-*/model.safetensors")
    return path.read_bytes()


@pytest.mark.parametrize("form", ["bfloat16", "shards", "fused"])
def test_a_reference_reads_as_a_copy_does(lab: Path, form: str) -> None:
    name = {"bfloat16": "llama_tied", "shards": "qwen2"}.get(form, "olmoe")
    write_checkpoint(name, dtype=torch.bfloat16 if form == "bfloat16" else torch.float32)
    keys = {"vocab_size": 304, "bos_token_id": 0, "max_position_embeddings": 64}
    if form == "shards":
        Path("ck/model.safetensors").unlink()
        made(name, **keys).save_pretrained("ck", max_shard_size="12KB")
    if form == "fused":
        state = made(name, **keys).state_dict()
        tensors = {key: tensor.contiguous() for key, tensor in state.items()}
        tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()  # read as the others are
        save_file(tensors, "ck/model.safetensors")
    one = {"stages": [{"data": "fruit"}]}
    train(write_config(config_of(bundles=True) | one))
    store, stage = opened()
    copied, copy, after = store.tensors(stage), base_files(), grown()
    shutil.rmtree("mlruns")
    train(write_config(referring() | one))
    store, stage = opened()
    referred, reference = store.tensors(stage), base_files()
    assert copied.keys() == referred.keys()
    assert all(torch.equal(copied[key], referred[key]) for key in copied)
    assert {copied[key].dtype for key in copied} == {referred[key].dtype for key in copied}
    # The weights are no longer there, and the stages after it are the same to the byte.
    size = sum(path.stat().st_size for path in Path("ck").glob("*.safetensors"))
    assert copy["model.safetensors"] > 0.9 * size and reference["model.safetensors"] < 0.1 * size
    assert grown() == after


def test_a_folder_that_moved_is_named_and_one_that_changed_is_told(
    lab: Path, later: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint("llama")
    train(write_config(referring()))
    later()
    before = load_model(*opened("code")).state_dict()
    shutil.move("ck", "elsewhere")
    with pytest.raises(CheckpointError, match=r"model\.from=ck, .*, is not there any more\. Name the folder") as caught:
        load_model(*opened("code"))
    assert caught.value.exit_code == 2
    # By a configuration; by the environment, where no command is given one.
    assert "Nothing to train" in train("tiny.yaml", "model.from=elsewhere")[1]
    assert torch.equal(load_model(*opened("code")).state_dict()["norm.weight"], before["norm.weight"])
    later()
    monkeypatch.setenv(place.FOLDERS, f"mlruns:{lab / 'elsewhere'}")
    after = load_model(*opened("code")).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    data = bytearray(Path("elsewhere/model.safetensors").read_bytes())
    data[-1] ^= 1
    Path("elsewhere/model.safetensors").write_bytes(data)
    with pytest.raises(CorruptError, match=r"elsewhere/model\.safetensors: SHA-256 is .*, but .*/reference\.json says"):
        load_model(*opened("code"))
    Path("elsewhere/model.safetensors").write_bytes(data[:-2])
    with pytest.raises(CheckpointError, match="is not there any more"):
        load_model(*opened("code"))


def test_a_store_names_no_folder_elsewhere(
    lab: Path, later: Any, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor by a link: what lies outside of the working directory is read if the user names it."""
    outside = tmp_path_factory.mktemp("outside") / "ck"
    write_checkpoint("llama", str(outside))
    Path("link").symlink_to(outside)
    for name in (str(outside), "link"):
        shutil.rmtree("mlruns", ignore_errors=True)
        train(write_config(referring(**{"from": name}) | {"stages": [{"data": "fruit"}]}))  # its user names it
        later()
        with monkeypatch.context() as patched:
            patched.setattr("lifelong_moe.store.reference.verify_files", None)  # which opens them
            with pytest.raises(CheckpointError, match=r"lies outside of .*, and what a store names elsewhere"):
                load_model(*opened())
        with monkeypatch.context() as patched:
            patched.setenv(place.FOLDERS, str(outside))
            load_model(*opened())


def each(reference: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """A reference with something else of each tensor."""
    return reference | {"tensors": {name: one | change(one) for name, one in reference["tensors"].items()}}


CHANGES: dict[str, tuple[Any, str]] = {
    "another file": (
        lambda one: one | {"files": {"model.safetensors": one["files"]["model.safetensors"] | {"sha256": "0" * 64}}},
        "not those of the checkpoint that the stage's key names",
    ),
    "a file of another folder": (
        lambda one: one | {"files": {"../x": next(iter(one["files"].values()))}},
        "a name of letters",
    ),
    "no commit": (lambda one: one | {"revision": "../../x"}, "are no commit on the hub"),
    "too much": (
        lambda one: one | {"tensors": {f"{n}{i}": t for n, t in one["tensors"].items() for i in range(9)}},
        "tensors: more than the files hold",
    ),
    "beyond the end": (
        lambda one: each(one, lambda t: {"pieces": [piece | {"start": 10**9} for piece in t["pieces"]]}),
        "lies outside of model.safetensors",
    ),
    "before the beginning": (
        lambda one: each(one, lambda t: {"pieces": [piece | {"start": -8} for piece in t["pieces"]]}),
        "lies outside of model.safetensors",
    ),
    "no shape": (
        lambda one: each(one, lambda t: {"shape": [-1, -2]}),
        "has no such pieces",
    ),
    "nothing": (lambda one: one | {"tensors": {}}, "or nothing"),
}


@pytest.fixture(scope="module")
def store_of(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a stage that refers; to be copied."""
    from tests.tiny import write_corpora

    root = tmp_path_factory.mktemp("referring")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        write_corpora(root)
        write_checkpoint("llama")
        train(write_config(referring() | {"stages": [{"data": "fruit"}]}))
    return root


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_reference_may_not_say(
    store_of: Path, tmp_path: Path, later: Any, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    shutil.copytree(store_of, tmp_path / "lab")
    monkeypatch.chdir(tmp_path / "lab")
    later()
    load_model(*opened())
    (path,) = Path("mlruns/stages").glob("base-*/reference.json")
    make, message = CHANGES[change]
    path.write_text(canonical_json(make(json.loads(path.read_text()))))
    mend(path)
    with pytest.raises(CorruptError, match=message):
        load_model(*opened())


def test_a_secret_place_is_not_stored(lab: Path, later: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint("llama", "secret-place")
    monkeypatch.setenv("PLACE", "secret-place")
    train(write_config(referring(**{"from": "${oc.env:PLACE}"}) | {"stages": [{"data": "fruit"}]}))
    said = [path for path in Path("mlruns").rglob("*") if path.is_file() and b"secret-place" in path.read_bytes()]
    assert not said
    later()
    with pytest.raises(CheckpointError, match="Name the folder that holds them now"):
        load_model(*opened())
    monkeypatch.setenv(place.FOLDERS, "secret-place")
    load_model(*opened())
