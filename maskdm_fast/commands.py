"""What the commands sample, evaluate and info do."""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from torch import Tensor

from maskdm_fast.data import ImageStore, open_dataset
from maskdm_fast.eval import subset_indices
from maskdm_fast.ops import IMPLEMENTATIONS, backend
from maskdm_fast.train.checkpoint import Weights, load_weights, write_json_atomic
from maskdm_fast.train.engine import make_world
from maskdm_fast.train.extras import require
from maskdm_fast.train.generation import generate
from maskdm_fast.train.metrics import git_commit, machine, package_versions
from maskdm_fast.train.progress import step_bar
from maskdm_fast.train.runs import default_cache_dir, open_store

tyro = require("tyro")

_FOLDER_IMAGE_SIZE = 64


@dataclass(frozen=True)
class SampleOptions:
    """Draw images from a run and save them as one grid, or one PNG file each.

    Image number i depends only on the weights, the seed and i, not on how many are drawn or in which batches.

    example: maskdm-fast sample runs/emoji32 --num-images 100 --steps 50 --out grid.png
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder (its newest checkpoint), the folder of a recipe (its last stage), or a checkpoint folder."""
    num_images: int = 64
    """Images to draw."""
    steps: int = 50
    """Evaluations of the network per image, 1 to 1000: more is slower and usually better."""
    sampler: Literal["ddim", "ddpm"] = "ddim"
    """ddim, or the ancestral ddpm, which wants more steps."""
    eta: float | None = None
    """Noise that ddim adds at each step: 0 (none, the default) to 1 (as much as ddpm)."""
    seed: int = 0
    """Seed of the noise."""
    weights: Literal["ema", "raw"] = "ema"
    """The moving average of the weights, or the trained weights themselves."""
    out: str | None = None
    """PNG file for a grid of all images. Default: RUN/samples/grid-SEED.png, unless --folder is given."""
    folder: str | None = None
    """Folder for one PNG file per image."""
    batch_size: int = 64
    """Images per evaluation of the network; changes speed and memory only."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:INDEX."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Score a run, or a folder of images, by Frechet and kernel distance to real images.

    Both are printed with the number of images and with the floor: what real images score against other real images. The
    Frechet distance is biased by the number of images; compare only equal numbers.

    example: maskdm-fast evaluate runs/emoji32 --num-images 500
    """

    run_or_folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|FOLDER")]
    """A run, recipe or checkpoint folder, from which images are drawn; or a folder of images."""
    data: str | None = None
    """The real images: emoji, or a folder. Default: what the run was trained on."""
    skip_bad: bool = False
    """Leave out image files that cannot be read (they are listed), instead of stopping."""
    num_images: int = 1000
    """Images to draw; of a folder of images, how many to use at most."""
    steps: int = 50
    """Evaluations of the network per image, 1 to 1000."""
    sampler: Literal["ddim", "ddpm"] = "ddim"
    """ddim, or the ancestral ddpm, which wants more steps."""
    eta: float | None = None
    """Noise that ddim adds at each step: 0 (none, the default) to 1 (as much as ddpm)."""
    seed: int = 0
    """Seed of the samples, and of the split behind the floor."""
    weights: Literal["ema", "raw"] = "ema"
    """The moving average of the weights, or the trained weights themselves."""
    features: str = "lite0"
    """Feature network: lite0 (EfficientNet-Lite0), or the path of the FID Inception as a TorchScript file."""
    image_size: int | None = None
    """Side in pixels at which a folder of images is compared. Default of a run: its own size; of a folder: 64."""
    batch_size: int = 64
    """Images per evaluation of the network that draws them."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:INDEX."""
    cache_dir: str | None = None
    """Where packed data sets and their features are kept; default as in train."""
    out: str | None = None
    """JSON file for the scores. Default: evaluation.json in the folder that was scored."""


@dataclass(frozen=True)
class InfoOptions:
    """Show what this machine can run, and what is missing: versions, devices, native library, backends of every op."""

    json: bool = False
    """Print one JSON object."""


def sample(options: SampleOptions) -> None:
    """Draw images, save them, and say where."""
    if options.num_images < 1 or options.batch_size < 1:
        raise ValueError("--num-images and --batch-size want at least 1")
    weights = load_weights(options.run, options.weights)
    from maskdm_fast.eval.grid import png_bytes, save_grid

    started = time.monotonic()
    images = _draw(weights, options, options.num_images)
    seconds = time.monotonic() - started
    print(
        f"{len(images)} images from {weights.checkpoint.path} ({options.weights} weights, {options.sampler}, "
        f"{options.steps} steps, seed {options.seed}) in {seconds:.1f} s"
    )
    if options.folder is not None:
        folder = Path(options.folder)
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images.numpy()):
            (folder / f"{options.seed}-{number:06d}.png").write_bytes(png_bytes(image))
        print(f"images: {folder}")
    if options.out is not None or options.folder is None:
        path = Path(options.out or Path(options.run) / "samples" / f"grid-{options.seed}.png")
        save_grid(images, path)
        print(f"grid: {path}")


