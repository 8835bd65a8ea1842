"""Distillation: one- and few-step generators from diffusion models. One file per method; the mathematics alone.

Score distillation (`SiD`, `SiDA`, `DMD2`) is a `Method`: two losses on three networks. Guided, progressive and
consistency distillation are a `Regression`: one loss of a student at the targets of its teacher. DxMI trains a policy
(`make_policy`) and an energy on each other (`update_loss`). All is written against `diffusion.Denoiser`, so that it
serves every kind of prediction and every noise schedule.
"""

from maskdm_fast.distill.consistency import ConsistencyDistillation, StepMapping, consistency_transitions
from maskdm_fast.distill.critic import Critic, CriticHead
from maskdm_fast.distill.dmd2 import DMD2
from maskdm_fast.distill.dxmi import DxMINetworks, update_loss
from maskdm_fast.distill.dxmi_config import DxMIConfig
from maskdm_fast.distill.dxmi_policy import GaussianPolicy, ddpm_policy, make_policy, ve_policy
from maskdm_fast.distill.dxmi_rollout import adapt_velocity, rollout
from maskdm_fast.distill.fake_score import FakeScore
from maskdm_fast.distill.generator import Generator, generate
from maskdm_fast.distill.guided import GuidedDistillation, GuidedNetwork
from maskdm_fast.distill.levels import LevelDraw, falling_levels, time_of_level
from maskdm_fast.distill.method import Alternation, Method
from maskdm_fast.distill.networks import GuidanceScales, Networks, clean_gradients, frozen
from maskdm_fast.distill.progressive import ProgressiveDistillation, halvings, progressive_transitions
from maskdm_fast.distill.regression import Regression
from maskdm_fast.distill.sid import SiD
from maskdm_fast.distill.sida import SiDA

METHODS: dict[str, type[SiD | DMD2]] = {"sid": SiD, "sida": SiDA, "dmd2": DMD2}
"""Score distillation by name."""

__all__ = [
    "DMD2",
    "METHODS",
    "Alternation",
    "ConsistencyDistillation",
    "Critic",
    "CriticHead",
    "DxMIConfig",
    "DxMINetworks",
    "FakeScore",
    "GaussianPolicy",
    "Generator",
    "GuidanceScales",
    "GuidedDistillation",
    "GuidedNetwork",
    "LevelDraw",
    "Method",
    "Networks",
    "ProgressiveDistillation",
    "Regression",
    "SiD",
    "SiDA",
    "StepMapping",
    "adapt_velocity",
    "clean_gradients",
    "consistency_transitions",
    "ddpm_policy",
    "falling_levels",
    "frozen",
    "generate",
    "halvings",
    "make_policy",
    "progressive_transitions",
    "rollout",
    "time_of_level",
    "update_loss",
    "ve_policy",
]
