"""The masked denoising objective."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from maskdm_fast import ops, random
from maskdm_fast.diffusion.masking import Mask
from maskdm_fast.diffusion.prediction import check_prediction
from maskdm_fast.diffusion.schedule import NoiseSchedule
from maskdm_fast.random import Stream

Network = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""``(tokens [B, K, P*P*C], t [B], ids_keep [B, K] or None, labels [B] or None) -> [B, K, P*P*C]``."""


@dataclasses.dataclass(frozen=True)
class MaskedObjective:
    """Denoising score matching on the visible patches of an image.

        L = E || f(xt[visible], t, ids_keep) - target[visible] ||^2,  xt = alpha x0 + sigma eps,  x0 = image/127.5 - 1

    with t uniform in 0..T-1, one per image, independent of the mask; the square is the mean over visible patches and
    their values, not over all patches. Noise and targets are computed for visible patches only.

    Args:
        schedule: alpha and sigma of t.
        mask: which patches are visible.
        patch_size: side P of a patch in pixels.
        prediction: the target, "eps", "x0" or "v".
        hflip: probability, 0..1, that an image is mirrored.
        label_drop: probability, 0..1, that a label becomes -1, which trains the unconditional embedding of the network.
        layout: "bhwc" or "bchw", the order of the images' axes.

    Raises:
        ValueError: if a value is not one of those above.

    Source: Lei et al., "Masked Diffusion Models Are Fast Distribution Learners", arXiv 2306.11363, equation 2.
    """

    schedule: NoiseSchedule
    mask: Mask
    patch_size: int
    prediction: str = "eps"
    hflip: float = 0.0
    label_drop: float = 0.0
    layout: str = "bhwc"

    def __post_init__(self):
        check_prediction(self.prediction)
        if self.patch_size < 1:
            raise ValueError(f"MaskedObjective: patch_size is {self.patch_size}, want at least 1")
        for name in ("hflip", "label_drop"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"MaskedObjective: {name} is {getattr(self, name)}, want a probability in [0, 1]")
        if self.layout not in ("bhwc", "bchw"):
            raise ValueError(f"MaskedObjective: layout is {self.layout!r}, want 'bhwc' or 'bchw'")

    def __call__(
        self,
        model: Network,
        images: Tensor,
        labels: Tensor | None,
        *,
        seed: int,
        step: int | Tensor,
        slots: Tensor,
    ) -> dict[str, Tensor]:
        """Loss of `model` on a batch.

        Every draw is a function of (seed, step, slot), so a batch may be cut into micro-batches without changing the
        loss of any image.

        Args:
            model: the network, or a wrapper of it with the same call.
            images: uint8 ``[B, height, width, C]`` (or by `layout`), 0..255.
            labels: int64 ``[B]``, or None.
            seed: run seed.
            step: optimizer step.
            slots: int64 ``[B]`` on the device of `images`, places in the global batch.

        Returns:
            ``loss``, a scalar with gradient, the mean of ``loss_per_image [B]`` (detached, at least float32); ``t [B]``
            int64.

        Raises:
            ValueError: if the sides of the images are not multiples of `patch_size`, or their grid does not suit the
                mask.
        """
        draw = {"seed": seed, "step": step, "slots": slots}
        t = self._timesteps(**draw)
        alpha, sigma = self.schedule.alpha_sigma(t)
        ids_keep = self.mask.sample(self._grid(images), **draw)
        flip = _coin(self.hflip, Stream.FLIP, **draw)
        xt, target = ops.noise_visible_patches(
            images,
            ids_keep,
            alpha,
            sigma,
            patch_size=self.patch_size,
            prediction=self.prediction,
            flip=flip,
            layout=self.layout,
            **draw,
        )
        if labels is not None:
            dropped = _coin(self.label_drop, Stream.LABEL_DROP, **draw)
            labels = labels if dropped is None else labels.masked_fill(dropped, -1)
        pred = model(xt, t, ids_keep, labels)
        loss_dtype = torch.promote_types(pred.dtype, torch.float32)
        loss = ops.masked_dsm_loss(pred.to(loss_dtype), target.to(loss_dtype), reduction="none")  # [B]
        return {"loss": loss.mean(), "loss_per_image": loss.detach(), "t": t}

    def _timesteps(self, **draw) -> Tensor:
        """Uniform in 0..T-1. The product is exact in float64, so a uniform below 1 never reaches T."""
        u = random.uniform(1, stream=Stream.TIMESTEP, **draw)[:, 0].to(torch.float64)
        return (u * self.schedule.num_timesteps).long()

    def _grid(self, images: Tensor) -> tuple[int, int]:
        if images.ndim != 4:
            raise ValueError(f"MaskedObjective: images has shape {list(images.shape)}, want 4 axes ({self.layout})")
        height, width = images.shape[1:3] if self.layout == "bhwc" else images.shape[2:4]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"MaskedObjective: images of {height}x{width} pixels do not divide into patches of {self.patch_size}; "
                f"resize them, choose another patch_size, or check layout {self.layout!r}"
            )
        return height // self.patch_size, width // self.patch_size


def _coin(probability: float, stream: Stream, *, seed: int, step: int | Tensor, slots: Tensor) -> Tensor | None:
    """bool ``[B]``, True with `probability`; None if that is 0."""
    if probability == 0.0:
        return None
    return random.uniform(1, seed=seed, stream=stream, step=step, slots=slots)[:, 0] < probability
