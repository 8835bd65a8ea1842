"""Anomaly detection with DxMI: the energy of a feature vector says how unlike the normal ones it is.

Data are unit vectors, the features of a frozen network at the positions of an image, every position by itself. The
energy is the error of an autoencoder, apart from the value; the sampler starts at normal vectors that were moved in the
latent space of the autoencoder as it was before DxMI, and stays on the sphere:

    energy = AutoencoderEnergy(...)                 # first trained on `reconstruction_error` alone
    reference = copy.deepcopy(energy)               # frozen: makes the starts
    policy = GaussianPolicy(SphereMean(...), stds, num_fixed=0)
    networks = DxMINetworks(policy, VectorValue(...), energy);  iterations as in `dxmi` with `FEATURES`

Source: Yoon et al., "Maximum Entropy Inverse Reinforcement Learning of Diffusion Models with Energy-Based Models",
NeurIPS 2024, section 5.3; the autoencoder as energy: Yoon et al., "Autoencoding under Normalization Constraints", ICML
2021.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskdm_fast import random
from maskdm_fast.distill.dxmi_config import DxMIConfig
from maskdm_fast.distill.dxmi_networks import TimedMLP
from maskdm_fast.random import Stream

FEATURES = DxMIConfig(
    num_steps=5,
    tau_entropy=0.1,
    tau_velocity=0.1,
    entropy_in_value=0,
    velocity_in_value=0,
    time_cost="none",
    resample=True,
)
"""The published setting for feature vectors: running costs in every value target, next states drawn anew."""


class AutoencoderEnergy(nn.Module):
    """``E(x) = scale^2 mean_d (x - decode(encode(x)))^2`` with latents and reconstructions on the unit sphere.

    Args:
        num_values: D of a feature vector.
        latent: values of a latent.
        hidden: width of the three hidden layers of encoder and decoder.
        seed: of the initial weights.
    """

    def __init__(self, num_values: int, *, latent: int = 128, hidden: int = 1024, seed: int = 0):
        super().__init__()
        self.encoder = TimedMLP(num_values, latent, hidden=hidden, seed=seed)
        self.decoder = TimedMLP(latent, num_values, hidden=hidden, seed=seed + 1)
        self.scale = nn.Parameter(torch.ones(()))

    def encode(self, x: Tensor) -> Tensor:
        """Unit latents ``[..., latent]``."""
        return F.normalize(self.encoder(x), dim=-1)

    def decode(self, latent: Tensor) -> Tensor:
        """Unit vectors ``[..., D]``."""
        return F.normalize(self.decoder(latent), dim=-1)

    def reconstruction_error(self, x: Tensor) -> Tensor:
        """``mean_d (x - decode(encode(x)))^2`` of ``[..., D]``: the loss of the training before DxMI."""
        return (x - self.decode(self.encode(x))).square().mean(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale.square() * self.reconstruction_error(x)


class SphereMean(nn.Module):
    """The mean of a policy on the unit sphere, for `GaussianPolicy`: an MLP of three layers that knows the time."""

    def __init__(self, num_values: int, num_steps: int, *, hidden: int = 2048, seed: int = 0):
        super().__init__()
        self.mlp = TimedMLP(num_values, num_values, hidden=hidden, num_times=num_steps, seed=seed)

    def forward(self, x: Tensor, index: Tensor, labels: Tensor | None = None) -> Tensor:
        return F.normalize(self.mlp(x, index), dim=-1)


class VectorValue(nn.Module):
    """V(x, t) of feature vectors, called as ``value(x, index) -> [B]``: an MLP of three layers that knows the time."""

    def __init__(self, num_values: int, num_steps: int, *, hidden: int = 1024, seed: int = 0):
        super().__init__()
        self.mlp = TimedMLP(num_values, 1, hidden=hidden, num_times=num_steps + 1, seed=seed)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.mlp(x, index)[..., 0]


@torch.no_grad()
def latent_starts(
    reference: AutoencoderEnergy,
    data: Tensor,
    *,
    max_std: float = 0.3,
    seed: int,
    step: int,
    slots: Tensor,
) -> Tensor:
    """x_0 of the sampler: ``decode(normalize(encode(x) + s z))``, ``z ~ N(0, I)``, ``s ~ U(0, max_std)`` per vector.

    Args:
        reference: the autoencoder before DxMI, which stays as it is.
        data: ``[B, D]``, normal vectors.
        max_std: greatest noise in the latent space; the paper does not state it.
        seed: run seed.
        step: iteration.
        slots: int64 ``[B]``, places in the global batch.

    Returns:
        ``[B, D]``, unit vectors.
    """
    latent = reference.encode(data)
    where = {"seed": seed, "step": step, "slots": slots}
    noise = random.normal(latent.shape[1], stream=Stream.LATENT_NOISE, **where).to(latent.dtype)
    std = max_std * random.uniform(1, stream=Stream.LATENT_LEVEL, **where).to(latent.dtype)
    return reference.decode(F.normalize(latent + std * noise, dim=-1))


@torch.no_grad()
def anomaly_scores(energy: nn.Module, features: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Scores of images and of their pixels.

    Args:
        energy: called as ``energy(x)`` on ``[..., D]``.
        features: ``[B, rows, columns, D]``, unit vectors.
        size: height and width of the images in pixels.

    Returns:
        ``[B]``, the greatest energy of an image, and ``[B, height, width]``, the energies between the positions
        interpolated bilinearly.
    """
    scores = energy(features)
    maps = F.interpolate(scores[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    return scores.flatten(1).amax(dim=1), maps


def auroc(normal: Tensor, anomalous: Tensor) -> float:
    """The chance that an anomalous score exceeds a normal one, ties counting half: the area under the ROC curve.

    Args:
        normal: ``[N]``.
        anomalous: ``[M]``.

    Raises:
        ValueError: if one of them is empty.
    """
    if not normal.numel() or not anomalous.numel():
        raise ValueError("auroc: want at least one normal and one anomalous score")
    ordered = normal.flatten().sort().values
    scores = anomalous.flatten().to(ordered.dtype).contiguous()
    below = torch.searchsorted(ordered, scores, right=False)
    not_above = torch.searchsorted(ordered, scores, right=True)
    return (0.5 * (below + not_above).double().mean() / ordered.numel()).item()
