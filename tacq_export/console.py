"""What the command line and the tools share: progress on the terminal, and errors in one sentence."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

from .errors import TacqError
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
            self._bar = tqdm(
                total=total, desc=what, file=sys.stderr, leave=True, dynamic_ncols=True, mininterval=wait, initial=done
            )
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
            if done >= total:
                self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._what = None, ""


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait, unless the user has set OMP_WAIT_POLICY. Call it before torch is
    imported, which reads the setting.

    Threads that spin take the time of whatever else runs: with one busy process beside it on two cores, a product of
    two matrices is ten times faster so (tools/LOG.md, 2026-11-27).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def positive(text: str) -> int:
    """argparse type of a count."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def guarded(run: Callable[[], None], interrupted: str) -> int:
    """Call `run`; whatever it raises is said in one sentence. Returns the exit status: 0, 1 after an error, 130 after
    Ctrl-C.

    interrupted: what is said after Ctrl-C.
    """
    try:
        try:
            run()
        finally:
            if ConsoleReporter.latest:
                ConsoleReporter.latest.close()  # an error gets a line of its own, below the bar
    except TacqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader (head, less) has gone
        return 0
    except MemoryError:
        print("error: not enough memory; use a shorter --seq-len, or a machine with more.", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}; check the path, its "
            "permissions and the free space.",
            file=sys.stderr,
        )
        return 1
    except Exception as error:  # a defect of ours; its traceback is for us, not for the user
        if os.environ.get("TACQ_EXPORT_DEBUG"):
            raise
        if "allocate memory" in str(error) or "out of memory" in str(error):
            print("error: not enough memory; use a shorter --seq-len, or a machine with more.", file=sys.stderr)
        else:
            cause = " ".join(str(error).split())[:300]
            print(
                f"error: tacq-export failed in a way it should not ({type(error).__name__}: {cause}); "
                "please report it with the output of the same command under TACQ_EXPORT_DEBUG=1.",
                file=sys.stderr,
            )
        return 1
    return 0
