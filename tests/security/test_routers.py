"""Code that only a store names is not imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lifelong_moe.config.routing import own
from lifelong_moe.config.routing.topk import CustomRouterConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.routing.registry import build_router
from pipelines.cli import app, exit_code
from tests.tiny import tiny_config, train, write_config, write_corpora

CODE = """
from pathlib import Path
from lifelong_moe.routing.routers.learned import LearnedRouter

Path("imported").touch()

class Theirs(LearnedRouter):
    pass
"""
PATH = "their_code.Theirs"


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a run of a router of its own, in a process that has not imported it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(own, "_allowed", set())
    (tmp_path / "their_code.py").write_text(CODE, encoding="utf-8")
    write_corpora(tmp_path)
    write_config(tiny_config())
    # Their user gave this configuration to this command, so it is imported.
    train("tiny.yaml", f"routing.mode={PATH}")
    assert Path("imported").exists()
    forget()
    monkeypatch.setattr(own, "_allowed", set())
    yield tmp_path
    sys.modules.pop("their_code", None)


def forget() -> None:
    """As before the module was imported."""
    Path("imported").unlink(missing_ok=True)
    sys.modules.pop("their_code", None)


COMMANDS = (
    ("evaluate", "tiny", "--data", "sea.jsonl"),
    ("generate", "tiny", "apple"),
    ("inspect", "tiny"),
    ("inspect", "tiny", "--text", "apple"),
    ("consolidate", "tiny", "code"),
)

READING = ("lineage", "tiny")
"""A command that needs no model."""


def test_no_command_imports_the_router_of_a_stage_that_its_user_has_not_named(
    stranger: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in COMMANDS:
        monkeypatch.setattr(sys, "argv", ["lifelong-moe", *command])
        capsys.readouterr()
        assert exit_code(app) == 2, command
        said = capsys.readouterr().err
        assert f"routing.mode={PATH} of a stored stage is code" in said and said.count("\n") == 1, said
        assert f"add --router {PATH}." in said
        assert not Path("imported").exists() and "their_code" not in sys.modules, command
    for command in (READING, (*COMMANDS[1], "--router", "another.Router")):
        monkeypatch.setattr(sys, "argv", ["lifelong-moe", *command])
        assert exit_code(app) == (0 if command is READING else 2)
        assert not Path("imported").exists()
    monkeypatch.setattr(sys, "argv", ["lifelong-moe", "generate", "tiny", "apple", "--router", PATH])
    assert exit_code(app) == 0 and Path("imported").exists()


def test_naming_one_router_allows_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "_allowed", set())
    own.allow_router("mine.Router")
    own.allow_router(None)
    for theirs in ("os.system", "mine.Router2", "mine.Route", "mine..Router"):
        with pytest.raises(ConfigError, match="is imported only if you name it"):
            build_router(CustomRouterConfig(mode=theirs), width=4, layer=0)
