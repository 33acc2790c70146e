"""`tacq-export run`: the command that is built, and a real run with a chat template that llama.cpp does not know."""

from __future__ import annotations

import subprocess

import pytest

from tacq_export.format.gguf_file import open_gguf
from tacq_export.format.write_gguf import copied, write_gguf
from tacq_export.reporting import Reporter
from tacq_export.runtime.build import tool
from tacq_export.runtime.run_model import last_error, run, run_arguments

UNKNOWN = "{% for m in messages %}~~{{ m.role }}~~{{ m.content }}{% endfor %}~~answer~~"


@pytest.fixture(scope="module")
def strange(tiny_gguf, tmp_path_factory):
    """The tiny llama with a template of nobody's."""
    reader, outfile = open_gguf(tiny_gguf), tmp_path_factory.mktemp("strange") / "strange.gguf"
    write_gguf(outfile, reader, [copied(t) for t in reader.tensors], {"tokenizer.chat_template": UNKNOWN}, Reporter())
    return outfile


def test_the_template_engine_is_asked_for():
    arguments = run_arguments("m.gguf", "-p is no flag here", 7, 512, 0.5)
    assert arguments[:10] == ["-m", "m.gguf", "-p", "-p is no flag here", "-n", "7", "-c", "512", "--temp", "0.5"]
    assert "--jinja" in arguments


def test_a_model_with_an_unknown_template_runs(strange, runtime):
    assert isinstance(run(strange, "how many apples", n_predict=4, threads=1, ctx_size=64, capture=True), str)
    command = [str(tool("llama-completion")), *run_arguments(strange, "how many apples", 4, 64, 0.0), "-t", "1"]
    shown = subprocess.run(
        [part for part in command if part != "--no-display-prompt"], stdin=subprocess.DEVNULL, capture_output=True
    )
    assert shown.returncode == 0 and b"~~user~~how many apples~~answer~~" in shown.stdout
    command.remove("--jinja")
    without = subprocess.run([*command, "--no-jinja"], stdin=subprocess.DEVNULL, capture_output=True)
    assert without.returncode != 0, "llama.cpp knows it by heart now; this test shows nothing any more"


def test_why_a_program_failed_is_what_it_calls_an_error():
    """llama-imatrix of a short text: a warning comes first."""
    log = (
        "0.00.309.817 W llama_context: n_ctx_seq (512) > n_ctx_train (256) -- possible training context overflow\n"
        "0.00.315.925 E compute_imatrix: you need at least 1024 tokens for a context of 512 tokens\n"
    )
    assert last_error(log).endswith("E compute_imatrix: you need at least 1024 tokens for a context of 512 tokens")
    assert last_error("loading\nerror: no such file\nbye\n") == "error: no such file"
    assert last_error("") == "no output"
