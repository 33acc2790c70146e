"""The tokens that are calibrated on are part of what a work folder is of: with others it calibrates again."""

from __future__ import annotations

import json

import pytest
from tiny_hf import Listener

import tacq_export.calibration.calibrate
import tacq_export.quantization.quantize_rows
from tacq_export.config import ExportConfig
from tacq_export.errors import TacqError
from tacq_export.inputs import chat_template
from tacq_export.pipeline import export
from tacq_export.workdir import WorkDir

SQL = '{"db_id": "shop", "question": "Which?", "query": "SELECT name FROM pet"}\n'


@pytest.fixture
def task(tmp_path):
    (tmp_path / "schemas.json").write_text(json.dumps({"shop": "CREATE TABLE pet (name TEXT)"}))
    (tmp_path / "sql.jsonl").write_text(SQL * 3)
    return tmp_path / "sql.jsonl"


@pytest.fixture
def config(tiny_gguf, task, tmp_path):
    def make(name: str = "out.gguf", **options) -> ExportConfig:
        defaults = {"ratio": 0.02, "n_samples": 2, "seq_len": 64, "device": "cpu", "refine_sweeps": 0}
        return ExportConfig(str(tiny_gguf), task, tmp_path / name, **(defaults | options))

    return make


def counted(monkeypatch, owner, name: str, raise_at: int = 0) -> list[int]:
    original, calls = getattr(owner, name), []

    def watched(*args, **kwargs):
        calls.append(1)
        if len(calls) == raise_at:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, watched)
    return calls


def test_schemas_beside_the_task_that_change_calibrate_again(config, task, tmp_path, monkeypatch):
    """The task file is the same, byte for byte."""
    calls = counted(monkeypatch, tacq_export.calibration.calibrate, "accumulate_gradients")
    export(config("first.gguf", workdir=tmp_path / "w"))
    export(config("again.gguf", workdir=tmp_path / "w"))
    assert len(calls) == 1 and (tmp_path / "again.gguf").read_bytes() == (tmp_path / "first.gguf").read_bytes()
    (tmp_path / "schemas.json").write_text(json.dumps({"shop": "CREATE TABLE pet (name TEXT, weight REAL)"}))
    export(config("second.gguf", workdir=tmp_path / "w"))
    assert len(calls) == 2, "yesterday's calibration under today's tokens"
    export(config("alone.gguf"))
    assert (tmp_path / "second.gguf").read_bytes() == (tmp_path / "alone.gguf").read_bytes()
    assert (tmp_path / "second.gguf").read_bytes() != (tmp_path / "first.gguf").read_bytes()


def test_other_tokens_are_not_resumed(config, task, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        counted(patch, tacq_export.quantization.quantize_rows, "quantize_gptq", raise_at=3)
        with pytest.raises(KeyboardInterrupt):
            export(config())
    (tmp_path / "schemas.json").write_text(json.dumps({"shop": "CREATE TABLE pet (name TEXT, weight REAL)"}))
    with pytest.raises(TacqError, match="out.gguf.work was calibrated on other tokens: the model's chat template or "):
        export(config(resume=True))
    (tmp_path / "schemas.json").write_text(json.dumps({"shop": "CREATE TABLE pet (name TEXT)"}))
    export(config(resume=True))
    assert (tmp_path / "out.gguf").is_file()


def work_of(tmp_path, tokens: dict | None, calibrated: bool) -> WorkDir:
    work = WorkDir(tmp_path / "work")
    work.calibration.mkdir(parents=True)
    identity = {"model": "m"} | ({"tokens": tokens} if tokens is not None else {})
    (work.path / "calibration.json").write_text(json.dumps(identity))
    if calibrated:
        (work.calibration / "hessian.safetensors").write_text("x")
    return work


@pytest.mark.parametrize(
    ("earlier", "now", "kept"),
    [
        ({"texts": "a"}, {"texts": "a"}, True),
        ({"texts": "a"}, {"texts": "b"}, False),
        ({"texts": "a"}, {"texts": "a", "tuning": "t"}, True),
        ({"texts": "a", "tuning": "t"}, {"texts": "a"}, True),
        ({"texts": "a", "tuning": "t"}, {"texts": "a", "tuning": "u"}, False),
        ({}, {"texts": "a"}, False),
        (None, {"texts": "a"}, False),
    ],
)
def test_what_is_kept_of_a_calibration(tmp_path, earlier, now, kept):
    """The last two: of what tokens a calibration is that an older version made, nobody knows."""
    work = work_of(tmp_path, earlier, calibrated=True)
    if not kept:
        with pytest.raises(TacqError, match="run without --resume"):
            work.settle_tokens(now, resume=True)
        assert any(work.calibration.iterdir())
    work.settle_tokens(now, resume=False)
    assert any(work.calibration.iterdir()) == kept
    noted = json.loads((work.path / "calibration.json").read_text())
    assert noted == {"model": "m", "tokens": ((earlier or {}) if kept else {}) | now}


def test_work_that_was_interrupted_before_its_tokens_were_known_is_resumed(tmp_path):
    work = work_of(tmp_path, None, calibrated=False)
    work.settle_tokens({"texts": "a"}, resume=True)
    assert json.loads((work.path / "calibration.json").read_text())["tokens"] == {"texts": "a"}


def test_keys_that_are_not_read_are_said(config, task):
    task.write_text(SQL.replace("{", '{"difficulty": "easy", "id": 7, ', 1) * 2)
    heard = Listener()
    export(config(dry_run=True), heard)
    assert "Keys of the task's rows that are not read: difficulty, id." in heard.lines


def test_a_template_that_changed_calibrates_again(config, tmp_path, monkeypatch):
    """As an upgrade of this program could change it: what is written of the same conversation is another text."""
    calls = counted(monkeypatch, tacq_export.calibration.calibrate, "accumulate_gradients")
    export(config("first.gguf", workdir=tmp_path / "w"))
    render = chat_template.ChatTemplate.render
    monkeypatch.setattr(chat_template.ChatTemplate, "render", lambda *args, **more: "so: " + render(*args, **more))
    export(config("second.gguf", workdir=tmp_path / "w"))
    assert len(calls) == 2
