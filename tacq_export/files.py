"""What is about files alone: free space, locks, hashes, and writing under a temporary name."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

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
    import fcntl  # Unix' alone: where it is missing, this module can be imported and check_system has the word

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Waiting for another tacq-export that works in {path.parent} ...")
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def claimed(folder: Path, what: str) -> Iterator[None]:
    """Keep a work folder for this process for as long as the `with` lasts. what: said to others, such as "writes
    OUT.gguf". The lock is a file beside the folder, which is removed at the end; one that a killed process left is
    taken over.

    Raises TacqError that says who works there if another process, or another thread of this one, has claimed it.
    """
    folder = Path(os.path.realpath(folder))
    lock = folder.with_name(f".{folder.name}.lock")
    made = [parent for parent in lock.parents if not parent.exists()]
    try:
        if made:
            lock.parent.mkdir(parents=True, exist_ok=True)
        file = _claim(lock, folder)
    except OSError as error:
        raise TacqError(
            f"The work folder {folder} cannot be made ({error.strerror}); give another with --workdir."
        ) from None
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()}, which {what}")
        file.flush()
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # while it is still locked: who opened it before looks again
            for parent in made:
                with contextlib.suppress(OSError):  # there is something in it
                    parent.rmdir()


def _claim(lock: Path, folder: Path) -> TextIO:
    """The open and locked file. Raises TacqError if another process has it, OSError if it cannot be opened."""
    import fcntl

    while True:
        file = open(lock, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                return file
        except FileNotFoundError:  # removed after it was opened, by the process that had it
            pass
        except BlockingIOError:
            for _ in range(20):  # it may not have written its name yet
                file.seek(0)
                if other := file.read():
                    break
                time.sleep(0.05)
            file.close()
            raise TacqError(
                f"The work folder {folder} is in use by {other or 'another tacq-export'}; wait until that has ended, "
                "or give another --workdir."
            ) from None
        file.close()


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
def written_atomically(outfile: Path, option: str = "--outfile") -> Iterator[Path]:
    """A temporary path beside `outfile`, renamed to it when its bytes are on the disk; nothing is left when anything
    fails. What a killed process left under such a name is removed. option: names the place in the command line.

    Raises TacqError when the disk is full or the file cannot be written, also where a library says so in its own way.
    """
    remove_stale_partials(outfile)
    partial = outfile.with_name(f".{outfile.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb+") as written:
            os.fsync(written.fileno())  # else a power cut may leave the name without the bytes
        os.replace(partial, outfile)
    except OSError as error:
        raise _not_written(outfile, error.strerror or str(error), option) from error
    except (SafetensorError, RuntimeError) as error:
        # safetensors and torch.save have errors of their own for a failed write; their text names the cause.
        cause = str(error).split("\n", 1)[0]
        if not any(
            word in cause for word in ("os error", "I/O error", "IoError", "write", "writing", "unexpected pos")
        ):
            raise
        raise _not_written(outfile, cause, option) from error
    finally:
        partial.unlink(missing_ok=True)


def _not_written(outfile: Path, cause: str, option: str) -> TacqError:
    return TacqError(f"Could not write {outfile} ({cause}); free some space or give another {option}.")


def remove_stale_partials(outfile: Path) -> None:
    """Remove the temporary files of `outfile` whose process no longer runs."""
    for path in outfile.parent.glob(f".{glob.escape(outfile.name)}.*.partial"):
        pid = path.name.removesuffix(".partial").rpartition(".")[2]
        if pid.isdecimal() and not _is_running(int(pid)):
            path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True
