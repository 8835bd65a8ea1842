"""The masked denoising objective."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from maskdm_fast import ops, random
from maskdm_fast.diffusion.masking import Grid, Mask
from maskdm_fast.diffusion.prediction import coefficients, resolve_prediction
from maskdm_fast.diffusion.schedule import NoiseSchedule
from maskdm_fast.diffusion.timesteps import TimestepDraw
from maskdm_fast.diffusion.weighting import LossWeight
from maskdm_fast.random import Stream

Network = Callable[..., Tensor]
"""``(tokens [B, K, P*P*C], t [B], ids_keep [B, K] or None, labels [B] or None) -> [B, K, P*P*C]``.

Where images keep different numbers of patches, packed: ``(tokens [T, P*P*C], t [B], ids_keep [T], labels [B] or None,
cu_seqlens=[B + 1]) -> [T, P*P*C]``.
"""


@dataclasses.dataclass(frozen=True)
class MaskedObjective:
    """Denoising score matching on the visible patches of an image.

        L = E || f(xt[visible], t, ids_keep) - target[visible] ||^2,  xt = alpha x0 + sigma eps,  x0 = image/127.5 - 1

    with one t per image, independent of the mask; the square is the mean over visible patches and their values, not
    over all patches. Noise and targets are computed for visible patches only.

    Args:
        schedule: alpha and sigma of t.
        mask: which patches are visible.
        patch_size: side P of a patch in pixels.
        prediction: the target, one of `schedule.predictions`; None: the first of them, "eps" for most.
        hflip: probability, 0..1, that an image is mirrored.
        label_drop: probability, 0..1, that a label becomes -1, which trains the unconditional embedding of the network.
        layout: "bhwc" or "bchw", the order of the images' axes.
        timesteps: how t is drawn.
        weight: what the loss of an image counts, by its t.
        unmasked_share: probability, 0..1, that an image is trained whole in spite of the mask.

    Raises:
        ValueError: if a value is not one of those above.

    Source: Lei et al., "Masked Diffusion Models Are Fast Distribution Learners", arXiv 2306.11363, equation 2.
    """

    schedule: NoiseSchedule
    mask: Mask
    patch_size: int
    prediction: str | None = None
    hflip: float = 0.0
    label_drop: float = 0.0
    layout: str = "bhwc"
    timesteps: TimestepDraw = dataclasses.field(default_factory=TimestepDraw)
    weight: LossWeight = dataclasses.field(default_factory=LossWeight)
    unmasked_share: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "prediction", resolve_prediction(self.schedule, self.prediction))
        if self.patch_size < 1:
            raise ValueError(f"MaskedObjective: patch_size is {self.patch_size}, want at least 1")
        for name in ("hflip", "label_drop", "unmasked_share"):
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
        mask: Mask | None = None,
        ids_keep: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss of `model` on a batch.

        Every draw is a function of (seed, step, slot), so a batch may be cut into micro-batches without changing the
        loss of any image. Where images keep different numbers of patches (a mask with a range of ratios, or an unmasked
        share), they go through the network packed, without padding, and each image's loss is still its own mean.

        Args:
            model: the network, or a wrapper of it with the same call. If it has an attribute ``grid``, the rows and
                columns of patches that its places are for, images must have that grid.
            images: uint8 ``[B, height, width, C]`` (or by `layout`), 0..255.
            labels: int64 ``[B]``, or None.
            seed: run seed.
            step: optimizer step.
            slots: int64 ``[B]`` on the device of `images`, places in the global batch.
            mask: for this batch instead of the objective's own.
            ids_keep: int64 ``[B, K]``, or packed ``[T]``, the patches to train on instead of drawing a mask.
            cu_seqlens: int32 ``[B + 1]``, cumulative counts of packed `ids_keep`, from 0 to T.

        Returns:
            ``loss``, a scalar with gradient, the mean of ``loss_per_image [B]`` (detached, at least float32); the times
            ``t [B]``; ``mask_ratio``, a scalar, the share of all patches that was masked.

        Raises:
            ValueError: if the sides of the images are not multiples of `patch_size`, their grid does not suit the mask
                or the model, or `cu_seqlens` comes without `ids_keep`, or `ids_keep` with a `mask`.
        """
        draw = {"seed": seed, "step": step, "slots": slots}
        grid = self._grid(images)
        known = getattr(model, "grid", grid)
        if grid != known:  # the visible patches alone do not show it: all places are known to a larger network
            raise ValueError(
                f"MaskedObjective: the images have a grid of {grid[0]}x{grid[1]} patches, the network's have "
                f"{known[0]}x{known[1]}; resize the images, or build the network for their size"
            )
        t = self.timesteps(self.schedule, **draw)
        alpha, sigma = self.schedule.alpha_sigma(t)
        if ids_keep is None:
            if cu_seqlens is not None:
                raise ValueError("MaskedObjective: cu_seqlens is given without ids_keep, whose images it tells apart")
            ids_keep, cu_seqlens = self._draw_mask(self.mask if mask is None else mask, grid, **draw)
        elif mask is not None:
            raise ValueError("MaskedObjective: ids_keep and mask are both given; want one of them")
        flip = _coin(self.hflip, Stream.FLIP, **draw)
        xt, target = ops.noise_visible_patches(
            images,
            ids_keep,
            alpha,
            sigma,
            patch_size=self.patch_size,
            prediction=coefficients(self.prediction, alpha, sigma),
            cu_seqlens=cu_seqlens,
            flip=flip,
            layout=self.layout,
            **draw,
        )
        if labels is not None:
            dropped = _coin(self.label_drop, Stream.LABEL_DROP, **draw)
            labels = labels if dropped is None else labels.masked_fill(dropped, -1)
        packed = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        pred = model(xt, self.schedule.time_input(t), ids_keep, labels, **packed)
        loss_dtype = torch.promote_types(pred.dtype, torch.float32)
        weight = self.weight(alpha, sigma, self.prediction)
        loss = ops.masked_dsm_loss(
            pred.to(loss_dtype), target.to(loss_dtype), weight, reduction="none", **packed
        )  # [B]
        # From shapes alone: nothing waits for the device.
        num_patches = max(1, images.shape[0] * grid[0] * grid[1])
        mask_ratio = torch.full((), 1.0 - xt.shape[:-1].numel() / num_patches, device=images.device)
        return {"loss": loss.mean(), "loss_per_image": loss.detach(), "t": t, "mask_ratio": mask_ratio}

    def _draw_mask(self, mask: Mask, grid: Grid, **draw) -> tuple[Tensor | None, Tensor | None]:
        """``(ids_keep [B, K] or None, None)``, or packed ``(ids_keep [T], cu_seqlens [B + 1])``."""
        whole = None
        if mask.num_visible(grid) < grid[0] * grid[1] or mask.varies:
            whole = _coin(self.unmasked_share, Stream.UNMASKED, **draw)
        if whole is None and not mask.varies:
            return mask.sample(grid, **draw), None
        return mask.sample_packed(grid, **draw, whole=whole)

    def _grid(self, images: Tensor) -> Grid:
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
