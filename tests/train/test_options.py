"""Options of a run beyond the loop itself: classes, shares of the data, memory, compilation."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from maskdm_fast.diffusion.masking import NoMask
from maskdm_fast.models import UViT
from maskdm_fast.train import checkpoint, load_weights, read_metrics, train
from maskdm_fast.train.config import DiffusionConfig
from maskdm_fast.train.feed import Feed


def tensors(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.newest(folder).path.glob("*.safetensors")}


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder) if record["kind"] == "log"]


@pytest.fixture(scope="session")
def class_folder(image_folder, tmp_path_factory) -> str:
    """The images in three classes of 18, 4 and 2."""
    folder = tmp_path_factory.mktemp("classes")
    for number, file in enumerate(sorted(image_folder.iterdir())):
        target = folder / ("common" if number < 18 else "rare" if number < 22 else "very-rare")
        target.mkdir(exist_ok=True)
        shutil.copy(file, target)
    return str(folder)


@pytest.fixture
def seen(monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images and labels of every batch that is trained on."""
    batches = []
    real = Feed.batches

    def spy(self, step):
        found = real(self, step)
        batches.extend((batch.images, batch.labels) for batch in found)
        return found

    monkeypatch.setattr(Feed, "batches", spy)
    return batches


def test_class_conditional_takes_the_classes_from_the_data(make_config, tmp_path, class_folder):
    config = make_config(data=class_folder, class_conditional=True, label_drop=0.3, preview_images=2)
    train(config, tmp_path / "whole")
    weights = load_weights(tmp_path / "whole")
    assert weights.config.model.num_classes == 3 and weights.tensors["label_embed"].shape == (3, 16)
    start = UViT(weights.config.model, seed=config.seed).state_dict()
    for name in ("label_embed", "uncond_embed"):
        assert not torch.equal(weights.tensors[name], start[name])
    train(replace(config, stage=replace(config.stage, num_images=20)), tmp_path / "parts")
    train(config, tmp_path / "parts")
    assert tensors(tmp_path / "parts") == tensors(tmp_path / "whole")


def test_labels_matter_only_to_a_conditional_network(make_config, tmp_path, class_folder, image_folder):
    """The same images in the same order, with and without their classes."""
    settings = {"num_images": 16, "log_images": 4}
    train(make_config(data=class_folder, **settings), tmp_path / "classes")
    train(make_config(**settings), tmp_path / "flat")
    assert losses(tmp_path / "classes") == losses(tmp_path / "flat")
    train(make_config(data=class_folder, class_conditional=True, **settings), tmp_path / "conditional")
    assert losses(tmp_path / "conditional") != losses(tmp_path / "flat")


@pytest.mark.parametrize("changes", [{"class_conditional": True}, {"class_balance": 0.5}])
def test_classes_must_be_there(make_config, tmp_path, changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} is .*has no classes; sub-folders are classes"):
        train(make_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_bound_of_latents_is_not_for_images(make_config, tmp_path):
    """It clipped the samples of images: of a bound of -1 nothing was left."""
    with pytest.raises(ValueError, match=r"latent_bound is 2\.0, but the data set .* holds images.*leave it out"):
        train(make_config(latent_bound=2.0), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_scale_of_latents_without_any(make_config, make_student, tmp_path):
    """Where there is no data set either, the teacher says what it would hold."""
    train(make_config(num_images=4, mask=NoMask(), diffusion=DiffusionConfig(prediction="v")), tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"the data set 'none' holds images, not LatentScaling\(scale=2\.0"):
        train(make_student(data="none", latent_scale=2.0), tmp_path / "run")


def test_class_balance_evens_out_a_long_tail(make_config, tmp_path, class_folder, seen):
    config = make_config(data=class_folder, class_balance=1.0, num_images=96)
    train(config, tmp_path / "whole")
    assert torch.cat([labels for _, labels in seen]).bincount().tolist() == [32, 32, 32]
    train(replace(config, stage=replace(config.stage, num_images=36)), tmp_path / "parts")
    train(config, tmp_path / "parts")
    assert tensors(tmp_path / "parts") == tensors(tmp_path / "whole")


def test_data_share_is_the_same_images_for_every_seed(make_config, tmp_path, seen: list):
    chosen: Callable = lambda: {image.numpy().tobytes() for images, _ in seen for image in images}  # noqa: E731
    train(make_config(data_share=0.25), tmp_path / "a")
    first = chosen()
    assert len(first) == 6
    seen.clear()
    train(make_config(data_share=0.25, seed=1), tmp_path / "b")
    assert chosen() == first
    with pytest.raises(ValueError, match=r"data_share is 0\.0"):
        train(make_config(data_share=0.0), tmp_path / "c")


def test_activation_checkpointing_changes_nothing(make_config, tmp_path, monkeypatch):
    used = []
    real = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr("maskdm_fast.models.uvit.checkpoint", lambda *a, **k: used.append(1) or real(*a, **k))
    train(make_config(), tmp_path / "plain")
    assert not used
    train(make_config(activation_checkpointing=True), tmp_path / "saving")
    assert len(used) == 3 * 12  # three blocks in each of twelve steps
    assert tensors(tmp_path / "saving") == tensors(tmp_path / "plain")


def test_compiled_blocks_train_alike_and_go_on_without_the_compiler(make_config, tmp_path):
    """Rounding only, and the same names in checkpoints: the run may go on with or without --compile."""
    model = replace(make_config().model, depth=1)
    settings = {"model": model, "num_images": 8, "log_images": 4, "lr": 1e-3}
    train(make_config(**settings), tmp_path / "eager")
    train(make_config(**settings, compile=True), tmp_path / "compiled")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)
    eager, compiled = (checkpoint.newest(tmp_path / name).reader for name in ("eager", "compiled"))
    for group in ("model", "ema", "optimizer"):
        assert set(eager.names(group)) == set(compiled.names(group))
    assert train(make_config(**{**settings, "num_images": 12}), tmp_path / "compiled").step == 3


def test_no_compiler_is_said_before_the_first_step(make_config, tmp_path):
    import torch._inductor.config as inductor

    torch._dynamo.reset()  # forgets what other tests compiled
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}),
        pytest.raises(RuntimeError, match=r"does not work on cpu: .*compiler.*or leave out --compile"),
    ):
        train(make_config(compile=True), tmp_path)
