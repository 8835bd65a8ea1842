"""What a run will cost, before it begins: tokens, arithmetic, memory traffic, memory and time.

The network is counted part by part (`costs`) and its launches on a real step (`launches`); the time on a machine is
what `roofline` says, memory and engine what `memory` says. It is an estimate.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from maskdm_fast.ops import backend
from maskdm_fast.ops.work import Work
from maskdm_fast.train.config import Recipe, RunConfig
from maskdm_fast.train.config_json import flatten
from maskdm_fast.train.costs import Counts, Part, total
from maskdm_fast.train.distill_config import DistillationConfig
from maskdm_fast.train.engine_choice import choose_engine
from maskdm_fast.train.hardware import HARDWARE, HERE, Hardware, probe
from maskdm_fast.train.launches import count_launches
from maskdm_fast.train.memory import ENGINES, Memory, Place, item_size, memory_per_rank
from maskdm_fast.train.networks import Network
from maskdm_fast.train.plan import model_of, plan_of
from maskdm_fast.train.progress import format_seconds
from maskdm_fast.train.roofline import Roofline, roofline
from maskdm_fast.train.world import make_world, rank_from_environment

_COLUMNS = {
    "weights": ("weights", "small weights", "gathered weights", "16-bit weights", "frozen weights"),
    "master": ("master weights",),
    "moments": ("moments",),
    "average": ("average",),
    "gradients": ("gradients", "flat gradients", "float32 gradients"),
    "activations": ("activations", "workspace", "trajectories"),
    "buckets": ("buckets",),
    "overhead": ("overhead",),
}
"""Columns of the table of memory, and what each of them adds up."""


@dataclass(frozen=True)
class Estimate:
    """Of one run, on whatever machine.

    Attributes:
        parameters: of the network.
        extras, patches: tokens of an image that are no patches, all patches.
        counts: visible patches of an image.
        precision: of products: bf16, fp16 or fp32.
        batch_size, num_micro: images of a step, micro-batches that they are cut into.
        parts: of a step.
        launches: of a step, by op.
        dense: the work of the same step without a mask.
        memory: of one process that holds everything.
        steps: optimizer steps of the whole run; None if only time ends it.
        max_seconds: the limit of the run's time.
    """

    parameters: int
    extras: int
    patches: int
    counts: Counts
    precision: str
    batch_size: int
    num_micro: int
    parts: list[Part]
    launches: Counter[str]
    dense: Work
    memory: Memory
    steps: int | None
    max_seconds: float | None

    @property
    def visible(self) -> float:
        """Mean visible patches of an image."""
        return sum(count * share for count, share in self.counts)

    @property
    def work(self) -> Work:
        """Of a step."""
        return total(self.parts)

    def on(self, hardware: Hardware, precision: str | None = None) -> Roofline:
        """A step on a machine, in the run's precision or another one of its peaks."""
        return roofline(self.parts, self.launches, hardware, precision or self.precision)

    def seconds(self, step_seconds: float) -> tuple[float, bool]:
        """Of the whole run if a step takes so long, and whether `max_seconds` ends it first."""
        whole = float("inf") if self.steps is None else self.steps * step_seconds
        limit = float("inf") if self.max_seconds is None else self.max_seconds
        return min(whole, limit), limit < whole


