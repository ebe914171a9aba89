"""What is imported is what ``pyproject.toml`` declares, read from the source with `ast`, so late imports count too."""

from __future__ import annotations

import ast
import re
import runpy
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
BUILD: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
LOCKS = ROOT / "requirements"
OURS = {"lifelong_moe", "pipelines", "tests"}
NOT_LOCKED = {"lm-eval"}
"""An extra of which some dependencies (rouge-score, sqlitedict, word2number) are published as source alone, while only
wheels are locked: what needs it is tested where somebody has installed it."""
IF_INSTALLED = {"pynvml"}
"""Looked for, and done without."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: Iterable[str]) -> set[str]:
    return {normal(re.split(r"[\s<>=!~;\[]", requirement)[0]) for requirement in requirements}


def locked(name: str) -> dict[str, str]:
    """The lines of each package of a lock file."""
    text = (LOCKS / name).read_text(encoding="utf-8")
    entry = (
        r"^([a-z0-9-]+)==\S+(?: ; [^\n]+)? \\\n(?:    --hash=sha256:[0-9a-f]{64} \\\n)*    --hash=sha256:[0-9a-f]{64}\n"
    )
    return {match[1]: match.group() for match in re.finditer(entry, text, re.MULTILINE)}


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
    extras = [*EXTRAS["signing"], *EXTRAS["transformers"], *EXTRAS["lm-eval"], *EXTRAS["gguf"]]
    found, names = imported("lifelong_moe", "pipelines"), declared([*PROJECT["dependencies"], *extras])
    assert undeclared(found, names) == []
    provides = packages_distributions()
    unused = names - {normal(name) for module in found for name in provides.get(module, [module])}
    assert unused == {"pyopenssl"}  # imported by model-signing, which does not declare it


def test_what_the_tests_import_is_declared() -> None:
    names = declared([*PROJECT["dependencies"], *(one for extra in EXTRAS.values() for one in extra)])
    assert undeclared(imported("tests"), names) == []


def test_what_is_declared_is_locked() -> None:
    base = locked("base.txt").keys()
    assert declared([*PROJECT["dependencies"], *BUILD]) <= base | {"torch"}
    assert locked("torch.txt").keys() >= {"torch"} == locked("torch-cpu.txt").keys()
    extras = [one for name, extra in EXTRAS.items() if name not in NOT_LOCKED for one in extra]
    assert declared(extras) <= base | {"torch"} | locked("dev.txt").keys()
    tools = (LOCKS / "release.in").read_text(encoding="utf-8").splitlines()
    assert declared(tools) <= locked("release.txt").keys()


def test_what_builds_the_package_is_one_version() -> None:
    assert [requirement for requirement in BUILD if not re.fullmatch(r"[\w-]+==[\w.]+", requirement)] == []


@pytest.mark.parametrize("name", ["base.txt", "torch.txt", "torch-cpu.txt", "dev.txt", "release.txt"])
def test_every_locked_version_has_hashes_and_no_address(name: str) -> None:
    assert locked(name)
    text = "".join(entry for entry in locked(name).values())
    lines = (LOCKS / name).read_text(encoding="utf-8").splitlines(keepends=True)
    # Nothing else stands there: no option of pip, no address, no version without a hash.
    assert text == "".join(line for line in lines if not line.startswith("#"))


def test_a_package_is_locked_once() -> None:
    names = [name for lock in ("base.txt", "torch.txt", "dev.txt") for name in locked(lock)]
    assert len(names) == len(set(names))


def test_both_builds_of_torch_are_one_version() -> None:
    (version,) = re.findall(r"^torch==(\S+)", locked("torch.txt")["torch"])
    known = runpy.run_path(str(LOCKS / "lock.py"))["TORCH_CPU"]
    cpu = locked("torch-cpu.txt")["torch"]
    assert cpu.startswith(f"torch=={version}+cpu ")
    assert re.findall(r"sha256:(\w+)", cpu) == list(known[version])


def test_pip_takes_nothing_but_what_is_locked() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    installs = [line for line in makefile.splitlines() if "pip install" in line]
    assert len(installs) == 2
    assert all("--require-hashes --only-binary :all:" in one or "--no-build-isolation -e ." in one for one in installs)
    assert all("--no-deps" in one for one in installs)


def test_a_missing_declaration_is_found() -> None:
    assert undeclared({"yaml": "a.py", "numpy": "b.py", "pynvml": "c.py"}, {"numpy"}) == ["yaml (a.py)"]
    assert undeclared({"yaml": "a.py"}, {"pyyaml"}) == []
