"""A thin, batched face over MLflow that never stops a training."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lifelong_moe.tracking import links, registry, store
from lifelong_moe.tracking.config import TrackingConfig
from lifelong_moe.tracking.connection import prepare_environment, probe, resolve_uri, without_credentials
from lifelong_moe.tracking.values import TAG_CHARACTERS, clean_key, cut, flatten_params, split_finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

log = logging.getLogger(__name__)
T = TypeVar("T")

_SOURCE_TAGS = {"mlflow.source.name": "lifelong-moe", "mlflow.source.type": "LOCAL"}


class Tracker:
    """Records runs in MLflow; when MLflow is absent or dies, every method does nothing and returns None.

    Only failures of MLflow, its database, the network or the disk turn a tracker off. Anything else is a bug of ours
    and is raised.
    """

    problem: str | None
    """One line why nothing (more) is recorded; None while all is well."""

    def __init__(self, client: MlflowClient | None, uri: str, experiment_id: str | None, problem: str | None) -> None:
        """Use :meth:`connect` instead."""
        self._client = client
        self._uri = uri
        self._experiment_id = experiment_id
        self.problem = problem

    @classmethod
    def connect(cls, config: TrackingConfig, root: Path) -> Tracker:
        """Open the tracking store within seconds, or give up on it.

        Creating a SQLite database takes about 6 s, once.

        Args:
            config: Where to record, and whether.
            root: The ``mlruns/`` directory, which holds database and artifacts if no URI says otherwise.

        Returns:
            A tracker; off, with ``problem`` set, if tracking is disabled or the store does not answer.
        """
        if not config.enabled:
            return cls(None, "", None, "tracking.enabled=false: nothing is recorded in MLflow.")
        uri = resolve_uri(config.uri, root)
        prepare_environment()
        problem = probe(uri)
        if problem is None:
            try:
                client, experiment_id = store.open_store(uri, config.experiment, root)
                return cls(client, uri, experiment_id, None)
            except store.failures() as error:
                problem = _one_line(error)
            except ImportError as error:  # the database's driver is not installed
                problem = str(error)
        shown = without_credentials(uri)
        return cls(None, uri, None, f"MLflow at {shown} is not usable, so nothing is recorded: {problem}")

    @property
    def active(self) -> bool:
        """Whether anything is recorded."""
        return self._client is not None

    @property
    def experiment_id(self) -> str | None:
        """MLflow's id of the experiment; None while off."""
        return self._experiment_id if self.active else None

    def run_exists(self, run_id: str) -> bool:
        """Look a run up.

        Args:
            run_id: MLflow run id.

        Returns:
            True if this store has the run and it is not deleted; False also while off.
        """
        return self._try(lambda client: store.find_run(client, run_id)) is not None

    def start_run(
        self,
        name: str,
        *,
        run_id: str | None = None,
        parent_id: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        note: str = "",
    ) -> str | None:
        """Create a run, or take one up again.

        Args:
            name: Name in the UI; a resumed run keeps the name it has.
            run_id: Run to resume: it is set to RUNNING again. One that does not exist is created anew.
            parent_id: Run under which this one is shown.
            params: Settings, nested at will; flattened to ``a.b.c``. Those that the run has already are left alone,
                whatever their value.
            tags: Tags to set.
            note: Markdown shown on the run's page; empty leaves it as it is.

        Returns:
            The run's id, or None while off.
        """
        given = dict(_SOURCE_TAGS) | dict(tags or {})
        if parent_id:
            given["mlflow.parentRunId"] = parent_id
        if note:
            given["mlflow.note.content"] = note
        legal_tags = {clean_key(key): cut(str(value), TAG_CHARACTERS) for key, value in given.items()}
        flat = flatten_params(params or {})
        return self._try(lambda client: self._start(client, name, run_id, flat, legal_tags))

    def _start(
        self, client: MlflowClient, name: str, run_id: str | None, params: dict[str, str], tags: dict[str, str]
    ) -> str:
        from mlflow.entities import Param, RunTag

        run = store.find_run(client, run_id) if run_id else None
        if run is None:
            assert self._experiment_id is not None
            run = client.create_run(self._experiment_id, run_name=name, tags=tags)
        else:
            client.update_run(run.info.run_id, status="RUNNING")
            client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        known = run.data.params
        missing = [Param(key, value) for key, value in params.items() if key not in known]
        for chunk in store.chunks(missing, store.PARAMS_PER_BATCH):
            client.log_batch(run.info.run_id, params=chunk)
        return str(run.info.run_id)

    def log_metrics(self, run_id: str | None, rows: Iterable[tuple[str, float, int]]) -> None:
        """Log many points at once; a call costs about 0.2 s per thousand, so collect before calling.

        Args:
            run_id: The run; None (from a tracker that was off) logs nothing.
            rows: ``(key, value, step)``. For a value that is not finite, ``<key>_absent`` is logged as 1 instead.
        """
        kept, absent = split_finite(rows)
        if absent:
            log.debug("not finite, logged as absent: %s", ", ".join(f"{key} at step {step}" for key, step in absent))
        if run_id is not None and kept:
            self._try(lambda client: store.log_metrics(client, run_id, kept))

    def log_dataset(
        self, run_id: str | None, *, name: str, digest: str, context: str, source: str, profile: Mapping[str, Any]
    ) -> None:
        """Say which data a run read; logging the same dataset again changes nothing.

        Args:
            run_id: The run.
            name: Distribution name.
            digest: Our own content hash; MLflow keeps its first 36 characters.
            context: What it was for, such as ``training`` or ``evaluation``.
            source: Where the documents came from: a path or URL.
            profile: Figures about it, such as document and token counts; must be JSON.
        """
        if run_id is not None:
            profile_json = json.dumps(dict(profile))
            self._try(lambda client: store.log_dataset(client, run_id, name, digest, context, source, profile_json))

    def log_figure(self, run_id: str | None, figure: Figure, artifact_path: str) -> None:
        """Store a figure with the run.

        Args:
            run_id: The run.
            figure: Matplotlib figure.
            artifact_path: Path under the run's artifacts, ending in ``.png``.
        """
        if run_id is not None:
            # MLflow's default would lower the figure's own resolution to 100.
            options = {"dpi": figure.dpi}
            self._try(lambda client: client.log_figure(run_id, figure, artifact_path, save_kwargs=options))

    def log_text(self, run_id: str | None, text: str, artifact_path: str) -> None:
        """Store a text with the run.

        Args:
            run_id: The run.
            text: Its content; the UI renders it by the path's suffix (``.md``, ``.json``, ``.html``).
            artifact_path: Path under the run's artifacts.
        """
        if run_id is not None:
            self._try(lambda client: client.log_text(run_id, text, artifact_path))

    def set_note(self, run_id: str | None, markdown: str) -> None:
        """Set the description on the run's page.

        Args:
            run_id: The run.
            markdown: Replaces the note; cut visibly at 8000 characters.
        """
        if run_id is not None:
            note = cut(markdown, TAG_CHARACTERS)
            self._try(lambda client: client.set_tag(run_id, "mlflow.note.content", note))

    def register_version(
        self,
        name: str,
        directory: Path,
        *,
        run_id: str | None,
        tags: Mapping[str, str],
        description: str = "",
        alias: str | None = None,
    ) -> str | None:
        """Register a committed stage as a model version; see :func:`lifelong_moe.tracking.registry.register_version`.

        Args:
            name: Registered model; created if missing.
            directory: The stage's directory of safetensors and JSON; nothing is copied.
            run_id: Run that trained it.
            tags: Must have ``stage_key``; a version of the model with the same one is returned instead of a new one.
            description: Markdown for the version's page.
            alias: Moved to this version, such as ``champion``.

        Returns:
            The version, or None while off.
        """
        if run_id is None:
            return None
        version = registry.Version(name, directory.absolute(), run_id, dict(tags), description, alias)
        return self._try(lambda client: registry.register_version(client, self._uri, version))

    def finish(self, run_id: str | None, status: str = "FINISHED") -> None:
        """End a run.

        Args:
            run_id: The run.
            status: ``FINISHED``, ``FAILED`` or ``KILLED``.
        """
        if run_id is not None:
            self._try(lambda client: client.set_terminated(run_id, status))

    def ui_url(self, run_ids: Sequence[str] | None = None) -> str:
        """Link to the charts; for a local database, on the server that ``lifelong-moe ui`` starts.

        Args:
            run_ids: Runs to compare; None shows all of the experiment.

        Returns:
            The link; empty while off.
        """
        return links.ui_url(self._uri, self._experiment_id, run_ids) if self.active and self._experiment_id else ""

    def _try(self, action: Callable[[MlflowClient], T]) -> T | None:
        """Do it, or turn the tracker off and say so once."""
        if self._client is None:
            return None
        try:
            return action(self._client)
        except store.failures() as error:
            self._client = None
            shown = without_credentials(self._uri)
            self.problem = f"MLflow at {shown} failed, so no more is recorded: {_one_line(error)}"
            log.warning(self.problem)
            return None


def _one_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"//[^/@\s]+@", "//", line)  # MLflow repeats the URI, password and all
