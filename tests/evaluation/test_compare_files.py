"""Comparison with stock files: sizes known beforehand, nearest types, emulated types, and results that survive an
interruption."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import gguf
import numpy as np
import pytest

import tacq_export.evaluation.compare_stock
from tacq_export import cli
from tacq_export.config import ExportConfig
from tacq_export.errors import TacqError
from tacq_export.evaluation.compare_files import StockPlan, imatrix_importance, make_stock, nearest_types, plan_stock
from tacq_export.evaluation.compare_rows import Measurements, Row, json_line, load_rows, table, write_json
from tacq_export.evaluation.compare_stock import CompareConfig, Scoring, claim_workdir, compare_stock
from tacq_export.evaluation.emulate_stock import emulated_types, ggml_quantize, rounded_as
from tacq_export.evaluation.score_task import TaskScore, wilson
from tacq_export.evaluation.verify import compare_models
from tacq_export.format.inspect_gguf import inspect_gguf
from tacq_export.inputs.load_task import load_task
from tacq_export.inputs.tokenize_task import tokenize_for_loss, tokenize_task
from tacq_export.inputs.tokenizer import ModelTokenizer
from tacq_export.pipeline import export
from tacq_export.reporting import Reporter

KEYS = ["name", "file_bytes", "bpw_linear", "kl", "ppl", "top1", "gsm8k", "spider", "wikitext2_ppl"]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Enough text for llama-imatrix's window of 512 tokens."""
    path = tmp_path_factory.mktemp("task") / "sums.jsonl"
    rows = [
        {"question": f"how many apples are {i} and {i + 1}", "answer": f"{2 * i + 1} apples are left #### {2 * i + 1}"}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def ours(tiny_gguf, task, tmp_path_factory, runtime):
    outfile = tmp_path_factory.mktemp("ours") / "small.gguf"
    export(
        ExportConfig(str(tiny_gguf), task, outfile, ratio=0.01, n_samples=3, seq_len=32, device="cpu", refine_sweeps=0)
    )
    return outfile


@pytest.fixture(scope="module")
def config(tiny_gguf, task, ours, tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "general.txt"
    text.write_text("a train leaves the station at nine and arrives at noon\n" * 60)
    return CompareConfig(
        str(tiny_gguf),
        task,
        task,
        tmp_path_factory.mktemp("compare") / "work",
        [ours],
        ("Q2_K", "Q4_0"),
        n_samples=40,
        n_eval=3,
        text=text,
        n_windows=1,
        threads=1,
    )


@pytest.fixture(scope="module")
def compared(config):
    return compare_stock(config, Reporter())


def test_rows_of_a_comparison(config, compared, ours):
    reference, mine, *stock = compared
    full = config.workdir / "reference-f16.gguf"
    texts = tokenize_task(load_task(config.task), ModelTokenizer(full), config.n_eval, 2048)
    assert [row.kind for row in compared] == ["reference", "ours", "stock", "stock"]
    assert (
        (reference.kl, reference.top1, reference.wikitext2_kl) == (0, 1, 0)
        and reference.ppl > 1
        and reference.wikitext2_ppl > 1
    )
    assert (
        mine.name == "small"
        and mine.file_bytes == ours.stat().st_size
        and mine.bpw_linear == inspect_gguf(ours).bpw_linear
    )
    assert [row.name for row in stock] == ["Q2_K", "Q4_0"]
    for row in stock:
        path = config.workdir / f"{row.name}-tacq4-tacq4.gguf".lower()
        types = {t.name: t.type for t in inspect_gguf(path).tensors}
        assert types["token_embd.weight"] == types["output.weight"] == "TACQ4", "embedding and head as in our file"
        assert (
            row.file_bytes == path.stat().st_size
            and row.kl > 0
            and 0 < row.top1 < 1
            and row.n_tokens == reference.n_tokens
        )
    kl = [compare_models(full, path, texts, 1).kl for path in (ours, config.workdir / "q4_0-tacq4-tacq4.gguf")]
    assert [mine.kl, stock[1].kl] == pytest.approx(kl, rel=1e-5) and mine.kl != pytest.approx(stock[1].kl, rel=1e-3), (
        "each row is of its own file"
    )
    assert (
        stock[0].types == {"Q4_0": 14}
        and sum(stock[0].fell_back.values()) == 14
        and set(stock[0].fell_back) <= {"Q2_K -> Q4_0", "Q3_K -> Q4_0"}
    )
    assert stock[1].fell_back == {} and (stock[1].embedding, stock[1].head, reference.head) == ("TACQ4", "TACQ4", "F16")


def test_json_line_has_the_keys_that_are_promised(compared, tmp_path):
    rows = json.loads(json_line(compared))
    assert isinstance(rows, list) and all(list(row)[: len(KEYS)] == KEYS for row in rows)
    assert rows[0]["gsm8k"] is None and isinstance(rows[1]["file_bytes"], int)
    write_json(compared, tmp_path / "rows.json")
    again = load_rows(tmp_path / "rows.json")
    assert json_line(again) == json_line(compared) and (tmp_path / "rows.json").read_text().count("\n") == len(rows)


def test_table_says_what_fell_back(compared):
    lines = table(compared)
    assert "fell back:" in next(
        below for line, below in zip(lines, lines[1:], strict=False) if line.startswith("Q2_K ")
    )
    assert all(
        "; embedding and head TACQ4" in below
        for line, below in zip(lines, lines[1:], strict=False)
        if line.startswith(("Q", "small"))
    )
    assert "ppl, general text" in lines[0] and "gsm8k" not in lines[0]
    scored = table([replace(compared[0], gsm8k=0.31, intervals={"gsm8k": [100, 0.228, 0.406]}), compared[1]])
    assert "31.0 (22.8-40.6) %" in scored[1] and "gsm8k" in scored[0]


def test_a_second_comparison_measures_only_what_is_new(config, compared, monkeypatch):
    seen = []
    original = tacq_export.evaluation.compare_stock.compare_models
    monkeypatch.setattr(
        tacq_export.evaluation.compare_stock,
        "compare_models",
        lambda ref, cand, *a, **k: seen.append(cand.name) or original(ref, cand, *a, **k),
    )
    monkeypatch.setattr(
        tacq_export.evaluation.compare_stock, "compare_on_text", lambda *a: pytest.fail("measured again")
    )
    assert compare_stock(config, Reporter()) == compared and seen == []
    more = compare_stock(replace(config, types=("Q2_K", "Q5_0", "Q4_0"), text=None), Reporter())
    assert seen == ["q5_0-tacq4-tacq4.gguf"]
    assert [row.name for row in more] == ["reference, F16", "small", "Q2_K", "Q4_0", "Q5_0"], "stock files by size"


def test_stock_files_of_another_calibration_text_are_not_used(config, compared, tmp_path):
    """The text changes with the chat template and the schemas, which the task file does not show."""
    shutil.copytree(config.workdir, tmp_path / "work")
    text = tmp_path / "work" / "task.imatrix.txt"
    text.write_text("so: " + text.read_text())
    with pytest.raises(TacqError, match="work holds another comparison .the model's chat template or the schemas"):
        compare_stock(replace(config, workdir=tmp_path / "work"), Reporter())


def test_answers_alone_are_measured(config, compared, ours):
    """Beside the same file's whole texts, in the same work folder."""
    full = config.workdir / "reference-f16.gguf"
    texts, begins = tokenize_for_loss("answer", load_task(config.task), ModelTokenizer(full), config.n_eval, 2048)
    reference, mine = compare_stock(replace(config, types=(), text=None, loss="answer"), Reporter())
    assert mine.n_tokens == reference.n_tokens == sum(map(len, texts)) - sum(begins) < compared[1].n_tokens
    assert mine.kl == pytest.approx(
        compare_models(full, ours, texts, 1, begins=begins).kl, rel=1e-5
    ) and mine.kl != pytest.approx(compared[1].kl, rel=1e-3)


def test_an_interrupted_comparison_keeps_what_was_measured(config, tmp_path, monkeypatch):
    config = replace(config, workdir=tmp_path / "work", types=("Q4_0",), text=None)
    original, seen = tacq_export.evaluation.compare_stock.compare_models, []

    def measure(reference, candidate, *rest, **more):
        seen.append(candidate.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return original(reference, candidate, *rest, **more)

    monkeypatch.setattr(tacq_export.evaluation.compare_stock, "compare_models", measure)
    with pytest.raises(KeyboardInterrupt):
        compare_stock(config, Reporter())
    assert len(compare_stock(config, Reporter())) == 3
    assert seen == ["small.gguf", "q4_0-tacq4-tacq4.gguf", "q4_0-tacq4-tacq4.gguf"]


def test_a_calibration_text_that_is_too_short_for_an_imatrix_is_refused_before_the_long_work(config, tmp_path):
    short = replace(config, workdir=tmp_path / "work", files=None, n_samples=2)
    with pytest.raises(TacqError, match=r"^The calibration text has \d+ tokens, and llama-imatrix, .* wants 1024"):
        compare_stock(short, Reporter())
    assert len(compare_stock(replace(short, files=(), types=(), text=None), Reporter())) == 1, "none is needed"


def test_scores_of_the_task_and_what_is_retained(config, compared, tmp_path, monkeypatch):
    """And of more questions: only those are asked that were not, whose answers come behind the others'."""
    task = tmp_path / "sums.jsonl"
    task.write_text("".join(f'{{"question": "q{i}", "answer": "#### {i}"}}\n' for i in range(5)))
    right, asked = {"reference-f16.gguf": "11101", "small.gguf": "01101"}, []

    def score(scoring, file, first, n, *_):
        asked.append((file.name, first, n))
        hits = tuple(digit == "1" for digit in right.get(file.name, "00000")[first : first + n])
        return TaskScore(hits, tuple(f"answer {i}" for i in range(first, first + n)), tuple(not hit for hit in hits))

    monkeypatch.setattr(tacq_export.evaluation.compare_stock, "score_file", score)
    rows = compare_stock(replace(config, scoring=[Scoring("gsm8k", task, 4)]), Reporter())
    assert [row.gsm8k for row in rows] == [0.75, 0.5, 0, 0] and rows[1].intervals == {"gsm8k": [4, *wilson(2, 4)]}
    assert rows[1].retention["gsm8k"][0] == pytest.approx(2 / 3) and rows[0].retention["gsm8k"] == [1, 1, 1]
    assert [row.kl for row in rows] == [row.kl for row in compared]
    assert rows[1].cut == {"gsm8k": 2} and "; 2 answers of gsm8k cut off)" in "\n".join(table(rows))
    asked.clear()
    ours = compare_stock(replace(config, types=(), scoring=[Scoring("gsm8k", task, 9)]), Reporter())[1]
    assert asked == [("reference-f16.gguf", 4, 1), ("small.gguf", 4, 1)], "the file has five questions"
    assert ours.gsm8k == 0.6 and ours.cut == {"gsm8k": 2} and ours.retention["gsm8k"][0] == 0.75
    answers = [json.loads(line) for line in (config.workdir / "answers-gsm8k-small.jsonl").read_text().splitlines()]
    assert [(answer["messages"][-1]["content"], answer["right"]) for answer in answers] == [
        (f"answer {i}", "01101"[i] == "1") for i in range(5)
    ]
    asked.clear()
    assert (
        compare_stock(replace(config, types=(), scoring=[Scoring("gsm8k", task, 3)]), Reporter())[1].gsm8k == 2 / 3
        and not asked
    )


def test_a_real_score_of_random_weights(config, task):
    """Through llama.cpp: the tiny model answers nothing right, and the interval says how little two examples prove."""
    rows = compare_stock(replace(config, types=(), text=None, scoring=[Scoring("gsm8k", task, 2)]), Reporter())
    assert [row.gsm8k for row in rows] == [0, 0] and rows[1].retention == {}
    assert rows[1].intervals["gsm8k"][:2] == [2, 0] and 0.5 < rows[1].intervals["gsm8k"][2] < 1
    for name in ("reference-f16", "small"):
        answers = [
            json.loads(line) for line in (config.workdir / f"answers-gsm8k-{name}.jsonl").read_text().splitlines()
        ]
        assert [answer["right"] for answer in answers] == [False, False]
        assert [[m["role"] for m in answer["messages"]] for answer in answers] == [["user", "assistant"]] * 2, (
            "can be a task file"
        )


def test_an_imatrix_is_made_only_for_stock_types(config, compared, tmp_path, monkeypatch):
    monkeypatch.setattr(
        tacq_export.evaluation.compare_stock, "make_imatrix", lambda *_: pytest.fail("nothing needs it")
    )
    rows = compare_stock(replace(config, workdir=tmp_path / "work", types=(), text=None), Reporter())
    assert [row.kl for row in rows] == [row.kl for row in compared[:2]]


def test_sizes_are_known_before_quantizing(config, compared, tmp_path):
    reference, imatrix = config.workdir / "reference-f16.gguf", config.workdir / "task.imatrix.gguf"
    for name in ("Q2_K", "IQ4_XS", "Q4_K_M", "Q5_1"):
        plan = plan_stock(reference, imatrix, name, "q8_0", "f16")
        make_stock(reference, imatrix, name, tmp_path / name, "q8_0", "f16", 1, Reporter())
        assert abs((tmp_path / name).stat().st_size - plan.file_bytes) < 1024, name


def test_a_type_that_does_not_exist_is_named(config, compared):
    with pytest.raises(TacqError, match="Q9_X cannot be planned"):
        compare_stock(replace(config, types=("Q9_X",)), Reporter())
    with pytest.raises(TacqError, match="'Q2_0' cannot be emulated; use a type .*Q3_K.* or a mix of them .*Q3_K_M"):
        compare_stock(replace(config, emulate=("Q2_0",)), Reporter())


def test_nearest_types():
    plans = [
        StockPlan(name, size) for name, size in (("A", 90), ("B", 99), ("C", 101), ("D", 103), ("E", 103), ("F", 110))
    ]
    assert nearest_types(plans, 100) == ["B", "E"], (
        "the largest below; above, the largest within 3 %, and of equals the later"
    )
    assert nearest_types(plans, 101) == ["B", "E"], "one of the same size counts as above"
    assert nearest_types(plans, 50) == ["A"] and nearest_types(plans, 200) == ["F"] and nearest_types([], 5) == []


def test_stock_types_are_chosen_by_size(config, compared, ours):
    rows = compare_stock(replace(config, types=None, text=None), Reporter())
    stock = [row for row in rows if row.kind == "stock"]
    assert 1 <= len(stock) <= 2 and stock[-1].file_bytes >= ours.stat().st_size
    assert all(row.file_bytes < ours.stat().st_size for row in stock[:-1])


def test_stock_types_without_a_file_of_ours(config, compared):
    rows = compare_stock(
        replace(config, files=(), types=("Q4_0",), text=None, embedding_type="f16", head_type="q8_0"), Reporter()
    )
    assert [row.kind for row in rows] == ["reference", "stock"]
    types = {t.name: t.type for t in inspect_gguf(config.workdir / "q4_0-f16-q8_0.gguf").tensors}
    assert (types["token_embd.weight"], types["output.weight"]) == ("F16", "Q8_0")


def test_the_work_folder_of_another_comparison_is_refused(config, compared, ours, tmp_path):
    with pytest.raises(TacqError, match="holds another comparison .its n samples differs.; give another --workdir"):
        claim_workdir(replace(config, n_samples=5))
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "another task"}\n')
    with pytest.raises(TacqError, match="its task differs"):
        claim_workdir(replace(config, task=other))
    with pytest.raises(TacqError, match="its model differs"):
        claim_workdir(replace(config, model=str(ours)))
    claim_workdir(config)


# Emulation.


@pytest.mark.parametrize("name", ["Q2_K", "IQ3_XXS", "Q3_K", "IQ2_XS", "IQ4_XS"])
def test_rounding_runs_on_across_rows(runtime, name):
    """Every block of 256, quantized by itself with the weights of its own columns, gives the same values."""
    rng = np.random.default_rng(0)
    values, importance = rng.normal(0, 0.1, (6, 192)).astype(np.float32), rng.uniform(0.1, 3, 192).astype(np.float32)
    qtype = gguf.GGMLQuantizationType[name]
    rounded = rounded_as(values, qtype, importance)
    assert rounded.shape == values.shape and rounded.dtype == np.float32
    flat, weights = values.reshape(-1), np.tile(importance, 6)
    for block in range(0, 4 * 256, 256):  # 6 x 192 weights are 4.5 blocks; the last is filled up with zeros
        alone = gguf.quants.dequantize(
            ggml_quantize(flat[None, block : block + 256], qtype, weights[block : block + 256]), qtype
        )
        assert np.array_equal(alone[0], rounded.reshape(-1)[block : block + 256])
    assert 0 < np.mean((rounded - values) ** 2) < 0.3 * np.mean(values**2)


def test_rounding_serves_important_columns(runtime):
    values = np.random.default_rng(1).normal(0, 0.1, (64, 576)).astype(np.float32)
    importance = np.ones(576, np.float32)
    importance[::4] = 1000  # among the others of each group, which share a scale
    error = ((rounded_as(values, gguf.GGMLQuantizationType.Q2_K, importance, threads=2) - values) ** 2).mean(0)
    assert error[::4].mean() < 0.7 * error.reshape(-1, 4)[:, 1:].mean()


def test_rounding_does_not_depend_on_threads(runtime):
    values = np.random.default_rng(2).normal(0, 0.1, (37, 320)).astype(np.float32)
    importance = np.random.default_rng(3).uniform(0.1, 3, 320).astype(np.float32)
    one, three = (rounded_as(values, gguf.GGMLQuantizationType.Q3_K, importance, threads) for threads in (1, 3))
    assert np.array_equal(one, three)


def test_importance_is_the_mean_square_of_the_inputs(config, compared):
    importance = imatrix_importance(config.workdir / "task.imatrix.gguf")
    shapes = {t.name: t.shape for t in inspect_gguf(config.workdir / "reference-f16.gguf").tensors if t.is_linear}
    assert {name: len(values) for name, values in importance.items()} == {
        name: shape[1] for name, shape in shapes.items()
    }
    # The inputs of q are normalized with weights of 1: their mean square is 1 up to the 1e-5 or so of the norm's
    # epsilon.
    assert importance["blk.0.attn_q.weight"].mean() == pytest.approx(1, rel=0.02)


def test_emulated_rows(config, compared, monkeypatch):
    config = replace(config, types=("Q4_0",), emulate=("q4_0", "Q2_K"), text=None)
    rows = {row.name: row for row in compare_stock(config, Reporter())}
    two, four, real = rows["Q2_K (emulated)"], rows["Q4_0 (emulated)"], rows["Q4_0"]
    assert (two.bpw_linear, four.bpw_linear) == (2.625, 4.5) and two.types == {"Q2_K": 14}
    # A type that does fit the widths: its real file has the size and, up to the rounding of activations, the quality.
    assert abs(four.file_bytes - real.file_bytes) < 1024 and four.bpw_linear == real.bpw_linear
    assert four.kl == pytest.approx(real.kl, rel=0.1) and two.kl > four.kl
    assert not list(config.workdir.glob("emulated-*")), "the file at F16 is temporary"
    monkeypatch.setattr(tacq_export.evaluation.compare_stock, "write_emulated", lambda *_: pytest.fail("made again"))
    assert {row.name: row for row in compare_stock(config, Reporter())} == rows


def test_an_emulated_mix_has_the_types_that_llama_quantize_wants(config, compared):
    """Q3_K_M of two blocks, by llama-quant.cpp: values Q5_K (the first two blocks), outputs and down projections Q4_K,
    the rest Q3_K."""
    reference, imatrix = config.workdir / "reference-f16.gguf", config.workdir / "task.imatrix.gguf"
    types = {name: kind.name for name, kind in emulated_types("Q3_K_M", reference, imatrix, "q8_0", "q8_0").items()}
    assert types == {
        f"blk.{i}.{part}.weight": kind
        for i in range(2)
        for part, kind in {
            "attn_q": "Q3_K",
            "attn_k": "Q3_K",
            "attn_v": "Q5_K",
            "attn_output": "Q4_K",
            "ffn_gate": "Q3_K",
            "ffn_up": "Q3_K",
            "ffn_down": "Q4_K",
        }.items()
    }
    one, mix = [
        row
        for row in compare_stock(replace(config, types=(), emulate=("Q3_K", "Q3_K_M"), text=None), Reporter())
        if row.kind == "emulated"
    ]
    assert (one.name, mix.name) == ("Q3_K (emulated)", "Q3_K_M (emulated)") and mix.types == {
        "Q3_K": 8,
        "Q5_K": 2,
        "Q4_K": 4,
    }
    weights = {
        name: t.n_elements for name, t in ((t.name, t) for t in gguf.GGUFReader(reference).tensors) if name in types
    }
    bits = {"Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5}
    assert mix.bpw_linear == pytest.approx(
        sum(bits[types[name]] * n for name, n in weights.items()) / sum(weights.values())
    )
    assert mix.kl < one.kl and mix.file_bytes > one.file_bytes


def test_an_embedding_that_does_not_fit_its_type(config, compared):
    for name, message in (("Q6_K", "64 columns, which Q6_K cannot hold"), ("Q7_X", "There is no type Q7_X")):
        with pytest.raises(TacqError, match=message):
            compare_stock(replace(config, types=(), emulate=("Q2_K",), embedding_type=name, text=None), Reporter())


# What lies on disk.


def test_measurements_are_found_by_what_decides_them(tmp_path):
    kept = Measurements(tmp_path / "measurements.json")
    assert kept.get({"file": "a", "n": 1}, lambda: {"kl": 1.0}) == {"kl": 1.0}
    other = Measurements(tmp_path / "measurements.json")  # another process, at the same time
    other.get({"file": "b", "n": 1}, lambda: {"kl": 2.0})
    assert kept.get({"n": 1, "file": "a"}, lambda: pytest.fail("measured again")) == {"kl": 1.0}
    assert kept.find({"file": "b", "n": 1}) == {"kl": 2.0} and kept.find({"file": "a", "n": 2}) is None
    with pytest.raises(ValueError):
        kept.get({"file": "c"}, lambda: int("x"))
    assert kept.find({"file": "c"}) is None
    (tmp_path / "measurements.json").write_text('{"half')
    with pytest.raises(TacqError, match="measurements.json is damaged; delete it"):
        kept.find({"file": "a"})


def test_a_file_that_changes_is_another_file(tmp_path):
    path, kept = tmp_path / "a", Measurements(tmp_path / "m.json")
    path.write_text("one")
    first = kept.sha(path)
    path.write_text("other")
    assert kept.sha(path) != first and len(first) == 16


def test_rows_that_are_none(tmp_path):
    path = tmp_path / "rows.json"
    for content in ("", "[1]", '[{"name": "a"}]', '[{"nonsense": 1}]'):
        path.write_text(content)
        with pytest.raises(TacqError, match="rows.json holds no rows of a comparison"):
            load_rows(path)
    assert json.loads(json_line([Row("a", 5, 2.5)]))[0]["kl"] is None


# The command.


def test_compare_command(config, compared, ours, tmp_path, capsys):
    arguments = [
        "compare",
        config.model,
        "--task",
        str(config.task),
        "--eval",
        str(config.held_out),
        "--file",
        str(ours),
        "--types",
        "Q2_K,Q4_0",
        "--n-samples",
        "40",
    ]
    arguments += [
        "--n-eval",
        "3",
        "-w",
        str(config.workdir),
        "--outfile-json",
        str(tmp_path / "rows.json"),
        "--png",
        str(tmp_path / "rows.png"),
    ]
    assert cli.main(arguments) == 0
    captured = capsys.readouterr().out.splitlines()
    assert [row["name"] for row in json.loads(captured[-1])] == ["reference, F16", "small", "Q2_K", "Q4_0"]
    assert captured[0].startswith("file ") and len(captured) == 1 + 2 * 4 + 1
    assert [row.name for row in load_rows(tmp_path / "rows.json")] == [row.name for row in compared]
    assert (tmp_path / "rows.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_compare_command_exports_when_no_file_is_given(config, task, tmp_path, capsys, monkeypatch):
    arguments = [
        "compare",
        config.model,
        "--task",
        str(task),
        "--eval",
        str(task),
        "--types",
        "Q4_0",
        "--n-samples",
        "40",
        "--n-eval",
        "2",
        "-w",
        str(tmp_path / "work"),
        "-t",
        "1",
    ]
    assert cli.main(arguments) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["kind"] for row in rows] == ["reference", "ours", "stock"] and 2.25 <= rows[1]["bpw_linear"] < 3
    monkeypatch.setattr(tacq_export.evaluation.compare_stock, "make_reference", lambda *_: pytest.fail("made again"))
    monkeypatch.setattr("tacq_export.pipeline.export", lambda *_: pytest.fail("exported again"))
    assert cli.main(arguments) == 0 and json.loads(capsys.readouterr().out.splitlines()[-1]) == rows


def test_compare_command_checks_its_outputs_first(config, ours, tmp_path, capsys):
    base = [
        "compare",
        config.model,
        "--task",
        str(config.task),
        "--eval",
        str(config.held_out),
        "--file",
        str(ours),
        "-w",
        str(tmp_path / "work"),
    ]
    for more, message in (
        (["--png", str(tmp_path / "gone" / "a.png")], "There is no folder"),
        (["--text", str(tmp_path / "gone.txt")], "gone.txt cannot be read"),
        (["--emulate", "nonsense"], "'nonsense' cannot be emulated"),
    ):
        assert cli.main(base + more) == 1
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "work").exists()
