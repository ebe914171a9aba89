"""Documents that are made from the code say what the code says."""

from __future__ import annotations

import ast
import importlib.util
import re
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEADING = re.compile("(Args|Returns|Yields|Raises|Source):")


def test_configuration_page_is_what_the_docstrings_say() -> None:
    spec = importlib.util.spec_from_file_location("generate_configuration", ROOT / "docs/generate_configuration.py")
    assert spec is not None and spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == generator.configuration(), (
        "run: python docs/generate_configuration.py"
    )


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
