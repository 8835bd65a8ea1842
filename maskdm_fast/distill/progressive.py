"""Progressive distillation: one step of the student does what two steps of its teacher did, again and again."""

import dataclasses

import torch
from torch import Tensor

from maskdm_fast.diffusion import Denoiser, NoiseSchedule, TimestepDraw, Transition, ddim_transitions_at
from maskdm_fast.distill.regression import X0_WEIGHTS, Instant, Regression, check_schedules, ddim_step, expand


def halvings(first: int, last: int) -> tuple[int, ...]:
    """The student's steps in each round, from a teacher of `first` to a student of `last`: ``first/2, .., last``.

    Raises:
        ValueError: if halving `first` does not lead to `last`.
    """
    rounds = []
    steps = first
    while steps > last >= 1 and steps % 2 == 0:
        steps //= 2
        rounds.append(steps)
    if not rounds or steps != last:
        raise ValueError(f"halvings: {first} steps cannot be halved down to {last}; want first = last * 2^rounds")
    return tuple(rounds)


def grid_times(schedule: NoiseSchedule, index: Tensor, num_steps: int) -> Tensor:
    """Time number `index` of `num_steps` steps, index 1..num_steps, float64; the steps begin there and lead down.

    The grids are nested: number ``2 i`` of ``2 n`` steps is number i of n. They are ``floor(i T / n) - 1`` in discrete
    time, as for DDIM; in continuous time what the draw ``i / n`` becomes, which is ``i / n`` itself for VP and flow, as
    for DDIM, and level ``1 - i / n`` of `karras_levels` for EDM, whose own grid for samplers is not nested.
    """
    if schedule.num_timesteps is None:
        return schedule.timesteps(index.to(torch.float64) / num_steps).to(torch.float64)
    return (index * schedule.num_timesteps // num_steps - 1).to(torch.float64)


def progressive_transitions(schedule: NoiseSchedule, num_steps: int) -> list[Transition]:
    """DDIM on the nested grid, for `sample`: how a student of `num_steps` steps is used.

    Raises:
        ValueError: if `num_steps` is out of range.
    """
    check_steps(schedule, num_steps)
    return ddim_transitions_at(schedule, grid_times(schedule, torch.arange(num_steps, 0, -1), num_steps).tolist())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgressiveDistillation(Regression):
    """One round: the student learns to go in one step of DDIM where two half steps of the teacher lead.

        x_m = ddim(x_t, x0_teacher(x_t, t), m),    x_s = ddim(x_m, x0_teacher(x_m, m), s)
        target = (x_s - (sigma_s / sigma_t) x_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)

    for t drawn from the N times of the student, s the next of them (the clean image after the last) and m the time of
    the teacher between them. The target is the x0 with which one step of DDIM leads from x_t to x_s. In terms of the
    two estimates x0' and x0'' and the levels ``n = sigma / alpha`` it is their mean,

        target = (1 - c) x0' + c x0'',    c = (1 - n_s/n_m) / (1 - n_s/n_t)

    which is how it is computed: nothing is divided by the small difference of two states. The weight of the squared
    error of x0 is ``max(snr, 1)``. After a round the student is the teacher of the next one, of half the steps.

    Args:
        num_steps: N, steps of the student; the teacher makes 2 N.
        num_strata: size of the global batch, over which to spread the times, as in `TimestepDraw`; None: independent.

    Raises:
        ValueError: if `num_steps` is less than 1.

    Source: Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", ICLR 2022 (arXiv
    2202.00512), algorithm 2 and section 4. With `strengths` and `told_teacher`: stage two of Meng et al.,
    "On Distillation of Guided Diffusion Models", CVPR 2023 (arXiv 2210.03142). The mean of two estimates is ours.
    """

    num_steps: int
    num_strata: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.num_steps < 1:
            raise ValueError(f"ProgressiveDistillation: num_steps is {self.num_steps}, want at least 1")

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
            student: starts as a copy of the teacher; it predicts anything but eps.
            teacher: frozen, in eval mode.
            images: uint8 ``[B, height, width, C]`` (or by `layout`), 0..255, or floating point in [-1, 1].
            labels: int64 ``[B]``, or None.
            seed: run seed.
            step: optimizer step.
            slots: int64 ``[B]`` on the device of `images`, places in the global batch.

        Returns:
            As `Regression.fit`.

        Raises:
            ValueError: if the student predicts eps, the two have different schedules, the schedule has fewer times than
                the teacher steps, or there is guidance but no labels.
        """
        check_schedules(student, teacher)
        check_student(student)
        check_steps(teacher.schedule, 2 * self.num_steps)
        draw = {"seed": seed, "step": step, "slots": slots}
        instants = self.instants(teacher.schedule, **draw)
        here = instants[0]
        strength = self.strength(**draw)
        xt, _ = self.noisy(images, here, **draw)
        with torch.no_grad():
            target = self.target(teacher, xt, *instants, labels, strength)
        return self.fit(student, target, xt, here, labels, strength, X0_WEIGHTS[self.weight](here.snr))

    def instants(
        self, schedule: NoiseSchedule, *, seed: int, step: int | Tensor, slots: Tensor
    ) -> tuple[Instant, Instant, Instant]:
        """``(t, m, s)`` of a batch: a step of the student, drawn uniformly, and where the teacher stops within it."""
        u = TimestepDraw(num_strata=self.num_strata).uniform(seed=seed, step=step, slots=slots)
        index = 2 * (u * self.num_steps).long() + 2  # of the teacher's grid: 2, 4, .., 2 N
        here, middle, there = (
            Instant.at(schedule, grid_times(schedule, (index - back).clamp(min=1), 2 * self.num_steps))
            for back in (0, 1, 2)
        )
        return here, middle, there.cleaned(index == 2)

    def target(
        self,
        teacher: Denoiser,
        xt: Tensor,
        here: Instant,
        middle: Instant,
        there: Instant,
        labels: Tensor | None = None,
        strength: Tensor | None = None,
    ) -> Tensor:
        """The x0 with which one step of DDIM from `here` to `there` lands where two of the teacher do.

        Args:
            teacher: the teacher.
            xt: ``[B, N, P*P*C]``, at `here`.
            here: t.
            middle: m.
            there: s, which may be clean.
            labels: int64 ``[B]``, or None.
            strength: w, ``[B]``, or None.

        Returns:
            Of the shape and dtype of `xt`.
        """
        first = self.estimate(teacher, xt, here, labels, strength)
        second = self.estimate(teacher, ddim_step(xt, first, here, middle), middle, labels, strength)
        share = (1.0 - there.noise / middle.noise) / (1.0 - there.noise / here.noise)
        return torch.lerp(first, second, expand(share, xt))


def check_student(student: Denoiser) -> None:
    """Raise ValueError for a student that predicts eps.

    The first of few steps begins where alpha is nearly 0. There eps is the input and says nothing of the image: its x0
    is ``(xt - sigma eps) / alpha``, with the error of the network times ``sigma / alpha``, a hundred and more.
    """
    if student.prediction == "eps":
        raise ValueError(
            "ProgressiveDistillation: the student predicts eps, from which x0 cannot be read where alpha is nearly 0; "
            "first distil the teacher into a student of v (GuidedDistillation with strengths=None), or train one"
        )


def check_steps(schedule: NoiseSchedule, num_steps: int) -> None:
    """Raise ValueError unless the schedule has times for so many steps."""
    most = schedule.num_timesteps
    if num_steps < 1 or (most is not None and num_steps > most):
        wanted = "at least 1" if most is None else f"1 to {most}, the time steps of the noise schedule"
        raise ValueError(f"num_steps is {num_steps}, want {wanted}")
