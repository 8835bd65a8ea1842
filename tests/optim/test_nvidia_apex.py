"""apex's FusedAdam and FusedLayerNorm, by a stand-in of apex in plain PyTorch: the real one needs a GPU."""

import copy
import shutil
import sys

import pytest
import torch
from torch import nn

from maskdm_fast.models import UViT, UViTConfig
from maskdm_fast.models.layers import LayerNorm
from maskdm_fast.ops import backend, nvidia_apex
from maskdm_fast.optim import AdamWEMA, ApexAdamEMA, use_apex_layer_norm
from maskdm_fast.testing import draw

SHAPES = [(5, 3), (4,), (2, 2, 2)]
SETTINGS = {"lr": 0.02, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.05, "ema_decay": 0.7}


def make_params(dtype=torch.float32):
    return [draw(shape, dtype, "cpu", seed=i).requires_grad_() for i, shape in enumerate(SHAPES)]


def set_grads(params, step, without=()):
    for i, param in enumerate(params):
        grad = draw(tuple(param.shape), param.dtype, "cpu", seed=100 * step + i)
        param.grad = None if i in without else grad.T.contiguous().T if grad.ndim == 2 else grad


def assert_same(first, second, rtol=1e-5, atol=1e-6):
    names = ("step", "exp_avg", "exp_avg_sq", "ema")
    for p, q in zip(first.param_groups[0]["params"], second.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)
        assert first.state[p].keys() == second.state[q].keys()
        for name in names if first.state[p] else ():
            torch.testing.assert_close(first.state[p][name], second.state[q][name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e6])
def test_matches_adamw_ema(install_apex, max_grad_norm):
    install_apex("nvidia_apex")
    params, theirs = make_params(), make_params()
    ours = AdamWEMA(params, max_grad_norm=max_grad_norm, **SETTINGS)
    apex = ApexAdamEMA(theirs, max_grad_norm=max_grad_norm, **SETTINGS)
    for step in range(1, 8):
        set_grads(params, step)
        set_grads(theirs, step)
        for optimizer in (ours, apex):
            optimizer.param_groups[0]["lr"] = 0.02 / step
            optimizer.step()
        torch.testing.assert_close(apex.grad_norm, ours.grad_norm)
        assert_same(apex, ours)
    torch.testing.assert_close(list(apex.ema_parameters()), list(ours.ema_parameters()))


def test_parameters_of_several_ages(install_apex):
    """apex counts one step for all: a parameter whose gradient comes later must not be taken for an old one."""
    install_apex("nvidia_apex")
    params, theirs = make_params(), make_params()
    ours, apex = AdamWEMA(params, **SETTINGS), ApexAdamEMA(theirs, **SETTINGS)
    for step, without in enumerate([(0, 1, 2), (1,), (1, 2), (), (0,)], start=1):
        set_grads(params, step, without)
        set_grads(theirs, step, without)
        ours.step()
        apex.step()
        assert_same(apex, ours)
    assert [apex.state[param]["step"] for param in theirs] == [3, 2, 3]


def test_state_dict_serves_both(install_apex):
    """A run goes on with the other implementation, either way, and with its own bit for bit."""
    install_apex("nvidia_apex")
    for first, second in ((AdamWEMA, ApexAdamEMA), (ApexAdamEMA, AdamWEMA), (ApexAdamEMA, ApexAdamEMA)):
        whole_params, params = make_params(), make_params()
        whole, part = first(whole_params, **SETTINGS), first(params, **SETTINGS)
        for step in range(1, 7):
            set_grads(whole_params, step)
            whole.step()
        for step in range(1, 4):
            set_grads(params, step)
            part.step()
        resumed = second(params, **SETTINGS)
        resumed.load_state_dict(copy.deepcopy(part.state_dict()))
        for step in range(4, 7):
            set_grads(params, step)
            resumed.step()
        exact = {"rtol": 0, "atol": 0} if first is second else {}
        assert_same(resumed, whole, **exact)


