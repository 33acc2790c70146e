"""Every option that cannot work is refused before anything long begins: the flag, its value and what is expected."""

from __future__ import annotations

import math

import pytest

from tacq_export.config import BASE_TYPES, EMBEDDING_TYPES, REFERENCES, SCORES, ExportConfig
from tacq_export.errors import TacqError


@pytest.fixture
def make(tmp_path):
    (tmp_path / "task.jsonl").write_text('{"text": "a b c"}\n')

    def config(**options) -> ExportConfig:
        return ExportConfig(**({"model": "model.gguf", "task": tmp_path / "task.jsonl", "outfile": tmp_path / "out.gguf"} | options))

    return config


def test_the_defaults_are_valid(make):
    make().validate()


@pytest.mark.parametrize(
    "options",
    [
        *({"score": s} for s in SCORES), *({"reference": r} for r in REFERENCES), *({"base_type": t} for t in BASE_TYPES),
        *({"token_embedding_type": t, "output_tensor_type": t} for t in EMBEDDING_TYPES),
        {"ratio": 0.0}, {"ratio": 0.05}, {"target_bpw": 2.25}, {"target_bpw": 6.25}, {"target_bpw": 4.25, "base_type": "tacq4"},
        {"n_samples": 1}, {"seq_len": 8}, {"seed": 0}, {"threads": 1}, {"damping": 1.0}, {"damping": 1e-9},
    ],
)  # fmt: skip
def test_values_at_the_edge_are_accepted(make, options):
    make(**options).validate()


BAD = [
    ({"score": "best"}, "--score is 'best', expected one of: tacq, fisher, magnitude, gradient, random, tacq-no-magnitude, tacq-no-error."),
    ({"reference": "none"}, "--reference is 'none', expected one of: rtn, gptq."),
    ({"base_type": "q4_0"}, "--base-type is 'q4_0', expected one of: tacq2, tacq3, tacq4."),
    ({"base_type": "TACQ2"}, "--base-type is 'TACQ2', expected one of: tacq2, tacq3, tacq4."),
    ({"token_embedding_type": "q9"}, "--token-embedding-type is 'q9', expected one of: tacq2, "),
    ({"output_tensor_type": ""}, "--output-tensor-type is '', expected one of: tacq2, "),
    ({"ratio": 0.01, "target_bpw": 2.5}, "--ratio and --target-bpw both say how large the file is to be; give one of them."),
    ({"ratio": -0.01}, "--ratio is -0.01, expected 0 to 0.05"),
    ({"ratio": 0.06}, "--ratio is 0.06, expected 0 to 0.05"),
    ({"ratio": math.nan}, "--ratio is nan, expected 0 to 0.05"),
    ({"target_bpw": 2.2}, "--target-bpw is 2.2, expected 2.25 to 6.25: tacq2 alone takes 2.25 bits per weight."),
    ({"target_bpw": 3.0, "base_type": "tacq3"}, "--target-bpw is 3, expected 3.25 to 6.25: tacq3 alone takes 3.25 bits per weight."),
    ({"target_bpw": 16.0}, "--target-bpw is 16, expected 2.25 to 6.25"),
    ({"target_bpw": math.nan}, "--target-bpw is nan, expected 2.25 to 6.25"),
    ({"target_bpw": math.inf}, "--target-bpw is inf, expected 2.25 to 6.25"),
    ({"n_samples": 0}, "--n-samples is 0, expected at least 1."),
    ({"seq_len": 7}, "--seq-len is 7, expected at least 8."),
    ({"seed": -1}, "--seed is -1, expected at least 0."),
    ({"threads": 0}, "--threads is 0, expected at least 1."),
    ({"damping": 0.0}, "--damping is 0, expected more than 0 and at most 1."),
    ({"damping": 1.5}, "--damping is 1.5, expected more than 0 and at most 1."),
    ({"damping": math.nan}, "--damping is nan, expected more than 0 and at most 1."),
]


def message_of(config: ExportConfig) -> str:
    with pytest.raises(TacqError) as error:
        config.validate()
    message = str(error.value)
    assert "\n" not in message and message.endswith("."), "one sentence"
    return message


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_a_value_that_cannot_work_is_named(make, options, message):
    assert message_of(make(**options)).startswith(message)


def test_paths_that_cannot_work_are_named(make, tmp_path, monkeypatch):
    assert message_of(make(task=tmp_path / "gone.jsonl")) == f"There is no task file {tmp_path}/gone.jsonl; give a JSONL or text file of examples with --task."
    assert message_of(make(task=tmp_path)).startswith(f"There is no task file {tmp_path};")
    (tmp_path / "folder.gguf").mkdir()
    assert message_of(make(outfile=tmp_path / "folder.gguf")) == f"{tmp_path}/folder.gguf is a folder; give --outfile the name of a file."
    assert message_of(make(outfile=tmp_path / "no" / "out.gguf")).startswith(f"There is no folder {tmp_path}/no for the output;")
    (tmp_path / "there.gguf").write_text("precious")
    assert message_of(make(outfile=tmp_path / "there.gguf")) == f"{tmp_path}/there.gguf exists; give another --outfile, or --force to replace it."
    make(outfile=tmp_path / "there.gguf", force=True).validate()
    (tmp_path / "link.gguf").symlink_to(tmp_path / "there.gguf")
    for model in ("there.gguf", "link.gguf"):
        config = make(outfile=tmp_path / "there.gguf", model=str(tmp_path / model), force=True)
        assert message_of(config) == f"{tmp_path}/there.gguf is the model itself; give another --outfile."
    monkeypatch.setattr("os.access", lambda *_: False)  # tests may run as root, who may write anywhere
    assert message_of(make()) == f"The folder {tmp_path} is not writable; give another --outfile."


@pytest.mark.parametrize("outfile", [".", "", "/"])
def test_an_outfile_without_a_name_is_named(make, outfile):
    assert "is a folder; give --outfile the name of a file." in message_of(make(outfile=outfile))


def test_strings_become_paths_and_the_work_folder_lies_beside_the_output(make, tmp_path):
    config = make(task=str(tmp_path / "task.jsonl"), outfile=str(tmp_path / "x.gguf"))
    assert (config.task, config.outfile) == (tmp_path / "task.jsonl", tmp_path / "x.gguf")
    assert make(model=tmp_path / "m.gguf").model == str(tmp_path / "m.gguf"), "names, sizes and dates go into a JSON file"
    assert config.workdir == tmp_path / "x.gguf.work" and not config.keeps_workdir
    assert make(workdir=str(tmp_path / "w")).keeps_workdir


def test_the_fingerprint_has_what_decides_the_result_and_nothing_else(make, tmp_path):
    base = make().fingerprint()
    same = make(outfile=tmp_path / "other.gguf", workdir=tmp_path / "w", resume=True, force=True, dry_run=True, threads=3)
    assert same.fingerprint() == base
    for options in (
        {"model": "other"}, {"task": tmp_path / "b"}, {"score": "fisher"}, {"reference": "gptq"}, {"ratio": 0.001}, {"target_bpw": 3.0},
        {"base_type": "tacq3"}, {"token_embedding_type": "f16"}, {"output_tensor_type": "f16"}, {"n_samples": 5}, {"seq_len": 9},
        {"damping": 0.02}, {"device": "cpu"}, {"seed": 1},
    ):  # fmt: skip
        assert make(**options).fingerprint() != base, options
