"""One tick a night in Airflow 3; the JSON line that the tick ends with becomes the task's XCom."""

from datetime import datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

with DAG(
    dag_id="lifelong_moe",
    schedule="30 2 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
):
    BashOperator(
        task_id="retrain",
        bash_command=".venv/bin/lifelong-moe retrain configs/retrain.yaml",
        cwd="/srv/lifelong-moe",
        skip_on_exit_code=[3, 4],  # rejected, over budget: nothing to repeat
        retries=3,
        retry_delay=timedelta(minutes=10),
    )
