"""Unfinished work of an export on disk: what was selected, and each tensor's bytes as soon as they are final.

state.json            what this work is of; --resume goes on only with the very same
reference-f16.gguf    the model before quantization (load_model.py)
calibration/          gradients and Hessians (calibrate.py), and calibration.json: what they are of, tokens included
selection.pt          type and kept weights of every tensor
tensors/NAME.bin      bytes of a finished tensor, with its type, and its error and count, in NAME.json
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import torch

from .calibration.calibrate import CALIBRATION_VERSION
from .config import ExportConfig
from .errors import TacqError
from .files import file_sha256, written_atomically
from .format.tensor_types import FORMAT_VERSION, TYPES_BY_NAME
from .planning.select_weights import TensorSelection


class WorkDir:
    """The work folder of one export. `open` makes it, or takes an earlier one up again.

    found: names in it that `discard` leaves, as they were there before; None if the folder itself was not.
    """

    def __init__(self, path: Path, found: set[str] | None = None):
        self.path, self._found = path, found

    @classmethod
    def open(cls, config: ExportConfig) -> WorkDir:
        """Raises TacqError if --resume finds no earlier work or the work of other options, or a named folder holds
        other files."""
        path = config.workdir
        assert path is not None  # ExportConfig names one where the user does not
        versions = {"format_version": FORMAT_VERSION, "calibration_version": CALIBRATION_VERSION}
        state = versions | {
            "model": _identity(config.model),
            "task": file_sha256(config.task),
            "options": config.fingerprint(),
        }
        marker = path / "state.json"
        if config.resume:
            if not marker.is_file():
                raise TacqError(f"There is no unfinished export in {path}; run without --resume.")
            if difference := _difference(_read_state(marker), state):
                raise TacqError(f"The unfinished export in {path} is another one ({difference}); run without --resume.")
            if not config.dry_run:
                return cls(path, {entry.name for entry in path.iterdir()})
        if path.exists() and not marker.is_file() and (not path.is_dir() or any(path.iterdir())):
            raise TacqError(f"{path} exists and is no work folder of tacq-export; give another with --workdir.")
        if config.dry_run:  # elsewhere: trying out must not cost unfinished work
            path = path.with_name(path.name + ".dry-run")
            marker = path / "state.json"
        calibration = {key: state[key] for key in ("calibration_version", "model", "task")} | {
            "options": config.calibration_fingerprint()
        }
        try:
            found = {"state.json"} if marker.is_file() else set()
            existed = path.is_dir()
            calibration |= {"tokens": _clear(path, calibration)}
            found |= {entry.name for entry in path.iterdir()} if existed else set()
            (path / "tensors").mkdir(parents=True)
            (path / "calibration").mkdir(exist_ok=True)
            (path / "calibration.json").write_text(json.dumps(calibration, indent=1))
            marker.write_text(json.dumps(state, indent=1))
        except OSError as error:
            raise TacqError(
                f"The work folder {path} cannot be made ({error.strerror}); give another with --workdir."
            ) from None
        return cls(path, found if existed else None)

    @property
    def calibration(self) -> Path:
        return self.path / "calibration"

    def settle_tokens(self, tokens: dict[str, str], resume: bool) -> None:
        """Take note of the token lists that are calibrated on: {what for: their sha256}. A calibration of others is
        removed; they change with the model's chat template and tokenizer and with what stands beside the task file.

        Raises TacqError if such a calibration is to be resumed.
        """
        marker = self.path / "calibration.json"
        identity = json.loads(marker.read_text())
        earlier = identity.get("tokens") or {}
        changed = any(earlier.get(key, now) != now for key, now in tokens.items())
        if changed or (not earlier and any(self.calibration.iterdir())):
            if resume:
                raise TacqError(
                    f"The unfinished export in {self.path} was calibrated on other tokens: the model's chat template "
                    "or tokenizer, the schemas of the task, or this program has changed; run without --resume."
                )
            shutil.rmtree(self.calibration)
            self.calibration.mkdir()
            earlier = {}
        with written_atomically(marker) as partial:
            partial.write_text(json.dumps(identity | {"tokens": earlier | tokens}, indent=1))

    def load_selection(self) -> dict[str, TensorSelection] | None:
        """What `save_selection` saved, None if it was not reached."""
        path = self.path / "selection.pt"
        if not path.is_file():
            return None
        return {
            name: TensorSelection(TYPES_BY_NAME[t], kept.long(), n)
            for name, (t, kept, n) in torch.load(path, weights_only=True).items()
        }

    def save_selection(self, selection: dict[str, TensorSelection]) -> None:
        plain = {
            name: (
                s.type.name,
                s.kept.to(torch.int32) if s.kept.numel() == 0 or int(s.kept.max()) < 2**31 else s.kept,
                s.selected,
            )
            for name, s in selection.items()
        }
        with written_atomically(self.path / "selection.pt", "--workdir") as partial:
            torch.save(plain, partial)

    def has_tensor(self, name: str) -> bool:
        return self._file(name, ".json").is_file()

    def save_tensor(self, name: str, data: np.ndarray, facts: dict) -> None:
        """The tensor's bytes first, its facts (which mark it as finished) last."""
        with written_atomically(self._file(name, ".bin"), "--workdir") as partial:
            partial.write_bytes(data.data)
        with written_atomically(self._file(name, ".json"), "--workdir") as partial:
            partial.write_text(json.dumps(facts))

    def load_tensor(self, name: str) -> np.ndarray:
        """uint8 bytes of a finished tensor."""
        return np.fromfile(self._file(name, ".bin"), dtype=np.uint8)

    def load_facts(self, name: str) -> dict:
        return json.loads(self._file(name, ".json").read_text())

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def discard(self) -> None:
        """Remove what was put here since `open`: of an export that is refused before its long work, nothing is left."""
        if self._found is None:
            self.remove()
            return
        for entry in sorted(self.path.iterdir()):
            if entry.name not in self._found:
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)

    def _file(self, name: str, ending: str) -> Path:
        return self.path / "tensors" / (name + ending)


