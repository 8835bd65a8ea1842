"""What came out of `benchmarks.time_to_quality`: one JSON object per data set, a table, a figure."""

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.ttq_plan import PRETRAIN, SCRATCH, Arm
from benchmarks.ttq_train import FLOOR_NAME, SCORES_NAME
from maskdm_fast.diffusion.mask_text import format_mask
from maskdm_fast.diffusion.masking import NoMask
from maskdm_fast.train.extras import require

PAGE = harness.ROOT / "docs" / "time-to-quality.md"
BEGIN, END = "<!-- made by python -m benchmarks.time_to_quality report -->\n", "<!-- end -->"
_COLOURS = {SCRATCH: "#767676", "shares": ("#9ecae1", "#3182bd", "#08306b")}


def collect(out: Path, calibration: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Results of all data sets below `out`, whole or not.

    Args:
        out: folder of the runs.
        calibration: by which they were planned.

    Returns:
        For each data set ``{machine, versions, commit, command, calibration, data, settings, floor, budget, stages,
        rows}``. ``machine`` to ``commit`` are those of the calibration. A row is one arm at one time: ``{arm, mask,
        share, seconds, phase, seeds, fd: {mean, std, values}, kid: {...}, images, slowdown}``, where `phase` says which
        stage the weights come from, `images` counts those of that stage, and `slowdown` is the time that the stage
        really took over the calibrated one, for each seed.

    Raises:
        ValueError: there is no scored run, or runs of several budgets.
    """
    results = []
    for path in sorted(out.glob(f"*/{FLOOR_NAME}")):
        prepared = json.loads(path.read_text("utf-8"))
        runs = [json.loads(file.read_text("utf-8")) for file in sorted(path.parent.glob(f"seed-*/**/{SCORES_NAME}"))]
        if not runs:
            continue
        budgets = {run["run"]["budget"] for run in runs}
        if len(budgets) > 1:
            raise ValueError(f"{path.parent} holds runs of several budgets: {sorted(budgets)}")
        name = path.parent.name
        results.append(
            {
                **{key: calibration[key] for key in ("machine", "versions", "commit")},
                "command": harness.environment()["command"],
                "calibration": {
                    **{key: calibration[key] for key in ("command", "threads", "jobs", "repeats")},
                    "rows": [row for row in calibration["rows"] if row["data"] == name],
                },
                "data": {"name": name, **prepared["data"]},
                "settings": prepared["settings"],
                "floor": prepared["floor"],
                "budget": budgets.pop(),
                "stages": _stages(runs),
                "rows": _rows(runs),
            }
        )
    if not results:
        raise ValueError(f"{out} holds no scores; run `python -m benchmarks.time_to_quality run --out {out}` first")
    return results


def _stages(runs: Sequence[dict]) -> list[dict[str, Any]]:
    """The settings of every kind of stage, once."""
    keys = ("kind", "mask", "start", "step_ms", "batch_size", "lr", "warmup_images", "ema_half_life_images")
    return [dict(values) for values in dict.fromkeys(tuple((key, run["run"][key]) for key in keys) for run in runs)]


def _rows(runs: Sequence[dict]) -> list[dict[str, Any]]:
    found: dict[tuple[Arm, float], list[tuple[dict, dict]]] = defaultdict(list)
    for run in runs:
        about = run["run"]
        for arm in map(Arm.parse, about["arms"]):
            for point in run["points"]:
                # The masked part that arms share goes on beyond the ends of the shorter ones.
                if about["kind"] != PRETRAIN or point["fraction"] <= arm.share:
                    found[arm, point["fraction"]].append((about, point))
    ordered = sorted(found, key=lambda key: (key[0].mask is not None, str(key[0].mask), key[0].share, key[1]))
    return [_row(arm, fraction, found[arm, fraction]) for arm, fraction in ordered]


def _row(arm: Arm, fraction: float, found: Sequence[tuple[dict, dict]]) -> dict[str, Any]:
    found = sorted(found, key=lambda pair: pair[0]["seed"])
    about, first = found[0]
    return {
        "arm": str(arm),
        "mask": format_mask(arm.mask or NoMask()),
        "share": arm.share,
        "seconds": fraction * about["budget"],
        "phase": about["kind"],
        "seeds": [run["seed"] for run, _ in found],
        "fd": _summary([point["fd"] for _, point in found]),
        "kid": _summary([point["kid"] for _, point in found]),
        "images": first["images"],
        "slowdown": [round(point["train_seconds"] / point["calibrated_seconds"], 3) for _, point in found],
    }


def _summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation; None of a single value."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def _cell(summary: Mapping[str, Any], digits: int, most_seeds: int, *, best: bool) -> str:
    spread = f" ± {summary['std']:.{digits}f}" if summary["std"] is not None else ""
    fewer = f" ({len(summary['values'])})" if len(summary["values"]) < most_seeds else ""
    value = f"{summary['mean']:.{digits}f}"
    return (f"**{value}**" if best else value) + spread + fewer


def table(result: Mapping[str, Any]) -> str:
    """Markdown: mean and standard deviation over the seeds of every arm at every time, the best mean of a time bold."""
    rows, settings = result["rows"], result["settings"]
    times = sorted({row["seconds"] for row in rows})
    arms = dict.fromkeys(row["arm"] for row in rows)
    at = {(row["arm"], row["seconds"]): row for row in rows}
    visible = {row["mask"]: row["num_visible"] for row in result["calibration"]["rows"]}
    total = visible.get("none")
    most_seeds = max(len(row["seeds"]) for row in rows)
    # A time at which only some seeds were scored would compare means of different runs.
    best = {
        (score, time): min(
            (row[score]["mean"] for row in rows if row["seconds"] == time and len(row["seeds"]) == most_seeds),
            default=None,
        )
        for score in ("fd", "kid")
        for time in times
    }

    def cell(arm: str, time: float, score: str, digits: int) -> str:
        row = at.get((arm, time))
        if row is None:
            return ""
        text = _cell(row[score], digits, most_seeds, best=row[score]["mean"] == best[score, time])
        return f"*{text}*" if row["phase"] == PRETRAIN and "**" not in text else text

    titles = [f"{settings['fd_name']} at {time:g} s" for time in times] + [f"{settings['kid_name']} at {times[-1]:g} s"]
    lines = [f"| {result['data']['name']} | patches seen | {' | '.join(titles)} |", "|---|--:|" + "--:|" * len(titles)]
    for arm in arms:
        mask, _, share = arm.rpartition("@")
        seen = f"{visible[mask]} of {total}" if mask and total else f"{total}"
        name = f"`{mask}` for {float(share):.0%}" if mask else "whole images"
        cells = [cell(arm, time, "fd", 0) for time in times] + [cell(arm, times[-1], "kid", 3)]
        lines.append(f"| {name} | {seen} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _notes(result, most_seeds)]) + "\n"


def _notes(result: Mapping[str, Any], num_seeds: int) -> str:
    """What the reader of the table must know, one paragraph."""
    settings, floor, machine = result["settings"], result["floor"], result["machine"]
    calibration, slowdowns = result["calibration"], [value for row in result["rows"] for value in row["slowdown"]]
    speeds = ", ".join(f"`{row['mask']}` {row['images_per_s']:.0f} images/s" for row in calibration["rows"])
    return (
        f"Mean ± standard deviation over {num_seeds} seeds (in brackets: of fewer). Italic: still masked at that time. "
        f"EMA weights, {settings['num_samples']} samples, {settings['sampler']}, {settings['num_steps']} steps, "
        f"against {settings['num_reference']} real images; real images in their place score {floor['fd']:.0f} and "
        f"{floor['kid']:.3f} ({floor['num_images']} against {floor['num_reference']} others). Seconds are those of "
        f"{calibration['jobs']} x {calibration['threads']} threads on {machine['cpu']} ({machine['isa']}) as "
        f"calibrated: {speeds}. On the wall a run took {min(slowdowns):.2f} to {max(slowdowns):.2f} times as long, "
        "beside whatever else the machine did, other runs included. "
        f"torch {result['versions']['torch']}, commit {harness.short_commit(result['commit'])}."
    )


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Curves of the Frechet distance over seconds, one panel per mask, with the range of the seeds as a band.

    Dashed where an arm is still in masked pretraining.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    figure_module, ticker = require("matplotlib.figure", "eval"), require("matplotlib.ticker", "eval")
    rows = result["rows"]
    by_arm: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        by_arm[row["arm"]].append(row)
    masks = list(dict.fromkeys(row["mask"] for row in rows if row["mask"] != "none")) or ["none"]
    figure = figure_module.Figure(figsize=(1.0 + 3.4 * len(masks), 3.8), layout="constrained")
    panels = figure.subplots(1, len(masks), sharey=True, squeeze=False)[0]
    for axes, mask in zip(panels, masks, strict=True):
        shown = [arm for arm, found in by_arm.items() if arm == SCRATCH or found[0]["mask"] == mask]
        shares = [arm for arm in shown if arm != SCRATCH]
        for arm in shown:
            palette = _COLOURS["shares"]
            colour = _COLOURS[SCRATCH] if arm == SCRATCH else palette[shares.index(arm) * len(palette) // len(shares)]
            label = "whole images" if arm == SCRATCH else f"masked for {by_arm[arm][0]['share']:.0%}"
            _curve(axes, by_arm[arm], colour, label)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_xticks(sorted({row["seconds"] for row in rows}))
        axes.set_title(f"mask {mask}" if mask != "none" else "no mask", fontsize=10)
        axes.set_xlabel("seconds of training")
        axes.grid(True, axis="y", color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel(result["settings"]["fd_name"])
    figure.suptitle(f"{result['data']['name']}: lower is better", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _curve(axes: Any, rows: Sequence[Mapping[str, Any]], colour: str, label: str) -> None:
    times = [row["seconds"] for row in rows]
    axes.fill_between(
        times, [min(row["fd"]["values"]) for row in rows], [max(row["fd"]["values"]) for row in rows],
        color=colour, alpha=0.2, linewidth=0,
    )  # fmt: skip
    means = [row["fd"]["mean"] for row in rows]
    masked = sum(row["phase"] == PRETRAIN for row in rows)
    style = {"color": colour, "linewidth": 1.8, "marker": "o", "markersize": 3.5}
    if masked:
        # Up to and with the first point after the change: the curve leaves the last masked score.
        axes.plot(times[:masked], means[:masked], linestyle=(0, (3, 2)), **style)
    axes.plot(times[max(0, masked - 1) :], means[max(0, masked - 1) :], label=label, **style)


def updated(text: str) -> str:
    """`text` of the page with tables and figures made anew from every result file.

    Raises:
        ValueError: the text lacks the lines between which they stand.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} has no lines {BEGIN.strip()!r} and {END!r}")
    parts = []
    for path in sorted(harness.RESULTS.glob("time-to-quality-*.json")):
        result = json.loads(path.read_text("utf-8"))
        name = result["data"]["name"]
        parts.append(f"![{name}](time-to-quality-{name}.png)\n\n{table(result)}")
        if result["data"]["attribution"]:
            parts[-1] += f"\n{result['data']['attribution']}\n"
    return before + BEGIN + "\n".join(parts) + END + after
