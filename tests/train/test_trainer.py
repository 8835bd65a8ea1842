import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from maskdm_fast.data import find_source, pack
from maskdm_fast.diffusion.mask_schedule import MaskSchedule
from maskdm_fast.diffusion.masking import NoMask
from maskdm_fast.models import UViTConfig
from maskdm_fast.train import (
    CheckpointError,
    Recipe,
    TrainingDivergedError,
    checkpoint,
    load_weights,
    read_metrics,
    train,
    train_recipe,
)
from maskdm_fast.train.costs import model_flops


def final_bytes(folder: Path) -> dict[str, bytes]:
    """The tensor files of the newest checkpoint."""
    newest = checkpoint.newest(folder)
    return {path.name: path.read_bytes() for path in newest.path.glob("*.safetensors")}


MACHINE = {"seconds", "images_per_s", "tokens_per_s", "model_tflops", "mfu", "peak_mib"}
SPLIT = {"data_ms", "forward_ms", "backward_ms", "optimizer_ms"}


def curve(folder: Path) -> list[dict]:
    """The logged values that do not depend on the machine and the clock."""
    logs = [record for record in read_metrics(folder) if record["kind"] == "log"]
    return [{key: value for key, value in record.items() if key not in MACHINE | SPLIT} for record in logs]


def test_a_run_leaves_what_it_promises(make_config, tmp_path):
    config = make_config(preview_images=3)
    result = train(config, tmp_path / "run")
    assert (result.step, result.images, result.reason) == (12, 48, "num_images")
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "samples",
    ]
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == config.to_dict()
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "step-00000008",
        "step-00000012",
    ]
    assert (tmp_path / "run" / "samples" / "step-00000012.png").exists()
    header, *logs = read_metrics(tmp_path / "run")
    assert header["config"] == config.to_dict() and header["versions"]["torch"] and header["machine"]
    assert [record["images"] for record in logs] == [8, 16, 24, 32, 40, 48]
    for record in logs:
        means = {"loss", "mask_ratio", "grad_norm"}
        assert record.keys() == {"kind", "step", "images", "lr"} | means | MACHINE - {"mfu"} | SPLIT
    assert logs[0]["lr"] == config.stage.lr


def test_utilisation_is_that_of_the_model_flops(make_config, tmp_path, monkeypatch):
    """An image is worth what the mask leaves of it at its step, and MFU is the share of the stated peak."""
    monkeypatch.setattr("maskdm_fast.train.trainer.stated_peak", lambda device, precision: 1e12)
    config = make_config(mask_schedule=MaskSchedule("steps", ((0.0, 24),)), log_images=24)
    train(config, tmp_path)
    masked, whole = (record for record in read_metrics(tmp_path) if record["kind"] == "log")
    for record, count in ((masked, 8), (whole, 16)):
        flops = model_flops(config.model, [(count, 1.0)]) * record["images_per_s"]
        assert record["model_tflops"] == pytest.approx(flops * 1e-12) == pytest.approx(record["mfu"])


