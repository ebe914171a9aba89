"""What MLflow holds of a stage, as files."""

from __future__ import annotations

from pathlib import Path

import pytest

from lifelong_moe.errors import CorruptError
from lifelong_moe.store.logged import LoggedMetrics, read_logged, write_logged

STAGE, OTHER = "ab" * 32, "ab" * 31 + "cd"


def test_metrics_are_those_of_one_stage_in_one_run(tmp_path: Path) -> None:
    assert read_logged(tmp_path, "run", STAGE) == {}
    write_logged(tmp_path, LoggedMetrics("run", STAGE, {"loss": 1.5}))
    assert read_logged(tmp_path, "run", STAGE) == {"loss": 1.5}
    # Another MLflow run has no points yet; and 16 digits of a key are not the key.
    assert read_logged(tmp_path, "another", STAGE) == read_logged(tmp_path, "run", OTHER) == {}
    write_logged(tmp_path, LoggedMetrics("another", STAGE, {}))
    assert len([*tmp_path.iterdir()]) == 1


@pytest.mark.parametrize("text", ["{", "[]", f'{{"run": "../x", "stage": "{STAGE}", "metrics": {{}}}}'])
def test_a_damaged_file_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / f"{STAGE[:16]}.json").write_text(text)
    with pytest.raises(CorruptError, match=f"{STAGE[:16]}.json: "):
        read_logged(tmp_path, "run", STAGE)
