"""The loss scale of float16 training, which lives on the device."""

import torch
from torch import Tensor


class LossScale:
    """Keeps float16 gradients in range: halved by every overflow, doubled after `growth_interval` steps without one.

    Nothing here waits for the device, and `scale` stays where it is, for CUDA graphs read it there.

    Attributes:
        scale: float32, 0-d: multiply the loss by it.

    Source: Micikevicius et al., "Mixed Precision Training", arXiv 1710.03740, section 3.2; the constants are those of
    `torch.amp.GradScaler`.
    """

    initial = 2.0**16
    growth_interval = 2000
    least = 2.0**-24
    """Losses that are sums, as those of score distillation, overflow at 1."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), self.initial, dtype=torch.float32, device=device)
        self._streak = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, found_inf: Tensor) -> Tensor:
        """Take note of a step.

        Args:
            found_inf: float32, 0-d: not 0 where the step's gradient was not finite.

        Returns:
            float32, 0-d: 1 where the overflow may be the scale's doing. At `least` or less it is not: the gradient
            itself is not finite.
        """
        overflow = found_inf > 0
        skipped = overflow & (self.scale > self.least)
        streak = torch.where(overflow, 0, self._streak + 1)
        grown = streak >= self.growth_interval
        factor = torch.where(overflow, 0.5, torch.where(grown, 2.0, 1.0))
        self.scale.mul_(factor)
        self._streak.copy_(torch.where(grown, 0, streak))
        return skipped.to(torch.float32)

    def state_dict(self) -> dict[str, Tensor]:
        """``scale`` and ``streak``, the number of steps since it last changed."""
        return {"scale": self.scale, "streak": self._streak}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state_dict` returned."""
        self.scale.copy_(state["scale"])
        self._streak.copy_(state["streak"])
