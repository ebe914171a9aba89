"""What another process takes: time, processor time and memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

EACH_SECONDS = 0.02


def taken_by(arguments: list[str], folder: Path, checkout: Path) -> dict[str, float]:
    """Run Python in a folder with a checkout's code, and say what it took.

    Returns:
        ``seconds``, ``processor_seconds`` (user and system), ``most_memory_megabytes``, and of these
        ``most_private_megabytes``, seen every 20 ms: without files that are mapped, which the system takes back.

    Raises:
        RuntimeError: It failed; with what it printed.
    """
    printed, began, peak, private = folder / "printed.txt", time.time(), 0, 0
    with printed.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(checkout)},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        # Asked while it runs: what is left to be asked afterwards, `ru_maxrss`, begins with the memory of its parent.
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            with suppress(OSError, KeyError):  # ended meanwhile
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                numbers = {line.split()[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
                peak, private = max(peak, numbers["VmHWM:"]), max(private, numbers["RssAnon:"])
            time.sleep(EACH_SECONDS)
    _, status, used = ended
    if status:
        raise RuntimeError(printed.read_text(errors="replace"))
    return {
        "seconds": time.time() - began,
        "processor_seconds": used.ru_utime + used.ru_stime,
        "most_memory_megabytes": peak * 1024 / 1e6,
        "most_private_megabytes": private * 1024 / 1e6,
    }