def test_a_run_learns(make_config, tmp_path):
    train(make_config(num_images=400, log_images=100), tmp_path)
    losses = [record["loss"] for record in curve(tmp_path)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("stop", [4, 20, 28])
def test_resuming_changes_nothing(make_config, tmp_path, stop):
    """20 and 28 images end between two log lines: the unfinished mean must be carried over too."""
    config = make_config(log_images=16)
    train(config, tmp_path / "whole")
    train(replace(config, stage=replace(config.stage, num_images=stop)), tmp_path / "parts")
    assert train(config, tmp_path / "parts").step == 12
    assert final_bytes(tmp_path / "parts") == final_bytes(tmp_path / "whole")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_a_finished_run_does_nothing_more(make_config, tmp_path):
    config = make_config()
    first = train(config, tmp_path)
    before = final_bytes(tmp_path)
    second = train(config, tmp_path)
    assert second.step == first.step and second.seconds == pytest.approx(first.seconds, abs=0.05)
    assert final_bytes(tmp_path) == before


def test_curve_has_no_duplicates_after_falling_back(make_config, tmp_path):
    """The newest checkpoint is damaged: the run goes back to the one before it and ends where it would have."""
    config = make_config()
    train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    os.truncate(checkpoint.newest(tmp_path / "damaged").path / "ema.safetensors", 100)
    with pytest.warns(RuntimeWarning, match="step-00000012"):
        train(config, tmp_path / "damaged")
    assert final_bytes(tmp_path / "damaged") == final_bytes(tmp_path / "whole")
    assert curve(tmp_path / "damaged") == curve(tmp_path / "whole")


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_micro_batches_change_rounding_only(make_config, tmp_path, micro_batch_size):
    """3 does not divide 4, so the micro-batches differ in size and must be weighted."""
    # Adam would blow up rounding errors of near-zero gradients, so few steps are compared.
    train(make_config(num_images=8, log_images=4), tmp_path / "whole")
    train(make_config(num_images=8, log_images=4, micro_batch_size=micro_batch_size), tmp_path / "split")
    for whole, split in zip(curve(tmp_path / "whole"), curve(tmp_path / "split"), strict=True):
        assert split["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert split["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_global_generators_are_neither_read_nor_moved(make_config, tmp_path):
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
        train(make_config(preview_images=2), tmp_path / str(seed))
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))
        states.append(final_bytes(tmp_path / str(seed)))
        states.append((tmp_path / str(seed) / "samples" / "step-00000012.png").read_bytes())
    assert states[:2] == states[2:]


def test_the_seed_matters(make_config, tmp_path):
    train(make_config(), tmp_path / "0")
    train(make_config(seed=1), tmp_path / "1")
    assert final_bytes(tmp_path / "0") != final_bytes(tmp_path / "1")


def test_bf16_trains_float32_weights(make_config, tmp_path):
    train(make_config(precision="bf16"), tmp_path)
    assert all(tensor.dtype == torch.float32 for tensor in load_weights(tmp_path, "raw").tensors.values())
    assert all(np.isfinite(record["loss"]) for record in curve(tmp_path))


@pytest.mark.parametrize("which", ["ema", "raw"])
def test_init_from_hands_over_weights_and_nothing_else(make_config, tmp_path, which):
    train(make_config(), tmp_path / "first")
    handed = load_weights(tmp_path / "first", which).tensors
    # A step so small that it changes nothing shows the weights that the second run began with.
    config = make_config(mask=NoMask(), num_images=4, lr=1e-30, init_from="first", init_weights=which)
    train(config, tmp_path / "second")
    found = checkpoint.newest(tmp_path / "second")
    assert found.step == 1
    for name, tensor in found.tensors("model").items():
        assert torch.equal(tensor, handed[name])
    for name, tensor in found.tensors("ema").items():
        assert torch.equal(tensor, handed[name])
    assert all(int(value) == 1 for name, value in found.tensors("optimizer").items() if name.startswith("step."))


def test_ema_and_raw_weights_differ(make_config, tmp_path):
    train(make_config(), tmp_path)
    ema, raw = (load_weights(tmp_path, which).tensors["head.weight"] for which in ("ema", "raw"))
    assert not torch.equal(ema, raw)


def test_weights_of_another_shape_are_named(make_config, tmp_path):
    train(make_config(), tmp_path / "first")
    wider = UViTConfig(image_size=8, patch_size=2, dim=32, depth=3, num_heads=2)
    with pytest.raises(ValueError, match=r"head\.weight: \[12, 16\] there, \[12, 32\] here"):
        train(make_config(model=wider, init_from="first"), tmp_path / "second")
    classes = UViTConfig(image_size=8, patch_size=2, dim=16, depth=1, num_heads=2)
    with pytest.raises(ValueError, match=r"in_blocks.0.attention.proj.bias: \[16\] there, absent here"):
        train(make_config(model=classes, init_from="first"), tmp_path / "third")


