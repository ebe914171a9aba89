"""Perform operations in MLflow, or keep them in the spool: a failure of MLflow never stops a training.

The next start or ``lifelong-moe sync`` delivers the spool. Once spooling, a process goes on spooling. MLflow is
imported only when something is to be recorded, or its database cannot tell that all is there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Self

from lifelong_moe.config.tracking import TrackingConfig
from lifelong_moe.redaction import is_web, note_address, redacted, shown_address
from lifelong_moe.tracking.connection import (
    is_utf8,
    prepare_environment,
    probe,
    resolve_uri,
)
from lifelong_moe.tracking.database import Recorded, RecordedRun, recorded
from lifelong_moe.tracking.failures import failures, reason_of, unusable
from lifelong_moe.tracking.pages import links
from lifelong_moe.tracking.pages.views import View
from lifelong_moe.tracking.spool import SPOOL, Operation, RefusedError, Spool
from lifelong_moe.tracking.store import Store

log = logging.getLogger(__name__)

DELIVERY_SECONDS = 60.0
"""Longest time that connecting spends on delivering the spool."""
_OURS = ("do", "run", "time", "rows", "experiment", "parent", "by", "path", "alias")
"""Fields of operations that find something again: no text of theirs is a secret, and none may change."""


class Recorder:
    """Performs operations in MLflow, or spools them while MLflow is unavailable.

    Only failures of MLflow, its database, the network or the disk are caught; anything else is our bug and is raised.
    The id that a run had in the spool stays valid.
    """

    problem: str | None
    """Why nothing is recorded in MLflow, in one line; None while it is."""
    is_refused = False
    """Whether the reason is what the store's own database holds, which may be somebody else's."""

    def __init__(self, experiment: str, uri: str, spool: Spool | None, problem: str | None) -> None:
        """Use :meth:`connect` instead."""
        self._experiment, self._uri, self._spool, self.problem = experiment, uri, spool, problem
        self._opened: Store | None = None
        self._root: Path | None = None
        self._recorded: Recorded | None = None
        """The database that answers until MLflow is needed."""
        self._port = links.PORT

    @classmethod
    def connect(cls, config: TrackingConfig, root: Path) -> Self:
        """Open the tracking store within seconds, or go without it.

        Creating a SQLite database takes about 2 s, once. What the store missed before is delivered first.

        Args:
            config: Where to record, and whether.
            root: The ``mlruns/`` directory, which holds the spool, and database and artifacts if no URI says otherwise.

        Returns:
            The recorder; ``problem`` is set unless it records in MLflow.
        """
        if not config.enabled:
            return cls(config.experiment, "", None, "tracking.enabled=false: nothing is recorded in MLflow.")
        uri = resolve_uri(config.uri, root)
        if not is_utf8(uri if is_web(uri) else f"{uri} {root.absolute()}"):
            problem = "the working directory's name is not UTF-8, which MLflow cannot store: nothing is recorded."
            return cls(config.experiment, "", None, problem)
        prepare_environment()
        note_address(uri)
        spool = Spool(root, uri)
        recorder = cls(config.experiment, uri, spool, None)
        recorder._root, recorder._port = root, links.served_port(root)
        if spool.empty:
            recorder._recorded = recorded(uri, root, config.experiment)
        if recorder._recorded is None:
            recorder._reach(root)
        return recorder

    def _reach(self, root: Path) -> None:
        """Open the store by MLflow, or use the spool from now on."""
        if (failed := probe(self._uri) or self._open(root)) is not None:
            self._use_spool("is not usable", unusable(self._uri, failed))

    @property
    def _store(self) -> Store | None:
        """The store, which is opened when it is first needed."""
        if self._recorded is not None:
            assert self._root is not None
            self._recorded = None
            self._reach(self._root)
            if self.problem is not None:
                log.warning(self.problem)
        return self._opened

    def _find(self, run_id: str) -> RecordedRun | None:
        """A run, if it is found without MLflow."""
        return None if self._recorded is None else self._recorded.find(run_id)

    @classmethod
    def owes(cls, config: TrackingConfig, root: Path) -> bool:
        """Whether something waits to be recorded, for the arguments of :meth:`connect`; without importing MLflow."""
        return config.enabled and not Spool(root, resolve_uri(config.uri, root)).empty

    def _open(self, root: Path) -> str | None:
        """Open the store and deliver the spool to it; return why that failed, if it did."""
        assert self._spool is not None
        try:
            store = Store(self._uri, root)
            store.experiment_id(self._experiment)
            # Before anything new is recorded, so that MLflow gets operations in the order in which they were made.
            self._spool.deliver(store.deliver, DELIVERY_SECONDS)
        except failures() as error:
            self.is_refused = isinstance(error, RefusedError)
            return reason_of(error, self._uri)
        except ImportError as error:  # the database's driver is not installed
            return str(error)
        self._opened = store
        return None

    @property
    def active(self) -> bool:
        """Whether anything is recorded, in MLflow or in the spool."""
        return self.connected or self._spool is not None

    @property
    def connected(self) -> bool:
        """Whether records go to MLflow itself, not to the spool."""
        return self._recorded is not None or self._opened is not None

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
        if self._find(run_id) is not None:
            return True
        if self._store is not None:
            try:
                return self._store.find(run_id) is not None
            except failures() as error:
                self._fail(error)
        # Without MLflow nobody can tell; a run taken to exist is resumed, never created twice.
        return self.active

    def has_ended(self, run_id: str) -> bool:
        """Whether a run is there and finished; False too if that takes MLflow to find out."""
        found = self._find(run_id)
        return found is not None and found.finished

    def version_with_alias(self, name: str, stage_key: str, alias: str) -> str | None:
        """The number of a stage's version if it has an alias; None too if that takes MLflow to find out."""
        return None if self._recorded is None else self._recorded.version_with_alias(name, stage_key, alias)

    def has_model(self, name: str) -> bool:
        """Whether MLflow's registry has a model; False while MLflow is unavailable."""
        try:
            return self._store is not None and self._store.has_model(name)
        except failures() as error:
            self._fail(error)
            return False

    def ui_url(self, run_id: str) -> str:
        """Link to a run's charts; for a local database, on the server that ``lifelong-moe ui`` starts.

        Args:
            run_id: The run.

        Returns:
            The link; empty while MLflow is unavailable.
        """
        try:
            if (found := self._find(run_id)) is not None:
                known = found.run_id
            elif self._store is not None:
                known = self._store.resolve(run_id)
            else:
                return ""
        except failures() as error:
            self._fail(error)
            return ""
        return self._link(partial(links.ui_url, search=f"attributes.run_id='{known}'"))

    def view_url(self, view: View) -> str:
        """Link to a view that was saved; empty while MLflow is unavailable."""
        return self._link(partial(links.view_url, view=view))

    def _link(self, make: Callable[..., str]) -> str:
        try:
            number = self._recorded.experiment_id if self._recorded is not None else self.experiment_id
        except failures() as error:
            self._fail(error)
            return ""
        return "" if number is None else make(self._uri, number, port=self._port)

    @property
    def starting(self) -> str:
        """See :func:`lifelong_moe.tracking.pages.links.starting`."""
        return links.starting(self._uri, self._port)

    def run_page(self, run_id: str) -> str:
        """Address of a run's page, for notes of other runs; empty if MLflow is unavailable or has no such run."""
        if (found := self._find(run_id)) is not None:
            return links.run_page(found.experiment_id, found.run_id)
        try:
            run = None if self._store is None else self._store.find(run_id)
        except failures() as error:
            self._fail(error)
            return ""
        return "" if run is None else links.run_page(run.info.experiment_id, run.info.run_id)

    def _record(self, asked: Operation, content: bytes | None = None) -> str | None:
        """Perform an operation, or append it to the spool."""
        asked = {name: value if name in _OURS else redacted(value) for name, value in asked.items()}
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
        self._use_spool("failed", reason_of(error, self._uri))
        log.warning(self.problem)

    def _use_spool(self, how: str, reason: str) -> None:
        """Record in the spool from now on."""
        # For good: back in MLflow, later operations would overtake those in the spool.
        self._opened = self._recorded = None
        self.problem = (
            f"MLflow at {shown_address(self._uri)} {how}, so records are kept under mlruns/{SPOOL} until the "
            f"next run or `lifelong-moe sync` delivers them: {reason}"
        )
