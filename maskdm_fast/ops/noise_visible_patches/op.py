"""noise_visible_patches: uint8 images in, noisy visible tokens and their targets out."""

import torch
from torch import Tensor

from maskdm_fast import random
from maskdm_fast.ops import backend as backends
from maskdm_fast.ops.checks import (
    FLOATING,
    accumulate_dtype,
    check_cu_seqlens,
    check_device,
    check_dtype,
    check_int,
    check_shape,
)
from maskdm_fast.ops.noise_visible_patches import native_impl, reference

IMPL = {"reference": reference, "cpu": native_impl, "cuda": native_impl}
if backends.has_triton():
    from maskdm_fast.ops.noise_visible_patches import triton_impl

    IMPL["triton"] = triton_impl

_OP = "noise_visible_patches"
_PREDICTIONS = ("eps", "x0", "v")


def _check_images(images: Tensor, patch_size: int, layout: str) -> int:
    """Check `images` and return N, the number of patches of each."""
    check_dtype(_OP, "images", images, (torch.uint8, *FLOATING))
    if layout == "bchw":
        check_shape(_OP, "images", images, "B", "C", "height", "width")
        height, width = images.shape[2:]
    elif layout == "bhwc":
        check_shape(_OP, "images", images, "B", "height", "width", "C")
        height, width = images.shape[1:3]
    else:
        raise ValueError(f"{_OP}: layout is {layout!r}, want 'bchw' or 'bhwc'")
    check_int(_OP, "patch_size", patch_size)
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"{_OP}: patch_size {patch_size} does not divide images of {height} x {width} pixels")
    return (height // patch_size) * (width // patch_size)


def _check_ids_keep(
    ids_keep: Tensor | None, cu_seqlens: Tensor | None, num_images: int, num_patches: int, device: torch.device
) -> None:
    if ids_keep is None:
        if cu_seqlens is not None:
            raise ValueError(f"{_OP}: cu_seqlens is given without ids_keep, whose images it tells apart")
        return
    check_dtype(_OP, "ids_keep", ids_keep, (torch.int64,))
    check_device(_OP, "ids_keep", ids_keep, device)
    if cu_seqlens is not None:
        check_cu_seqlens(_OP, cu_seqlens, device)
        check_shape(_OP, "ids_keep", ids_keep, "T")
        check_shape(_OP, "cu_seqlens", cu_seqlens, num_images + 1)
        return
    check_shape(_OP, "ids_keep", ids_keep, num_images, "K")
    if ids_keep.shape[1] > num_patches:
        raise ValueError(f"{_OP}: ids_keep names {ids_keep.shape[1]} patches of images that have {num_patches}")


def _check_coefficient(name: str, coefficient: Tensor, num_images: int, device: torch.device) -> None:
    check_dtype(_OP, name, coefficient, FLOATING)
    check_shape(_OP, name, coefficient, num_images)
    check_device(_OP, name, coefficient, device)


def _target_scales(prediction: str | tuple[Tensor, Tensor], alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """eps_scale and x0_scale of the target, in the dtype of `alpha` and `sigma`."""
    if prediction == "eps":
        return torch.ones_like(alpha), torch.zeros_like(alpha)
    if prediction == "x0":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction == "v":
        return alpha, -sigma
    if not isinstance(prediction, tuple) or len(prediction) != 2:
        raise ValueError(
            f"{_OP}: prediction is {prediction!r}, want one of {', '.join(_PREDICTIONS)}, or (eps_scale, x0_scale)"
        )
    for name, scale in zip(("eps_scale", "x0_scale"), prediction, strict=True):
        _check_coefficient(name, scale, alpha.shape[0], alpha.device)
    return prediction[0].to(alpha.dtype), prediction[1].to(alpha.dtype)


def noise_visible_patches(
    images: Tensor,
    ids_keep: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    *,
    patch_size: int,
    prediction: str | tuple[Tensor, Tensor] = "eps",
    cu_seqlens: Tensor | None = None,
    seed: int,
    step: int | Tensor,
    slots: Tensor | None = None,
    flip: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    layout: str = "bchw",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Diffuse the visible patches of images; masked patches are neither read nor noised.

        xt = alpha x0 + sigma eps
        target = eps_scale eps + x0_scale x0

    with (eps_scale, x0_scale) given for each image, or named: (1, 0) for eps, (0, 1) for x0, (alpha, -sigma) for v.

    ``eps`` is a pure function of ``(seed, step, slot, element)`` with ``element = n P P C + (py P + px) C + c`` for
    pixel ``(py, px)`` and channel c of patch n (`maskdm_fast.random`, stream NOISE), the same whatever is visible. It
    is computed in float32 (float64 if `out_dtype` is float64). No gradient flows to any argument.

    Args:
        images: ``[B, C, height, width]``, or ``[B, height, width, C]`` for layout ``"bhwc"``, any strides. uint8 in
            0..255 (``x0 = u / 127.5 - 1``), or floating point, taken as x0 in [-1, 1].
        ids_keep: int64 ``[B, K]``, or packed ``[T]``, patch indices in row-major order, ``0 <= id < N``; None: all
            patches in order.
        alpha: signal coefficient of each image, floating point ``[B]``.
        sigma: noise coefficient of each image, floating point ``[B]``.
        patch_size: P in pixels; divides height and width.
        prediction: ``"eps"``, ``"x0"`` or ``"v"``; or the pair (eps_scale, x0_scale), floating point ``[B]`` each.
        cu_seqlens: int32 ``[B + 1]``, cumulative counts of the packed form, from 0 to T.
        seed: ``0 <= seed < 2**63``.
        step: optimizer step, ``0 <= step < 2**32``: an int, or an int64 scalar tensor on the device of `images`.
        slots: int64 ``[B]``, places in the global batch, ``0 <= slot < 2**32``; None: ``0 .. B - 1``. Values in
            tensors, of `step` too, are not checked; only their low 32 bits count.
        flip: bool ``[B]``, True mirrors an image left-right before it is cut into patches.
        out_dtype: float32, float16, bfloat16 or float64.
        layout: ``"bchw"`` or ``"bhwc"``.
        backend: ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``; None chooses.

    Returns:
        ``(xt, target)``, both ``[B, K, P*P*C]``, or packed ``[T, P*P*C]``, of `out_dtype`, values of a patch in the
        order (py, px, c).

    Raises:
        ValueError, TypeError: wrong shape, value or device; wrong type or dtype.
        RuntimeError: an id out of range, or cu_seqlens does not rise from 0 to T (checked on CPU); the named backend
            cannot run.

    Source: MaskDM (arXiv 2306.11363), eq. 2; the v target is Salimans and Ho (arXiv 2202.00512).
    """
    num_patches = _check_images(images, patch_size, layout)
    num_images, device = images.shape[0], images.device
    _check_ids_keep(ids_keep, cu_seqlens, num_images, num_patches, device)
    _check_coefficient("alpha", alpha, num_images, device)
    _check_coefficient("sigma", sigma, num_images, device)
    if out_dtype not in FLOATING:
        raise TypeError(f"{_OP}: out_dtype is {out_dtype}, want float32, float16, bfloat16 or float64")
    random.check_seed(seed, _OP)
    if slots is None:
        slots = torch.arange(num_images, device=device)
    check_dtype(_OP, "slots", slots, (torch.int64,))
    check_shape(_OP, "slots", slots, num_images)
    check_device(_OP, "slots", slots, device)
    if flip is not None:
        check_dtype(_OP, "flip", flip, (torch.bool,))
        check_shape(_OP, "flip", flip, num_images)
        check_device(_OP, "flip", flip, device)
    if isinstance(step, Tensor):
        check_dtype(_OP, "step", step, (torch.int64,))
        check_shape(_OP, "step", step)
        check_device(_OP, "step", step, device)
    else:
        random.check_step(step, _OP)
        # A kernel argument in memory: a captured or compiled step does not have to be rebuilt for each value.
        step = torch.full((), step, dtype=torch.int64, device=device)
    dtype = accumulate_dtype(out_dtype)
    with torch.no_grad():
        alpha, sigma = alpha.to(dtype), sigma.to(dtype)
        return IMPL[backends.choose(_OP, IMPL, alpha, backend)].forward(
            images, ids_keep, cu_seqlens, alpha, sigma, *_target_scales(prediction, alpha, sigma), slots, step, flip,
            patch_size, layout == "bhwc", seed, out_dtype,
        )  # fmt: skip
