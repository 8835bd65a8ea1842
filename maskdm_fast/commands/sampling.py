"""Draw images from a run: as one grid, or as a folder with labels that can be trained on."""

import difflib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from maskdm_fast.commands.drawing import DrawOptions, draw
from maskdm_fast.commands.labelled_folder import MANIFEST_NAME, Drawn, LabelledFolder, folder_names
from maskdm_fast.commands.out_files import check_file
from maskdm_fast.train.config import DistillationConfig
from maskdm_fast.train.extras import require
from maskdm_fast.train.progress import format_seconds
from maskdm_fast.train.weights import Weights, load_weights

tyro = require("tyro")

_CLASS_SLOTS = 1 << 20  # slots of one class with --per-class, so that more images of one class change no other image
_MAX_SLOT = 1 << 32
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True, kw_only=True)
class SampleOptions(DrawOptions):
    """Draw images from a run: into one PNG file as a grid, or one file each into a folder.

    An image depends only on the weights, the options of the sampler, the seed, its number and its class, not on how
    many are drawn or in which batches.

    A folder gets one PNG file per image, in sub-folders by class where the run has classes, and manifest.jsonl, which
    says how each was drawn. It can be trained on as it is. The same command goes on where it was stopped; a larger
    --per-class or --num-images adds images.

    example: maskdm-fast sample runs/pets --per-class 500 --guidance 2 --out more-pets
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder (its newest checkpoint), the folder of a recipe (its last stage), a checkpoint folder, or a file
    that export wrote."""
    num_images: int = 64
    """Images to draw; a run with classes takes them in turn."""
    per_class: int | None = None
    """Draw so many of every class instead."""
    classes: tuple[str, ...] | None = None
    """Only these classes, by name or number."""
    labels: tuple[str, ...] | None = None
    """The class of each image, by name or number, instead of --num-images."""
    out: str | None = None
    """A file named *.png for a grid (with --per-class: a class per row), any other name for a folder. Of a run on
    latents a file named *.npy. Default: RUN/samples/grid-SEED.png, or latents-SEED.npy; of an exported file in the
    working directory."""

    def check(self) -> None:
        """Raise ValueError for the first value that cannot work, or does not fit another."""
        super().check()
        for name in ("num_images", "per_class"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}, want at least 1")
        if self.per_class is not None and self.per_class > _CLASS_SLOTS:
            raise ValueError(
                f"--per-class is {self.per_class}, want at most {_CLASS_SLOTS}; use another --seed for more"
            )
        for name in ("classes", "labels"):
            if getattr(self, name) == ():
                raise ValueError(f"--{name} names no class: name at least one, or leave it out")
        if self.labels is not None and (self.per_class is not None or self.classes is not None):
            raise ValueError("--labels says the class of each image: leave out --per-class and --classes")


def sample(options: SampleOptions) -> None:
    """Draw images, save them, and say where."""
    options.check()
    weights = load_weights(options.run, options.weights)
    names = weights.class_names
    planned = _plan(options, names)
    is_latent = weights.config.latents is not None
    default = f"latents-{options.seed}.npy" if is_latent else f"grid-{options.seed}.png"
    # An exported file has no folder of its own.
    out = Path(options.out or (default if Path(options.run).is_file() else Path(options.run, "samples", default)))
    started = time.monotonic()
    if is_latent:
        drawn, where = _latents(weights, options, planned, out)
    elif out.suffix.lower() == ".png":
        drawn = _grid(weights, options, planned, out)
        where = f"grid: {out}"
    else:
        drawn = _folder(weights, options, planned, names, out)
        where = f"images: {out}, {MANIFEST_NAME} says how each was drawn"
    guided = f", guidance {options.guidance}" if options.guidance != 1 else ""
    guided += f", value guidance {options.value_guidance}" if options.value_guidance else ""
    kind = "latents" if is_latent else "images"
    print(
        f"{drawn} {kind} from {weights.checkpoint.path} ({options.weights} weights, {_sampler(weights, options)}"
        f"{guided}, seed {options.seed}) in {time.monotonic() - started:.1f} s\n{where}"
    )


def _sampler(weights: Weights, options: SampleOptions) -> str:
    stage = weights.config.stage
    steps = stage.sampling_steps if options.steps is None else options.steps
    name = "" if isinstance(stage, DistillationConfig) else f"{options.sampler}, "
    return f"{name}{steps} step{'' if steps == 1 else 's'}"


def _plan(options: SampleOptions, names: list[str]) -> list[tuple[int, int | None]]:
    """(slot, label) of every image."""
    if not names:
        for option in ("per_class", "classes", "labels"):
            if getattr(options, option) is not None:
                raise ValueError(
                    f"{options.run} was trained without classes, so --{option.replace('_', '-')} means nothing: leave "
                    "it out, or train with --class-conditional"
                )
        return [(slot, None) for slot in range(options.num_images)]
    if options.labels is not None:
        return list(enumerate(_label(text, names) for text in options.labels))
    labels = list(range(len(names)))
    if options.classes is not None:
        labels = list(dict.fromkeys(_label(text, names) for text in options.classes))
    if options.per_class is None:
        return [(slot, labels[slot % len(labels)]) for slot in range(options.num_images)]
    if max(labels) >= _MAX_SLOT // _CLASS_SLOTS:
        raise ValueError(f"--per-class works for up to {_MAX_SLOT // _CLASS_SLOTS} classes: give --labels")
    return [(label * _CLASS_SLOTS + number, label) for label in labels for number in range(options.per_class)]


