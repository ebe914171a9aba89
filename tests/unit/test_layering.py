"""Imports point strictly down, and what must be imported in one place only is imported nowhere else.

Read from the source with `ast`, so imports inside functions and under ``TYPE_CHECKING`` count too.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house import FLOOR, FLOORS

ROOT = Path(__file__).parents[2]

ONLY_IN = {
    "faiss": "clustering",
    "datasets": "data",
    "tokenizers": "data",
    "huggingface_hub": "data",
    "lm_eval": "evaluation",
    "mlflow": "tracking",
    "lightning": "training",
    "gguf": "interop",
    "model_signing": "storage",
    "cryptography": "storage",
    "pytorch_lightning": "training",
}

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_NAMES = {"torch.load", "torch.jit.load", "faiss.read_index"}
FORBIDDEN_ENDINGS = {"load_from_checkpoint", "pyfunc.load_model", "read_index"}

WRITING_NAMES = {"os.replace", "os.rename", "os.fsync", "fcntl.flock", "fcntl.lockf"}
MAY_WRITE = {"lifelong_moe/tracking/registry.py": "MLflow takes an artifact from a file, so one is made for it"}

TORCH_FREE = ["errors.py", "config/**/*.py", "interop/layout/*.py", "plan/*.py"]
HEAVY = ["torch", "lightning", "mlflow", "faiss", "transformers", "datasets"]


def room_of(dotted: str) -> str | None:
    """Room that a dotted module name of ours stands in; None for other packages and for bare ``lifelong_moe``."""
    package, *rest = dotted.split(".")
    if package not in ("lifelong_moe", "pipelines") or (package == "lifelong_moe" and not rest):
        return None
    path = rest if package == "lifelong_moe" else [package, *rest]
    inner = "/".join(path[:2])
    return inner if inner in FLOOR else path[0]


def sources(root: Path) -> Iterator[tuple[str, str, ast.Module]]:
    """Each file of both packages: its name, its room (``""`` for ``lifelong_moe/__init__.py``), its tree."""
    for path in sorted([*root.glob("lifelong_moe/**/*.py"), *root.glob("pipelines/**/*.py")]):
        name = path.relative_to(root)
        room = room_of(".".join(name.with_suffix("").parts)) or ""
        yield str(name), room.removeprefix("__init__"), ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
            yield from ((node.lineno, str(name.value)) for name in node.args[:1] if isinstance(name, ast.Constant))


def import_violations(room: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    # What the package itself offers stands above all rooms, commands included: it is Python's front of both packages.
    floor = FLOOR.get(room, len(FLOORS))
    if room and room not in FLOOR:
        yield 1, f"room {room} is not in the table of floors"
    for line, name in imports(tree):
        package, target = name.split(".")[0], room_of(name)
        if name.startswith("."):
            yield line, f"relative import of {name}"
        elif target is not None and target != room and FLOOR.get(target, len(FLOORS)) >= floor:
            yield line, f"{room or 'lifelong_moe'} imports {target}, which is not below it"
        elif room.split("/")[0] not in (ONLY_IN.get(package, room.split("/")[0]), ""):
            yield line, f"{package} is imported outside {ONLY_IN[package]}"
        elif package in FORBIDDEN_MODULES:
            yield line, f"{package} is imported"


def names_used(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every attribute and name, as its module calls it whatever it was imported as."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom):
            aliases.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            first, *rest = ast.unparse(node).split(".")
            yield node.lineno, ".".join([aliases.get(first, first), *rest])


def loading_violations(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Whatever would unpickle a file or run code that came with one."""
    for line, name in names_used(tree):
        if name in FORBIDDEN_NAMES or any(name == end or name.endswith("." + end) for end in FORBIDDEN_ENDINGS):
            yield line, f"{name} is used"
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.keyword) and node.arg in {"trust_remote_code", "allow_pickle"}:
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield line, f"{node.arg} is passed"
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            yield line, "trust_remote_code is named"


