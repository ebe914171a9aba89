"""What attacks need: the command line in this process, and the directories of the end-to-end tests."""

from __future__ import annotations

from tests.e2e.conftest import cli, lab, pictures, single_threaded, trained, trained_once

__all__ = ["cli", "lab", "pictures", "single_threaded", "trained", "trained_once"]
