"""What is imported is what ``pyproject.toml`` declares, read from the source with `ast`, so late imports count too."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = {"lifelong_moe", "pipelines", "tests"}
IF_INSTALLED = {"pynvml"}
"""Looked for, and done without."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: Iterable[str]) -> set[str]:
    return {normal(re.split(r"[\s<>=!~;\[]", requirement)[0]) for requirement in requirements}


def imported(*folders: str) -> dict[str, str]:
    """Top names of the foreign modules that these folders import, with a file that does."""
    found: dict[str, str] = {}
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            found.update({name.partition(".")[0]: str(path.relative_to(ROOT)) for name in names})
    return {name: path for name, path in found.items() if name not in OURS | set(sys.stdlib_module_names)}


def undeclared(found: dict[str, str], names: set[str]) -> list[str]:
    """``module (file)`` of each that none of the named distributions provides."""
    provides = packages_distributions()
    return [
        f"{module} ({path})"
        for module, path in sorted(found.items())
        if module not in IF_INSTALLED and not {normal(name) for name in provides.get(module, [module])} & names
    ]


def test_what_the_packages_import_is_declared_and_nothing_else() -> None:
    found, names = imported("lifelong_moe", "pipelines"), declared(PROJECT["dependencies"])
    assert undeclared(found, names) == []
    provides = packages_distributions()
    assert names - {normal(name) for module in found for name in provides.get(module, [])} == set()


def test_what_the_tests_import_is_declared() -> None:
    extras = PROJECT["optional-dependencies"]
    names = declared([*PROJECT["dependencies"], *extras["dev"], *extras["transformers"]])
    assert undeclared(imported("tests"), names) == []


def test_what_is_declared_has_a_known_good_version() -> None:
    pinned = declared((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    assert declared(PROJECT["dependencies"]) | declared(PROJECT["optional-dependencies"]["dev"]) <= pinned


def test_a_missing_declaration_is_found() -> None:
    assert undeclared({"yaml": "a.py", "numpy": "b.py", "pynvml": "c.py"}, {"numpy"}) == ["yaml (a.py)"]
    assert undeclared({"yaml": "a.py"}, {"pyyaml"}) == []
