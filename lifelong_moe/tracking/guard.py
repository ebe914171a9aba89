"""Run a command that ends with its starter, however that ends: ``python guard.py COMMAND…``. Needs nothing but Python.

The starter holds the other end of our standard input. The system closes it with the starter, also at a SIGKILL or when
a terminal is closed; then the command and everything that it started is ended.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

GRACE_SECONDS = 5.0
"""Time that a command has between the request to end and its end."""
LOOK_SECONDS = 0.2


def guard(command: Sequence[str]) -> int:
    """Run a command as the leader of a process group; returns its exit code.

    If standard input ends, or SIGTERM comes, the whole group is ended, this process included.
    """
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    # What the command starts, such as a server's workers, stays in our group, which the starter made for us.
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while (code := child.poll()) is None:
        # Nothing is ever sent, so that what can be read is the end.
        ready, _, _ = select.select([sys.stdin.fileno()], [], [], LOOK_SECONDS)
        if ready or asked:
            _end_group(child)
            break
    code = child.poll()
    # As shells report a signal.
    return 128 + signal.SIGTERM if code is None else code if code >= 0 else 128 - code


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """Ask all processes of the group to end, and end those that do not."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS / 4)
    # A server waits for its browsers, and its workers may outlive it.
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1:]))
