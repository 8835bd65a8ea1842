"""What a train step should cost on named hardware, and the benchmarks that measure it."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import maskdm_fast
from maskdm_fast.commands.estimate_table import StageEstimate, legend
from maskdm_fast.diffusion.mask_schedule import MaskSchedule
from maskdm_fast.diffusion.masking import NoMask, PatchMask
from maskdm_fast.train import PRESETS, Recipe, RunConfig
from maskdm_fast.train.config import DenoisingConfig
from maskdm_fast.train.estimate import estimate, hardware_here
from maskdm_fast.train.hardware import HARDWARE, HERE, NAMES

_BENCHMARKS = ("benchmarks.ops", "benchmarks.step", "benchmarks.sampling", "benchmarks.scaling", "benchmarks.predict")
_ROOT = Path(maskdm_fast.__file__).resolve().parents[1]
_PRESET = "small64"


@dataclass(frozen=True)
class BenchOptions:
    """Measure ops, train steps, sampling and engines against plain PyTorch, as `make bench` does; or with --estimate
    only calculate what a step should cost on named hardware."""

    estimate: bool = False
    """Print FLOPs, bytes, launches and expected time of every part of a step, and what bounds it; run no benchmark."""
    preset: str | None = None
    """With --estimate: which preset, small64 if none is named; every stage of a recipe."""
    mask_ratio: float | None = None
    """With --estimate: share of the patches that is masked, 0 to 1, instead of the preset's masks."""
    batch_size: int | None = None
    """With --estimate: images per step, instead of the preset's."""
    precision: Literal["bf16", "tf32", "fp32"] | None = None
    """With --estimate: of the products, instead of the preset's; tf32 is float32 whose products PyTorch was told to do
    in TF32."""
    hardware: str | None = None
    """With --estimate: a100, h100, h200 or b200 by their data sheets, here (this machine, by a quick probe), or all of
    them, which is the default."""
    gpu_report: bool = False
    """On a machine with a CUDA device: tests, parity, every op and train step against peers and peaks, and attention by
    length, in under ten minutes; written to benchmarks/results/."""
    json: bool = False
    """Print JSON: one object with --estimate, else one line for each benchmark."""


def bench(options: BenchOptions) -> None:
    """Run the benchmarks or the GPU report, or print the estimate.

    Raises:
        ValueError: an option that only an estimate has without ``--estimate``, an unknown name, a value out of range.
        RuntimeError: not in a checkout, or a benchmark failed.
    """
    if options.gpu_report and (options.estimate or options.json):
        raise ValueError("--gpu-report stands alone: it measures, prints words, and writes JSON to benchmarks/results/")
    if not options.estimate:
        for name in ("preset", "mask_ratio", "batch_size", "precision", "hardware"):
            if getattr(options, name) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')} goes with --estimate; the benchmarks have cases of their own"
                )
        if options.gpu_report:
            run_module("benchmarks.gpu_report")
        else:
            run_benchmarks(as_json=options.json)
        return
    stages = estimates(options, _machine_names(options.hardware))
    if options.json:
        print(
            json.dumps({"preset": options.preset or _PRESET, "stages": [stage.to_json() for stage in stages]}, indent=1)
        )
    else:
        print("\n\n".join([*map(str, stages), legend(stages)]))


def _machine_names(hardware: str | None) -> Sequence[str]:
    if hardware in (None, "all"):
        return NAMES
    if hardware not in NAMES:
        raise ValueError(f"--hardware is {hardware!r}, want one of {', '.join(NAMES)}, all")
    return (hardware,)


def estimates(options: BenchOptions, names: Sequence[str]) -> list[StageEstimate]:
    """The estimate of every stage of the preset on the machines of these names."""
    found = []
    for name, config in _stages(options):
        stage = estimate(config)
        precision = options.precision or config.precision
        machines = {name: hardware_here(config, stage, precision) if name == HERE else HARDWARE[name] for name in names}
        times = {name: stage.on(machine, precision) for name, machine in machines.items()}
        found.append(StageEstimate(name, stage, precision, machines, times))
    return found


def _stages(options: BenchOptions) -> list[tuple[str, RunConfig]]:
    """The runs of the preset, by name, with the values of the options."""
    name = options.preset or _PRESET
    if name not in PRESETS:
        raise ValueError(f"--preset is {name!r}, want one of {', '.join(PRESETS)}")
    preset = PRESETS[name]()
    runs = (
        [(f"{name} {stage}", run) for stage, run in preset.runs()] if isinstance(preset, Recipe) else [(name, preset)]
    )
    changes: dict[str, Any] = {}
    if options.batch_size is not None:
        changes["batch_size"] = options.batch_size
    if options.mask_ratio is not None:
        # The stages of a recipe differ in their masks; with one mask the first stands for all.
        runs = runs[:1]
        if not isinstance(runs[0][1].stage, DenoisingConfig):
            raise ValueError(f"--mask-ratio is for stages of denoising, but {name} distils whole images; leave it out")
        mask = PatchMask(options.mask_ratio) if options.mask_ratio else NoMask()
        changes |= {"mask": mask, "mask_schedule": MaskSchedule(), "unmasked_share": 0.0}
    found = []
    for name, run in runs:
        run = dataclasses.replace(run, stage=dataclasses.replace(run.stage, **changes))
        if options.precision is not None:
            run = dataclasses.replace(run, precision="bf16" if options.precision == "bf16" else "fp32")
        run.validate()
        found.append((name, run))
    return found


def run_benchmarks(*, as_json: bool = False) -> None:
    """Run every benchmark of the checkout, save the results and make the tables of the documents anew.

    Raises:
        RuntimeError: there is no checkout, or a benchmark failed.
    """
    for module in _BENCHMARKS:
        run_module(module, "--save", *(("--json",) if as_json else ()))
    run_module("benchmarks.readme")


def run_module(module: str, *arguments: str) -> None:
    """``python -m module arguments`` in the checkout that this package runs from; RuntimeError if there is none, or if
    it fails."""
    if not (_ROOT / "benchmarks" / "harness.py").exists():
        raise RuntimeError(
            f"the benchmarks are not part of the installed package, and {_ROOT} is no checkout of maskdm_fast: clone "
            "it and run `make bench` there; --estimate works anywhere"
        )
    code = subprocess.run([sys.executable, "-m", module, *arguments], cwd=_ROOT).returncode
    if code != 0:
        raise RuntimeError(f"python -m {module} failed with exit code {code}; what it said is above")
