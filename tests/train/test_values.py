"""The value of a DxMI run, used apart from its training."""

import pytest
import torch

from maskdm_fast.diffusion import patchify
from maskdm_fast.diffusion.masking import NoMask
from maskdm_fast.distill import dxmi_policy
from maskdm_fast.train import export, load_weights, train
from maskdm_fast.train.config import DiffusionConfig, PolicyDistillationConfig
from maskdm_fast.train.generation import generate
from maskdm_fast.train.values import energies, make_value

CPU = torch.device("cpu")
VIT = {"value": "vit", "value_width": 16, "value_depth": 1, "value_heads": 2, "value_time": True}


@pytest.fixture(params=[{"value_width": 8}, VIT], ids=["resnet", "vit"])
def weights(request, make_config, make_student, tmp_path):
    """Of a run of two updates."""
    train(make_config(diffusion=DiffusionConfig(prediction="v"), mask=NoMask(), num_images=4), tmp_path / "teacher")
    options = {"num_steps": 3, "alpha_bars": (0.02, 0.3, 0.8), "num_images": 8, "value_lr": 1e-2}
    train(make_student(PolicyDistillationConfig, **options, **request.param), tmp_path / "run")
    return load_weights(tmp_path / "run")


def test_samples_follow_the_value(weights, monkeypatch):
    """What is drawn is what the library's formula gives, with the value that the run has trained."""
    seen = []
    draw = dxmi_policy.generate

    def remember(policy, start, noise, labels, **guidance):
        seen.append((policy, start.clone(), noise.clone()))
        return draw(policy, start, noise, labels, **guidance)

    monkeypatch.setattr(dxmi_policy, "generate", remember)
    plain = generate(weights.config, weights.tensors, 4, device=CPU)
    options = {"value_guidance": 200.0, "value": weights.value, "device": CPU}
    images = generate(weights.config, weights.tensors, 4, **options)
    assert not torch.equal(images, plain)
    policy, start, noise = seen[-1]
    value = make_value(weights.config, weights.value, CPU)
    with torch.no_grad():
        want = draw(policy, start, noise, None, value=value, value_guidance=200.0)
    pixels = patchify(images.permute(0, 3, 1, 2).float(), 2)
    torch.testing.assert_close(pixels, ((want + 1) * 127.5).round().clamp(0, 255))
    fewer = generate(weights.config, weights.tensors, 2, first_slot=2, batch_size=1, **options)
    assert (fewer.int() - images[2:].int()).abs().max() <= 1


def test_energies_are_values_at_the_end(weights):
    images = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = energies(weights, images, batch_size=2)
    value = weights.config.stage.make_value(weights.config.model, seed=3)
    value.load_state_dict(weights.value)
    x = patchify(images.permute(0, 3, 1, 2) / 127.5 - 1.0, 2)
    with torch.no_grad():
        torch.testing.assert_close(found, value(x, torch.full((5,), 3)))
    assert found.std() > 0 and energies(weights, images[:0]).shape == (0,)
    for wrong in (images.float(), images[0], images[:, :4]):
        with pytest.raises(ValueError, match="want uint8 images of its size"):
            energies(weights, wrong)


def test_runs_that_have_no_value(weights, tmp_path):
    export(tmp_path / "run", tmp_path / "policy.safetensors")
    for path in (tmp_path / "teacher", tmp_path / "policy.safetensors"):
        with pytest.raises(ValueError, match="holds no value"):
            load_weights(path).value  # noqa: B018 - reads it
    teacher = load_weights(tmp_path / "teacher")
    with pytest.raises(ValueError, match="no value to follow"):
        generate(teacher.config, teacher.tensors, 1, value_guidance=0.1, device=CPU)
    with pytest.raises(ValueError, match="there is no value to follow"):
        generate(weights.config, weights.tensors, 1, value_guidance=0.1, device=CPU)
