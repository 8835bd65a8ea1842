"""Device functions that the Triton kernels of several ops call."""

import triton
import triton.language as tl


@triton.jit
def image_of(cu_seqlens_ptr, token, num_images):
    """The image b with ``cu_seqlens[b] <= token < cu_seqlens[b + 1]``, for a block of packed tokens, by binary search.

    Images may be empty. Whatever `token` and cu_seqlens hold, the result is in range.
    """
    low, high = tl.zeros_like(token), tl.zeros_like(token) + num_images - 1
    remaining = num_images
    while remaining > 1:
        middle = (low + high) // 2
        later = tl.load(cu_seqlens_ptr + middle + 1) <= token
        low, high = tl.where(later, tl.minimum(middle + 1, high), low), tl.where(later, high, middle)
        remaining = (remaining + 1) // 2
    return low


@triton.jit
def stretch(count, part, programs, BLOCK: tl.constexpr):
    """First and last value, exclusive, of a program: whole blocks, so that all but the last are read aligned."""
    share = tl.cdiv(tl.cdiv(count, programs), BLOCK) * BLOCK
    first = tl.minimum(part * share, count)
    return first, tl.minimum(first + share, count)
