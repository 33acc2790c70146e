"""The one error that users see."""

import sys


class TacqError(Exception):
    """One sentence that names the cause and the remedy; the command line prints it and exits with status 1."""


def check_system() -> None:
    """TacqError where the system is neither Linux nor macOS: file locks, builds and memory counts are Unix's here."""
    if sys.platform not in ("linux", "darwin"):
        raise TacqError(
            f"tacq-export runs on Linux and macOS, and this system is '{sys.platform}'; on Windows use it inside WSL."
        )
