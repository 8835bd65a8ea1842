"""What a network predicts, and what follows from it: with ``xt = alpha x0 + sigma eps`` and ``alpha^2 + sigma^2 = 1``,

    v = alpha eps - sigma x0,    x0 = alpha xt - sigma v,    eps = sigma xt + alpha v

All functions take ``pred`` and ``xt`` of one shape ``[B, ...]`` and ``alpha, sigma`` of shape ``[B]``, name what `pred`
is by `prediction` ("eps", "x0" or "v"), return the shape of `xt`, and raise ValueError for another name.

Source of v: Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", ICLR 2022, section 4.
"""

from torch import Tensor

PREDICTIONS = ("eps", "x0", "v")


def check_prediction(prediction: str) -> str:
    """Return `prediction`, or raise ValueError unless it is one of `PREDICTIONS`."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}, want one of {', '.join(PREDICTIONS)}")
    return prediction


def to_x0(pred: Tensor, xt: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """The clean image that `pred` stands for: ``(xt - sigma eps) / alpha`` or ``alpha xt - sigma v``."""
    if check_prediction(prediction) == "x0":
        return pred
    alpha, sigma = _expand(alpha, xt), _expand(sigma, xt)
    return (xt - sigma * pred) / alpha if prediction == "eps" else alpha * xt - sigma * pred


def to_eps(pred: Tensor, xt: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """The noise that `pred` stands for: ``(xt - alpha x0) / sigma`` or ``sigma xt + alpha v``."""
    if check_prediction(prediction) == "eps":
        return pred
    alpha, sigma = _expand(alpha, xt), _expand(sigma, xt)
    return (xt - alpha * pred) / sigma if prediction == "x0" else sigma * xt + alpha * pred


def to_v(pred: Tensor, xt: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """The velocity that `pred` stands for: ``(eps - sigma xt) / alpha`` or ``(alpha xt - x0) / sigma``."""
    if check_prediction(prediction) == "v":
        return pred
    alpha, sigma = _expand(alpha, xt), _expand(sigma, xt)
    return (pred - sigma * xt) / alpha if prediction == "eps" else (alpha * xt - pred) / sigma


def _expand(scale: Tensor, like: Tensor) -> Tensor:
    """``[B]`` to ``[B, 1, ...]`` in the dtype of `like`."""
    return scale.to(like.dtype).reshape(-1, *(1,) * (like.ndim - 1))
