"""Noise schedules, masks, the masked objective, and samplers. The network is always an argument."""

from maskdm_fast.diffusion.denoiser import Denoiser
from maskdm_fast.diffusion.masking import BlockMask, CropMask, Mask, NoMask, PatchMask
from maskdm_fast.diffusion.objective import MaskedObjective, Network
from maskdm_fast.diffusion.patches import patchify, unpatchify
from maskdm_fast.diffusion.prediction import to_eps, to_v, to_x0
from maskdm_fast.diffusion.samplers import ddim_transitions, ddpm_transitions, sample, sampling_times
from maskdm_fast.diffusion.schedule import NoiseSchedule, cosine_schedule, linear_schedule, make_schedule

__all__ = [
    "BlockMask",
    "CropMask",
    "Denoiser",
    "Mask",
    "MaskedObjective",
    "Network",
    "NoMask",
    "NoiseSchedule",
    "PatchMask",
    "cosine_schedule",
    "ddim_transitions",
    "ddpm_transitions",
    "linear_schedule",
    "make_schedule",
    "patchify",
    "sample",
    "sampling_times",
    "to_eps",
    "to_v",
    "to_x0",
    "unpatchify",
]
