"""An open MLflow tracking store, which performs the operations of :mod:`lifelong_moe.tracking.operations`."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lifelong_moe.errors import CorruptError
from lifelong_moe.redaction import is_web
from lifelong_moe.storage.keys import SHORT
from lifelong_moe.store.pointer import ARTIFACTS
from lifelong_moe.store.stages import StageStore
from lifelong_moe.tracking.database import EXPERIMENT_TAGS, LOCAL_ID_TAG, ensure_database
from lifelong_moe.tracking.failures import reason_of
from lifelong_moe.tracking.locations import keep_artifacts_within, require_within
from lifelong_moe.tracking.operations import LOCAL_PREFIX, MODEL_PREFIX, require_ours
from lifelong_moe.tracking.pages.views import comparison_view
from lifelong_moe.tracking.registry import (
    STAGE_KEY_TAG,
    Version,
    register_version,
    registered_name,
    remove_alias,
    write_artifact,
)
from lifelong_moe.tracking.spool import Operation, RefusedError

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Run
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

T = TypeVar("T")

# Limits of MLflow's REST interface: a larger batch or a longer digest is refused.
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
DIGEST_CHARACTERS = 36
SOURCE = "lifelong-moe"
"""Tag ``mlflow.source.name`` of every run."""

_ABSENT = "RESOURCE_DOES_NOT_EXIST"
_EXISTS = "RESOURCE_ALREADY_EXISTS"
_REFUSALS = (_ABSENT, _EXISTS, "INVALID_PARAMETER_VALUE", "INVALID_STATE")
"""Errors of a working store that will never accept the operation. ``BAD_REQUEST`` is absent: MLflow also reports a
broken database by it."""


class Store:
    """An open tracking store; creates an absent SQLite database.

    Args:
        uri: Tracking URI; the first request is that of :meth:`experiment_id`.
        root: The ``mlruns/`` directory.
    """

    def __init__(self, uri: str, root: Path) -> None:
        from mlflow import MlflowClient

        # MLflow announces migrations on stderr, and prints tracebacks of errors that we report in one line.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        ensure_database(uri, root)
        keep_artifacts_within(uri, root)
        self.client = MlflowClient(tracking_uri=uri)
        self._uri, self._root = uri, root
        self._experiments: dict[str, str] = {}
        self._runs: dict[str, str] = {}

    def experiment_id(self, name: str) -> str:
        """Find or create an experiment.

        Args:
            name: Its name.
        """
        if name not in self._experiments:
            self._experiments[name] = self._find_experiment(name)
        return self._experiments[name]

    @property
    def _remote(self) -> bool:
        """Whether artifacts go elsewhere than below the store."""
        return is_web(self._uri) or self._uri.startswith("databricks")

    @cached_property
    def _stages(self) -> StageStore:
        return StageStore(self._root)

    def _find_experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        # A server knows its own artifact store; a database needs one, or artifacts go under the working directory.
        location = None if self._remote else str(self._root.absolute() / ARTIFACTS)
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self.client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS))
            except MlflowException as error:  # Another process created it first.
                found = self.client.get_experiment_by_name(name)
                if error.error_code != _EXISTS or found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            raise MlflowException(f"experiment {name!r} is deleted; restore it or set another tracking.experiment.")
        require_within(self._uri, self._root, str(found.artifact_location))
        # Experiments of an earlier version lack some.
        self._add_tags(found, EXPERIMENT_TAGS)
        return str(found.experiment_id)

    def _add_tags(self, experiment: Experiment, tags: Mapping[str, str]) -> None:
        """Set those tags that an experiment lacks; what somebody has chosen stays."""
        for key, value in tags.items():
            if key not in experiment.tags:
                self.client.set_experiment_tag(str(experiment.experiment_id), key, value)

    def is_behind(self, url: str, experiment: str) -> bool:
        """Whether a server serves this very store.

        Args:
            url: Address of the server.
            experiment: Name of one of our experiments.
        """
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        try:
            theirs = MlflowClient(tracking_uri=url).get_experiment_by_name(experiment)
        except MlflowException:  # not a tracking server at all
            return False
        ours = self.client.get_experiment(self.experiment_id(experiment))
        # Names and ids repeat between stores; the time of creation, in milliseconds, hardly does.
        known = ("experiment_id", "artifact_location", "creation_time")
        return theirs is not None and all(getattr(theirs, key) == getattr(ours, key) for key in known)

    def find(self, run_id: str) -> Run | None:
        """Look up a run.

        Args:
            run_id: MLflow's id, or the local id that the run had before.

        Returns:
            The run, or None if it does not exist or is deleted.
        """
        from mlflow.exceptions import MlflowException

        if not run_id.startswith(LOCAL_PREFIX):
            try:
                run = self.client.get_run(run_id)
                if run.info.lifecycle_stage == "active":
                    return run
            except MlflowException as error:
                if error.error_code not in (_ABSENT, "INVALID_PARAMETER_VALUE"):  # the latter: not an id at all
                    raise
        # The id becomes part of a filter expression, where a quote would end it.
        if not re.fullmatch(r"[\w-]+", run_id):
            return None
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        found = self.client.search_runs(experiments, f"tags.`{LOCAL_ID_TAG}` = '{run_id}'", max_results=1)
        return found[0] if found else None

    def has_model(self, name: str) -> bool:
        """Whether the registry has a model."""
        return bool(self.client.search_registered_models(f"name = '{registered_name(name)}'", max_results=1))

    def resolve(self, run_id: str) -> str:
        """MLflow's id of a run; the given id if there is no such run, which MLflow then refuses."""
        if run_id not in self._runs:
            run = self.find(run_id)
            if run is None:
                return run_id
            self._runs[run_id] = run.info.run_id
        return self._runs[run_id]

    def deliver(self, asked: Operation, content: bytes | None = None) -> str | None:
        """Perform an operation from a spool, which somebody else may have written; see :meth:`perform`.

        Raises:
            RefusedError: If it is none of ours, or is about a run that we did not make or a model of another store's.
        """
        require_ours(asked)
        if asked["do"] == "version":
            # Others of the team have models of ours too, behind the same server.
            run = asked["name"].removeprefix(MODEL_PREFIX)
            if not (self._root / "runs" / run / "head.json").is_file():
                raise RefusedError(f"{asked['name']} is the model of no run of this store.")
        for run_id in {asked["run"], asked.get("parent"), asked.get("by")} - {None}:
            run = self._find(run_id)
            tags = {} if run is None else run.data.tags
            if run is not None and LOCAL_ID_TAG not in tags and tags.get("mlflow.source.name") != SOURCE:
                raise RefusedError(f"run {run_id} was not made by lifelong-moe.")
        return self.perform(asked, content)

    def _find(self, run_id: str) -> Run | None:
        """Like :meth:`find`, but refused for good where MLflow refuses the question."""
        from mlflow.exceptions import MlflowException

        try:
            return self.find(run_id)
        except MlflowException as error:
            if error.error_code in _REFUSALS:
                raise RefusedError(reason_of(error, self._uri)) from error
            raise

    def perform(self, asked: Operation, content: bytes | None = None) -> str | None:
        """Perform an operation.

        Args:
            asked: The operation.
            content: Bytes of the file of an ``artifact``.

        Returns:
            The id by which to refer to a run after ``start``: the given one if the run existed. The number of a
            ``version``.

        Raises:
            RefusedError: If trying again would not help.
        """
        from mlflow.exceptions import MlflowException

        actions = {
            "start": self._start,
            "metrics": self._metrics,
            "dataset": self._dataset,
            "tag": self._tag,
            "view": self._view,
            "version": self._version,
            "unalias": self._unalias,
            "finish": self._finish,
            "replaced": self._replaced,
        }
        try:
            if asked["do"] == "artifact":
                self._artifact(asked, content or b"")
                return None
            if asked["do"] not in actions:
                raise RefusedError(f"operation {asked['do']!r} is not known.")
            return actions[asked["do"]](asked)
        except MlflowException as error:
            if error.error_code in _REFUSALS:
                raise RefusedError(reason_of(error, self._uri)) from error
            raise

    def _start(self, asked: Operation) -> str:
        from mlflow.entities import Param, RunTag

        tags = dict(asked["tags"])
        if asked["parent"]:
            tags["mlflow.parentRunId"] = self.resolve(asked["parent"])
        # A local id is looked up first: a delivery that was killed may have created the run already.
        known = run = self.find(asked["run"])
        if run is None:
            run = self.client.create_run(
                self.experiment_id(asked["experiment"]),
                start_time=asked["time"],
                run_name=asked["name"],
                tags=tags | {LOCAL_ID_TAG: asked["run"]},
            )
        else:
            # MLflow shows the time from start to end as a duration, so what only adds to a finished run keeps its end.
            if not (asked.get("adds") is True and run.info.status == "FINISHED"):
                self.client.update_run(run.info.run_id, status="RUNNING")
            self.client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        run_id = str(run.info.run_id)
        # MLflow refuses to change a param, so a resumed run keeps those of its start.
        missing = [Param(key, value) for key, value in asked["params"].items() if key not in run.data.params]
        for chunk in chunks(missing, PARAMS_PER_BATCH):
            self.client.log_batch(run_id, params=chunk)
        self._runs[asked["run"]] = run_id
        return run_id if known is None else str(asked["run"])

    def _metrics(self, asked: Operation) -> None:
        from mlflow.entities import Metric

        run_id = self.resolve(asked["run"])
        for chunk in chunks(asked["rows"], METRICS_PER_BATCH):
            # With its first timestamp, a repeated point is the same row and adds nothing.
            metrics = [Metric(key, value, asked["time"], step) for key, value, step in chunk]
            self.client.log_batch(run_id, metrics=metrics)

    def _dataset(self, asked: Operation) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source, digest = json.dumps({"uri": asked["source"]}), asked["digest"][:DIGEST_CHARACTERS]
        dataset = Dataset(asked["name"], digest, "local", source, profile=json.dumps(asked["profile"]))
        given = DatasetInput(dataset, [InputTag("mlflow.data.context", asked["context"])])
        self.client.log_inputs(self.resolve(asked["run"]), [given])

    def _artifact(self, asked: Operation, content: bytes) -> None:
        write_artifact(self._artifacts(self.resolve(asked["run"])), asked["path"], content)

    def _artifacts(self, run_id: str) -> ArtifactRepository:
        """Where a run's artifacts go, as the database says it now.

        A client would remember it by the run's id alone, and write what belongs to a copy of a store to the original.
        """
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
        from mlflow.utils.uri import add_databricks_profile_info_to_artifact_uri

        location = str(self.client.get_run(run_id).info.artifact_uri)
        require_within(self._uri, self._root, location)
        return get_artifact_repository(
            add_databricks_profile_info_to_artifact_uri(location, self._uri), tracking_uri=self._uri
        )

    def _tag(self, asked: Operation) -> None:
        self.client.set_tag(self.resolve(asked["run"]), asked["key"], asked["value"])

    def _view(self, asked: Operation) -> None:
        run = self.client.get_run(self.resolve(asked["run"]))
        experiment = self.client.get_experiment(run.info.experiment_id)
        self._add_tags(experiment, comparison_view(asked["tag"], asked["name"]).tags)

    def _version(self, asked: Operation) -> str:
        run_id, key = self.resolve(asked["run"]), asked["tags"][STAGE_KEY_TAG]
        artifacts = self._artifacts(run_id)
        try:
            # By its key alone: what else a spool says of the stage's files is not believed.
            stage = self._stages.find(key)
            if stage is None:
                raise RefusedError(f"there is no stage {key[:SHORT]} in {self._stages.root}.")
            version = Version(
                name=asked["name"],
                store=self._stages,
                stage=stage,
                run_id=run_id,
                tags=asked["tags"],
                description=asked["description"],
                alias=asked["alias"],
            )
            return register_version(self.client, artifacts, version, remote=self._remote)
        except CorruptError as error:
            raise RefusedError(str(error)) from error

    def _unalias(self, asked: Operation) -> None:
        remove_alias(self.client, asked["name"], asked["alias"], asked["tags"][STAGE_KEY_TAG])

    def _finish(self, asked: Operation) -> None:
        run_id = self.resolve(asked["run"])
        if self.client.get_run(run_id).info.status != "FINISHED":
            self.client.set_terminated(run_id, asked["status"], end_time=asked["time"])

    def _replaced(self, asked: Operation) -> None:
        run = self.find(asked["run"])
        if run is None:
            return  # The user deleted it.
        self.client.set_tag(run.info.run_id, "lifelong.replaced_by", self.resolve(asked["by"]))
        if run.info.status == "RUNNING":
            self.client.set_terminated(run.info.run_id, "KILLED")


def chunks(items: Sequence[T], size: int) -> Iterable[Sequence[T]]:
    """Cut a sequence into pieces of at most ``size`` items."""
    return (items[start : start + size] for start in range(0, len(items), size))
