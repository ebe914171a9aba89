"""Secrets planted in six places are found nowhere afterwards: in no database, artifact, log, plan, ledger or output."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.retrain_lab import arrive, base_config, tick_and_text, write_retraining
from tests.tiny import train, write_config, write_corpora

SECRETS = {
    "folder": "canary-folder-1f0c",  # by reference in the run's configuration
    "password": "canary-password-2e9b",  # in an address in the retraining file
    "query": "canary-query-3d8a",  # in the same address
    "command": "canary-command-4c77",  # in a hook's command
    "override": "canary-override-5b66",  # by reference on the command line
    "token": "canary-token-6a55",  # in the environment, where the hub's library looks for it
}


def test_secrets_are_found_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("SECRET_FOLDER", SECRETS["folder"])
    monkeypatch.setenv("HF_TOKEN", SECRETS["token"])
    write_corpora(tmp_path)
    (tmp_path / SECRETS["folder"]).mkdir()
    shutil.move("fruit.jsonl", SECRETS["folder"])
    config = base_config(tracking={"enabled": True, "experiment": "marker-experiment"})
    config["distributions"]["fruit"]["files"] = "${oc.env:SECRET_FOLDER}/fruit.jsonl"
    config["stage_defaults"]["tokens"] //= 6
    write_config(config)
    _, printed = train()
    Path("inbox").mkdir()
    arrive("sea")
    write_retraining(
        hooks={
            "url": f"http://me:{SECRETS['password']}@127.0.0.1:1/x?key={SECRETS['query']}",
            "command": ["sh", "-c", f"false # {SECRETS['command']}"],
        }
    )
    monkeypatch.setenv("SECRET_URL", f"http://127.0.0.1:1/{SECRETS['override']}")
    for overrides in ([], ["hooks.url=${oc.env:SECRET_URL}"]):
        result, text = tick_and_text(*overrides)
        assert result["outcome"] in ("promoted", "rejected", "skipped", "idle"), result
        printed += text + str(result)
    out, err = capfd.readouterr()
    printed += out + err + caplog.text
    assert "hooks.command failed" in printed  # it was run
    files = {path: path.read_bytes() for path in Path("mlruns").rglob("*") if path.is_file()}
    assert any(path.name == "mlflow.db" for path in files) and any("plans" in path.parts for path in files)
    for name, secret in SECRETS.items():
        assert secret not in printed, name
        assert not [path for path, content in files.items() if secret.encode() in content], name
    # What is no secret is found by the same search: it does look into all of them.
    assert [path.name for path, content in files.items() if b"marker-experiment" in content]
    assert [path.name for path, content in files.items() if b"SECRET_FOLDER" in content]  # as a reference
