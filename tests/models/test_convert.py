"""Checkpoints with the names and shapes of the official codes, against those networks written out plainly."""

import math

import pytest
import torch
import torch.nn.functional as F

from maskdm_fast.diffusion import patchify, unpatchify
from maskdm_fast.models import UViT, is_official, load_official
from maskdm_fast.models.layers import timestep_embedding

DIM, HEADS, DEPTH, PATCH, CHANNELS, SIZE = 24, 3, 4, 3, 2, 12
NUM_TOKENS = (SIZE // PATCH) ** 2


def official_shapes(code, *, num_classes=0, qkv_bias=False, time_mlp=False, conv=False):
    """Names and shapes of one network of `code`, "MaskDM" or "U-ViT", as its ``state_dict()`` has them."""
    front = "encoder." if code == "MaskDM" else ""
    shapes = {
        f"{front}patch_embed.proj.weight": (DIM, CHANNELS, PATCH, PATCH),
        f"{front}patch_embed.proj.bias": (DIM,),
        f"{front}norm.weight": (DIM,),
        f"{front}norm.bias": (DIM,),
    }
    table = "encoder.encoder_pos_embed" if code == "MaskDM" else "pos_embed"
    shapes[table] = (1, NUM_TOKENS + (2 if num_classes else 1), DIM)
    if num_classes:
        shapes[f"{front}label_emb.weight"] = (num_classes, DIM)
        if code == "MaskDM":
            shapes["encoder.uncond_embed"] = (1, DIM)
    if time_mlp:
        shapes[f"{front}time_embed.0.weight"], shapes[f"{front}time_embed.0.bias"] = (4 * DIM, DIM), (4 * DIM,)
        shapes[f"{front}time_embed.2.weight"], shapes[f"{front}time_embed.2.bias"] = (DIM, 4 * DIM), (DIM,)
    blocks = [f"{kind}_blocks.{index}" for kind in ("in", "out") for index in range(DEPTH // 2)]
    for block in ["mid_block", *blocks]:
        name = f"{front}{block}"
        for norm in ("norm1", "norm2"):
            shapes[f"{name}.{norm}.weight"], shapes[f"{name}.{norm}.bias"] = (DIM,), (DIM,)
        shapes[f"{name}.attn.qkv.weight"] = (3 * DIM, DIM)
        if qkv_bias and code == "MaskDM":
            shapes[f"{name}.attn.q_bias"], shapes[f"{name}.attn.v_bias"] = (DIM,), (DIM,)
        elif qkv_bias:
            shapes[f"{name}.attn.qkv.bias"] = (3 * DIM,)
        shapes[f"{name}.attn.proj.weight"], shapes[f"{name}.attn.proj.bias"] = (DIM, DIM), (DIM,)
        shapes[f"{name}.mlp.fc1.weight"], shapes[f"{name}.mlp.fc1.bias"] = (2 * DIM, DIM), (2 * DIM,)
        shapes[f"{name}.mlp.fc2.weight"], shapes[f"{name}.mlp.fc2.bias"] = (DIM, 2 * DIM), (DIM,)
        if block.startswith("out"):
            shapes[f"{name}.skip_linear.weight"], shapes[f"{name}.skip_linear.bias"] = (DIM, 2 * DIM), (DIM,)
    head = "encoder_to_output" if code == "MaskDM" else "decoder_pred"
    shapes[f"{head}.weight"], shapes[f"{head}.bias"] = (PATCH**2 * CHANNELS, DIM), (PATCH**2 * CHANNELS,)
    if conv:
        shapes["final_layer.weight"], shapes["final_layer.bias"] = (CHANNELS, CHANNELS, 3, 3), (CHANNELS,)
    return shapes


def official_state(code, *, seed=0, dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(seed)
    shapes = official_shapes(code, **options)
    return {name: (0.3 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}


def official_network(state, images, t, label_rows=None, mask=None):
    """The image ``[B, C, h, w]`` (or, with a mask, the visible patch vectors) that the official network predicts.

    `label_rows` is the class token ``[B, D]``; `mask` is bool ``[B, N]``, True = dropped.
    """
    state = {name.removeprefix("encoder."): tensor for name, tensor in state.items()}

    def linear(name, x, bias=None):
        return x @ state[f"{name}.weight"].T + (state.get(f"{name}.bias", 0.0) if bias is None else bias)

    def norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    x = x.flatten(2).transpose(1, 2)
    # float32 in both codes; at t = 700 the order of these factors moves an angle by 1e-5, so it is that of `layers`.
    angles = t.float()[:, None] * torch.exp(torch.arange(DIM // 2) * (-math.log(10000.0) / (DIM // 2)))
    time = torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype)
    if "time_embed.0.weight" in state:
        time = linear("time_embed.2", F.silu(linear("time_embed.0", time)))
    extras = [time] if label_rows is None else [label_rows, time]
    table = state["encoder_pos_embed"] if "encoder_pos_embed" in state else state["pos_embed"]
    x = torch.cat([torch.stack(extras, 1), x], dim=1) + table
    if mask is not None:
        x = x[~F.pad(mask, (len(extras), 0))].reshape(len(x), -1, DIM)

    def block(name, x, skip=None):
        if skip is not None:
            x = linear(f"{name}.skip_linear", torch.cat([x, skip], dim=-1))
        bias = None
        if f"{name}.attn.q_bias" in state:
            q_bias, v_bias = state[f"{name}.attn.q_bias"], state[f"{name}.attn.v_bias"]
            bias = torch.cat([q_bias, torch.zeros_like(v_bias), v_bias])
        qkv = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", x), bias)
        q, k, v = qkv.reshape(*x.shape[:2], 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (DIM // HEADS) ** -0.5).softmax(-1)
        x = x + linear(f"{name}.attn.proj", (weights @ v).transpose(1, 2).reshape(x.shape))
        return x + linear(f"{name}.mlp.fc2", F.gelu(linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x))))

    skips = []
    for index in range(DEPTH // 2):
        x = block(f"in_blocks.{index}", x)
        skips.append(x)
    x = block("mid_block", x)
    for index in range(DEPTH // 2):
        x = block(f"out_blocks.{index}", x, skips.pop())
    head = "encoder_to_output" if "encoder_to_output.weight" in state else "decoder_pred"
    x = linear(head, norm("norm", x))[:, len(extras) :]
    if mask is not None:
        return x
    # "B (h w) (p1 p2 C) -> B C (h p1) (w p2)"
    side = SIZE // PATCH
    x = x.reshape(-1, side, side, PATCH, PATCH, CHANNELS).permute(0, 5, 1, 3, 2, 4).reshape(images.shape)
    if "final_layer.weight" in state:
        x = F.conv2d(x, state["final_layer.weight"], state["final_layer.bias"], padding=1)
    return x


def maskdm_checkpoint(raw, ema):
    """What MaskDM's training code saves: two networks inside GaussianDiffusion and EMA wrappers, and the rest."""
    betas = torch.linspace(1e-4, 0.02, 1000)
    whole = {"betas": betas, **{f"model.{name}": tensor for name, tensor in raw.items()}}
    average = {
        "initted": torch.tensor(True),
        "step": torch.tensor(7),
        **{f"online_model.{name}": tensor for name, tensor in whole.items()},
        "ema_model.betas": betas,
        **{f"ema_model.model.{name}": tensor for name, tensor in ema.items()},
    }
    opt = {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 2e-4}]}
    return {"step": 7, "model": whole, "opt": opt, "ema": average, "scaler": {"scale": 65536.0, "_growth_tracker": 7}}


@pytest.fixture
def save(tmp_path):
    def save(data, name="model.pth"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        torch.save(data, path)
        return path

    return save


def ours(weights):
    model = UViT(weights.config).double()
    model.load_state_dict(weights.tensors)
    return model


IMAGES = torch.randn(2, CHANNELS, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
T = torch.tensor([3, 700])


def check(model, state, label_rows=None, labels=None):
    out = unpatchify(model(patchify(IMAGES, PATCH), T, None, labels), PATCH, SIZE, SIZE, CHANNELS)
    torch.testing.assert_close(out, official_network(state, IMAGES, T, label_rows), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"time_mlp": True}, {"conv": True}], ids=str)
@pytest.mark.parametrize("code", ["MaskDM", "U-ViT"])
def test_outputs_are_those_of_the_official_network(save, code, options):
    state = official_state(code, **options)
    weights = load_official(save(state), num_heads=HEADS)
    assert weights.code == code
    check(ours(weights), state)


def test_masked_outputs_are_those_of_the_official_network(save):
    state = official_state("MaskDM", qkv_bias=True)
    model = ours(load_official(save(state), num_heads=HEADS))
    ids_keep = torch.tensor([[0, 3, 7, 10, 15], [1, 2, 4, 8, 9]])
    mask = torch.ones(2, NUM_TOKENS, dtype=torch.bool).scatter(1, ids_keep, False)
    tokens = patchify(IMAGES, PATCH).gather(1, ids_keep[:, :, None].expand(-1, -1, PATCH**2 * CHANNELS))
    expected = official_network(state, IMAGES, T, mask=mask)
    torch.testing.assert_close(model(tokens, T, ids_keep), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("which", ["ema", "raw"])
def test_training_checkpoint_of_maskdm(save, which):
    states = {"raw": official_state("MaskDM", seed=1), "ema": official_state("MaskDM", seed=2)}
    path = save(maskdm_checkpoint(states["raw"], states["ema"]), "model-1.pt")
    check(ours(load_official(path, which, num_heads=HEADS)), states[which])


@pytest.mark.parametrize("which", ["ema", "raw"])
def test_checkpoint_folder_of_uvit(save, which):
    states = {"raw": official_state("U-ViT", seed=1), "ema": official_state("U-ViT", seed=2)}
    save(states["raw"], "5000.ckpt/nnet.pth")
    folder = save(states["ema"], "5000.ckpt/nnet_ema.pth").parent
    assert is_official(folder)
    check(ours(load_official(folder, which, num_heads=HEADS)), states[which])


def test_labels_of_maskdm(save):
    state = official_state("MaskDM", num_classes=5)
    model = ours(load_official(save(state), num_heads=HEADS))
    table, uncond = state["encoder.label_emb.weight"], state["encoder.uncond_embed"]
    check(model, state, table[[4, 0]], torch.tensor([4, 0]))
    check(model, state, uncond.expand(2, -1), torch.tensor([-1, -1]))
    check(model, state, uncond.expand(2, -1), None)


def test_maskdm_has_trained_no_unconditional_embedding(save):
    """Every class-conditional network of its code has one, and the code drops no label."""
    assert not load_official(save(official_state("MaskDM", num_classes=5)), num_heads=HEADS).drops_labels


def test_last_label_of_uvit_can_be_the_unconditional_one(save):
    state = official_state("U-ViT", num_classes=5)
    table, path = state["label_emb.weight"], save(state)
    found = load_official(path, num_heads=HEADS, num_classes=4)
    model = ours(found)
    assert model.config.num_classes == 4 and found.drops_labels
    check(model, state, table[[3, 4]], torch.tensor([3, -1]))
    found = load_official(path, num_heads=HEADS)
    model = ours(found)
    assert model.config.num_classes == 5 and not found.drops_labels
    check(model, state, torch.stack([table[4], table.mean(0)]), torch.tensor([4, -1]))


def test_configuration_is_read_off_the_shapes(save):
    config = load_official(save(official_state("U-ViT", num_classes=5, qkv_bias=True)), num_heads=HEADS).config
    assert (config.image_size, config.patch_size, config.channels) == (SIZE, PATCH, CHANNELS)
    assert (config.dim, config.num_blocks, config.mlp_ratio) == (DIM, 5, 2.0)
    assert config.qkv_bias and not config.time_mlp and not config.final_conv


def test_half_precision_weights_become_float32(save):
    weights = load_official(save(official_state("U-ViT", dtype=torch.float16)), num_heads=HEADS)
    assert {tensor.dtype for tensor in weights.tensors.values()} == {torch.float32}


def test_files_of_the_old_format(save, tmp_path):
    state = official_state("U-ViT")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    check(ours(load_official(tmp_path / "old.pth", num_heads=HEADS)), state)


def drop(name):
    return {key: value for key, value in official_state("U-ViT").items() if key != name}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"weights": torch.zeros(3)}, r"neither MaskDM's nor U-ViT's network is in it \(no tensor named"),
        ([1, 2], "neither MaskDM's nor U-ViT's"),
        (drop("in_blocks.1.norm1.weight"), r"in_blocks.1.norm1.weight do not fit"),
        (drop("patch_embed.proj.weight"), r"patch_embed\.weight is not in it"),
        (drop("out_blocks.0.skip_linear.weight"), r"out_blocks.0.skip.weight_skip, out_blocks.0.skip.weight_x"),
        (official_state("U-ViT") | {"surplus": torch.zeros(1)}, "surplus do not fit"),
        (official_state("U-ViT") | {"pos_embed": torch.zeros(1, 16, DIM)}, "has 15 patches, want a square number"),
        (official_state("U-ViT") | {"context_embed.weight": torch.zeros(1)}, "text-to-image network"),
        (official_state("MaskDM") | {"decoder_pos_embed": torch.zeros(1)}, "with a decoder, which is not supported"),
        ({"model": {"encoder.encoder_pos_embed": torch.zeros(1, 17, DIM)}}, "has no 'ema'"),
        ({0: torch.zeros(3)}, "neither MaskDM's nor U-ViT's"),
        ({"model": {0: torch.zeros(3)}, "ema": {0: torch.zeros(3)}}, "neither MaskDM's nor U-ViT's"),
        (
            official_state("MaskDM", num_classes=2) | {"encoder.uncond_embed": torch.tensor(1.0)},
            r"embed has shape \[\]",
        ),
        (official_state("U-ViT") | {"patch_embed.proj.weight": torch.zeros(DIM, 18)}, r"\[24, 18\], want 4 axes"),
        (official_state("U-ViT") | {"out_blocks.0.skip_linear.weight": torch.zeros(DIM)}, r"\[24\], want 2 axes"),
        (
            {name: value for name, value in official_state("MaskDM", qkv_bias=True).items() if "v_bias" not in name},
            r"mid_block\.attention\.v_bias is not in it",
        ),
    ],
)
def test_what_cannot_be_read_is_named(save, data, message):
    path = save(data)
    with pytest.raises(ValueError, match=message) as error:
        load_official(path, num_heads=HEADS)
    assert str(path) in str(error.value)


def test_what_is_no_tensor_is_passed_over(save):
    """A count of epochs beside the weights ended in a traceback."""
    state = official_state("U-ViT")
    check(ours(load_official(save({**state, "epoch": 3, 5: "five"}), num_heads=HEADS)), state)


def test_time_embedding_is_the_official_one_but_for_rounding():
    t = torch.tensor([0.0, 0.5, 499.0, 999.0])
    half = 256
    frequencies = torch.exp(-math.log(10000) * torch.arange(start=0, end=half, dtype=torch.float32) / half)
    angles = t[:, None] * frequencies[None]
    official = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    torch.testing.assert_close(timestep_embedding(t, 2 * half), official, rtol=0.0, atol=999 * 2**-20)


def test_heads_by_width(save):
    """For a caller who does not know the width: the heads of another width are not taken."""
    path = save(official_state("U-ViT"))
    assert load_official(path, num_heads={DIM: HEADS, 192: 1}).config.num_heads == HEADS
    with pytest.raises(ValueError, match="say how many heads"):
        load_official(path, num_heads={192: 3})


def test_heads_that_cannot_be_guessed_are_asked_for(save):
    with pytest.raises(ValueError, match="not a multiple of 64; say how many heads"):
        load_official(save(official_state("U-ViT")))


def test_files_that_are_no_checkpoint(tmp_path):
    (tmp_path / "text.pth").write_text("weights")
    (tmp_path / "empty.pth").touch()
    for name in ("text.pth", "empty.pth"):
        with pytest.raises(ValueError, match=r"is no checkpoint that torch\.load"):
            load_official(tmp_path / name)
    for missing in (tmp_path / "nothing.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such checkpoint file"):
            load_official(missing)
        assert not is_official(missing)


def test_damaged_files_are_named(save):
    path = save(official_state("U-ViT"))
    whole = path.read_bytes()
    for end in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="is no checkpoint"):
            load_official(path, num_heads=HEADS)
    for first in (b"\x80\x02.", b"\xff\xfe\x00", b"q", b"{}"):
        path.write_bytes(first)
        with pytest.raises(ValueError, match="is no checkpoint"):
            load_official(path, num_heads=HEADS)


class Malice:
    def __reduce__(self):
        return print, ("code in a checkpoint ran",)


def test_code_in_a_file_is_not_run(save, capsys):
    with pytest.raises(ValueError, match="is no checkpoint"):
        load_official(save({"model": Malice()}))
    assert "ran" not in capsys.readouterr().out
