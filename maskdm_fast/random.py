"""Stateless random draws: every number is a pure function of ``(seed, stream, step, slot, element)``.

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) with

    key     = (seed low word, seed high word)
    counter = (block, slot, step, stream),    block = element // 4

``slot`` is the sample's place in the global batch and ``step`` the optimizer step, so a draw depends neither on the
number of processes, micro-batches or workers, nor on any state that a checkpoint would have to carry.
``csrc/common/philox.h`` computes the same words bit for bit.

Shapes: B slots, ``num`` elements per slot.
"""

import enum
import math
import numbers

import torch
from torch import Tensor

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


class Stream(enum.IntEnum):
    """What a draw is for. Streams never share numbers; values are part of the reproducibility contract."""

    TIMESTEP = 0
    MASK = 1
    NOISE = 2
    LABEL_DROP = 3
    FLIP = 4
    GENERATOR_NOISE = 5  # x_T of a sampler, input noise of a distilled generator
    SAMPLER_NOISE = 6  # noise added by a stochastic sampler at each of its steps
    DATA_ORDER = 7
    INIT = 8  # initial weights
    LABEL = 9  # class labels drawn for sampling
    SUBSET = 10  # which images stand for a data set in an evaluation
    MASK_RATIO = 11  # the share of an image that is masked, where images differ
    UNMASKED = 12  # which images of a masked batch stay whole
    GENERATOR_STEP = 13  # which step of a few-step generator is trained
    CRITIC_TIMESTEP = 14  # noise level at which a discriminator looks at images
    GUIDANCE = 15  # guidance weight of a student that is told it
    POLICY_NOISE = 16  # noise of a policy of few steps: its rollout
    POLICY_UPDATE = 17  # noise of the single steps on which such a policy is improved
    POLICY_RESAMPLE = 18  # noise of next states drawn anew for value targets
    TRANSITION_ORDER = 19  # which step of each trajectory a policy update takes
    LATENT_NOISE = 20  # noise on the latents of data that a sampler starts from
    LATENT_LEVEL = 21  # standard deviation of that noise


INTS = (int, torch.SymInt, numbers.Integral)
"""Of what type an integer may be. A tensor is none: reading it would wait for the device."""


def _refusal(name: str, value: int, num_bits: int, op: str | None) -> Exception:
    label = name if op is None else f"{op}: {name}"
    if not isinstance(value, INTS):
        return TypeError(f"{label} is of type {type(value).__name__}, want an int")
    return ValueError(f"{label} is {value}, want 0 <= {name} < 2**{num_bits}")


def check_seed(seed: int, op: str | None = None) -> int:
    """Return `seed`, or raise TypeError unless it is an int, and ValueError unless ``0 <= seed < 2**63``.

    Args:
        seed: what is checked.
        op: what messages begin with.
    """
    if not isinstance(seed, INTS) or not 0 <= seed < 2**63:
        raise _refusal("seed", seed, 63, op)
    return seed


def check_step(step: int, op: str | None = None) -> int:
    """Return `step`, or raise as `check_seed` does unless ``0 <= step < 2**32``: later ones would repeat draws."""
    if not isinstance(step, INTS) or not 0 <= step < 2**32:
        raise _refusal("step", step, 32, op)
    return step


