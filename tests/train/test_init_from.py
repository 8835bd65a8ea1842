"""Weights handed from one run to another of a different size, or from the official codes."""

import shutil
from dataclasses import replace

import pytest
import torch

from maskdm_fast.diffusion.masking import NoMask
from maskdm_fast.models import UViT, UViTConfig, transfer
from maskdm_fast.train import load_weights, train
from maskdm_fast.train.config import DiffusionConfig

MODEL = UViTConfig(image_size=8, patch_size=2, dim=16, depth=3, num_heads=2)
UNMASKED = {"mask": NoMask(), "num_images": 4, "lr": 1e-30}  # one step that moves nothing but zeros


def assert_handed_over(run, expected):
    found = load_weights(run, "raw").tensors
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0.0, atol=1e-29)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 16}, "image_size 8 -> 16"),
        ({"image_size": 16, "patch_size": 4}, "image_size 8 -> 16, patch_size 2 -> 4"),
        ({"final_conv": True}, "final_conv False -> True"),
    ],
)
def test_a_run_goes_on_at_another_size(make_config, tmp_path, capsys, changes, words):
    train(make_config(num_images=8), tmp_path / "first")
    larger = replace(MODEL, **changes)
    train(make_config(model=larger, init_from="first", **UNMASKED), tmp_path / "second")
    assert f"were made to fit: {words}\n" in capsys.readouterr().err
    expected = transfer(load_weights(tmp_path / "first").tensors, MODEL, larger)
    assert_handed_over(tmp_path / "second", expected)


def test_weights_that_were_asked_for_something_else(make_config, tmp_path):
    train(make_config(num_images=8), tmp_path / "first")
    asked = DiffusionConfig(schedule="linear", prediction="v")
    with pytest.warns(RuntimeWarning) as found:
        train(make_config(num_images=4, diffusion=asked, init_from="first"), tmp_path / "second")
    words = [str(warning.message).partition("trained with ")[2].partition(":")[0] for warning in found]
    assert words == ["schedule cosine, this run has linear", "prediction eps, this run has v"]


@pytest.mark.parametrize(
    ("schedule", "patch_size", "warns"), [("cosine", 32, False), ("cosine", 16, True), ("linear", 32, True)]
)
def test_the_shifted_schedule_makes_up_for_larger_patches(make_config, tmp_path, recwarn, schedule, patch_size, warns):
    """They average the noise by as much as it is shifted from the cosine; this was warned of like any other change."""
    first = make_config(model=replace(MODEL, image_size=64, patch_size=16), diffusion=DiffusionConfig(schedule))
    train(replace(first, stage=replace(first.stage, num_images=4)), tmp_path / "first")
    larger = replace(first.model, image_size=128, patch_size=patch_size)
    shifted = DiffusionConfig("shifted-cosine")
    train(make_config(model=larger, diffusion=shifted, init_from="first", **UNMASKED), tmp_path / "second")
    words = f"were trained with schedule {schedule}, this run has shifted-cosine"
    assert [words in str(warning.message) for warning in recwarn.list] == [True] * warns


def test_other_differences_are_still_errors(make_config, tmp_path):
    train(make_config(num_images=8), tmp_path / "first")
    other_heads = replace(MODEL, image_size=16, num_heads=4)
    with pytest.raises(ValueError, match="num_heads: 2 there, 4 here"):
        train(make_config(model=other_heads, init_from="first"), tmp_path / "second")


def test_a_mask_and_a_final_convolution_do_not_go_together(make_config, tmp_path):
    with pytest.raises(ValueError, match=r"mask is patch:0\.5, but the model has a final convolution"):
        train(make_config(model=replace(MODEL, final_conv=True)), tmp_path / "run")


