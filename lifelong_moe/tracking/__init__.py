"""MLflow: runs, metrics, registered versions, and a spool for when it is unreachable."""
