"""Students of few steps beside their teacher: ``python -m benchmarks.distill --json``.

The teacher, a run of the preset emoji32, draws images in 250, 50, 10, 4 and 1 steps of DDIM; each student, a run of a
preset emoji32-distill-*, in its own. All are scored on equally many samples of the averaged weights against the data
set, and timed in turns. Runs that are missing are trained first, by their presets, which takes hours for all of them.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from maskdm_fast.eval import cached_features, compare, load_features, make_grid
from maskdm_fast.train import PRESETS, train, train_recipe
from maskdm_fast.train.config import Recipe
from maskdm_fast.train.extras import require
from maskdm_fast.train.generation import generate
from maskdm_fast.train.runs import default_cache_dir, open_store
from maskdm_fast.train.weights import Weights, load_weights

TEACHER = "emoji32"
TEACHER_STEPS = (250, 50, 10, 4, 1)
STUDENTS = tuple(f"{TEACHER}-distill-{method}" for method in ("sid", "sida", "dmd2", "progressive", "dxmi"))
BATCH_SIZE = 64
_SHOWN = 24


@dataclass(frozen=True)
class Sampler:
    """A run, and in how many steps its images are drawn."""

    run: str
    weights: Weights
    num_steps: int

    def draw(self, num_images: int, *, seed: int = 0) -> Tensor:
        """uint8 ``[num_images, h, w, C]``."""
        return generate(
            self.weights.config,
            self.weights.tensors,
            num_images,
            num_steps=self.num_steps,
            seed=seed,
            batch_size=BATCH_SIZE,
            device=torch.device("cpu"),
        )


def trained(name: str, runs: Path) -> Weights:
    """The averaged weights of the run of a preset, which is trained, or trained on, unless it is finished."""
    config = PRESETS[name]()
    (train_recipe if isinstance(config, Recipe) else train)(config, runs / name)
    return load_weights(runs / name)


def samplers(runs: Path, students: Sequence[str]) -> list[Sampler]:
    """The teacher at all its steps, then the students."""
    teacher = trained(TEACHER, runs)
    found = [Sampler(TEACHER, teacher, steps) for steps in TEACHER_STEPS]
    for name in students:
        weights = trained(name, runs)
        found.append(Sampler(name, weights, weights.config.stage.sampling_steps))
    return found


def measure(found: Sequence[Sampler], num_images: int, repeats: int) -> list[dict[str, Any]]:
    """One row each: ``{run, steps, fd_lite0, kid_lite0, images_per_s, speed}``, the last against ten teacher steps."""
    config = found[0].weights.config
    store = open_store(config)
    network = load_features("lite0")
    reference = cached_features(store.images, network, key=store.header.checksum, cache_dir=default_cache_dir())
    draws: dict[str, Callable[[], Tensor]] = {
        f"{sampler.run}/{sampler.num_steps}": lambda sampler=sampler: sampler.draw(BATCH_SIZE) for sampler in found
    }
    times = harness.interleave(draws, repeats)
    ten = times[f"{TEACHER}/10"]
    rows = []
    for sampler, time in zip(found, times.values(), strict=True):
        scores = compare(sampler.draw(num_images), reference, network, seed=0)
        rows.append(
            {
                "run": sampler.run,
                "steps": sampler.num_steps,
                "fd_lite0": round(scores.fd, 1),
                "kid_lite0": round(scores.kid, 4),
                "images_per_s": round(BATCH_SIZE / time * 1e3, 1),
                "speed": round(ten / time, 2),
                "images_trained": sampler.weights.checkpoint.state["images"],
            }
        )
    return rows


def draw_figure(found: Sequence[Sampler], path: Path) -> None:
    """The same noise, a row for each sampler."""
    figure = require("matplotlib.figure", "eval").Figure(figsize=(9.0, 0.62 * len(found)), layout="constrained")
    for axes, sampler in zip(figure.subplots(len(found), 1, squeeze=False)[:, 0], found, strict=True):
        axes.imshow(make_grid(sampler.draw(_SHOWN), _SHOWN))
        steps = f"{sampler.num_steps} step{'' if sampler.num_steps == 1 else 's'}"
        name = sampler.run.removeprefix(f"{TEACHER}-distill-") if sampler.run != TEACHER else "teacher"
        axes.set_ylabel(f"{name}\n{steps}", fontsize=7, rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def table(rows: Sequence[dict[str, Any]]) -> str:
    """`rows` for people."""
    lines = [f"{'run':<32}{'steps':>6}{'FD-lite0':>10}{'KID':>8}{'images/s':>10}{'speed':>9}"]
    for row in rows:
        lines.append(
            f"{row['run']:<32}{row['steps']:>6}{row['fd_lite0']:>10.1f}{row['kid_lite0']:>8.3f}"
            f"{row['images_per_s']:>10.1f}{row['speed']:>8.2f}x"
        )
    return "\n".join([*lines, "speed: against the teacher's ten steps"])


def main(arguments: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    parser = harness.command_line("distill", __doc__, repeats=5)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--students", nargs="*", choices=STUDENTS, default=STUDENTS, help="default: all")
    parser.add_argument("--num-images", type=int, default=2_000, help="that are scored (default: %(default)s)")
    parser.add_argument("--figure", type=Path, help="draw samples of all to this file")
    options = harness.prepare(parser, arguments)
    harness.refuse_to_save_a_part(parser, options, "students")
    if options.num_images < 2:
        parser.error("--num-images must be at least 2")
    found = samplers(options.runs, options.students)
    result = harness.environment()
    result["num_images"] = options.num_images
    result["rows"] = measure(found, options.num_images, options.repeats)
    if options.figure is not None:
        draw_figure(found, options.figure)
    if options.save:
        harness.save(result, "distill")
    print(json.dumps(result) if options.json else table(result["rows"]))


if __name__ == "__main__":
    main()
