"""What a run says: rows of figures, the progress bar, and how signals ask it to stop."""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..files import write_whole

logger = logging.getLogger(__name__)


class JsonlLog:
    """One JSON object a line. Opening it at ``step`` drops later rows: those steps are about to be trained again."""

    def __init__(self, path: Path, step: int):
        rows = []
        if path.exists():
            rows = [line for line in path.read_text().splitlines() if line.endswith("}")]
            rows = [line for line in rows if json.loads(line)["step"] <= step]
        write_whole(path, "".join(row + "\n" for row in rows))
        self._path = path

    def write(self, row: dict) -> None:
        """Append ``row``, which has a key ``step``."""
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def row_text(row: dict) -> str:
    """A row of figures on one line."""
    return "  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())


def is_terminal() -> bool:
    """Whether somebody may be watching stderr."""
    return sys.stderr.isatty()


class Progress:
    """A bar with steps done and to do, the loss, frames a second and the time left; log lines go above it."""

    def __init__(self, bar: tqdm):
        self._bar = bar
        self._frames, self._began = 0, time.perf_counter()

    def update(self, terms: dict[str, float], frames: int) -> None:
        """Count one step on so many frames."""
        self._frames += frames
        speed = self._frames / (time.perf_counter() - self._began)
        self._bar.set_postfix_str(f"loss {terms['loss']:.4g}, {speed:.3g} frames/s", refresh=False)
        self._bar.update()


@contextmanager
def progress_bar(wanted: bool, step: int, steps: int) -> Iterator[Progress]:
    """A bar from ``step`` on, on stderr; none without a terminal."""
    shown = wanted and is_terminal()
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed} gone, {remaining} left, {rate_fmt}{postfix}]"
    with tqdm(initial=step, total=steps, unit="step", bar_format=form, disable=not shown, dynamic_ncols=True) as bar:
        if shown:
            with logging_redirect_tqdm():
                yield Progress(bar)
        else:
            yield Progress(bar)


class StopSignal:
    """Turns SIGINT and SIGTERM into a request to save and stop; a later SIGINT interrupts at once.

    Launchers pass a Ctrl-C on to processes that the terminal has told already: what follows within seconds is the same.
    """

    _ECHO_SECONDS = 3.0
    number: int = signal.SIGTERM  # the first one; where none came here, another process has had it

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self.number, self._first = True, number, time.monotonic()
            logger.warning("%s: saving a checkpoint after this step, then stopping", signal.Signals(number).name)
        elif number == signal.SIGINT and time.monotonic() - self._first > self._ECHO_SECONDS:
            raise KeyboardInterrupt

    def __enter__(self) -> StopSignal:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
