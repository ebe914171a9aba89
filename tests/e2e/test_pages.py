"""Every command and snippet of README and of docs/usage.md runs as it is written, in the order of the pages.

They run in one folder, with the configurations that we ship; only models, texts and budgets are made tiny there. A
command that comes to a page later runs here by itself, and what is not understood fails.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import matplotlib.figure
import pytest
import typer
from omegaconf import OmegaConf

from lifelong_moe.config.data import TextMixture
from lifelong_moe.config.load import read_config
from lifelong_moe.data.text import builtin
from lifelong_moe.interop.layout.complete import with_checkpoint
from pipelines.cli import app
from pipelines.upkeep import ui
from tests.checkpoints import write_checkpoint
from tests.e2e.conftest import Cli
from tests.tiny import VOCABULARIES, write_corpus

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/usage.md")
FENCE = re.compile(r"^\s*```(.*)$")
NOTEBOOK = ROOT / "docs/python.ipynb"
PLACEHOLDER = re.compile(r"\b[A-Z]{2,}\b|\[|…")
MAY_REJECT = ("retrain",)
"""Commands whose exit code 3 is as good an outcome as any on so little text."""
BUDGET = re.compile(r"^(stage_defaults\.tokens=)[\d_]+$")
"""A page's own budget, for which the tiny model would take a thousand steps a stage."""
QUICKSTART: dict[str, Any] = {
    "tokenizer": {"vocab_size": 400},
    "distributions": {name: {"max_bytes": 60_000} for name in ("english_docs", "python_code", "cpp_headers")},
    "model": {"layers": 1, "width": 16, "heads": 2, "kv_heads": 1, "expert_width": 8, "experts": 4, "context": 32},
    "stage_defaults": {
        "tokens": 640,
        "grow": {"experts": 2, "sample_tokens": 256},
        "trunk": {"rank": 2},
        "optim": {"batch_tokens": 64},
    },
    "evaluate": {"tokens": 400},
    "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
}
RETRAIN = {
    "trigger": {"min_tokens": 500},
    "stage": {"tokens": 640},
    "drift": {"documents": 100},
    "gate": {"resamples": 500},
}


@dataclass(frozen=True)
class Found:
    """Something on a page that is to be run or checked."""

    where: str
    """Page and line."""
    kind: str
    """``command`` (a line), ``mention`` (one in running text), or the language of a snippet."""
    text: str


def found_on(page: str, markdown: str) -> Iterator[Found]:
    """Lines of fenced commands, fenced snippets, and commands in running text, in their order.

    Raises:
        ValueError: If a fence is not closed, or is of no language that can be checked here.
    """
    lines = enumerate(markdown.splitlines(), start=1)
    for number, line in lines:
        where = f"{page}:{number}"
        if (fence := FENCE.match(line)) is None:
            for span in re.findall(r"`((?:lifelong-moe|make) [^`]+)`", line):
                yield Found(where, "mention", span)
            continue
        inside = list(itertools.takewhile(lambda one: one[1].strip() != "```", lines))
        if not inside or inside[-1][0] == len(markdown.splitlines()):
            raise ValueError(f"{where}: the fence is empty, or is not closed.")
        language, text = fence[1].strip(), "\n".join(text for _, text in inside)
        if language in ("", "sh", "bash"):
            first = inside[0][0]
            for offset, command in joined(text):
                yield Found(f"{page}:{first + offset}", "command", command)
        elif language in ("yaml", "python", "json"):
            yield Found(where, language, text)
        else:
            raise ValueError(f"{where}: nobody knows how to check {language}.")


def joined(text: str) -> Iterator[tuple[int, str]]:
    """Commands with the number of their first line; what ends with a backslash goes on."""
    begun, whole = 0, ""
    for number, line in enumerate(text.splitlines()):
        begun = begun if whole else number
        whole += line.removesuffix("\\") + " "
        if not line.endswith("\\"):
            if shlex.split(whole, comments=True):
                yield begun, whole.strip()
            whole = ""


def test_what_is_found_on_a_page() -> None:
    page = "Say `make x` and `lifelong-moe ui`.\n```\na 1  # b\n\nc \\\n  d\n```\n`e`\n```yaml\nf: 1\n```\n"
    assert [(one.where, one.kind, one.text) for one in found_on("p", page)] == [
        ("p:1", "mention", "make x"),
        ("p:1", "mention", "lifelong-moe ui"),
        ("p:3", "command", "a 1  # b"),
        ("p:5", "command", "c    d"),
        ("p:9", "yaml", "f: 1"),
    ]


