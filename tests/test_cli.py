"""The command line: exit statuses, errors of one line, and help that says what is so."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_model import write_tiny_model

from tacq_export import cli, cli_options
from tacq_export.config import ExportConfig
from tacq_export.format.tensor_types import register_with_gguf, tensor_type
from tacq_export.runtime import decode_in_c


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_gguf, tiny_task) -> Path:
    """A folder with good and bad files, as the current one."""
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "ours.gguf", tensor_type("tacq2_s16"))
    (tmp_path / "model.gguf").symlink_to(tiny_gguf)
    (tmp_path / "task.jsonl").write_text(tiny_task.read_text())
    (tmp_path / "bad.jsonl").write_text('{"text": "a b"}\n{"text":\n')
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 " * 5000)
    (tmp_path / "text.gguf").write_text("no GGUF at all")
    (tmp_path / "folder").mkdir()
    good = (tmp_path / "ours.gguf").read_bytes()
    (tmp_path / "short.gguf").write_bytes(good[: len(good) // 2])
    damaged = bytearray(good)
    at = gguf.GGUFReader(tmp_path / "ours.gguf").tensors[0]
    section = at.data_offset + int(at.n_elements) // 64 * 18
    assert damaged[section : section + 4] == b"TCQS"
    damaged[section] ^= 255
    (tmp_path / "damaged.gguf").write_bytes(damaged)
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    writer.add_name("only metadata")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setenv("TACQ_EXPORT_CACHE", str(tmp_path / "no-cache"))
    return tmp_path


EXPORT = "model.gguf --task task.jsonl --outfile out.gguf"
# What is found when the model is loaded, its vocabulary in llama.cpp included.
NEED_RUNTIME = {f"{EXPORT} --target-size 1k", f"{EXPORT} --tensor-type nothing=f16"}
ERRORS = {
    # export
    "gone.gguf --task task.jsonl --outfile out.gguf": "There is no file or folder gone.gguf",
    "folder --task task.jsonl --outfile out.gguf": "folder has no config.json",
    "text.gguf --task task.jsonl --outfile out.gguf": "text.gguf is not a GGUF file",
    "short.gguf --task task.jsonl --outfile out.gguf": "short.gguf is not a GGUF file, or is damaged",
    "ours.gguf --task task.jsonl --outfile out.gguf": "ours.gguf is already a TACQ file",
    "vocabulary.gguf --task task.jsonl --outfile out.gguf": "vocabulary.gguf holds no model",
    "model.gguf --task gone.jsonl": "There is no task file gone.jsonl",
    "model.gguf --task folder": "There is no task file folder",
    "model.gguf --task bad.jsonl --outfile out.gguf": "bad.jsonl, line 2: not valid JSON",
    "model.gguf --task empty.txt --outfile out.gguf": "empty.txt is empty",
    "model.gguf --task latin1.txt --outfile out.gguf": "latin1.txt is not UTF-8 text",
    "model.gguf --task task.jsonl --outfile ours.gguf": "ours.gguf exists",
    "model.gguf --task task.jsonl --outfile model.gguf --force": "model.gguf is the model itself",
    "model.gguf --task task.jsonl --outfile folder": "folder is a folder",
    "model.gguf --task task.jsonl --outfile .": ". is a folder",
    "model.gguf --task task.jsonl --outfile gone/out.gguf": "There is no folder gone for the output",
    f"{EXPORT} --score best": "--score is 'best'",
    f"{EXPORT} --reference x": "--reference is 'x'",
    f"{EXPORT} --base-type q4_0": "--base-type is 'q4_0'",
    f"{EXPORT} --token-embedding-type x": "--token-embedding-type is 'x'",
    f"{EXPORT} --output-tensor-type x": "--output-tensor-type is 'x'",
    f"{EXPORT} --ratio 0.5": "--ratio is 0.5",
    f"{EXPORT} --ratio nan": "--ratio is nan",
    f"{EXPORT} --target-bpw 1": "--target-bpw is 1",
    f"{EXPORT} --ratio 0.01 --target-bpw 3": "--ratio and --target-bpw",
    f"{EXPORT} --target-size huge": "--target-size is 'huge'",
    f"{EXPORT} --target-size 1k": "--target-size 1k cannot be met: with the smallest types it is ",
    f"{EXPORT} --target-size 1G --ratio 0.01": "--ratio and --target-size",
    f"{EXPORT} --target-size 1G --base-type tacq3": "--base-type gives all matrices one width",
    f"{EXPORT} --tensor-type ffn=q2_k": "--tensor-type is 'ffn=q2_k'",
    f"{EXPORT} --tensor-type nothing=f16": "--tensor-type: 'nothing' matches no matrix",
    f"{EXPORT} --hessian x": "--hessian is 'x'",
    f"{EXPORT} --precision x": "--precision is 'x'",
    f"{EXPORT} --refine-sweeps -1": "--refine-sweeps is -1",
    f"{EXPORT} --no-kept --ratio 0.01": "--ratio 0.01 keeps weights and --no-kept keeps none",
    f"{EXPORT} --n-samples 0": "--n-samples is 0",
    f"{EXPORT} --seq-len 1": "--seq-len is 1",
    f"{EXPORT} --damping 0": "--damping is 0",
    f"{EXPORT} --seed -1": "--seed is -1",
    f"{EXPORT} --threads 0": "--threads is 0",
    f"{EXPORT} --device nonsense": "--device 'nonsense' cannot be used here",
    f"{EXPORT} --resume": "There is no unfinished export in out.gguf.work",
    f"{EXPORT} --workdir .": ". exists and is no work folder of tacq-export",
    f"export {EXPORT} --score best": "--score is 'best'",
    EXPORT: "llama.cpp with the TACQ types is not built yet",
    f"{EXPORT} --columns question": "--columns has 'question', expected KEY=COLUMN pairs such as prompt=Q,completion=A",
    f"{EXPORT} --columns prompt=": "--columns has 'prompt=', expected KEY=COLUMN pairs",
    f"{EXPORT} --columns Q=prompt": "--columns has 'Q=prompt', expected KEY=COLUMN pairs",
    f"{EXPORT} --columns text=a,text=b": "--columns names 'text' twice",
    f"{EXPORT} --columns prompt=Q,completion=A": "task.jsonl, line 1: has no column 'Q', which --columns names; it has "
    "question, answer",
    # answer
    "answer model.gguf --task gone.jsonl --outfile own.jsonl": "gone.jsonl cannot be read",
    "answer model.gguf --task task.jsonl --outfile ours.gguf": "ours.gguf exists",
    "answer model.gguf --task task.jsonl --outfile gone/own.jsonl": "There is no folder gone for the output",
    # inspect
    "inspect gone.gguf": "There is no file gone.gguf",
    "inspect folder": "There is no file folder",
    "inspect text.gguf": "text.gguf is not a GGUF file",
    "inspect short.gguf": "short.gguf is not a GGUF file",
    "inspect damaged.gguf": "tensor 'token_embd.weight': sparse section has magic",
    "inspect vocabulary.gguf": "vocabulary.gguf holds no tensors",
    # verify
    "verify gone.gguf": "There is no file gone.gguf",
    "verify damaged.gguf": "tensor 'token_embd.weight': sparse section has magic",
    "verify ours.gguf --against model.gguf": "give --against REF with --task FILE or --text FILE",
    "verify ours.gguf --task task.jsonl": "give --against REF with --task FILE or --text FILE",
    "verify ours.gguf --against model.gguf --text task.jsonl --loss answer": "A plain text has no answers; use --loss "
    "answer with --task FILE.",
    "verify ours.gguf --columns text=a": "--columns is about the task file; give it with --task FILE.",
    "verify ours.gguf": "llama.cpp with the TACQ types is not built yet",
    # compare
    "compare model.gguf --file ours.gguf --task task.jsonl --eval task.jsonl": "llama.cpp with the TACQ types is not "
    "built yet",
    # run
    "run gone.gguf -p hello": "There is no file gone.gguf",
    "run ours.gguf -p hello": "llama.cpp with the TACQ types is not built yet",
    # dequantize
    "dequantize gone.gguf --outfile out.gguf": "There is no file gone.gguf",
    "dequantize ours.gguf --outfile ours.gguf": "ours.gguf exists",
    "dequantize ours.gguf --outfile gone/out.gguf": "There is no folder gone for the output",
    "dequantize ours.gguf --outfile folder --force": "folder",
    "dequantize damaged.gguf --outfile out.gguf": "tensor 'token_embd.weight': sparse section has magic",
    "dequantize short.gguf --outfile out.gguf": "short.gguf is not a GGUF file",
    # runtime
    "runtime path": "run 'tacq-export runtime build --backend cpu'",
    "runtime path --backend vulkan": "There is no 'vulkan' backend in this version",
    "runtime build --backend x": "There is no 'x' backend in this version",
}


@pytest.mark.parametrize("command", ERRORS)
def test_what_cannot_be_done_is_one_line_and_status_1(here, capsys, monkeypatch, command):
    if command in NEED_RUNTIME:
        monkeypatch.delenv("TACQ_EXPORT_CACHE")
    decode_in_c._ggml_base.cache_clear()  # another test may have loaded the library of a build
    before = {p: p.stat().st_mtime_ns for p in here.rglob("*") if p.is_file()}
    assert cli.main(command.split()) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and captured.err.rstrip().endswith(lines[0]), captured.err
    assert ERRORS[command] in lines[0]
    assert captured.out == "" and "Traceback" not in captured.err and "should not" not in captured.err
    assert not (here / "out.gguf").exists() and not list(here.glob("*.partial")) and not list(here.glob(".*.partial"))
    assert all(p.is_file() and p.stat().st_mtime_ns == t for p, t in before.items()), "an input was changed"


def test_a_text_to_compare_on_that_is_no_utf8_is_one_line(here, capsys, monkeypatch):
    monkeypatch.setattr("tacq_export.runtime.decode_in_c.check_decoding", lambda *_: 0)
    for text, message in (("latin1.txt", "latin1.txt is not UTF-8 text"), ("gone.txt", "gone.txt")):
        assert cli.main(["verify", "ours.gguf", "--against", "model.gguf", "--text", text]) == 1
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and "should not" not in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        "",
        "model.gguf",
        "--task task.jsonl",
        f"{EXPORT} --ratio many",
        f"{EXPORT} --nonsense",
        "inspect",
        "dequantize ours.gguf",
        "dequantize ours.gguf --outfile o --outtype q2_k",
        "runtime",
        "runtime clean",
        "run ours.gguf",
    ],
)
def test_wrong_usage_is_status_2_with_a_usage_line(here, capsys, command):
    with pytest.raises(SystemExit) as ended:
        cli.main(command.split())
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: tacq-export") and "error: " in error.splitlines()[-1]


@pytest.mark.parametrize("command", cli_options.COMMANDS)
def test_every_command_explains_itself(capsys, command):
    for argv in ([command, "--help"], [command, "-h"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(argv)
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: tacq-export {command}")


def test_the_help_of_an_export_names_every_option_and_its_true_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = " ".join(capsys.readouterr().out.partition("options:")[2].split())
    for command in cli_options.COMMANDS:
        assert command == "export" or re.search(rf"tacq-export {command} +\w", text), command
    for field in dataclasses.fields(ExportConfig):
        flag = {"tensor_types": "--tensor-type"}.get(
            field.name, "--" + field.name.replace("_", "-")
        )  # given once for each
        assert field.name == "model" or flag in text, field.name
    for flag in (
        "score",
        "reference",
        "loss",
        "hessian",
        "precision",
        "n_samples",
        "seq_len",
        "damping",
        "shrinkage",
        "compensation",
        "seed",
        "device",
    ):
        default = next(f.default for f in dataclasses.fields(ExportConfig) if f.name == flag)
        said = re.search(rf"--{flag.replace('_', '-')} [A-Z]\w* .*?\(default:? ([\w.]+)\)", text)
        assert said and said[1] == str(default), flag


def test_options_left_out_are_those_of_the_configuration(monkeypatch, here):
    seen = []
    monkeypatch.setattr("tacq_export.pipeline.export", lambda config, reporter: seen.append(config))
    assert cli.main(["model.gguf", "--task", "task.jsonl", "--outfile", "o.gguf"]) == 0
    assert seen[0] == ExportConfig(model="model.gguf", task="task.jsonl", outfile="o.gguf")


def test_every_option_reaches_the_configuration(monkeypatch, here):
    seen = []
    monkeypatch.setattr("tacq_export.pipeline.export", lambda config, reporter: seen.append(config))
    options = {
        "score": "fisher",
        "reference": "gptq",
        "target_bpw": 3.5,
        "base_type": "tacq3",
        "token_embedding_type": "f16",
        "output_tensor_type": "q8_0",
        "n_samples": 5,
        "seq_len": 99,
        "damping": 0.5,
        "shrinkage": 1.5,
        "compensation": 0.75,
        "device": "cpu",
        "seed": 7,
        "threads": 2,
        "workdir": "w",
        "hessian": "plain",
        "loss": "answer",
        "precision": "bf16",
        "refine_sweeps": 1,
    }
    argv = [text for key, value in options.items() for text in ("--" + key.replace("_", "-"), str(value))]
    assert (
        cli.main(["export", "model.gguf", "--task", "task.jsonl", "--outfile", "o.gguf", *argv, "--force", "--dry-run"])
        == 0
    )
    assert seen[0] == ExportConfig(
        model="model.gguf", task="task.jsonl", outfile="o.gguf", force=True, dry_run=True, **options
    )


def test_a_size_and_patterns_reach_the_configuration(monkeypatch, here):
    seen = []
    monkeypatch.setattr("tacq_export.pipeline.export", lambda config, reporter: seen.append(config))
    argv = (
        "model.gguf --task task.jsonl --outfile o.gguf --target-size 1.2G --no-kept --tensor-type ffn_down=tacq3 "
        "--tensor-type ffn=q8_0"
    )
    assert cli.main(argv.split()) == 0
    expected = {"target_size": "1.2G", "no_kept": True, "tensor_types": ("ffn_down=tacq3", "ffn=q8_0")}
    assert seen[0] == ExportConfig(model="model.gguf", task="task.jsonl", outfile="o.gguf", **expected)


def test_the_default_output_is_named_after_model_task_and_type(monkeypatch, here):
    seen = []
    monkeypatch.setattr("tacq_export.pipeline.export", lambda config, reporter: seen.append(str(config.outfile)))
    cli.main(["model.gguf", "--task", "task.jsonl"])
    cli.main(["folder/", "--task", "task.jsonl", "--base-type", "tacq3"])
    assert seen == ["model-task-tacq.gguf", "folder-task-tacq3.gguf"]


def test_a_model_called_like_a_command_can_be_exported(monkeypatch, here):
    seen = []
    monkeypatch.setattr("tacq_export.pipeline.export", lambda config, reporter: seen.append(config.model))
    (here / "run").mkdir()
    assert cli.main(["run", "--task", "task.jsonl", "--outfile", "o.gguf"]) == 0
    assert seen == ["run"]


def test_an_export_prints_what_it_wrote(here, capsys, monkeypatch):
    monkeypatch.delenv("TACQ_EXPORT_CACHE")
    assert cli.main([*EXPORT.split(), "--n-samples", "2", "--seq-len", "24"]) == 0
    captured = capsys.readouterr()
    reader = gguf.GGUFReader(here / "out.gguf")
    linear = [t for t in reader.tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    bpw = 8 * sum(int(t.n_bytes) for t in linear) / sum(int(t.n_elements) for t in linear)
    whole = 8 * (here / "out.gguf").stat().st_size / sum(int(t.n_elements) for t in reader.tensors)
    assert captured.out.startswith(
        f"out.gguf: 0.1 MB, {whole:.3f} bits per weight of the file; linear matrices {bpw:.3f} "
    )
    assert len([line for line in captured.err.splitlines() if line.startswith("blk.")]) == 14, "one line a matrix"


def test_inspect_tells_what_gguf_py_tells(here, capsys):
    register_with_gguf()
    assert cli.main(["inspect", "ours.gguf", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    reader = gguf.GGUFReader(here / "ours.gguf")
    assert facts["file_bytes"] == (here / "ours.gguf").stat().st_size and facts["metadata"]["tacq.format_version"] == 2
    for found, tensor in zip(facts["tensors"], reader.tensors, strict=True):
        assert (found["name"], found["bytes"], found["type"]) == (
            tensor.name,
            int(tensor.n_bytes),
            tensor.tensor_type.name,
        )
        assert found["shape"] == tensor.shape.tolist()[::-1]
        if tensor.tensor_type.name == "TACQ2_S16":
            section = tensor.data.reshape(-1)[int(tensor.n_elements) // 64 * 18 :]
            assert found["kept"] == int(section[12:16].view("<u4")[0]) > 0
        else:
            assert found["kept"] == 0
    linear = [t for t in reader.tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    assert facts["bpw_linear"] == pytest.approx(
        8 * sum(int(t.n_bytes) for t in linear) / sum(int(t.n_elements) for t in linear)
    )


def test_the_picture_is_darker_where_more_is_kept(here, capsys):
    assert cli.main(["inspect", "ours.gguf"]) == 0
    out = capsys.readouterr().out
    rows = dict(re.findall(r"^ *(\w+) \|(.+)\| +[\d.]+ % on average$", out, re.MULTILINE))
    assert set(rows) == {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}
    assert all(len(row) == 2 for row in rows.values()) and "@" in "".join(rows.values())


def test_dequantize_writes_a_stock_file(here, capsys):
    assert cli.main(["dequantize", "ours.gguf", "--outfile", "stock.gguf", "--outtype", "f32"]) == 0
    assert capsys.readouterr().out.startswith("stock.gguf: ")
    assert all(
        np.isfinite(t.data).all() and t.tensor_type.name == "F32" for t in gguf.GGUFReader(here / "stock.gguf").tensors
    )
    assert cli.main(["dequantize", "ours.gguf", "--outfile", "stock.gguf", "--force"]) == 0


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; the same command with --resume goes on"),
        (MemoryError(), 1, "error: not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "error: not enough memory"),
        (
            PermissionError(13, "Permission denied", "secret.gguf"),
            1,
            "error: Permission denied: secret.gguf; check the path",
        ),
        (
            ZeroDivisionError("a\n b"),
            1,
            "error: tacq-export failed in a way it should not (ZeroDivisionError: a b); please report it",
        ),
    ],
)
def test_other_ends(monkeypatch, capsys, error, status, message):
    def fail(*_):
        raise error

    monkeypatch.setitem(cli.RUN, "inspect", fail)
    monkeypatch.delenv("TACQ_EXPORT_DEBUG", raising=False)
    assert cli.main(["inspect", "x"]) == status
    assert message in capsys.readouterr().err
    if isinstance(error, ZeroDivisionError):
        monkeypatch.setenv("TACQ_EXPORT_DEBUG", "1")
        with pytest.raises(ZeroDivisionError):
            cli.main(["inspect", "x"])


def python_m(*argv: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tacq_export", *argv], capture_output=True, text=True, timeout=60, **options
    )


def test_as_a_program_errors_go_to_stderr_and_the_status_is_1(here):
    done = python_m("inspect", "gone.gguf")
    assert (done.returncode, done.stdout) == (
        1,
        "",
    ) and done.stderr == "error: There is no file gone.gguf; give the path of a GGUF.\n"
    assert python_m("inspect", "ours.gguf").returncode == 0


def test_a_reader_that_leaves_is_no_error(here):
    """As `| head -1`: the pipe is closed before anything is printed."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "tacq_export", "inspect", "ours.gguf"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(writing)
    assert done.returncode == 0 and done.stderr == ""


def test_help_and_inspect_need_neither_torch_nor_transformers(here):
    for argv in (["--help"], ["inspect", "ours.gguf"], ["runtime", "--help"]):
        script = (
            f"import sys; from tacq_export.cli import main\ntry:\n    main({argv!r})\nexcept SystemExit:\n    pass\n"
        )
        script += "sys.exit(3 if {'torch', 'transformers'} & set(sys.modules) else 0)"
        assert subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL).returncode == 0, argv
