"""The scores of evaluate as text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from maskdm_fast.eval import ClassScore, Manifold

if TYPE_CHECKING:
    from maskdm_fast.commands.evaluation import SetScore

_MOST_CLASSES = 20


def set_table(results: Sequence["SetScore"], floor: Manifold | None, reference: str) -> str:
    """One row per set, the floor below, and what the numbers mean."""
    first = results[0].scores
    head = ["set", first.fd_name, first.kid_name]
    head += ["precision", "recall", "density", "coverage", "closer", "near copies"]
    rows = [
        [
            result.name,
            f"{result.scores.fd:.2f}",
            f"{result.scores.kid:.4f}",
            *_of_manifold(result.manifold),
            f"{result.copying.closer:.3f}",
            f"{result.copying.near_copies:.1%}",
        ]
        for result in results
    ]
    rows.append(["floor", f"{first.fd_floor:.2f}", f"{first.kid_floor:.4f}", *_of_manifold(floor), "0.500", "1.0%"])
    num_floor = min(first.floor_num_generated, first.floor_num_reference)
    notes = [
        f"reference: {reference}",
        first.sizes,
        f"precision to coverage: {results[0].num_manifold} against as many; floor: {num_floor} against as many",
        "closer: chance that a sample lies nearer to its nearest real image than a real one to its nearest other",
    ]
    return "\n".join([*_aligned([head, *rows]), *notes])


def class_table(result: "SetScore") -> str:
    """One row per class, those that differ most first."""
    classes = sorted(result.classes, key=_excess, reverse=True)
    head = [f"{result.name} by class", "n", "real", "KID", "real: +-", "nearest real of its class", "real"]
    rows = [
        [
            score.name,
            str(score.num_generated),
            str(score.num_reference),
            _number(score.kid, ".4f"),
            _number(score.kid_spread, ".4f"),
            _number(score.agreement, ".0%"),
            _number(score.agreement_real, ".0%"),
        ]
        for score in classes[:_MOST_CLASSES]
    ]
    more = len(classes) - len(rows)
    return "\n".join(["", *_aligned([head, *rows]), *([f"... and {more} more in the file"] if more else [])])


def _excess(score: ClassScore) -> float:
    if score.kid is None or not score.kid_spread:
        return -1.0
    return max(0.0, score.kid / score.kid_spread)


def _of_manifold(scores: Manifold | None) -> list[str]:
    if scores is None:
        return ["-"] * 4
    return [f"{value:.3f}" for value in (scores.precision, scores.recall, scores.density, scores.coverage)]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
