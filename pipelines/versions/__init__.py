"""Candidates, the gate, and commands that change the serving version: `rollback`, `drop`, `consolidate`."""
