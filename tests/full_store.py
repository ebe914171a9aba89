"""A working directory with something of everything that a command may find there, for attacks on it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from unittest.mock import patch

import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from rich.console import Console

from lifelong_moe.data.arrivals.batches import BatchStore
from lifelong_moe.data.text import builtin
from lifelong_moe.data.text.documents import Document
from lifelong_moe.plan.comparison import load_comparison
from lifelong_moe.storage.signing import SigningKeys
from lifelong_moe.store.runs import require_head
from lifelong_moe.store.stages import StageStore
from lifelong_moe.tracking.connection import prepare_environment
from lifelong_moe.tracking.database import ensure_database
from lifelong_moe.tracking.operations import local_id, operation
from lifelong_moe.tracking.spool import Spool
from pipelines.compare.compare import compare
from pipelines.inspect.inspect import inspect_stage
from pipelines.shared.options import InspectionRequest
from pipelines.versions.drop import drop
from tests.checkpoints import config_of, write_checkpoint
from tests.retrain_lab import arrive, three_stages, tick, write_retraining
from tests.tiny import CONTEXT, SEQUENCES, tiny_config, train, write_config, write_corpora

SILENT = Console(quiet=True)
ROOT = Path("mlruns")
OWN_SPOOL = "0" * 16
"""Folder of the records that wait for the store's own database, whose address is another one in each copy."""
GONE = "a text that is gone"
"""Of a document whose batch keeps its hash alone."""
SHORT_STAGES = {"tokens": 2 * SEQUENCES * CONTEXT}


def make_store(root: Path, template: Path | None = None) -> None:
    """Runs with derived stages, versions and reports, a plan, batches, an inspection, a comparison, records that wait.

    The run ``tiny`` is in no MLflow; ``plain`` is in the store's own database, and its third stage is untrained; the
    first stage of ``held`` says where a checkpoint lies.

    Args:
        root: The current directory.
        template: An empty database of MLflow; None to make one, which takes seconds.
    """
    write_corpora(root)
    write_config(three_stages())
    train()
    inspect_stage("tiny", None, InspectionRequest(), SILENT)
    drop("tiny", "code", SILENT, ungated=True)
    write_retraining()
    Path("inbox").mkdir()
    arrive("noise")
    tick(dry_run=True)
    batches = BatchStore(ROOT)
    batches.remove_text(batches.add([Document(GONE, "source"), Document("gone too", "source")], []))
    _compare()
    _record(template)
    _refer()
    _sign()


def _sign() -> None:
    with tempfile.NamedTemporaryFile() as file:
        key = ec.generate_private_key(ec.SECP256R1())
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        file.flush()
        store = StageStore(ROOT, SigningKeys(Path(file.name), {}))
        store.sign(*require_head(ROOT, "tiny").plan[:1])


def _compare() -> None:
    # Of two experts others have a form, so that an arm can be exported.
    routing = {"top_k": 2, "renormalize": True}
    write_config(tiny_config(("fruit",), stage_defaults=SHORT_STAGES, routing=routing), "arms.yaml")
    arms = {"a": [], "b": ["stage_defaults.optim.lr=0.002"]}
    Path("compare.yaml").write_text(yaml.safe_dump({"compare": "c", "base": "arms.yaml", "arms": arms}))
    compare(load_comparison("compare.yaml", []), [], False, SILENT)


def _refer() -> None:
    write_checkpoint("llama_tied")
    config = config_of(bundles=True) | {"run": "held", "stages": [{"data": "fruit"}]}
    config["model"]["store"] = "reference"
    config["stage_defaults"] |= SHORT_STAGES
    train(write_config(config, "held.yaml"))


def _record(template: Path | None) -> None:
    """A run with a learned router whose experts can be consolidated, of text that comes with Python; MLflow has it."""
    words = [Document(f"{i} def return self value index for in range", f"file {i % 20}") for i in range(200)]
    with patch.dict(builtin._EXTRACT, {"python_code": lambda: iter(words)}):
        builtin.builtin_documents("python_code", Path("data/cache"))
    prepare_environment()
    if template is None:
        ensure_database(own_address(ROOT), ROOT)
    else:
        shutil.copy(template, ROOT / "mlflow.db")
    config = tiny_config(("words", "fruit"), run="plain", stage_defaults=SHORT_STAGES)
    config["distributions"]["words"] = {"builtin": "python_code", "heldout_fraction": 0.1}
    config["tracking"] = {"enabled": True, "experiment": "plain"}
    write_config(config, "plain.yaml")
    train("plain.yaml")
    config["distributions"]["sea"] = {"files": "sea.jsonl", "heldout_fraction": 0.1}
    write_config(config | {"stages": [*config["stages"], {"data": "sea"}]}, "plain.yaml")
    Spool(ROOT, "http://127.0.0.1:9").append({"do": "log_metrics", "run": "0" * 32, "metrics": []})
    own = Spool(ROOT, own_address(ROOT))
    run = local_id()
    own.append(operation("start", run, name="waits", experiment="plain", parent=None, params={"a": "1"}, tags={}))
    own.append(operation("artifact", run, path="note.md"), b"waits")
    own.path.rename(ROOT / "spool" / OWN_SPOOL)


def own_address(store: Path) -> str:
    """Address of a store's own database."""
    return f"sqlite:///{store.absolute()}/mlflow.db"


def settle(store: Path) -> None:
    """Let what waits for the database of the store that was copied wait for that of this copy."""
    waits = store / "spool" / OWN_SPOOL
    if waits.is_dir() and not waits.is_symlink():
        waits.rename(Spool(store, own_address(store)).path)
