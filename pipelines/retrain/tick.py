"""What one tick of retraining works with, and how it ends."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from rich.console import Console

from lifelong_moe.config.data import KeepText
from lifelong_moe.config.load import written_config
from lifelong_moe.config.retraining.policy import HELDOUT_SOURCES
from lifelong_moe.data.text.batches import BatchStore
from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.tokens.shards import tokenize_documents
from lifelong_moe.data.tokens.tokenizer import Tokenizer
from lifelong_moe.errors import ConfigError, LifelongError, as_ours, one_line
from lifelong_moe.plan.retraining import Retraining
from lifelong_moe.store.batch_text import read_heads, removable_texts, remove_batch_text
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import OpenRun, RunRecord, require_head, timestamp
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.store.ticks import LastTick, SettledBatch
from pipelines.retrain import hooks
from pipelines.retrain.render import print_outcome
from pipelines.shared.kept_text import remembered_by
from pipelines.shared.novelty import NewDocuments, arrived
from pipelines.shared.places import CACHE, ROOT
from pipelines.versions.candidates import served_stages


class Tick(OpenRun):
    """What one tick works with, and how it ends."""

    def __init__(self, retraining: Retraining, record: RunRecord, head: RunHead, console: Console) -> None:
        super().__init__(record, head)
        self.retraining, self.console = retraining, console
        self.store, self.batches = StageStore(ROOT), BatchStore(ROOT)
        self.base, self.added = served_stages(head.champion, self.store)
        self.config = retraining.config(self.base, self.added)
        self.known = remembered_by(head, written_config(retraining.base), head.champion, self.store)

    def end(self, outcome: str, reason: str, **fields: Any) -> dict[str, Any]:
        """Note the outcome in ledger and head, tell the hooks, and return it."""
        now = self.head.champion
        serves = {"version": now.id, "stage": now.stages[-1].name, "key": now.key}
        result = {"outcome": outcome, "reason": reason, "champion": serves, **fields}
        last = LastTick(at=timestamp(), outcome=outcome, reason=reason, batch=fields.get("batch"))
        # A batch that waits for a higher limit, or for more of its kind, is told of once, not every night.
        again = outcome in ("over budget", "waiting") and last.repeats(self.head.last_tick)
        if not again:
            self.record.log("tick", **result)
        result |= {"run": self.record.run, "at": last.at}
        self.save(replace(self.head, last_tick=last))
        print_outcome(self.console, result)
        if outcome != "idle" and not again:
            hooks.tell(self.retraining.settings.hooks, result)
        return result

    def open_batch(self, batch: str) -> None:
        """Say that a batch's text is about to be written: whoever kills us, the next tick knows that it is there, and
        other runs that look at the same batch leave it alone."""
        opened = (*(one for one in self.head.open if one != batch), batch)
        self.head = replace(self.head, open=opened)
        self.record.set_head(replace(require_head(ROOT, self.record.run), open=opened))

    def remove_text(self, *, working: bool = False) -> None:
        """Remove the text of batches that ``inbox.keep_text`` lets go."""
        keep = self.retraining.settings.inbox.keep_text
        self.head = replace(self.head, keep_text=keep)
        if keep == KeepText.always:
            if not working and (head := require_head(ROOT, self.record.run)).open:
                self.record.set_head(replace(head, open=()))
            return
        try:
            heads = read_heads(ROOT)  # as they are on disk, not what a tick that fails had in mind
        except LifelongError as error:  # what another run needs is not known, and this tick is no worse for it
            self.console.print(f"inbox.keep_text={keep}: nothing is removed. {error}", highlight=False, markup=False)
            return
        head = heads[self.record.run] = replace(heads[self.record.run], keep_text=keep)
        goes = removable_texts(heads, [self.record.run], working=working)
        if freed := sum(remove_batch_text(ROOT, CACHE, batch, head) for batch in goes):
            self.console.print(f"inbox.keep_text={keep}: {freed / 1e6:.1f} MB of text removed", highlight=False)
        left = tuple(batch for batch in head.open if self.batches.copies(batch))
        if left != head.open:
            self.head = replace(self.head, open=left)
            self.record.set_head(replace(head, open=left))

    def fail(self, error: BaseException) -> None:
        """Note a failure in ledger and head as they were committed, and tell the hooks.

        What a person must mend (exit code 2) is only told: it writes nothing.
        """
        ours = as_ours(error)
        reason, code = one_line(str(ours or error)), ours.exit_code if ours else 1
        failure = {"outcome": "failed", "error": type(ours or error).__name__, "reason": reason}
        if code != ConfigError.exit_code:
            with suppress(OSError, LifelongError):  # on a full disk the error that filled it is the one to tell
                self.record.log("tick", **failure, exit_code=code)
                last = LastTick(at=timestamp(), outcome="failed", reason=reason)
                self.record.set_head(replace(require_head(ROOT, self.record.run), last_tick=last))
        hooks.tell(self.retraining.settings.hooks, {**failure, "run": self.record.run, "at": timestamp()})

    def count_tokens(self, documents: Sequence[Document]) -> int:
        """Tokens of documents, as the champion reads them."""
        if not documents:
            return 0
        tokenizer = Tokenizer.from_text(self.store.tokenizer(self.store.get(self.head.champion.key)))
        return tokenize_documents(documents, tokenizer).num_tokens

    def trained(self, stage: CommittedStage) -> None:
        """Note a stage in the ledger, once."""
        if stage.key not in self.record.logged("stage", "key"):
            self.record.log("stage", name=stage.name, key=stage.key)

    def reopen(self, prefix: str) -> None:
        """Forget the decision about a batch, so that its documents are new again.

        Raises:
            ConfigError: If no batch, or more than one, begins so, but those that the champion has learned.
        """
        batches = self.head.batches
        served = {stage.batch for stage in self.head.champion.stages}
        closed = {key: batch for key, batch in batches.items() if key not in served}
        found = [key for key, batch in closed.items() if prefix in (batch.name, key[: len(prefix)])]
        if len(found) != 1:
            known = ", ".join(f"{b.name} ({b.outcome})" for b in closed.values()) or "none"
            raise ConfigError(f"--reopen {prefix}: names {len(found)} batches; those that can be reopened: {known}.")
        self._require_arrived(found[0], prefix)
        self.record.log("reopen", batch=found[0], name=closed[found[0]].name)
        self.save(replace(self.head, batches={key: batch for key, batch in batches.items() if key != found[0]}))

    def _require_arrived(self, batch: str, prefix: str) -> None:
        """Text that was removed can only be looked at again where it has arrived again.

        Raises:
            ConfigError: If it has not.
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

    def settle(self, new: NewDocuments, outcome: str, reason: str) -> None:
        """A decision about a batch: its documents are not looked at again."""
        settled = SettledBatch(
            name=new.name,
            outcome=outcome,
            reason=reason,
            at=timestamp(),
            sources=new.sources,
            **split_of(self.retraining),
        )
        self.head = replace(self.head, waiting=None, batches={**self.head.batches, new.hash: settled})


def split_of(retraining: Retraining) -> dict[str, Any]:
    """How a new batch is divided; noted with it, since what was trained on must never count as held out later."""
    return {"heldout_fraction": retraining.settings.inbox.heldout_fraction, "heldout_sources": HELDOUT_SOURCES}
