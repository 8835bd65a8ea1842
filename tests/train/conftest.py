from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskdm_fast.diffusion.masking import PatchMask
from maskdm_fast.models import UViTConfig
from maskdm_fast.train import RunConfig
from maskdm_fast.train.config import (
    DenoisingConfig,
    DiffusionConfig,
    MachineConfig,
    OutputConfig,
    ScoreDistillationConfig,
)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """24 random images of 8 px."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make_config(image_folder, cache_dir) -> Callable[..., RunConfig]:
    """A run of 12 steps that takes a few hundredths of a second; keywords go to the part that has them."""

    def make(**changes) -> RunConfig:
        def take(part):
            names = part.__dataclass_fields__.keys() & changes.keys()
            return replace(part, **{name: changes.pop(name) for name in names})

        config = RunConfig(
            data=str(image_folder),
            model=UViTConfig(image_size=8, patch_size=2, dim=16, depth=3, num_heads=2),
            machine=take(MachineConfig(device="cpu", cache_dir=str(cache_dir))),
            output=take(OutputConfig(log_images=8, checkpoint_images=16)),
            stage=take(
                DenoisingConfig(
                    mask=PatchMask(0.5),
                    num_images=48,
                    batch_size=4,
                    lr=1e-2,
                    warmup_images=8,
                    ema_half_life_images=16,
                    hflip=0.5,
                )
            ),
        )
        return replace(config, **changes)

    return make


@pytest.fixture
def make_student(make_config) -> Callable[..., RunConfig]:
    """6 steps of score distillation, as `make_config`; `kind` is another configuration of a distillation."""

    def make(kind: type = ScoreDistillationConfig, **changes) -> RunConfig:
        stage = {"teacher": "teacher", "num_images": 24, "batch_size": 4, "lr": 1e-3, "ema_half_life_images": 16}
        stage |= {name: changes.pop(name) for name in kind.__dataclass_fields__.keys() & changes.keys()}
        diffusion = DiffusionConfig(prediction="v")
        return make_config(**{"stage": kind(**stage), "diffusion": diffusion, "log_images": 4, **changes})

    return make