def writing_violations(name: str, room: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Whatever makes a file appear, or locks one, outside the one room that does so whole or not at all."""
    if room == "storage" or name in MAY_WRITE:
        return
    for line, used in names_used(tree):
        if used in WRITING_NAMES or used.startswith("tempfile."):
            yield line, f"{used} is used outside storage"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.keywords:
            is_renaming = node.func.attr in ("rename", "replace") and len(node.args) == 1  # str.replace takes two
            if is_renaming and ast.unparse(node.func) not in WRITING_NAMES:
                yield node.lineno, f"{ast.unparse(node.func)} is used outside storage"


def violations(root: Path) -> list[str]:
    return [
        f"{name}:{line}: {what}"
        for name, room, tree in sources(root)
        for line, what in [
            *import_violations(room, tree),
            *loading_violations(tree),
            *writing_violations(name, room, tree),
        ]
    ]


def test_imports_point_down_and_nothing_is_unpickled() -> None:
    assert violations(ROOT) == []


def test_configs_answer_without_heavy_imports() -> None:
    package = ROOT / "lifelong_moe"
    files = sorted(path for pattern in TORCH_FREE for path in package.glob(pattern))
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    assert "lifelong_moe.config.run" in modules and "lifelong_moe.config.routing.base" in modules
    code = f"import sys\nimport {', '.join(modules)}\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    command = [sys.executable, "-W", "error", "-c", code]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (loaded.returncode, loaded.stderr, loaded.stdout) == (0, "", "\n")


BAD_LINES = {
    "import lifelong_moe.model.moe": "ops imports model, which is not below it",
    "from lifelong_moe import training": "ops imports training, which is not below it",
    "def late():\n    from lifelong_moe.routing.base import Router": "ops imports routing, which is not below it",
    "from lifelong_moe.attic import x": "ops imports attic, which is not below it",
    "import pipelines.cli": "ops imports pipelines, which is not below it",
    "from importlib import import_module\nimport_module('lifelong_moe.data.text.files')": "ops imports data/text",
    "from .losses import z_loss": "relative import of .losses.z_loss",
    "from . import losses": "relative import of ..losses",
    "import faiss": "faiss is imported outside clustering",
    "import mlflow.tracking as tracking": "mlflow is imported outside tracking",
    "from lightning.pytorch import Trainer": "lightning is imported outside training",
    "from tokenizers import Tokenizer": "tokenizers is imported outside data",
    "from pickle import loads": "pickle is imported",
    "import torch as t\nt.load('x')": "torch.load is used",
    "from torch import load as get\nget('x')": "torch.load is used",
    "Net.load_from_checkpoint('x')": "Net.load_from_checkpoint is used",
    "tracking.pyfunc.load_model('x')": "tracking.pyfunc.load_model is used",
    "index.read_index('x')": "index.read_index is used",
    "get(trust_remote_code=True)": "trust_remote_code is passed",
    "get(**{'trust_remote_code': True})": "trust_remote_code is named",
    "np.load('x', allow_pickle=True)": "allow_pickle is passed",
    "import os\nos.replace('a', 'b')": "os.replace is used outside storage",
    "from os import fsync as flush\nflush(1)": "os.fsync is used outside storage",
    "import fcntl as f\nf.lockf(1, 2)": "fcntl.lockf is used outside storage",
    "import tempfile\ntempfile.mkdtemp()": "tempfile.mkdtemp is used outside storage",
    "path.rename(target)": "path.rename is used outside storage",
    "(path / 'a').replace(target)": "(path / 'a').replace is used outside storage",
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items())
def test_a_bad_line_is_found(tmp_path: Path, line: str, message: str) -> None:
    room = tmp_path / "lifelong_moe" / "ops"
    room.mkdir(parents=True)
    (room / "bad.py").write_text(line)
    found = violations(tmp_path)
    assert len(found) == 1 and message in found[0] and found[0].startswith("lifelong_moe/ops/bad.py:")


def test_sideways_imports_and_unknown_rooms_are_found(tmp_path: Path) -> None:
    for name, text in {
        "lifelong_moe/routing/a.py": "from lifelong_moe.clustering import kmeans",
        "lifelong_moe/config/run.py": "import lifelong_moe.plan",
        "lifelong_moe/attic/a.py": "",
        "lifelong_moe/training/loop/a.py": "from lifelong_moe.training.stage import train_stage",
        "pipelines/run/a.py": "from pipelines.compare.compare import compare",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert violations(tmp_path) == [
        "lifelong_moe/attic/a.py:1: room attic is not in the table of floors",
        "lifelong_moe/config/run.py:1: config imports plan, which is not below it",
        "lifelong_moe/routing/a.py:1: routing imports clustering, which is not below it",
        "lifelong_moe/training/loop/a.py:1: training/loop imports training, which is not below it",
        "pipelines/run/a.py:1: pipelines/run imports pipelines/compare, which is not below it",
    ]


def test_good_lines_pass(tmp_path: Path) -> None:
    for name, text in {
        "lifelong_moe/__init__.py": '"""Words."""\nfrom pipelines.run.run import run',
        "lifelong_moe/errors.py": '"""No pickle, no torch.load, no trust_remote_code."""',
        "lifelong_moe/data/text/a.py": "import datasets\nimport lifelong_moe.data.text.b\nimport lifelong_moe.errors",
        "lifelong_moe/storage/a.py": "import os\nos.rename('a', 'b')\npath.replace(target)",
        "lifelong_moe/store/a.py": "'a'.replace('a', 'b')\nreplace(spec, key=1)\ndataclasses.replace(spec, key=1)",
        "lifelong_moe/model/a.py": "import torch\ntorch.save(1, 2)\nnp.load(x, allow_pickle=False)\njson.load(f)",
        "pipelines/run/run.py": "import lifelong_moe\nfrom lifelong_moe.plan import a\nfrom pipelines.shared import b",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert violations(tmp_path) == []
