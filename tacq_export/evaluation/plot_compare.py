"""The picture of a comparison: KL, and each task's score, against file size."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import TacqError
from ..files import written_atomically
from .compare_rows import TASKS, Row

# kind: (legend, colour, marker, line, filled). Blue and orange are told apart by colour-blind readers, and by the
# marker.
_STYLES = {
    "ours": ("tacq-export", "#0b5fa5", "o", "-", True),
    "stock": ("stock file, task imatrix", "#d1580b", "s", "", True),
    "emulated": ("stock type as if it held every width, emulated", "#7a7a7a", "D", ":", False),
}
_TITLES = {"gsm8k": "GSM8K, exact answers", "spider": "Spider, execution match"}
_LABEL_SIZE = 8


def check_picture() -> None:
    """Raises TacqError if no picture can be drawn, before the long work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise TacqError(
            "A picture needs matplotlib, which is not installed; run 'pip install matplotlib', or leave out --png."
        )


def plot_compare(rows: Sequence[Row], outfile: Path, title: str = "", note: str = "") -> None:
    """Write the picture as a PNG. Raises TacqError: matplotlib is missing, nothing to draw, or the file cannot be
    written."""
    check_picture()
    figure = draw_figure(rows, title, note)
    with written_atomically(outfile) as partial:
        figure.savefig(partial, format="png")


