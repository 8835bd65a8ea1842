"""The command line: ``maskdm-fast {demo,pack,train,sample,evaluate,bench,info}``.

Exit codes: 0 done (also after SIGTERM or Ctrl-C, which save first); 1 training diverged; 2 the command cannot work
as given; 75 a step of training hung and the watchdog ended the process; 130 stopped by a second Ctrl-C.
"""

import argparse
import dataclasses
import difflib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from maskdm_fast.train.config import Recipe, RunConfig

T = TypeVar("T")

PROGRAM = "maskdm-fast"
TRACEBACK_VARIABLE = "MASKDM_FAST_TRACEBACK"

_USAGE = f"""\
usage: {PROGRAM} COMMAND [OPTIONS]

Masked diffusion training: pretrain on the visible patches of an image, fine-tune on whole images, sample, score.

commands:
  demo      train a small model two ways for the same time and compare them in a report (6 minutes on 2 CPU cores)
  pack      decode a large set of images, or import latents, into a store once
  train     start or resume a run from a preset
  sample    draw images from a run
  evaluate  score runs, folders of images and data sets against real images, in one table
  export    write the weights of a run to one safetensors file
  bench     measure against plain PyTorch, or estimate what a step costs on named hardware
  info      what this machine can run, and what is missing

examples:
  {PROGRAM} demo --smoke
  {PROGRAM} train emoji32 --pretrain.num-images 200000 --finetune.num-images 50000 --out runs/first
  {PROGRAM} sample runs/first --num-images 64 --out grid.png
  {PROGRAM} evaluate runs/first --num-images 500
  {PROGRAM} bench --estimate --preset celebahq-base --hardware h100

{PROGRAM} COMMAND --help explains the options of a command.
With {TRACEBACK_VARIABLE}=1 in the environment an error shows where it was raised.
"""


class UsageError(ValueError):
    """The command line cannot be understood; the message says how to mend it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors of the user are one line on stderr, not a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # OpenMP threads that spin while they wait take the cores from each other where other programs run too: training on
    # two cores shared with two other processes was three times slower. OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    speaker = PROGRAM
    if _is_one_of_several():
        speaker += f" [rank {os.environ.get('RANK')}]"
        # The deepspeed launcher appends it unless told not to; the environment has it, too.
        arguments = [argument for argument in arguments if not argument.startswith("--local_rank=")]
    warnings.showwarning = lambda message, *_, **__: print(f"{speaker}: warning: {message}", file=sys.stderr)
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        print(f"{speaker}: aborted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains again when it exits
        return 141
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        # By name: importing the classes would import torch, also when only --help is asked for.
        kind = type(error).__name__
        if kind != "PeerError" or os.environ.get("RANK") == "0":
            print(f"{speaker}: error: {error}", file=sys.stderr)
        return 1 if kind == "TrainingDivergedError" else 2


def _is_one_of_several() -> bool:
    """Whether a launcher has started other processes as well."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def run() -> NoReturn:
    """`main` as a program."""
    code = main()
    if code and _is_one_of_several():
        # Nothing may wait for the other processes now: they notice that this one is gone by its closed connections.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from maskdm_fast import __version__

        print(f"{PROGRAM} {__version__}")
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {
        "demo": _demo,
        "pack": _pack,
        "train": _train,
        "sample": _sample,
        "evaluate": _evaluate,
        "export": _export,
        "bench": _bench,
        "info": _info,
    }
    name, *rest = arguments
    if name not in commands:
        raise UsageError(
            f"unknown command '{name}'; the nearest is '{_nearest(name, commands)}' (see {PROGRAM} --help)"
        )
    return commands[name](rest)


def _train(arguments: list[str]) -> int:
    from maskdm_fast.train import PRESETS, Recipe, train, train_recipe
    from maskdm_fast.train.progress import format_seconds
    from maskdm_fast.train.world import disconnect, rank_from_environment

    if not arguments or arguments[0] in ("-h", "--help"):
        print(_train_usage(), end="")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in PRESETS:
        raise UsageError(
            f"unknown preset '{name}'; the nearest is '{_nearest(name, PRESETS)}' (see {PROGRAM} train --help)"
        )
    config, out, dry_run, num_processes = _train_options(name, rest)
    if dry_run:
        from maskdm_fast.train.estimate import describe
        from maskdm_fast.train.teachers import taught

        if rank_from_environment()[0] == 0:
            print(describe(taught(config, out), dry_run, num_processes))
        return 0
    result = train_recipe(config, out) if isinstance(config, Recipe) else train(config, out)
    if rank_from_environment()[0] == 0:
        print(
            f"{result.folder}: {result.images:,} images in {format_seconds(result.seconds)} of training, "
            f"ended by {result.reason}" + ("" if result.finished else "; the same command goes on")
        )
    disconnect()
    return 0


