"""Guided distillation: one evaluation of a student that is told the weight of guidance does the work of two."""

import dataclasses

import torch
from torch import Tensor, nn

from maskdm_fast import ops
from maskdm_fast.diffusion import Denoiser, TimestepDraw
from maskdm_fast.distill.regression import X0_WEIGHTS, Instant, Regression, check_schedules
from maskdm_fast.models import UViT
from maskdm_fast.models.layers import timestep_embedding

_STRENGTH_SCALE = 100.0
"""Weights of about 0..10 become the 0..1000 that the sinusoids are made for."""


class GuidedNetwork(nn.Module):
    """A network that is told the weight w of its guidance, added to the time token.

        token = time_tokens(t) + W e(100 w)

    with e the sinusoids of the time embedding and W ``[D, D]`` zero at the start: the student begins as its teacher,
    whatever it is told. Weights of a teacher go into `network`.

    Args:
        network: with classes; it takes ready time tokens.

    Raises:
        ValueError: if the network has no classes, so that there is nothing to guide.

    Source: Meng et al., "On Distillation of Guided Diffusion Models", CVPR 2023 (arXiv 2210.03142), section 3.1, for
    Fourier features of w beside those of the time (from secondary descriptions: the text was not at hand); the single
    matrix and its zeros are ours.
    """

    def __init__(self, network: UViT):
        super().__init__()
        if not network.config.num_classes:
            raise ValueError("GuidedNetwork: the network has num_classes=0, want classes for the guidance to follow")
        self.network = network
        self.strength_embed = nn.Parameter(torch.zeros(network.config.dim, network.config.dim))

    def initial_value(self, name: str, seed: int) -> Tensor:
        """As `UViT.initial_value`, float32 on the CPU; that of the new matrix is 0."""
        if name == "strength_embed":
            return torch.zeros(self.strength_embed.shape, device="cpu")
        return self.network.initial_value(name.removeprefix("network."), seed)

    def forward(
        self,
        tokens: Tensor,
        t: Tensor,
        ids_keep: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        strength: Tensor,
    ) -> Tensor:
        """As `UViT`, with `strength` w, ``[B]``."""
        return self.network(tokens, self.time_tokens(t, strength), ids_keep, labels, cu_seqlens)

    def time_tokens(self, t: Tensor, strength: Tensor) -> Tensor:
        """``[S, D]``, the tokens of times and weights, ``[S]`` each."""
        embedding = timestep_embedding(_STRENGTH_SCALE * strength, self.strength_embed.shape[1])
        return self.network.time_tokens(t) + ops.linear(embedding.to(self.strength_embed.dtype), self.strength_embed)

    def at(self, strength: float) -> "FixedStrength":
        """The network that is always told this weight, for samplers; it shares all parameters."""
        return FixedStrength(self, strength)


class FixedStrength(nn.Module):
    """A `GuidedNetwork` at one weight, with the call of a `UViT`: ``Denoiser(network.at(2.0), schedule)``.

    Args:
        network: the network.
        strength: w, 0 or more in general.
    """

    def __init__(self, network: GuidedNetwork, strength: float):
        super().__init__()
        self.network = network
        self.strength = strength

    def forward(
        self,
        tokens: Tensor,
        t: Tensor,
        ids_keep: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        t = t if t.ndim == 2 else self.time_tokens(t)
        return self.network.network(tokens, t, ids_keep, labels, cu_seqlens)

    def time_tokens(self, t: Tensor) -> Tensor:
        """``[S]`` to ``[S, D]``: a sampler asks once for the times of all its steps."""
        return self.network.time_tokens(t, torch.full(t.shape, self.strength, device=t.device))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidedDistillation(Regression):
    """The student learns the estimate of the teacher at the same state; the weight w is an input of the student.

        target = (1 + w) x0_teacher(xt, t, label) - w x0_teacher(xt, t, none),    w ~ U(least, greatest)

    Without `strengths` the target is the estimate of the teacher as it is, or guided by a fixed `guidance`. So a
    student of another prediction is made, for example one of v from a teacher of eps, as `ProgressiveDistillation`
    needs it. Such targets want a `clip` at the bound of the data: an x0 from eps has none where alpha is nearly 0.

    Args:
        timesteps: how t is drawn. Levels below the least noise of the schedule count as that one, for the weights have
            no bound there.

    Source: Meng et al., "On Distillation of Guided Diffusion Models", CVPR 2023 (arXiv 2210.03142), section 3.1; the
    loss as in ``diffusion_distillation/dpm.py`` of github.com/google-research/google-research.
    """

    strengths: tuple[float, float] | None = (0.0, 4.0)
    timesteps: TimestepDraw = dataclasses.field(default_factory=TimestepDraw)

    def __call__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        seed: int,
        step: int | Tensor,
        slots: Tensor,
    ) -> dict[str, Tensor]:
        """Loss of the student on a batch.

        Args:
            student: of a network that takes `strength`, such as `GuidedNetwork`, if there are `strengths`.
            teacher: frozen, in eval mode.
            images: uint8 ``[B, height, width, C]`` (or by `layout`), 0..255, or floating point in [-1, 1].
            labels: int64 ``[B]``, or None.
            seed: run seed.
            step: optimizer step.
            slots: int64 ``[B]`` on the device of `images`, places in the global batch.

        Returns:
            As `Regression.fit`.

        Raises:
            ValueError: if the two have different schedules, or there is guidance but no labels.
        """
        check_schedules(student, teacher)
        draw = {"seed": seed, "step": step, "slots": slots}
        t = self.timesteps(teacher.schedule, **draw).to(torch.float64)
        least = torch.full_like(t, teacher.schedule.noise_range[0])
        here = Instant.at(teacher.schedule, torch.maximum(t, teacher.schedule.t_of_log_snr(-2.0 * least.log())))
        strength = self.strength(**draw)
        xt, _ = self.noisy(images, here, **draw)
        with torch.no_grad():
            target = self.estimate(teacher, xt, here, labels, strength)
        return self.fit(student, target, xt, here, labels, strength, X0_WEIGHTS[self.weight](here.snr))
