"""Exports that are interrupted, resumed and repeated: the same bytes, and never half a file where the output
belongs."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch

import tacq_export.calibration.calibrate
import tacq_export.calibration.predict_loss
import tacq_export.calibration.score_weights
import tacq_export.pipeline
import tacq_export.quantization.quantize_model
import tacq_export.workdir
from tacq_export.config import ExportConfig
from tacq_export.errors import TacqError
from tacq_export.format.gguf_file import open_gguf
from tacq_export.format.tensor_types import TYPES_BY_NAME
from tacq_export.pipeline import export
from tacq_export.planning.select_weights import TensorSelection
from tacq_export.workdir import WorkDir

N_MATRICES = 15  # 7 in each of 2 blocks, and the head


def tiny_export(model, task, outfile, **options) -> ExportConfig:
    defaults = {
        "model": str(model),
        "task": task,
        "outfile": outfile,
        "ratio": 0.02,
        "n_samples": 3,
        "seq_len": 32,
        "device": "cpu",
    }
    return ExportConfig(**(defaults | options))


@pytest.fixture
def config(tiny_gguf, tiny_task, tmp_path):
    return lambda name="out.gguf", **options: tiny_export(tiny_gguf, tiny_task, tmp_path / name, **options)


@pytest.fixture(scope="module")
def uninterrupted(tiny_gguf, tiny_task, tmp_path_factory) -> bytes:
    outfile = tmp_path_factory.mktemp("uninterrupted") / "plain.gguf"
    export(tiny_export(tiny_gguf, tiny_task, outfile))
    return outfile.read_bytes()


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def raise_at(monkeypatch, owner, name: str, at: int, error: BaseException) -> list[int]:
    """Let the `at`-th call (from 1) of a function raise; returns a list that grows by one a call."""
    original, calls = getattr(owner, name), []

    def watched(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, watched)
    return calls


def test_two_runs_give_the_same_bytes(config, uninterrupted, tmp_path):
    export(config("second.gguf"))
    assert (tmp_path / "second.gguf").read_bytes() == uninterrupted
    assert names(tmp_path) == {"second.gguf"}, "the work folder is removed"


def test_the_random_score_is_decided_by_its_seed(config, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        export(config(f"{name}.gguf", score="random", seed=seed))
    a, b, c = ((tmp_path / f"{name}.gguf").read_bytes() for name in "abc")
    assert a == b and a != c


@pytest.mark.parametrize("at", [1, 6, N_MATRICES])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), TacqError("x")])
def test_an_export_interrupted_in_quantization_resumes_to_the_same_bytes(
    config, uninterrupted, tmp_path, monkeypatch, at, error
):
    with monkeypatch.context() as patch:
        raise_at(patch, tacq_export.quantization.quantize_rows, "quantize_gptq", at, error)
        with pytest.raises(type(error)):
            export(config())
    assert names(tmp_path) == {"out.gguf.work"}
    assert len(list((tmp_path / "out.gguf.work" / "tensors").glob("*.json"))) == at - 1
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob(".*"))
    calls = raise_at(monkeypatch, tacq_export.quantization.quantize_rows, "quantize_gptq", 0, error)
    scored = raise_at(monkeypatch, tacq_export.calibration.calibrate, "accumulate_gradients", 0, error)
    export(config(resume=True))
    assert len(calls) == N_MATRICES - (at - 1), "finished tensors are quantized again, or some are left out"
    assert not scored, "the selection is made again"
    assert (tmp_path / "out.gguf").read_bytes() == uninterrupted
    assert names(tmp_path) == {"out.gguf"}


def test_an_export_interrupted_while_it_scores_resumes_to_the_same_bytes(config, uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        raise_at(patch, tacq_export.calibration.score_weights, "saliency", 7, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            export(config())
    export(config(resume=True))
    assert (tmp_path / "out.gguf").read_bytes() == uninterrupted


@pytest.mark.parametrize("step", ["accumulate_gradients", "group_by_input", "second_moment", "predict_losses"])
def test_an_export_interrupted_while_it_calibrates_resumes_to_the_same_bytes(
    config, uninterrupted, tmp_path, monkeypatch, step
):
    """At the second of nine Hessians or the second matrix's losses, or in what is done once."""
    with monkeypatch.context() as patch:
        raise_at(
            patch,
            tacq_export.calibration.calibrate,
            step,
            2 if step in ("second_moment", "predict_losses") else 1,
            KeyboardInterrupt(),
        )
        with pytest.raises(KeyboardInterrupt):
            export(config())
    gradients = raise_at(monkeypatch, tacq_export.calibration.calibrate, "accumulate_gradients", 0, KeyboardInterrupt())
    export(config(resume=True))
    assert len(gradients) == (step in ("group_by_input", "accumulate_gradients"))
    assert (tmp_path / "out.gguf").read_bytes() == uninterrupted


