"""The one place that prints: to streams that cannot fail, and nothing that a terminal would obey.

Names, documents, reasons and messages of libraries may come from anybody. Characters that steer a terminal or reorder
a line are printed as escapes such as ``\\x1b``, and no string is markup: our own styling is ``style=`` or a ``Text``.
"""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.status import Status
from rich.style import Style
from rich.text import Text

from lifelong_moe.errors import visible
from lifelong_moe.redaction import keep_out_of_logs, redact, redacted

GONE = (errno.EPIPE, errno.EIO, errno.ECONNRESET)
"""Errors of a descriptor that nobody reads any more: ``head`` has ended, a terminal was closed, a connection lost."""


PATIENCE_SECONDS, AGAIN_SECONDS = 2.0, 15.0
"""After which a log says what is under way, and says so again."""


class Outlet(io.FileIO):
    """A descriptor that accepts text even if nobody reads it: days of training must not end because a pipe did."""

    def write(self, data: Any, /) -> int:
        """Write, or drop the data if nobody reads it."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in GONE:
                raise
            # As if written: a short count would be tried again for ever.
            return memoryview(data).nbytes


class Screen(io.TextIOWrapper):
    """A stream for text of anybody: tracebacks, warnings, logs, and whatever libraries print."""

    def write(self, text: str, /) -> int:
        """Write a text without secrets, and with everything visible that would steer a terminal."""
        super().write(visible(redact(text)))
        return len(text)

    @property
    def rich_proxied_file(self) -> Styled:
        """Where consoles of rich write, which look for this name: their colours are escape sequences."""
        return Styled(self)


class Styled:
    """A screen's other side: what is written here reaches the terminal as it is."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def write(self, text: str) -> int:
        """Write a text as it is, but for secrets."""
        io.TextIOWrapper.write(self._screen, redact(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._screen, name)


def stream(number: int, like: TextIO | None, errors: str) -> Screen:
    """Open a descriptor for text; characters that its encoding lacks are replaced.

    Args:
        number: The descriptor; it stays open when the stream is closed.
        like: Gives encoding and buffering; None if the process was started without this stream.
        errors: Name of the codec's error handler.
    """
    buffer = io.BufferedWriter(Outlet(number, "w", closefd=False))
    if not isinstance(like, io.TextIOWrapper):
        return Screen(buffer, "utf-8", errors)
    return Screen(buffer, like.encoding, errors, line_buffering=like.line_buffering, write_through=like.write_through)


def make_robust() -> None:
    """Replace standard output and error of this process."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The parent closed it. Left so, the next file opened would get this number, and all output with it.
            os.open(os.devnull, os.O_RDWR)
    # Python's own standard error escapes such characters too, so that errors lose none.
    keep_out_of_logs()
    sys.stdout, sys.stderr = stream(1, sys.stdout, "replace"), stream(2, sys.stderr, "backslashreplace")


class SafeConsole(Console):
    """A console that obeys no text: see the module.

    Args:
        file: Where to print.
        raw: Whether :func:`print_text` prints its texts as they are.
        patience: Seconds without a word, where no spinner turns, after which what is under way is named; None never
            names it.
        options: As of rich's own console.
    """

    def __init__(self, file: TextIO, *, raw: bool = False, patience: float | None = None, **options: Any) -> None:
        # The file is named, so that it stays the same while a spinner has replaced `sys.stdout`.
        super().__init__(file=file, highlight=False, **options)
        self.raw, self.patience = raw, patience

    def print(self, *objects: Any, **options: Any) -> None:
        """Print; a string is one line, whatever line ends it holds, so that none can be forged."""
        if self.quiet:  # of which rich would think only after it has rendered everything
            return
        super().print(*(visible(redact(one), keep="\t") if isinstance(one, str) else one for one in objects), **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make a text of a string, such as a table's cell, before its width is measured."""
        return super().render_str(visible(redact(text)), **options | {"markup": False, "emoji": False})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render anything, a ``Text`` too, as segments of which only rich's own controls steer the terminal."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), _honest(segment.style))

    def status(self, status: RenderableType, **options: Any) -> Status:
        """Show a spinner beside a text."""
        return _Status(status, console=self, **options)


class _Status(Status):
    """A spinner whose text is no markup; in a log, a line where something takes its time."""

    def __init__(self, status: RenderableType, *, console: SafeConsole, **options: Any) -> None:
        super().__init__(_plain(status), console=console, **options)
        self._patience = None if console.is_terminal or console.quiet else console.patience
        self._ended = threading.Event()
        self._speaker: threading.Thread | None = None

    def start(self) -> None:
        """Turn, or wait for the time to speak."""
        super().start()
        # Started twice, as by `with` after a call, it still speaks with one voice.
        if self._patience is not None and self._speaker is None:
            self._ended.clear()
            self._speaker = threading.Thread(target=self._speak, args=(self._patience,), daemon=True)
            self._speaker.start()

    def stop(self) -> None:
        """End."""
        self._ended.set()
        if self._speaker is not None:  # else its line might follow the next one
            self._speaker.join()
            self._speaker = None
        super().stop()

    def _speak(self, patience: float) -> None:
        began, pause = time.monotonic(), patience
        while not self._ended.wait(pause):
            spent = f" ({time.monotonic() - began:.0f} s)" if pause == AGAIN_SECONDS else ""
            self.console.print(f"{self.status} …{spent}")
            pause = AGAIN_SECONDS

    def update(self, status: RenderableType | None = None, **options: Any) -> None:
        """Change the text, or else the spinner."""
        super().update(None if status is None else _plain(status), **options)


def _plain(given: RenderableType) -> RenderableType:
    return Text(visible(given, keep="")) if isinstance(given, str) else given


def _honest(style: Style | None) -> Style | None:
    """A style without links and hidden text, which rich makes of a library's escape sequences while a spinner turns."""
    if style is None or not (style.link or style.conceal):
        return style
    return (style + Style(conceal=False)).update_link(None)


def console(as_json: bool = False, *, raw: bool = False) -> Console:
    """The console for people: standard error with ``--json``, which reserves standard output for the result."""
    file = sys.stderr if as_json else sys.stdout
    terminal = file.isatty()
    # In a pipe or a log, rich would fold lines at 80 columns.
    return SafeConsole(
        file, raw=raw, patience=PATIENCE_SECONDS, soft_wrap=not terminal, width=None if terminal else 140
    )


def silent() -> Console:
    """A console that prints nothing."""
    return SafeConsole(sys.stdout, quiet=True)


def tell(line: str) -> None:
    """Print one line on standard error."""
    print(visible(line, keep="\t"), file=sys.stderr)


def print_text(console: Console, text: str) -> None:
    """Print a part of a text of several lines, as it is if the console is a raw one."""
    if isinstance(console, SafeConsole) and console.raw:
        console.file.write(text)
        console.file.flush()
    else:
        console.print(Text(visible(text)), end="")


def finish(result: object, as_json: bool) -> None:
    """Print the result as one line of JSON, if that was asked for."""
    if as_json:
        # An encoding that lacks characters would replace them; JSON can escape them instead.
        is_ascii = not (sys.stdout.encoding or "utf-8").lower().startswith("utf")
        print(_escaped(json.dumps(redacted(result), ensure_ascii=is_ascii)))


def _escaped(text: str) -> str:
    """JSON of which nothing steers a terminal: the same value, since only its strings hold such characters."""
    if text.isprintable():
        return text
    return "".join(one if visible(one) == one else json.dumps(one)[1:-1] for one in text)