def test_parameters_in_bfloat16_have_float32_state(install_apex):
    install_apex("nvidia_apex")
    params = make_params(torch.bfloat16)
    optimizer = ApexAdamEMA(params, **SETTINGS)
    set_grads(params, 1)
    optimizer.step()
    state = optimizer.state[params[0]]
    assert {value.dtype for name, value in state.items() if name != "step"} == {torch.float32}
    # The first step's decay is 0.37, by the warm-up; the average is that of the rounded weights.
    start = make_params(torch.bfloat16)[0].float()
    torch.testing.assert_close(state["ema"], start.lerp(params[0].float(), 2 ** (-2 / 3)))


def test_closure(install_apex):
    install_apex("nvidia_apex")
    params = [torch.ones(3, requires_grad=True)]
    optimizer = ApexAdamEMA(params, lr=0.1)

    def closure():
        optimizer.zero_grad(set_to_none=True)
        loss = params[0].square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3.0
    assert (params[0] < 1).all()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_layer_norm_of_a_model(install_apex, dtype):
    """The state dict and the results stay, under autocast too."""
    install_apex("nvidia_apex")
    model = UViT(UViTConfig(image_size=8, patch_size=2, dim=16, depth=3, num_heads=2), seed=1)
    tokens, t = draw((2, 16, 12), torch.float32, "cpu", seed=0), torch.tensor([3, 7])
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        want = model(tokens, t)
    names = dict(model.named_parameters())
    norms = [name for name, module in model.named_modules() if isinstance(module, LayerNorm)]
    use_apex_layer_norm(model)
    assert [type(model.get_submodule(name)).__name__ for name in norms] == ["FusedLayerNorm"] * 7
    assert {name: id(value) for name, value in model.named_parameters()} == {k: id(v) for k, v in names.items()}
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        out = model(tokens, t)
    assert out.dtype == want.dtype
    torch.testing.assert_close(out, want)
    assert all(model.get_submodule(name).calls == 1 for name in norms)


def test_layer_norms_without_both_parameters_stay(install_apex):
    install_apex("nvidia_apex")
    model = nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.LayerNorm(4, bias=False), nn.LayerNorm(4))
    use_apex_layer_norm(model.eval())
    assert [type(module).__name__ for module in model] == ["LayerNorm", "LayerNorm", "FusedLayerNorm"]
    assert model[2].eps == 1e-5 and not model[2].training


BUILD = "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation git.https://github.com/NVIDIA/apex"
PARTS = [
    ("optimizers", "amp_C", lambda: ApexAdamEMA(make_params())),
    ("normalization", "fused_layer_norm_cuda", lambda: use_apex_layer_norm(nn.LayerNorm(3))),
]
each_part = pytest.mark.parametrize(("part", "extension", "call"), PARTS, ids=[part[0] for part in PARTS])


@each_part
def test_without_apex(part, extension, call, monkeypatch):
    monkeypatch.setattr(nvidia_apex, "find", lambda: None)
    with pytest.raises(RuntimeError, match=f"NVIDIA's apex is not installed, and PyPI's .* another project; .*{BUILD}"):
        call()


@each_part
def test_the_wrong_apex(part, extension, call, install_apex):
    """It is told without being imported, which would fail."""
    install_apex("pypi_apex")
    with pytest.raises(RuntimeError, match=rf"is not NVIDIA's \(PyPI's .*pip uninstall apex, .*{BUILD}"):
        call()
    assert backend.package_versions()["apex"] is None


@each_part
def test_apex_without_its_kernels(part, extension, call, install_apex, monkeypatch, tmp_path):
    folder = install_apex("nvidia_apex")
    shutil.copytree(folder / "apex", tmp_path / "apex")
    monkeypatch.setattr("sys.path", [str(tmp_path), *(path for path in sys.path if path != str(folder))])
    with pytest.raises(RuntimeError, match=rf"without its kernels \(module {extension}\); .*{BUILD}"):
        call()


@each_part
def test_apex_serves_cuda_only(part, extension, call, install_apex, monkeypatch):
    install_apex("nvidia_apex")
    monkeypatch.setattr("maskdm_fast.optim.nvidia_apex._DEVICE", "cuda")
    with pytest.raises(ValueError, match=rf"apex\.{part} has kernels for CUDA only, but a parameter is on cpu"):
        call()
