"""The schedulers' files in docs/scheduling, held against what their schedulers accept. Nothing is scheduled here."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

FILES = Path(__file__).resolve().parents[2] / "docs/scheduling"
SCHEMA = Path(__file__).with_name("schemas") / "cronjob-1.31.json"
CRON_FIELDS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
"""Least and most of minute, hour, day of month, month and day of week (crontab(5): 0 and 7 are Sunday)."""


def refusals(job: Any) -> list[str]:
    """What Kubernetes 1.31 to 1.33 have against a CronJob: ``path: reason`` each."""
    validator = Draft7Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(job)]


def the_job() -> Any:
    return yaml.safe_load((FILES / "cronjob.yaml").read_text(encoding="utf-8"))


def test_kubernetes_accepts_the_cronjob() -> None:
    Draft7Validator.check_schema(json.loads(SCHEMA.read_text(encoding="utf-8")))
    assert refusals(the_job()) == []


RULE = "$.spec.jobTemplate.spec.podFailurePolicy.rules[0]"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda rule: rule["onPodConditions"][0].pop("status"), "'status' is a required property"),
        (lambda rule: rule["onPodConditions"][0].update(status=True), "True is not of type 'string'"),
        (lambda rule: rule.update(onPodCondition=[]), "'onPodCondition' was unexpected"),
        (lambda rule: rule.pop("action"), "'action' is a required property"),
    ],
)
def test_kubernetes_would_refuse(spoil: Callable[[dict[str, Any]], Any], reason: str) -> None:
    job = copy.deepcopy(the_job())
    spoil(job["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"][0])
    (found,) = refusals(job)
    assert found.startswith(RULE) and reason in found


class FakeDag:
    """Accepts what ``airflow.sdk.DAG`` does, and nothing else.

    Source:
        apache/airflow, task-sdk/src/airflow/sdk/definitions/dag.py: fields of the class with ``init``.
    """

    made: list[FakeDag]

    def __init__(
        self, dag_id: str, *, description=None, default_args=None, start_date=None, end_date=None, schedule=None,
        template_searchpath=None, template_undefined=None, user_defined_macros=None, user_defined_filters=None,
        max_active_tasks=16, max_active_runs=16, max_consecutive_failed_dag_runs=0, dagrun_timeout=None,
        sla_miss_callback=None, catchup=False, on_success_callback=None, on_failure_callback=None, doc_md=None,
        params=None, access_control=None, is_paused_upon_creation=None, jinja_environment_kwargs=None,
        render_template_as_native_obj=False, tags=(), owner_links=None, auto_register=True, fail_fast=False,
        dag_display_name=None, disable_bundle_versioning=False,
    ) -> None:  # fmt: skip
        assert re.fullmatch(r"[\w.-]+", dag_id, re.ASCII) and isinstance(max_active_runs, int)
        assert start_date is None or isinstance(start_date, datetime)
        self.schedule, self.max_active_runs, self.catchup = schedule, max_active_runs, catchup
        self.tasks: list[FakeBashOperator] = []
        self.made.append(self)

    def __enter__(self) -> FakeDag:
        FakeBashOperator.within = self
        return self

    def __exit__(self, *_: object) -> None:
        FakeBashOperator.within = None


class FakeBashOperator:
    """Accepts what ``BashOperator`` does, and those keywords of ``BaseOperator`` that Airflow 3.0 has already.

    Source:
        apache/airflow, providers/standard/src/airflow/providers/standard/operators/bash.py and
        task-sdk/src/airflow/sdk/bases/operator.py: signatures of ``__init__``.
    """

    within: FakeDag | None = None

    def __init__(
        self, *, bash_command: str, env=None, append_env=False, output_encoding="utf-8", skip_on_exit_code=99,
        cwd=None, output_processor=None, task_id: str, owner="airflow", retries=0, retry_delay=None,
        retry_exponential_backoff=False, max_retry_delay=None, start_date=None, end_date=None, depends_on_past=False,
        wait_for_downstream=False, dag=None, params=None, default_args=None, priority_weight=1, queue="default",
        pool=None, pool_slots=1, execution_timeout=None, on_execute_callback=None, on_failure_callback=None,
        on_success_callback=None, on_retry_callback=None, on_skipped_callback=None, trigger_rule="all_success",
        run_as_user=None, max_active_tis_per_dag=None, executor=None, do_xcom_push=True, doc_md=None,
    ) -> None:  # fmt: skip
        assert self.within is not None, "a task outside of a DAG"
        assert isinstance(retry_delay, timedelta) and isinstance(retries, int)
        # Airflow reads a command that ends so as a template's file name.
        assert not bash_command.endswith((".sh", ".bash"))
        self.command, self.cwd, self.skips = bash_command, cwd, skip_on_exit_code
        self.within.tasks.append(self)


@pytest.fixture
def airflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeDag]]:
    """Modules of Airflow's names with nothing but those two classes; gives the DAGs that are made."""
    FakeDag.made = []
    names = {"airflow.sdk": {"DAG": FakeDag}}
    names["airflow.providers.standard.operators.bash"] = {"BashOperator": FakeBashOperator}
    for dotted, content in names.items():
        parts = dotted.split(".")
        for end in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        module = ModuleType(dotted)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, dotted, module)
    yield FakeDag.made


