"""Every option that cannot work is refused before anything long begins: the flag, its value and what is expected."""

from __future__ import annotations

import math

import pytest

from tacq_export.config import (
    BASE_TYPES,
    EMBEDDING_TYPES,
    HESSIANS,
    LOSSES,
    PRECISIONS,
    REFERENCES,
    SCORES,
    ExportConfig,
    parse_size,
)
from tacq_export.errors import TacqError


@pytest.fixture
def make(tmp_path):
    (tmp_path / "task.jsonl").write_text('{"text": "a b c"}\n')

    def config(**options) -> ExportConfig:
        return ExportConfig(
            **({"model": "model.gguf", "task": tmp_path / "task.jsonl", "outfile": tmp_path / "out.gguf"} | options)
        )

    return config


def test_the_defaults_are_valid(make):
    make().validate()


@pytest.mark.parametrize(
    "options",
    [
        *({"score": s} for s in SCORES),
        *({"reference": r} for r in REFERENCES),
        *({"base_type": t} for t in BASE_TYPES),
        *({"token_embedding_type": t, "output_tensor_type": t} for t in EMBEDDING_TYPES),
        *({"hessian": h} for h in HESSIANS),
        *({"precision": p} for p in PRECISIONS),
        *({"loss": loss} for loss in LOSSES),
        *({"tensor_types": (f"ffn={t}", f"a=b={t.upper()}")} for t in EMBEDDING_TYPES),
        {"token_embedding_type": None, "output_tensor_type": None},
        {"target_size": 350_000_000},
        {"target_size": "1.2G"},
        {"target_size": "1"},
        {"tensor_types": ("ffn_(down|up)=tacq2_s16", r"^blk\.[0-3]\.=TACQ4_S1")},
        {"no_kept": True},
        {"no_kept": True, "ratio": 0.0},
        {"refine_sweeps": 0},
        {"ratio": 0.01, "base_type": "tacq4"},
        {"target_bpw": 5.0, "no_kept": True, "base_type": "tacq3"},
        {"ratio": 0.0},
        {"ratio": 0.05},
        {"target_bpw": 2.25},
        {"target_bpw": 6.25},
        {"target_bpw": 4.25, "base_type": "tacq4"},
        {"n_samples": 1},
        {"seq_len": 8},
        {"seed": 0},
        {"threads": 1},
        {"damping": 1.0},
        {"damping": 1e-9},
        {"shrinkage": 0.0, "compensation": 1.0},
        {"shrinkage": 100.0, "compensation": 0.0},
    ],
)
def test_values_at_the_edge_are_accepted(make, options):
    make(**options).validate()


