"""Documents that are made from the code say what the code says."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import tomllib
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from lifelong_moe.plan.comparison import ComparisonConfig, load_comparison
from lifelong_moe.storage.temporary import GRACE_SECONDS
from lifelong_moe.store.garbage import CACHE_SECONDS
from pipelines.cli import app
from pipelines.commands import gc

ROOT = Path(__file__).parents[2]
HEADING = re.compile("(Args|Returns|Yields|Raises|Source):")


def generator(name: str) -> ModuleType:
    """The script in ``docs/`` that writes a page."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("script", "page"),
    [("generate_configuration", "configuration"), ("generate_commands", "page")],
)
def test_generated_pages_are_what_the_code_says(script: str, page: str) -> None:
    written = ROOT / "docs" / f"{script.removeprefix('generate_')}.md"
    made = getattr(generator(script), page)()
    assert written.read_text(encoding="utf-8") == made, f"run: python docs/{script}.py"


def test_page_of_commands_has_each_option_that_a_command_takes() -> None:
    """Counted another way than the page is made: by what each function of the command line takes."""
    sections = (ROOT / "docs/commands.md").read_text(encoding="utf-8").split("\n## ")[2:]
    assert len(sections) == len(app.registered_commands)
    for command, text in zip(app.registered_commands, sections, strict=True):
        assert command.callback is not None and text.startswith(f"`lifelong-moe {command.callback.__name__}")
        takes = inspect.signature(command.callback).parameters
        assert text.count("\n| `") == len(takes)
        for name in takes:
            said = {"as_json": "--json", "ungated": "--no-gate", "plan_path": "--plan"}.get(name, name)
            said = {"every": "--all"}.get(said, said)
            said = {"config": "CONFIG", "overrides": "KEY=VALUE", "gate": "gate.KEY=VALUE", "runs": "RUN"}.get(
                said, said
            )
            assert re.search(rf"\n\| `\[?(--)?{re.escape(said).replace('_', '-')}\b", text, flags=re.IGNORECASE), name


def test_what_must_be_there_is_said_where_one_begins() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    least = project["requires-python"].removeprefix(">=")
    readme, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile"))
    assert f"Python {least} or newer" in readme and f"Python {least} or newer" in makefile
    assert f"({least.replace('.', ', ')})" in makefile
    assert re.findall(r"about (\d+) GB", makefile) == re.findall(r"about (\d+) GB of disk", readme)


def test_times_after_which_things_are_removed_are_said() -> None:
    assert (GRACE_SECONDS, CACHE_SECONDS) == (24 * 3600, 30 * 24 * 3600)
    (row,) = re.findall(r"^\| `lifelong-moe gc .*", (ROOT / "docs/usage.md").read_text("utf-8"), flags=re.MULTILINE)
    for text in (row, str(gc.__doc__)):
        assert "a day old" in text and "30 days" in text


def test_examples_of_arms_are_arms(tmp_path: Path) -> None:
    said = generator("generate_configuration").field_docs(ComparisonConfig)["arms"]
    examples = re.findall(r"such as ``(.+?)``", said)
    assert len(examples) == 2
    arms = "".join(f"  arm{number}: {example}\n" for number, example in enumerate(examples))
    file = tmp_path / "arms.yaml"
    file.write_text(f"compare: c\nbase: {ROOT}/configs/quickstart.yaml\narms:\n{arms}", encoding="utf-8")
    assert [arm.name for arm in load_comparison(file).arms] == ["arm0", "arm1.experts-4", "arm1.experts-8"]


def empty_sections(docstring: str) -> list[str]:
    """Headings under which nothing stands."""
    lines = [*docstring.splitlines(), ""]
    return [line for line, after in pairwise(lines) if HEADING.fullmatch(line) and after[:1] != " "]


def test_no_docstring_has_an_empty_section() -> None:
    assert empty_sections("Do.\n\nArgs:\n    x: One.\n\nSource:\n    A paper.") == []
    assert empty_sections("Do.\n\nArgs:\n\n    x: One.\n\nSource:") == ["Args:", "Source:"]
    found = []
    for path in sorted([*ROOT.glob("lifelong_moe/**/*.py"), *ROOT.glob("pipelines/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found += [f"{path.name}: {line}" for line in empty_sections(ast.get_docstring(node) or "")]
    assert not found


def test_places_that_pages_name_are_there() -> None:
    """A page's ``file.py:name`` names a function or class of that file; and a named file is there."""
    named = 0
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for file, name in re.findall(
            r"`((?:lifelong_moe|pipelines|tests|docs)/[\w/]+\.py)(?::(\w+))?", page.read_text("utf-8")
        ):
            assert (ROOT / file).is_file(), f"{page.name}: {file}"
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            kinds = (ast.FunctionDef, ast.ClassDef)
            assert not name or any(isinstance(n, kinds) and n.name == name for n in ast.walk(tree)), (
                f"{page.name}: {file}:{name}"
            )
            named += bool(name)
    assert named > 30


def test_no_page_has_a_place_that_is_still_to_be_filled() -> None:
    """A word in capitals after a sentence, as one writes where a number is to come; and no change is told twice."""
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        assert not re.findall(r"(?m)(?:^|[.:] )[A-Z]{4,}$", page.read_text("utf-8")), page.name
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8").splitlines()
    begins = [line[:60] for line in changes if line.startswith("- ")]
    assert sorted(set(begins)) == sorted(begins)
