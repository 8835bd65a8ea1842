"""Noise schedules, masks, the masked objective, and samplers. The network is always an argument."""

from maskdm_fast.diffusion.denoiser import Denoiser, Guidance
from maskdm_fast.diffusion.mask_schedule import MaskSchedule
from maskdm_fast.diffusion.masking import BlockMask, CropMask, Mask, NoMask, PatchMask
from maskdm_fast.diffusion.objective import MaskedObjective, Network
from maskdm_fast.diffusion.patches import patchify, unpatchify
from maskdm_fast.diffusion.prediction import to_eps, to_v, to_x0
from maskdm_fast.diffusion.samplers import sample
from maskdm_fast.diffusion.schedule import (
    DiscreteSchedule,
    EDMSchedule,
    FlowSchedule,
    NoiseSchedule,
    VPSchedule,
    cosine_schedule,
    linear_schedule,
    make_schedule,
    scaled_linear_schedule,
    shifted_cosine_schedule,
)
from maskdm_fast.diffusion.timesteps import TimestepDraw
from maskdm_fast.diffusion.transitions import SAMPLERS, Transition, ddim_transitions_at, make_transitions
from maskdm_fast.diffusion.weighting import LossWeight

__all__ = [
    "SAMPLERS",
    "BlockMask",
    "CropMask",
    "Denoiser",
    "DiscreteSchedule",
    "EDMSchedule",
    "FlowSchedule",
    "Guidance",
    "LossWeight",
    "Mask",
    "MaskSchedule",
    "MaskedObjective",
    "Network",
    "NoMask",
    "NoiseSchedule",
    "PatchMask",
    "TimestepDraw",
    "Transition",
    "VPSchedule",
    "cosine_schedule",
    "ddim_transitions_at",
    "linear_schedule",
    "make_schedule",
    "make_transitions",
    "patchify",
    "sample",
    "scaled_linear_schedule",
    "shifted_cosine_schedule",
    "to_eps",
    "to_v",
    "to_x0",
    "unpatchify",
]
