"""Points of training curves on their way to the tracker; apart from what collects them, which needs Lightning."""

from __future__ import annotations

from collections.abc import Callable

Row = tuple[str, float, int]
"""A curve's key, its value and the step."""
Send = Callable[[list[Row]], None]
"""Receives points; must not raise for a server that is gone."""
