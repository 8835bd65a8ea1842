from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from maskdm_fast import cli
from maskdm_fast.eval.features import FeatureNetwork
from maskdm_fast.models import UViTConfig
from maskdm_fast.train import PRESETS, train

CLASSES = ("ants", "bees", "cats & dogs")


class Quarters(FeatureNetwork):
    """Mean colour of each quarter of the image, in place of the network of the scores, which is slow."""

    name, kernel_name, num_features, fingerprint = "FD-mean", "KID-mean", 12, "mean"

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    """Run in an empty folder, with its own cache, on one thread, with cheap features."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("maskdm_fast.commands.evaluation.load_features", lambda name: Quarters())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _save_images(folder, num_images, label):
    """Random images of 8 px, in which one channel is brighter than the others."""
    folder.mkdir()
    pixels = np.random.default_rng(label).integers(0, 120, (num_images, 8, 8, 3), dtype=np.uint8)
    pixels[..., label] += 80
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:03d}.png")


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """24, 12 and 8 images of three classes, of different colours."""
    folder = tmp_path_factory.mktemp("real")
    for label, (name, count) in enumerate(zip(CLASSES, (24, 12, 8), strict=True)):
        _save_images(folder / name, count, label)
    return folder


def _train(folder, data, *, channels=3, conditional=False):
    preset = PRESETS["smoke-pretrain"]()
    config = replace(
        preset,
        data=str(data),
        class_conditional=conditional,
        model=UViTConfig(image_size=8, patch_size=2, channels=channels, dim=16, depth=3, num_heads=2),
        stage=replace(preset.stage, num_images=32, label_drop=0.1 if conditional else 0.0),
        output=replace(preset.output, preview_images=0),
        machine=replace(preset.machine, device="cpu", cache_dir=str(folder.parent / "cache")),
    )
    train(config, folder)
    return folder


@pytest.fixture(scope="session")
def conditional_run(real, tmp_path_factory):
    """A run that tells the three classes apart."""
    return _train(tmp_path_factory.mktemp("runs") / "conditional", real, conditional=True)


@pytest.fixture(scope="session")
def grey_run(real, tmp_path_factory):
    """A run without classes, of one channel."""
    return _train(tmp_path_factory.mktemp("runs") / "grey", real, channels=1)


@pytest.fixture
def run():
    def run(*arguments) -> int:
        try:
            return cli.main([str(argument) for argument in arguments])
        except SystemExit as end:  # tyro's own errors and --help
            return end.code

    return run
