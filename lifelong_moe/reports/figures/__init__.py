"""Figures of runs, comparisons and experts."""