@pytest.mark.parametrize("page", ["```\nmake x\n", "```\n```\n", "```ruby\nputs 1\n```\n", "```\nsay 'it\n```\n"])
def test_what_cannot_be_parsed_is_an_error(page: str) -> None:
    with pytest.raises(ValueError):
        list(found_on("p", page))


def targets() -> dict[str, list[str]]:
    """The Makefile's targets for users, each with its commands."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    values = dict(re.findall(r"^([A-Z]+) :?= (.+)$", text, flags=re.MULTILINE))
    text = text.replace("$(BIN)", values["BIN"]).replace("$(VENV)", values["VENV"])
    recipes = re.findall(r"^([a-z]+):[^=\n]*\n((?:\t.*\n)+)", text, flags=re.MULTILINE)
    return {target: [line.lstrip("\t@-") for line in recipe.splitlines()] for target, recipe in recipes}


class Reader:
    """Somebody who does what the pages say."""

    def __init__(self, cli: Cli) -> None:
        self.cli = cli
        self.done: list[str] = []
        """Commands of ours that were run."""

    def do(self, found: Found) -> None:
        """Run or check one thing."""
        getattr(self, found.kind)(found)

    def command(self, found: Found) -> None:
        """A line of a fenced block, or of what ``make`` runs."""
        words = shlex.split(found.text, comments=True)
        program, arguments = Path(words[0]).name, words[1:]
        assert not {"|", "&&", ";", "||", ">", "&"} & set(words), f"{found.where}: one command a line: {found.text}"
        handler = {"lifelong-moe": self.ours, "make": self.make, "source": self.source, "python": self.python_module}
        if program in handler:
            handler[program](found, arguments)
        else:
            tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            needed = [*tools["dependencies"], *tools["optional-dependencies"]["dev"]]
            known = [re.split(r"[>=<\[]", one)[0] for one in needed]
            assert program in (*known, "echo", "rm", "find", "export", "curl"), f"{found.where}: who is {program}?"

    def ours(self, found: Found, arguments: list[str]) -> None:
        """``lifelong-moe …``; a second time nothing would be new."""
        if (asked := shlex.join(arguments)) in self.done:
            return
        self.done.append(asked)
        arguments = [BUDGET.sub(rf"\g<1>{QUICKSTART['stage_defaults']['tokens']}", word) for word in arguments]
        if "--tasks" in arguments:  # of a library that is not installed here; tests of the harness put tasks to runs
            check_pattern(found, typer.main.get_command(app).commands["evaluate"], arguments[1:])  # type: ignore[attr-defined]
            return
        result = self.cli(*arguments)
        allowed = (0, 3) if arguments[0] in MAY_REJECT else (0,)
        assert result.code in allowed, f"{found.where}: {found.text}: exit code {result.code}: {result.err[-2000:]}"
        assert "Traceback" not in result.err and result.out, f"{found.where}: {result.err[-2000:]}"

    def make(self, found: Found, arguments: list[str]) -> None:
        """``make TARGET``: what it runs is itself such a command. The environment that it makes is not made here."""
        known = targets()
        assert len(arguments) == 1 and arguments[0] in known, f"{found.where}: make {arguments}"
        for line in known[arguments[0]]:
            self.command(Found(f"{found.where}, make {arguments[0]}", "command", line))

    def source(self, found: Found, arguments: list[str]) -> None:
        """Where the Makefile puts the environment."""
        venv = re.search(r"^VENV := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert venv is not None and arguments == [f"{venv[1]}/bin/activate"], found

    def python_module(self, found: Found, arguments: list[str]) -> None:
        """``python -m MODULE`` of the repository; benchmarks take an hour, and are not run."""
        module = ROOT / arguments[1].replace(".", "/")
        assert arguments[0] == "-m", found
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), found

    def mention(self, found: Found) -> None:
        """A command in running text: run if it is whole; a pattern is held against the arguments that there are."""
        program, *words = found.text.split()
        if program == "make":
            assert words[0] in targets(), found
            return
        whole: Any = typer.main.get_command(app)
        if words[0].startswith("--"):  # an option of the program itself
            assert words[0] in {name for one in whole.params for name in one.opts}, found
            return
        command: Any = whole.commands[words[0]]
        required = [one for one in command.params if one.param_type_name == "argument" and one.required]
        if PLACEHOLDER.search(" ".join(words[1:])):
            check_pattern(found, command, words[1:])
        elif words[1:] or not required:
            self.command(found)

    def yaml(self, found: Found) -> None:
        """Sections of a run's configuration."""
        Path("snippet.yaml").write_text(found.text, encoding="utf-8")
        snippet = OmegaConf.load("snippet.yaml")
        config = OmegaConf.merge(quickstart(), snippet)
        if "from" in config.model:  # a reader's own checkpoint, and text of two domains
            write_checkpoint("llama", config.model["from"], texts=["a text"] * 9)
            config.model = {**snippet.model, "context": quickstart().model.context}
            config.tokenizer = {}
        learned = [name for stage in snippet.get("stages", []) for name in TextMixture.as_written(stage.data).names]
        own = [name for name in learned if name not in config.distributions]
        if own:
            texts = zip(own, ("english_docs", "python_code"), strict=True)
            config.distributions = {name: {"builtin": one} for name, one in texts}
            config.tokenizer.pop("train_on", None)
        OmegaConf.save(config, "snippet.yaml")
        read_config("snippet.yaml", complete=with_checkpoint)

    def json(self, found: Found) -> None:
        """Anything."""
        json.loads(found.text)

    def python(self, found: Found) -> None:
        """A program; whatever it does before ``configure()`` must leave torch alone."""
        body = ast.parse(found.text).body
        calls = [number for number, one in enumerate(body) if ast.unparse(one) == "threads.configure()"]
        if calls:
            before = ast.unparse(ast.Module(body[: calls[0] + 1], []))
            check = f"{before}\nimport sys\nassert 'torch' not in sys.modules"
            subprocess.run([sys.executable, "-c", check], check=True)
        if "mlflow.pyfunc" not in found.text:
            exec(compile(found.text, found.where, "exec"), {})
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("mlflow.pyfunc")  # warns of types of its own
        text = found.text.replace("lifelong-moe.my@", "lifelong-moe.quickstart@")
        with patch.dict(os.environ, MLFLOW_TRACKING_URI="sqlite:///mlruns/mlflow.db"):
            exec(compile(text, found.where, "exec"), {})