BAD = [
    (
        {"score": "best"},
        "--score is 'best', expected one of: obs, tacq, fisher, magnitude, gradient, random, tacq-no-magnitude, "
        "tacq-no-error.",
    ),
    ({"reference": "none"}, "--reference is 'none', expected one of: rtn, gptq."),
    ({"base_type": "q4_0"}, "--base-type is 'q4_0', expected one of: tacq2, tacq3, tacq4."),
    ({"base_type": "TACQ2"}, "--base-type is 'TACQ2', expected one of: tacq2, tacq3, tacq4."),
    ({"token_embedding_type": "q9"}, "--token-embedding-type is 'q9', expected one of: tacq2, "),
    ({"output_tensor_type": ""}, "--output-tensor-type is '', expected one of: tacq2, "),
    (
        {"ratio": 0.01, "target_bpw": 2.5},
        "--ratio and --target-bpw both say how large the file is to be; give one of them.",
    ),
    (
        {"ratio": 0.01, "target_size": "1G"},
        "--ratio and --target-size both say how large the file is to be; give one of them.",
    ),
    (
        {"target_bpw": 2.5, "target_size": "1G"},
        "--target-bpw and --target-size both say how large the file is to be; give one of them.",
    ),
    (
        {"base_type": "tacq3", "target_size": "1G"},
        "--base-type gives all matrices one width, and --target-size chooses a width for each; give one of them.",
    ),
    ({"no_kept": True, "ratio": 0.01}, "--ratio 0.01 keeps weights and --no-kept keeps none; give one of them."),
    ({"hessian": "none"}, "--hessian is 'none', expected one of: gradient, plain."),
    ({"precision": "f16"}, "--precision is 'f16', expected one of: f32, bf16."),
    ({"loss": "all"}, "--loss is 'all', expected one of: text, answer."),
    ({"token_embedding_type": "tacq2_s4"}, "--token-embedding-type is 'tacq2_s4', expected one of: tacq2, "),
    *(
        (
            {"target_size": size},
            f"--target-size is '{size}', expected a size such as 350M, 1.2G, 512MiB or a number of bytes.",
        )
        for size in ("", "big", "-5", "0", "1T", "1.5.2M", "nan", "inf", "5 M B", "1e9", "0.5", 1e30, "9999999G")
    ),
    *(
        (
            {"tensor_types": ("ffn=f16", entry)},
            f"--tensor-type is '{entry}', expected REGEX=TYPE with one of the types tacq2, ",
        )
        for entry in ("ffn", "=tacq2", "ffn=", "ffn=q2_k", "ffn=tacq5", "ffn=tacq2_s5")
    ),
    ({"tensor_types": ("ffn(=tacq2",)}, "--tensor-type is 'ffn(=tacq2', and 'ffn(' is no regular expression ("),
    ({"refine_sweeps": -1}, "--refine-sweeps is -1, expected at least 0."),
    ({"ratio": -0.01}, "--ratio is -0.01, expected 0 to 0.05"),
    ({"ratio": 0.06}, "--ratio is 0.06, expected 0 to 0.05"),
    ({"ratio": math.nan}, "--ratio is nan, expected 0 to 0.05"),
    ({"target_bpw": 2.2}, "--target-bpw is 2.2, expected 2.25 to 6.25: tacq2 alone takes 2.25 bits per weight."),
    (
        {"target_bpw": 3.0, "base_type": "tacq3"},
        "--target-bpw is 3, expected 3.25 to 6.25: tacq3 alone takes 3.25 bits per weight.",
    ),
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
    *(
        ({name: value}, f"--{name} is {value:g}, expected from 0 to {most}.")
        for name, most in (("shrinkage", 100), ("compensation", 1))
        for value in (-0.1, 101, math.nan)
    ),
]


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("350M", 350_000_000),
        ("350mb", 350_000_000),
        ("1.2G", 1_200_000_000),
        ("1.2 GiB", 1_288_490_188),
        ("512MiB", 536_870_912),
        ("3k", 3000),
        ("3KiB", 3072),
        ("48500000", 48_500_000),
        (48_500_000, 48_500_000),
        (" 7 ", 7),
        ("0.1M", 100_000),
        ("1.9999k", 1999),
    ],
)
def test_sizes_in_thousands_and_in_powers_of_two_rounded_down(text, n_bytes):
    assert parse_size(text) == n_bytes


def test_what_decides_the_types(make):
    """allocates: each tensor its own; bpw_limit: of the linear matrices, None where something else decides."""
    cases = [
        ({}, True, 2.45),
        ({"target_bpw": 3.0}, True, 3.0),
        ({"target_size": "1G"}, True, None),
        ({"ratio": 0.01}, False, None),
        ({"ratio": 0.01, "base_type": "tacq3"}, False, None),
        ({"base_type": "tacq2"}, False, 2.45),
        ({"base_type": "tacq3"}, False, 3.45),
        ({"base_type": "tacq3", "target_bpw": 4.0}, False, 4.0),
        ({"base_type": "tacq4", "no_kept": True}, False, 4.25),
        ({"no_kept": True}, True, 2.45),
    ]
    for options, allocates, limit in cases:
        config = make(**options)
        config.validate()
        assert config.allocates == allocates and config.bpw_limit == (
            None if limit is None else pytest.approx(limit)
        ), options


