"""Write the tables of the README and of docs/ from benchmarks/results and the kernel budget: ``python -m
benchmarks.readme``."""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import kernel_budget, scaling
from benchmarks.harness import RESULTS, ROOT, short_commit

BEGIN, END = "<!-- made by python -m benchmarks.readme -->\n", "<!-- end -->"
_GPU_GB = (24, 80)


def _ratio(row: dict[str, Any], peer: str) -> str:
    time = row["ms"][peer]
    return "" if time is None else f"{time / row['ms']['ours']:.2f} x"


def _source(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    return (
        f"{machine['cpu']} ({machine['isa']}), {machine['threads']} threads, torch {versions['torch']}, commit "
        f"{short_commit(result['commit'])}; `{result['command']}`"
    )


def step_table(step: dict[str, Any], sampling: dict[str, Any]) -> str:
    """Markdown: a train step and a sampling loop, and how many times as long the others take."""
    peers = {
        "plain": "plain PyTorch",
        "compiled": "compiled",
        "official_way": "published way",
        "matmul": "torch.mm alone",
    }
    lines = [
        f"| float32 | ours | {' | '.join(peers.values())} | masking efficiency |",
        f"|---|--:{'|--:' * len(peers)}|--:|",
    ]
    for row in step["rows"]:
        masked = f"{row['mask_ratio']:.0%} masked" if row["mask_ratio"] else "whole images"
        cells = [f"train step, `{row['size']}`, {masked}, batch {row['batch']}", f"{row['ms']['ours']:.0f} ms"]
        cells += [_ratio(row, peer) for peer in peers]
        lines.append(f"| {' | '.join(cells)} | {row['masking_efficiency'] or ''} |")
    for row in sampling["rows"]:
        name = f"{row['num_steps']} steps of DDIM, `{row['size']}`, {row['num_images']} images"
        times = f"{row['ms']['ours']:.0f} ms | {_ratio(row, 'plain')} | {_ratio(row, 'compiled')}"
        lines.append(f"| {name} | {times} | | | |")
    lines += [
        "",
        "How many times as long the others take, medians of interleaved repeats in one process, after a check that "
        "losses, gradients and images agree. *Plain PyTorch* is the same network and step as well written as PyTorch "
        "allows; *torch.mm alone* is nothing but the step's matrix products; *masking efficiency* is the time that "
        f"masking saves over the arithmetic that it saves. {_source(step)} and `{sampling['command']}`.",
    ]
    return "\n".join(lines) + "\n"


def ops_table(result: dict[str, Any]) -> str:
    """Markdown: every op, and how many times as long plain PyTorch takes, eager and compiled."""
    lines = [
        "| op, forward and backward | case | time | PyTorch eager | compiled | GB/s |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        cells = (f"`{row['op']}`", row["case"], f"{row['ms']['ours']:.2f} ms", _ratio(row, "eager"))
        lines.append(f"| {' | '.join(cells)} | {_ratio(row, 'compiled')} | {row['gb_per_s']:.0f} |")
    lines += [
        "",
        "How many times as long plain PyTorch takes: float32, medians of interleaved repeats in one process. GB/s "
        "counts every input read once and every output written once; a large copy reaches "
        f"{result['rows'][0]['copy_gb_per_s']:.0f}. {_source(result)}.",
        "",
        "A call on empty inputs, microseconds: "
        + ", ".join(f"`{row['op']}` {row['ours']:.0f} (eager {row['eager']:.0f})" for row in result["overhead_us"])
        + ".",
    ]
    return "\n".join(lines) + "\n"


def prediction_tables(result: dict[str, Any]) -> str:
    """Markdown: steps as the cost model predicts them from saved rates and as they were measured, and the presets on
    GPUs on which nothing was measured."""
    rates, machine = result["rates"], result["machine"]
    lines = [
        "| step, float32 | GFLOP | MB | launches | compute | memory | launches | predicted | measured | measured / "
        "predicted |",
        f"|---|{'--:|' * 9}",
    ]
    for row in result["steps"]:
        masked = f"{row['mask_ratio']:.0%} masked" if row["mask_ratio"] else "whole images"
        cells = [f"`{row['size']}`, {masked}, batch {row['batch']}", f"{row['gflop']:.0f}", f"{row['mb']:,.0f}"]
        cells += [
            f"{row['launches']:.0f}",
            *(f"{row[name + '_ms']:.1f} ms" for name in ("compute", "memory", "launches")),
        ]
        cells += [f"{row[name + '_ms']:.0f} ms" for name in ("predicted", "measured")]
        lines.append(f"| {' | '.join(cells)} | {row['measured_ms'] / row['predicted_ms']:.2f} |")
    lines += [
        "",
        f"{machine['cpu']} ({machine['isa']}), {rates['threads']} threads. Rates: {rates['flops'] / 1e9:.0f} GFLOP/s "
        f"in products, the median of the cases of `linear`; {rates['bandwidth'] / 1e9:.0f} GB/s, a large copy; "
        f"{rates['launch'] * 1e6:.1f} us a launch, half of an eager `gelu` of nothing, forward and backward: all from "
        f"`benchmarks.ops` at commit {short_commit(result['commits']['ops'])}. Steps: `benchmarks.step` at commit "
        f"{short_commit(result['commits']['step'])}.",
        "",
        "**Estimates; nothing of this was measured on a GPU.**",
        "",
        "| preset, bf16 | visible | batch | GFLOP | GB | launches | "
        + " | ".join(found["title"] for found in result["presets"][0]["hardware"].values())
        + " |",
        f"|---|{'--:|' * (5 + len(result['presets'][0]['hardware']))}",
    ]
    for row in result["presets"]:
        cells = [f"`{row['stage']}`", f"{row['visible']:.0f} of {row['patches']}", f"{row['batch_size']}"]
        cells += [f"{row['flops'] / 1e9:,.0f}", f"{row['bytes'] / 1e9:.1f}", f"{row['launches']:.0f}"]
        for found in row["hardware"].values():
            alone = row["batch_size"] / found["device_seconds"]
            captured = f", captured {alone:,.0f}" if found["bound"] == "launches" else ""
            cells.append(f"{found['images_per_s']:,.0f}{captured}; {found['mfu']:.0%}; {found['bound']}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Images per second of an eager step (where launches bound it, also of one captured in a CUDA graph); MFU; what "
        f"bounds it. Commit {short_commit(result['commit'])}, torch {result['versions']['torch']}; "
        f"`{result['command']}`.",
    ]
    return "\n".join(lines) + "\n"


def scaling_tables(result: dict[str, Any]) -> str:
    """Markdown: speed and memory of every engine by number of processes beside plain PyTorch, and how much memory each
    is expected to take of larger networks."""
    rows = {(row["engine"], row["processes"]): row for row in result["rows"]}
    counts = sorted({row["processes"] for row in result["rows"]})
    many = [f"{count} process{'es' * (count > 1)}" for count in counts]
    head = [f"{count}, {what}" for count in many for what in ("images/s", "of PyTorch", "MiB")]
    lines = [f"| engine | {' | '.join(head)} |", f"|---|{'--:|' * len(head)}"]
    for engine in scaling.ENGINES:
        cells = [f"`{engine}`" if engine != scaling.PEER else "PyTorch, DDP"]
        for count in counts:
            row, peer = rows.get((engine, count)), rows.get((scaling.PEER, count))
            if row is None:
                cells += ["", "", ""]
                continue
            ratio = f"{row['images_per_s'] / peer['images_per_s']:.2f} x" if peer else ""
            cells += [f"{row['images_per_s']:.1f}", ratio, f"{row['peak_mib']:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    workload, machine = result["workload"], result["machine"]
    where = f"the {machine['threads']} threads. Memory: the most that one held, Python and its libraries included."
    if machine["gpus"]:
        where = f"have a {machine['gpus'][0]} each. Memory: the most that tensors took there."
    lines += [
        "",
        f"A train step of {workload['batch']} images, {workload['mask_ratio']:.0%} masked, on a network of "
        f"{workload['num_params'] / 1e6:.1f} M parameters, {workload['precision']}. Processes share the batch and "
        f"{where} {_source(result)}.",
        "",
        "**Estimates for larger networks; nothing of this table was measured.**",
        "",
    ]
    engines = list(result["estimates"][0]["gib"])
    head = [*(f"`{engine}`" for engine in engines), *(f"fits {gib} GB" for gib in _GPU_GB)]
    lines += [f"| network | parameters | {' | '.join(head)} |", f"|---|{'--:|' * (1 + len(engines))}---|---|"]
    for row in result["estimates"]:
        cells = [row["network"], f"{row['num_params'] / 1e9:.2f} G"]
        for engine in engines:
            host = row["host_gib"][engine]
            cells.append(f"{row['gib'][engine]:.1f}" + (f" (+ {host:.1f})" if host else ""))
        for gigabytes in _GPU_GB:
            fitting = [f"`{engine}`" for engine in engines if row["gib"][engine] * 2**30 <= 0.9 * gigabytes * 1e9]
            cells.append(fitting[0] if fitting else "none")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"GiB of each of {scaling.ESTIMATED_PROCESSES} GPUs, in brackets of the host per GPU: bf16, 32 images of 256 "
        "tokens per GPU, three quarters masked (`maskdm_fast/train/memory.py`). *Fits*: the first engine that leaves a "
        "tenth of such a GPU free.",
    ]
    return "\n".join(lines) + "\n"


def _results(name: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}-*.json"))]


def pages() -> dict[Path, str]:
    """The text between the marks of each page, from every result file."""
    steps = zip(_results("step"), _results("sampling"), strict=True)
    return {
        ROOT / "README.md": "\n".join(step_table(*pair) for pair in steps),
        ROOT / "docs" / "measure.md": "\n".join(ops_table(result) for result in _results("ops")),
        ROOT / "docs" / "cost.md": "\n".join(prediction_tables(result) for result in _results("estimate")),
        ROOT / "docs" / "scaling.md": "\n".join(scaling_tables(result) for result in _results("scaling")),
        ROOT / "docs" / "kernels.md": kernel_budget.table(kernel_budget.load()),
    }


def updated(path: Path, table: str) -> str:
    """The text of a page with the part between its marks made anew; ValueError if it has no marks."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{path.name} has no lines {BEGIN.strip()!r} and {END!r}")
    return before + BEGIN + table + END + after


def main(arguments: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__).parse_args(arguments)
    for page, content in pages().items():
        page.write_text(updated(page, content))


if __name__ == "__main__":
    main()
