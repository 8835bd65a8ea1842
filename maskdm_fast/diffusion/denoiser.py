"""A network read as a denoiser."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maskdm_fast.diffusion.objective import Network
from maskdm_fast.diffusion.prediction import resolve_prediction, to_eps, to_x0, x0_coefficients
from maskdm_fast.diffusion.schedule import NoiseSchedule


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: ``x0 = x0(none) + scale (x0(label) - x0(none))``, on an interval of noise levels.

    Args:
        scale: at least 0; 1 follows the labels as trained, more exaggerates them, 0 ignores them.
        interval: the levels ``sigma/alpha``, lowest and highest, at which `scale` holds; it is 1 elsewhere. None: all.

    Raises:
        ValueError: if the scale is out of its range or the interval is empty.

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022; Kynkaanniemi et al., "Applying Guidance in a
    Limited Interval Improves Sample and Distribution Quality in Diffusion Models", NeurIPS 2024.
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None

    def __post_init__(self):
        if not 0.0 <= self.scale < math.inf:
            raise ValueError(f"guidance is {self.scale}, want a number of 0 or more; 1 follows the labels as trained")
        if self.interval is not None and not 0.0 <= self.interval[0] < self.interval[1] < math.inf:
            raise ValueError(f"guidance interval is {self.interval}, want 0 <= lowest < highest, in sigma/alpha")

    def at(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The scale at each noise level, of the shape and dtype of `alpha`."""
        scale = torch.full_like(alpha, self.scale)
        if self.interval is None:
            return scale
        low, high = self.interval
        # As products, because alpha may be 0.
        return torch.where((low * alpha <= sigma) & (sigma <= high * alpha), scale, 1.0)


UNGUIDED = Guidance()


@dataclasses.dataclass(frozen=True)
class Level:
    """A noise level with all that does not depend on the tokens worked out: ``x0 = c_xt xt + c_pred pred``.

    Attributes:
        time: what the network is given, ``[1]`` or, for a network that makes time tokens, ``[1, D]``.
        c_xt: as above.
        c_pred: as above.
        guidance: scale of the guidance.
    """

    time: Tensor
    c_xt: float
    c_pred: float
    guidance: float


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """Network, schedule and kind of prediction, together: noisy tokens in, an estimate of the clean ones out.

    Args:
        model: the network; it sees all tokens of an image.
        schedule: the one that it was trained with.
        prediction: what it predicts, one of `schedule.predictions`; None: the first of them.

    Raises:
        ValueError: if the prediction is none of these.
    """

    model: Network
    schedule: NoiseSchedule
    prediction: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "prediction", resolve_prediction(self.schedule, self.prediction))

    @property
    def device(self) -> torch.device:
        """Where the network computes: the device of its first parameter, the CPU if it has none."""
        parameters = self.model.parameters() if isinstance(self.model, nn.Module) else iter(())
        return next((parameter.device for parameter in parameters), torch.device("cpu"))

    def __call__(self, xt: Tensor, t: Tensor, labels: Tensor | None = None, guidance: Guidance = UNGUIDED) -> Tensor:
        """Estimate x0.

        Args:
            xt: ``[B, N, P*P*C]``, noisy patches, all of them in order.
            t: ``[B]``, times of the schedule.
            labels: int64 ``[B]``, or None.
            guidance: how the labels are followed.

        Returns:
            ``[B, N, P*P*C]`` in the dtype of `xt`, not clipped.

        Raises:
            ValueError: if there is guidance but no labels.
        """
        alpha, sigma = self.schedule.alpha_sigma(t)
        return to_x0(self._at_times(xt, t, labels, guidance), xt, alpha, sigma, self.prediction)

    def eps(self, xt: Tensor, t: Tensor, labels: Tensor | None = None, guidance: Guidance = UNGUIDED) -> Tensor:
        """Estimate eps; arguments and result as for x0."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        return to_eps(self._at_times(xt, t, labels, guidance), xt, alpha, sigma, self.prediction)

    def levels(self, times: Sequence[float], guidance: Guidance = UNGUIDED) -> list[Level]:
        """What `at` needs for each of these times, worked out at once: a sampler asks before its loop."""
        t = torch.tensor(times, dtype=None if all(isinstance(time, int) for time in times) else torch.float64)
        alpha, sigma = self.schedule.alpha_sigma(t.to(torch.float64))
        c_xt, c_pred = x0_coefficients(self.prediction, alpha, sigma)
        inputs = self.schedule.time_input(t).to(self.device)
        if inputs.is_floating_point():
            inputs = inputs.to(torch.float32)
        make_tokens = getattr(self.model, "time_tokens", None)
        inputs = inputs if make_tokens is None else make_tokens(inputs)
        rows = zip(c_xt.tolist(), c_pred.tolist(), guidance.at(alpha, sigma).tolist(), strict=True)
        return [Level(inputs[i : i + 1], *row) for i, row in enumerate(rows)]

    def at(self, level: Level, xt: Tensor, labels: Tensor | None = None) -> Tensor:
        """Estimate x0 of images that share one noise level; the same as calling the denoiser, with less work."""
        time = level.time.expand(xt.shape[0], *level.time.shape[1:])
        if level.guidance == 1.0:
            pred = self._predict(xt, time, labels)
        else:
            pred = self._guided(xt, time, labels, level.guidance)
        return torch.mul(pred, level.c_pred).add_(xt, alpha=level.c_xt)

    def _at_times(self, xt: Tensor, t: Tensor, labels: Tensor | None, guidance: Guidance) -> Tensor:
        time = self.schedule.time_input(t)
        if guidance.scale == 1.0:
            return self._predict(xt, time, labels)
        # Whether an image lies on the interval is known to the device alone, so all are guided, some by 1.
        scale = guidance.at(*self.schedule.alpha_sigma(t)).to(xt.dtype)
        return self._guided(xt, time, labels, scale[:, None, None])

    def _guided(self, xt: Tensor, time: Tensor, labels: Tensor | None, scale: Tensor | float) -> Tensor:
        """The guided prediction. x0 is linear in it, so that guiding either is the same."""
        if labels is None:
            raise ValueError("guidance needs labels, and a model that was trained with classes; leave its scale at 1")
        both = torch.cat((labels, torch.full_like(labels, -1)))
        twice = (2, *(1,) * (time.ndim - 1))
        with_label, without = self._predict(xt.repeat(2, 1, 1), time.repeat(twice), both).chunk(2)
        return torch.lerp(without, with_label, scale)

    def _predict(self, xt: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        # A network under autocast answers in half precision, which the division by a small alpha would blow up further.
        return self.model(xt, time, None, labels).to(xt.dtype)