def _clear(path: Path, calibration: dict) -> dict[str, str]:
    """Remove an earlier export from a work folder, but for the calibration if it is the same as this one's: exports of
    several sizes into one --workdir calibrate once. Returns what tokens that is of."""
    try:
        earlier = json.loads((path / "calibration.json").read_text())
        tokens = earlier.pop("tokens", None) or {}
        same = earlier == calibration
    except (OSError, ValueError, AttributeError):
        same, tokens = False, {}
    for entry in sorted(path.iterdir()) if path.is_dir() else []:
        if same and entry.name in ("calibration", "calibration.json"):
            continue
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return tokens if same else {}


def _read_state(marker: Path) -> dict:
    """The state of earlier work; one that equals nothing if the file is damaged."""
    try:
        state = json.loads(marker.read_text())
    except ValueError:
        state = None
    return state if isinstance(state, dict) and isinstance(state.get("options"), dict) else {"options": {}}


def _difference(earlier: dict, state: dict) -> str:
    """What is not as it was, in words; empty if nothing."""
    before, now = earlier["options"], state["options"]
    changed = [f"{key}: then {before.get(key)}, now {now[key]}" for key in now if before.get(key) != now[key]]
    changed += [f"the files of the {key} have changed" for key in ("model", "task") if earlier.get(key) != state[key]]
    return changed[0] if changed else "" if earlier == state else "of another version of this program"


def _identity(model: str) -> list:
    """Name, size and date of the model's files: enough to notice another checkpoint without reading gigabytes."""
    path = Path(model)
    if path.is_file() and re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name):  # a split GGUF: all its parts
        files = sorted(path.parent.glob(glob.escape(path.name[:-20]) + "-?????-of-?????.gguf"))
    else:
        files = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.is_file()) if path.is_dir() else []
    return [model] + [[os.path.basename(p), p.stat().st_size, int(p.stat().st_mtime)] for p in files]
