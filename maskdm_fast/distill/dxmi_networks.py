"""Small networks for DxMI on points and feature vectors: denoisers and values whose layers know the time."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from maskdm_fast import random
from maskdm_fast.models.layers import timestep_embedding
from maskdm_fast.random import Stream


@torch.no_grad()
def init_uniform(module: nn.Module, seed: int) -> None:
    """Fill the weights of Linear and Conv2d layers and their biases with ``U(-1/sqrt(fan_in), 1/sqrt(fan_in))``.

    That is what PyTorch draws, here as a function of the seed: parameter i of `module` is slot i of `Stream.INIT`.
    Parameters of other modules are left as they are.
    """
    slots = {parameter: slot for slot, parameter in enumerate(module.parameters())}
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            bound = 1.0 / math.sqrt(layer.weight[0].numel())
            for parameter in layer.parameters(recurse=False):
                draws = _init_draws(parameter, slots[parameter], seed)
                parameter.copy_((2.0 * draws - 1.0) * bound)


def _init_draws(parameter: Tensor, slot: int, seed: int) -> Tensor:
    """U(0, 1), of the shape of `parameter`."""
    slots = torch.tensor([slot], device=parameter.device)
    return random.uniform(parameter.numel(), seed=seed, stream=Stream.INIT, step=0, slots=slots).view(parameter.shape)


class GatedMLP(nn.Module):
    """Layers ``h <- act((W h + b) g_t)``, the vector g_t being learned for every time and layer; a plain last layer.

    Args:
        num_in: values of x.
        num_out: values of the result.
        hidden: width of the hidden layers.
        depth: their number.
        num_times: times 0..num_times-1; 0 for a network that does not know the time.
        activation: "relu", "silu" or "softplus".
        seed: of the initial weights: `init_uniform`, and U(0, 1) for g.

    Source: the networks for points of Fan and Lee, "Optimizing DDPM Sampling with Shortcut Fine-Tuning", ICML 2023.
    """

    def __init__(
        self, num_in: int, num_out: int, *, hidden: int, depth: int, num_times: int, activation: str, seed: int
    ):
        super().__init__()
        widths = [num_in, *[hidden] * depth]
        self.layers = nn.ModuleList(skip_init(nn.Linear, a, b) for a, b in itertools.pairwise(widths))
        self.head = skip_init(nn.Linear, hidden, num_out)
        self.gates = nn.ParameterList(
            nn.Parameter(torch.empty(num_times, hidden)) for _ in range(depth if num_times else 0)
        )
        self.activation = {"relu": F.relu, "silu": F.silu, "softplus": F.softplus}[activation]
        init_uniform(self, seed)
        slots = {parameter: slot for slot, parameter in enumerate(self.parameters())}
        with torch.no_grad():
            for gate in self.gates:
                gate.copy_(_init_draws(gate, slots[gate], seed))

    def forward(self, x: Tensor, index: Tensor | None) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            x = self.activation(x * F.embedding(index, self.gates[i]) if len(self.gates) else x)
        return self.head(x)


class PointDenoiser(nn.Module):
    """A `GatedMLP` with the call of `models.UViT`: tokens ``[B, N, D]`` and times 0..num_times-1 in, tokens out.

    Its rectifier is SiLU: the softplus of the source takes 30 times as long on a CPU.
    """

    def __init__(self, num_values: int, num_times: int, *, hidden: int = 128, depth: int = 3, seed: int = 0):
        super().__init__()
        options = {"hidden": hidden, "depth": depth, "num_times": num_times, "activation": "silu", "seed": seed}
        self.mlp = GatedMLP(num_values, num_values, **options)

    def forward(
        self, tokens: Tensor, t: Tensor, ids_keep: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        return self.mlp(tokens.flatten(1), t.round().long()).view(tokens.shape)


class PointValue(nn.Module):
    """A `GatedMLP` as a value function, ``value(x, index) -> [B]``; at ``num_times = 0`` without the index."""

    def __init__(self, num_values: int, num_times: int, *, hidden: int = 256, depth: int = 2, seed: int = 0):
        super().__init__()
        options = {"hidden": hidden, "depth": depth, "num_times": num_times, "activation": "relu", "seed": seed}
        self.mlp = GatedMLP(num_values, 1, **options)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.mlp(x.flatten(1), index)[:, 0]


class TimedMLP(nn.Module):
    """Hidden layers with rectifiers on ``[x, sinusoids of the time]``, and a plain last layer.

    Args:
        num_in: values of x.
        num_out: values of the result.
        hidden: width of the hidden layers.
        depth: their number.
        num_times: times 0..num_times-1, spread over the range for which the sinusoids are made; 0 for no time.
        time_dim: values of the sinusoids.
        seed: of the initial weights.
    """

    def __init__(
        self,
        num_in: int,
        num_out: int,
        *,
        hidden: int,
        depth: int = 3,
        num_times: int = 0,
        time_dim: int = 128,
        seed: int,
    ):
        super().__init__()
        self._times = num_times, time_dim
        widths = [num_in + (time_dim if num_times else 0), *[hidden] * depth]
        self.layers = nn.ModuleList(skip_init(nn.Linear, a, b) for a, b in itertools.pairwise(widths))
        self.head = skip_init(nn.Linear, hidden, num_out)
        init_uniform(self, seed)

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        num_times, time_dim = self._times
        if num_times:
            time = timestep_embedding(index * (1000.0 / num_times), time_dim)
            x = torch.cat((x, time.to(x.dtype)), dim=-1)
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.head(x)
