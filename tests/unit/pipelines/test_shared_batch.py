"""Two runs that look at one batch: neither removes text that the other is at work on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lifelong_moe.config.data import KeepText
from lifelong_moe.data.arrivals.batches import BatchStore
from lifelong_moe.data.text.documents import Document
from lifelong_moe.store.batch_text import read_heads, removable_texts
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import RunRecord, require_head
from lifelong_moe.store.ticks import SettledBatch
from pipelines.retrain.tick import Tick

ROOT = Path("mlruns")
REJECTED = SettledBatch(name="x", outcome="rejected", reason="", at="", heldout_fraction=0.1)
DOCUMENTS = [Document("one text", "a"), Document("another", "b")]


def make_run(name: str, **more: Any) -> RunRecord:
    record = RunRecord(ROOT, name)
    record.set_head(RunHead(run=name, method="lifelong", seed=0, config={}, plan=(), names=(), **more))
    return record


@pytest.mark.parametrize("keep", list(KeepText))
def test_what_another_run_is_at_work_on_stays(keep: KeepText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    batches = BatchStore(ROOT)
    batch = batches.add(DOCUMENTS, [])
    make_run("done", keep_text=KeepText.never, batches={batch: REJECTED})
    tick, record = object.__new__(Tick), make_run("working")
    tick.retraining = SimpleNamespace(settings=SimpleNamespace(inbox=SimpleNamespace(keep_text=keep)))  # type: ignore[assignment]
    tick.record, tick.batches, tick.head = (
        record,
        batches,
        replace(require_head(ROOT, "working"), waiting="not written"),
    )
    assert batch in removable_texts(read_heads(ROOT), ["done"])
    tick.open_batch(batch)
    assert removable_texts(read_heads(ROOT), ["done"]) == {}
    assert require_head(ROOT, "working").open == (batch,) and require_head(ROOT, "working").waiting is None
    if keep == KeepText.always:
        tick.remove_text(working=True)
        assert require_head(ROOT, "working").open == (batch,)
        tick.remove_text()  # nothing was decided: it comes again from the inbox
        assert not require_head(ROOT, "working").open and batches.has_text(batch)
        assert batch in removable_texts(read_heads(ROOT), ["done"])
