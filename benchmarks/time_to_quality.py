"""Masked pretraining against training on whole images, for equal time: ``python -m benchmarks.time_to_quality``.

    calibrate   measure the time of a training step of every mask, in turns, on a quiet machine
    run         train every arm for the images that its budget buys at those times, and score it on the way
    report      write benchmarks/results/, a figure, and the table of docs/time-to-quality.md

A budget in seconds is turned into steps once, by the calibration, so neither a busy machine nor the number of threads
that train favours an arm, and a run can be repeated. ``run`` goes on where it was stopped.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import harness, ttq_report, ttq_train
from benchmarks.ttq_plan import Arm, Budget, Chain, Method, Prices, Task, make_chains
from maskdm_fast.train.checkpoint import write_json_atomic
from maskdm_fast.train.config import MachineConfig
from maskdm_fast.train.progress import format_seconds
from maskdm_fast.train.runs import make_folder
from maskdm_fast.train.signals import StopSignals

CALIBRATION_NAME = "calibration.json"
_QUIET = 0.5  # load average
MASKS = ("block:0.5:4", "block:0.75:4", "block:0.9:2")
SHARES = (0.25, 0.5, 0.75)
ARMS = ("scratch", *(f"{mask}@{share:g}" for mask in MASKS for share in SHARES))


def _calibrate(options: argparse.Namespace) -> int:
    out, path = Path(options.out), Path(options.out) / CALIBRATION_NAME
    if any(out.glob("*/seed-*")):
        raise ValueError(f"{out} holds runs that were planned with its calibration; choose another --out")
    make_folder(out)
    torch.set_num_threads(options.threads)
    result = harness.environment() | {"threads": options.threads, "jobs": options.jobs, "repeats": options.repeats}
    load = result["machine"].get("load_average", 0.0)
    if load > _QUIET:
        print(f"other processes are running (load {load}): step times may be wrong by as much", file=sys.stderr)
    result["rows"] = ttq_train.calibrate(
        _tasks(options), options.arms, threads=options.threads, jobs=options.jobs, repeats=options.repeats
    )
    write_json_atomic(path, result)
    for row in result["rows"]:
        print(
            f"{row['data']:<20}{row['mask']:<16}batch {row['batch_size']:<5}{row['num_visible']:>5} patches"
            f"{row['ms']:10.1f} ms{row['images_per_s']:10.1f} images/s"
        )
    print(f"written to {path}")
    return 0


def _run(options: argparse.Namespace) -> int:
    out = Path(options.out)
    calibration = _calibration(out)
    tasks = _tasks(options)
    budget = Budget(options.budget, tuple(options.fractions))
    chains = make_chains(tasks, options.arms, range(options.seeds), budget, Prices(calibration), out)
    scoring = ttq_train.Scoring(
        options.num_samples, options.steps, options.sampler, options.num_reference, options.features
    )
    print(_cost(chains, calibration, scoring), flush=True)
    if options.dry_run:
        return 0
    torch.set_num_threads(options.jobs * options.threads)
    for task in tasks:
        ttq_train.prepare(task, scoring, out)
    if options.jobs == 1:
        unfinished = ttq_train.run_chains(chains, scoring, jobs=1, threads=options.threads, stop=lambda: False)
    else:
        with StopSignals() as signals:
            unfinished = ttq_train.run_chains(
                chains, scoring, jobs=options.jobs, threads=options.threads, stop=lambda: signals.received is not None
            )
    if unfinished:
        print(f"{unfinished} of {len(chains)} chains are not finished; the same command goes on.", file=sys.stderr)
    return 1 if unfinished else 0


def _report(options: argparse.Namespace) -> int:
    out = Path(options.out)
    for result in ttq_report.collect(out, _calibration(out)):
        name = f"time-to-quality-{result['data']['name']}"
        harness.RESULTS.mkdir(exist_ok=True)
        path = harness.RESULTS / f"{name}-{harness.machine_slug(result['machine'])}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        ttq_report.draw(result, ttq_report.PAGE.with_name(f"{name}.png"))
        print(ttq_report.table(result))
        print(f"written to {path} and {ttq_report.PAGE.with_name(f'{name}.png')}\n")
    ttq_report.PAGE.write_text(ttq_report.updated(ttq_report.PAGE.read_text("utf-8")), encoding="utf-8")
    return 0


def _calibration(out: Path) -> dict:
    path = out / CALIBRATION_NAME
    if not path.exists():
        raise FileNotFoundError(f"no {path}: run `python -m benchmarks.time_to_quality calibrate --out {out}` first")
    return json.loads(path.read_text("utf-8"))


def _tasks(options: argparse.Namespace) -> list[Task]:
    method = Method.of(options.preset)
    machine = MachineConfig(device=options.device, cache_dir=options.cache_dir)
    return [Task.make(data, method, machine) for data in options.data]


def _cost(chains: Sequence[Chain], calibration: dict, scoring: ttq_train.Scoring) -> str:
    """What lies ahead, in words: every run, and all of it at the calibrated speed."""
    lines, training, scores = [], 0.0, 0
    for chain in chains:
        for run in chain.runs:
            seconds = (run.stops[-1] - run.start) * run.budget
            training, scores = training + seconds, scores + len(run.scored)
            stage = run.config.stage
            lines.append(
                f"{run.name}: {run.steps(run.stops[-1]) * stage.batch_size:,} images in steps of {stage.batch_size}, "
                f"{seconds:.0f} s, lr {stage.lr:g}, warm-up {stage.warmup_images:,} and EMA half-life "
                f"{stage.ema_half_life_images:,} images"
            )
    lines.append(
        f"{len(lines)} runs, {format_seconds(training)} of training at the calibrated speed ({calibration['jobs']} x "
        f"{calibration['threads']} threads), and {scores} scores of {scoring.num_samples} images x {scoring.num_steps} "
        "steps; what was done before is not done again"
    )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.time_to_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, function, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(function=function)
        added.add_argument("--out", default="runs/time-to-quality", help="folder of all runs (default: %(default)s)")
        return added

    def plan(added: argparse.ArgumentParser, threads: int, jobs: int) -> None:
        add = added.add_argument
        add("--data", nargs="+", default=["emoji"], help="emoji, folders of images, or of idx files (default: emoji)")
        add("--arms", nargs="+", type=_arm, default=[Arm.parse(arm) for arm in ARMS], metavar="scratch|MASK@SHARE")
        add("--preset", default="emoji32", help="recipe: model, batch sizes, learning rates (default: %(default)s)")
        add("--threads", type=_positive, default=threads, help="of each process (default: %(default)s)")
        add("--jobs", type=_positive, default=jobs, help="processes side by side (default: %(default)s)")
        add("--device", default="cpu", help="default: %(default)s")
        add("--cache-dir", help="where packed data sets and features are kept; default as in maskdm-fast train")

    cores = torch.get_num_threads()
    calibrate = command("calibrate", _calibrate, "Measure the time of a training step of every mask.")
    plan(calibrate, threads=cores, jobs=1)
    calibrate.add_argument("--repeats", type=_positive, default=21, help="samples of each (default: %(default)s)")
    run = command("run", _run, "Train and score every arm; goes on where it was stopped.")
    plan(run, threads=1, jobs=cores)
    scoring, budget = ttq_train.Scoring(), Budget(240.0)
    add = run.add_argument
    add("--budget", type=float, default=budget.seconds, help="seconds of training of each arm (default: %(default)s)")
    add("--fractions", type=float, nargs="+", default=budget.fractions, help="of it, when scores are taken")
    add("--seeds", type=_positive, default=3, help="repetitions (default: %(default)s)")
    add("--num-samples", type=_positive, default=scoring.num_samples, help="images per score (default: %(default)s)")
    add("--steps", type=_positive, default=scoring.num_steps, help="of the sampler (default: %(default)s)")
    add("--sampler", default=scoring.sampler, help="default: %(default)s")
    add("--num-reference", type=_positive, default=scoring.num_reference, help="real images (default: %(default)s)")
    add("--features", default=scoring.features, help="lite0, or a TorchScript file (default: %(default)s)")
    add("--dry-run", action="store_true", help="only show what would be trained")
    command("report", _report, "Write results, figure and table of all runs that there are.")
    return parser


def _arm(text: str) -> Arm:
    try:
        return Arm.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """The command line; see ``--help``. Returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.function(options)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
