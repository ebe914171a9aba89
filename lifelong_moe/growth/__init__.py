"""Add, freeze and initialize experts."""
