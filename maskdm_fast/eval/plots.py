"""Learning curves as SVG that takes its colours from the page around it."""

import io
import math
from collections.abc import Sequence

import numpy as np

from maskdm_fast.eval.results import RunResult

NUM_COLOURS = 4
# Matplotlib writes these literally; they are then replaced by the page's variables, so light and dark themes both work.
_INK, _LINE = "#123451", "#123452"
_RUN = tuple(f"#12346{index}" for index in range(NUM_COLOURS))
_WINDOWS = 30


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a thirtieth of the points; at the ends the window shrinks."""
    reach = len(values) // (2 * _WINDOWS)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def loss_curves(runs: Sequence[RunResult], axis: str) -> str:
    """Loss of every run on a logarithmic axis: the logged values pale, their running mean on top.

    All stages of a run but the last are dashed.

    Args:
        runs: what to draw.
        axis: "images" or "seconds".

    Returns:
        An ``<svg>`` element, or "" where there is no point to draw.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    except ImportError as error:
        raise ImportError("the report needs matplotlib: pip install 'maskdm_fast[eval]'") from error
    column = {"images": 0, "seconds": 1}[axis]
    drawn = []
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"loss by {axis}", "font.size": 11}):
        figure = Figure(figsize=(6.4, 3.7), layout="constrained")
        axes = figure.add_subplot()
        for number, run in enumerate(runs):
            for stage in run.stages:
                points = np.asarray([p for p in stage.points if math.isfinite(p[2]) and p[2] > 0], dtype=float)
                if not len(points):
                    continue
                x, smooth = points[:, column], _smooth(points[:, 2])
                style = {"color": _RUN[number % NUM_COLOURS], "solid_capstyle": "round"}
                axes.plot(x, points[:, 2], linewidth=1, alpha=0.22, **style)
                dashes = {} if stage is run.stages[-1] else {"dashes": (4, 2)}
                axes.plot(x, smooth, linewidth=2, marker="o" if len(x) == 1 else "", **style, **dashes)
                drawn.append(smooth)
        if not drawn:
            return ""
        values = np.concatenate(drawn)
        axes.set_yscale("log")
        # The first steps are huge and brief: leave them to the pale line, cut off.
        axes.set_ylim(values.min() / 1.15, min(values.max(), 8 * np.median(values)) * 1.15)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlim(left=0)
        axes.set_xlabel({"images": "images seen", "seconds": "seconds of training"}[axis], color=_INK)
        axes.set_ylabel("loss", color=_INK)
        axes.grid(True, axis="y", color=_LINE, linewidth=1)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", length=0, colors=_INK)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(_LINE)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in [(_INK, "--muted"), (_LINE, "--line")]:
        svg = svg.replace(colour, f"var({variable})")
    for index, colour in enumerate(_RUN):
        svg = svg.replace(colour, f"var(--run-{index})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="Loss by {axis}" ', 1)
