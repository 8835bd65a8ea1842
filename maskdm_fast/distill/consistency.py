"""Consistency models in discrete time: all states of one path of the ODE are sent to its clean end."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from maskdm_fast.diffusion import Denoiser, NoiseSchedule, TimestepDraw, Transition
from maskdm_fast.distill.regression import (
    X0_WEIGHTS,
    Instant,
    Regression,
    check_schedules,
    ddim_step,
    expand,
    tell,
)

SOLVERS = ("euler", "heun")


@dataclasses.dataclass(frozen=True)
class StepMapping:
    """Which lower level r a level t is compared with, both ``n = sigma / alpha``; nearer, stage by stage.

        r = t max(0, 1 - (1 + k sigmoid(-b t)) / q^(a + 1)),    a = min(step // steps_per_stage, num_stages - 1)

    Where r is 0 the state is clean, and to be compared with it is to denoise: so the first stages begin, at the lower
    levels. At high levels the gap is the share ``q^-(a + 1)`` of t, at level 0 it is ``1 + k/2`` times as wide.

    Args:
        steps_per_stage: optimizer steps of a stage.
        num_stages: stages, at least 1; the last goes on for ever.
        q: factor by which a stage divides the gap, more than 1.
        k: how much wider the gap is at low levels, 0 or more.
        b: how soon that ends as the level grows.

    Raises:
        ValueError: if a value is out of range.

    Source: Geng et al., "Consistency Models Made Easy", ICLR 2025 (arXiv 2406.14548), and ``training/loss.py`` of
    github.com/locuslab/ect, whose values q = 2, k = 8 and b = 1 these are.
    """

    steps_per_stage: int
    num_stages: int = 8
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0

    def __post_init__(self):
        for name, least in (("steps_per_stage", 1), ("num_stages", 1), ("k", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"StepMapping: {name} is {getattr(self, name)}, want at least {least}")
        if not self.q > 1.0:
            raise ValueError(f"StepMapping: q is {self.q}, want more than 1")

    def gap(self, step: int | Tensor) -> float | Tensor:
        """``q^-(a + 1)`` of an optimizer step, an int or an int64 scalar tensor."""
        stage = step // self.steps_per_stage
        if isinstance(stage, Tensor):
            return self.q ** -(stage.clamp(max=self.num_stages - 1).to(torch.float64) + 1.0)
        return self.q ** -(min(stage, self.num_stages - 1) + 1.0)

    def __call__(self, level: Tensor, step: int | Tensor) -> Tensor:
        """The levels r of the levels t, float64 ``[B]``."""
        return level * (1.0 - self.gap(step) * (1.0 + self.k * torch.sigmoid(-self.b * level))).clamp(min=0.0)


def consistency_transitions(schedule: NoiseSchedule, levels: Sequence[float] = ()) -> list[Transition]:
    """Steps for `sample`: the student's estimate of x0, noised anew to each of `levels` and estimated again.

        x0 = f(sigma_max z, t_max);    then for each level: x0 = f(alpha x0 + sigma z', t)

    The first evaluation is at the greatest noise of the schedule's `noise_range`, the greatest that is trained. Without
    `levels` it is the only one.

    Args:
        schedule: of the student.
        levels: falling ``sigma / alpha`` of the other evaluations; Geng et al. take 0.821 on CIFAR-10.

    Raises:
        ValueError: as `check_levels`.

    Source: Song et al., "Consistency Models", ICML 2023 (arXiv 2303.01469), algorithm 1.
    """
    check_levels(schedule, levels)
    visited = [schedule.noise_range[1], *levels]
    t = schedule.t_of_log_snr(-2.0 * torch.tensor(visited, dtype=torch.float64).log())
    alpha, sigma = (scale.tolist() for scale in schedule.alpha_sigma(t))
    landings = zip([*alpha[1:], 1.0], [*sigma[1:], 0.0], strict=True)
    return [Transition(time, c_x0, 0.0, std=std) for time, (c_x0, std) in zip(t.tolist(), landings, strict=True)]


def check_levels(schedule: NoiseSchedule, levels: Sequence[float]) -> None:
    """Raise ValueError unless the levels of `consistency_transitions` fall and lie in the noise range."""
    least, greatest = schedule.noise_range
    if any(not least <= there < here for here, there in zip([greatest, *levels], levels, strict=False)):
        raise ValueError(
            f"the sampling levels are {list(levels)}, want falling ones between {greatest:g} and {least:g}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsistencyDistillation(Regression):
    """The student learns at x_t what it says itself at x_r, a little down the same path, and so the end of the path.

        L = E w d(f(x_t, t), sg[f'(x_r, r)]),    f' = x0 where r is clean
        d = sqrt(m + c^2) - c,    m = mean squared error of an image

    f is the student's estimate of x0, f' the same without gradient or an average of earlier students. x_r comes from
    x_t by a step of the ODE: with a teacher (consistency distillation) by its estimate; without one (consistency
    training) by the true x0, which gives it the noise of x_t. Where r is clean the target is that estimate, or x0.

    At the clean end f has to be the identity. Predictions eps, v, flow and edm are it by their form,
    ``x0 = (a xt - sigma pred) / (a alpha - b sigma)`` with ``sigma = 0``; one of x0 learns it from the targets at the
    lowest levels, whose r is clean. eps multiplies the error of the network by ``sigma / alpha`` at high levels: prefer
    another. d is the published pseudo-Huber distance over sqrt(D), of a vector of D values.

    Args:
        mapping: r of t.
        timesteps: how t is drawn; levels outside the schedule's `noise_range` count as its ends.
        weight: "gap", ``1 / (t - r)`` in levels; "edm", ``snr + 4``, or another of `X0_WEIGHTS`.
        solver: of the teacher's step: "euler", one evaluation, which is DDIM; or "heun", two.
        huber: c, more than 0; times sqrt(D) that of the published distance.

    Raises:
        ValueError: if a value is not one of those above.

    Source: Geng et al., "Consistency Models Made Easy", ICLR 2025 (arXiv 2406.14548), and ``training/loss.py`` of
    github.com/locuslab/ect; Song et al., "Consistency Models", ICML 2023 (arXiv 2303.01469), algorithms 2 and 3; c:
    Song and Dhariwal, "Improved Techniques for Training Consistency Models", ICLR 2024 (arXiv 2310.14189), section 3.3.
    """

    weights: ClassVar[tuple[str, ...]] = ("gap", *X0_WEIGHTS)

    mapping: StepMapping
    weight: str = "gap"
    timesteps: TimestepDraw = dataclasses.field(default_factory=lambda: TimestepDraw("lognormal", -1.1, 2.0))
    solver: str = "euler"
    huber: float = 0.00054

    def __post_init__(self):
        super().__post_init__()
        if self.solver not in SOLVERS:
            raise ValueError(f"ConsistencyDistillation: unknown solver {self.solver!r}, want {' or '.join(SOLVERS)}")
        if not self.huber > 0.0:
            raise ValueError(f"ConsistencyDistillation: huber is {self.huber}, want more than 0")

    def __call__(
        self,
        student: Denoiser,
        teacher: Denoiser | None,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        average: Denoiser | None = None,
        seed: int,
        step: int | Tensor,
        slots: Tensor,
    ) -> dict[str, Tensor]:
        """Loss of the student on a batch.

        Args:
            student: starts as a trained denoiser.
            teacher: frozen, in eval mode; None: consistency training.
            images: uint8 ``[B, height, width, C]`` (or by `layout`), 0..255, or floating point in [-1, 1].
            labels: int64 ``[B]``, or None.
            average: gives the targets, an average of the student's weights; None: the student itself.
            seed: run seed.
            step: optimizer step, which also decides the stage of `mapping`.
            slots: int64 ``[B]`` on the device of `images`, places in the global batch.

        Returns:
            As `Regression.fit`.

        Raises:
            ValueError: if the networks have different schedules, or there is guidance but no teacher or no labels.
        """
        for other in (teacher, average):
            if other is not None:
                check_schedules(student, other)
        if teacher is None and (self.strengths is not None or self.guidance.scale != 1.0):
            raise ValueError("ConsistencyDistillation: there is no teacher to guide; give one, or leave guidance out")
        draw = {"seed": seed, "step": step, "slots": slots}
        here, there = self.instants(student.schedule, **draw)
        strength = self.strength(**draw)
        xt, x0 = self.noisy(images, here, **draw)
        with torch.no_grad():
            if teacher is None:
                xr = ddim_step(xt, x0, here, there)
            else:
                xr = self.teacher_step(teacher, xt, here, there, labels, strength)
            said = tell(student if average is None else average, strength)(xr, there.t, labels)
            target = torch.where(expand(there.sigma, xt) == 0.0, xr, said)
        weight = 1.0 / (here.noise - there.noise) if self.weight == "gap" else X0_WEIGHTS[self.weight](here.snr)
        return self.fit(student, target, xt, here, labels, strength, weight)

    def instants(
        self, schedule: NoiseSchedule, *, seed: int, step: int | Tensor, slots: Tensor
    ) -> tuple[Instant, Instant]:
        """``(t, r)`` of a batch. r is clean where its level is below the least of the schedule, or 0."""
        u = self.timesteps.uniform(seed=seed, step=step, slots=slots)
        least, greatest = schedule.noise_range
        if self.timesteps.kind == "uniform":
            level = (-0.5 * schedule.log_snr(schedule.timesteps(u))).exp()
        else:
            level = self.timesteps.log_level(u).exp()
        here = _at_level(schedule, level.clamp(least, greatest))
        level = self.mapping(here.noise, step)
        return here, _at_level(schedule, level.clamp(min=least)).cleaned(level < least)

    def teacher_step(
        self,
        teacher: Denoiser,
        xt: Tensor,
        here: Instant,
        there: Instant,
        labels: Tensor | None = None,
        strength: Tensor | None = None,
    ) -> Tensor:
        """x_r, where a step of the ODE of the teacher leads from x_t.

            euler:  x_r = ddim(x_t, x0, r),    x0 = x0_teacher(x_t, t)
            heun:   that, plus ``alpha_r (n_t - n_r) / (2 n_r) (x0' - x0)`` with ``x0' = x0_teacher(x_r, r)``

        A step to the clean image is one of Euler. Arguments as in `ProgressiveDistillation.target`.

        Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022,
        algorithm 1.
        """
        x0 = self.estimate(teacher, xt, here, labels, strength)
        xr = ddim_step(xt, x0, here, there)
        if self.solver == "euler":
            return xr
        clean = there.sigma == 0.0
        level = there.noise.masked_fill(clean, 1.0)  # not to divide by 0
        half = (there.alpha * (here.noise - level) / (2.0 * level)).masked_fill(clean, 0.0)
        return torch.addcmul(xr, expand(half, xt), self.estimate(teacher, xr, there, labels, strength) - x0)

    def distance(self, x0: Tensor, target: Tensor) -> Tensor:
        """The pseudo-Huber distance of each image, ``[B]``."""
        error = super().distance(x0, target)
        # sqrt(m + c^2) - c without the cancellation.
        return error / ((error + self.huber**2).sqrt() + self.huber)


def _at_level(schedule: NoiseSchedule, level: Tensor) -> Instant:
    """The instants at levels ``sigma / alpha``, ``[B]``."""
    return Instant.at(schedule, schedule.t_of_log_snr(-2.0 * level.log()))
