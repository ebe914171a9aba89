"""`lifelong-moe gc`, `sync` and `ui`."""
