"""The Reporter of the command line and the tools."""

from __future__ import annotations

import sys
import time

from .reporting import Reporter


class ConsoleReporter(Reporter):
    """Lines and progress bars on stderr; stdout is for results."""

    latest: ConsoleReporter | None = None

    def __init__(self) -> None:
        ConsoleReporter.latest = self
        self._bar = None
        self._what = ""
        self._since = 0.0

    def say(self, text: str) -> None:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr) if self._bar is not None else print(text, file=sys.stderr, flush=True)

    def progress(self, done: int, total: int, what: str) -> None:
        from tqdm import tqdm

        if what != self._what:
            self.close()
            self._what, self._since = what, time.monotonic()
        if self._bar is None and (done < total or done == 0):
            # Where nobody watches (a log file), a line every 15 seconds is enough.
            wait = 0.2 if sys.stderr.isatty() else 15
            self._bar = tqdm(total=total, desc=what, file=sys.stderr, leave=True, dynamic_ncols=True, mininterval=wait, initial=done)
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
            if done >= total:
                self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._what = None, ""
