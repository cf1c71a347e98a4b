"""How SIGINT and SIGTERM end a command: as an exception does, so that nothing half written stays."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from ..files import remove_unfinished

_AGAIN_SECONDS = 0.05


class Terminated(BaseException):
    """SIGTERM, on its way through every `finally`."""


class Stopping:
    """While it is entered, SIGINT raises KeyboardInterrupt and SIGTERM `Terminated`.

    A second SIGTERM does not cut the cleaning up short; a second SIGINT removes what is unfinished itself and ends the
    process at once. Where the exception is lost, in a callback of foreign code, it comes again.

    Attributes:
        heard: the signal that came, 0 before. Foreign code may have made an error of its own of the exception.
    """

    def __init__(self) -> None:
        self.heard = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGTERM]
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
                numbers.append(signal.SIGINT)
            self._hook, sys.unraisablehook = sys.unraisablehook, self._lost
            self._before = {number: signal.signal(number, self._first) for number in numbers}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            sys.unraisablehook = self._hook

    def _first(self, number: int, frame: FrameType | None) -> None:
        self.heard = number
        if number == signal.SIGINT:
            signal.signal(number, _give_up)
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_IGN)
        raise Terminated

    def _lost(self, unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt | Terminated):
            self._hook(unraisable)
            return
        signal.signal(self.heard, self._first)
        again = threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), self.heard))  # not in the middle of this hook
        again.daemon = True
        again.start()


def _give_up(number: int, frame: FrameType | None) -> None:
    """Whoever interrupts twice waits for nothing more."""
    remove_unfinished()
    os.write(2, b"\nError: interrupted twice; no partial output was left\n")
    os._exit(130)