def draw_figure(rows: Sequence[Row], title: str = "", note: str = ""):
    """matplotlib Figure of one panel for KL (log scale) and one for each task that was scored; 95 % intervals as bars.

    The reference is a dashed line in the panels of scores. Raises TacqError if no row was measured.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [row for row in rows if row.kind in _STYLES and row.kl is not None]
    if not drawn:
        raise TacqError("There is no measured file to draw; give files or types to compare.")
    tasks = [task for task in TASKS if any(getattr(row, task) is not None for row in drawn)]
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(
            figsize=((6.4, 5.6)[len(tasks) > 1] * (1 + len(tasks)) if tasks else 7.5, 4.9),
            dpi=130,
            layout="constrained",
        )
        FigureCanvasAgg(figure)  # drawn in memory: no display is needed, and pyplot's state is left alone
        axes = figure.subplots(1, 1 + len(tasks), sharex=True, squeeze=False)[0]
        _kl_panel(axes[0], drawn)
        for ax, task in zip(axes[1:], tasks, strict=False):
            _score_panel(ax, task, rows)
        for ax in axes:
            ax.set_xlabel("file size, MB")
            ax.grid(alpha=0.25, linewidth=0.6)
        legend = {name: handle for ax in axes for handle, name in zip(*ax.get_legend_handles_labels(), strict=False)}
        figure.legend(
            legend.values(), legend.keys(), loc="outside lower center", ncols=len(legend) if tasks else 1, frameon=False
        )
        if title:
            figure.suptitle(title + (f"\n{note}" if note else ""), fontsize=11)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the names must not move the axes any more
        for ax, field in zip(axes, ["kl", *tasks], strict=False):
            _label(figure, ax, [row for row in drawn if getattr(row, field) is not None], field)
    return figure


def _kl_panel(ax, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    _draw(ax, rows, "kl", lambda row: (1.96 * (row.kl_stderr or 0.0),) * 2)
    ax.margins(x=0.12, y=0.12)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_title("KL divergence to the reference (lower is better)", fontsize=10)
    ax.set_ylabel("nats a token, log scale")


def _score_panel(ax, task: str, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import PercentFormatter

    scored = [row for row in rows if getattr(row, task) is not None]
    _draw(ax, scored, task, lambda row: _interval(row, task))
    for row in scored:
        if row.kind == "reference":
            ax.axhline(getattr(row, task), color="black", linestyle="--", linewidth=1, label=row.name)
    counts = sorted({int(row.intervals[task][0]) for row in scored if task in row.intervals})
    ax.set_title(
        _TITLES[task] + (f", {counts[0]} examples" if len(counts) == 1 else "") + " (higher is better)", fontsize=10
    )
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.margins(x=0.12, y=0.12)
    ax.set_ylim(bottom=-0.03 * ax.get_ylim()[1])  # a point at 0 is seen whole
    ax.set_ylabel("right, with 95 % interval")


def _draw(ax, rows: Sequence[Row], field: str, bar) -> None:
    """Points of each kind, by size, as high as `field`. bar(row): how far its bar reaches (down, up)."""
    for kind, (legend, color, marker, line, filled) in _STYLES.items():
        of = sorted((row for row in rows if row.kind == kind), key=lambda row: row.file_bytes)
        if of:
            down, up = zip(*map(bar, of), strict=False)
            heights = [getattr(row, field) for row in of]
            ax.errorbar(
                [row.file_bytes / 1e6 for row in of],
                heights,
                yerr=[[min(d, 0.9 * h) for d, h in zip(down, heights, strict=False)], up],
                label=legend,
                color=color,
                marker=marker,
                markersize=6.5 if kind == "ours" else 5.5,
                markerfacecolor=color if filled else "white",
                linestyle=line,
                linewidth=1.2,
                elinewidth=0.9,
                capsize=2,
                zorder=3 if kind == "ours" else 2,
            )


def _interval(row: Row, task: str) -> tuple[float, float]:
    if task not in row.intervals:
        return 0.0, 0.0
    value, (_, low, high) = getattr(row, task), row.intervals[task]
    return max(0.0, value - low), max(0.0, high - value)


def _label(figure, ax, rows: Sequence[Row], field: str) -> None:
    """Write each file's name beside its point, where it covers neither a point, a line nor another name.

    The layout must be final: places are tried in pixels, nearest first, and the first free one is taken.
    """
    renderer, scale = figure.canvas.get_renderer(), figure.dpi / 72
    frame = ax.get_window_extent(renderer)
    points = [ax.transData.transform((row.file_bytes / 1e6, getattr(row, field))) for row in rows]
    taken = [_box(x, y, 9 * scale, 9 * scale) for x, y in points]
    for path in [
        line.get_path().transformed(line.get_transform())
        for line in ax.lines
        if len(line.get_xdata()) > 1 and line.get_linestyle() != "None"
    ]:
        for begin, end in zip(path.vertices, path.vertices[1:], strict=False):
            for at in np.linspace(0, 1, 2 + int(np.hypot(*(end - begin)) / 4)):
                x, y = begin + at * (end - begin)
                taken.append(_box(x, y, 3, 3))
    for bars in ax.collections:  # the intervals
        for vertices in (path.transformed(bars.get_transform()).vertices for path in bars.get_paths()):
            (x, low), (_, high) = vertices[0], vertices[-1]
            taken.append((x - 2, min(low, high), x + 2, max(low, high)))
    for row, (x, y) in sorted(zip(rows, points, strict=False), key=lambda item: item[1][0]):
        color = _STYLES[row.kind][1]
        at, offset = (row.file_bytes / 1e6, getattr(row, field)), {"textcoords": "offset points"}
        text = ax.annotate(
            _short(row), at, xytext=(0, 0), fontsize=_LABEL_SIZE, color=color, ha="center", va="center", **offset
        )
        extent = text.get_window_extent(renderer)
        wide, high = extent.width + 2 * scale, extent.height + scale
        places = [
            (math.cos(angle) * (radius * scale + wide / 2), math.sin(angle) * (radius * scale + high / 2), radius)
            for radius in (7, 12, 18, 26, 36, 48, 62)
            for angle in [math.pi * k / 8 for k in (2, 14, 4, 12, 6, 10, 0, 8, 1, 15, 3, 13, 5, 11, 7, 9)]
        ]
        free = [(dx, dy, radius) for dx, dy, radius in places if _fits(_box(x + dx, y + dy, wide, high), frame, taken)]
        dx, dy, radius = free[0] if free else places[0]
        taken.append(_box(x + dx, y + dy, wide, high))
        text.set_position((dx / scale, dy / scale))
        if radius > 12:  # far from its point: a thin line says whose it is
            arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3}
            ax.annotate("", at, xytext=(dx / scale, dy / scale), zorder=1, arrowprops=arrow, **offset)


def _short(row: Row) -> str:
    return row.name.replace(" (emulated)", "")


def _box(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _fits(box, frame, taken) -> bool:
    inside = frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1] and box[3] <= frame.y1
    return inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken)
