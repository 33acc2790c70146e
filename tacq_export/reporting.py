"""How long work tells what it is doing: the library calls a Reporter, the command line decides what is shown."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TypeVar

T = TypeVar("T")


class Reporter:
    """Silent; console.py has the one that prints."""

    def say(self, text: str) -> None:
        """A line for the user."""

    def progress(self, done: int, total: int, what: str) -> None:
        """Step `done` of `total` of the work called `what` is finished; `done == total` ends it."""

    def track(self, items: Collection[T], what: str) -> Iterator[T]:
        """Yield `items`, reporting each as it is finished; of none there is nothing to report."""
        total = len(items)
        if total:
            self.progress(0, total, what)
        for done, item in enumerate(items, 1):
            yield item
            self.progress(done, total, what)
