"""What others wrote never steers a terminal: characters that would are shown, and no string is markup."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from lifelong_moe.errors import visible
from pipelines.cli import COMMANDS, app, exit_code
from pipelines.shared import output
from pipelines.shared.output import SafeConsole
from pipelines.shared.quiet import silence_libraries
from tests.tiny import tiny_config, write_config

ROOT = Path(__file__).parents[2]
EARLIER = ROOT / "tests/integration/earlier"
OWN = re.compile(r"\r?\x1b\[([0-9;]*m|[12][KA]|\?25[lh])")
"""What rich sends by itself: colours, and what redraws a spinner's or a bar's line."""
HOSTILE = {
    "clear": "\x1b[2J\x1b[1;1H",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://evil.example\x1b\\here\x1b]8;;\x1b\\",
    "hidden": "\x1b[8mhidden\x1b[0m",
    "answer": "\x1bP$q\x1b\\\x05",
    "c1": "\x9b31m\x9d0;owned\x9c",
    "overwrite": "good\rbad\b\b\b",
    "forged": 'over\n{"outcome":"promoted"}\x0b\x85\u2028\u2029',
    "bidi": "\u202etxt.exe\u2066\u200f",
    "unseen": "a\u200bb\ufeff\U000e0041\u2060",
    "surrogate": "\udc9b31m",
    "markup": "[red]x[/red][/x][link=http://evil.example]y[/link]:warning:[bold",
    "escaped": "\\x1b[red]\\[/x]",
}


def steering(text: str) -> set[str]:
    """Characters of an output that steer a terminal; lines may end."""
    return {char for char in text if char != "\n" and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")}


@st.composite
def texts(draw: st.DrawFn) -> str:
    """Harmless letters between what is hostile, in any order."""
    pieces = st.one_of(st.sampled_from(list(HOSTILE.values())), st.text(max_size=4), st.sampled_from(["[", "]", "/"]))
    # The tab and the two joiners are the only ones that stay.
    return re.sub("[\t\u200c\u200d]", "", "".join(draw(st.lists(pieces, min_size=1, max_size=6))))


def table(text: str) -> Table:
    made = Table(text, title=text, caption=text, title_justify="left")
    made.add_column(text, footer=text)
    made.add_row(text, Text(text))
    return made


def spin(console: Console, text: str) -> None:
    with console.status(text) as status:
        status.update(text)


def advance(console: Console, text: str) -> None:
    with Progress(TextColumn("{task.description}", markup=False), console=console) as bar:
        bar.add_task(text, total=1)


WAYS: dict[str, Callable[[Console, str], None]] = {
    "string": lambda console, text: console.print(text),
    "strings": lambda console, text: console.print(text, text, sep=text, style="red"),
    "text": lambda console, text: console.print(Text(text)),
    "table": lambda console, text: console.print(table(text)),
    "rule": lambda console, text: console.rule(text),
    "status": spin,
    "bar": advance,
    "log": lambda console, text: console.log(text),
    "out": lambda console, text: console.out(text),
    "part": output.print_text,
    "asked for markup": lambda console, text: console.print(text, markup=True, emoji=True, highlight=True),
}


@pytest.mark.parametrize("way", WAYS)
@given(text=texts())
@example(text="".join(HOSTILE.values()))
def test_whatever_is_printed_is_shown(way: str, text: str) -> None:
    for terminal in (False, True):
        file = io.StringIO()
        colours = "truecolor" if terminal else None
        # Wide, so that a table's cell stays on one line.
        WAYS[way](SafeConsole(file, width=2000, force_terminal=terminal, color_system=colours), text)
        printed = OWN.sub("", file.getvalue()) if terminal else file.getvalue()
        assert not steering(printed), (terminal, steering(printed))


@pytest.mark.parametrize("way", ["string", "table", "rule"])
def test_brackets_are_brackets(way: str) -> None:
    file = io.StringIO()
    WAYS[way](SafeConsole(file, width=2000), HOSTILE["markup"])
    assert HOSTILE["markup"] in file.getvalue()


def test_a_string_is_one_line() -> None:
    file = io.StringIO()
    SafeConsole(file, width=200).print(f"rejected: {HOSTILE['forged']}")
    assert file.getvalue().count("\n") == 1 and "\\n{" in file.getvalue()


@contextmanager
def screen(path: Path) -> Iterator[Callable[[], str]]:
    """Both standard streams as a process has them, and what reached the terminal."""
    # Not a fixture: pytest puts its own streams and handlers there when a test begins.
    with path.open("wb") as file, pytest.MonkeyPatch.context() as patch:
        stream = output.stream(file.fileno(), None, "backslashreplace")
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        patch.setattr(logging.getLogger(), "handlers", [])

        def seen() -> str:
            stream.flush()
            return path.read_bytes().decode("utf-8")

        yield seen


@pytest.mark.parametrize("name", HOSTILE)
def test_tracebacks_logs_and_what_libraries_print(name: str, tmp_path: Path) -> None:
    text = HOSTILE[name]
    with screen(tmp_path / "screen") as seen:
        silence_libraries()
        print(text)
        sys.stderr.writelines([text, "\n"])
        logging.getLogger("pipelines.somewhere").warning("hook failed: %s", text)
        try:
            raise RuntimeError(text)
        except RuntimeError:
            traceback.print_exc()
            sys.__excepthook__(*sys.exc_info())
        output.tell(text)
        found = seen()
    assert not steering(found) and found.count("RuntimeError: ") == 2
    (logged,) = [line for line in found.splitlines() if "hook failed" in line]
    assert logged == f"WARNING: hook failed: {visible(text, keep='')}"


def test_warnings_and_an_uncaught_error_of_a_process() -> None:
    code = (
        "import json, sys, warnings; from pipelines.shared import output; output.make_robust()\n"
        "texts = json.loads(sys.argv[1]); [warnings.warn(text) for text in texts]; raise ValueError(''.join(texts))"
    )
    asked = [sys.executable, "-W", "always", "-c", code, json.dumps(list(HOSTILE.values()))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(asked, capture_output=True, encoding="utf-8", env=environment, check=False)
    assert found.returncode == 1 and found.stderr.count("UserWarning: ") == len(HOSTILE)
    assert "ValueError: " in found.stderr and not steering(found.stderr), steering(found.stderr)


def test_consoles_of_rich_keep_their_colours_and_libraries_gain_none(tmp_path: Path) -> None:
    """While a spinner turns, rich reads escape sequences of what others print as styles, links among them."""
    with screen(tmp_path / "screen") as seen:
        Console(file=sys.stdout, force_terminal=True, color_system="truecolor").print("help", style="bold")
        assert seen() == "\x1b[1mhelp\x1b[0m\n"
        console = SafeConsole(sys.stdout, force_terminal=True, color_system="truecolor", width=200)
        with console.status("waiting"):
            print(HOSTILE["link"] + HOSTILE["hidden"], file=sys.stderr)
        found = seen()
    assert "here" in found and "evil.example" not in found and "\x1b[8m" not in found


@pytest.mark.parametrize("name", HOSTILE)
def test_json_is_the_same_value_and_steers_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    output.finish({HOSTILE[name]: [HOSTILE[name]]}, as_json=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert not steering(line) and json.loads(line) == {HOSTILE[name]: [HOSTILE[name]]}


ALL = "".join(HOSTILE.values())


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """A command in a copy of a small store; returns its exit code and what it printed on both streams."""
    shutil.copytree(EARLIER, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(1)

    def called(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["lifelong-moe", *arguments])
        capsys.readouterr()
        code = exit_code(app)
        out, err = capsys.readouterr()
        assert not steering(out + err), (arguments, steering(out + err))
        assert "Traceback" not in err
        return code, out + err

    return called


ARGUMENTS = {
    "init": ([ALL], ["."], [".", "--to", ALL]),
    "run": ([ALL], ["tiny.yaml", f"run={ALL}"]),
    "plan": ([ALL], ["tiny.yaml", f"{ALL}=1"], ["tiny.yaml", f"distributions.x.files={ALL}"]),
    "compare": ([ALL], ["compare.yaml", "--only", ALL]),
    "prepare": ([ALL], ["tiny.yaml", f"tokenizer.path={ALL}"]),
    "retrain": ([ALL], ["retrain.yaml", "--plan", ALL], ["retrain.yaml", "--reopen", ALL]),
    "runs": ([], [ALL]),
    "report": ([ALL],),
    "status": ([ALL], ["old", ALL]),
    "lineage": ([ALL], ["old", "--expert", ALL], ["old", "--expert", f"{ALL}/L0/E0"], ["old", "--document", ALL]),
    "promote": ([ALL], ["old", "--version", ALL], ["old", "--config", ALL]),
    "rollback": ([ALL], ["old", "--to", ALL]),
    "drop": (["old", ALL], ["old", "code", f"gate.{ALL}=1"]),
    "consolidate": (["old", ALL],),
    "gc": (["--json"], [], [f"--{ALL}"]),
    "evaluate": (["old", "--data", ALL], ["old", "--data", "*.jsonl"], ["old", "--data", "text.txt", "--label", ALL]),
    "generate": (["old", ALL.replace("\udc9b", ""), "--max-new-tokens", "2"], ["old", "x", "--stage", ALL]),
    "inspect": (
        ["old", "--text", ALL.replace("\udc9b", "")],
        ["old", "--text-file", ALL],
        ["old", "--text", "a", "--html", ALL],
        ["old", "--text", "a", "--save", f"{ALL}/x.parquet"],
    ),
    "sync": ([], [ALL]),
    "export": ([ALL, "--to", "out"], ["old", "--to", f"{ALL}/x"], ["old", "--to", "out", "--generation", ALL]),
    "ui": (["--host", ALL, "--no-browser"], ["--port", ALL]),
}
"""Arguments of every command in which names, paths and texts of others may stand."""


def test_every_command_is_there() -> None:
    assert set(ARGUMENTS) == {command.__name__ for command in COMMANDS}


@pytest.mark.parametrize("command", ARGUMENTS)
def test_arguments_and_files_that_others_named(command: str, call: Callable[..., tuple[int, str]]) -> None:
    write_config(tiny_config(("fruit",)))
    Path("compare.yaml").write_text("compare: c\nbase: tiny.yaml\narms: {a: {overrides: []}}\n", encoding="utf-8")
    Path("retrain.yaml").write_text("base: tiny.yaml\ninbox: {path: inbox}\n", encoding="utf-8")
    # Names of files hold neither a slash nor a line's end of ours, and no more than 255 bytes.
    name = re.sub("[/\\0]", "", ALL)[:60]
    Path(f"{name}.jsonl").write_text('{"text": "apple"}\n{"text": 1}\n', encoding="utf-8")
    for folder in ("stages", "work", "evaluations", "batches", "spool"):
        Path("mlruns", folder, name).mkdir(parents=True)
    for arguments in ARGUMENTS[command]:
        for json_too in ((), ("--json",)) if command not in ("retrain", "ui") else ((),):
            code, _ = call(command, *arguments, *json_too)
            assert code in (0, 2, 5, 7, 75), arguments


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Each text within JSON data; of a list's items, the first only."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*place, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*place, 0))
    elif isinstance(value, str):
        yield place


def stored() -> list[tuple[str, tuple[Any, ...]]]:
    files = [path for path in sorted(EARLIER.rglob("mlruns/**/*.json")) if path.name != "tokenizer.json"]
    return [(str(path.relative_to(EARLIER)), place) for path in files for place in places(json.loads(path.read_text()))]


def test_every_text_of_a_store(call: Callable[..., tuple[int, str]]) -> None:
    """At each place in turn, by a command that prints it; whether it is refused or shown is another matter."""
    readers = {"head.json": "status", "report.json": "report"}
    for name, place in stored():
        path, value = Path(name), json.loads(Path(name).read_text(encoding="utf-8"))
        inner = value
        for step in place[:-1]:
            inner = inner[step]
        inner[place[-1]] = ALL
        path.write_text(json.dumps(value), encoding="utf-8")
        for arguments in ((readers.get(path.name, "lineage"), "old"), *([("runs",)] if path.name in readers else [])):
            code, _ = call(*arguments)
            assert code in (0, 2, 7), (name, place)
        shutil.copyfile(EARLIER / name, path)


FORBIDDEN = {
    "print": "output.tell or a console prints",
    "Console": "output.console makes consoles",
    "from_markup": "a Text has a style",
    "print_exception": "errors are one line",
    "print_exc": "errors are one line",
    "echo": "a console prints",
    "secho": "a console prints",
    "StreamHandler": "silence_libraries makes the only one",
    "basicConfig": "silence_libraries calls it",
    "Status": "a console has one",
    "Live": "a console has a status",
}
"""Calls that would print past the wall."""


def bypasses(text: str) -> Iterator[str]:
    """What in a file prints past the wall, or asks for markup."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            is_console = isinstance(node.func, ast.Attribute) and called == "print"
            if called in FORBIDDEN and not is_console:
                yield f"{called}: {FORBIDDEN[called]}"
            marked = {one.arg: one.value for one in node.keywords}
            if called == "TextColumn" and "markup" not in marked:
                yield "TextColumn: markup=False"
            if (given := marked.get("markup")) is not None and ast.unparse(given) != "False":
                yield "markup"
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr"):
            yield ast.unparse(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search(r"\[/\w*\]", node.value):
            yield "a tag of markup"


def test_nothing_prints_past_the_wall() -> None:
    allowed = {"pipelines/shared/output.py", "pipelines/shared/quiet.py"}
    allowed.add("lifelong_moe/data/tokens/pick.py")  # goes out with a model, and works without us
    allowed.add("lifelong_moe/training/ranks/rank.py")  # writes to the main process, which prints
    files = [path for package in ("lifelong_moe", "pipelines") for path in sorted((ROOT / package).rglob("*.py"))]
    found = {str(path.relative_to(ROOT)): list(bypasses(path.read_text(encoding="utf-8"))) for path in files}
    assert {name: ways for name, ways in found.items() if ways and name not in allowed} == {}
    made = 'print(x)\nrich.print(x)\nConsole(stderr=True)\nTextColumn("{x}")\nText.from_markup(x)\nsys.stderr.write(x)'
    assert len(list(bypasses(made))) == 5
    assert list(bypasses("console.print(x, markup=True)")) == ["markup"]
    assert list(bypasses('console.print(f"[/red]{x}")')) == ["a tag of markup"]


def test_generate_sends_controls_only_with_raw(call: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    asked = ["generate", "old", "\x1b[31m\x9b1mapple\r\tpear", "--max-new-tokens", "2"]
    code, printed = call(*asked)
    assert code == 0 and "\\x1b[31m\\x9b1mapple\\r" in printed
    with screen(tmp_path / "screen") as seen:
        sys.argv = ["lifelong-moe", *asked, "--raw"]
        assert exit_code(app) == 0
        assert seen().startswith("\x1b[31m\x9b1mapple\r\tpear")
