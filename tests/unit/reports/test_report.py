from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lifelong_moe.evaluation.evaluation import Evaluation
from lifelong_moe.reports.report import SCHEMA, Report, RunResults, ScratchReport, StageReport, build_report
from lifelong_moe.storage.plain import PlainError

NAMES = ["english", "python", "poems"]


def measured(nats: float, counts: list[int]) -> Evaluation:
    return Evaluation(nats, nats / 2, tokens=10, bytes=40, documents=2, expert_counts=[counts])


def stage_report(learns: list[str]) -> StageReport:
    """A stage of which only the names matter."""
    sizes = {"experts_per_layer": 2, "parameters_total": 3, "parameters_active": 2, "parameters_trainable": 1}
    cost = {"tokens": 640, "active_flops": 1e6, "tokens_per_second": 10.0, "seconds": 64.0, "epochs": 0.5}
    identity = {"key": "1" * 64, "routing": "learned", "shared": False, "weights_sha256": "2" * 64}
    return StageReport(name=learns[0], data=learns[0], learns=learns, training={}, **identity, **sizes, **cost)


def report(
    stages: list[str | list[str]],
    rows: list[list[float]],
    *,
    method: str = "lifelong",
    from_scratch: dict[str, ScratchReport] | None = None,
) -> dict[str, Any]:
    learns = [[stage] if isinstance(stage, str) else stage for stage in stages]
    results = RunResults(
        run="r",
        method=method,
        seed=3,
        distributions=NAMES,
        init={name: measured(8.0, [1, 1]) for name in NAMES},
        evaluations=[{n: measured(v, [3, 1]) for n, v in zip(NAMES, row, strict=True)} for row in rows],
        stages=[stage_report(names) for names in learns],
        from_scratch=from_scratch or {},
    )
    built = build_report(results, births=[[0, 1]])
    plain = json.loads(json.dumps(built.to_json(), allow_nan=False))
    assert Report.from_json(plain) == built
    return plain


def test_two_stages_by_hand() -> None:
    found = report(["english", "python"], [[2.0, 6.0, 7.0], [2.5, 3.0, 6.5]])
    assert found["loss_nats_per_token"] == [[2.0, 6.0, 7.0], [2.5, 3.0, 6.5]]
    assert found["bits_per_byte"] == [[1.0, 3.0, 3.5], [1.25, 1.5, 3.25]]
    assert found["loss_at_init"] == [8.0] * 3 and found["bits_per_byte_at_init"] == [4.0] * 3
    assert found["forgetting"] == {"english": 0.5, "python": 0.0}
    assert found["backward_transfer"] == -0.5 and found["forward_transfer"] == 2.0
    assert found["forgetting_bits_per_byte"] == {"english": 0.25}  # what the last stage learned cannot be forgotten yet
    assert found["forward_transfer_bits_per_byte"] == 1.0
    assert found["bytes_per_token"] == dict.fromkeys(NAMES, 4.0)
    assert found["schema"] == 4 and found["from_scratch"] == {}
    # Expert 1 was born in stage 1: foreign to English, not to Python, nor to what no stage learned.
    assert [found["routing"][name]["leak"] for name in NAMES] == [0.25, 0.0, 0.0]
    assert found["dead_experts"] == 0 and found["routing"]["english"]["unused_experts"] == 0


def test_one_stage_has_no_transfer() -> None:
    found = report(["english"], [[2.0, 6.0, 7.0]])
    assert found["backward_transfer"] is None and found["forward_transfer"] is None
    assert found["forgetting"] == {"english": 0.0}


def test_a_distribution_that_comes_back() -> None:
    found = report(["english", "python", "english"], [[2.0, 6.0, 7.0], [2.5, 3.0, 6.5], [2.25, 3.25, 6.0]])
    assert found["forgetting"] == {"english": 0.0, "python": 0.25}
    assert found["forgetting_bits_per_byte"] == {"python": 0.125}
    assert found["routing"]["english"]["leak"] == 0.0


