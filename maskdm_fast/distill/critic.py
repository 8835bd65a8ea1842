"""Discriminators that share the encoder of the fake network."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskdm_fast import ops, random
from maskdm_fast.diffusion import Denoiser, to_x0
from maskdm_fast.distill.networks import estimate, seen_labels
from maskdm_fast.models.layers import LayerNorm, Linear
from maskdm_fast.random import Stream

_INIT_STD = 0.02


class CriticHead(nn.Module):
    """One logit per token from its features: ``Linear(D, 1) SiLU Linear(D, D) LayerNorm``.

    Args:
        dim: width D.
        seed: of the initial weights, N(0, 0.02^2), drawn from `Stream.INIT`.
    """

    def __init__(self, dim: int, *, seed: int = 0):
        super().__init__()
        self.norm = LayerNorm(dim)
        self.fc1 = Linear(dim, dim)
        self.fc2 = Linear(dim, 1)
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Give every parameter its initial value; those on the meta device are passed over."""
        for index, layer in enumerate((self.fc1, self.fc2)):
            if layer.weight.is_meta:
                continue
            # Step 1, because step 0 of the stream belongs to the network that the head sits on.
            slot = torch.tensor([index], device="cpu")
            draws = random.normal(layer.weight.numel(), seed=seed, stream=Stream.INIT, step=1, slots=slot)
            layer.weight.copy_(_INIT_STD * draws.view(layer.weight.shape))
            layer.bias.zero_()
        if not self.norm.weight.is_meta:
            self.norm.reset_parameters()

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[B, N, D]`` to ``[B, N]``."""
        return self.fc2(F.silu(self.fc1(self.norm(features)))).squeeze(-1)


class Critic(nn.Module):
    """A fake network whose tap gives the logits of a head instead of features; its parameters are those of both.

    Args:
        network: a `models.UViT`, or what has its call with a tap.
        head: maps ``[B, N, D]`` to ``[B, N]``.
    """

    def __init__(self, network: nn.Module, head: nn.Module):
        super().__init__()
        self.network, self.head = network, head

    def forward(
        self,
        tokens: Tensor,
        t: Tensor,
        ids_keep: Tensor | None = None,
        labels: Tensor | None = None,
        tap: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `models.UViT`."""
        if tap is None:
            return self.network(tokens, t, ids_keep, labels)
        out = self.network(tokens, t, ids_keep, labels, tap=tap)
        return self.head(out) if tap == "encoder" else (out[0], self.head(out[1]))


def logits(denoiser: Denoiser, xt: Tensor, t: Tensor, labels: Tensor | None, scale: float = 1.0) -> Tensor:
    """What the encoder of the network thinks of images, ``[B, N]``: positive for real ones. The decoder does not run.

    Features without a head are averaged over their width. With a `scale` of 0 the labels are not shown.
    """
    labels = seen_labels(labels, scale)
    return _as_logits(denoiser.model(xt, denoiser.schedule.time_input(t), None, labels, tap="encoder"), xt)


def estimate_and_logits(
    denoiser: Denoiser, xt: Tensor, t: Tensor, labels: Tensor | None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The estimate of x0, guided by `scale`, and the logits: from one call of the network unless there is guidance."""
    if scale not in (0.0, 1.0):
        return estimate(denoiser, xt, t, labels, scale), logits(denoiser, xt, t, labels)
    labels = seen_labels(labels, scale)
    pred, features = denoiser.model(xt, denoiser.schedule.time_input(t), None, labels, tap="both")
    alpha, sigma = denoiser.schedule.alpha_sigma(t)
    return to_x0(pred.to(xt.dtype), xt, alpha, sigma, denoiser.prediction), _as_logits(features, xt)


def _as_logits(features: Tensor, xt: Tensor) -> Tensor:
    features = features.to(xt.dtype)
    return features.mean(-1) if features.ndim == 3 else features


def loss_if_real(values: Tensor) -> Tensor:
    """``-ln sigmoid(logit)``, the mean over the tokens of an image: ``[B, N]`` to ``[B]``."""
    return F.softplus(-values).mean(1)


def loss_if_fake(values: Tensor) -> Tensor:
    """``-ln (1 - sigmoid(logit))``, likewise."""
    return F.softplus(values).mean(1)


def noisy_real(
    images: Tensor | None,
    token_shape: tuple[int, int],
    alpha: Tensor,
    sigma: Tensor,
    *,
    seed: int,
    step: int | Tensor,
    slots: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Images of the data set as noisy tokens, with the noise that `networks.add_noise` gives the generated ones.

    Args:
        images: ``[B, height, width, C]``, uint8 0..255 or floating point in [-1, 1].
        token_shape: ``(N, P*P*C)``.
        alpha: ``[B]``.
        sigma: ``[B]``.
        seed: run seed.
        step: number of the update.
        slots: int64 ``[B]``, places in the global batch.
        dtype: of the result.

    Returns:
        ``[B, N, P*P*C]``.

    Raises:
        ValueError: if there are no images, or they do not have these tokens.
    """
    if images is None:
        raise ValueError("the discriminator compares with images of the data set, but images is None")
    patch_size = math.isqrt(token_shape[1] // images.shape[-1])
    num_values = math.prod(images.shape[1:])
    if images.ndim != 4 or num_values != math.prod(token_shape) or patch_size**2 * images.shape[-1] != token_shape[1]:
        raise ValueError(
            f"images has shape {list(images.shape)}, want [B, height, width, C] with {token_shape[0]} patches of "
            f"{token_shape[1]} values, as the generator makes them"
        )
    draw = {"seed": seed, "step": step, "slots": slots}
    xt, _ = ops.noise_visible_patches(
        images, None, alpha, sigma, patch_size=patch_size, out_dtype=dtype, layout="bhwc", **draw
    )
    return xt
