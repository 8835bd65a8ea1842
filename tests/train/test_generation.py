from dataclasses import replace

import pytest
import torch

from maskdm_fast.diffusion import PatchMask
from maskdm_fast.models import UViTConfig
from maskdm_fast.train import RunConfig
from maskdm_fast.train.config import DenoisingConfig, DiffusionConfig
from maskdm_fast.train.generation import generate, make_denoiser
from maskdm_fast.train.stages import Batch, build_stage
from maskdm_fast.train.world import World

CPU = torch.device("cpu")
CONFIG = RunConfig(
    model=UViTConfig(image_size=8, patch_size=4, dim=64, depth=1, num_heads=2, num_classes=3),
    stage=DenoisingConfig(mask=PatchMask(0.5), batch_size=4, lr=1e-2, num_images=100),
)


@pytest.mark.parametrize(
    "diffusion",
    [
        DiffusionConfig(),
        DiffusionConfig("shifted-cosine", "v", loss_weight="min-snr"),
        DiffusionConfig("linear", "x0", stratified=True),
        DiffusionConfig("vp", loss_weight="p2"),
        DiffusionConfig("flow", "flow", timesteps="lognormal", stratified=True),
        DiffusionConfig("edm", "edm", timesteps="lognormal", loss_weight="edm"),
    ],
    ids=lambda config: config.schedule,
)
def test_every_noise_process_trains_and_samples(diffusion):
    config = replace(CONFIG, diffusion=diffusion)
    config.validate()
    stage = build_stage(config, World(CPU))
    images = torch.full((4, 8, 8, 3), 200, dtype=torch.uint8)
    batch = Batch(images, torch.tensor([0, 1, 2, 0]), torch.arange(4))
    losses = torch.stack([stage.step([batch], step)["loss"] for step in range(60)])
    # Independent times make the loss of a step vary; the means of twenty do not vary as much as they fall.
    assert losses.isfinite().all() and losses[-20:].mean() < 0.95 * losses[:20].mean()
    tensors = stage.pieces()["model"]
    for sampler in ("ddim", "ddpm", "euler", "heun", "dpmpp_2m"):
        out = generate(config, tensors, 2, num_steps=3, sampler=sampler, device=CPU)
        assert out.shape == (2, 8, 8, 3) and out.dtype == torch.uint8
    assert stage.preview(2).shape == (2, 8, 8, 3)


def test_labels_and_guidance_reach_the_network():
    config = replace(CONFIG, diffusion=DiffusionConfig(prediction="v"))  # untrained eps would be clipped everywhere
    tensors = build_stage(config, World(CPU)).pieces()["model"]

    def draw(**options):
        return generate(config, tensors, 3, num_steps=4, device=CPU, **options).float()

    cycling = draw()
    assert torch.equal(draw(labels=torch.tensor([0, 1, 2])), cycling)
    other = draw(labels=torch.tensor([0, 1, 1]))
    assert torch.equal(other[:2], cycling[:2]) and not torch.equal(other[2], cycling[2])
    guided = draw(guidance=5.0)
    assert not torch.equal(guided, cycling)
    assert torch.equal(draw(guidance=5.0, guidance_interval=(1e8, 1e9)), cycling)
    unconditional = replace(CONFIG, model=replace(CONFIG.model, num_classes=0))
    tensors = build_stage(unconditional, World(CPU)).pieces()["model"]
    with pytest.raises(ValueError, match="guidance needs labels"):
        generate(unconditional, tensors, 1, num_steps=2, guidance=2.0, device=CPU)


def test_the_denoiser_is_that_of_the_run():
    config = replace(CONFIG, diffusion=DiffusionConfig("edm", "x0"))
    denoiser = make_denoiser(config, build_stage(config, World(CPU)).pieces()["model"], CPU)
    assert denoiser.prediction == "x0" and denoiser.schedule.num_timesteps is None
