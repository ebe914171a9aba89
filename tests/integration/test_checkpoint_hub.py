"""``model.from`` with a model of the hub: fetched once at a commit, and then found in the hub's cache."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from lifelong_moe.config.load import LoadedConfig, read_config
from lifelong_moe.config.run import RunConfig
from lifelong_moe.errors import LifelongError
from lifelong_moe.interop.layout.complete import with_checkpoint
from lifelong_moe.training.imported import _unchanged
from tests.checkpoints import config_of, write_checkpoint
from tests.tiny import train, write_config

transformers = pytest.importorskip("transformers", reason="checkpoints are made by the extra `transformers`")
pytest.importorskip("huggingface_hub")

NAME, COMMIT = "owner/model", "0123456789abcdef" * 2 + "01234567"


class Hub:
    """A hub on this machine, with the part of its interface that ``snapshot_download`` uses."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        self.status = 200
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                path = self.path.partition("?")[0]
                hub.asked.append(path)
                if hub.status != 200:
                    return self.send(b"", body, hub.status)
                if path == f"/api/models/{NAME}/tree/{COMMIT}":
                    tree = [
                        {"type": "file", "path": one.name, "size": one.stat().st_size, "oid": one.name}
                        for one in folder.iterdir()
                    ]
                    return self.send(json.dumps(tree).encode(), body)
                wanted = folder / path.removeprefix(f"/{NAME}/resolve/{COMMIT}/")
                return self.send(wanted.read_bytes(), body) if wanted.is_file() else self.send(b"", body, 404)

            def send(self, data: bytes, body: bool, status: int = 200) -> None:
                self.send_response(status)
                self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hub(lab: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that has a checkpoint in shards, beside files of other kinds, and an empty cache."""
    from huggingface_hub import constants

    transformers.utils.logging.disable_progress_bar()
    write_checkpoint("llama", "theirs")
    whole = transformers.LlamaForCausalLM.from_pretrained("theirs")
    Path("theirs/model.safetensors").unlink()
    whole.save_pretrained("theirs", max_shard_size="12KB")
    Path("theirs/pytorch_model.bin").write_bytes(b"pickled")
    Path("theirs/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    found = Hub(lab / "theirs")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(lab / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between attempts
    yield found
    found.server.shutdown()
    found.server.server_close()
    transformers.utils.logging.enable_progress_bar()


def configured(**model: Any) -> str:
    config = config_of()
    config["model"] |= {"from": NAME, "revision": COMMIT} | model
    return write_config(config | {"stages": [{"data": "fruit"}]})


def read(**model: Any) -> LoadedConfig:
    return read_config(configured(**model), (), with_checkpoint)


def test_a_model_of_the_hub_is_fetched_once(hub: Hub) -> None:
    train(configured())
    fetched = {path.rsplit("/", 1)[-1] for path in hub.asked}
    assert len([name for name in fetched if name.endswith(".safetensors")]) > 2
    assert {"config.json", "tokenizer.json", "README.md", "model.safetensors.index.json"} <= fetched
    assert "pytorch_model.bin" not in fetched
    (stage,) = Path("mlruns/stages").glob("base-*")
    ours: dict[str, Tensor] = load_file(stage / "model.safetensors")
    assert len(ours) > 9 and (stage / "checkpoint-README.md").is_file()
    # The same files in a folder are the same model, and what is in the cache is not asked for.
    hub.asked.clear()
    assert "Nothing to train" in train("tiny.yaml")[1]
    assert "Nothing to train" in train("tiny.yaml", "model.from=theirs", "model.revision=null")[1]
    assert not hub.asked


def test_offline_the_cache_serves(hub: Hub, lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    # As earlier versions of the hub's library left it: without a list of what there is.
    folder = lab / f"cache/models--owner--model/snapshots/{COMMIT}"
    blobs = lab / "cache/models--owner--model/blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for path in Path("theirs").iterdir():
        shutil.copy(path, blobs / f"blob-{path.name}")
        (folder / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read().config.base.path == NAME and read().config.base.revision == COMMIT
    assert not hub.asked
    (blobs / "blob-config.json").unlink()
    with pytest.raises(LifelongError, match=r"config\.json: cannot be read: No such file") as caught:
        read()
    assert caught.value.exit_code == 2
    shutil.rmtree("cache")
    with pytest.raises(
        LifelongError,
        match=rf"^model\.from={NAME}@01234567: the model is not in the cache, and HF_HUB_OFFLINE forbids to fetch it",
    ) as caught:
        read()
    assert caught.value.exit_code == 2 and not hub.asked


@pytest.mark.parametrize(("status", "code"), [(503, 75), (429, 75), (0, 75), (404, 2)])
def test_what_the_hub_does_not_give(hub: Hub, status: int, code: int) -> None:
    hub.status = status
    if not status:  # nobody answers there
        hub.server.shutdown()
        hub.server.server_close()
    with pytest.raises(LifelongError, match=rf"^model\.from={NAME}@01234567: ") as caught:
        read()
    assert caught.value.exit_code == code and "\n" not in str(caught.value)
    assert not Path("mlruns").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"revision": None},
            r"model\.from=owner/model: no such folder; a model of the hub needs model\.revision",
        ),
        ({"revision": "main"}, r"model\.revision=main must be a commit of owner/model: 40 hexadecimal digits"),
        ({"revision": 7}, r"model\.revision=7 must be a commit"),
        ({"from": "theirs"}, r"model\.from=theirs is a folder here, and model\.revision=\d.* is of a model on the hub"),
        ({"from": "https://x.y/z"}, r"model\.from=https://x\.y/z is not OWNER/NAME of a model on the hub"),
        ({"from": "../owner/model"}, r"is not OWNER/NAME of a model on the hub"),
    ],
)
def test_what_names_no_model(hub: Hub, model: dict[str, Any], message: str) -> None:
    with pytest.raises(LifelongError, match=message) as caught:
        read(**model)
    assert caught.value.exit_code == 2 and not hub.asked


def test_what_was_configured_before_asks_no_hub(hub: Hub) -> None:
    """A whole configuration, as MLflow and the store have it, is completed already."""
    config: RunConfig = read().config
    shutil.rmtree("cache")
    hub.asked.clear()
    with pytest.raises(LifelongError, match="not in the cache of models; a store's models are not fetched"):
        _unchanged(config.base)
    assert not hub.asked
    config.base.revision = "../main"
    with pytest.raises(LifelongError, match="are no commit on the hub"):
        config.base.__post_init__()
