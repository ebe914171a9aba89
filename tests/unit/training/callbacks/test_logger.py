"""Curves on their way to the tracker: in batches, at the steps of the stage."""

from __future__ import annotations

from lifelong_moe.training.callbacks.logger import FLUSH_ROWS, BatchedLogger, Row


def test_rows_go_out_together_and_once_with_steps_of_the_whole_stage() -> None:
    sent: list[list[Row]] = []
    logger = BatchedLogger("code", "17", sent.append, first_step=100)
    assert (logger.name, logger.version) == ("code", "17")
    logger.log_metrics({"loss": 2, "epoch": 3.0}, step=5)
    logger.log_metrics({"loss": 1.5})
    assert sent == []
    logger.save()
    logger.save()
    assert sent == [[("loss", 2.0, 105), ("loss", 1.5, 100)]]
    logger.log_metrics({"loss": 1.0}, 6)
    logger.finalize("failed")
    assert sent[1:] == [[("loss", 1.0, 106)]]


def test_a_full_batch_goes_out_by_itself() -> None:
    sent: list[list[Row]] = []
    logger = BatchedLogger("code", None, sent.append)
    for step in range(FLUSH_ROWS):
        assert sent == []
        logger.log_metrics({"loss": 0.0}, step)
    assert [len(rows) for rows in sent] == [FLUSH_ROWS] and sent[0][-1] == ("loss", 0.0, FLUSH_ROWS - 1)
