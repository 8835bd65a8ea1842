"""The outcome of an experiment in words, and as text for a terminal."""

import shutil
import textwrap
from collections.abc import Sequence

from maskdm_fast.eval.results import ReportData, RunResult

_TIE = 0.05
SCORES_NOTE = (
    "Lower is better. The floor is what real images score in place of generated ones, at the sizes given: a Frechet "
    "distance of small sets is far from 0 even between real images, a kernel distance scatters around 0."
)


def scored_runs(data: ReportData) -> list[RunResult]:
    """The runs that have scores, in order."""
    return [run for run in data.runs if run.scores is not None]


def verdict(data: ReportData) -> str:
    """What the scores say, whichever way it went; `data.verdict` where that is given.

    The two best runs by Frechet distance are compared; a difference below 5 % is called a tie.
    """
    if data.verdict:
        return data.verdict
    runs = sorted(scored_runs(data), key=lambda run: run.scores.fd)
    if not runs:
        return "Nothing was scored."
    best = runs[0].scores
    if len(runs) == 1:
        return f"'{runs[0].name}' reached {best.fd_name} {best.fd:.1f}; real images score {best.fd_floor:.1f}."
    other = runs[1].scores
    names = [f"'{run.name}'" for run in runs[:2]]
    gain = 1 - best.fd / other.fd if other.fd > 0 else 0.0
    if gain < _TIE:
        text = (
            f"A tie: {best.fd_name} {best.fd:.1f} for {names[0]} and {other.fd:.1f} for {names[1]}, less than "
            f"{100 * _TIE:.0f} % apart (real images score {best.fd_floor:.1f})."
        )
    else:
        text = (
            f"{names[0]} came out ahead: {best.fd_name} {best.fd:.1f} against {other.fd:.1f} for {names[1]}, "
            f"{100 * gain:.0f} % lower (real images score {best.fd_floor:.1f})."
        )
    by_kernel = names[0] if best.kid <= other.kid else names[1]
    kernel = f"{best.kid:.3f} and {other.kid:.3f}"
    agrees = "agrees" if by_kernel == names[0] else f"prefers {by_kernel}"
    return f"{text} {best.kid_name} {agrees}: {kernel}. This is one run of each with one seed."


def score_sizes(data: ReportData) -> str:
    """The numbers of images behind the scores; once where all runs share them."""
    runs = scored_runs(data)
    sizes = {run.scores.sizes for run in runs}
    return sizes.pop() if len(sizes) == 1 else " ".join(f"{run.name}: {run.scores.sizes}." for run in runs)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Left-align the first column, right-align the others."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def render_text(data: ReportData, *, width: int | None = None) -> str:
    """The report as plain text.

    Args:
        width: columns to wrap at; default: the terminal's, at most 100.
    """
    width = min(100, shutil.get_terminal_size().columns) if width is None else width
    lines = [data.title, "=" * len(data.title), *textwrap.wrap(verdict(data), width), ""]
    runs = scored_runs(data)
    if runs:
        first = runs[0].scores
        rows = [(run.name, f"{run.scores.fd:.2f}", f"{run.scores.kid:.4f}") for run in runs]
        rows.append(("real images (floor)", f"{first.fd_floor:.2f}", f"{first.kid_floor:.4f}"))
        lines += _table(("scores, lower is better", first.fd_name, first.kid_name), rows)
        lines += [*textwrap.wrap(score_sizes(data), width), ""]
    rows = [
        (f"{run.name}: {stage.name}", f"{stage.images:,}", f"{stage.seconds:.1f}", f"{stage.images_per_s:,.1f}")
        for run in data.runs
        for stage in run.stages
    ]
    if rows:
        lines += [*_table(("training", "images", "seconds", "images/s"), rows), ""]
    for name, path in data.paths.items():
        lines.append(f"{name}: {path}")
    if data.attribution:
        lines += ["", *textwrap.wrap(data.attribution, width)]
    return "\n".join(lines) + "\n"
