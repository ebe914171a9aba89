"""A thin, batched interface to MLflow that never stops a training and loses nothing while MLflow is unavailable."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lifelong_moe.config.tracking import TrackingConfig
from lifelong_moe.storage.credentials import without_credentials
from lifelong_moe.tracking import links
from lifelong_moe.tracking.connection import (
    is_server,
    is_utf8,
    prepare_environment,
    probe,
    resolve_uri,
)
from lifelong_moe.tracking.failures import failures, one_line, unusable
from lifelong_moe.tracking.operations import local_id, operation
from lifelong_moe.tracking.registry import STAGE_KEY_TAG
from lifelong_moe.tracking.spool import SPOOL, Operation, Spool
from lifelong_moe.tracking.store import Store
from lifelong_moe.tracking.values import TAG_CHARACTERS, clean_key, cut, flatten_params, split_finite, status_after

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

DELIVERY_SECONDS = 60.0
"""Longest time that connecting spends on delivering the spool."""

_SOURCE_TAGS = {"mlflow.source.name": "lifelong-moe", "mlflow.source.type": "LOCAL"}


class Tracker:
    """Records runs in MLflow, or in the spool while MLflow is unavailable; the next start or ``sync`` delivers it.

    Only failures of MLflow, its database, the network or the disk are caught; anything else is our bug and is raised.
    The id that a run had in the spool stays valid.
    """

    problem: str | None
    """Why nothing is recorded in MLflow, in one line; None while it is."""

    def __init__(self, experiment: str, uri: str, spool: Spool | None, problem: str | None) -> None:
        """Use :meth:`connect` instead."""
        self._experiment, self._uri, self._spool, self.problem = experiment, uri, spool, problem
        self._store: Store | None = None

    @classmethod
    def connect(cls, config: TrackingConfig, root: Path) -> Tracker:
        """Open the tracking store within seconds, or go without it.

        Creating a SQLite database takes about 2 s, once. What the store missed before is delivered first.

        Args:
            config: Where to record, and whether.
            root: The ``mlruns/`` directory, which holds the spool, and database and artifacts if no URI says otherwise.

        Returns:
            A tracker; with ``problem`` set, and off if tracking is disabled.
        """
        if not config.enabled:
            return cls(config.experiment, "", None, "tracking.enabled=false: nothing is recorded in MLflow.")
        uri = resolve_uri(config.uri, root)
        if not is_utf8(uri if is_server(uri) else f"{uri} {root.absolute()}"):
            problem = "the working directory's name is not UTF-8, which MLflow cannot store: nothing is recorded."
            return cls(config.experiment, "", None, problem)
        prepare_environment()
        tracker = cls(config.experiment, uri, Spool(root, uri), None)
        if (failed := probe(uri) or tracker._open(root)) is not None:
            tracker._use_spool("is not usable", unusable(uri, failed))
        return tracker

    def _open(self, root: Path) -> str | None:
        """Open the store and deliver the spool to it; return why that failed, if it did."""
        assert self._spool is not None
        try:
            store = Store(self._uri, root)
            store.experiment_id(self._experiment)
            # Before anything new is recorded, so that MLflow gets operations in the order in which they were made.
            self._spool.deliver(store.perform, DELIVERY_SECONDS)
        except failures() as error:
            return one_line(error)
        except ImportError as error:  # the database's driver is not installed
            return str(error)
        self._store = store
        return None

    @property
    def active(self) -> bool:
        """Whether anything is recorded, in MLflow or in the spool."""
        return self._store is not None or self._spool is not None

    @property
    def connected(self) -> bool:
        """Whether records go to MLflow itself, not to the spool."""
        return self._store is not None

    @property
    def experiment_id(self) -> str | None:
        """MLflow's id of the experiment; None while MLflow is unavailable."""
        return self._store.experiment_id(self._experiment) if self._store is not None else None

    def is_behind(self, url: str) -> bool:
        """Whether the server at ``url`` serves this very store."""
        return self._store is not None and self._store.is_behind(url, self._experiment)

    def run_exists(self, run_id: str) -> bool:
        """Look up a run.

        Args:
            run_id: MLflow run id, or one from the spool.

        Returns:
            Whether this store has the run and it is not deleted; always True while records go to the spool, and False
            if nothing is recorded.
        """
        if self._store is not None:
            try:
                return self._store.find(run_id) is not None
            except failures() as error:
                self._fail(error)
        # Without MLflow nobody can tell; a run taken to exist is resumed, never created twice.
        return self.active

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
        """Create or resume a run.

        Args:
            name: Name in the UI; a resumed run keeps the name it has.
            run_id: Run to resume; created if it does not exist. Persist an id from
                :func:`lifelong_moe.tracking.operations.local_id` first, so a killed process can resume this run.
            parent_id: Run under which this one is shown.
            params: Settings, nested at will; flattened to ``a.b.c``. Existing params of the run stay.
            tags: Tags to set.
            note: Markdown shown on the run's page; empty leaves it as it is.

        Returns:
            The id of the run: the given one if it exists or MLflow is unavailable; None if nothing is recorded.
        """
        given = _SOURCE_TAGS | dict(tags or {}) | ({"mlflow.note.content": note} if note else {})
        legal_tags = {clean_key(key): cut(str(value), TAG_CHARACTERS) for key, value in given.items()}
        asked = operation(
            "start",
            run_id or local_id(),
            experiment=self._experiment,
            name=name,
            parent=parent_id,
            params=flatten_params(params or {}),
            tags=legal_tags,
        )
        return self._record(asked) or (asked["run"] if self.active else None)

    def log_metrics(self, run_id: str | None, rows: Iterable[tuple[str, float, int]]) -> None:
        """Log many points at once; a call takes about 0.2 s per thousand, so collect before calling.

        Args:
            run_id: The run; None (from a tracker that was off) logs nothing.
            rows: ``(key, value, step)``. For a value that is not finite, ``<key>_absent`` is logged as 1 instead.
        """
        kept, absent = split_finite(rows)
        if absent:
            log.debug("not finite, logged as absent: %s", ", ".join(f"{key} at step {step}" for key, step in absent))
        if run_id is not None and kept:
            self._record(operation("metrics", run_id, rows=kept))

    def log_dataset(
        self, run_id: str | None, *, name: str, digest: str, context: str, source: str, profile: Mapping[str, Any]
    ) -> None:
        """Log a dataset that a run read; logging it again changes nothing.

        Args:
            run_id: The run.
            name: Distribution name.
            digest: Our own content hash; MLflow keeps its first 36 characters.
            context: What it was for, such as ``training`` or ``evaluation``.
            source: Where the documents came from: a path or URL.
            profile: Figures about it, such as document and token counts; must be JSON.
        """
        if run_id is not None:
            given = {"name": name, "digest": digest, "context": context, "source": source, "profile": dict(profile)}
            self._record(operation("dataset", run_id, **given))

    def log_figure(self, run_id: str | None, figure: Figure, artifact_path: str) -> None:
        """Store a figure with the run.

        Args:
            run_id: The run.
            figure: Matplotlib figure.
            artifact_path: Path under the run's artifacts, ending in ``.png``.
        """
        if run_id is not None and self.active:
            image = io.BytesIO()
            figure.savefig(image, format="png", dpi=figure.dpi)
            self._record(operation("artifact", run_id, path=artifact_path), image.getvalue())

    def log_text(self, run_id: str | None, text: str, artifact_path: str) -> None:
        """Store a text with the run.

        Args:
            run_id: The run.
            text: Its content; the UI renders it by the path's suffix (``.md``, ``.json``, ``.html``).
            artifact_path: Path under the run's artifacts.
        """
        if run_id is not None:
            self._record(operation("artifact", run_id, path=artifact_path), text.encode())

    def set_note(self, run_id: str | None, markdown: str) -> None:
        """Set the description on the run's page.

        Args:
            run_id: The run.
            markdown: Replaces the note; cut visibly at 8000 characters.
        """
        if run_id is not None:
            self._record(operation("tag", run_id, key="mlflow.note.content", value=cut(markdown, TAG_CHARACTERS)))

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
            The version, or None while MLflow is unavailable.
        """
        if run_id is None:
            return None
        if STAGE_KEY_TAG not in tags:
            raise KeyError(STAGE_KEY_TAG)
        given = {
            "directory": str(directory.absolute()),
            "tags": {key: str(value) for key, value in tags.items()},
            "description": description,
        }
        return self._record(operation("version", run_id, name=name, alias=alias, **given))

    def finish(self, run_id: str | None, error: BaseException | None = None) -> None:
        """End a run.

        Args:
            run_id: The run.
            error: What ended it; see :func:`lifelong_moe.tracking.values.status_after`.
        """
        if run_id is not None:
            self._record(operation("finish", run_id, status=status_after(error)))

    def replaced(self, run_id: str, by: str) -> None:
        """Mark a run as replaced by another, and end it as killed if it is still running.

        Args:
            run_id: The old run; ignored if there is none.
            by: The new run.
        """
        self._record(operation("replaced", run_id, by=by))

    def ui_url(self, run_ids: Sequence[str] | None = None) -> str:
        """Link to the charts; for a local database, on the server that ``lifelong-moe ui`` starts.

        Args:
            run_ids: Runs to compare; None shows all of the experiment.

        Returns:
            The link; empty while MLflow is unavailable.
        """
        if self._store is None:
            return ""
        try:
            known = None if run_ids is None else [self._store.resolve(run_id) for run_id in run_ids]
            return links.ui_url(self._uri, self._store.experiment_id(self._experiment), known)
        except failures() as error:
            self._fail(error)
            return ""

    def _record(self, asked: Operation, content: bytes | None = None) -> str | None:
        """Perform an operation, or append it to the spool."""
        # After a failure MLflow may still have performed it; delivered again, it changes nothing.
        if self._store is not None:
            try:
                return self._store.perform(asked, content)
            except failures() as error:
                self._fail(error)
        if self._spool is not None:
            try:
                self._spool.append(asked, content)
            except OSError as error:
                kept, self._spool = self._spool.path, None
                self.problem = f"{self.problem}. But {kept} cannot be written, so no more is recorded: {error.strerror}"
                log.warning(self.problem)
        return None

    def _fail(self, error: Exception) -> None:
        self._use_spool("failed", one_line(error))
        log.warning(self.problem)

    def _use_spool(self, how: str, reason: str) -> None:
        """Record in the spool from now on."""
        # For good: back in MLflow, later operations would overtake those in the spool.
        self._store = None
        self.problem = (
            f"MLflow at {without_credentials(self._uri)} {how}, so records are kept under mlruns/{SPOOL} until the "
            f"next run or `lifelong-moe sync` delivers them: {reason}"
        )