def test_nothing_to_start_from(make_config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing to start from.*--init-from nowhere"):
        train(make_config(init_from="nowhere"), tmp_path / "run")


def test_recipe_runs_its_stages_in_order(make_config, tmp_path):
    base = make_config()
    shared = {name: getattr(base, name) for name in ("data", "model", "machine", "output")}
    recipe = Recipe(stages=(("pretrain", base.stage), ("finetune", replace(base.stage, mask=NoMask()))), **shared)
    result = train_recipe(recipe, tmp_path)
    assert result.folder == tmp_path / "2-finetune" and result.step == 12
    header = read_metrics(tmp_path / "2-finetune")[0]
    assert header["config"]["stage"]["init_from"] == "1-pretrain"
    before = final_bytes(tmp_path / "2-finetune")
    train_recipe(recipe, tmp_path)
    assert final_bytes(tmp_path / "2-finetune") == before


def test_another_configuration_is_refused(make_config, tmp_path):
    train(make_config(), tmp_path)
    with pytest.raises(ValueError, match=r"begun with another configuration:\n  stage.lr: 0.01 -> 0.02\n"):
        train(make_config(lr=0.02), tmp_path)
    train(make_config(num_images=52, log_images=4, keep_checkpoints=1, micro_batch_size=2), tmp_path)
    assert checkpoint.newest(tmp_path).step == 13


def test_changed_data_is_refused(make_config, tmp_path, image_folder):
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    config = make_config(data=str(folder))
    train(config, tmp_path / "run")
    next(folder.iterdir()).unlink()
    with pytest.raises(ValueError, match="the data set has changed"):
        train(config, tmp_path / "run")


def test_the_same_data_under_another_name(make_config, tmp_path, image_folder):
    """Moved, or packed into a store: the run goes on, to the same weights."""
    whole = make_config(num_images=48)
    train(whole, tmp_path / "whole")
    shutil.copytree(image_folder, tmp_path / "moved")
    pack(find_source(image_folder), tmp_path / "packed.store", image_size=8)
    for images, data in ((16, image_folder), (32, tmp_path / "moved"), (48, tmp_path / "packed.store")):
        train(make_config(num_images=images, data=str(data)), tmp_path / "run")
    assert final_bytes(tmp_path / "run") == final_bytes(tmp_path / "whole")


def test_classes_must_match(make_config, tmp_path):
    model = UViTConfig(image_size=8, patch_size=2, dim=16, depth=3, num_heads=2, num_classes=5)
    with pytest.raises(ValueError, match="num_classes is 5, but the data set has 0"):
        train(make_config(model=model), tmp_path)


def test_class_conditional_run(make_config, tmp_path, image_folder):
    for number, file in enumerate(sorted(image_folder.iterdir())):
        target = tmp_path / "images" / ("even", "odd")[number % 2]
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    model = UViTConfig(image_size=8, patch_size=2, dim=16, depth=3, num_heads=2, num_classes=2)
    config = make_config(data=str(tmp_path / "images"), model=model, label_drop=0.5, preview_images=2)
    train(config, tmp_path / "whole")
    train(replace(config, stage=replace(config.stage, num_images=20)), tmp_path / "parts")
    train(config, tmp_path / "parts")
    assert final_bytes(tmp_path / "parts") == final_bytes(tmp_path / "whole")


def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(make_config, tmp_path):
    # Without clipping, weights of size 1e18 overflow in the first product of squares.
    config = make_config(
        lr=1e18, warmup_images=0, max_grad_norm=None, num_images=400, checkpoint_images=4, log_images=40
    )
    with pytest.raises(TrainingDivergedError, match=r"(loss|grad_norm) became NaN or infinite at step (\d+)") as caught:
        train(config, tmp_path)
    assert 1 < caught.value.step <= 10
    good = checkpoint.newest(tmp_path)
    assert good.step == caught.value.step - 1
    assert f"The last good checkpoint is that of step {good.step}." in str(caught.value)
    assert all(tensor.isfinite().all() for tensor in good.tensors("model").values())
    with pytest.raises(TrainingDivergedError) as again:
        train(config, tmp_path)
    assert again.value.step == caught.value.step


def test_divergence_is_seen_at_log_intervals(make_config, tmp_path):
    config = make_config(
        lr=1e18, warmup_images=0, max_grad_norm=None, num_images=4000, checkpoint_images=4000, log_images=40
    )
    with pytest.raises(TrainingDivergedError, match="There is no checkpoint yet"):
        train(config, tmp_path)
    assert checkpoint.newest(tmp_path) is None


def test_wall_clock_budget_counts_over_resumes(make_config, tmp_path):
    config = make_config(num_images=None, max_seconds=0.05, checkpoint_images=10**9)
    start = time.monotonic()
    first = train(config, tmp_path)
    assert first.reason == "max_seconds" and 0.05 <= first.seconds <= time.monotonic() - start
    more = replace(config, stage=replace(config.stage, max_seconds=first.seconds + 0.05))
    start = time.monotonic()
    second = train(more, tmp_path)
    assert second.step > first.step
    assert 0.05 <= second.seconds - first.seconds <= time.monotonic() - start


def test_checkpoints_do_not_count_as_training(make_config, tmp_path, monkeypatch):
    real, saving = checkpoint._write_tensors, []

    def slow(path, tensors):
        start = time.monotonic()
        time.sleep(0.03)
        real(path, tensors)
        saving.append(time.monotonic() - start)

    monkeypatch.setattr(checkpoint, "_write_tensors", slow)
    start = time.monotonic()
    seconds = train(make_config(checkpoint_images=4), tmp_path).seconds
    assert len(saving) == 3 * 12
    assert seconds <= time.monotonic() - start - sum(saving)


def test_a_failed_checkpoint_loses_nothing(make_config, tmp_path, monkeypatch):
    config = make_config()
    train(config, tmp_path / "whole")
    real = checkpoint._write_tensors

    def full(path, tensors):
        if "step-00000008" in str(path):
            raise OSError(28, "No space left on device")
        real(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_tensors", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            train(config, tmp_path / "full")
    assert checkpoint.newest(tmp_path / "full").step == 4
    train(config, tmp_path / "full")
    assert final_bytes(tmp_path / "full") == final_bytes(tmp_path / "whole")
    assert curve(tmp_path / "full") == curve(tmp_path / "whole")


def test_run_folder_that_cannot_be_made(make_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match="cannot write to the run folder"):
        train(make_config(), tmp_path / "file" / "run")


def test_a_signal_between_stages_is_not_lost(make_config, tmp_path, monkeypatch):
    """It comes while stage 1 writes its last checkpoint, when its stopping rule is met already."""
    base = make_config()
    shared = {name: getattr(base, name) for name in ("data", "model", "machine", "output")}
    recipe = Recipe(stages=(("pretrain", base.stage), ("finetune", base.stage)), **shared)
    real = checkpoint._write_tensors

    def write(path, tensors):
        if "step-00000012" in str(path):
            os.kill(os.getpid(), signal.SIGTERM)
        real(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_tensors", write)
        result = train_recipe(recipe, tmp_path)
    assert (result.reason, result.finished, result.step) == ("SIGTERM", False, 0)
    assert train_recipe(recipe, tmp_path).step == 12


@pytest.mark.parametrize(("module", "named"), [("safetensors.torch", "safetensors"), ("PIL", "PIL")])
def test_missing_packages_show_before_work_starts(make_config, tmp_path, monkeypatch, module, named):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        RuntimeError, match=rf"'{named}.* is not installed; install it with: pip install 'maskdm_fast\[train"
    ):
        train(make_config(preview_images=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()
