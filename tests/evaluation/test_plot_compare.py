"""The picture of a comparison: what is in its panels, and that every name can be read."""

from __future__ import annotations

import importlib.util
from itertools import combinations

import pytest

from tacq_export import cli
from tacq_export.errors import TacqError
from tacq_export.evaluation.compare_rows import Row
from tacq_export.evaluation.plot_compare import draw_figure, plot_compare


def row(name: str, kind: str, megabytes: float, kl: float, **scores: float) -> Row:
    intervals = {task: [100, max(0.0, value - 0.06), value + 0.08] for task, value in scores.items()}
    return Row(
        name, round(megabytes * 1e6), 2.5, kl, 10.0, 0.7, kind=kind, kl_stderr=0.01, intervals=intervals, **scores
    )


ROWS = [
    row("reference, F16", "reference", 270, 0.0, gsm8k=0.3, spider=0.4),
    row("tacq-2.5", "ours", 49.5, 0.47, gsm8k=0.05, spider=0.2),
    row("tacq-3", "ours", 56, 0.3, gsm8k=0.1, spider=0.25),
    row("tacq-3.5", "ours", 62, 0.2, gsm8k=0.2, spider=0.3),
    # Four files within two megabytes, as fallbacks make them.
    row("Q2_K", "stock", 73.2, 0.406, gsm8k=0.1, spider=0.2),
    row("IQ3_XXS", "stock", 71.9, 0.321, gsm8k=0.11, spider=0.22),
    row("IQ3_S", "stock", 73.1, 0.31, gsm8k=0.12, spider=0.21),
    row("Q3_K_S", "stock", 73.1, 0.4, gsm8k=0.1, spider=0.2),
    row("Q2_K (emulated)", "emulated", 51.5, 1.298),
]


def test_panels():
    figure = draw_figure(ROWS, "a model", "24 examples")
    kl, gsm8k, spider = figure.axes
    assert kl.get_yscale() == "log" and gsm8k.get_yscale() == spider.get_yscale() == "linear"
    assert kl.get_xlim() == gsm8k.get_xlim() and kl.get_xlim()[1] < 200, (
        "the reference's size would squeeze all others together"
    )
    assert "GSM8K" in gsm8k.get_title() and "100 examples" in gsm8k.get_title() and "Spider" in spider.get_title()
    assert {text.get_text() for text in kl.texts} - {""} == {r.name.replace(" (emulated)", "") for r in ROWS[1:]}
    assert {text.get_text() for text in gsm8k.texts} - {""} == {r.name for r in ROWS[1:-1]}, (
        "the emulated type was not scored"
    )
    assert {text.get_text() for text in figure.legends[0].get_texts()} >= {"tacq-export", ROWS[0].name}, (
        "the dashed line is explained"
    )
    colors = {text.get_text(): text.get_color() for text in gsm8k.texts}
    assert colors["tacq-3"] != colors["Q2_K"]
    assert "a model" in figure.get_suptitle()
    assert len(draw_figure([r for r in ROWS if r.kind == "stock"]).axes) == 3
    assert len(draw_figure([Row("a", 10**7, 2.5, 0.5, 9.0, 0.5, kind="ours")]).axes) == 1


def test_names_do_not_overlap():
    figure = draw_figure(ROWS)
    renderer = figure.canvas.get_renderer()
    for ax in figure.axes:
        frame = ax.get_window_extent(renderer)
        boxes = {text.get_text(): text.get_window_extent(renderer) for text in ax.texts if text.get_text()}
        assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes.values())
        for (one, a), (other, b) in combinations(boxes.items(), 2):
            assert not (a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1), f"{one} covers {other}"


def test_png(tmp_path):
    plot_compare(ROWS, tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(data[16:20], "big") > 1500  # three panels wide


def test_nothing_to_draw(tmp_path):
    with pytest.raises(TacqError, match="no measured file to draw"):
        plot_compare(ROWS[:1], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_one_sentence_says_what_to_do(tmp_path, monkeypatch, capsys):
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else original(name, *rest)
    )
    with pytest.raises(TacqError, match="pip install matplotlib"):
        plot_compare(ROWS, tmp_path / "a.png")
    assert cli.main(["compare", "model.gguf", "--task", "t", "--eval", "t", "--png", str(tmp_path / "a.png")]) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith("error: A picture needs matplotlib")
        and error.count("\n") == 1
        and not list(tmp_path.iterdir())
    )
