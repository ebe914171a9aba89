"""Lightning is imported without what of torchmetrics nobody asks for, which is there for whoever does."""

import subprocess
import sys
from pathlib import Path

import pytest

from lifelong_moe.training.callbacks import late

IMPORTS = """
import sys
from lifelong_moe.training.callbacks.late import importing_lightning
with importing_lightning():
    import lightning.pytorch as pl
unasked = {"transformers", "scipy.signal", "torchmetrics.functional"}
assert not unasked & set(sys.modules), unasked & set(sys.modules)
from torchmetrics.classification import Accuracy
import torchmetrics
assert torchmetrics.Accuracy is Accuracy
assert isinstance(torchmetrics.MeanMetric(), pl.core.module.Metric)
"""


def test_lightning_leaves_most_of_torchmetrics_alone() -> None:
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that is laid out as torchmetrics, and says once it runs."""
    name = "metrics_laid_out_alike"
    (tmp_path / name).mkdir()
    files = {
        "__init__": f"ran = True\n_logger = None\nfrom {name}.metric import Metric\nclass Other(Metric): ...",
        "__about__": "__version__ = '1.2'",
        "utilities": f"from {name} import _logger",
        "metric": f"import {name}.utilities\nclass Metric: ...",
        "collections": f"from {name}.metric import Metric\nclass MetricCollection: ...",
    }
    for module, text in files.items():
        (tmp_path / name / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("", *(f".{module}" for module in files)):
        # To be removed again, whatever the test imports.
        monkeypatch.setitem(sys.modules, name + module, None)  # type: ignore[arg-type]
        monkeypatch.delitem(sys.modules, name + module)
    return name


def test_a_package_runs_when_more_is_asked_of_it(package: str) -> None:
    late._leave_unrun(package)
    found = __import__(package)
    before = found.Metric, found.MetricCollection, found.__version__
    assert "ran" not in vars(found)
    assert not hasattr(found, "__warningregistry__")
    assert issubclass(found.Other, before[0])
    assert found.ran and found.Metric is before[0] and found.__version__ == "1.2"


def test_a_package_of_which_all_is_asked_runs(package: str) -> None:
    late._leave_unrun(package)
    names: dict[str, object] = {}
    exec(f"from {package} import *", names)
    assert {"Metric", "Other"} <= names.keys()


@pytest.mark.parametrize("lacking", ["utilities", "metric", "collections", "__about__"])
def test_a_version_that_lacks_a_module_runs_as_a_whole(package: str, tmp_path: Path, lacking: str) -> None:
    (tmp_path / package / f"{lacking}.py").unlink()
    whole = "class Metric: ...\nclass MetricCollection: ...\n__version__ = '9'"
    (tmp_path / package / "__init__.py").write_text(whole)
    late._leave_unrun(package)
    found = __import__(package)
    for name in late.ASKED:
        assert getattr(found, name) is not None


def test_a_package_that_ran_or_is_absent_is_left_as_it_is(package: str) -> None:
    found = __import__(package)
    late._leave_unrun(package)
    assert sys.modules[package] is found
    late._leave_unrun("no_such_package_at_all")
    assert "no_such_package_at_all" not in sys.modules
