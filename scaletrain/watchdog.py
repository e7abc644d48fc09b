"""A thread that ends a process that hangs, with the stacks of all its threads told: the only way out of a collective
that waits for a rank which will not come."""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

_GRACE = 5.0
"""Seconds between the stacks and the end, in which the other ranks write theirs: launchers end them with the first."""


class Watchdog:
    """Context that ends the process with status 1 when `beat` is not called for so many seconds.

    stacks: the file that the stacks go to, beside standard error; its folder is made when it is needed.
    """

    def __init__(self, seconds: float | None, stacks: Path):
        self._seconds, self._stacks = seconds, stacks
        self._last = time.monotonic()
        self._ended = threading.Event()

    def beat(self) -> None:
        """Say that things go on."""
        self._last = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let something take as long as it takes."""
        self._last = math.inf
        try:
            yield
        finally:
            self.beat()

    def __enter__(self) -> Watchdog:
        self.beat()
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def _watch(self) -> None:
        assert self._seconds is not None
        while not self._ended.wait(min(self._seconds / 4, 5.0)):
            quiet = time.monotonic() - self._last
            if quiet > self._seconds:
                self._end(quiet)

    def _end(self, quiet: float) -> None:
        """Tell the stacks and end, without cleaning up: what hangs could hang that too. Nothing is being saved."""
        where = ""
        try:
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            with self._stacks.open("w") as file:
                faulthandler.dump_traceback(file)
            where = f", and in {self._stacks}"
        except OSError:
            pass
        print(
            f"\nscaletrain: no step for {quiet:.0f} seconds (train.watchdog); what each thread does is below{where}. "
            "The process ends; the newest checkpoint is whole.",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.stderr)
        time.sleep(_GRACE)
        os._exit(1)