def check_slots(slots: Tensor) -> None:
    """Raise TypeError unless `slots` is an int64 tensor, and ValueError unless it is ``[B]``; the values may be any."""
    if not isinstance(slots, Tensor):
        raise TypeError(f"slots is of type {type(slots).__name__}, want a tensor")
    if slots.dtype != torch.int64:
        raise TypeError(f"slots has dtype {str(slots.dtype).removeprefix('torch.')}, want int64")
    if slots.dim() != 1:
        raise ValueError(f"slots has shape {list(slots.shape)}, want [B]")


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors that broadcast together; the low 32 bits of each are one word of the counter.
        seed: the 64-bit key.

    Returns:
        The four output words as int64 tensors with values in ``[0, 2**32)``.
    """
    c0, c1, c2, c3 = (word & _WORD for word in counter)
    key_0, key_1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # The int64 products wrap modulo 2**64, which keeps all 64 bits of the unsigned product.
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & _WORD) ^ c1 ^ key_0,
            product_1 & _WORD,
            ((product_0 >> 32) & _WORD) ^ c3 ^ key_1,
            product_0 & _WORD,
        )
        key_0, key_1 = (key_0 + _WEYL_0) & _WORD, (key_1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3


def bits(num: int, *, seed: int, stream: Stream, step: int | Tensor, slots: Tensor) -> Tensor:
    """Uniform 32-bit words.

    Args:
        num: elements per slot.
        seed: run seed, ``0 <= seed < 2**63``.
        stream: what the draw is for.
        step: optimizer step, ``0 <= step < 2**32``; an int, or an int64 tensor that broadcasts with `slots`.
        slots: int64 ``[B]``, places in the global batch, ``0 <= slot < 2**32``. Values in tensors are not checked;
            only their low 32 bits count.

    Returns:
        int64 ``[B, num]`` with values in ``[0, 2**32)``, on the device of `slots`.

    Raises:
        ValueError, TypeError: wrong value or shape; wrong type or dtype.
    """
    check_seed(seed)
    check_slots(slots)
    num_blocks = (num + 3) // 4
    block = torch.arange(num_blocks, device=slots.device).expand(slots.shape[0], num_blocks)
    if not isinstance(step, Tensor):
        # Written by a kernel: a copy from the host would wait for everything that is queued on the device.
        step = torch.full((), check_step(step), dtype=torch.int64, device=slots.device)
    step = step.expand(slots.shape)
    words = philox4x32((block, slots[:, None], step[:, None], torch.full_like(block, int(stream))), seed)
    return torch.stack(words, dim=-1).flatten(1)[:, :num]


def bits_to_uniform(words: Tensor) -> Tensor:
    """Map 32-bit words to float32 in (0, 1): ``(word >> 9) * 2**-23 + 2**-24``.

    Every value is an odd multiple of 2**-24, so float32 holds it exactly and neither 0 nor 1 can occur.
    """
    return (words >> 9).to(torch.float32) * 2.0**-23 + 2.0**-24


def uniform(num: int, *, seed: int, stream: Stream, step: int | Tensor, slots: Tensor) -> Tensor:
    """Uniform draws in the open interval (0, 1), float32 ``[B, num]``; arguments as in `bits`."""
    return bits_to_uniform(bits(num, seed=seed, stream=stream, step=step, slots=slots))


def normal(
    num: int, *, seed: int, stream: Stream, step: int | Tensor, slots: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal draws by Box-Muller on the uniforms (0, 1) and (2, 3) of each block.

        z0 = sqrt(-2 ln u0) cos(2 pi u1),    z1 = sqrt(-2 ln u0) sin(2 pi u1)

    Args:
        dtype: float32, or float64 for the same draws computed in higher precision; other arguments as in `bits`.

    Returns:
        `dtype` ``[B, num]``.
    """
    even = num + num % 2
    u = uniform(even, seed=seed, stream=stream, step=step, slots=slots).to(dtype).unflatten(1, (even // 2, 2))
    radius, angle = torch.sqrt(-2.0 * torch.log(u[..., 0])), (2.0 * math.pi) * u[..., 1]
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(1)[:, :num]


def permutation(num: int, *, seed: int, stream: Stream, step: int) -> Tensor:
    """A pseudo-random permutation of ``range(num)``, int64 ``[num]``: the order that sorts `num` words."""
    words = bits(num, seed=seed, stream=stream, step=step, slots=torch.zeros(1, dtype=torch.int64))
    return torch.argsort(words[0], stable=True)
