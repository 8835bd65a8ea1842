"""Checkpoints of the official MaskDM and U-ViT codes, as weights of `UViT`.

| code | file | what is read |
|---|---|---|
| MaskDM | ``model-N.pt``: {step, model, opt, ema, scaler} | ``model`` (raw) or the ``ema_model`` half of ``ema`` |
| MaskDM | a bare state dict of its network | all of it |
| U-ViT | ``nnet.pth``, ``nnet_ema.pth``, or the folder ``N.ckpt`` of both | all of it |

Both codes embed patches by a convolution and join long skips by one Linear on a concatenation; here the kernel becomes
the matrix of a Linear on patch vectors, and the Linear two halves. MaskDM's separate biases of q and v become one
bias of qkv with zeros for k, which a softmax over keys does not see.

Source: github.com/jiachenlei/maskdm, models/mask_uvit.py and train_step.py; github.com/baofff/U-ViT, libs/uvit.py and
utils.py. Names and shapes only.
"""

import dataclasses
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from maskdm_fast.models.uvit import UViT, UViTConfig

_UVIT_FILES = {"ema": "nnet_ema.pth", "raw": "nnet.pth"}
# A tensor that only this code's network has; what stands before its name stands before all of them.
_ANCHORS = {"MaskDM": "encoder.encoder_pos_embed", "U-ViT": "decoder_pred.weight"}
_OTHER_NETWORKS = {
    "approx_patch_embed.": "MaskDM's wavelet network",
    "encoder_to_decoder.": "a MaskDM network with a decoder",
    "decoder_pos_embed": "a MaskDM network with a decoder",
    "context_embed.": "U-ViT's text-to-image network",
}
_MASKDM_TO_UVIT = {"encoder.encoder_pos_embed": "pos_embed", "encoder_to_output.": "decoder_pred.", "encoder.": ""}
_UVIT_TO_OURS = {
    "patch_embed.proj.": "patch_embed.",
    "pos_embed": "positions",
    "label_emb.weight": "label_embed",
    "time_embed.0.": "time_mlp.fc1.",
    "time_embed.2.": "time_mlp.fc2.",
    "decoder_pred.": "head.",
    "final_layer.": "final_conv.",
}
# Of the tensors that are taken apart, or that the configuration is read off, by how their names end.
_NUM_AXES = {
    "positions": 3,
    "patch_embed.weight": 4,
    "mid_block.mlp.fc1.weight": 2,
    "label_embed": 2,
    "uncond_embed": 2,
    ".skip.weight": 2,
    ".q_bias": 1,
    ".v_bias": 1,
}


@dataclasses.dataclass(frozen=True)
class OfficialWeights:
    """Weights of an official checkpoint, ready for ``UViT(config).load_state_dict(tensors)``.

    Attributes:
        config: read off the shapes.
        tensors: state dict of a `UViT`, on the CPU, at least float32.
        code: which code wrote the checkpoint.
        drops_labels: whether it has an unconditional embedding that was trained, with dropped labels. U-ViT's latents
            models have one. MaskDM's code adds one to every network with classes and never drops a label.
    """

    config: UViTConfig
    tensors: dict[str, Tensor]
    code: Literal["MaskDM", "U-ViT"]
    drops_labels: bool


def is_official(path: Path | str) -> bool:
    """Whether `path` can be meant for `load_official`: a file, or a folder with a file that U-ViT's code writes."""
    path = Path(path)
    return path.is_file() or any((path / name).is_file() for name in _UVIT_FILES.values())