def check_pattern(found: Found, command: Any, words: list[str]) -> None:
    """Options and the number of arguments of ``RUN [--to N]`` are those of the command."""
    options = {name: one for one in command.params for name in (*one.opts, *one.secondary_opts) if name[:1] == "-"}
    free = 0
    words = [word.strip("[]") for word in words]
    for before, word in itertools.pairwise(["", *words]):
        if word.startswith("-"):
            assert word in options, f"{found.where}: {word} is no option of {command.name}"
        elif before.startswith("-"):
            assert not options[before].is_flag, f"{found.where}: {before} takes no value"
        elif "=" not in word and word != "…":
            free += 1
    required = [one for one in command.params if one.param_type_name == "argument" and one.required]
    assert free == len(required), f"{found.where}: {command.name} takes {len(required)} arguments"
    assert all(name in words for name, one in options.items() if one.required), found


@pytest.mark.parametrize("text", ["status RUN --to N", "status", "drop RUN", "gc [--apply N]", "export RUN"])
def test_patterns_that_are_wrong(text: str) -> None:
    name, *words = text.split()
    command: Any = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    with pytest.raises(AssertionError):
        check_pattern(Found("p:1", "mention", text), command, words)


def quickstart() -> Any:
    """The quickstart's configuration, tiny."""
    return OmegaConf.merge(OmegaConf.load(ROOT / "configs/quickstart.yaml"), QUICKSTART)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: Path) -> Path:
    """A checkout's configurations, tiny, with text of a reader's own and documents in the inbox."""
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "mlruns", "data/inbox", "my"):
        Path(name).mkdir(parents=True)
    shutil.copy(template, "mlruns/mlflow.db")  # an empty database; making one takes seconds
    OmegaConf.save(quickstart(), "configs/quickstart.yaml")
    OmegaConf.save(
        OmegaConf.merge(OmegaConf.load(ROOT / "configs/compare.yaml"), {"seeds": [0]}), "configs/compare.yaml"
    )
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(ROOT / "configs/retrain.yaml"), RETRAIN), "configs/retrain.yaml")
    for name, kind in (("notes", "md"), ("src", "py")):
        Path(name).mkdir()
        for number in range(12):
            Path(name, f"{number}.{kind}").write_text(f"{name} {number} {VOCABULARIES['fruit']} {number}\n" * 20)
    write_corpus(Path("my/text.jsonl"), VOCABULARIES["sea"].split(), 0, documents=5)
    write_corpus(Path("data/inbox/new.jsonl"), VOCABULARIES["fruit"].split(), 1, documents=60)
    extract = dict(builtin._EXTRACT)
    few: dict[str, Callable[[], Any]] = {
        kind: lambda kind=kind: itertools.islice(extract[kind](), 120)  # type: ignore[misc]
        for kind in extract
    }
    monkeypatch.setattr(builtin, "_EXTRACT", few)
    return tmp_path


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pages that ``ui`` opened, beside a server that ends at once."""
    pages: list[str] = []
    monkeypatch.setattr("webbrowser.open", pages.append)
    monkeypatch.setattr(ui, "require_free", lambda *_: None)
    monkeypatch.setattr(ui, "wait_until_up", lambda *_: True)
    monkeypatch.setattr(ui, "serve_command", lambda *_: ([sys.executable, "-c", ""], {}))
    return pages


def code_cells() -> list[str]:
    """The notebook's code, cell by cell."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_holds_no_results() -> None:
    """They would be those of another day, and of another version."""
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (book["nbformat"], len(code_cells())) == (4, 7)
    assert all(cell.get("outputs", []) == [] and cell.get("execution_count") is None for cell in book["cells"])
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    assert all("".join(cell["source"]).strip() for cell in book["cells"])