def test_an_allocated_export_resumes_to_the_same_bytes(config, tmp_path, monkeypatch):
    export(config("whole.gguf", ratio=None, target_bpw=3.0))
    with monkeypatch.context() as patch:
        raise_at(patch, tacq_export.quantization.quantize_rows, "quantize_gptq", 5, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            export(config(ratio=None, target_bpw=3.0))
    planned = raise_at(monkeypatch, tacq_export.pipeline, "plan_types", 0, KeyboardInterrupt())
    export(config(ratio=None, target_bpw=3.0, resume=True))
    assert not planned and (tmp_path / "out.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def calibrated_again(monkeypatch) -> dict[str, list]:
    return {
        step: raise_at(monkeypatch, tacq_export.calibration.calibrate, step, 0, KeyboardInterrupt())
        for step in ("accumulate_gradients", "second_moment", "predict_losses")
    }


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.01},
        {"ratio": None, "target_bpw": 3.0},
        {"ratio": None, "target_size": 80_000},
        {"base_type": "tacq3"},
        {"seed": 1, "score": "random"},
        {"refine_sweeps": 0, "damping": 0.05, "shrinkage": 0.0, "compensation": 1.0},
        {"token_embedding_type": "f16", "output_tensor_type": "q8_0"},
        {"tensor_types": ("ffn_down=tacq4",)},
        {"score": "tacq", "reference": "gptq"},
        {"score": "fisher"},
    ],
    ids=str,
)
def test_a_named_work_folder_calibrates_once_for_exports_that_share_it(config, tmp_path, monkeypatch, options):
    """The second file is the very one that an export of its own would have given."""
    export(config("first.gguf", workdir=tmp_path / "w"))
    export(config("alone.gguf", **options))
    calls = calibrated_again(monkeypatch)
    export(config("second.gguf", workdir=tmp_path / "w", **options))
    assert not calls["second_moment"] and not calls["predict_losses"]
    assert len(calls["accumulate_gradients"]) == (options.get("score") in ("tacq", "fisher")), (
        "gradients of weights, once a score is made of them"
    )
    assert (
        (tmp_path / "second.gguf").read_bytes()
        == (tmp_path / "alone.gguf").read_bytes()
        != (tmp_path / "first.gguf").read_bytes()
    )


@pytest.mark.parametrize(
    "options",
    [
        {"n_samples": 2},
        {"seq_len": 16},
        {"hessian": "plain"},
        {"precision": "bf16"},
        {"loss": "answer"},
        {"device": "auto"},
    ],
    ids=str,
)
def test_a_named_work_folder_calibrates_anew_for_exports_that_do_not(config, tmp_path, monkeypatch, options):
    export(config("first.gguf", workdir=tmp_path / "w"))
    export(config("alone.gguf", **options))
    calls = calibrated_again(monkeypatch)
    export(config("second.gguf", workdir=tmp_path / "w", **options))
    assert all(calls.values())
    assert (tmp_path / "second.gguf").read_bytes() == (tmp_path / "alone.gguf").read_bytes()


def test_a_named_work_folder_calibrates_anew_for_another_task_or_model(
    config, tiny_gguf, tiny_task, tmp_path, monkeypatch
):
    export(config("first.gguf", workdir=tmp_path / "w"))
    calls = calibrated_again(monkeypatch)
    (tmp_path / "other.jsonl").write_text(tiny_task.read_text().replace("apples", "shells"))
    export(tiny_export(tiny_gguf, tmp_path / "other.jsonl", tmp_path / "task.gguf", workdir=tmp_path / "w"))
    assert len(calls["accumulate_gradients"]) == 1
    shutil.copy(tiny_gguf, tmp_path / "model.gguf")
    export(
        tiny_export(
            tmp_path / "model.gguf", tmp_path / "other.jsonl", tmp_path / "model-out.gguf", workdir=tmp_path / "w"
        )
    )
    assert len(calls["accumulate_gradients"]) == 2


@pytest.mark.parametrize("content", ["", "{", "null"])
def test_a_calibration_of_unknown_origin_is_made_again(config, uninterrupted, tmp_path, monkeypatch, content):
    export(config("first.gguf", workdir=tmp_path / "w"))
    (tmp_path / "w" / "calibration.json").write_text(content)
    calls = calibrated_again(monkeypatch)
    export(config("second.gguf", workdir=tmp_path / "w"))
    assert all(calls.values()) and (tmp_path / "second.gguf").read_bytes() == uninterrupted