def _train_usage() -> str:
    from maskdm_fast.train.presets import FAMILIES, PRESETS

    names = {function: name for name, function in PRESETS.items()}
    width = max(map(len, PRESETS)) + 2
    rows = "\n".join(
        f"  {family}\n" + "\n".join(f"    {names[function]:<{width}}{function.__doc__}" for function in functions)
        for family, functions in FAMILIES.items()
    )
    return f"""\
usage: {PROGRAM} train PRESET [OPTIONS]

Start a run, or go on with the one in the run folder: the same command resumes, from the newest whole checkpoint.

presets:
{rows}

examples:
  {PROGRAM} train emoji32
  {PROGRAM} train emoji32-scratch --num-images 200000 --lr 5e-4 --out runs/scratch
  {PROGRAM} train small64 --data ~/pictures --pretrain.mask block:0.75:2 --micro-batch-size 64
  {PROGRAM} train emoji32-finetune --init-from runs/mine/1-pretrain --max-seconds 3600
  {PROGRAM} train celebahq-base --dry-run

{PROGRAM} train PRESET --help shows every option with its unit and its default in that preset.
"""


def _train_options(
    preset: str, arguments: list[str]
) -> "tuple[RunConfig | Recipe, Path, tuple[str, ...], tuple[int, ...]]":
    """The configuration of `preset` with the options of the command line, the run folder, and the machines of a dry
    run (none for a real one) and their numbers of processes."""
    from maskdm_fast.train.config import Recipe, RunConfig, SharedConfig
    from maskdm_fast.train.extras import require
    from maskdm_fast.train.hardware import HERE, NAMES
    from maskdm_fast.train.presets import PRESETS

    conf = require("tyro").conf
    config = PRESETS[preset]()
    shared = SharedConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(SharedConfig)})
    stages = dict(config.stages) if isinstance(config, Recipe) else {"stage": config.stage}
    # Options of a recipe's stages carry the stage's name (--pretrain.lr); where there is one stage they do not (--lr).
    out_help = "Run folder. If it holds a run that was begun with the same options, that run goes on."
    dry_run_help = "Print the configuration, its sizes and what it costs on this machine, and do nothing else."
    hardware_help = "With --dry-run: what it costs on these machines instead; by data sheets, or here by a quick probe."
    processes_help = (
        "With --dry-run: which engine the run takes in so many processes, and the memory of each; by default in as "
        "many as were started."
    )
    fields: list[tuple[str, Any, Any]] = [
        ("out", Annotated[str, conf.arg(help=out_help)], f"runs/{preset}"),
        ("dry_run", Annotated[bool, conf.arg(help=dry_run_help), conf.FlagCreatePairsOff], False),
        ("hardware", Annotated[tuple[Literal[NAMES], ...], conf.arg(help=hardware_help)], ()),  # type: ignore[valid-type]
        ("num_processes", Annotated[tuple[int, ...], conf.arg(help=processes_help)], ()),
        ("shared", Annotated[SharedConfig, conf.OmitArgPrefixes], dataclasses.field(default_factory=lambda: shared)),
    ]
    for name, stage in stages.items():
        kind = type(stage) if isinstance(config, Recipe) else Annotated[type(stage), conf.OmitArgPrefixes]
        fields.append((name, kind, dataclasses.field(default_factory=lambda stage=stage: stage)))
    options_type = dataclasses.make_dataclass("TrainOptions", fields, frozen=True)
    options_type.__doc__ = PRESETS[preset].__doc__
    options = _parse(options_type, arguments, f"{PROGRAM} train {preset}")
    values = {f.name: getattr(options.shared, f.name) for f in dataclasses.fields(SharedConfig)}
    if isinstance(config, Recipe):
        config = Recipe(**values, stages=tuple((name, getattr(options, name)) for name in stages))
    else:
        config = RunConfig(**values, stage=options.stage)
    config.validate()
    if options.hardware and not options.dry_run:
        raise UsageError("--hardware goes with --dry-run: it says which machines to estimate, not where to train")
    if options.num_processes and not options.dry_run:
        raise UsageError(
            "--num-processes goes with --dry-run: it says what to estimate; torchrun --nproc-per-node starts processes"
        )
    if any(number < 1 for number in options.num_processes):
        raise UsageError(f"--num-processes is {min(options.num_processes)}, want 1 or more")
    machines = (options.hardware or (HERE,)) if options.dry_run else ()
    return config, Path(options.out), machines, options.num_processes


