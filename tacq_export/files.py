"""What is about files alone: free space, locks, hashes, and writing under a temporary name."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import TacqError


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the system drops it when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Waiting for another tacq-export that works in {path.parent} ...")
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def need_space(
    folder: Path,
    gigabytes: float,
    what: str = "the build",
    elsewhere: str = "set TACQ_EXPORT_CACHE to a folder on a larger disk",
) -> None:
    """TacqError unless the file system of `folder` has that much free. what needs it, and how to choose another
    place."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / 1e9
    if free < gigabytes:
        raise TacqError(
            f"{folder} has {free:.1f} GB free and {what} needs {gigabytes:.1f} GB; free some space, or {elsewhere}."
        )


@contextlib.contextmanager
def written_atomically(outfile: Path) -> Iterator[Path]:
    """A temporary path beside `outfile`, renamed to it at the end; nothing is left when anything fails."""
    partial = outfile.with_name(f".{outfile.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, outfile)
    except OSError as error:
        raise TacqError(
            f"Could not write {outfile} ({error.strerror or error}); free some space or give another --outfile."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