def _label(text: str, names: list[str]) -> int:
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    near = difflib.get_close_matches(text, names, n=1, cutoff=0)[0]
    raise ValueError(f"no class {text!r}; the nearest is {near!r}, and numbers go from 0 to {len(names) - 1}")


def _batches(planned: list[tuple[int, int | None]], batch_size: int) -> list[slice]:
    """Parts of at most `batch_size` images whose slots follow each other."""
    parts, start = [], 0
    for end in range(1, len(planned) + 1):
        if end == len(planned) or end - start == batch_size or planned[end][0] != planned[end - 1][0] + 1:
            parts.append(slice(start, end))
            start = end
    return parts


def _draw_part(weights: Weights, options: SampleOptions, part: list[tuple[int, int | None]]) -> torch.Tensor:
    labels = None if part[0][1] is None else torch.tensor([label for _, label in part])
    return draw(weights, options, len(part), first_slot=part[0][0], labels=labels)


def _grid(weights: Weights, options: SampleOptions, planned: list[tuple[int, int | None]], out: Path) -> int:
    from maskdm_fast.eval.grid import save_grid

    check_file(out)
    # Consecutive slots in one call, which splits them into batches and shows its progress.
    images = [_draw_part(weights, options, planned[part]) for part in _batches(planned, len(planned))]
    save_grid(torch.cat(images), out, columns=options.per_class)
    return len(planned)


def _latents(
    weights: Weights, options: SampleOptions, planned: list[tuple[int, int | None]], out: Path
) -> tuple[int, str]:
    """Write latents, and their labels beside them, as `maskdm_fast.data.latent_source` reads them."""
    if out.suffix != ".npy":
        raise ValueError(
            f"{options.run} was trained on latents, which are no pictures before their autoencoder has decoded them: "
            f"want --out NAME.npy, not {str(out)!r}"
        )
    check_file(out)
    latents = torch.cat([_draw_part(weights, options, planned[part]) for part in _batches(planned, len(planned))])
    labels = [label for _, label in planned if label is not None]
    out.parent.mkdir(parents=True, exist_ok=True)
    np.save(out, latents.numpy())
    beside = ""
    if labels:
        np.save(out.with_name(f"{out.stem}-labels.npy"), np.array(labels))
        beside = f", labels beside it in {out.stem}-labels.npy"
    shape = ", ".join(map(str, latents.shape))
    return len(planned), f"latents: {out}, float16 [{shape}] in the scale of their autoencoder{beside}"


def _folder(
    weights: Weights, options: SampleOptions, planned: list[tuple[int, int | None]], names: list[str], out: Path
) -> int:
    wanted = _records(weights, options, planned, names)
    with LabelledFolder.open(out) as folder:
        missing = folder.missing(wanted)
        if len(missing) < len(wanted):
            print(f"{len(wanted) - len(missing)} of {len(wanted)} images are there already")
        slots = [(drawn.slot, drawn.label) for drawn in missing]
        started = told = time.monotonic()
        for part in _batches(slots, options.batch_size):
            images = _draw_part(weights, options, slots[part])
            folder.write(zip(missing[part], images.numpy(), strict=True))
            if time.monotonic() - told > _SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                left = (told - started) * (len(missing) / part.stop - 1)
                print(f"{part.stop} of {len(missing)} images, {format_seconds(left)} left", flush=True)
    return len(missing)


def _records(
    weights: Weights, options: SampleOptions, planned: list[tuple[int, int | None]], names: list[str]
) -> list[Drawn]:
    group = "ema" if options.weights == "ema" else "model"
    shared = {
        "seed": options.seed,
        "sampler": options.sampler,
        "steps": weights.config.stage.sampling_steps if options.steps is None else options.steps,
        "eta": options.eta,
        "guidance": options.guidance,
        "guidance_interval": None if options.guidance_interval is None else list(options.guidance_interval),
        "value_guidance": options.value_guidance,
        "checkpoint": str(weights.checkpoint.path),
        "weights": options.weights,
        "weights_sha256": weights.checkpoint.sha256(group),
    }
    folders = folder_names(names)
    records = []
    for slot, label in planned:
        number = f"{options.seed}-{slot % _CLASS_SLOTS if options.per_class else slot:06d}.png"
        file = number if label is None else f"{folders[label]}/{number}"
        records.append(
            Drawn(file=file, class_name=None if label is None else names[label], label=label, slot=slot, **shared)
        )
    return records