def official_names(ours):
    """The tensors of a network of the shape of `MODEL` as the code of U-ViT has them."""
    official = {
        "patch_embed.proj.weight": ours["patch_embed.weight"].view(16, 2, 2, 3).permute(0, 3, 1, 2).contiguous(),
        "patch_embed.proj.bias": ours["patch_embed.bias"],
        "pos_embed": ours["positions"][None],
    }
    for name, tensor in ours.items():
        if name.endswith("skip.weight_x"):
            joined = torch.cat([tensor, ours[name.replace("weight_x", "weight_skip")]], dim=1)
            official[name.replace("skip.weight_x", "skip_linear.weight")] = joined
        elif not name.startswith(("patch_embed.", "positions")) and not name.endswith("weight_skip"):
            for old, new in (("attention.", "attn."), ("skip.", "skip_linear."), ("final_conv.", "final_layer.")):
                name = name.replace(old, new)
            official[f"decoder_pred.{name[5:]}" if name.startswith("head.") else name] = tensor
    return official


@pytest.mark.parametrize("final_conv", [False, True])
def test_init_from_a_file_of_the_official_code(make_config, tmp_path, capsys, final_conv):
    config = replace(MODEL, final_conv=final_conv)
    ours = UViT(config, seed=3).state_dict()
    torch.save(official_names(ours), tmp_path / "nnet_ema.pth")
    train(make_config(model=config, init_from="nnet_ema.pth", **UNMASKED), tmp_path / "run")
    assert_handed_over(tmp_path / "run", ours)
    said = "nnet_ema.pth is a file of U-ViT, which does not name its noise schedule: taken for cosine; --schedule"
    assert said in capsys.readouterr().err


def test_official_weights_that_are_asked_for_something_else(make_config, tmp_path):
    """They predict the noise; what the run predicts was taken for their own, without a word."""
    torch.save(official_names(UViT(MODEL).state_dict()), tmp_path / "nnet_ema.pth")
    asked = DiffusionConfig(prediction="v")
    with pytest.warns(RuntimeWarning, match="were trained with prediction eps, this run has v"):
        train(make_config(num_images=4, diffusion=asked, init_from="nnet_ema.pth"), tmp_path / "run")


def _in_classes(images, folder, names):
    """The images of a folder, in classes of these names."""
    for number, path in enumerate(sorted(images.iterdir())):
        target = folder / names[number % len(names)]
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return str(folder)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("ant", "cat"), None),
        (("cat", "dog"), "1 as in {} (cat), 1 new (dog), 1 left out (ant)"),
        (("ant", "bee", "cat"), "2 as in {} (ant, cat), 1 new (bee)"),
        (("cat",), "1 as in {} (cat), 1 left out (ant)"),
        (("eel", "fox"), "2 new (eel, fox), 2 left out (ant, cat)"),
    ],
)
def test_classes_keep_their_embeddings_by_name(make_config, image_folder, tmp_path, capsys, names, words):
    """Labels are numbers, and number 0 of another data set is another class."""
    classes = {"class_conditional": True, "label_drop": 0.1}
    old = _in_classes(image_folder, tmp_path / "old", ("ant", "cat"))
    train(make_config(num_images=8, data=old, **classes), tmp_path / "first")
    weights = load_weights(tmp_path / "first")
    capsys.readouterr()
    data = _in_classes(image_folder, tmp_path / "new", names)
    larger = replace(MODEL, image_size=16)  # made to fit besides
    config = make_config(data=data, model=larger, init_from="first", seed=5, **classes, **UNMASKED)
    train(config, tmp_path / "second")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("classes")]
    assert said == ([] if words is None else ["classes by their names: " + words.format(weights.checkpoint.path)])
    model = replace(larger, num_classes=len(names))
    expected = transfer(weights.tensors, replace(MODEL, num_classes=2), replace(larger, num_classes=2))
    begun = UViT(model, seed=5).state_dict()["label_embed"]
    rows = {"ant": weights.tensors["label_embed"][0], "cat": weights.tensors["label_embed"][1]}
    expected["label_embed"] = torch.stack([rows.get(name, begun[label]) for label, name in enumerate(names)])
    assert_handed_over(tmp_path / "second", expected)


def test_a_file_that_is_no_checkpoint(make_config, tmp_path):
    """Said in one line, without PyTorch's advice to run the code in it."""
    (tmp_path / "notes.txt").write_text("weights")
    message = r"notes\.txt is no checkpoint that torch\.load\(weights_only=True\) reads \(Unsupported operand 119\)$"
    with pytest.raises(ValueError, match=message):
        train(make_config(init_from="notes.txt"), tmp_path / "run")
