"""The original U-ViT's parts, its sizes, and activation checkpointing."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from maskdm_fast.diffusion import patchify, unpatchify
from maskdm_fast.models import CONFIGS, UViT, UViTConfig

SHAPE = {"image_size": 12, "patch_size": 3, "channels": 2, "dim": 24, "num_heads": 3, "mlp_ratio": 2.0}
PLAIN = UViTConfig(depth=3, num_classes=4, **SHAPE)
ORIGINAL = UViTConfig(depth=3, num_classes=4, time_mlp=True, final_conv=True, **SHAPE)


def make_inputs(keep=None):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, keep or 16, 18, generator=generator)
    ids_keep = None if keep is None else torch.randperm(16, generator=generator)[:keep].sort().values.expand(2, -1)
    return tokens, torch.tensor([3, 700]), ids_keep, torch.tensor([1, -1])


@pytest.mark.parametrize(
    ("name", "million"),
    [
        ("uvit-small32", 44),
        ("uvit-small64", 44),
        ("uvit-mid64", 131),
        ("uvit-large64", 287),
        ("uvit-large-latent32", 287),
        ("uvit-large-latent64", 287),
        ("uvit-huge-latent32", 501),
        ("uvit-huge-latent64", 501),
    ],
)
def test_parameters_of_the_original_sizes(name, million):
    """The counts of the U-ViT paper."""
    with torch.device("meta"):
        model = UViT(CONFIGS[name])
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == million


def test_final_convolution_starts_as_the_identity():
    tokens, t, _, labels = make_inputs()
    with_conv = UViT(UViTConfig(depth=3, num_classes=4, final_conv=True, **SHAPE))
    # Parameter i is drawn in slot i, and the convolution comes last.
    assert torch.equal(with_conv(tokens, t, None, labels), UViT(PLAIN)(tokens, t, None, labels))


def test_final_convolution_runs_on_the_image_and_time_mlp_on_the_time():
    model, inputs = UViT(ORIGINAL).double(), make_inputs()
    tokens, t, _, labels = inputs[0].double(), *inputs[1:]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights = model.state_dict()
    out = model(tokens, t, None, labels)

    plain = UViT(PLAIN).double()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    time = F.silu(F.linear(plain.time_tokens(t), weights["time_mlp.fc1.weight"], weights["time_mlp.fc1.bias"]))
    time = F.linear(time, weights["time_mlp.fc2.weight"], weights["time_mlp.fc2.bias"])
    image = unpatchify(plain(tokens, time, None, labels), 3, 12, 12, 2)
    image = F.conv2d(image, weights["final_conv.weight"], weights["final_conv.bias"], padding=1)
    torch.testing.assert_close(out, patchify(image, 3), rtol=1e-12, atol=1e-12)


def test_final_convolution_refuses_a_part_of_the_image():
    with pytest.raises(ValueError, match="pretrain with final_conv=False"):
        UViT(ORIGINAL)(*make_inputs(keep=7))


def test_the_original_trains_under_autocast_and_compiles():
    model, inputs = UViT(ORIGINAL), make_inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), model(*inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(*inputs)
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("keep", [None, 7])
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointed_gradients_are_the_same(keep, autocast):
    config = ORIGINAL if keep is None else PLAIN
    gradients = {}
    for checkpointing in (False, True):
        model = UViT(config)
        model.activation_checkpointing = checkpointing
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = model(*make_inputs(keep))
        out.float().square().mean().backward()
        gradients[checkpointing] = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in gradients[False].items():
        assert torch.equal(gradients[True][name], gradient), name


def test_checkpointing_keeps_the_inputs_of_the_blocks_only():
    config = UViTConfig(image_size=32, patch_size=4, dim=64, depth=9, num_heads=2)
    tokens, t = torch.randn(2, 64, 48), torch.tensor([3, 700])

    def saved_bytes(checkpointing):
        model = UViT(config)
        model.activation_checkpointing = checkpointing
        kept = {parameter.untyped_storage().data_ptr(): 0 for parameter in model.parameters()}

        def pack(tensor):
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(tokens, t)
            return sum(kept.values()), out

    plain, _ = saved_bytes(False)
    low, out = saved_bytes(True)
    # One [B, extras + N, D] per block, of which the long skips keep the in-blocks' anyway; the norm and head beside.
    one = 2 * 65 * 64 * 4
    assert low < (config.num_blocks + 4) * one
    assert plain > 4 * low
    out.sum().backward()


def test_checkpointing_costs_nothing_without_gradients():
    model = UViT(PLAIN)
    model.activation_checkpointing = True
    calls = []
    model.mid_block.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        assert not model(*make_inputs()).requires_grad
    model(*make_inputs()).sum().backward()
    assert len(calls) == 3  # once, then once forward and once again in the backward


def test_checkpointing_compiles_without_graph_breaks():
    model, inputs = UViT(PLAIN), make_inputs(keep=7)
    model.activation_checkpointing = True
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), model(*inputs))


def test_the_table_of_sizes_in_the_documents():
    text = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text("utf-8")
    for name, config in CONFIGS.items():
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in UViT(config).parameters())
        shape = (config.image_size, config.patch_size, config.dim, config.num_blocks, config.num_heads)
        assert f"| `{name}` | {' | '.join(map(str, shape))} | {count:,} |" in text