def _pack(arguments: list[str]) -> int:
    from maskdm_fast import commands

    commands.pack(_parse(commands.PackOptions, arguments, f"{PROGRAM} pack"))
    return 0


def _sample(arguments: list[str]) -> int:
    from maskdm_fast import commands

    commands.sample(_parse(commands.SampleOptions, arguments, f"{PROGRAM} sample"))
    return 0


def _evaluate(arguments: list[str]) -> int:
    from maskdm_fast import commands

    commands.evaluate(_parse(commands.EvaluateOptions, arguments, f"{PROGRAM} evaluate"))
    return 0


def _export(arguments: list[str]) -> int:
    from maskdm_fast import commands

    commands.export(_parse(commands.ExportOptions, arguments, f"{PROGRAM} export"))
    return 0


def _bench(arguments: list[str]) -> int:
    from maskdm_fast import commands

    commands.bench(_parse(commands.BenchOptions, arguments, f"{PROGRAM} bench"))
    return 0


def _info(arguments: list[str]) -> int:
    from maskdm_fast import commands

    # Not by tyro, which comes with an extra: an install without it must be able to ask what is missing.
    program = f"{PROGRAM} info"
    parser = argparse.ArgumentParser(program, description=commands.info.__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options, unknown = parser.parse_known_args(arguments)
    _refuse(unknown, ["--json"], program)
    commands.info(as_json=options.json)
    return 0


def _demo(arguments: list[str]) -> int:
    from maskdm_fast import demo

    return demo.run(_parse(demo.DemoOptions, arguments, f"{PROGRAM} demo"))


def _parse(kind: type[T], arguments: list[str], program: str) -> T:
    """Fill the dataclass `kind` from the command line; tyro prints errors and help and raises SystemExit."""
    from maskdm_fast.train.extras import require

    tyro = require("tyro")
    settings = {"prog": program, "config": (tyro.conf.AvoidSubcommands,), "registry": _registry(tyro)}
    options, unknown = tyro.cli(kind, args=arguments, return_unknown_args=True, **settings)
    _refuse(unknown, _flags(kind), program)
    return options


def _refuse(unknown: list[str], flags: Iterable[str], program: str) -> None:
    """Raise UsageError for the first argument that a command does not take; `flags` are the options that it has."""
    if unknown:
        what = f"'{unknown[0]}' is one argument too many"
        if unknown[0].startswith("-"):
            what = f"unknown option '{unknown[0]}'; the nearest is '{_nearest(unknown[0], flags)}'"
        raise UsageError(f"{program}: {what} (see {program} --help)")


def _flags(kind: type, prefix: str = "", *, omit: bool = False) -> Iterator[str]:
    """The options that tyro makes of a dataclass, those without a place; `omit` leaves the names of its parts out."""
    from maskdm_fast.train.extras import require

    for name, hint in get_type_hints(kind, include_extras=True).items():
        inner, *more = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if require("tyro").conf.Positional in more:
            continue
        if not dataclasses.is_dataclass(inner):
            yield f"--{prefix}{name.replace('_', '-')}"
        elif omit or inner is not hint:
            yield from _flags(inner, prefix, omit=True)
        else:
            yield from _flags(inner, f"{prefix}{name}.")


def _registry(tyro: Any) -> Any:
    """Teaches tyro the text forms of masks and their schedules."""
    from maskdm_fast.diffusion import Mask, MaskSchedule, mask_text

    forms = [
        (Mask, mask_text.MASK_SYNTAX, mask_text.parse_mask, mask_text.format_mask),
        (
            MaskSchedule,
            mask_text.MASK_SCHEDULE_SYNTAX,
            mask_text.parse_mask_schedule,
            mask_text.format_mask_schedule,
        ),
    ]
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def text_rule(info: Any) -> Any:
        for kind, syntax, parse, text_of in forms:
            if info.type == kind:
                return tyro.constructors.PrimitiveConstructorSpec(
                    nargs=1,
                    metavar=syntax,
                    instance_from_str=lambda words, parse=parse: parse(words[0]),
                    is_instance=lambda value, kind=kind: isinstance(value, kind),
                    str_from_instance=lambda value, text_of=text_of: [text_of(value)],
                )
        return None

    return registry


def _nearest(name: str, known: Iterable[str]) -> str:
    """The most similar name; the part after a dot counts too, so that --lr finds --pretrain.lr."""

    def last(text: str) -> str:
        return text.lstrip("-").rpartition(".")[2]

    def similarity(candidate: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        return max(whole, difflib.SequenceMatcher(None, last(name), last(candidate)).ratio()), whole

    return max(known, key=similarity)


if __name__ == "__main__":
    run()