def test_patterns_are_split_at_the_last_equals_sign(make):
    found = make(tensor_types=("a=b=TACQ3_S2", "ffn=Q8_0")).fixed_types()
    assert [(pattern.pattern, kind) for pattern, kind in found] == [("a=b", "tacq3_s2"), ("ffn", "q8_0")]


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
    assert (
        message_of(make(task=tmp_path / "gone.jsonl"))
        == f"There is no task file {tmp_path}/gone.jsonl; give a JSONL or text file of examples with --task."
    )
    assert message_of(make(task=tmp_path)).startswith(f"There is no task file {tmp_path};")
    (tmp_path / "folder.gguf").mkdir()
    assert (
        message_of(make(outfile=tmp_path / "folder.gguf"))
        == f"{tmp_path}/folder.gguf is a folder; give --outfile the name of a file."
    )
    assert message_of(make(outfile=tmp_path / "no" / "out.gguf")).startswith(
        f"There is no folder {tmp_path}/no for the output;"
    )
    (tmp_path / "there.gguf").write_text("precious")
    assert (
        message_of(make(outfile=tmp_path / "there.gguf"))
        == f"{tmp_path}/there.gguf exists; give another --outfile, or --force to replace it."
    )
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
    assert make(model=tmp_path / "m.gguf").model == str(tmp_path / "m.gguf"), (
        "names, sizes and dates go into a JSON file"
    )
    assert config.workdir == tmp_path / "x.gguf.work" and not config.keeps_workdir
    assert make(workdir=str(tmp_path / "w")).keeps_workdir


def test_the_fingerprint_has_what_decides_the_result_and_nothing_else(make, tmp_path):
    base = make().fingerprint()
    same = make(
        outfile=tmp_path / "other.gguf", workdir=tmp_path / "w", resume=True, force=True, dry_run=True, threads=3
    )
    assert same.fingerprint() == base
    for options in (
        {"model": "other"},
        {"task": tmp_path / "b"},
        {"score": "fisher"},
        {"reference": "gptq"},
        {"ratio": 0.001},
        {"target_bpw": 3.0},
        {"base_type": "tacq3"},
        {"token_embedding_type": "f16"},
        {"output_tensor_type": "f16"},
        {"n_samples": 5},
        {"seq_len": 9},
        {"damping": 0.02},
        {"shrinkage": 0.2},
        {"compensation": 1.0},
        {"device": "cpu"},
        {"seed": 1},
        {"target_size": "1G"},
        {"tensor_types": ("a=f16",)},
        {"hessian": "plain"},
        {"precision": "bf16"},
        {"loss": "answer"},
        {"refine_sweeps": 1},
        {"no_kept": True},
    ):
        assert make(**options).fingerprint() != base, options


def test_the_calibrations_fingerprint_has_what_decides_gradients_and_hessians_and_nothing_else(make, tmp_path):
    base = make().calibration_fingerprint()
    for options in (
        {"outfile": tmp_path / "b.gguf"},
        {"workdir": tmp_path / "w"},
        {"force": True},
        {"threads": 2},
        {"target_bpw": 3.0},
        {"target_size": "1G"},
        {"ratio": 0.01},
        {"base_type": "tacq3"},
        {"tensor_types": ("a=f16",)},
        {"token_embedding_type": "f16"},
        {"output_tensor_type": "f16"},
        {"refine_sweeps": 0},
        {"damping": 0.5},
        {"shrinkage": 0.5},
        {"compensation": 1.0},
        {"seed": 1},
        {"reference": "gptq"},
        {"no_kept": True},
        {"score": "magnitude"},
        {"score": "tacq-no-error"},
        {"score": "fisher"},
    ):
        assert make(**options).calibration_fingerprint() == base, options
    for options in (
        {"model": "other"},
        {"n_samples": 5},
        {"seq_len": 9},
        {"hessian": "plain"},
        {"precision": "bf16"},
        {"loss": "answer"},
        {"device": "cpu"},
    ):
        assert make(**options).calibration_fingerprint() != base, options