def test_a_calibration_by_older_formulas_is_made_again_and_not_resumed(config, tmp_path, monkeypatch):
    export(config("first.gguf", workdir=tmp_path / "w"))
    monkeypatch.setattr(
        tacq_export.workdir, "CALIBRATION_VERSION", tacq_export.calibration.calibrate.CALIBRATION_VERSION + 1
    )
    with pytest.raises(TacqError, match="another version of this program"):
        export(config("first.gguf", workdir=tmp_path / "w", resume=True, force=True))
    calls = calibrated_again(monkeypatch)
    export(config("second.gguf", workdir=tmp_path / "w"))
    assert all(calls.values())


def test_an_export_that_fails_while_it_writes_leaves_no_output_and_resumes(
    config, uninterrupted, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        # 14 matrices are read back while the model goes on with them; the fifth time after that is in the middle of the
        # file.
        raise_at(patch, WorkDir, "load_tensor", 14 + 5, OSError(28, "No space left on device"))
        with pytest.raises(TacqError, match=r"Could not write .*out.gguf \(No space left on device\)"):
            export(config())
    assert names(tmp_path) == {"out.gguf.work"}
    calls = raise_at(monkeypatch, tacq_export.quantization.quantize_rows, "quantize_gptq", 0, KeyboardInterrupt())
    export(config(resume=True))
    assert not calls and (tmp_path / "out.gguf").read_bytes() == uninterrupted


def test_a_tensor_whose_facts_are_missing_is_made_again(config, uninterrupted, tmp_path, monkeypatch):
    """The bytes come first, the facts last: power may fail in between, or in the middle of the bytes."""
    with monkeypatch.context() as patch:
        raise_at(patch, tacq_export.quantization.quantize_rows, "quantize_gptq", 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            export(config())
    tensors = tmp_path / "out.gguf.work" / "tensors"
    victim = sorted(tensors.glob("*.json"))[0]
    victim.unlink()
    victim.with_suffix(".bin").write_bytes(b"half")
    export(config(resume=True))
    assert (tmp_path / "out.gguf").read_bytes() == uninterrupted


@pytest.fixture
def unfinished(config, tmp_path, monkeypatch):
    """A work folder with three finished tensors."""
    with monkeypatch.context() as patch:
        raise_at(patch, tacq_export.quantization.quantize_rows, "quantize_gptq", 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            export(config())
    return tmp_path / "out.gguf.work"


def snapshot(folder) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "fisher"}, "score: then obs, now fisher"),
        ({"ratio": 0.01}, "ratio: then 0.02, now 0.01"),
        ({"seed": 1}, "seed: then 0, now 1"),
        ({"n_samples": 2}, "n_samples: then 3, now 2"),
        ({"seq_len": 16}, "seq_len: then 32, now 16"),
        ({"base_type": "tacq3"}, "base_type: then None, now tacq3"),
        ({"damping": 0.02}, "damping: then 0.01, now 0.02"),
        ({"shrinkage": 0.3}, "shrinkage: then 0.5, now 0.3"),
        ({"compensation": 1.0}, "compensation: then 0.5, now 1.0"),
        ({"reference": "gptq"}, "reference: then rtn, now gptq"),
        ({"ratio": None, "target_size": "1G"}, "ratio: then 0.02, now None"),
        ({"hessian": "plain"}, "hessian: then gradient, now plain"),
        ({"precision": "bf16"}, "precision: then f32, now bf16"),
        ({"tensor_types": ("ffn=f16",)}, "tensor_types: then (), now ('ffn=f16',)"),
        ({"token_embedding_type": "f16"}, "token_embedding_type: then None, now f16"),
    ],
)
def test_resume_refuses_other_options_by_name_and_keeps_the_work(config, unfinished, options, message):
    before = snapshot(unfinished)
    with pytest.raises(TacqError) as error:
        export(config(resume=True, **options))
    assert f"The unfinished export in {unfinished} is another one ({message}); run without --resume." == str(
        error.value
    )
    assert snapshot(unfinished) == before


def test_resume_refuses_a_changed_task_and_a_changed_model(config, unfinished, tiny_task, tiny_gguf, tmp_path):
    with open(tiny_task) as f:
        original = f.read()
    try:
        tiny_task.write_text(original + '{"question": "q", "answer": "a"}\n')
        with pytest.raises(
            TacqError, match=r"is another one \(the files of the task have changed\); run without --resume."
        ):
            export(config(resume=True))
    finally:
        tiny_task.write_text(original)
    stat = tiny_gguf.stat()
    try:
        os.utime(tiny_gguf, (stat.st_atime, stat.st_mtime + 100))
        with pytest.raises(
            TacqError, match=r"is another one \(the files of the model have changed\); run without --resume."
        ):
            export(config(resume=True))
    finally:
        os.utime(tiny_gguf, (stat.st_atime, stat.st_mtime))


def test_resume_without_unfinished_work_is_refused(config, tmp_path):
    with pytest.raises(TacqError, match="There is no unfinished export in .*out.gguf.work; run without --resume."):
        export(config(resume=True))
    assert names(tmp_path) == set()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"x"', '{"options": 5}', '{"options": {}}'])