def load_dag(text: str) -> None:
    exec(compile(text, "airflow_dag.py", "exec"), {"__name__": "airflow_dag"})


def test_the_airflow_dag_imports(airflow: list[FakeDag]) -> None:
    """Against names and signatures only: that Airflow schedules and runs it, nothing here shows."""
    load_dag((FILES / "airflow_dag.py").read_text(encoding="utf-8"))
    (dag,) = airflow
    (task,) = dag.tasks
    assert (dag.schedule, dag.max_active_runs, dag.catchup) == ("30 2 * * *", 1, False)
    assert task.cwd == "/srv/lifelong-moe" and task.skips == [3, 4]


@pytest.mark.parametrize(
    ("old", "new"), [("schedule=", "schedule_interval="), ("skip_on_exit_code", "skip_exit_code"), ("sdk", "models")]
)
def test_a_name_that_airflow_3_does_not_have_is_found(airflow: list[FakeDag], old: str, new: str) -> None:
    text = (FILES / "airflow_dag.py").read_text(encoding="utf-8")
    assert old in text
    with pytest.raises((TypeError, ImportError)):
        load_dag(text.replace(old, new))


def cron_faults(schedule: str) -> list[str]:
    """Fields of a five-field schedule that cron would refuse; names of days and months are not known here."""
    fields = schedule.split()
    if len(fields) != len(CRON_FIELDS):
        return [schedule]
    pattern = re.compile(r"(?:\*|(\d+)(?:-(\d+))?)(?:/([1-9]\d*))?")
    faults = []
    for field, (least, most) in zip(fields, CRON_FIELDS, strict=True):
        for part in field.split(","):
            found = pattern.fullmatch(part)
            bounds = [] if found is None else [int(n) for n in found.groups()[:2] if n is not None]
            if found is None or bounds != sorted(bounds) or not all(least <= n <= most for n in bounds):
                faults.append(part)
    return faults


def test_schedules_are_cron_s() -> None:
    crontab = [line for line in (FILES / "crontab").read_text().splitlines() if not line.startswith("#")]
    scrontab = re.findall(r"^# +(\S+ \S+ \S+ \S+ \S+) sbatch ", (FILES / "retrain.slurm").read_text(), re.MULTILINE)
    (dag,) = re.findall(r'schedule="([^"]+)"', (FILES / "airflow_dag.py").read_text())
    schedules = [" ".join(line.split()[:5]) for line in crontab] + scrontab + [dag, the_job()["spec"]["schedule"]]
    assert len(schedules) == 4 and [cron_faults(schedule) for schedule in schedules] == [[]] * 4
    assert [cron_faults(f"{bad} 2 * * *") for bad in ("60", "5-1", "*/0", "a")] == [["60"], ["5-1"], ["*/0"], ["a"]]
    assert cron_faults("*/5 0-6,12 1 */2 7") == [] and cron_faults("@daily") == ["@daily"]


def test_bash_reads_the_shell_s_files() -> None:
    (line,) = [line for line in (FILES / "crontab").read_text().splitlines() if not line.startswith("#")]
    for script in ((FILES / "retrain.slurm").read_text(), line.split(maxsplit=5)[5]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
