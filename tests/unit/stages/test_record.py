"""What a stage's ``config.json`` says, today's and that of earlier versions."""

from __future__ import annotations

import json

from lifelong_moe.store.record import StageRecord
from tests.records import made_record

KEY = "ab" * 32


def test_a_record_is_read_as_it_was_written() -> None:
    trained = made_record(KEY, data={"a": KEY}, split={"a": "2" * 64}, borrowed={"w": KEY}, schema=5)
    derived = made_record(KEY, parent=KEY, derived={"derived": "drop", "from": KEY}, schema=None)
    later = made_record(KEY, parent=KEY, removed=("w",), schema=5)
    for record in (trained, derived, later):
        written = json.loads(json.dumps(record.to_json()))
        assert StageRecord.from_json(written) == record
    assert "derived" not in trained.to_json() and "schema" not in derived.to_json()
    assert "removed" not in trained.to_json() and "borrowed" not in later.to_json()


def test_earlier_versions_left_no_near_copies_out_and_did_not_say_how_text_was_split() -> None:
    written = made_record(KEY, data={"a": KEY}, schema=None).to_json()
    del written["split"]
    record = StageRecord.from_json(written)
    assert (record.split, record.read_near_copies, record.schema) == ({"a": KEY}, True, None)
