"""A network read as a denoiser."""

import dataclasses

import torch
from torch import Tensor, nn

from maskdm_fast.diffusion.objective import Network
from maskdm_fast.diffusion.prediction import check_prediction, to_eps, to_x0
from maskdm_fast.diffusion.schedule import NoiseSchedule


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """Network, schedule and kind of prediction, together: noisy tokens in, an estimate of the clean ones out.

    Args:
        model: the network; it sees all tokens of an image.
        schedule: the one that it was trained with.
        prediction: what it predicts, "eps", "x0" or "v".

    Raises:
        ValueError: if `prediction` is none of these.
    """

    model: Network
    schedule: NoiseSchedule
    prediction: str = "eps"

    def __post_init__(self):
        check_prediction(self.prediction)

    @property
    def device(self) -> torch.device:
        """Where the network computes: the device of its first parameter, the CPU if it has none."""
        parameters = self.model.parameters() if isinstance(self.model, nn.Module) else iter(())
        return next((parameter.device for parameter in parameters), torch.device("cpu"))

    def __call__(self, xt: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Estimate x0.

        Args:
            xt: ``[B, N, P*P*C]``, noisy patches, all of them in order.
            t: int64 ``[B]``, 0..T-1.
            labels: int64 ``[B]``, or None.

        Returns:
            ``[B, N, P*P*C]`` in the dtype of `xt`, not clipped.
        """
        return to_x0(self._predict(xt, t, labels), xt, *self.schedule.alpha_sigma(t), self.prediction)

    def eps(self, xt: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Estimate eps; arguments and result as for x0."""
        return to_eps(self._predict(xt, t, labels), xt, *self.schedule.alpha_sigma(t), self.prediction)

    def _predict(self, xt: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        # A network under autocast answers in half precision, which the division by a small alpha would blow up further.
        return self.model(xt, t, None, labels).to(xt.dtype)
