"""Commands about a trained run: `status`, `report`, `lineage`, `evaluate`, `generate`, `inspect`."""