def evaluate(options: EvaluateOptions) -> None:
    """Score images, print the scores with their floor, and write them as JSON."""
    if options.num_images < 2:
        raise ValueError(f"--num-images is {options.num_images}, want at least 2")
    from maskdm_fast.eval import cached_features, compare, load_features

    path = Path(options.run_or_folder)
    weights = _weights_or_none(path, options.weights)
    device = make_world(options.device).device
    network = load_features(options.features).to(device)
    reference = _reference(options, weights)
    generated = _generated(options, weights, reference.image_size)
    cache_dir = options.cache_dir or default_cache_dir()
    features = cached_features(reference.images, network, key=reference.header.checksum, cache_dir=cache_dir)
    scores = compare(generated, features, network, seed=options.seed)
    print(scores)
    out = Path(options.out or path / "evaluation.json")
    record: dict[str, Any] = {
        "scores": dataclasses.asdict(scores),
        "options": dataclasses.asdict(options),
        "checkpoint": None if weights is None else str(weights.checkpoint.path),
        "reference": {"name": reference.header.source, "checksum": reference.header.checksum},
        "commit": git_commit(),
        "versions": package_versions(),
        "machine": machine(),
    }
    write_json_atomic(out, record)
    print(f"written to {out}")


def info(options: InfoOptions) -> None:
    """Print what `collect_info` finds, as text or JSON."""
    found = collect_info()
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print("versions")
    for name, version in found["versions"].items():
        print(f"  {name:<14} {version or 'not installed'}")
    print(f"  {'commit':<14} {found['commit'] or 'not a checkout'}")
    print(f"machine\n  {found['machine']['system']}\n  {found['machine']['cpu']}")
    for name, value in {**found["machine"]["devices"], **found["native"]}.items():
        print(f"  {name:<14} {_in_words(value)}")
    print("ops")
    for op, backends in found["ops"].items():
        for name, state in backends.items():
            print(f"  {op:<22} {name:<10} {state}")


def collect_info() -> dict[str, Any]:
    """Versions, commit, machine, native library, and ``ops[op][backend]`` = ``"ok"`` or why not; JSON values."""
    return {
        "versions": package_versions(),
        "commit": git_commit(),
        "machine": machine(),
        "native": backend.native_info(),
        "ops": backend.status(IMPLEMENTATIONS),
    }


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_in_words(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _draw(weights: Weights, options: SampleOptions | EvaluateOptions, num_images: int) -> Tensor:
    with step_bar("sampling") as progress:
        return generate(
            weights.config,
            weights.tensors,
            num_images,
            num_steps=options.steps,
            sampler=options.sampler,
            eta=options.eta,
            seed=options.seed,
            batch_size=options.batch_size,
            device=make_world(options.device).device,
            progress=progress,
        )


def _weights_or_none(path: Path, which: Literal["ema", "raw"]) -> Weights | None:
    """The weights at `path`, or None if it is a folder without any, which then must be images."""
    if not path.is_dir():
        raise FileNotFoundError(f"no such folder: {path}")
    try:
        return load_weights(path, which)
    except FileNotFoundError:
        return None


def _reference(options: EvaluateOptions, weights: Weights | None) -> ImageStore:
    if weights is None:
        if options.data is None:
            raise ValueError(f"{options.run_or_folder} is no run, so --data must say which real images to compare with")
        size = options.image_size or _FOLDER_IMAGE_SIZE
        return _open(options, options.data, size)
    if options.image_size not in (None, weights.config.model.image_size):
        raise ValueError(
            f"--image-size is {options.image_size}, but the run draws {weights.config.model.image_size} px"
        )
    machine_config = dataclasses.replace(weights.config.machine, cache_dir=options.cache_dir)
    data = options.data or weights.config.data
    skip_bad = options.skip_bad or weights.config.skip_bad
    return open_store(dataclasses.replace(weights.config, data=data, skip_bad=skip_bad, machine=machine_config))


def _generated(options: EvaluateOptions, weights: Weights | None, image_size: int) -> Tensor:
    if weights is not None:
        return _draw(weights, options, options.num_images)
    store = _open(options, options.run_or_folder, image_size)
    # At random, since files are in the order of their names, and of their classes.
    chosen = subset_indices(len(store), min(options.num_images, len(store)), seed=options.seed)
    return store.batch(chosen)[0]


def _open(options: EvaluateOptions, data: str, image_size: int) -> ImageStore:
    cache_dir = options.cache_dir or default_cache_dir()
    return open_dataset(data, image_size, cache_dir=cache_dir, skip_bad=options.skip_bad)
