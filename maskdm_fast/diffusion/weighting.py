"""How much the loss at each noise level counts."""

import dataclasses
import math

import torch
from torch import Tensor

from maskdm_fast.diffusion.prediction import x0_coefficients
from maskdm_fast.diffusion.schedule import EDMSchedule

WEIGHTS = ("none", "min-snr", "p2", "edm")


@dataclasses.dataclass(frozen=True)
class LossWeight:
    """Weight of the squared error at time t. With ``snr = alpha^2 / sigma^2``, on the error of x0:

        min-snr:  min(snr, gamma)
        p2:       snr / (k + snr)^gamma
        edm:      snr + 1 / sigma_data^2,    sigma_data = 0.5

    and on the error of the network's own output that, times the squared factor between the two errors (`prediction`),
    so that it says the same whatever the network predicts. ``none`` is 1 on the network's own output: on the error of
    x0 that is snr for eps, 1 for x0, 1 + snr for v, and for the preconditioned network the weight of edm.

    Args:
        kind: none, min-snr, p2 or edm.
        min_snr_gamma: gamma of min-snr, more than 0.
        p2_gamma: gamma of p2, 0 (no weight for eps) or more.
        p2_k: k of p2, more than 0.

    Raises:
        ValueError: if a value is not one of those above.

    Source: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", ICCV 2023; Choi et al.,
    "Perception Prioritized Training of Diffusion Models", CVPR 2022, equation 8; Karras et al., "Elucidating the Design
    Space of Diffusion-Based Generative Models", NeurIPS 2022, table 1.
    """

    kind: str = "none"
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    p2_k: float = 1.0

    def __post_init__(self):
        if self.kind not in WEIGHTS:
            raise ValueError(f"unknown loss weight {self.kind!r}, want one of {', '.join(WEIGHTS)}")
        for name in ("min_snr_gamma", "p2_k"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, want more than 0, and finite")
        if not 0 <= self.p2_gamma < math.inf:
            raise ValueError(f"p2_gamma is {self.p2_gamma}, want 0 or more, and finite")

    def __call__(self, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor | None:
        """The weight of each image's mean squared error.

        Args:
            alpha: ``[B]``, as `NoiseSchedule.alpha_sigma` returns it.
            sigma: likewise.
            prediction: what the network predicts.

        Returns:
            float32 ``[B]``; None for kind none, which weighs nothing.
        """
        if self.kind == "none":
            return None
        alpha, sigma = alpha.to(torch.float64), sigma.to(torch.float64)
        snr = (alpha / sigma).square()
        if self.kind == "min-snr":
            weight = snr.clamp(max=self.min_snr_gamma)
        elif self.kind == "p2":
            weight = snr / (self.p2_k + snr) ** self.p2_gamma
        else:
            weight = snr + EDMSchedule.sigma_data**-2
        return (weight * x0_coefficients(prediction, alpha, sigma)[1].square()).to(torch.float32)