def estimate(config: RunConfig) -> Estimate:
    """What the run of `config` costs. Reads no data: a class-conditional run whose number of classes is not known yet
    is counted with one."""
    model, stage, machine, plan = model_of(config), config.stage, config.machine, plan_of(config)
    micro = min(machine.micro_batch_size or stage.batch_size, stage.batch_size)
    num_micro = -(-stage.batch_size // micro)
    options = {"num_micro": num_micro, "item": item_size(config), "optimizer": stage.optimizer}
    options |= {"checkpointing": machine.activation_checkpointing}
    whole = dataclasses.replace(plan, counts=[(model.num_tokens, 1.0)])
    return Estimate(
        parameters=plan.networks[0].values,
        extras=model.num_extras,
        patches=model.num_tokens,
        counts=plan.counts,
        precision=config.precision,
        batch_size=stage.batch_size,
        num_micro=num_micro,
        parts=plan.step_parts(stage.batch_size, **options),
        launches=count_launches(dataclasses.replace(config, model=model)).of_step(num_micro),
        dense=total(whole.step_parts(stage.batch_size, **options)),
        memory=memory_per_rank(config, "plain", 1),
        steps=None if stage.num_images is None else -(-stage.num_images // stage.batch_size),
        max_seconds=stage.max_seconds,
    )


def hardware_here(config: RunConfig, found: Estimate, precision: str) -> Hardware:
    """The machine at hand, measured with the widths and rows of a run."""
    rows = found.batch_size / found.num_micro * (found.visible + found.extras)
    return probe(config.model, round(rows), precision, make_world(config.machine.device).device)


def describe(config: RunConfig | Recipe, hardware: Sequence[str] = (HERE,), num_processes: Sequence[int] = ()) -> str:
    """The resolved configuration and the estimate of every run, as text; measures this machine if it is named.

    Args:
        config: validated.
        hardware: names of `HARDWARE`, or "here".
        num_processes: for which memory and engine are told; none: as many as the launcher started.

    Raises:
        ValueError: the batch cannot be divided evenly among so many processes.
    """
    runs = config.runs() if isinstance(config, Recipe) else [("", config)]
    shared, lines = None, []
    for name, run in runs:
        values = flatten(run.to_dict())
        stage = {key: values.pop(key) for key in list(values) if key.startswith("stage.") or key == "seed"}
        if shared is None:
            shared = values
            lines += ["configuration", *table(shared), ""]
        lines += [name or "run", *table({key.removeprefix("stage."): value for key, value in stage.items()})]
        lines += ["", *table(_in_words(run, hardware)), ""]
        for processes in num_processes or (rank_from_environment()[1],):
            lines += [*_memory_in_words(run, hardware, processes), ""]
    return "\n".join(lines).rstrip()


def _in_words(config: RunConfig, hardware: Sequence[str]) -> dict[str, str]:
    found = estimate(config)
    classes = config.class_conditional and not config.model.num_classes
    work, images = found.work, found.batch_size
    gain = {
        "unmasked": f"{amount(found.dense.flops / images)}FLOPs, {amount(found.dense.bytes / images)}B per image",
        "masking gain": f"{found.dense.flops / work.flops:.2f} x fewer FLOPs, "
        f"{found.dense.bytes / work.bytes:.2f} x fewer bytes",
    }
    return {
        **_networks_in_words(config),
        "parameters": f"{found.parameters:,}"
        + (f" with one class, and {config.model.dim} more for each class of the data set" if classes else ""),
        "tokens per image": f"{found.visible:.4g} of {found.patches} patches visible, and {found.extras} more",
        "work per image": f"{amount(work.flops / images)}FLOPs, {amount(work.bytes / images)}B read and written, "
        f"{work.intensity:.3g} FLOPs a byte",
        "launches": f"{sum(found.launches.values()):,.0f} a step",
        **(gain if found.visible < found.patches else {}),
        **{
            name: _time_in_words(
                found, HARDWARE[name] if name != HERE else hardware_here(config, found, found.precision)
            )
            for name in hardware
        },
    }


def _networks_in_words(config: RunConfig) -> dict[str, str]:
    """What a distillation has in memory, and what it asks of it."""
    stage, plan = config.stage, plan_of(config)
    if not isinstance(stage, DistillationConfig):
        return {}

    def often(share: float) -> str:
        if share == 1:
            return ""
        return f", {share:g} times a step" if share > 1 else f", in one of {1 / share:g} steps"

    def role(network: Network) -> str:
        if not network.trained:
            return "frozen"
        return "trained and averaged" if network.average else "trained"

    updates = [
        f"update of the {update.network}{often(update.share)}: "
        + ", ".join(f"{count:g} of the {name}" for name, count in plan.evaluations(update).items())
        for update in plan.updates
    ]
    return {
        "teacher": f"{stage.teacher}, not read here: the run has its network instead of the model above",
        "networks": "; ".join(f"{each.name}, {each.values:,} parameters, {role(each)}" for each in plan.networks),
        "evaluations per image": f"{'; '.join(updates)} (a backward pass is 2, one to the input alone 1)",
        **({"note": plan.note} if plan.note else {}),
    }


def _time_in_words(found: Estimate, machine: Hardware) -> str:
    time = found.on(machine)
    seconds, limited = found.seconds(time.step.seconds)
    length = "until max_seconds" if found.steps is None else f"{found.steps:,} steps"
    rates = f"{amount(machine.peaks[found.precision])}FLOP/s, {amount(machine.bandwidth)}B/s"
    return (
        f"{machine.title} ({rates}{'' if machine.is_named else ' ' + machine.source}): an estimate of "
        f"{time.step.seconds:.3g} s per step, bound by {time.step.bound}, "
        f"{found.batch_size / time.step.seconds:,.4g} images/s, {format_seconds(seconds)} in all "
        f"({length}{'; max_seconds ends it' if limited else ''})" + (f", {time.mfu:.1%} MFU" if time.mfu else "")
    )


def _memory_in_words(config: RunConfig, hardware: Sequence[str], processes: int) -> list[str]:
    """Which engine the run takes on every machine, and what a process takes under each, in so many processes."""
    here = make_world(config.machine.device).device if HERE in hardware else None
    engines = {}
    for name in hardware:
        title = HARDWARE[name].title if name != HERE else f"{here}, which is here"
        engines[f"engine on {title}"] = _engine_in_words(config, HARDWARE.get(name), here, processes)
    place: Place = "cpu" if here is not None and here.type == "cpu" and len(hardware) == 1 else "cuda"
    title = "one process" if processes == 1 else f"one of {processes} processes"
    rows = [["GB by engine", *_COLUMNS, "at most", *(["on the host"] if place == "cuda" else [])]]
    for engine in [name for name in ENGINES if name != ("ddp" if processes == 1 else "plain")]:
        memory = memory_per_rank(config, engine, processes, place=place)
        sums = [sum(map(memory.of, names)) for names in _COLUMNS.values()]
        rows.append([engine, *(_in_gb(size) for size in [*sums, memory.total])])
        if place == "cuda":
            rows[-1].append(_in_gb(memory.host_total))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[f"{first:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))]
             for first, *rest in rows]  # fmt: skip
    return [
        f"memory of {title} (at most: activations and the optimizer's step come one after the other)",
        *table(engines),
        *("  " + "  ".join(row) for row in cells),
    ]


def _engine_in_words(config: RunConfig, named: Hardware | None, here: torch.device | None, processes: int) -> str:
    """The engine of the run on a machine by its data sheet or, where there is none, on this one."""
    if named is not None:
        memory: tuple[float | None, float | None] = (named.memory, math.inf)
    else:
        # As if all processes ran on this machine.
        host = backend.device_memory(torch.device("cpu")) / processes
        memory = (host, None) if here.type == "cpu" else (backend.device_memory(here), host)
    try:
        engine, why = choose_engine(config, processes, *memory)
    except (ValueError, RuntimeError) as error:
        return f"none. {error}"
    return f"{engine}: {why}"


def _in_gb(size: float) -> str:
    return f"{size / 1e9:,.2f}" if size else "-"


def table(values: dict[str, object]) -> list[str]:
    """Lines of keys and values."""
    width = max(map(len, values)) + 2
    return [f"  {key:<{width}}{value}" for key, value in values.items()]


def amount(value: float) -> str:
    """Three digits and a decimal prefix: 3.41 G."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "
