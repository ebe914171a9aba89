"""A secret appears in nothing that is printed, stored or sent, wherever it is given: each place by each kind."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import datasets
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from lifelong_moe import redaction
from lifelong_moe.config.data import SourceConfig
from lifelong_moe.config.load import build_config, read_config, whole_config, written_config
from lifelong_moe.config.references import stored_config
from lifelong_moe.config.tracking import TrackingConfig
from lifelong_moe.data.formats.streams import open_file
from lifelong_moe.data.text.hub import hub_documents
from lifelong_moe.data.text.jsonl import read_jsonl
from lifelong_moe.errors import ConfigError, DataError
from lifelong_moe.storage.plain import PlainError, from_plain
from lifelong_moe.tracking.connection import probe
from lifelong_moe.tracking.pages.links import ui_url
from lifelong_moe.tracking.spool import Spool
from lifelong_moe.tracking.sync import sync
from lifelong_moe.tracking.tracker import Tracker
from lifelong_moe.tracking.values import cut
from pipelines.cli import app, exit_code
from pipelines.shared import output
from tests.retrain_lab import arrive, base_config, change_head, head, write_retraining
from tests.tiny import train, working_in, write_config, write_corpora

CANARY = "canary-7f3a"
NAMES = ("run", r"stages\[\d\]\.(name|data|continues)", r"tracking\.experiment", r"distributions\.\w+\.name")
"""Keys whose values are names: files and records are called by them, so that no secret may stand there."""
HOOK = """
import json, os, sys
from pathlib import Path
Path(sys.argv[1]).write_text(json.dumps([sys.argv, dict(os.environ), sys.stdin.read()]))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two short stages, its retraining file and text in the inbox; nothing is tracked."""
    root = tmp_path_factory.mktemp("secrets")
    with working_in(root):
        write_corpora(root)
        config = base_config(stage_defaults={"tokens": 512}, evaluate={"tokens": 600})
        write_config(config)
        train()
        write_retraining()
        Path("inbox").mkdir()
        arrive("sea")
    return root


Tell = Callable[..., tuple[int, str]]


@pytest.fixture
def command(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Tell]:
    """Run a command line in a copy of that directory, as `main` does; returns exit code and everything said."""
    shutil.copytree(finished, tmp_path / "lab")
    monkeypatch.chdir(tmp_path / "lab")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*arguments: str) -> tuple[int, str]:
        caplog.clear()
        output.make_robust()
        code = exit_code(lambda: app(list(arguments)))
        sys.stdout.flush(), sys.stderr.flush()
        out, err = capfd.readouterr()
        return code, out + err + caplog.text

    yield run
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def require_absent(said: str, *secrets: str, given: tuple[str, ...] = ()) -> None:
    """Require that no secret is in what was said, or in any file but those in which it was given."""
    for secret in secrets:
        assert secret not in said, said
        holders = [path for path in Path().rglob("*") if path.is_file() and path.name not in given]
        assert not [path for path in holders if secret.encode() in path.read_bytes()], secret
        assert not [path for path in Path().rglob("*") if secret in path.name]


def keys_of(value: Any, path: str = "") -> Iterator[str]:
    """Full keys of all plain values within a configuration."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from keys_of(child, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for place, child in enumerate(value):
            yield from keys_of(child, f"{path}[{place}]")
    else:
        yield path


def is_name(key: str) -> bool:
    return any(re.fullmatch(name, key) for name in NAMES)


REFERENCES = ("${oc.env:GIVEN}", "x${oc.env:GIVEN}y", "${oc.decode:${oc.env:WHOLE}}")


def overrides() -> Iterator[str]:
    """Each key of the configuration with a reference to a secret; each form of reference meets all kinds of keys."""
    keys = [key for key in keys_of(whole_config(read_config("tiny.yaml").raw)) if not is_name(key)]
    assert len(keys) > 100
    sections = sorted({re.split(r"[.\[]", key)[0] for key in keys})
    for number, key in enumerate([*keys, *sections]):
        yield f"{key}={REFERENCES[number % len(REFERENCES)]}"


def test_by_reference_in_every_key_of_a_configuration(
    finished: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(finished)
    monkeypatch.setenv("GIVEN", CANARY)
    monkeypatch.setenv("WHOLE", f"{{a: [{CANARY}]}}")
    refused = 0
    for override in overrides():
        try:
            raw = read_config("tiny.yaml", [override]).raw
        except ConfigError as error:
            refused += 1
            assert CANARY not in str(error), override
        else:
            assert CANARY not in f"{written_config(raw)} {whole_config(raw)}", override
    assert refused > 50 and CANARY not in caplog.text


def test_by_reference_on_the_command_line(command: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVEN", CANARY)
    keys = ["distributions.fruit.files", "distributions.code.text_field", "tokenizer.file", "model.width", "stages"]
    said = ""
    for key in [*keys, "trainer.accelerator", "tracking.uri", "routing.mode", "stage_defaults.optim.schedule"]:
        for words in (["plan", "--json"], ["run"]):
            code, told = command(*words, "tiny.yaml", f"{key}=${{oc.env:GIVEN}}")
            assert code == 2 or (code == 0 and key in ("tracking.uri", "trainer.accelerator")), (key, told)
            said += told
    require_absent(said, CANARY)
    assert "oc.env:GIVEN" in said  # what it is about can still be told


def test_by_reference_in_every_key_of_a_retraining_file(command: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVEN", CANARY)
    keys = ["base", "stage.tokens", "when_growing.grow.experts", "when_continuing.optim.lr", "probe.grow[0].experts"]
    keys += ["inbox.path", "inbox.text_field", "inbox.source_field", "inbox.keep_text", "inbox.heldout_fraction"]
    keys += ["trigger.min_tokens", "drift.documents", "decision.min_structure", "gate.resamples", "limits.tokens"]
    keys += ["hooks.url", "hooks.seconds", "hooks.command[0]", "hooks.command[1]"]
    config = yaml.safe_load(Path("retrain.yaml").read_text())
    Path("retrain.yaml").write_text(
        yaml.safe_dump({**config, "hooks": {"command": ["true", "x"]}, "probe": {"grow": [{"experts": 2}]}})
    )
    for key in keys:
        code, told = command("retrain", "retrain.yaml", "--dry-run", f"{key}=${{oc.env:GIVEN}}")
        # A dry run starts no hook; an inbox may be absent, and so may the field that names a source.
        assert code == 2 or (code == 0 and key in ("hooks.command[0]", "inbox.path", "inbox.source_field")), (key, told)
        require_absent(told, CANARY)
        assert '"outcome": ' in told


ADDRESSES = {
    "password": f"http://me:{CANARY}@127.0.0.1:1",
    "password with a slash": f"http://me:x/{CANARY}/y@127.0.0.1:1",
    "password with an at": f"http://me:x@{CANARY}@127.0.0.1:1",
    "password with both": f"http://me:{CANARY}/x@y@127.0.0.1:1/mlflow",
    "password of digits with a slash": f"http://me:12/{CANARY}@127.0.0.1:1",
    "password, encoded": f"http://me:{CANARY}%2Fx%40y@127.0.0.1:1",
    "user": f"http://{CANARY}@127.0.0.1:1/mlflow",
    "query": f"http://127.0.0.1:1/?token={CANARY}",
    "path": f"http://127.0.0.1:1/{CANARY}/mlflow",
    "path of a word": "http://127.0.0.1:1/canaryword/mlflow",
    "database's password": f"postgresql://me:{CANARY}@127.0.0.1:1/mlflow",
    "database's password with a slash": f"postgresql://me:{CANARY}/x?#@127.0.0.1:1/mlflow",
    "database's password in a query": f"mysql+pymysql://127.0.0.1:1/mlflow?user=me&password={CANARY}",
    "password within a value of a query": f"mssql+pyodbc://127.0.0.1:1/?odbc_connect=UID%3Dme%3BPWD%3D{CANARY}",
    "database's password with an at": f"mysql+pymysql://me:x@{CANARY}@127.0.0.1:1/mlflow",
}


@pytest.mark.parametrize("place", ["configuration", "variable"])
@pytest.mark.parametrize("form", ADDRESSES)
def test_in_an_address_of_a_tracker(
    form: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lifelong_moe.tracking.recorder.probe", lambda uri: probe(uri, 0.5))
    address, root = ADDRESSES[form], Path("mlruns")
    if place == "variable":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    tracker = Tracker.connect(TrackingConfig(uri=address if place == "configuration" else None), root)
    run = tracker.start_run("r", params={"tracking": {"uri": address}}, note=f"see {address}")
    tracker.log_text(run, f"see {address}", "notes.txt")
    tracker.finish(run)
    said = f"{tracker.problem} {caplog.text} {sync(root)} {Spool(root, address).address} {ui_url(address, '1', '')}"
    assert tracker.problem is not None and "127.0.0.1:1" in said
    # In texts that nobody called an address, a path that is a plain word stays.
    require_absent(said, CANARY, *(["canaryword"] if place == "variable" else []), given=("pending.jsonl",))
    assert CANARY not in "".join(path.read_text() for path in root.rglob("pending.jsonl"))


@pytest.mark.parametrize(
    ("place", "form"),
    [("override", "password with both"), ("reference", "path"), ("variable", "path"), ("override", "path of a word")],
)
def test_in_the_tracking_address_of_a_run(
    command: Tell, place: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, given = ADDRESSES[form], ["tracking.enabled=true"]
    if place == "variable":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    elif place == "reference":
        monkeypatch.setenv("WHERE", address)
        given.append("tracking.uri=${oc.env:WHERE}")
    else:
        given.append(f"tracking.uri='{address}'")
    said = ""
    for words in (["run", "tiny.yaml", *given], ["sync"], ["sync", "--json"]):
        code, told = command(*words)
        assert code == (75 if words[0] == "sync" else 0), told
        said += told
    assert "127.0.0.1:1" in said  # it is told which one
    assert list(Path("mlruns/spool").glob("*/pending.jsonl"))
    require_absent(said, CANARY, "canaryword")


def test_in_the_environment_of_clients_and_hooks(
    command: Tell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {
        "MLFLOW_TRACKING_PASSWORD": "canary-one-1",
        "MLFLOW_TRACKING_TOKEN": "canary-two-2",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:1/canary-three-3",
        "HF_TOKEN": "canary-four-4",
        "AWS_SECRET_ACCESS_KEY": "canary-five-5",
        "FOLDER": "canary-six-6",  # to which the configuration refers
        "PROGRAM": sys.executable,
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HTTPS_PROXY", "http://me:canary-seven-7@127.0.0.1:1")
    monkeypatch.setenv("THE_SAME", "canary-one-1")
    monkeypatch.setenv("THEIRS", "of the hook itself")
    shutil.move("inbox", "canary-six-6")
    (tmp_path / "hook.py").write_text(HOOK)
    write_retraining(
        inbox={"path": "${oc.env:FOLDER}"},
        trigger={"min_tokens": 10**9},
        hooks={
            "command": ["${oc.env:PROGRAM}", str(tmp_path / "hook.py"), str(tmp_path / "told")],
            "url": "http://me:canary-eight-8@127.0.0.1:1/canary-nine-9?key=canary-ten-10",
        },
    )
    bad = Path("canary-six-6/bad.jsonl")
    bad.write_text("{}\n")
    code, said = command("retrain", "retrain.yaml")
    assert code == 2 and "bad.jsonl" in said and "hooks.url failed" in said
    arguments, environment, told = json.loads((tmp_path / "told").read_text())
    assert "bad.jsonl" in told and "${oc.env:FOLDER}" in told
    assert "THEIRS" in environment and "HOME" in environment
    bad.unlink()
    secret = re.compile(r"canary-(?:\w+)-\d+")
    assert not secret.findall(f"{arguments} {told} {said}")
    assert not [name for name, value in environment.items() if secret.search(value)]
    for words in (["retrain", "retrain.yaml"], ["retrain", "retrain.yaml", "trigger.min_tokens=1", "--dry-run"]):
        code, said = command(*words)
        assert code == 0, said
        require_absent(said, *(f"canary-{number}" for number in ("one", "two", "three", "four", "five", "seven")))
        assert "canary-six" not in said and "canary-eight" not in said


def test_a_secret_is_known_however_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "a\"b'c\\d/e@f é&<g>\n=h%"
    monkeypatch.setenv("GIVEN", secret)
    redaction.note_variable("GIVEN")
    forms = [secret, repr(secret), json.dumps(secret), json.dumps(secret, ensure_ascii=False), quote(secret)]
    forms += [quote(secret, safe=""), quote_plus(secret), html.escape(secret), secret.splitlines()[0]]
    # Escaped twice; only in part; with small digits.
    forms += [quote(quote(secret, safe=""), safe=""), secret.replace("@", "%40")]
    forms += [secret.replace("/", "%2f").replace("\n", "%0a"), quote(secret).replace("%2", "%2525252")]
    for form in forms:
        for text in (form, f"x{form}y", f"{form}{form}"):
            assert "b'c" not in redaction.redact(text) and quote("é&<g>") not in redaction.redact(text), form
    with pytest.raises(ConfigError) as raised:
        raise ConfigError(f"{secret} is wrong")
    assert str(raised.value) == "${oc.env:GIVEN} is wrong"


@pytest.mark.parametrize(
    "address",
    [
        "postgresql:///mlflow?host=db&user=me&password=canary-7f3a",
        "postgresql://db/mlflow?password=canary-7f3a",
        "postgresql://db/mlflow?password=x@canary-7f3a",
        "postgresql://db/mlflow?password=canary-7f3a@x&sslmode=require",
        "mssql+pyodbc:///?odbc_connect=DRIVER%3DX%3BUID%3Dme%3BPWD%3Dcanary-7f3a",
        "mssql+pyodbc://db/?odbc_connect=DRIVER%3dX%3bUID%3dme%3bPWD%3d%7bcanary-7f3a%7d",
        "http://127.0.0.1/?key=a&token=canary-7f3a#top",
        "sqlite:///file:mlflow.db?uri=true&key=canary-7f3a",
    ],
)
def test_a_password_in_a_query_is_known(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CANARY not in redaction.shown_address(address)
    assert CANARY not in redaction.without_credentials(f"cannot open {address}", mask="***")
    assert CANARY not in redaction.redact(f"FATAL: {CANARY} is no password", address)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert redaction.redact(f"PWD={CANARY}, please") == "PWD=$MLFLOW_TRACKING_URI, please"
    assert "MLFLOW_TRACKING_URI" not in redaction.environment_without_secrets()


def test_a_path_of_this_machine_has_neither_user_nor_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    address = "sqlite:////home/me@work/mlflow.db?timeout=5"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert redaction.shown_address(address) == "sqlite:////home/me@work/mlflow.db?***"
    assert redaction.redact("/home/me@work/mlflow.db is locked for 5 s") == "/home/me@work/mlflow.db is locked for 5 s"


def test_addresses_within_addresses_take_no_time() -> None:
    for text in ("://" * 50_000, "://?" * 50_000, "://a?=" * 50_000):
        began = time.process_time()
        redaction.without_credentials(text, mask="***")
        assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("name", "value", "printed"),
    [
        ("AZURE_STORAGE_KEY", "canary-7f3a", "canary-7f3a"),
        ("AZURE_STORAGE_CONNECTION_STRING", "AccountName=me;AccountKey=canary-7f3a==", "key canary-7f3a=="),
        ("MLFLOW_TRACKING_HEADERS", "x=y,Authorization=Bearer canary-7f3a", "Bearer canary-7f3a"),
        ("MLFLOW_TRACKING_TOKEN", " canary-7f3a ", '"Bearer canary-7f3a"'),
        ("MLFLOW_TRACKING_TOKEN", "of two lines\ncanary-7f3a\n", "the second, canary-7f3a, is wrong"),
        ("MLFLOW_TRACKING_TOKEN", "canary/7f3a", "canary\\/7f3a"),
        ("MLFLOW_TRACKING_TOKEN", "canary/7f3a", "canary%2f7f3a"),
        ("MLFLOW_TRACKING_TOKEN", "canary'7f3a", repr("canary'7f3a \"")),
        ("MLFLOW_TRACKING_TOKEN", "canaryä7f3a", ascii("canaryä7f3a")),
        ("MLFLOW_TRACKING_TOKEN", "canaryä7f3a", repr("canaryä7f3a".encode())),
        ("MLFLOW_TRACKING_PASSWORD", "canary-7f3a", "Basic " + base64.b64encode(b"me:canary-7f3a").decode()),
        ("MLFLOW_TRACKING_URI", "http://you:c%40n@127.0.0.1", "Basic " + base64.b64encode(b"you:c@n").decode()),
    ],
)
def test_a_secret_of_a_client_is_known_as_it_is_sent(
    name: str, value: str, printed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv(name, value)
    said = redaction.redact(printed)
    assert f"${name}" in said and not re.search(r"7f3a|[A-Za-z0-9]{12,}", said.replace(f"${name}", "")), said


def test_hooks_keep_what_every_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/home/somebody/lib")
    redaction.note_variable("HOME")
    redaction.note_address("postgresql://me:canary-7f3a@db/mlflow")
    for name, value in (("DB_PASSWORD", CANARY), ("TOLD", f"--password={CANARY}"), ("HF_TOKEN", "ab")):
        monkeypatch.setenv(name, value)
    kept = redaction.environment_without_secrets()
    assert {"HOME", "PATH", "LD_LIBRARY_PATH"} <= {*kept} and not {"DB_PASSWORD", "TOLD", "HF_TOKEN"} & {*kept}


@dataclass(frozen=True)
class Held:
    """Something stored."""

    number: int


def test_a_secret_is_replaced_before_a_text_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + "".join(f"{i:02}" for i in range(20))
    monkeypatch.setenv("HF_TOKEN", token)
    said = [redaction.shortened("x" * 290 + token, 300), cut("x" * 60 + token, 80), cut(token + "x" * 60, 60)]
    for value in ("x" * 70 + token, [token]):
        with pytest.raises(PlainError) as raised:
            from_plain(Held, {"number": value})
        said.append(str(raised.value))
    path = tmp_path / "x.jsonl"
    path.write_text("{" + f'"{"x" * 70}{token}": 1, "{"x" * 70}{token}": 2' + "}")
    with pytest.raises(DataError) as refused, open_file(path) as file:
        list(read_jsonl(file, "text", "source"))
    said.append(str(refused.value))

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("x" * 270 + token)

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError) as unloaded:
        hub_documents(SourceConfig(hf="a/b", revision="0" * 40))
    said.append(str(unloaded.value))
    assert not [one for one in said if "0001" in one or "1819" in one or "hf_0" in one], said


@pytest.mark.parametrize("value", ["12", "0.001", "true", "a", "1_000_000", "null"])
def test_settings_are_no_secrets(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVEN", value)
    redaction.note_variable("GIVEN")
    assert redaction.redact(f"x={value}, 0.0012, {value}") == f"x={value}, 0.0012, {value}"


def test_what_is_said_openly_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVEN", "fruit")
    monkeypatch.setenv("HERE", str(Path.cwd()))
    for name in ("GIVEN", "HERE"):
        redaction.note_variable(name)
    assert redaction.redact("fruit is sweet") == "${oc.env:GIVEN} is sweet"
    redaction.say_openly(["tree fruit"])
    text = f"fruit is sweet in {Path.cwd()}"
    assert redaction.redact(text) == text


def replaced(value: Any, by: str) -> Any:
    """Plain data with all its plain values replaced."""
    if isinstance(value, dict):
        return {key: replaced(child, by) for key, child in value.items()}
    return [replaced(child, by) for child in value] if isinstance(value, list) else by


def test_no_reference_of_a_store_is_resolved(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    monkeypatch.setenv("GIVEN", CANARY)
    monkeypatch.setenv("WHOLE", f"{{a: [{CANARY}]}}")
    monkeypatch.setattr("lifelong_moe.config.references.note_variable", None)  # whoever resolves one calls this
    plain = whole_config(read_config("tiny.yaml").raw)
    for form in (*REFERENCES, "${seed}", "${.}", "${oc.env:GIVEN,\\${oc.env:GIVEN}}", "\\${oc.env:GIVEN}"):
        everywhere = stored_config(replaced(plain, form))
        assert "${" not in str(OmegaConf.to_container(everywhere, resolve=False))
    # A text where a section or a value of another type belongs is where OmegaConf looks at it again.
    ways = [(key,) for key in plain] + [("routing", key) for key in plain["routing"]]
    for *above, last in ways:
        changed = json.loads(json.dumps(plain))
        (changed[above[0]] if above else changed)[last] = REFERENCES[2]
        with contextlib.suppress(ConfigError):
            assert CANARY not in str(build_config(stored_config(changed), is_stored=True)), last


def test_what_a_stored_run_left_to_its_machine_has_defaults(caplog: pytest.LogCaptureFixture) -> None:
    machine = {"trainer": {"devices": "${oc.env:GIVEN}", "precision": "bf16-mixed"}, "evaluate": {"tokens": "${.x}"}}
    found = stored_config(machine)
    assert found == {"trainer": {"precision": "bf16-mixed"}, "evaluate": {}}
    assert [record.getMessage() for record in caplog.records] == [
        f"{key} of the stored run refers to its own machine; the default is used."
        for key in ("trainer.devices", "evaluate.tokens")
    ]


def test_commands_resolve_nothing_that_a_store_holds(command: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVEN", CANARY)
    resolved: list[str] = []
    monkeypatch.setattr("lifelong_moe.config.references.note_variable", resolved.append)
    config = head()["config"]
    document = json.loads(Path("fruit.jsonl").read_text().splitlines()[0])["text"]
    digest = hashlib.sha256(document.encode()).hexdigest()
    commands = [["inspect", "tiny"], ["inspect", "tiny", "--text", "apple"], ["lineage", "tiny", "--document", digest]]
    commands += [
        ["evaluate", "tiny", "--data", "sea.jsonl"],
        ["generate", "tiny", "apple"],
        ["status", "tiny"],
        ["sync"],
    ]
    commands += [["drop", "tiny", "code"], ["rollback", "tiny"], ["report", "tiny"], ["gc"]]
    sources = {name: {**one, "files": "${oc.env:GIVEN}/x"} for name, one in config["distributions"].items()}
    trackings = {"uri": "http://127.0.0.1:1/${oc.env:GIVEN}", "enabled": True, "experiment": "${oc.env:GIVEN}"}
    for changes in (
        {
            "tracking": trackings,
            "distributions": sources,
        },
        {"trainer": {**config["trainer"], "accelerator": "${oc.env:GIVEN}"}},
        {"tokenizer": {**config["tokenizer"], "file": "${oc.env:GIVEN}"}},
    ):
        change_head(config={**config, **changes})
        said = ""
        for words in commands:
            code, told = command(*words)
            assert code in (0, 2, 3, 75), (changes, words, told)
            said += told
        assert resolved == [] and CANARY not in said, (changes, said)
