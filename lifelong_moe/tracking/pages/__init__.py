"""The MLflow UI: its server, its addresses, and the views that lists of runs open in."""
