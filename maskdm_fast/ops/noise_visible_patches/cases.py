"""Inputs of noise_visible_patches for tests and benchmarks."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskdm_fast.ops.noise_visible_patches.op import noise_visible_patches
from maskdm_fast.testing import draw, draw_ids, draw_packed_ids, restride

WITH_GRAD = ()
EXACT = False
FIXED_DTYPE = ()


@dataclass(frozen=True)
class Case:
    name: str
    num_images: int
    height: int
    width: int
    channels: int
    patch_size: int
    num_visible: int | None  # None: ids_keep is None
    prediction: str = "eps"  # or "pair": (eps_scale, x0_scale)
    layout: str = "bchw"
    pixels: str = "uint8"  # or "float": of the tested dtype; or "half": float16 in any, as latents are kept
    memory: str = "contiguous"
    flip: bool = False
    step: int = 3
    packed: bool = False  # image b then keeps (num_visible + 2 b) % (N + 1) patches


CASES = (
    Case("plain", 3, 16, 16, 3, 4, 5),
    Case("no_images", 0, 16, 16, 3, 4, 5),
    Case("one_visible", 2, 8, 8, 3, 4, 1),
    Case("all_listed", 2, 8, 8, 3, 4, 4),
    Case("all", 2, 8, 8, 3, 4, None),
    Case("x0", 3, 16, 16, 3, 4, 5, prediction="x0"),
    Case("v", 3, 16, 16, 3, 4, 5, prediction="v"),
    Case("channels_last", 3, 16, 16, 3, 4, 5, layout="bhwc"),
    Case("flip", 3, 16, 16, 3, 4, 6, flip=True, layout="bhwc"),
    Case("float", 3, 16, 16, 3, 4, 5, pixels="float"),
    Case("float_v_flip", 3, 8, 24, 2, 2, 7, pixels="float", prediction="v", flip=True),
    Case("latents", 3, 16, 16, 4, 2, 9, pixels="half", layout="bhwc"),
    Case("latents_packed_flip", 3, 6, 6, 16, 2, 4, pixels="half", layout="bhwc", packed=True, flip=True),
    Case("odd_patch", 2, 9, 6, 1, 3, 4),  # 9 values a patch: patches begin inside a Philox block
    Case("one_pixel", 2, 4, 4, 3, 1, 9),
    Case("large_patch", 2, 32, 32, 3, 16, 2),
    Case("transposed", 3, 16, 16, 3, 4, 5, memory="transposed"),
    Case("expanded", 3, 16, 16, 3, 4, 5, memory="expanded"),
    Case("sliced", 3, 16, 16, 3, 4, 5, pixels="float", memory="sliced"),
    Case("late_step", 2, 8, 8, 3, 4, 2, step=2**31 + 5),
    Case("pair", 3, 16, 16, 3, 4, 5, prediction="pair"),
    Case("packed", 4, 8, 12, 3, 4, 3, packed=True, prediction="v"),  # 3, 5, 0, 2 of 6 patches
    Case("packed_odd_flip", 3, 9, 6, 1, 3, 5, packed=True, prediction="pair", flip=True, pixels="float"),
    Case("packed_no_images", 0, 8, 8, 3, 4, 2, packed=True),
)

BENCHMARKS = (
    Case("small64 26 of 256", 64, 64, 64, 3, 4, 26, layout="bhwc"),
    Case("base256 410 of 4096", 4, 256, 256, 3, 4, 410, layout="bhwc"),
    Case("ViT-B/16 26 of 256", 64, 256, 256, 3, 16, 26, layout="bhwc"),
)


def random_case(rng: random.Random) -> Case:
    patch_size = rng.randint(1, 5)
    rows, columns = rng.randint(1, 5), rng.randint(1, 5)
    num_visible = rng.choice([None, rng.randint(1, rows * columns)])
    return Case(
        "random",
        rng.randint(0, 4),
        rows * patch_size,
        columns * patch_size,
        rng.randint(1, 4),
        patch_size,
        num_visible,
        prediction=rng.choice(["eps", "x0", "v", "pair"]),
        layout=rng.choice(["bchw", "bhwc"]),
        pixels=rng.choice(["uint8", "float", "half"]),
        memory=rng.choice(["contiguous", "transposed", "expanded"]),
        flip=rng.random() < 0.5,
        step=rng.randint(0, 2**32 - 1),
        packed=num_visible is not None and rng.random() < 0.5,
    )


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int) -> dict[str, Any]:
    shape = (case.num_images, case.channels, case.height, case.width)
    if case.layout == "bhwc":
        shape = (case.num_images, case.height, case.width, case.channels)
    values = draw(shape, torch.float32, device, seed)
    if case.pixels == "uint8":
        pixels = (values * 60 + 128).clamp(0, 255).to(torch.uint8)
    else:
        pixels = values.to(torch.float16 if case.pixels == "half" else dtype)
    num_patches = (case.height // case.patch_size) * (case.width // case.patch_size)
    ids_keep = cu_seqlens = None
    if case.packed:
        counts = [(case.num_visible + 2 * image) % (num_patches + 1) for image in range(case.num_images)]
        ids_keep, cu_seqlens = draw_packed_ids(counts, num_patches, device, seed)
    elif case.num_visible is not None:
        ids_keep = draw_ids(case.num_images, case.num_visible, num_patches, device, seed)
    angle = draw((case.num_images,), torch.float64, device, seed + 1)
    scales = draw((2, case.num_images), torch.float32, device, seed + 2).unbind()
    return {
        "images": restride(pixels, case.memory),
        "ids_keep": ids_keep,
        "alpha": angle.cos().float(),
        "sigma": angle.sin().abs().float(),
        "patch_size": case.patch_size,
        "prediction": scales if case.prediction == "pair" else case.prediction,
        "cu_seqlens": cu_seqlens,
        "seed": 2**40 + seed,
        "step": case.step,
        "slots": 7 + 3 * torch.arange(case.num_images, device=device),
        "flip": torch.arange(case.num_images, device=device) % 2 == 0 if case.flip else None,
        "out_dtype": dtype,
        "layout": case.layout,
    }


def call(inputs: dict[str, Any], backend: str) -> dict[str, Tensor]:
    xt, target = noise_visible_patches(**inputs, backend=backend)
    return {"xt": xt, "target": target}
