"""The value of a DxMI run apart from its policy: what samples can follow, and an energy of images."""

import torch
from torch import Tensor, nn

from maskdm_fast.diffusion import patchify
from maskdm_fast.distill.dxmi_rollout import full_index
from maskdm_fast.train.config import RunConfig
from maskdm_fast.train.weights import Tensors, Weights


def make_value(config: RunConfig, tensors: Tensors, device: torch.device) -> nn.Module:
    """The value network ``value(x, index) -> [B]`` of a run, with the given state dict, as `Weights.value`."""
    with torch.device("meta"):
        value = config.stage.make_value(config.model, seed=0)
    value.load_state_dict({name: tensor.to(device) for name, tensor in tensors.items()}, assign=True)
    return value.eval().requires_grad_(False)


@torch.no_grad()
def energies(weights: Weights, images: Tensor, *, batch_size: int = 64, device: torch.device | str = "cpu") -> Tensor:
    """``E(x) = V(x, T)``: the lower, the more an image looks like those that the run was trained on.

    Energies of one run can be compared with each other; their zero and their unit mean nothing. They have learnt to
    tell data from the policy's samples, so they say most about images of that kind.

    Args:
        weights: of a run of DxMI.
        images: uint8 ``[B, h, w, C]`` of the size of the run.
        batch_size: images per evaluation.
        device: where to compute.

    Returns:
        float32 ``[B]`` on the CPU.

    Raises:
        ValueError: the run is none of DxMI or on latents, or the images are not such.

    Source: Yoon et al., "Maximum Entropy Inverse Reinforcement Learning of Diffusion Models with Energy-Based Models",
    NeurIPS 2024, section 5.3.
    """
    model = weights.config.model
    shape = (model.image_size, model.image_size, model.channels)
    if weights.config.latents is not None or images.dtype != torch.uint8 or images.shape[1:] != shape:
        kind = "on latents" if weights.config.latents is not None else f"of {list(shape)}"
        raise ValueError(
            f"energies: images are {images.dtype} {list(images.shape)} and the run is {kind}, want uint8 images of its "
            "size"
        )
    value = make_value(weights.config, weights.value, torch.device(device))
    found = []
    for part in images.split(batch_size):
        pixels = part.to(device).permute(0, 3, 1, 2) / 127.5 - 1.0
        x = patchify(pixels, model.patch_size)
        found.append(value(x, full_index(weights.config.stage.num_steps, x)).float().cpu())
    return torch.cat(found)
