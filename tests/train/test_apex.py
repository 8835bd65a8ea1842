"""Training runs on a stand-in of NVIDIA's apex: checkpoints and resuming do not notice."""

import typing
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from maskdm_fast.ops import nvidia_apex
from maskdm_fast.train import checkpoint, train
from maskdm_fast.train.config import DenoisingConfig, MachineConfig
from maskdm_fast.train.engine import OPTIMIZERS

APEX = {"optimizer_kernel": "apex", "layer_norm": "apex"}


def final(folder):
    """The tensors of the newest checkpoint, by file and name."""
    files = sorted(checkpoint.newest(folder).path.glob("*.safetensors"))
    return {f"{path.name}/{name}": value for path in files for name, value in load_file(path).items()}


def assert_close(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_run_and_its_resume(make_config, install_apex, tmp_path):
    """Bit for bit with itself, and up to rounding with the optimizer and the norms that are not apex's."""
    install_apex("nvidia_apex")
    config, plain = make_config(**APEX), make_config()
    assert train(config, tmp_path / "apex").step == 12
    train(plain, tmp_path / "plain")
    assert_close(final(tmp_path / "apex"), final(tmp_path / "plain"))
    for then in (config, plain):
        folder = tmp_path / f"then-{then.machine.optimizer_kernel}"
        train(replace(config, stage=replace(config.stage, num_images=20)), folder)
        assert train(then, folder).step == 12
        assert_close(final(folder), final(tmp_path / "apex"))
        if then is config:
            whole = final(tmp_path / "apex")
            assert all(torch.equal(value, whole[name]) for name, value in final(folder).items())


@pytest.mark.parametrize("option", APEX)
def test_without_apex_nothing_is_trained(make_config, monkeypatch, tmp_path, option):
    monkeypatch.setattr(nvidia_apex, "find", lambda: None)
    with pytest.raises(RuntimeError, match="PyPI's package apex is another project; build it from source"):
        train(make_config(**{option: APEX[option]}), tmp_path / "run")


def test_the_options_name_the_optimizers():
    kernels = typing.get_args(typing.get_type_hints(MachineConfig)["optimizer_kernel"])
    names = typing.get_args(typing.get_type_hints(DenoisingConfig)["optimizer"])
    assert {kernel for _, kernel in OPTIMIZERS} == set(kernels)
    assert {name for name, _ in OPTIMIZERS} == set(names)