def test_a_damaged_state_is_one_sentence(config, unfinished, content):
    (unfinished / "state.json").write_text(content)
    with pytest.raises(TacqError, match="The unfinished export in .* is another one .*; run without --resume."):
        export(config(resume=True))


def test_without_resume_unfinished_work_is_replaced(config, unfinished, uninterrupted, tmp_path):
    (unfinished / "tensors" / "blk.0.attn_q.weight.bin").write_bytes(b"stale")
    export(config())
    assert (tmp_path / "out.gguf").read_bytes() == uninterrupted


def test_a_folder_of_someone_else_is_left_alone(config, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_text("precious")
    with pytest.raises(
        TacqError, match="photos exists and is no work folder of tacq-export; give another with --workdir."
    ):
        export(config(workdir=tmp_path / "photos"))
    (tmp_path / "file").write_text("precious")
    with pytest.raises(TacqError, match="file exists and is no work folder of tacq-export"):
        export(config(workdir=tmp_path / "file"))
    assert (tmp_path / "photos" / "me.jpg").read_text() == (tmp_path / "file").read_text() == "precious"


def test_a_named_work_folder_stays_and_an_empty_one_may_be_given(config, tmp_path):
    (tmp_path / "w").mkdir()
    export(config(workdir=tmp_path / "w"))
    assert {"state.json", "selection.pt", "tensors"} <= names(tmp_path / "w") and (tmp_path / "out.gguf").is_file()


def test_a_work_folder_that_cannot_be_made_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        TacqError, match=r"The work folder .*/file/w cannot be made \(Not a directory\); give another with --workdir."
    ):
        export(config(workdir=tmp_path / "file" / "w"))


def test_a_dry_run_writes_nothing(config, tmp_path):
    assert export(config(dry_run=True)) is None
    assert names(tmp_path) == set()


@pytest.mark.parametrize("resume", [False, True])
def test_a_dry_run_leaves_unfinished_work_alone(config, unfinished, tmp_path, resume):
    before = snapshot(unfinished)
    assert export(config(dry_run=True, resume=resume)) is None
    assert snapshot(unfinished) == before and names(tmp_path) == {"out.gguf.work"}


def test_force_replaces_an_output_only_at_the_end(config, uninterrupted, tmp_path, monkeypatch):
    (tmp_path / "out.gguf").write_text("earlier")
    with pytest.raises(TacqError, match="exists; give another --outfile, or --force"):
        export(config())
    with monkeypatch.context() as patch:
        raise_at(patch, tacq_export.quantization.quantize_rows, "quantize_gptq", 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            export(config(force=True))
    assert (tmp_path / "out.gguf").read_text() == "earlier"
    export(config(force=True, resume=True))
    assert (tmp_path / "out.gguf").read_bytes() == uninterrupted


def test_what_is_saved_is_loaded(config, tmp_path):
    work = WorkDir.open(config())
    assert work.load_selection() is None and not work.has_tensor("a")
    selection = {
        "a": TensorSelection(TYPES_BY_NAME["TACQ2_S4"], torch.tensor([1, 5, 2**31 - 2]), 2),
        "b": TensorSelection(TYPES_BY_NAME["TACQ2"], torch.empty(0, dtype=torch.int64), 0),
        "c": TensorSelection(TYPES_BY_NAME["TACQ3_S16"], torch.tensor([0, 2**33]), 1),
    }
    work.save_selection(selection)
    loaded = work.load_selection()
    assert {n: (s.type, s.kept.tolist(), s.selected, s.kept.dtype) for n, s in loaded.items()} == {
        n: (s.type, s.kept.tolist(), s.selected, torch.int64) for n, s in selection.items()
    }
    data = np.arange(100, dtype=np.uint8)
    work.save_tensor("a", data, {"type": "TACQ2_S4", "error": 0.5})
    assert (
        work.has_tensor("a")
        and np.array_equal(work.load_tensor("a"), data)
        and work.load_facts("a") == {"type": "TACQ2_S4", "error": 0.5}
    )
    assert json.loads((work.path / "state.json").read_text())["options"]["ratio"] == "0.02"
    shutil.rmtree(work.path)


def test_scores_and_references_decide_which_weights_are_kept(config, tmp_path):
    files = {}
    for score, reference in (("tacq", "rtn"), ("tacq", "gptq"), ("fisher", "rtn"), ("magnitude", "rtn")):
        result = export(config(f"{score}-{reference}.gguf", score=score, reference=reference))
        assert open_gguf(result.outfile).fields["tacq.score"].contents() == score and result.kept >= result.selected > 0
        files[score, reference] = b"".join(t.data.tobytes() for t in open_gguf(result.outfile).tensors)
    assert len(set(files.values())) == 4
