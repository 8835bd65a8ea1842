import dataclasses

import pytest
import torch

from maskdm_fast.models import UViT, UViTConfig
from maskdm_fast.models.packing import Packing

CONFIG = UViTConfig(image_size=12, patch_size=3, channels=2, dim=24, depth=5, num_heads=3, num_classes=5)
COUNTS = {"different": [3, 16, 1, 7], "equal": [6, 6, 6, 6], "one_empty": [2, 0, 5, 4]}


def make_model(config=CONFIG):
    """float64, with biases and norms away from 0 and 1."""
    model = UViT(config, seed=5).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0).add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def make_inputs(counts, config=CONFIG):
    generator = torch.Generator().manual_seed(1)
    ids_keep = torch.cat([torch.randperm(config.num_tokens, generator=generator)[:n].sort().values for n in counts])
    tokens = torch.randn(sum(counts), config.token_dim, generator=generator, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    return tokens, torch.tensor([0, 300, 700, 999]), ids_keep, torch.tensor([4, -1, 0, 2]), cu_seqlens


def gradients(model, out):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    return dict(
        zip(
            (name for name, _ in model.named_parameters()),
            torch.autograd.grad((out * weight).sum(), list(model.parameters())),
            strict=True,
        )
    )


def assert_same(model, out, expected):
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    other = gradients(model, expected)
    for name, grad in gradients(model, out).items():
        torch.testing.assert_close(grad, other[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["keep", "checkpoint"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_packed_equals_each_image_alone(counts, checkpointing):
    model = make_model()
    tokens, t, ids_keep, labels, cu_seqlens = make_inputs(counts)
    bounds = list(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True))
    alone = [
        model(tokens[None, a:b], t[i : i + 1], ids_keep[None, a:b], labels[i : i + 1])[0]
        for i, (a, b) in enumerate(bounds)
    ]
    model.activation_checkpointing = checkpointing
    assert_same(model, model(tokens, t, ids_keep, labels, cu_seqlens), torch.cat(alone))


def test_equal_counts_equal_the_dense_form():
    model = make_model()
    tokens, t, ids_keep, labels, cu_seqlens = make_inputs(COUNTS["equal"])
    dense = model(tokens.view(4, 6, -1), t, ids_keep.view(4, 6), labels)
    assert_same(model, model(tokens, t, ids_keep, labels, cu_seqlens), dense.flatten(0, 1))


def test_ready_time_tokens():
    model = make_model()
    tokens, t, ids_keep, labels, cu_seqlens = make_inputs(COUNTS["different"])
    expected = model(tokens, t, ids_keep, labels, cu_seqlens)
    assert torch.equal(model(tokens, model.time_tokens(t), ids_keep, labels, cu_seqlens), expected)


def test_autocast_and_compile():
    model = make_model(dataclasses.replace(CONFIG, depth=1)).float()
    tokens, t, ids_keep, labels, cu_seqlens = make_inputs(COUNTS["different"])
    expected = model(tokens.float(), t, ids_keep, labels, cu_seqlens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(tokens.float(), t, ids_keep, labels, cu_seqlens)
    assert low.dtype == torch.bfloat16
    assert (low.float() - expected).norm() < 10 * 2**-8 * expected.norm()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens.float(), t, ids_keep, labels, cu_seqlens), expected)


def test_layout():
    packing = Packing.of(torch.tensor([0, 2, 2, 5], dtype=torch.int32), 2, 5)
    assert packing.cu_seqlens.tolist() == [0, 4, 6, 11] and packing.cu_seqlens.dtype == torch.int32
    assert packing.extras_at.tolist() == [[0, 1], [4, 5], [6, 7]]
    assert packing.patches_at.tolist() == [2, 3, 8, 9, 10]
    extras, patches = -torch.arange(1.0, 7.0).view(3, 2, 1), torch.arange(5.0)[:, None]
    joined = packing.join(extras, patches)
    assert joined[:, 0].tolist() == [-1, -2, 0, 1, -3, -4, -5, -6, 2, 3, 4]
    assert torch.equal(packing.patches(joined), patches)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.zeros(4, 6, 18)}, r"tokens has shape \[4, 6, 18\], want \[T, 18\]"),
        ({"t": torch.zeros(3)}, r"t has shape \[3\], want \[4\]"),
        ({"ids_keep": None}, "cu_seqlens is given without ids_keep"),
        ({"ids_keep": torch.zeros(4, 6, dtype=torch.int64)}, r"ids_keep has shape \[4, 6\], want \[24\]"),
        ({"labels": torch.zeros(24, dtype=torch.int64)}, r"labels has shape \[24\], want \[4\]"),
    ],
)
def test_errors(changes, message):
    names = ("tokens", "t", "ids_keep", "labels", "cu_seqlens")
    arguments = dict(zip(names, make_inputs(COUNTS["equal"]), strict=True)) | changes
    with pytest.raises(ValueError, match=message):
        make_model()(**arguments)
