"""Distribution Matching Distillation (DMD2): the gradient of a reverse KL divergence, and a discriminator."""

import dataclasses

import torch
from torch import Tensor

from maskdm_fast.distill.critic import logits, loss_if_fake, loss_if_real, noisy_real
from maskdm_fast.distill.fake_score import FakeBatch, FakeScore
from maskdm_fast.distill.levels import LevelDraw
from maskdm_fast.distill.networks import GuidanceScales, Networks, add_noise, estimate, frozen, is_finite, only
from maskdm_fast.distill.sid import GeneratorView, check_weighting
from maskdm_fast.random import Stream


@dataclasses.dataclass(frozen=True)
class DMD2:
    """Both updates of DMD2. The generator's images get the gradient

        w (f_fake(xt, t) - f_teacher(xt, t)) / M

    with M values of an image and w as in `SiD`; neither network is differentiated, so a step costs less than one of
    SiD. It is that of the Kullback-Leibler divergence at each noise level, times ``sigma^2 / alpha^2``. The
    discriminator is a head on the encoder of the fake network (`critic.Critic`), which sees real and generated images
    at noise levels of its own:

        fake:       denoising loss + fake_adversarial (softplus(-real) + softplus(generated))
        generator:  the above + adversarial softplus(-generated)

    With both factors 0 it needs no images: that is Diff-Instruct, with a normaliser.

    Args:
        weighting: as `SiD`.
        levels: noise levels of the distribution matching.
        fake_score: the fake network's update.
        critic_levels: noise levels at which the discriminator judges.
        adversarial: factor of the generator's adversarial loss.
        fake_adversarial: of the discriminator's.
        guidance: scales of classifier-free guidance.

    Raises:
        ValueError: if there is no such weighting, or one of the two adversarial factors alone is 0.

    Source: Yin et al., "Improved Distribution Matching Distillation for Fast Image Synthesis", NeurIPS 2024, and its
    code, for ImageNet; Luo et al., "Diff-Instruct: A Universal Approach for Transferring Knowledge From Pre-trained
    Diffusion Models", NeurIPS 2023.
    """

    weighting: str = "l1"
    # From 2 % to 98 % of the ladder of noise levels from 0.002 to 80, even in s^(1/7).
    levels: LevelDraw = dataclasses.field(default_factory=lambda: LevelDraw("karras", 0.00323, 71.7))
    fake_score: FakeScore = dataclasses.field(
        default_factory=lambda: FakeScore(levels=LevelDraw("karras", greatest=80.0), reduction="mean")
    )
    critic_levels: LevelDraw = dataclasses.field(default_factory=lambda: LevelDraw("karras", greatest=80.0))
    adversarial: float = 3e-3
    fake_adversarial: float = 1e-2
    guidance: GuidanceScales = dataclasses.field(default_factory=GuidanceScales)

    input_level = 80.0
    fake_updates = 5

    def __post_init__(self):
        check_weighting(self.weighting)
        if (self.adversarial == 0.0) != (self.fake_adversarial == 0.0):
            raise ValueError(
                f"adversarial is {self.adversarial} and fake_adversarial {self.fake_adversarial}: a discriminator is "
                "trained and used, or neither"
            )

    @property
    def needs_images(self) -> bool:
        """With a discriminator."""
        return self.fake_adversarial != 0.0

    def trains_generator(self, images_seen: int) -> bool:
        """Always."""
        return True

    def fake_loss(
        self,
        networks: Networks,
        labels: Tensor | None,
        images: Tensor | None = None,
        *,
        seed: int,
        step: int | Tensor,
        slots: Tensor,
    ) -> dict[str, Tensor]:
        """See `Method`; also the scalars ``denoising_loss`` and, with a discriminator, ``critic_loss``."""
        draw = {"seed": seed, "step": step, "slots": slots}
        batch = FakeBatch.draw(networks, self.fake_score.levels, self.guidance.label_drop, labels, **draw)
        fake = estimate(networks.fake, batch.xt, batch.t, batch.labels, self.guidance.fake_training)
        loss = self.fake_score.loss(fake, batch.images, batch.alpha, batch.sigma, networks.fake.prediction)
        scalars = {"denoising_loss": loss.detach().mean()}
        if self.needs_images:
            critic = self._critic_loss(networks, batch.images, images, labels, **draw)
            scalars["critic_loss"] = critic.detach().mean()
            loss = loss + self.fake_adversarial * critic
        return {"loss": loss.mean(), "loss_per_image": loss.detach(), "t": batch.t, **scalars}

    def generator_loss(
        self,
        networks: Networks,
        labels: Tensor | None,
        *,
        seed: int,
        step: int | Tensor,
        slots: Tensor,
        images_seen: int = 0,
    ) -> dict[str, Tensor]:
        """See `Method`; also the scalars ``matching_loss`` and, with a discriminator, ``adversarial_loss``.

        Only its gradient makes the matching loss what it is. Its value is ``w mean d e`` in the letters of `SiD`, which
        in the mean is the Fisher divergence once the fake network has converged.
        """
        draw = {"seed": seed, "step": step, "slots": slots}
        view = GeneratorView.draw(networks, self.levels, labels, **draw)
        with torch.no_grad():
            teacher = estimate(networks.teacher, view.xt, view.t, labels, self.guidance.teacher)
            fake = estimate(networks.fake, view.xt, view.t, labels, self.guidance.fake)
        matching = view.loss(teacher, fake, self.weighting, 0.0) / view.images.shape[1:].numel()
        scalars = {"matching_loss": matching.detach().mean()}
        if not self.needs_images:
            return view.results(matching, teacher, fake, **scalars)
        t = self.critic_levels(networks.fake.schedule, stream=Stream.CRITIC_TIMESTEP, **draw)
        alpha, sigma = networks.fake.schedule.alpha_sigma(t)
        with frozen(networks.fake.model):
            generated = logits(networks.fake, add_noise(view.gate(view.images), alpha, sigma, **draw), t, labels)
        view.gate.keep_only(generated)
        keep = view.gate.keep
        adversarial = self.adversarial * only(loss_if_real(only(generated, keep)), keep)
        scalars["adversarial_loss"] = adversarial.detach().mean()
        return view.results(only(matching, keep) + adversarial, teacher, fake, **scalars)

    def _critic_loss(
        self,
        networks: Networks,
        generated: Tensor,
        images: Tensor | None,
        labels: Tensor | None,
        *,
        seed: int,
        step: int | Tensor,
        slots: Tensor,
    ) -> Tensor:
        """Per image ``[B]``, from one call on both kinds of images."""
        draw = {"seed": seed, "step": step, "slots": slots}
        t = self.critic_levels(networks.fake.schedule, stream=Stream.CRITIC_TIMESTEP, **draw)
        alpha, sigma = networks.fake.schedule.alpha_sigma(t)
        real_xt = noisy_real(images, networks.generator.token_shape, alpha, sigma, dtype=generated.dtype, **draw)
        xt = add_noise(only(generated, is_finite(generated)), alpha, sigma, **draw)
        both = None if labels is None else labels.repeat(2)
        of_generated, of_real = logits(networks.fake, torch.cat((xt, real_xt)), t.repeat(2), both).chunk(2)
        keep = is_finite(generated, of_generated, of_real)
        return only(loss_if_fake(only(of_generated, keep)) + loss_if_real(only(of_real, keep)), keep)
