"""Candidates, the gate, and the commands that change which version serves: `rollback`, `drop`, `consolidate`."""
