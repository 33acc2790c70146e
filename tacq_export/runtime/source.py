"""The pinned llama.cpp: fetched with pip by name, hash-checked, unpacked with our call sites inserted.

Everything lies in a cache folder that is safe to lose:

    downloads/           the source distribution
    llama.cpp-VERSION/   the patched tree, our sources as copied for the build, objects, logs
    runtime/             finished builds, one for each key
    models/              what tools/fetch_models.py fetched
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from ..errors import TacqError
from ..files import file_sha256, locked, need_space

Say = Callable[[str], None]

OWN_SUFFIXES = {".c", ".h", ".cpp", ".cu", ".cuh", ".comp", ".cmake"}


def cpp_ext_dir() -> Path:
    """Folder of our C sources: inside an installed package, or beside the package in a clone."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "cpp_ext", package.parent / "cpp_ext"):
        if (folder / "LLAMA_CPP_VERSION").is_file():
            return folder
    raise TacqError(
        "The C sources (cpp_ext) are missing from this installation; install tacq-export from a clone again."
    )


def cache_dir() -> Path:
    """The cache folder: $TACQ_EXPORT_CACHE, else $XDG_CACHE_HOME/tacq-export, else ~/.cache/tacq-export."""
    own = os.environ.get("TACQ_EXPORT_CACHE")
    if own:
        return Path(own).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tacq-export"


def pin() -> tuple[str, str, str]:
    """(package, version, sha256) of the source distribution that LLAMA_CPP_VERSION names."""
    line = (cpp_ext_dir() / "LLAMA_CPP_VERSION").read_text().strip()
    match = re.fullmatch(r"([\w-]+)==([\w.]+) --hash=sha256:([0-9a-f]{64})", line)
    if not match:
        raise TacqError(
            f"cpp_ext/LLAMA_CPP_VERSION reads '{line}', not 'package==version --hash=sha256:...'; restore it."
        )
    return match[1], match[2], match[3]


def pip_download(requirement: str, folder: Path, options: list[str], hint: str) -> None:
    """`pip download --no-deps REQUIREMENT` into `folder`; TacqError with pip's last error line if it fails."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(command + options + ["-d", str(folder), *requirement.split()], text=True, capture_output=True)
    if done.returncode:
        if "No module named pip" in done.stderr:
            raise TacqError(
                f"{sys.executable} has no pip; install it with '{sys.executable} -m ensurepip', then run again."
            )
        errors = (
            [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines() or ["no output"]
        )
        raise TacqError(f"pip could not fetch {requirement.split()[0]} ({errors[-1].strip()}); {hint}")


def fetch_sdist(say: Say = print) -> Path:
    """Path of the pinned source distribution in the cache, downloaded if it is not there.

    Raises TacqError if pip is missing, cannot reach the package, or gives a file with another hash.
    """
    package, version, sha256 = pin()
    folder = cache_dir() / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{package.replace('-', '_')}-{version}.tar.gz"
    with locked(folder / "lock", say):
        if path.is_file():
            if file_sha256(path) == sha256:
                return path
            path.unlink()
        say(f"Fetching {package} {version} (source, 77 MB) with pip ...")
        pip_download(
            f"{package}=={version}",
            folder,
            ["--no-binary", package],
            f"check the network, or put {path.name} into {folder}, then run again.",
        )
        if not path.is_file() or file_sha256(path) != sha256:
            path.unlink(missing_ok=True)
            raise TacqError(
                f"The downloaded {path.name} is not the pinned file (sha256 {sha256[:12]}...); run again, or look "
                "at the package index that pip is configured to use."
            )
    return path


def load_patcher() -> tuple[ModuleType, list]:
    """(module patch_llama_cpp, CALL_SITES) from cpp_ext, which is a folder of sources and no package."""
    modules = []
    for name in ("patch_llama_cpp", "call_sites"):
        path = cpp_ext_dir() / f"{name}.py"
        if name not in sys.modules or getattr(sys.modules[name], "__file__", None) != str(path):
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None  # a .py file has both
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
        modules.append(sys.modules[name])
    return modules[0], modules[1].CALL_SITES


def own_sources() -> dict[str, bytes]:
    """{path inside cpp_ext: content} of our sources, in a fixed order."""
    folder = cpp_ext_dir()
    files = sorted(p for p in folder.rglob("*") if p.suffix in OWN_SUFFIXES and p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def write_if_changed(path: Path, content: bytes) -> bool:
    """Write `content` unless `path` holds it already, so that a build redoes only what changed."""
    if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return True


def work_dir() -> Path:
    """Folder of the patched tree and the objects of its builds."""
    return cache_dir() / f"llama.cpp-{pin()[1]}"


def source_tree(say: Say = print) -> Path:
    """Root of the patched llama.cpp (with convert_hf_to_gguf.py and gguf-py); fetched and brought up to date if need
    be.

    Raises TacqError if a call site does not fit, naming the anchor.
    """
    work = work_dir()
    with locked(work / "tree.lock", say):
        sync_upstream(work, say)
    return work / "tree"


def copy_own_sources(folder: Path) -> None:
    """Make `folder` hold our sources as they are now, writing only files that differ. Only a build does this, under its
    lock: a process of another version that only reads the tree must not change what is being compiled."""
    sources = own_sources()
    for inside, content in sources.items():
        write_if_changed(folder / inside, content)
    for stale in folder.rglob("*"):
        if stale.is_file() and stale.relative_to(folder).as_posix() not in sources:
            stale.unlink()


def is_of_today(work: Path) -> bool:
    """True if the tree and our sources in `work` are those of this version: another may have changed them meanwhile."""
    stamp, folder = work / "tree.stamp", work / "cpp_ext"
    copied = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return stamp.is_file() and stamp.read_text() == _tree_state() and copied == own_sources()


def _tree_state() -> str:
    """What tree.stamp says of a tree with today's pin and call sites."""
    return hashlib.sha256(repr((pin(), load_patcher()[1])).encode()).hexdigest()


def sync_upstream(work: Path, say: Say) -> None:
    """Make `work`/tree the pinned llama.cpp with the call sites of today, writing only files that differ.

    Files keep their dates when they keep their content, so a build after a changed call site redoes only what it must.
    """
    patcher, sites = load_patcher()
    tree, stamp = work / "tree", work / "tree.stamp"
    state = _tree_state()
    if stamp.is_file() and stamp.read_text() == state:
        return
    need_space(cache_dir(), 3.0)
    sdist = fetch_sdist(say)
    say("Unpacking llama.cpp and inserting our call sites ...")
    stamp.unlink(missing_ok=True)
    by_file = patcher.sites_by_file(sites)
    try:
        with tarfile.open(sdist, "r:gz") as archive:
            for member in archive:
                _, found, inside = member.name.partition("/vendor/llama.cpp/")
                if not member.isfile() or not found or ".." in inside.split("/"):
                    continue
                stream = archive.extractfile(member)
                assert stream is not None  # `member` is a file
                content = stream.read()
                if inside in by_file:
                    content = patcher.patch_text(content.decode(), by_file.pop(inside)).encode()
                write_if_changed(tree / inside, content)
    except patcher.PatchError as error:
        raise TacqError(f"The pinned llama.cpp does not take our call sites: {error}") from error
    except (tarfile.TarError, OSError, EOFError) as error:
        raise TacqError(f"Could not unpack {sdist} ({error}); delete it and run again.") from error
    if by_file:
        raise TacqError(
            f"The pinned llama.cpp has no file {next(iter(by_file))}, which call_sites.py names; correct it."
        )
    stamp.write_text(state)
