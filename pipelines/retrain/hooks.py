"""Hooks: send a tick's outcome to a command and an address. Their failure is logged and fails nothing.

They are programs that are not ours: what they get holds no secret of ours, nor does their environment.
"""

from __future__ import annotations

import json
import logging
import subprocess
import urllib.request

from lifelong_moe.config.retraining.operation import HooksConfig
from lifelong_moe.redaction import environment_without_secrets, redact, redacted
from pipelines.retrain.outcome import TickOutcome

log = logging.getLogger(__name__)


def tell(hooks: HooksConfig, outcome: TickOutcome) -> None:
    """Run the command and call the address, each with the outcome as JSON."""
    text = json.dumps(redacted(outcome.to_json()), ensure_ascii=False).encode()
    if hooks.command:
        try:
            subprocess.run(
                hooks.command,
                input=text,
                timeout=hooks.seconds,
                check=True,
                stdout=subprocess.DEVNULL,
                env=environment_without_secrets(),
            )
        except Exception as error:  # anything: the operator's program must not fail a tick that is done
            log.warning("hooks.command failed: %s", _reason(error))
    if hooks.url:
        try:
            request = urllib.request.Request(hooks.url, data=text, headers={"Content-Type": "application/json"})
            urllib.request.urlopen(request, timeout=hooks.seconds).close()
        except Exception as error:
            log.warning("hooks.url failed: %s", _reason(error))


def _reason(error: Exception) -> str:
    """Why a hook failed."""
    # Never str(error): it may quote the command or the address, and they may hold a secret.
    if isinstance(error, subprocess.CalledProcessError):
        return f"exit status {error.returncode}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no end within {error.timeout:g} s"
    return redact(str(getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__))
