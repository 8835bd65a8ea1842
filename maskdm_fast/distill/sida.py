"""Adversarial Score identity Distillation (SiDA): SiD, and a discriminator in the encoder of the fake network."""

import dataclasses
import functools
import math

import torch
from torch import Tensor

from maskdm_fast.diffusion import EDMSchedule, NoiseSchedule
from maskdm_fast.distill.critic import estimate_and_logits, logits, loss_if_fake, loss_if_real, noisy_real
from maskdm_fast.distill.fake_score import FakeBatch
from maskdm_fast.distill.levels import LevelDraw
from maskdm_fast.distill.networks import Networks, estimate, frozen, is_finite, only
from maskdm_fast.distill.sid import GeneratorView, SiD

_LARGEST_LOGIT = 10.0


@dataclasses.dataclass(frozen=True)
class SiDA(SiD):
    """SiD with images of the data set. The logits of an image are the features of its patches after the middle block of
    the fake network, averaged over their width: no parameters are added.

        fake:       SiD's loss + fake_adversarial W_f (softplus(-real) + softplus(generated)) / 2
        generator:  SiD's loss / 2 + adversarial M W softplus(-generated) / 2

    with the means over the patches, M values of an image, and the logits in the second line cut to +-10. Real and
    generated images get the same noise. W_f and W are what the weights w of the two losses are in the mean over the
    noise levels, W for data of variance 1/4, where ``mean|e|`` is known. The published code multiplies the mean
    discriminator loss of a GPU's images with the mean of their weights; the two here do not depend on which images
    share a GPU, and agree in the expectation of W_f.

    At first the fake network is trained alone, then the generator too, without a discriminator until it has learned to
    judge.

    Args:
        adversarial: factor of the generator's adversarial loss; 0.01 in the code.
        fake_adversarial: of the discriminator's; 1 for EDM teachers, 100 for EDM2's.
        freeze_images: from when on the generator is trained, in images seen.
        adversarial_from: from when on it has an adversarial loss, in images seen.

    Others as `SiD`, but alpha is 1.

    Source: Zhou et al., "Adversarial Score identity Distillation: Rapidly Surpassing the Teacher in One Step",
    ICLR 2025, and its code.
    """

    alpha: float = 1.0
    adversarial: float = 0.01
    fake_adversarial: float = 1.0
    freeze_images: int = 100_000
    adversarial_from: int = 200_000

    needs_images = True

    def trains_generator(self, images_seen: int) -> bool:
        """Once the fake network had `freeze_images` for itself."""
        return images_seen >= self.freeze_images

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
        """See `Method`; also the scalars ``denoising_loss`` and ``critic_loss``."""
        draw = {"seed": seed, "step": step, "slots": slots}
        batch = FakeBatch.draw(networks, self.fake_score.levels, self.guidance.label_drop, labels, **draw)
        shape, dtype = networks.generator.token_shape, batch.xt.dtype
        real_xt = noisy_real(images, shape, batch.alpha, batch.sigma, dtype=dtype, **draw)
        scale = self.guidance.fake_training
        fake, generated = estimate_and_logits(networks.fake, batch.xt, batch.t, batch.labels, scale)
        real = logits(networks.fake, real_xt, batch.t, batch.labels, scale)
        denoising = self.fake_score.loss(fake, batch.images, batch.alpha, batch.sigma, networks.fake.prediction)
        keep = is_finite(batch.images, generated, real)
        critic = 0.5 * (loss_if_real(only(real, keep)) + loss_if_fake(only(generated, keep)))
        critic = only(critic, keep)
        weight = _mean_fake_weight(self, networks.fake.schedule, networks.fake.prediction)
        loss = denoising + self.fake_adversarial * weight * critic
        return {
            "loss": loss.mean(),
            "loss_per_image": loss.detach(),
            "t": batch.t,
            "denoising_loss": denoising.detach().mean(),
            "critic_loss": critic.detach().mean(),
        }

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
        """See `Method`; also the scalars ``sid_loss`` and, once it counts, ``adversarial_loss``."""
        draw = {"seed": seed, "step": step, "slots": slots}
        judged = self.adversarial > 0.0 and images_seen >= self.adversarial_from
        view = GeneratorView.draw(networks, self.levels, labels, **draw)
        with frozen(networks.teacher.model, networks.fake.model):
            teacher = estimate(networks.teacher, view.xt, view.t, labels, self.guidance.teacher)
            if not judged:
                fake = estimate(networks.fake, view.xt, view.t, labels, self.guidance.fake)
            else:
                fake, generated = estimate_and_logits(networks.fake, view.xt, view.t, labels, self.guidance.fake)
                view.gate.keep_only(generated)
        sid = self.scale * view.loss(teacher, fake, self.weighting, self.alpha)
        if not judged:
            return view.results(0.5 * sid, teacher, fake, sid_loss=sid.detach().mean())
        keep = view.gate.keep
        adversarial = loss_if_real(only(generated, keep).clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT))
        weight = view.images.shape[1:].numel() * mean_weight(self.weighting, self.levels, networks.teacher.schedule)
        adversarial = self.adversarial * weight * only(adversarial, keep)
        scalars = {"sid_loss": sid.detach().mean(), "adversarial_loss": adversarial.detach().mean()}
        return view.results(0.5 * (only(sid, keep) + adversarial), teacher, fake, **scalars)


@functools.lru_cache(maxsize=64)
def mean_weight(weighting: str, levels: LevelDraw, schedule: NoiseSchedule) -> float:
    """The mean weight w of `SiD` over a draw of noise levels, were the data N(0, 1/4) in each value.

    Their denoiser has ``E|e| = sqrt(2 / (pi lambda))`` with ``lambda = 1/s^2 + 4``.
    """

    def weight(alpha: Tensor, sigma: Tensor) -> Tensor:
        karras = (alpha / sigma).square() + EDMSchedule.sigma_data**-2
        if weighting == "none":
            return torch.ones_like(karras)
        return karras if weighting == "karras" else (0.5 * math.pi * karras).sqrt()

    return levels.expectation(schedule, weight)


@functools.lru_cache(maxsize=64)
def _mean_fake_weight(method: SiDA, schedule: NoiseSchedule, prediction: str) -> float:
    """The mean weight on the squared error of x0 in the fake network's update."""
    fake_score = method.fake_score
    return fake_score.levels.expectation(schedule, lambda alpha, sigma: fake_score.of_x0(alpha, sigma, prediction))
