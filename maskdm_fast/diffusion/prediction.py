"""What a network predicts, and what follows from it. With ``xt = alpha x0 + sigma eps`` every kind is linear in both,

    pred = a eps + b x0

    eps:  (a, b) = (1, 0)
    x0:   (0, 1)
    v:    (alpha, -sigma)
    flow: (1, -1)
    edm:  (-sigma_data alpha, sigma / sigma_data), where alpha = c_in and sigma = s c_in: F of the preconditioned
          network, D = c_skip x + c_out F = x0 with x = xt / c_in

so two lines of algebra serve them all:

    x0 = (a xt - sigma pred) / (a alpha - b sigma),    eps = (alpha pred - b xt) / (a alpha - b sigma)

An error e of pred is an error ``-sigma / (a alpha - b sigma) e`` of x0: for eps it grows as sigma / alpha without
bound, for x0 and v it never exceeds e.

The conversions take ``pred`` and ``xt`` of one shape ``[B, ...]`` and ``alpha, sigma`` of shape ``[B]``, name what
`pred` is by `prediction`, return the shape and dtype of `xt`, and raise ValueError for another name.

Source: v: Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", ICLR 2022, section 4. edm:
Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022, equations 7 and 8.
"""

import torch
from torch import Tensor

from maskdm_fast.diffusion.schedule import EDMSchedule, NoiseSchedule

PREDICTIONS = ("eps", "x0", "v", "flow", "edm")


def check_prediction(prediction: str) -> str:
    """Return `prediction`, or raise ValueError unless it is one of `PREDICTIONS`."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}, want one of {', '.join(PREDICTIONS)}")
    return prediction


def resolve_prediction(schedule: NoiseSchedule, prediction: str | None) -> str:
    """Return `prediction`, or the natural one of `schedule` for None; raise ValueError if the two do not match."""
    if prediction is None:
        return schedule.predictions[0]
    if check_prediction(prediction) not in schedule.predictions:
        raise ValueError(
            f"prediction {prediction!r} does not go with {type(schedule).__name__}, "
            f"want {' or '.join(schedule.predictions)}"
        )
    return prediction


def coefficients(prediction: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """``(a, b)`` of ``pred = a eps + b x0``, of the shape of `alpha` and `sigma`."""
    if check_prediction(prediction) == "v":
        return alpha, -sigma
    if prediction == "edm":
        return -EDMSchedule.sigma_data * alpha, sigma / EDMSchedule.sigma_data
    eps_scale, x0_scale = {"eps": (1.0, 0.0), "x0": (0.0, 1.0), "flow": (1.0, -1.0)}[prediction]
    return torch.full_like(alpha, eps_scale), torch.full_like(alpha, x0_scale)


def x0_coefficients(prediction: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """``(c_xt, c_pred)`` of ``x0 = c_xt xt + c_pred pred``; an error e of pred is an error ``c_pred e`` of x0."""
    return _coefficients_between(prediction, "x0", alpha, sigma)


def to_x0(pred: Tensor, xt: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """The clean image that `pred` stands for."""
    return _convert(pred, xt, alpha, sigma, prediction, "x0")


def to_eps(pred: Tensor, xt: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """The noise that `pred` stands for."""
    return _convert(pred, xt, alpha, sigma, prediction, "eps")


def to_v(pred: Tensor, xt: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """The velocity ``v = alpha eps - sigma x0`` that `pred` stands for."""
    return _convert(pred, xt, alpha, sigma, prediction, "v")


def _convert(pred: Tensor, xt: Tensor, alpha: Tensor, sigma: Tensor, source: str, target: str) -> Tensor:
    if check_prediction(source) == target:
        return pred
    c_xt, c_pred = _coefficients_between(source, target, alpha, sigma)
    return torch.addcmul(_expand(c_xt, xt) * xt, _expand(c_pred, xt), pred)


def _coefficients_between(source: str, target: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """``(c_xt, c_pred)`` that turn a prediction of kind `source` into one of kind `target`."""
    a, b = coefficients(source, alpha, sigma)
    to_a, to_b = coefficients(target, alpha, sigma)
    denominator = a * alpha - b * sigma
    return (a * to_b - b * to_a) / denominator, (alpha * to_a - sigma * to_b) / denominator


def _expand(scale: Tensor, like: Tensor) -> Tensor:
    """``[B]`` to ``[B, 1, ...]`` in the dtype of `like`."""
    return scale.to(like.dtype).reshape(-1, *(1,) * (like.ndim - 1))
