import math

import pytest
import torch
import torch.nn.functional as F

from maskdm_fast.diffusion import patchify
from maskdm_fast.models import CONFIGS, UViT, UViTConfig
from maskdm_fast.models.layers import Block

TINY = UViTConfig(image_size=12, patch_size=3, channels=2, dim=24, depth=5, num_heads=3, mlp_ratio=2.0)
TINY_LABELS = UViTConfig(
    image_size=12, patch_size=3, channels=2, dim=24, depth=4, num_heads=2, mlp_ratio=2.0, qkv_bias=True, num_classes=5
)


def make_ids(batch, total, keep):
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(total, generator=generator)[:keep].sort().values for _ in range(batch)])


def plain_uvit(weights, config, images, t, labels, mask):
    """The network as published: every patch embedded by a convolution, boolean indexing, skips joined by concatenation.

    `weights` maps the names of UViT's parameters to tensors; `mask` is bool [B, N], True = masked, or None.
    """
    dim, heads, patch = config.dim, config.num_heads, config.patch_size
    kernel = weights["patch_embed.weight"].view(dim, patch, patch, config.channels).permute(0, 3, 1, 2)
    x = F.conv2d(images, kernel, weights["patch_embed.bias"], stride=patch).flatten(2).transpose(1, 2)

    half = dim // 2
    angles = t.float()[:, None] * torch.exp(torch.arange(half) * (-math.log(10000.0) / half))
    extras = [torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype)]
    if config.num_classes:
        table = torch.cat([weights["label_embed"], weights["uncond_embed"][None]])
        extras.insert(0, table[torch.full_like(t, -1) if labels is None else labels])
    x = torch.cat([torch.stack(extras, dim=1), x], dim=1) + weights["positions"]
    if mask is not None:
        dropped = F.pad(mask, (len(extras), 0))
        x = x[~dropped].reshape(x.shape[0], -1, dim)

    def block(name, x):
        def param(key):
            return weights.get(f"{name}.{key}")

        h = F.layer_norm(x, (dim,), param("norm1.weight"), param("norm1.bias"))
        qkv = F.linear(h, param("attention.qkv.weight"), param("attention.qkv.bias"))
        q, k, v = qkv.reshape(*x.shape[:2], 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + F.linear(h, param("attention.proj.weight"), param("attention.proj.bias"))
        h = F.layer_norm(x, (dim,), param("norm2.weight"), param("norm2.bias"))
        h = F.gelu(F.linear(h, param("mlp.fc1.weight"), param("mlp.fc1.bias")))
        return x + F.linear(h, param("mlp.fc2.weight"), param("mlp.fc2.bias"))

    skips = []
    for index in range(config.depth // 2):
        x = block(f"in_blocks.{index}", x)
        skips.append(x)
    x = block("mid_block", x)
    for index in range(config.depth // 2):
        name = f"out_blocks.{index}.skip"
        joined = torch.cat([weights[f"{name}.weight_x"], weights[f"{name}.weight_skip"]], dim=1)
        x = block(f"out_blocks.{index}", F.linear(torch.cat([x, skips.pop()], dim=-1), joined, weights[f"{name}.bias"]))
    x = F.layer_norm(x, (dim,), weights["norm.weight"], weights["norm.bias"])
    return F.linear(x, weights["head.weight"], weights["head.bias"])[:, len(extras) :]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("small64", 44_292_144),
        ("small128", 44_685_360),
        ("small256", 46_258_224),
        ("base256", 102_417_456),
        ("emoji32", 3_363_312),
    ],
)
def test_parameter_counts(name, count):
    with torch.device("meta"):
        model = UViT(CONFIGS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_depths_of_one_network():
    for depth, blocks in ((1, 1), (2, 3), (3, 3), (12, 13), (13, 13)):
        config = UViTConfig(image_size=8, patch_size=4, dim=8, depth=depth, num_heads=1)
        assert config.num_blocks == blocks
        with torch.device("meta"):
            assert sum(isinstance(module, Block) for module in UViT(config).modules()) == blocks


@pytest.mark.parametrize("keep", [None, 1, 7, 16], ids=lambda keep: f"keep_{keep}")
@pytest.mark.parametrize(
    ("config", "labels"),
    [(TINY, None), (TINY_LABELS, None), (TINY_LABELS, torch.tensor([4, -1, 0]))],
    ids=["unconditional", "class_token_alone", "labels"],
)
def test_equals_plain_network_that_embeds_all_and_drops(config, labels, keep):
    torch.manual_seed(0)
    model = UViT(config, seed=5).double()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from 0 and 1, logits away from flat
            parameter.mul_(4.0).add_(0.05 * torch.randn_like(parameter))
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    images = torch.randn(3, config.channels, config.image_size, config.image_size, dtype=torch.float64)
    noise = torch.randn(3, config.num_tokens, config.token_dim, dtype=torch.float64)
    t = torch.tensor([0, 500, 999])

    ids_keep = mask = None
    tokens, target = patchify(images, config.patch_size), noise
    if keep is not None:
        ids_keep = make_ids(3, config.num_tokens, keep)
        mask = torch.ones(3, config.num_tokens, dtype=torch.bool).scatter(1, ids_keep, False)
        rows = ids_keep[:, :, None].expand(-1, -1, config.token_dim)
        tokens, target = tokens.gather(1, rows), noise.gather(1, rows)

    out = model(tokens, t, ids_keep, labels)
    loss = F.mse_loss(out, target)
    loss.backward()
    plain = plain_uvit(weights, config, images, t, labels, mask)
    plain_target = noise if mask is None else noise[~mask].reshape(plain.shape)
    plain_loss = F.mse_loss(plain, plain_target)
    plain_loss.backward()

    torch.testing.assert_close(out, plain, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-12, atol=0.0)
    for name, parameter in model.named_parameters():
        if labels is None and name == "label_embed":
            assert parameter.grad is None
        else:
            torch.testing.assert_close(
                parameter.grad, weights[name].grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_all_ids_in_order_is_the_same_as_none():
    model = UViT(TINY)
    tokens, t = torch.randn(2, 16, 18), torch.tensor([3, 700])
    torch.testing.assert_close(model(tokens, t), model(tokens, t, torch.arange(16).expand(2, 16)))


def test_ready_time_tokens_are_the_same_as_times():
    model, tokens, t, labels = UViT(TINY_LABELS), torch.randn(2, 16, 18), torch.tensor([3, 700]), torch.tensor([1, -1])
    expected = model(tokens, t, None, labels)
    torch.testing.assert_close(model(tokens, model.time_tokens(t), None, labels), expected)
    one = model.time_tokens(t[1:]).expand(2, -1)
    torch.testing.assert_close(model(tokens, one, None, labels)[1], expected[1])


def test_float_times_and_low_precision_parameters():
    model = UViT(TINY)
    tokens, t = torch.randn(2, 16, 18), torch.tensor([3, 700])
    assert torch.equal(model(tokens, t), model(tokens, t.double()))
    low = UViT(TINY).bfloat16()
    assert low(tokens, t).dtype == torch.bfloat16


def test_autocast_keeps_the_residual_stream_low():
    model = UViT(TINY_LABELS)
    tokens, t, labels = torch.randn(2, 7, 18), torch.tensor([3, 700]), torch.tensor([1, -1])
    ids_keep = make_ids(2, 16, 7)
    expected = model(tokens, t, ids_keep, labels)
    dtypes = []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(tokens, t, ids_keep, labels)
    out.float().square().mean().backward()
    assert set(dtypes) == {torch.bfloat16}
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    # Five blocks add ten times to the stream, each rounding it by up to 2**-9.
    assert (out.float() - expected).norm() < 10 * 2**-9 * expected.norm()


def test_compiles_without_graph_breaks():
    model = UViT(TINY)
    tokens, t, ids_keep = torch.randn(2, 7, 18), torch.tensor([3, 700]), make_ids(2, 16, 7)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, t, ids_keep), model(tokens, t, ids_keep))


def test_initial_weights_are_drawn_statelessly():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = UViT(TINY_LABELS, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, other = UViT(TINY_LABELS, seed=7).state_dict(), UViT(TINY_LABELS, seed=8).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    # Equal shapes, different slots.
    assert not torch.equal(first["in_blocks.0.mlp.fc1.weight"], first["in_blocks.1.mlp.fc1.weight"])


def test_initial_distributions():
    config = UViTConfig(image_size=32, patch_size=4, dim=128, depth=3, num_heads=2, num_classes=50)
    for name, values in UViT(config).named_parameters():
        values = values.detach()
        assert values.isfinite().all()
        if name.startswith("patch_embed"):
            bound = 48**-0.5
            assert values.abs().max() < bound
            expected = bound / 3**0.5
        elif name.endswith("bias"):
            assert (values == 0).all()
            continue
        elif "norm" in name:
            assert (values == 1).all()
            continue
        else:
            expected = 1.0 if name == "label_embed" else 0.02
        # Mean and std of n draws scatter by std/sqrt(n) and less than that.
        spread = 5 * expected * values.numel() ** -0.5
        assert abs(values.mean().item()) < spread, name
        assert abs(values.std().item() - expected) < spread, name


def test_meta_construction_then_reset():
    with torch.device("meta"):
        model = UViT(TINY)
    model.to_empty(device="cpu").reset_parameters(4)
    for name, values in UViT(TINY, seed=4).state_dict().items():
        assert torch.equal(model.state_dict()[name], values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "image_size is 0, want at least 1"),
        ({"num_heads": -1}, "num_heads is -1"),
        ({"image_size": 14}, "image_size 14 is not a multiple of patch_size 3; choose an image_size of 12 or 15"),
        ({"dim": 25}, "dim 25 is not a multiple of num_heads 3; choose a dim of 24 or 27"),
        ({"dim": 27}, "dim is 27, want an even number"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio is inf"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio is nan"),
    ],
)
def test_configuration_errors(changes, message):
    arguments = {"image_size": 12, "patch_size": 3, "dim": 24, "depth": 3, "num_heads": 3} | changes
    with pytest.raises(ValueError, match=message):
        UViTConfig(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.zeros(2, 7, 17)}, r"tokens has shape \[2, 7, 17\], want \[B, K, 18\]"),
        ({"tokens": torch.zeros(7, 18)}, r"tokens has shape \[7, 18\]"),
        ({"t": torch.zeros(3)}, r"t has shape \[3\], want \[2\]"),
        ({"ids_keep": None}, "7 patches per image and ids_keep is None, want all 16"),
        ({"ids_keep": torch.zeros(2, 6, dtype=torch.int64)}, r"ids_keep has shape \[2, 6\], want \[2, 7\]"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "num_classes=0; pass None"),
        ({"labels": torch.zeros(1, dtype=torch.int64), "config": TINY_LABELS}, r"labels has shape \[1\], want \[2\]"),
    ],
)
def test_forward_errors(changes, message):
    arguments = {"tokens": torch.zeros(2, 7, 18), "t": torch.zeros(2), "ids_keep": make_ids(2, 16, 7)} | changes
    model = UViT(arguments.pop("config", TINY))
    with pytest.raises(ValueError, match=message):
        model(**arguments)


def test_labels_out_of_range_raise():
    for label in (5, -2):
        with pytest.raises(IndexError):
            UViT(TINY_LABELS)(torch.zeros(1, 16, 18), torch.zeros(1), labels=torch.tensor([label]))