def load_official(
    path: Path | str,
    which: Literal["ema", "raw"] = "ema",
    *,
    num_heads: int | Mapping[int, int] | None = None,
    num_classes: int | None = None,
) -> OfficialWeights:
    """Read a checkpoint of the official MaskDM or U-ViT code; no code in the file is run.

    Args:
        path: see the table above.
        which: the moving average or the raw weights, where the file or folder has both. A file that holds one network
            is read whatever this says.
        num_heads: attention heads, which no shape tells; or heads by width, for a file whose width is not known. None,
            or a width that is not there: heads of 64 values, as in every published configuration, but 16 at width 1152
            (U-ViT-H).
        num_classes: classes it was trained on. If the label table has one row more, its last row becomes the
            unconditional embedding, as U-ViT's ImageNet latents configurations use it. None: every row is a class.

    Returns:
        The weights. Where a class-conditional network has no unconditional embedding at all, it is the mean of the
        classes'. Unless `OfficialWeights.drops_labels`, it was never trained and needs training with dropped labels
        before guidance.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is not such a checkpoint, or of a network that `UViT` is not.
    """
    if which not in _UVIT_FILES:
        raise ValueError(f"which is {which!r}, want 'ema' or 'raw'")
    path = Path(path)
    if path.is_dir():
        path = path / _UVIT_FILES[which]
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint file: {path}")
    try:
        # Mapped files are read as far as they are used: of 16 bytes per parameter, 4.
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # bytes that are no pickle, or a damaged one, can fail anywhere inside the reader
        raise ValueError(
            f"{path} is no checkpoint that torch.load(weights_only=True) reads ({_reason(error)})"
        ) from error
    try:
        return convert_official(data, which, num_heads=num_heads, num_classes=num_classes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _reason(error: Exception) -> str:
    """Why torch.load refuses a file, without the advice to run the code in it."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    return text.splitlines()[0].split(". ")[0]


def convert_official(
    data: Mapping[str, Any],
    which: Literal["ema", "raw"] = "ema",
    *,
    num_heads: int | Mapping[int, int] | None = None,
    num_classes: int | None = None,
) -> OfficialWeights:
    """Convert what ``torch.load`` read; arguments and errors as in `load_official`."""
    code, state = _network_of(data, which)
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        out[_renamed(name)] = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    for name, tensor in out.items():
        num_axes = next((number for end, number in _NUM_AXES.items() if name.endswith(end)), tensor.ndim)
        if tensor.ndim != num_axes:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, want {num_axes} axes")
    for name in [name for name in out if name.endswith(".q_bias")]:
        block = name.removesuffix("q_bias")
        _check_there(out, f"{block}v_bias")
        q_bias, v_bias = out.pop(name), out.pop(f"{block}v_bias")
        out[f"{block}qkv.bias"] = torch.cat((q_bias, torch.zeros_like(q_bias), v_bias))
    for name in [name for name in out if name.endswith(".skip.weight")]:
        halves = out.pop(name).chunk(2, dim=1)  # of cat([x, skip])
        out |= {f"{name}_x": halves[0].contiguous(), f"{name}_skip": halves[1].contiguous()}
    for name in ("positions", "patch_embed.weight", "mid_block.mlp.fc1.weight"):
        _check_there(out, name)
    out["positions"] = out["positions"][0]
    kernel = out["patch_embed.weight"]  # [D, C, P, P]
    drops_labels = False
    if "label_embed" in out:
        out["label_embed"], uncond = _labels(out["label_embed"], out.get("uncond_embed"), num_classes)
        drops_labels = code == "U-ViT" and uncond is not None
        out["uncond_embed"] = out["label_embed"].mean(0) if uncond is None else uncond
    config = _config_of(out, kernel, num_heads)
    out["patch_embed.weight"] = kernel.permute(0, 2, 3, 1).flatten(1).contiguous()
    _check_complete(out, config)
    return OfficialWeights(config, out, code, drops_labels)


def _check_there(tensors: Mapping[str, Tensor], name: str) -> None:
    if name not in tensors:
        raise ValueError(f"{name} is not in it")


def _network_of(data: Mapping[str, Any], which: str) -> tuple[Literal["MaskDM", "U-ViT"], dict[str, Tensor]]:
    """The code that wrote a checkpoint, and the tensors of one network in it by their bare names."""
    if isinstance(data, Mapping) and isinstance(data.get("model"), Mapping):
        part, data = ("ema", data.get("ema")) if which == "ema" else ("model", data["model"])
        if not isinstance(data, Mapping):
            raise ValueError(f"the checkpoint has no {part!r}; read the other weights ('raw' or 'ema')")
        if which == "ema":
            data = {name: value for name, value in data.items() if str(name).startswith("ema_model.")}
    found = data.items() if isinstance(data, Mapping) else ()
    # A count of epochs, say, may stand beside the tensors.
    tensors = {name: value for name, value in found if isinstance(name, str) and isinstance(value, Tensor)}
    for mark, network in _OTHER_NETWORKS.items():
        if any(mark in name for name in tensors):
            raise ValueError(f"this is {network}, which is not supported")
    for code, anchor in _ANCHORS.items():
        prefix = next((name.removesuffix(anchor) for name in tensors if name.endswith(anchor)), None)
        if prefix is not None:
            return code, {name[len(prefix) :]: tensors[name] for name in tensors if name.startswith(prefix)}
    raise ValueError(
        f"neither MaskDM's nor U-ViT's network is in it (no tensor named ...{' or ...'.join(_ANCHORS.values())})"
    )


def _renamed(name: str) -> str:
    for table in (_MASKDM_TO_UVIT, _UVIT_TO_OURS):
        for old, new in table.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
    return name.replace(".attn.", ".attention.").replace(".skip_linear.", ".skip.")


def _labels(table: Tensor, uncond: Tensor | None, num_classes: int | None) -> tuple[Tensor, Tensor | None]:
    """The rows of the classes, and the unconditional embedding, if there is one."""
    if uncond is not None:
        return table, uncond[0]
    if num_classes is not None and len(table) == num_classes + 1:
        return table[:-1], table[-1]
    return table, None


def _config_of(tensors: Mapping[str, Tensor], kernel: Tensor, num_heads: int | Mapping[int, int] | None) -> UViTConfig:
    dim, channels, patch_size, _ = kernel.shape
    num_classes = len(tensors["label_embed"]) if "label_embed" in tensors else 0
    num_tokens = len(tensors["positions"]) - (2 if num_classes else 1)
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(f"the position table has {num_tokens} patches, want a square number")
    if isinstance(num_heads, Mapping):
        num_heads = num_heads.get(dim)
    if num_heads is None:
        if dim % 64:
            raise ValueError(
                f"the width is {dim}, not a multiple of 64; say how many heads it has (num_heads; of a run, dim, too)"
            )
        num_heads = 16 if dim == 1152 else dim // 64
    hidden = tensors["mid_block.mlp.fc1.weight"].shape[0]
    mlp_ratio = hidden / dim
    if int(dim * mlp_ratio) != hidden:
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    return UViTConfig(
        image_size=side * patch_size,
        patch_size=patch_size,
        channels=channels,
        dim=dim,
        depth=2 * len({name.split(".")[1] for name in tensors if name.startswith("in_blocks.")}) + 1,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        qkv_bias="mid_block.attention.qkv.bias" in tensors,
        num_classes=num_classes,
        time_mlp="time_mlp.fc1.weight" in tensors,
        final_conv="final_conv.weight" in tensors,
    )


def _check_complete(tensors: Mapping[str, Tensor], config: UViTConfig) -> None:
    with torch.device("meta"):
        want = UViT(config).state_dict()
    wrong = sorted(
        name
        for name in want.keys() | tensors.keys()
        if name not in want or name not in tensors or want[name].shape != tensors[name].shape
    )
    if wrong:
        raise ValueError(f"the network in it is not a U-ViT of {config}: {', '.join(wrong[:10])} do not fit")
