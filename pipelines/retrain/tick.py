"""State of one tick of retraining, and how it ends."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
from rich.console import Console

from lifelong_moe.config.data import KeepText
from lifelong_moe.config.load import written_config
from lifelong_moe.config.retraining.policy import HELDOUT_SOURCES
from lifelong_moe.data.arrivals.batches import BatchStore
from lifelong_moe.data.formats.bad_lines import BadLines
from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.tokens.shards import tokenize_documents
from lifelong_moe.errors import ConfigError, LifelongError, as_ours, one_line
from lifelong_moe.plan.retraining import Retraining
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.storage.modes import PRIVATE
from lifelong_moe.store.batch_text import read_heads, removable_texts, remove_batch_text
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import OpenRun, RunRecord, require_head, timestamp
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.store.ticks import LastTick, SettledBatch
from lifelong_moe.tracking.tracker import Tracker
from pipelines.retrain import hooks
from pipelines.retrain.outcome import AWAITING, ServingVersion, TickOutcome
from pipelines.retrain.render import print_outcome
from pipelines.shared.kept_text import remembered_by
from pipelines.shared.novelty import NewDocuments, arrived
from pipelines.shared.places import CACHE, ROOT
from pipelines.shared.recorded import model_name, show_champion
from pipelines.versions.served import served_stages


class Tick(OpenRun):
    """State of one tick: the run under its lock, its stores and its configuration."""

    def __init__(self, retraining: Retraining, record: RunRecord, head: RunHead, console: Console) -> None:
        super().__init__(record, head)
        self.retraining, self.console = retraining, console
        self.bad_lines: int | None = None
        """Lines of the inbox that this tick left out."""
        self._tokens: dict[str, int] = {}
        self.store, self.batches = StageStore(ROOT), BatchStore(ROOT)
        self.base, self.added = served_stages(head.champion, self.store)
        self.config = retraining.config(self.base, self.added)
        self.known = remembered_by(head, written_config(retraining.base), head.champion, self.store)

    def end(self, ended: TickOutcome) -> TickOutcome:
        """Write the outcome to ledger and head, run the hooks, and return it with champion, run and time."""
        now = self.head.champion
        serving = ServingVersion(now.id, now.stages[-1].name, now.key)
        ended = replace(ended, champion=serving, bad_lines=self.bad_lines)
        last = LastTick(at=timestamp(), outcome=ended.outcome, reason=ended.reason, batch=ended.batch)
        # A batch that waits for a higher limit, or for more of its kind, is reported once, not every night.
        repeated = ended.outcome in ("over budget", "waiting", AWAITING) and last.repeats(self.head.last_tick)
        # Ledger before head: a tick killed in between is repeated and logged twice, but no version lacks its line.
        if not repeated:
            self.record.log("tick", **ended.to_json())
        ended = replace(ended, run=self.record.run, at=last.at)
        self.save(replace(self.head, last_tick=last))
        print_outcome(self.console, ended)
        if ended.outcome != "idle" and not repeated:
            hooks.tell(self.retraining.settings.hooks, ended)
        return ended

    def quarantine(self, lines: BadLines | None) -> None:
        """Keep bad lines of the inbox apart, for their owner alone, and say how many there are."""
        if lines is None or not lines.found:
            return
        path, first, self.bad_lines = self.record.path / "bad_lines.jsonl", lines.found[0], len(lines.found)
        write_atomic(path, lines.to_jsonl(), PRIVATE)
        self.console.print(
            f"{self.bad_lines:,} lines of the inbox hold no document and are left out ({path}): the first is "
            f"{first.file}:{first.line}: {first.reason}"
        )

    def tell_champion(self) -> None:
        """Send MLflow what it missed, and which version serves."""
        # After an idle tick all is told but what the spool holds, and opening MLflow takes longer than such a tick.
        last, tracking = self.head.last_tick, self.config.tracking
        if (
            last is not None
            and last.outcome in ("idle", "waiting", "over budget", AWAITING)
            and not Tracker.owes(tracking, ROOT)
        ):
            return
        # A server that was away during an earlier tick learns of its outcome even if nothing new arrives.
        tracker = Tracker.connect(tracking, ROOT)
        if tracker.connected:
            show_champion(self.head, tracker)

    def open_batch(self, batch: str) -> None:
        """Note in the head that a batch's text is about to be written.

        After a kill the next tick finds it, and other runs that look at the same batch leave it alone.
        """
        opened = (*(one for one in self.head.open if one != batch), batch)
        # The head on disk gets the note alone: the rest of this tick's head must wait for its end.
        self.head = replace(self.head, open=opened)
        self.record.set_head(replace(require_head(ROOT, self.record.run), open=opened))

    def remove_text(self, *, working: bool = False) -> None:
        """Remove the text of batches that ``inbox.keep_text`` does not keep."""
        keep = self.retraining.settings.inbox.keep_text
        self.head = replace(self.head, keep_text=keep)
        if keep == KeepText.always:
            if not working and (head := require_head(ROOT, self.record.run)).open:
                self.record.set_head(replace(head, open=()))
            return
        try:
            heads = read_heads(ROOT)  # from disk: the head in memory of a tick that failed was never committed
        except LifelongError as error:  # unknown what another run still needs, so nothing goes; the tick is unharmed
            self.console.print(f"inbox.keep_text={keep}: nothing is removed. {error}")
            return
        head = heads[self.record.run] = replace(heads[self.record.run], keep_text=keep)
        removable = removable_texts(heads, [self.record.run], working=working)
        if freed := sum(remove_batch_text(ROOT, CACHE, batch, head) for batch in removable):
            self.console.print(f"inbox.keep_text={keep}: {freed / 1e6:.1f} MB of text removed")
        left = tuple(batch for batch in head.open if self.batches.copies(batch))
        if left != head.open:
            self.head = replace(self.head, open=left)
            self.record.set_head(replace(head, open=left))

    def fail(self, error: BaseException) -> None:
        """Write a failure to ledger and head, and run the hooks. Mistakes of the user (exit code 2) write nothing."""
        ours = as_ours(error)
        reason, code = one_line(str(ours or error)), ours.exit_code if ours else 1
        failure = TickOutcome("failed", reason, error=type(ours or error).__name__)
        if code != ConfigError.exit_code:
            with suppress(OSError, LifelongError):  # on a full disk the original error is the one to report
                self.record.log("tick", **failure.to_json(), exit_code=code)
                # The head on disk, not the one in memory, which holds what was never committed.
                last = LastTick(at=timestamp(), outcome="failed", reason=reason)
                self.record.set_head(replace(require_head(ROOT, self.record.run), last_tick=last))
        hooks.tell(self.retraining.settings.hooks, replace(failure, run=self.record.run, at=timestamp()))

    def tokens_of(self, documents: Sequence[Document]) -> list[int]:
        """Number of tokens of each document by the champion's tokenizer, counted once in a tick."""
        if uncounted := [document for document in documents if document.hash not in self._tokens]:
            tokenizer = self.store.tokenizer(self.store.get(self.head.champion.key))
            counted = np.diff(tokenize_documents(uncounted, tokenizer).offsets).tolist()
            self._tokens |= {document.hash: number for document, number in zip(uncounted, counted, strict=True)}
        return [self._tokens[document.hash] for document in documents]

    def trained(self, stage: CommittedStage) -> None:
        """Log a stage in the ledger, once."""
        # A tick that is repeated after a kill finds the stage committed, and perhaps logged.
        if stage.key not in self.record.logged("stage", "key"):
            self.record.log("stage", name=stage.name, key=stage.key)

    def reopen(self, prefix: str) -> None:
        """Forget the decision about a batch, so that its documents are new again.

        Raises:
            ConfigError: If the prefix names no batch, or several. Batches that the champion learned do not count.
        """
        batches = self.head.batches
        served = {stage.batch for stage in self.head.champion.stages}
        closed = {key: one for key, one in batches.items() if key not in served and one.outcome != AWAITING}
        found = [key for key, batch in closed.items() if prefix in (batch.name, key[: len(prefix)])]
        if len(found) != 1:
            known = ", ".join(f"{b.name} ({b.outcome})" for b in closed.values()) or "none"
            raise ConfigError(f"--reopen {prefix}: names {len(found)} batches; those that can be reopened: {known}.")
        self._require_arrived(found[0], prefix)
        self.record.log("reopen", batch=found[0], name=closed[found[0]].name)
        self.save(replace(self.head, batches={key: batch for key, batch in batches.items() if key != found[0]}))

    def _require_arrived(self, batch: str, prefix: str) -> None:
        """Require a batch's documents in the store, or again in the inbox if its text was removed.

        Raises:
            ConfigError: If some are in neither.
        """
        known = self.head.batches[batch]
        if self.batches.has_text(batch, known.sources):
            return
        documents = {digest for digest, _ in self.batches.identities(batch, known.sources)}
        if missing := documents - arrived(self.retraining.settings.inbox):
            raise ConfigError(
                f"--reopen {prefix}: the text of {known.name} was removed (inbox.keep_text), and {len(missing):,} "
                f"of its {len(documents):,} documents are not in the inbox. Put its files there again."
            )

    def withdraw(self) -> None:
        """Refuse approval to a version that was made for another champion; its text is new again."""
        if (waits := self.head.candidate) is None or waits.before == self.head.champion_id:
            return
        batch = waits.stages[-1].batch
        self.console.print(
            f"Version {waits.id} was measured against version {waits.before}, and version {self.head.champion_id} "
            f"serves: its text is looked at again."
        )
        # MLflow first: a tick that is killed in between does both again.
        run_id = self.head.mlflow.ticks.get(batch or "")
        tracker = Tracker.connect(self.config.tracking, ROOT)
        tracker.remove_alias(model_name(self.head), run_id=run_id, stage_key=waits.key, alias="candidate")
        kept = {key: one for key, one in self.head.batches.items() if key != batch}
        self.save(replace(self.head.refused(), batches=kept))

    def settle(self, new: NewDocuments, outcome: str, reason: str) -> None:
        """Record the decision about a batch, so that later ticks pass over its documents."""
        settled = SettledBatch(
            name=new.name,
            outcome=outcome,
            reason=reason,
            at=timestamp(),
            sources=new.sources,
            # The split, since what was trained on must never count as held out later.
            heldout_fraction=self.retraining.settings.inbox.heldout_fraction,
            heldout_sources=HELDOUT_SOURCES,
        )
        self.head = replace(self.head, waiting=None, batches={**self.head.batches, new.hash: settled})
