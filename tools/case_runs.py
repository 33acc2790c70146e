"""Runs the command line for tools/check_cases.py, and looks at what it wrote and said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import case_inputs as inputs
from check_architectures import stock_file, token_texts, wrong_file

from tacq_export.evaluation.verify import compare_models
from tacq_export.format.inspect_gguf import inspect_gguf

ROOT = Path(__file__).resolve().parent.parent


class Wrong(Exception):
    """What an input gets is not what a user must get."""


@dataclass(frozen=True)
class Done:
    """code: exit status. out, err: what was printed. peak: most bytes of memory. seconds: it took."""

    code: int
    out: str
    err: str
    peak: int
    seconds: float

    @property
    def sentence(self) -> str:
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Wrong(otherwise)


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "tacq_export", *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def finish(process: subprocess.Popen, limit: float = 600) -> Done:
    """Wait for it; a traceback, a signal or no end is Wrong."""
    began, said = time.monotonic(), {}
    streams = {"out": process.stdout, "err": process.stderr}
    readers = [threading.Thread(target=lambda k=k, s=s: said.update({k: s.read()})) for k, s in streams.items()]
    for reader in readers:
        reader.start()
    timer = threading.Timer(limit, process.kill)
    timer.start()
    _, status, usage = os.wait4(process.pid, 0)  # its own peak, which Popen.wait does not give
    process.returncode = os.waitstatus_to_exitcode(status)
    timer.cancel()
    for reader in readers:
        reader.join()
    unit = 1 if sys.platform == "darwin" else 1024
    done = Done(process.returncode, said["out"], said["err"], usage.ru_maxrss * unit, time.monotonic() - began)
    expect("Traceback" not in done.err, f"a traceback: {done.sentence[:200]}")
    expect("failed in a way it should not" not in done.err, done.sentence[:200])
    expect(done.code in (0, 1), f"exit status {done.code}: {done.sentence[:200]}")
    return done


def run(*arguments: object) -> Done:
    return finish(start(*arguments))


def export(
    folder: Path, model: Path, *options: object, name: str = "out", task: Path | None = None
) -> tuple[Done, Path]:
    """Export `model` with a small task; (what it did, the output)."""
    task = task or inputs.write_task(folder)
    done = run(model, "--task", task, "--outfile", folder / f"{name}.gguf", "-t", 1, *options)
    expect(
        (done.code == 0) == (folder / f"{name}.gguf").exists(), f"exit status {done.code} and the output do not agree"
    )
    return done, folder / f"{name}.gguf"


def exported(folder: Path, model: Path, *options: object, name: str = "out", task: Path | None = None):
    done, outfile = export(folder, model, *options, name=name, task=task)
    expect(done.code == 0, f"refused: {done.sentence}")
    return done, outfile


def refused(done: Done, *words: str) -> str:
    """The sentence of a refusal that has all `words` in it."""
    expect(done.code == 1, f"exit status {done.code}, where it is to be refused")
    expect(done.sentence.startswith("error: "), f"no sentence: {done.sentence[:200]}")
    expect(all(word in done.sentence for word in words), f"another sentence: {done.sentence}")
    return f'refused: "{short(done.sentence.removeprefix("error: "))}"'


def short(sentence: str) -> str:
    """Without folders of this run."""
    return re.sub(r"(/[\w.-]+)+/([\w.-]+)", r"\2", sentence)


def line(done: Done, words: str) -> str:
    found = [text for text in done.err.splitlines() if words in text]
    expect(bool(found), f"no line says '{words}'")
    return found[0].strip()


def kl(reference: Path, file: Path) -> float:
    """Of the file against its float reference, on texts of its tokenizer, in llama.cpp."""
    return compare_models(reference, file, token_texts(reference), 1).kl


def near(reference: Path, file: Path) -> str:
    """KL of a file, and of llama-quantize's Q4_0; Wrong where the file is much further."""
    ours, stock = kl(reference, file), kl(reference, stock_file(reference, file.with_suffix(".q4_0.gguf")))
    facts = wrong_file({"torch_kl_best": 0.0, "kl": ours, "q4_kl": stock})
    expect(not facts, f"KL of the file {ours:.3f}, of Q4_0 {stock:.3f}")
    return f"KL of the file {ours:.3f} (Q4_0: {stock:.3f})"


def types(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.type for tensor in inspect_gguf(file).tensors}
