"""Sampling from students that bring their own sampler, with the weights of a run."""

from torch import Tensor

from maskdm_fast.diffusion import Denoiser
from maskdm_fast.distill.dxmi_policy import DenoiserMean, PolicyGenerator, join_policy
from maskdm_fast.train.policy_config import PolicyDistillationConfig

SIGMAS = "sigmas."
"""Begins the names of a policy's noise among the tensors of its network."""


def policy_generator(
    stage: PolicyDistillationConfig, denoiser: Denoiser, sigmas: dict[str, Tensor], token_shape: tuple[int, int]
) -> PolicyGenerator:
    """The policy of a run, ready to be sampled.

    Args:
        stage: its configuration.
        denoiser: its network.
        sigmas: state dict of its `LogSigmas`.
        token_shape: ``(N, P*P*C)`` of an image.
    """
    steps = stage.steps(denoiser.schedule)
    log_sigmas = stage.log_sigmas(steps)
    log_sigmas.load_state_dict(sigmas)
    policy = join_policy(DenoiserMean(denoiser, steps), log_sigmas.to(denoiser.device))
    return PolicyGenerator(denoiser, policy, steps.start_std, len(steps.steps), token_shape)


def without_sigmas(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a policy's network, and those of its noise by their own names."""
    sigmas = {name.removeprefix(SIGMAS): tensor for name, tensor in tensors.items() if name.startswith(SIGMAS)}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(SIGMAS)}, sigmas