def test_a_joint_run_has_one_row_and_nothing_to_forget() -> None:
    found = report([["english", "python"]], [[2.0, 3.0, 6.0]], method="joint")
    assert found["loss_nats_per_token"] == [[2.0, 3.0, 6.0]] and found["method"] == "joint"
    assert found["forgetting"] == {"english": 0.0, "python": 0.0}
    assert found["backward_transfer"] is None and found["forward_transfer"] is None
    # Whatever there is was born while both were learned, and no stage learned poems.
    assert [found["routing"][name]["leak"] for name in NAMES] == [0.25, 0.25, 0.0]


def test_an_unrestrained_run_says_what_each_costs_from_scratch() -> None:
    alone = {"python": ScratchReport(nats_per_token=3.5, bits_per_byte=1.75, tokens=640, active_flops=1e6)}
    found = report(["english", "python"], [[2.0, 6.0, 7.0], [2.5, 3.0, 6.5]], method="unrestrained", from_scratch=alone)
    assert found["from_scratch"] == {"python": asdict(alone["python"])}
    assert found["forgetting"] == {"english": 0.5, "python": 0.0}


def test_a_report_of_an_earlier_version_is_read() -> None:
    path = Path(__file__).parents[2] / "integration/earlier/mlruns/runs/old/report.json"
    old = json.loads(path.read_text(encoding="utf-8"))
    found = Report.from_json(old)
    assert found.schema == 2 and found.dead_experts is None and list(found.not_measured) == []
    assert found.routing["fruit"].unused_experts == old["routing"]["fruit"]["dead_experts"]
    assert found.stages[1].tokens == old["stages"][1]["tokens"] and found.learned_last() == {"fruit": 0, "code": 1}
    bits = old["bits_per_byte"]
    assert "forgetting_bits_per_byte" not in old
    assert found.forgetting_bits_per_byte == {"fruit": bits[1][0] - bits[0][0]}
    assert found.forgetting_rise() == {"fruit": pytest.approx(math.exp(old["forgetting"]["fruit"]) - 1)}
    assert found.forward_transfer_bits_per_byte == old["bits_per_byte_at_init"][1] - bits[0][1]
    assert found.learned() == {"code": bits[1][1]}


def test_a_leak_is_one_only_where_the_model_grew_later() -> None:
    plain = report(["english", "python"], [[2.0, 6.0, 7.0], [2.5, 3.0, 6.5]])
    assert Report.from_json(plain).leaks() == {}  # both stages have two experts
    plain["stages"][1]["experts_per_layer"] = 4
    assert Report.from_json(plain).leaks() == {"english": 0.25}
    plain["mixture"] = {"english": {"shares": {"english": 1.0}, "readers": 1.0}}
    assert Report.from_json(plain).leaks() == {}


def test_a_report_of_a_later_version_is_refused() -> None:
    later = report(["english"], [[2.0, 6.0, 7.0]]) | {"schema": SCHEMA + 1, "unknown": 0}
    with pytest.raises(PlainError, match="update lifelong-moe"):
        Report.from_json(later)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "3"}, "^not the report of a run$"),
        ({"stages": []}, "^loss_nats_per_token: must have 0 rows"),
        ({"loss_at_init": [1.0]}, "^loss_at_init: must have 3 numbers$"),
        ({"bits_per_byte": [[1.0, 2.0]]}, "^bits_per_byte: must have 1 rows of 3 numbers$"),
        ({"routing": {}}, "^routing: must have an entry for each distribution$"),
        ({"routing": {"english": 5}}, r"^routing\.english: must be an object"),
        ({"run": "../x"}, "^run: must be a name"),
    ],
)
def test_what_is_no_report_is_said_by_its_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlainError, match=message):
        Report.from_json(report(["english"], [[2.0, 6.0, 7.0]]) | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forgetting_bits_per_byte": {"poems": 1.0}}, r"^forgetting_bits_per_byte: must have an entry for each old"),
        ({"forgetting_bits_per_byte": {}}, r"^forgetting_bits_per_byte: must have an entry for each old"),
        ({"forgetting": {}}, "^forgetting: must have at most 700 nats for each old distribution$"),
        ({"forgetting": {"english": 1000}}, "^forgetting: must have at most 700 nats"),
        ({"schema": 3, "forgetting": {}}, "^forgetting: must have at most 700 nats"),
    ],
)
def test_what_was_forgotten_is_of_old_distributions(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlainError, match=message):
        Report.from_json(report(["english", "python"], [[2.0, 6.0, 7.0], [2.5, 3.0, 6.5]]) | changes)
