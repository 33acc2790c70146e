"""What an export is asked to do, checked before anything long begins."""

from __future__ import annotations

import math
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .errors import TacqError
from .format.tensor_types import TYPES_BY_NAME, TensorType

SCORES = ("obs", "tacq", "fisher", "magnitude", "gradient", "random", "tacq-no-magnitude", "tacq-no-error")
REFERENCES = ("rtn", "gptq")
HESSIANS = ("gradient", "plain")
HESSIAN_INPUTS = ("quantized", "float")
PRECISIONS = ("f32", "bf16")
LOSSES = ("text", "answer")
BASE_TYPES = ("tacq2", "tacq3", "tacq4")
# What the token embedding and the output head may be stored as: ours, and the stock types that gguf-py can write.
EMBEDDING_TYPES = (*BASE_TYPES, "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
# What the rows of a task may have (inputs/load_task.py).
COLUMN_KEYS = (
    "prompt",
    "completion",
    "question",
    "answer",
    "query",
    "schema",
    "db_id",
    "instruction",
    "input",
    "output",
    "history",
    "messages",
    "conversations",
    "text",
    "system",
    "tools",
)
# Bits per weight of the linear matrices unless another option says how large the file is to be.
DEFAULT_BPW = 2.45
DEFAULT_EMBEDDING_TYPE = "tacq4"
_UNITS = {
    "": 1,
    "k": 1e3,
    "m": 1e6,
    "g": 1e9,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
}


def parse_size(text: str | int) -> int:
    """Bytes of '350M', '1.2GiB', '48500000'; k, M, G count in thousands. Raises TacqError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if not match or match[2] not in _UNITS or not 1 <= float(match[1]) * _UNITS[match[2]] < 1e15:
        raise TacqError(f"--target-size is '{text}', expected a size such as 350M, 1.2G, 512MiB or a number of bytes.")
    return math.floor(float(match[1]) * _UNITS[match[2]])


def parse_columns(text: str | None) -> dict[str, str]:
    """{key of a task's rows: column of the file} of 'prompt=Q,completion=A'; {} for None. Raises TacqError for anything
    else."""
    columns: dict[str, str] = {}
    for pair in text.split(",") if text is not None else ():
        key, equals, column = (part.strip() for part in pair.partition("="))
        if not equals or not column or key not in COLUMN_KEYS:
            raise TacqError(
                f"--columns has '{pair}', expected KEY=COLUMN pairs such as prompt=Q,completion=A, with the keys "
                f"{', '.join(COLUMN_KEYS)}."
            )
        if key in columns:
            raise TacqError(f"--columns names '{key}' twice; give it once.")
        columns[key] = column
    return columns


@dataclass(frozen=True)
class ExportConfig:
    """Options of `export`; the command line's flags have the same names.

    model: Hugging Face directory or hub id, or GGUF file.
    task: JSONL, JSON, CSV, Parquet or text file of examples.
    columns: which columns of it mean what, as 'prompt=Q,completion=A'; None if it has the names that are expected.
    outfile: GGUF to write.
    score: one of SCORES (score_weights.py has the formulas).
    reference: how Q(W) of the score is made, `rtn` or `gptq`.
    target_bpw: bits per weight of the linear matrices that are not exceeded, scales and indices counted. Each matrix
        gets the type of least predicted loss. DEFAULT_BPW if no other option says how large the file is to be.
    target_size: the same for the whole file, in bytes or as '350M'.
    base_type: one width for all matrices instead; kept weights fill up target_bpw.
    no_kept: keep no weights at 16 bits, so that no matrix gets a mixed type.
    ratio: share of the linear weights to keep, of base_type or TACQ2 matrices, at whatever size that takes.
    tensor_types: 'REGEX=TYPE' entries; a matrix whose GGUF name matches gets that type, the first match counts.
    token_embedding_type, output_tensor_type: None is DEFAULT_EMBEDDING_TYPE, or what target_size leaves.
    n_samples, seq_len: how many examples of the task are used, and to how many tokens each is cut.
    refine_sweeps: passes of coordinate descent over the codes after GPTQ; 0 leaves GPTQ's.
    damping: share of the Hessian's mean diagonal that GPTQ adds to it.
    shrinkage: how much the Hessian's diagonal grows, the more the fewer tokens a column it was made of (hessian.py).
    compensation: how much of the error of earlier matrices a matrix corrects, 0 to 1 (quantize_sequential.py).
    precision: of the calibration's matrix products, f32 or bf16 (autocast; 2 to 3 times faster where the CPU has it).
    loss: what gradients are taken of: the whole text, or the assistant's last turn alone.
    hessian: gradient weighs the tokens by their loss gradients (calibrate.py), plain counts all alike.
    hessian_inputs: quantized runs the model block by block with what is quantized already, so that each matrix
        corrects errors of those before it (quantize_sequential.py); float takes the calibration's, which is faster.
    tune: fine-tune norms and biases at the end, on up to n_samples examples behind the first (tune_vectors.py).
    device: auto, cpu, cuda or cuda:N.
    seed: of the random score and of the order of tune.
    threads: CPU threads (None: all that this process may use).
    workdir: where unfinished work lies (None: OUTFILE.work, removed at the end).
    resume: go on with it.
    force: replace an outfile that exists.
    dry_run: check everything, write nothing.
    """

    model: str
    task: Path
    outfile: Path
    score: str = "obs"
    reference: str = "rtn"
    ratio: float | None = None
    target_bpw: float | None = None
    target_size: int | str | None = None
    base_type: str | None = None
    no_kept: bool = False
    tensor_types: tuple[str, ...] = ()
    token_embedding_type: str | None = None
    output_tensor_type: str | None = None
    n_samples: int = 128
    seq_len: int = 2048
    refine_sweeps: int = 3
    damping: float = 0.01
    shrinkage: float = 0.5
    compensation: float = 0.5
    loss: str = "text"
    hessian: str = "gradient"
    hessian_inputs: str = "quantized"
    precision: str = "f32"
    tune: bool = False
    device: str = "auto"
    seed: int = 0
    threads: int | None = None
    workdir: Path | None = None
    resume: bool = False
    force: bool = False
    dry_run: bool = False
    columns: str | None = None

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
        return self.outfile.parent / (
            self.outfile.name + ".work"
        )  # with_name() refuses "." and "/", which validate() names

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
        self._one_of("loss", LOSSES)
        self._one_of("hessian", HESSIANS)
        self._one_of("hessian_inputs", HESSIAN_INPUTS)
        self._one_of("precision", PRECISIONS)
        for name in ("token_embedding_type", "output_tensor_type"):
            if getattr(self, name) is not None:
                self._one_of(name, EMBEDDING_TYPES)
        sizes = [self._flag(name) for name in ("ratio", "target_bpw", "target_size") if getattr(self, name) is not None]
        if len(sizes) > 1:
            raise TacqError(f"{' and '.join(sizes)} both say how large the file is to be; give one of them.")
        if self.base_type is not None and self.target_size is not None:
            raise TacqError(
                "--base-type gives all matrices one width, and --target-size chooses a width for each; give one of "
                "them."
            )
        if self.no_kept and self.ratio:
            raise TacqError(f"--ratio {self.ratio:g} keeps weights and --no-kept keeps none; give one of them.")
        self.fixed_types()
        parse_columns(self.columns)
        if self.target_size is not None:
            parse_size(self.target_size)
        if self.ratio is not None and not 0 <= self.ratio <= 0.05:
            raise TacqError(f"--ratio is {self.ratio:g}, expected 0 to 0.05 (0.0035 keeps 0.35 % of the weights).")
        if self.target_bpw is not None:
            least = TYPES_BY_NAME[(self.base_type or "tacq2").upper()].bits_per_weight
            if not least <= self.target_bpw <= 6.25:
                raise TacqError(
                    f"--target-bpw is {self.target_bpw:g}, expected {least:g} to 6.25: {self.base_type or 'tacq2'} "
                    f"alone takes {least:g} bits per weight."
                )
        for name, least in (("n_samples", 1), ("seq_len", 8), ("seed", 0), ("refine_sweeps", 0)):
            if getattr(self, name) < least:
                raise TacqError(f"{self._flag(name)} is {getattr(self, name)}, expected at least {least}.")
        if self.threads is not None and self.threads < 1:
            raise TacqError(f"--threads is {self.threads}, expected at least 1.")
        if not 0 < self.damping <= 1:
            raise TacqError(f"--damping is {self.damping:g}, expected more than 0 and at most 1.")
        for name, most in (("shrinkage", 100), ("compensation", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise TacqError(f"{self._flag(name)} is {getattr(self, name):g}, expected from 0 to {most}.")
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
    def allocates(self) -> bool:
        """True if every tensor gets its own width and density; False if one base type holds all matrices."""
        return self.base_type is None and self.ratio is None

    @property
    def base(self) -> TensorType:
        """The one base type where nothing is allocated."""
        return TYPES_BY_NAME[(self.base_type or "tacq2").upper()]

    @property
    def bpw_limit(self) -> float | None:
        """Bits per weight of the linear matrices that may not be exceeded; None where `ratio` or `target_size`
        decides."""
        if self.ratio is not None or self.target_size is not None:
            return None
        if self.target_bpw is not None:
            return self.target_bpw
        if self.base_type is not None and self.no_kept:
            return self.base.bits_per_weight
        return (
            DEFAULT_BPW
            if self.base_type is None
            else self.base.bits_per_weight + DEFAULT_BPW - TYPES_BY_NAME["TACQ2"].bits_per_weight
        )

    def fixed_types(self) -> list[tuple[re.Pattern, str]]:
        """`tensor_types` as (pattern, type in lower case). Raises TacqError for an entry that is not REGEX=TYPE."""
        pairs = []
        for entry in self.tensor_types:
            pattern, _, name = entry.rpartition("=")
            allowed = [t.lower() for t in TYPES_BY_NAME] + [t for t in EMBEDDING_TYPES if t not in BASE_TYPES]
            if not pattern or name.lower() not in allowed:
                raise TacqError(
                    f"--tensor-type is '{entry}', expected REGEX=TYPE with one of the types {', '.join(allowed)}."
                )
            try:
                pairs.append((re.compile(pattern), name.lower()))
            except re.error as error:
                raise TacqError(
                    f"--tensor-type is '{entry}', and '{pattern}' is no regular expression ({error})."
                ) from None
        return pairs

    def calibration_fingerprint(self) -> dict:
        """What decides the gradients and Hessians: an export that shares these can use them again."""
        return {
            f: str(getattr(self, f))
            for f in ("model", "n_samples", "seq_len", "loss", "hessian", "precision", "device")
        }

    def fingerprint(self) -> dict:
        """Everything that decides the result, for `--resume`: not where files lie nor how they are made."""
        left_out = {"outfile", "workdir", "resume", "force", "dry_run", "threads"}
        return {f.name: str(asdict(self)[f.name]) for f in fields(self) if f.name not in left_out}
