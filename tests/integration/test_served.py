"""A registered version is a model that MLflow loads and serves: it says what `generate` and `evaluate` say."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pandas
import pytest

from lifelong_moe.errors import ConfigError, CorruptError
from lifelong_moe.serving.pyfunc import RANGES, ServedStage, _load_pyfunc
from lifelong_moe.store.pointer import POINTER
from lifelong_moe.store.stages import StageStore
from lifelong_moe.tracking.model_files import LOADER, PARAMS
from pipelines.inspect.evaluate import evaluate_text
from pipelines.inspect.generate import generate_text
from pipelines.shared.options import SamplingOptions
from pipelines.shared.output import SafeConsole
from tests.tiny import tiny_config, train, write_config, write_corpora

pytestmark = pytest.mark.xdist_group("served")  # one process trains what all of them load

TEXTS = ["1 apple pear plum", "def return self value"]
PREDICT = """
import json, mlflow
model = mlflow.pyfunc.load_model("models:/lifelong-moe.tiny@champion")
print(json.dumps(model.predict({texts}, params={{"max_new_tokens": 6, "seed": 3, "label": "code"}})))
"""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, template: Path) -> Path:
    """A run with bundles by label, recorded in its store's own database."""
    root = tmp_path_factory.mktemp("served")
    (root / "mlruns").mkdir()
    shutil.copy(template, root / "mlruns/mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        write_corpora(root)
        config = tiny_config(tracking={"enabled": True}, model={"document_mask": True})
        config["routing"] |= {"bundles": "label"}
        off = {"replay": {"fraction": 0.0}, "distill": {"weight": 0.0}}
        config["stage_defaults"] |= {"trunk": {"train": "deltas"}, **off}
        train(write_config(config))
    return root


@pytest.fixture
def store(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to change; its database still says where the first one was."""
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "copy"))
    return Path("mlruns")


def folder_of(root: Path, stage: str) -> Path:
    (found,) = root.glob(f"artifacts/*/artifacts/models/{stage}-*/data")
    return found


def asked(model: ServedStage, texts: list[str] = TEXTS, **params: Any) -> Any:
    return model.predict(pandas.DataFrame([[text] for text in texts]), params)


def said(text: str, label: str | None) -> str:
    sampling = SamplingOptions(max_new_tokens=6, seed=3)
    return str(generate_text("tiny", None, text, sampling, SafeConsole(io.StringIO()), label=label)["text"])


def test_texts_and_losses_are_those_of_the_commands(store: Path) -> None:
    model = _load_pyfunc(str(folder_of(store, "code")))
    for label in ("code", "fruit", None):
        texts = asked(model, max_new_tokens=6, seed=3, label=label)
        assert texts == [said(text, label) for text in TEXTS]
    assert asked(model, max_new_tokens=6, seed=3, label="code") != asked(model, max_new_tokens=6, seed=3)
    for text, found in zip(TEXTS, asked(model, output="loss", label="code"), strict=True):
        Path("one.txt").write_text(text)
        told = evaluate_text("tiny", None, "one.txt", "code", SafeConsole(io.StringIO()))
        assert found == {name: told[name] for name in ("nats_per_token", "bits_per_byte", "tokens", "bytes")}


def test_an_earlier_version_is_an_earlier_model(store: Path) -> None:
    first, last = (_load_pyfunc(str(folder_of(store, stage))) for stage in ("fruit", "code"))
    mine, theirs = (asked(model, TEXTS[:1], output="loss", label="fruit") for model in (first, last))
    assert mine == theirs
    assert asked(last, TEXTS[1:], output="loss", label="code") != asked(first, TEXTS[1:], output="loss")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"output": "logits"}, "output=logits: must be one of text, loss"),
        ({"temperature": -1.0}, r"temperature=-1.0: must lie in \[0, inf\]"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_p": 0.0}, r"top_p=0.0: must lie in \[0.01, 1\]"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"seed": -1}, "seed=-1"),
        ({"label": "sea"}, "label=sea is unknown to stage code; there are fruit, code"),
    ],
)
def test_a_parameter_out_of_range_is_one_line(store: Path, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        asked(_load_pyfunc(str(folder_of(store, "code"))), **params)


def test_an_empty_text_has_a_continuation_and_no_loss(store: Path) -> None:
    model = _load_pyfunc(str(folder_of(store, "code")))
    assert asked(model, [""], max_new_tokens=6, seed=3, label="code") == [said("", "code")]
    with pytest.raises(ConfigError, match="has no loss"):
        asked(model, ["a", ""], output="loss")


def test_parameters_are_those_of_generate() -> None:
    defaults = {name: default for name, _, default in PARAMS}
    assert {name: defaults[name] for name in RANGES} == vars(SamplingOptions())
    hints = SamplingOptions.__dataclass_fields__
    for name, (least, most) in RANGES.items():
        annotation = eval(hints[name].type, vars(sys.modules[SamplingOptions.__module__]))
        option = annotation.__metadata__[0]
        assert (option.min, float("inf") if option.max is None else option.max) == (least, most)


def test_a_store_that_moved_is_found_and_one_that_is_gone_is_named(trained: Path, store: Path, tmp_path: Path) -> None:
    away = shutil.copytree(folder_of(store, "code"), tmp_path / "elsewhere")
    assert json.loads((away / POINTER).read_text())["store"] == str(trained / "mlruns")
    (kept,) = store.glob("stages/code-*")
    # Downloaded to another place, it finds the store by the path that it names.
    assert _load_pyfunc(str(away))._model.stage.path.is_relative_to(trained)
    assert _load_pyfunc(str(folder_of(store, "code")))._model.stage.path.is_relative_to(store.absolute())
    named = json.loads((away / POINTER).read_text()) | {"store": str(store.absolute())}
    (away / POINTER).write_text(json.dumps(named))
    shutil.rmtree(kept)
    with pytest.raises(CorruptError, match=rf"its stage {kept.name[-16:]} is not in {store.absolute()}.*Bring it back"):
        _load_pyfunc(str(away))


def test_other_bytes_of_any_stage_are_refused(store: Path) -> None:
    folder = folder_of(store, "code")
    pointer = json.loads((folder / POINTER).read_text())
    assert len(pointer["manifests"]) == 2
    for key in pointer["manifests"]:
        changed = pointer | {"manifests": pointer["manifests"] | {key: "0" * 64}}
        (folder / POINTER).write_text(json.dumps(changed))
        with pytest.raises(CorruptError, match="not the one that"):
            _load_pyfunc(str(folder))
    (folder / POINTER).write_text(json.dumps(pointer))
    with (next(store.glob("stages/fruit-*")) / "model.safetensors").open("r+b") as file:
        file.write(b"\0\0\0\0")
    with pytest.raises(CorruptError, match="SHA-256"):
        _load_pyfunc(str(folder))


@pytest.mark.parametrize(
    "text",
    [
        "{}", "[]", "not json", '{"stage": "../x", "manifests": {}, "store": null}',
        '{"stage": 1, "manifests": {}, "store": null}', '{"stage": "KEY", "manifests": [], "store": null}',
        '{"stage": "KEY", "manifests": {}, "store": null}',
        '{"stage": "KEY", "manifests": {}, "store": "/", "code": "x"}',
    ],
)  # fmt: skip
def test_a_reference_of_somebody_else_is_refused(store: Path, text: str) -> None:
    folder = folder_of(store, "code")
    (folder / POINTER).write_text(text.replace("KEY", "a" * 64))
    with pytest.raises(CorruptError):
        _load_pyfunc(str(folder))
    (folder / POINTER).unlink()
    with pytest.raises(CorruptError, match="missing"):
        _load_pyfunc(str(folder))


def test_links_are_no_stages_and_a_stored_configuration_is_refused(store: Path) -> None:
    folder = folder_of(store, "code")
    with pytest.raises(ConfigError, match="model_config"):
        _load_pyfunc(str(folder), {"router": "os.system"})
    (store / "stages/link").symlink_to("/")
    with pytest.raises(CorruptError, match="symbolic link"):
        _load_pyfunc(str(folder))


def test_the_folder_names_our_loader_and_no_place(trained: Path) -> None:
    import yaml

    folder = folder_of(trained / "mlruns", "code").parent
    model = yaml.safe_load((folder / "MLmodel").read_text())
    flavor = model["flavors"]["python_function"]
    assert flavor["loader_module"] == LOADER == _load_pyfunc.__module__ and set(flavor) == {
        "loader_module", "data", "env", "python_version",
    }  # fmt: skip
    for name in ("requirements.txt", "conda.yaml", "python_env.yaml", "MLmodel"):
        text = (folder / name).read_text()
        assert "://" not in text and str(trained) not in text
    assert "lifelong-moe==" in (folder / "requirements.txt").read_text()


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Whole groups end with the test: MLflow's server is a child of the command."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_fresh_process_and_an_endpoint_answer(trained: Path, processes: list[subprocess.Popen[str]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    serve = ["-m", "mlflow", "models", "serve", "-m", "models:/lifelong-moe.tiny@champion", "--env-manager", "local"]
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{trained}/mlruns/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONPATH": os.pathsep.join(sys.path),
        # MLflow starts `uvicorn` by its name.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    for arguments in ([*serve, "--host", "127.0.0.1", "--port", port], ["-c", PREDICT.format(texts=TEXTS)]):
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            cwd=trained,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if "-c" in arguments else subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
    server, fresh = processes
    told, problem = fresh.communicate(timeout=120)
    assert fresh.returncode == 0, problem
    texts = json.loads(told.splitlines()[-1])
    os.chdir(trained)
    assert texts == [said(text, "code") for text in TEXTS]

    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{address}/ping", timeout=5) as answer:
                assert answer.status == 200
                break
        except OSError:
            time.sleep(0.2)

    def invoke(**asked: Any) -> Any:
        request = urllib.request.Request(
            f"{address}/invocations", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["predictions"]

    params = {"max_new_tokens": 6, "seed": 3, "label": "code"}
    assert invoke(inputs=TEXTS, params=params) == texts
    (loss,) = invoke(inputs=TEXTS[:1], params={"output": "loss", "label": "fruit"})
    assert 0 < loss["bits_per_byte"] < loss["nats_per_token"]
    with pytest.raises(HTTPError, match="400") as refused:
        invoke(inputs=TEXTS, params={"temperature": -1.0})
    assert "temperature=-1.0: must lie in" in refused.value.read().decode()


def test_signatures_are_asked_for(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("model_signing", reason="the extra signing is not installed")
    from lifelong_moe.storage.signing import PRIVATE, PUBLIC
    from tests.security.test_signing import Pair

    pair, folder = Pair(tmp_path, "ours"), str(folder_of(store, "code"))
    monkeypatch.setenv(PUBLIC, str(pair.public))
    with pytest.raises(CorruptError, match="not signed"):
        _load_pyfunc(folder)
    monkeypatch.setenv(PRIVATE, str(pair.private))
    monkeypatch.delenv(PUBLIC)
    signing = StageStore(store)
    signing.sign(json.loads((Path(folder) / POINTER).read_text())["stage"])
    monkeypatch.delenv(PRIVATE)
    monkeypatch.setenv(PUBLIC, str(pair.public))
    assert asked(_load_pyfunc(folder), max_new_tokens=1)
    monkeypatch.setenv(PUBLIC, str(Pair(tmp_path, "theirs").public))
    with pytest.raises(CorruptError, match="signed by the key"):
        _load_pyfunc(folder)
