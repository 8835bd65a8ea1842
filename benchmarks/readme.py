"""Write the table of the README from benchmarks/results: ``python -m benchmarks.readme``."""

import json
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- made by python -m benchmarks.readme -->\n", "<!-- end -->"


def _ratio(row: dict[str, Any], peer: str) -> str:
    time = row["ms"][peer]
    return "" if time is None else f"{time / row['ms']['ours']:.2f} x"


def table(result: dict[str, Any]) -> str:
    """Markdown: how many times as long plain PyTorch takes, eager and compiled, in the same run."""
    machine, versions = result["machine"], result["versions"]
    lines = [
        "| op, forward and backward | case | time | PyTorch eager | compiled |",
        "|---|---|--:|--:|--:|",
    ]
    for row in result["rows"]:
        cells = (f"`{row['op']}`", row["case"], f"{row['ms']['ours']:.2f} ms", _ratio(row, "eager"))
        lines.append(f"| {' | '.join(cells)} | {_ratio(row, 'compiled')} |")
    lines += [
        "",
        f"How many times as long plain PyTorch takes: float32, medians of interleaved repeats in one process. "
        f"{machine['cpu']} ({machine['isa']}), {machine['threads']} threads, torch {versions['torch']}, commit "
        f"{result['commit'][:9]}; `{result['command']}`.",
    ]
    return "\n".join(lines) + "\n"


def updated(text: str) -> str:
    """`text` of the README with its table made anew from every result file."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{README.name} has no lines {BEGIN.strip()!r} and {END!r}")
    tables = [table(json.loads(path.read_text())) for path in sorted(RESULTS.glob("ops-*.json"))]
    return before + BEGIN + "\n".join(tables) + END + after


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
