"""What an export is asked to do, checked before anything long begins."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .errors import TacqError
from .tensor_types import TYPES_BY_NAME, TensorType

SCORES = ("tacq", "fisher", "magnitude", "gradient", "random", "tacq-no-magnitude", "tacq-no-error")
REFERENCES = ("rtn", "gptq")
BASE_TYPES = ("tacq2", "tacq3", "tacq4")
# What the token embedding and the output head may be stored as: ours, and the stock types that gguf-py can write.
EMBEDDING_TYPES = (*BASE_TYPES, "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
# Bits per weight that are spent on kept weights unless --ratio or --target-bpw says otherwise.
DEFAULT_KEPT_BPW = 0.2


@dataclass(frozen=True)
class ExportConfig:
    """Options of `export`; the command line's flags have the same names.

    model: Hugging Face directory or hub id, or GGUF file.  task: JSONL or text file of examples.  outfile: GGUF to write.
    score: one of SCORES (score_weights.py has the formulas).  reference: how Q(W) of the score is made, `rtn` or `gptq`.
    ratio: share of the linear weights to keep, of the global top, at whatever size that takes.
    target_bpw: bits per weight of the linear matrices, scales and indices counted, that are not exceeded; as many weights
    are kept as that holds. Without ratio and target_bpw it is DEFAULT_KEPT_BPW more than the base type takes.
    base_type: type of the weights that are not kept; None means the widest that fits target_bpw, or tacq2.
    n_samples, seq_len: how many examples of the task, and to how many tokens each is cut.
    refine_sweeps: passes of coordinate descent over the codes after GPTQ; 0 leaves GPTQ's.
    damping: share of the Hessian's mean diagonal that GPTQ adds to it.
    device: auto, cpu, cuda or cuda:N.  threads: CPU threads (None: all this process may use).
    workdir: where unfinished work lies (None: OUTFILE.work, removed at the end).  resume: go on with it.
    """

    model: str
    task: Path
    outfile: Path
    score: str = "tacq"
    reference: str = "rtn"
    ratio: float | None = None
    target_bpw: float | None = None
    base_type: str | None = None
    token_embedding_type: str = "tacq4"
    output_tensor_type: str = "tacq4"
    n_samples: int = 128
    seq_len: int = 2048
    refine_sweeps: int = 3
    damping: float = 0.01
    device: str = "auto"
    seed: int = 0
    threads: int | None = None
    workdir: Path | None = None
    resume: bool = False
    force: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", str(self.model))  # a Path is as good
        for name in ("task", "outfile", "workdir"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, Path(value))
        if self.workdir is None:
            object.__setattr__(self, "workdir", self._own_workdir)

    @property
    def _own_workdir(self) -> Path:
        return self.outfile.parent / (self.outfile.name + ".work")  # with_name() refuses "." and "/", which validate() names

    @property
    def keeps_workdir(self) -> bool:
        """True if the user named the work folder: then it is left in place."""
        return self.workdir != self._own_workdir

    def validate(self) -> None:
        """Raises TacqError for the first option that cannot work, naming it, its value and what is expected."""
        self._one_of("score", SCORES)
        self._one_of("reference", REFERENCES)
        if self.base_type is not None:
            self._one_of("base_type", BASE_TYPES)
        self._one_of("token_embedding_type", EMBEDDING_TYPES)
        self._one_of("output_tensor_type", EMBEDDING_TYPES)
        if self.ratio is not None and self.target_bpw is not None:
            raise TacqError("--ratio and --target-bpw both say how much to keep; give one of them.")
        if self.ratio is not None and not 0 <= self.ratio <= 0.05:
            raise TacqError(f"--ratio is {self.ratio:g}, expected 0 to 0.05 (0.0035 keeps 0.35 % of the weights).")
        if self.target_bpw is not None:
            least = TYPES_BY_NAME[(self.base_type or "tacq2").upper()].bits_per_weight
            if not least <= self.target_bpw <= 6.25:
                raise TacqError(
                    f"--target-bpw is {self.target_bpw:g}, expected {least:g} to 6.25: {self.base_type or 'tacq2'} alone takes {least:g} bits per weight."
                )
        for name, least in (("n_samples", 1), ("seq_len", 8), ("seed", 0), ("refine_sweeps", 0)):
            if getattr(self, name) < least:
                raise TacqError(f"{self._flag(name)} is {getattr(self, name)}, expected at least {least}.")
        if self.threads is not None and self.threads < 1:
            raise TacqError(f"--threads is {self.threads}, expected at least 1.")
        if not 0 < self.damping <= 1:
            raise TacqError(f"--damping is {self.damping:g}, expected more than 0 and at most 1.")
        if not self.task.is_file():
            raise TacqError(f"There is no task file {self.task}; give a JSONL or text file of examples with --task.")
        self._check_outfile()

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise TacqError(f"{self._flag(name)} is '{getattr(self, name)}', expected one of: {', '.join(allowed)}.")

    @staticmethod
    def _flag(name: str) -> str:
        return "--" + name.replace("_", "-")

    def _check_outfile(self) -> None:
        if self.outfile.is_dir():
            raise TacqError(f"{self.outfile} is a folder; give --outfile the name of a file.")
        if self.outfile.exists() and not self.force:
            raise TacqError(f"{self.outfile} exists; give another --outfile, or --force to replace it.")
        if self.outfile.exists() and Path(self.model).exists() and self.outfile.samefile(self.model):
            raise TacqError(f"{self.outfile} is the model itself; give another --outfile.")
        folder = self.outfile.parent
        if not folder.is_dir():
            raise TacqError(f"There is no folder {folder} for the output; make it, or give another --outfile.")
        if not os.access(folder, os.W_OK):
            raise TacqError(f"The folder {folder} is not writable; give another --outfile.")

    @property
    def base(self) -> TensorType:
        """The base type asked for; else TACQ2, or with a target the widest whose blocks alone stay within it."""
        if self.base_type:
            return TYPES_BY_NAME[self.base_type.upper()]
        types = [TYPES_BY_NAME[name.upper()] for name in BASE_TYPES]
        return [t for t in types if t.bits_per_weight <= (self.target_bpw or types[0].bits_per_weight)][-1]

    @property
    def bpw_limit(self) -> float | None:
        """Bits per weight of the linear matrices that may not be exceeded; None where `ratio` decides."""
        if self.ratio is not None:
            return None
        return self.base.bits_per_weight + DEFAULT_KEPT_BPW if self.target_bpw is None else self.target_bpw

    def fingerprint(self) -> dict:
        """Everything that decides the result, for `--resume`: not where files lie nor how they are made."""
        left_out = {"outfile", "workdir", "resume", "force", "dry_run", "threads"}
        return {f.name: str(asdict(self)[f.name]) for f in fields(self) if f.name not in left_out}
