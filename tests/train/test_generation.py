from dataclasses import replace

import pytest
import torch

from maskdm_fast import distill
from maskdm_fast.diffusion import PatchMask
from maskdm_fast.distill import Generator
from maskdm_fast.models import UViT, UViTConfig
from maskdm_fast.train import RunConfig
from maskdm_fast.train.config import DenoisingConfig, DiffusionConfig, ScoreDistillationConfig
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
    # Untrained eps would be clipped everywhere.
    stage = replace(CONFIG.stage, label_drop=0.1)
    config = replace(CONFIG, diffusion=DiffusionConfig(prediction="v"), stage=stage)
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
    with pytest.raises(ValueError, match="the run was not trained both with and without classes, so it cannot"):
        generate(CONFIG, tensors, 1, num_steps=2, guidance=2.0, device=CPU)
    unconditional = replace(CONFIG, model=replace(CONFIG.model, num_classes=0))
    tensors = build_stage(unconditional, World(CPU)).pieces()["model"]
    with pytest.raises(ValueError, match="guidance needs labels"):
        generate(unconditional, tensors, 1, num_steps=2, guidance=2.0, device=CPU)


def test_the_denoiser_is_that_of_the_run():
    config = replace(CONFIG, diffusion=DiffusionConfig("edm", "x0"))
    denoiser = make_denoiser(config, build_stage(config, World(CPU)).pieces()["model"], CPU)
    assert denoiser.prediction == "x0" and denoiser.schedule.num_timesteps is None


@pytest.mark.parametrize("trained_steps", ["all", "one"])
def test_a_student_is_sampled_in_its_own_steps(trained_steps):
    stage = ScoreDistillationConfig(num_steps=2, trained_steps=trained_steps)
    config = replace(CONFIG, diffusion=DiffusionConfig(prediction="v"), stage=stage)
    tensors = UViT(config.model, seed=3).state_dict()
    images = generate(config, tensors, 5, seed=7, first_slot=2, batch_size=2, device=CPU)
    denoiser = make_denoiser(config, tensors, CPU)
    shape = {"image_size": 8, "channels": 3, "patch_size": 4, "seed": 7}
    labels = torch.arange(2, 7) % 3
    student = Generator(denoiser, (4, 48), (2.5, 1.25))
    wanted = distill.generate(student, num_images=5, first_slot=2, labels=labels, batch_size=5, **shape)
    assert (images.int() - wanted.int()).abs().max() <= 1  # the order of sums depends on the batch
    assert torch.equal(
        generate(config, tensors, 5, num_steps=2, seed=7, first_slot=2, batch_size=2, device=CPU), images
    )
    with pytest.raises(ValueError, match="the run is a generator of 2 steps, but 1 were asked for"):
        generate(config, tensors, 1, num_steps=1, device=CPU)
    for option in ({"sampler": "heun"}, {"eta": 0.5}, {"guidance": 2.0}, {"guidance_interval": (0.1, 1.0)}):
        with pytest.raises(ValueError, match="the run is a generator, which has its own sampler: leave out sampler"):
            generate(config, tensors, 1, device=CPU, **option)


def test_latents_of_a_student_have_the_scale_of_the_autoencoder():
    model = replace(CONFIG.model, channels=4, num_classes=0)
    config = replace(CONFIG, model=model, diffusion=DiffusionConfig(prediction="v"), stage=ScoreDistillationConfig())
    scaled = replace(config, latent_scale=0.25, latent_shift=0.5)
    tensors = UViT(model, seed=3).state_dict()
    latents = generate(scaled, tensors, 3, seed=7, device=CPU)
    assert latents.shape == (3, 4, 8, 8) and latents.dtype == torch.float16
    with pytest.raises(ValueError, match="the run is a generator of 1 step, but 4 were asked for"):
        generate(scaled, tensors, 1, num_steps=4, device=CPU)
    pixels = generate(config, tensors, 3, seed=7, device=CPU).permute(
        0, 3, 1, 2
    )  # the same, rounded and cut to [-1, 1]
    assert (((latents.float() - 0.5) * 0.25).clamp(-1, 1) - (pixels / 127.5 - 1)).abs().max() < 0.01
