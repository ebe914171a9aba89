"""Callbacks and loggers that the configuration names by class path."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lifelong_moe.config.references import stored_config
from lifelong_moe.config.sections import section
from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.training.callbacks import own
from lifelong_moe.training.loop.device import require_trainer
from lifelong_moe.training.loop.trainer import own_callbacks
from tests.integration.test_resume import killed
from tests.tiny import EVERY, STEPS, hashes, tiny_config, train, write_config, write_corpora

CODE = """
from pathlib import Path
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

Path("imported").touch()

class Count(Callback):
    def __init__(self, path):
        self.path, self.steps = path, 0
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps += 1
    def on_train_end(self, trainer, pl_module):
        with open(self.path, "a") as file:
            print(self.steps, file=file)
    def state_dict(self):
        return {"steps": self.steps}
    def load_state_dict(self, state):
        self.steps = state["steps"]

class Table(CSVLogger):
    pass

class Fails(Callback):
    def __init__(self):
        raise RuntimeError("not here")
"""
COUNT = {"class_path": "my_code.Count", "init_args": {"path": "counted"}}
TABLE = {"class_path": "my_code.Table", "init_args": {"save_dir": "tables", "name": "curves"}}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with code of the user's own, which this process has not imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(own, "_allowed", set())
    (tmp_path / "my_code.py").write_text(CODE, encoding="utf-8")
    write_corpora(tmp_path)
    yield tmp_path
    sys.modules.pop("my_code", None)


def written(**trainer: Any) -> None:
    config = tiny_config()
    config["trainer"] |= trainer
    write_config(config)


def test_they_see_every_step_and_change_no_key(mine: Path) -> None:
    written()
    keys = [stage["key"] for stage in train("tiny.yaml", "run=without")[0]["stages"]]
    written(callbacks=[COUNT], logger=[TABLE])
    # Committed already: nothing trains, and the key says so.
    assert [stage["key"] for stage in train("tiny.yaml", "run=with")[0]["stages"]] == keys
    assert not Path("counted").exists()
    train("tiny.yaml", "run=again", "seed=1")
    assert Path("counted").read_text().split() == [str(STEPS)] * 2
    tables = sorted(Path("tables/curves").glob("version_*/metrics.csv"))
    assert len(tables) == 2 and "train/loss_nats_per_token" in tables[0].read_text().splitlines()[0]
    with_them = hashes(run_name="again")
    shutil.rmtree("mlruns")
    written()
    train("tiny.yaml", "run=again", "seed=1")
    assert hashes(run_name="again") == with_them


def test_their_state_survives_a_kill(mine: Path) -> None:
    written(callbacks=[COUNT])
    killed(("code", "train", EVERY + 2))
    assert Path("counted").read_text().split() == [str(STEPS)]
    train("tiny.yaml")
    # Every step of the second stage once, those before the checkpoint in the killed process.
    assert Path("counted").read_text().split() == [str(STEPS)] * 2


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ({"class_path": "Count"}, r"trainer\.callbacks\[0\]\.class_path=Count must be a dotted path"),
        ({"class_path": "my_code.Nobody"}, r"trainer\.callbacks\[0\]: my_code.Nobody cannot be built: .*Nobody"),
        ({"class_path": "nosuch.Thing"}, "cannot be built: No module named 'nosuch'"),
        ({"class_path": "my_code.Count"}, "cannot be built: .*missing 1 required positional argument: 'path'"),
        ({"class_path": "my_code.Fails"}, "cannot be built: not here"),
        (TABLE, "my_code.Table must be a lightning.pytorch.callbacks.callback.Callback"),
        (COUNT | {"args": 1}, "args"),
    ],
)
def test_mistakes_cost_a_line_before_anything_is_written(mine: Path, named: dict[str, Any], reason: str) -> None:
    written(callbacks=[named])
    with pytest.raises(ConfigError, match=reason):
        train("tiny.yaml")
    assert not Path("mlruns").exists()


def test_what_only_a_store_names_is_not_imported(mine: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored = stored_config({"trainer": {"callbacks": [COUNT], "logger": [TABLE]}})
    config = section(TrainerConfig, stored.trainer, "trainer")
    require_trainer(config)
    assert own_callbacks(config) == [] and not Path("imported").exists()
    assert "my_code.Count is code that a stored configuration names, and is left out" in caplog.text
    # Nor with other arguments than the user's.
    own.allow_own(section(TrainerConfig, stored_config({"trainer": {"callbacks": [COUNT | {"init_args": {}}]}}).trainer,
                          "trainer"))  # fmt: skip
    assert own_callbacks(config) == [] and not Path("imported").exists()


def test_a_run_that_used_them_is_read_without_them(mine: Path) -> None:
    written(callbacks=[COUNT])
    train("tiny.yaml")
    head = json.loads(Path("mlruns/runs/tiny/head.json").read_text())
    assert head["config"]["trainer"]["callbacks"] == [COUNT]
