"""What we ask of MLflow, call by call. These functions raise; the tracker catches."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lifelong_moe.tracking.connection import is_server

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

T = TypeVar("T")

METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
DIGEST_CHARACTERS = 36


def open_store(uri: str, experiment: str, root: Path) -> tuple[MlflowClient, str]:
    """Connect to a store and find or create the experiment.

    Args:
        uri: Tracking URI.
        experiment: Experiment name.
        root: The ``mlruns/`` directory.

    Returns:
        The client and the experiment's id.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    # It announces migrations on stderr, and prints tracebacks of errors that we report in one line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    client = MlflowClient(tracking_uri=uri)
    # A server knows its own artifact store; a database needs one, or artifacts go under the working directory.
    remote = is_server(uri) or uri.startswith("databricks")
    location = None if remote else str(root.absolute() / "artifacts")
    found = client.get_experiment_by_name(experiment)
    if found is None:
        try:
            return client, client.create_experiment(experiment, artifact_location=location)
        except MlflowException as error:  # two first runs at once: the other one was faster
            found = client.get_experiment_by_name(experiment)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise MlflowException(f"experiment {experiment!r} is deleted; restore it or set another tracking.experiment.")
    return client, found.experiment_id


def find_run(client: MlflowClient, run_id: str) -> Run | None:
    """Look a run up.

    Args:
        client: MLflow client.
        run_id: Any text.

    Returns:
        The run, or None if it does not exist or is deleted.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # the latter: not an id at all
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def log_metrics(client: MlflowClient, run_id: str, rows: Sequence[tuple[str, float, int]]) -> None:
    """Log points with one timestamp, a thousand a request.

    Args:
        client: MLflow client.
        run_id: The run.
        rows: ``(key, value, step)``; legal keys, finite values.
    """
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    for chunk in chunks(rows, METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=[Metric(key, value, now, step) for key, value, step in chunk])


def log_dataset(
    client: MlflowClient, run_id: str, name: str, digest: str, context: str, source: str, profile_json: str
) -> None:
    """Attach a dataset to a run; see :meth:`lifelong_moe.tracking.tracker.Tracker.log_dataset`."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(name, digest[:DIGEST_CHARACTERS], "local", json.dumps({"uri": source}), profile=profile_json)
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])


def chunks(items: Sequence[T], size: int) -> Iterable[Sequence[T]]:
    """Cut a sequence into pieces of at most ``size`` items."""
    return (items[start : start + size] for start in range(0, len(items), size))


def failures() -> tuple[type[Exception], ...]:
    """Name the exceptions that mean that MLflow, its database, the network or the disk failed."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import DBAPIError

    return (MlflowException, OSError, DBAPIError)  # requests' errors are OSErrors
