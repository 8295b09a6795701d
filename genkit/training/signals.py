"""Stopping a run between steps: SIGTERM and Ctrl-C become a request that the loop answers with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """While entered, remember SIGTERM and SIGINT instead of dying; a second Ctrl-C interrupts at once.

    Signals can be caught in the main thread only; elsewhere this does nothing.

    Attributes:
        number: of the signal that came, 0 for none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self.number = 0
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number


def ignore_interrupts(worker: int) -> None:
    """Keep a data worker alive on Ctrl-C, which reaches the whole process group: the main process finishes its step first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
