"""Where masked_attention hands over to PyTorch's attention by itself; asked on fake CUDA tensors, without a GPU."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from maskdm_fast import ops
from maskdm_fast.ops import backend as backends
from maskdm_fast.ops.masked_attention import cases, sdpa_impl
from maskdm_fast.ops.masked_attention import op as attention


def _runs_on_sdpa(case, backend=None, device="cuda"):
    called = []

    def attend(q, k, v, cu_seqlens, scale):
        called.append(scale)
        return q

    def ours(*arguments):
        return arguments[-1]

    inputs = cases.make_inputs(case, torch.bfloat16, "cpu", seed=0)
    with (
        FakeTensorMode(),
        mock.patch.object(sdpa_impl, "attend", attend),
        mock.patch.object(attention._Attention, "apply", ours),
    ):
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                inputs[name] = torch.empty(value.shape, dtype=value.dtype, device=device)
        ops.masked_attention(**inputs, backend=backend)
    return bool(called)


@pytest.mark.parametrize("separate", [False, True])
def test_long_images_of_equal_length_go_to_pytorch(separate):
    assert not _runs_on_sdpa(cases.Case("at", (128, 128), 1, 8, separate=separate))
    assert _runs_on_sdpa(cases.Case("above", (129, 129), 1, 8, separate=separate))


def test_packed_images_stay_for_their_lengths_are_on_the_device():
    assert not _runs_on_sdpa(cases.Case("packed", (129, 300), 1, 8, packed=True))


def test_wide_heads_go_to_pytorch():
    assert not _runs_on_sdpa(cases.Case("at", (5,), 1, 128))
    assert _runs_on_sdpa(cases.Case("above", (5,), 1, 129))
    assert _runs_on_sdpa(cases.Case("packed", (5,), 1, 129, packed=True))


def test_a_named_backend_is_not_overruled():
    case = cases.Case("long", (129,), 1, 8)
    assert not _runs_on_sdpa(case, backend="reference")
    with ops.use_backend("reference"):
        assert not _runs_on_sdpa(case)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_wide_heads_are_refused_where_our_kernels_are_named(packed, monkeypatch):
    monkeypatch.setattr(backends, "_CUDA_LIBRARY_MISSING", None)
    case = cases.Case("wide", (5,), 1, 160, packed=packed)
    message = "masked_attention: backend 'cuda' cannot run: head width 160 is above 128"
    with pytest.raises(RuntimeError, match=message):
        _runs_on_sdpa(case, backend="cuda")
    with ops.use_backend("cuda"), pytest.raises(RuntimeError, match=message):
        _runs_on_sdpa(case)


def test_nothing_is_handed_over_on_the_cpu():
    assert not _runs_on_sdpa(cases.Case("long", (300,), 1, 8), device="cpu")


def test_a_gpu_that_is_too_old_for_our_kernels(monkeypatch):
    """Triton takes over; the kernels were chosen, and could not be started."""
    monkeypatch.setattr(backends, "_CUDA_LIBRARY_MISSING", None)
    monkeypatch.setattr(backends, "_CAPABILITIES", {})
    monkeypatch.setattr(backends, "_USABLE", {"cuda": ("cuda", "triton")})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((8, 0), (7, 5))[device.index])
    implementations = dict.fromkeys(("reference", "cuda", "triton"), backends)
    new, old = (SimpleNamespace(device=torch.device("cuda", index), dtype=torch.float16) for index in range(2))
    for _ in range(2):
        assert backends.choose("an_op", implementations, new, None) == "cuda"
        assert backends.choose("an_op", implementations, old, None) == "triton"
        assert backends.choose("an_op", implementations, new, "cuda") == "cuda"
        with pytest.raises(RuntimeError, match=r"'cuda' cannot run: .* capability 8\.0 and up, this GPU has 7\.5"):
            backends.choose("an_op", implementations, old, "cuda")
    assert "this GPU has 7.5" in backends.status({"an_op": implementations})["an_op"]["cuda"]
