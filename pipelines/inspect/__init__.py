"""Commands that only read a run: `inspect`, `status`, `report`, `lineage`, `evaluate`, `generate`."""
