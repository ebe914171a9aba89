"""Records in MLflow: the only package that imports it, and never at import time."""
