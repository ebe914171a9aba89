"""Tell others of an outcome. Their failure is logged and never fails anything."""

from __future__ import annotations

import json
import logging
import subprocess
import urllib.request
from typing import Any

from lifelong_moe.config.retraining.operation import HooksConfig

log = logging.getLogger(__name__)


def tell(hooks: HooksConfig, outcome: dict[str, Any]) -> None:
    """Run the command and call the address, each with the outcome as JSON."""
    text = json.dumps(outcome, ensure_ascii=False).encode()
    if hooks.command:
        try:
            subprocess.run(hooks.command, input=text, timeout=hooks.seconds, check=True, stdout=subprocess.DEVNULL)
        except Exception as error:  # whatever is wrong with it, it is not ours
            log.warning("hooks.command failed: %s", _reason(error))
    if hooks.url:
        try:
            request = urllib.request.Request(hooks.url, data=text, headers={"Content-Type": "application/json"})
            urllib.request.urlopen(request, timeout=hooks.seconds).close()
        except Exception as error:
            log.warning("hooks.url failed: %s", _reason(error))


def _reason(error: Exception) -> str:
    """Without the command or the address, which may hold a secret."""
    if isinstance(error, subprocess.CalledProcessError):
        return f"exit status {error.returncode}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no end within {error.timeout:g} s"
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__)