def test_the_container_is_for_both_commands() -> None:
    """It is not built here, where no daemon is; what it names is there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    both = [one.text.split("#")[0].strip() for one in found_on("README.md", readme) if one.kind == "command"][:2]
    lines = [line for line in (ROOT / "docs/Dockerfile").read_text(encoding="utf-8").splitlines() if line]
    comments = [line for line in lines if line.startswith("#")]
    assert both == ["make quickstart", "make test"] and all(one in "\n".join(comments) for one in both)
    assert f"CMD {json.dumps(both[0].split())}" in lines
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    venv = re.search(r"^VENV := (.+)$", makefile, flags=re.MULTILINE)
    (installs,) = [line.split()[2:] for line in lines if line.startswith("RUN make ")]
    for target in installs:
        assert venv and re.search(rf"^\w+ := {re.escape(target.replace(venv[1], '$(VENV)'))}$", makefile, re.MULTILINE)
    python = re.search(r"^FROM python:(3\.\d+)-", "\n".join(lines), flags=re.MULTILINE)
    assert python and python[1] in ("3.11", "3.12", "3.13")  # those that requirements/ locks
    for name in ("data/cache", "data/models", "mlruns/*"):
        assert name in (ROOT / "docs/Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()


def draw_nothing(figure: matplotlib.figure.Figure, file: Any, **_: Any) -> None:
    """In place of pictures, which take two thirds of the time and are tested elsewhere."""
    if isinstance(file, str | Path):
        Path(file).write_bytes(b"")
    else:
        file.write(b"\x89PNG")


def test_the_pages_run_as_written(folder: Path, cli: Cli, opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", draw_nothing)
    reader = Reader(cli)
    for page in PAGES:
        for found in found_on(page, (ROOT / page).read_text(encoding="utf-8")):
            reader.do(found)
    shared: dict[str, object] = {}
    for number, text in enumerate(code_cells()):
        exec(compile(text, f"{NOTEBOOK.name}, cell {number}", "exec"), shared)
    # A notebook's figures stay with pyplot, where tests of ours look for figures that they have left.
    sys.modules["matplotlib.pyplot"].close("all")  # type: ignore[attr-defined]
    assert repr(shared["model"]).startswith("StageModel(cpp_headers, ")
    names = {shlex.split(asked)[0] for asked in reader.done}
    assert names >= {"run", "plan", "compare", "report", "retrain", "inspect", "evaluate", "generate", "lineage", "ui"}
    assert len(opened) == 1 and "/experiments/" in opened[0]
