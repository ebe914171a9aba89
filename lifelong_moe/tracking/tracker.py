"""A thin, batched interface to MLflow that never stops a training and loses nothing while MLflow is unavailable."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lifelong_moe.redaction import redact
from lifelong_moe.tracking.operations import local_id, operation
from lifelong_moe.tracking.provenance import provenance
from lifelong_moe.tracking.recorder import Recorder
from lifelong_moe.tracking.registry import STAGE_KEY_TAG
from lifelong_moe.tracking.store import SOURCE
from lifelong_moe.tracking.values import TAG_CHARACTERS, clean_key, cut, flatten_params, split_finite, status_after

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

_SOURCE_TAGS = {"mlflow.source.name": SOURCE, "mlflow.source.type": "LOCAL"}


class Tracker(Recorder):
    """Records runs; open one with :meth:`~lifelong_moe.tracking.recorder.Recorder.connect`.

    A run id of None, as a disabled tracker returns, makes each method do nothing.
    """

    def start_run(
        self,
        name: str,
        *,
        run_id: str | None = None,
        parent_id: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        note: str = "",
        adds: bool = False,
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
            adds: Nothing is trained in the run from now on: one that is finished stays so, and keeps its end.

        Returns:
            The id of the run: the given one if it exists or MLflow is unavailable; None if nothing is recorded.
        """
        # Who adds to a finished run has not trained it.
        made = {} if adds else provenance()
        given = _SOURCE_TAGS | made | dict(tags or {}) | ({"mlflow.note.content": note} if note else {})
        legal_tags = {clean_key(key): cut(str(value), TAG_CHARACTERS) for key, value in given.items()}
        asked = operation(
            "start",
            run_id or local_id(),
            experiment=self._experiment,
            name=name,
            parent=parent_id,
            params=flatten_params(params or {}),
            tags=legal_tags,
            adds=adds,
        )
        # Spooled, the operation has no answer yet, and its own id stands for the run.
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
            # Rendered at once, since the spool keeps bytes.
            image = io.BytesIO()
            figure.savefig(image, format="png", dpi=figure.dpi)
            self.log_image(run_id, image.getvalue(), artifact_path)

    def log_image(self, run_id: str | None, image: bytes, artifact_path: str) -> None:
        """Store a picture with the run, as the bytes of its file."""
        if run_id is not None and self.active:
            self._record(operation("artifact", run_id, path=artifact_path), image)

    def log_text(self, run_id: str | None, text: str, artifact_path: str) -> None:
        """Store a text with the run.

        Args:
            run_id: The run.
            text: Its content; the UI renders it by the path's suffix (``.md``, ``.json``, ``.html``).
            artifact_path: Path under the run's artifacts.
        """
        if run_id is not None:
            self._record(operation("artifact", run_id, path=artifact_path), redact(text).encode())

    def set_note(self, run_id: str | None, markdown: str) -> None:
        """Set the description on the run's page.

        Args:
            run_id: The run.
            markdown: Replaces the note; cut visibly at 8000 characters.
        """
        if run_id is not None:
            self._record(operation("tag", run_id, key="mlflow.note.content", value=cut(markdown, TAG_CHARACTERS)))

    def save_view(self, run_id: str | None, tag: str, name: str) -> None:
        """Save the view of a comparison's runs; one that is there stays, for somebody may have changed it.

        Args:
            run_id: The comparison's own run.
            tag, name: See :func:`lifelong_moe.tracking.pages.views.comparison_view`.
        """
        if run_id is not None:
            self._record(operation("view", run_id, tag=tag, name=name))

    def register_version(
        self,
        name: str,
        *,
        run_id: str | None,
        tags: Mapping[str, str],
        description: str = "",
        alias: str | None = None,
    ) -> str | None:
        """Register a committed stage as a model version; see :func:`lifelong_moe.tracking.registry.register_version`.

        Args:
            name: Registered model; created if missing.
            run_id: Run that trained it.
            tags: Must have ``stage_key``, by which the store has the stage; a version of the model with the same one
                is returned instead of a new one.
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
            "tags": {key: str(value) for key, value in tags.items()},
            "description": description,
        }
        return self._record(operation("version", run_id, name=name, alias=alias, **given))

    def remove_alias(self, name: str, *, run_id: str | None, stage_key: str, alias: str) -> None:
        """Remove a model's alias if the version of a stage has it.

        Args:
            name: Registered model.
            run_id: Run that trained the stage.
            stage_key: Of the stage.
            alias: Such as ``candidate``.
        """
        if run_id is not None:
            self._record(operation("unalias", run_id, name=name, alias=alias, tags={STAGE_KEY_TAG: stage_key}))

    def finish(self, run_id: str | None, error: BaseException | None = None) -> None:
        """End a run; one that is finished keeps its end.

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
