"""What a user gets wrong: each error names the op, the argument, what came and what is wanted."""

import os
import subprocess
import sys

import numpy
import pytest
import torch

from maskdm_fast import ops
from maskdm_fast.ops import backend
from maskdm_fast.ops.adamw_ema.op import global_norm
from maskdm_fast.optim import AdamWEMA

BACKENDS = ("reference", "cpu")
X = torch.zeros(2, 6, 4)
IDS = torch.tensor([[0, 2], [1, 5]])
QKV = torch.zeros(2, 3, 3, 2, 4)
CU = torch.tensor([0, 1, 3], dtype=torch.int32)
IMAGES = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
HALF = torch.full((2,), 0.5)
SPARSE = torch.zeros(3).to_sparse()


def _noise(**changes):
    arguments = {
        "images": IMAGES,
        "ids_keep": None,
        "alpha": HALF,
        "sigma": HALF,
        "patch_size": 4,
        "seed": 0,
        "step": 0,
    }
    return ops.noise_visible_patches(**(arguments | changes))


def _adamw(op=ops.adamw_ema, **changes):
    p = [torch.zeros(3)]
    arguments = {name: [torch.zeros(3)] for name in ("grads", "exp_avgs", "exp_avg_sqs", "emas")}
    return op(**({"params": p, "lr": 0.1, "step": 1, "ema_decay": 0.9} | arguments | changes))


WRONG = [
    (lambda: ops.gather_tokens(X.long(), IDS), TypeError, "gather_tokens: x has dtype int64, want float32 or float16"),
    (lambda: ops.gather_tokens(X[0], IDS), ValueError, r"gather_tokens: x has shape \[6, 4\], want \[B, N, D\]"),
    (lambda: ops.gather_tokens(X, IDS.int()), TypeError, "gather_tokens: ids_keep has dtype int32, want int64"),
    (lambda: ops.gather_tokens(X, IDS[:1]), ValueError, r"ids_keep has shape \[1, 2\], want \[2, K\]"),
    (lambda: ops.gather_tokens(X, IDS, CU), ValueError, r"ids_keep has shape \[2, 2\], want \[T\]"),
    (lambda: ops.gather_tokens(X, IDS[0], CU.long()), TypeError, "cu_seqlens has dtype int64, want int32"),
    (lambda: ops.gather_tokens(X, IDS[0], CU[:2]), ValueError, r"cu_seqlens has shape \[2\], want \[3\]"),
    (lambda: ops.gather_tokens(X, IDS[0], CU[None]), ValueError, r"cu_seqlens has shape \[1, 3\], want \[B \+ 1\]"),
    (lambda: ops.gather_tokens(X, IDS.to("meta")), ValueError, "ids_keep is on meta, want cpu"),
    (lambda: ops.scatter_tokens(X, IDS, 6), ValueError, r"ids_keep has shape \[2, 2\], want \[2, 6\]"),
    (lambda: ops.scatter_tokens(X[:, :2], IDS, 0), ValueError, "num_tokens is 0, want at least 1"),
    (
        lambda: ops.scatter_tokens(X[:, :2], IDS, 6, X[:, :5]),
        ValueError,
        r"base has shape \[2, 5, 4\], want \[2, 6, 4\]",
    ),
    (lambda: ops.scatter_tokens(X[:, :2], IDS, 6, X.double()), TypeError, "base has dtype float64, want float32"),
    (lambda: ops.linear(X, torch.zeros(3, 5)), ValueError, r"linear: x has shape \[2, 6, 4\], want \[2, 6, 5\]"),
    (lambda: ops.linear(X, X), ValueError, r"linear: weight has shape \[2, 6, 4\], want \[O, I\]"),
    (lambda: ops.linear(X, torch.zeros(3, 4), X[0, 0]), ValueError, r"linear: bias has shape \[4\], want \[3\]"),
    (
        lambda: ops.linear(X, torch.zeros(3, 4), residual=X),
        ValueError,
        r"linear: residual has shape \[2, 6, 4\], want \[2, 6, 3\]",
    ),
    (lambda: ops.linear(X, torch.zeros(3, 4).double()), TypeError, "linear: weight has dtype float64, want float32"),
    (lambda: ops.linear(X.sum(), torch.zeros(3, 4)), ValueError, r"linear: x has shape \[\], want \[..., 4\]"),
    (lambda: ops.gelu(IDS), TypeError, "gelu: x has dtype int64, want float32 or float16"),
    (lambda: ops.masked_attention(QKV, X), ValueError, "k and v are given both, or neither"),
    (lambda: ops.masked_attention(QKV.int()), TypeError, "masked_attention: qkv has dtype int32"),
    (lambda: ops.masked_attention(QKV[:, :, :2]), ValueError, r"qkv has shape .*, want \[B, K, 3, H, E\]"),
    (lambda: ops.masked_attention(QKV, cu_seqlens=CU), ValueError, r"want \[T, 3, H, E\]"),
    (lambda: ops.masked_attention(*[QKV[:, :, 0]] * 2, QKV[:, :2, 0]), ValueError, r"v has shape \[2, 2, 2, 4\]"),
    (lambda: ops.masked_attention(*[QKV[:, :, 0]] * 2, QKV[:, :, 0].half()), TypeError, "v has dtype float16"),
    (
        lambda: ops.masked_attention(QKV[..., :0]),
        ValueError,
        r"masked_attention: qkv has shape \[2, 3, 3, 2, 0\], want E at least 1",
    ),
    (
        lambda: ops.masked_attention(QKV, scale=torch.ones((), requires_grad=True)),
        TypeError,
        "masked_attention: scale is a tensor, which gets no gradient, want a number",
    ),
    (lambda: ops.masked_dsm_loss(X, X, delta=HALF[0]), TypeError, "masked_dsm_loss: delta is a tensor"),
    (lambda: ops.sid_loss(X, X, X, alpha=HALF[0]), TypeError, "sid_loss: alpha is a tensor"),
    (lambda: ops.sid_loss(X, X, X, sigma_data=HALF[0]), TypeError, "sid_loss: sigma_data is a tensor"),
    (lambda: ops.masked_dsm_loss(X, X[:1]), ValueError, r"target has shape \[1, 6, 4\], want \[2, 6, 4\]"),
    (lambda: ops.masked_dsm_loss(X, X.half()), TypeError, "target has dtype float16, want float32"),
    (lambda: ops.masked_dsm_loss(X[:, :0], X[:, :0]), ValueError, "want at least one token"),
    (lambda: ops.masked_dsm_loss(X, X, HALF[:1]), ValueError, r"weight has shape \[1\], want \[2\]"),
    (lambda: ops.masked_dsm_loss(X, X, kind="l2"), ValueError, "kind is 'l2', want one of mse, l1, huber"),
    (lambda: ops.masked_dsm_loss(X, X, reduction="sum"), ValueError, "reduction is 'sum', want one of mean, none"),
    (lambda: ops.masked_dsm_loss(X, X, delta=0.0), ValueError, "delta is 0.0, want a positive number"),
    (lambda: ops.masked_dsm_loss(X, X, cu_seqlens=CU), ValueError, r"pred has shape \[2, 6, 4\], want \[T, D\]"),
    (lambda: ops.sid_loss(X.int(), X, X), TypeError, "sid_loss: generated has dtype int32, want float32"),
    (lambda: ops.sid_loss(X, X[:1], X), ValueError, r"teacher has shape \[1, 6, 4\], want \[2, 6, 4\]"),
    (lambda: ops.sid_loss(X, X, X.half()), TypeError, "sid_loss: fake has dtype float16, want float32"),
    (lambda: ops.sid_loss(X, X, X.to("meta")), ValueError, "sid_loss: fake is on meta, want cpu"),
    (
        lambda: ops.sid_loss(*[X[:, :0]] * 3),
        ValueError,
        r"generated has shape \[2, 0, 4\], want \[B, ...\]",
    ),
    (lambda: ops.sid_loss(X, X, X, HALF[:1]), ValueError, r"weight has shape \[1\], want \[2\]"),
    (lambda: ops.sid_loss(X, X, X, weighting="l2"), ValueError, "weighting is 'l2', want one of l1, l1_xt, karras"),
    (lambda: ops.sid_loss(X, X, X, weighting="l1_xt"), ValueError, "weighting 'l1_xt' needs xt"),
    (lambda: ops.sid_loss(X, X, X, weighting="karras"), ValueError, "weighting 'karras' needs sigma_t"),
    (lambda: ops.sid_loss(X, X, X, alpha_t=HALF.long()), TypeError, "sid_loss: alpha_t has dtype int64, want float32"),
    (lambda: ops.sid_loss(X, X, X, sigma_data=0.0), ValueError, "sigma_data is 0.0, want a positive number"),
    (lambda: ops.sid_loss(X, X, X, alpha=float("nan")), ValueError, "sid_loss: alpha is nan, want a finite number"),
    (lambda: ops.sid_loss(X, X, X, alpha=-float("inf")), ValueError, "sid_loss: alpha is -inf, want a finite number"),
    (lambda: ops.sid_loss(X, X, X, reduction="sum"), ValueError, "reduction is 'sum', want one of mean, none"),
    (lambda: _noise(images=IMAGES.int()), TypeError, "noise_visible_patches: images has dtype int32, want uint8"),
    (lambda: _noise(images=IMAGES[0]), ValueError, r"images has shape \[3, 8, 8\], want \[B, C, height, width\]"),
    (lambda: _noise(layout="hwc"), ValueError, "layout is 'hwc', want 'bchw' or 'bhwc'"),
    (lambda: _noise(patch_size=3), ValueError, "patch_size 3 does not divide images of 8 x 8 pixels"),
    (
        lambda: _noise(ids_keep=torch.zeros(2, 5, dtype=torch.int64)),
        ValueError,
        "names 5 patches of images that have 4",
    ),
    (lambda: _noise(alpha=HALF[:1]), ValueError, r"alpha has shape \[1\], want \[2\]"),
    (lambda: _noise(sigma=HALF.long()), TypeError, "sigma has dtype int64"),
    (lambda: _noise(prediction="noise"), ValueError, "prediction is 'noise', want one of eps, x0, v"),
    (lambda: _noise(prediction=(HALF,)), ValueError, r"want one of eps, x0, v, or \(eps_scale, x0_scale\)"),
    (lambda: _noise(prediction=(HALF, HALF.long())), TypeError, "x0_scale has dtype int64, want float32"),
    (lambda: _noise(prediction=(HALF[:1], HALF)), ValueError, r"eps_scale has shape \[1\], want \[2\]"),
    (lambda: _noise(cu_seqlens=CU), ValueError, "cu_seqlens is given without ids_keep"),
    (lambda: _noise(ids_keep=IDS, cu_seqlens=CU), ValueError, r"ids_keep has shape \[2, 2\], want \[T\]"),
    (lambda: _noise(ids_keep=IDS[0], cu_seqlens=CU.long()), TypeError, "cu_seqlens has dtype int64, want int32"),
    (lambda: _noise(ids_keep=IDS[0], cu_seqlens=CU[:2]), ValueError, r"cu_seqlens has shape \[2\], want \[3\]"),
    (lambda: _noise(out_dtype=torch.int8), TypeError, "out_dtype is torch.int8"),
    (lambda: _noise(seed=-1), ValueError, "noise_visible_patches: seed is -1, want 0 <= seed"),
    (lambda: _noise(step=-1), ValueError, "noise_visible_patches: step is -1, want 0 <= step"),
    (lambda: _noise(step=2**32), ValueError, r"step is 4294967296, want 0 <= step < 2\*\*32"),
    (lambda: _noise(slots=torch.arange(3)), ValueError, r"slots has shape \[3\], want \[2\]"),
    (lambda: _noise(flip=torch.zeros(2)), TypeError, "flip has dtype float32, want bool"),
    (lambda: _noise(step=torch.tensor(1.0)), TypeError, "step has dtype float32, want int64"),
    (lambda: _adamw(grads=[]), ValueError, "adamw_ema: grads has 0 tensors, want 1"),
    (lambda: _adamw(grads=[SPARSE]), ValueError, r"adamw_ema: grads\[0\] has layout sparse_coo, want a dense tensor"),
    (lambda: global_norm([HALF, SPARSE]), ValueError, r"global_norm: tensors\[1\] has layout sparse_coo"),
    (lambda: _adamw(grads=[torch.zeros(2)]), ValueError, r"grads\[0\] has shape \[2\], want \[3\]"),
    (lambda: _adamw(params=[torch.zeros(3, dtype=torch.int32)]), TypeError, r"params\[0\] has dtype int32"),
    (lambda: _adamw(params=[torch.zeros(6)[::2]]), ValueError, r"params\[0\] is not contiguous"),
    (lambda: _adamw(emas=[torch.zeros(6)[::2]]), ValueError, r"emas\[0\] is not contiguous"),
    (lambda: _adamw(exp_avgs=[torch.zeros(3).half()]), TypeError, r"exp_avgs\[0\] has dtype float16, want float32"),
    (lambda: _adamw(grads=[torch.zeros(3, device="meta")]), ValueError, r"grads\[0\] is on meta, want cpu"),
    (lambda: _adamw(backend="reference", emas=[torch.zeros(2)]), ValueError, r"emas\[0\] has shape \[2\], want \[3\]"),
    (lambda: _adamw(copies=[torch.zeros(3)]), TypeError, r"copies\[0\] has dtype float32, want float16 or bfloat16"),
    (lambda: _adamw(grad_scale=torch.zeros(1)), ValueError, r"grad_scale has shape \[1\], want \[\]"),
    (lambda: _adamw(found_inf=torch.zeros(1)), ValueError, r"found_inf has shape \[1\], want \[\]"),
    (lambda: _adamw(found_inf=torch.tensor(True)), TypeError, "found_inf has dtype bool, want float32"),
    (lambda: _adamw(ops.lamb_ema, emas=[torch.zeros(2)]), ValueError, r"lamb_ema: emas\[0\] has shape \[2\], want"),
    (lambda: _adamw(ops.lamb_ema, lr=-1.0), ValueError, "lamb_ema: lr is -1.0, outside its range"),
    (lambda: _adamw(step=0), ValueError, "step is 0, outside its range"),
    (lambda: _adamw(step=torch.tensor(1.0)), TypeError, "step has dtype float32, want int64"),
    (lambda: _adamw(lr=torch.ones(1)), ValueError, r"lr has shape \[1\], want \[\]"),
    (lambda: _adamw(ema_decay=torch.tensor(0.9)), TypeError, "ema_decay has dtype float32, want float64"),
    (lambda: _adamw(betas=(1.0, 0.9)), ValueError, r"betas\[0\] is 1.0, outside its range"),
    (lambda: _adamw(betas=0.9), ValueError, r"adamw_ema: betas is 0.9, want \(beta1, beta2\)"),
    (lambda: AdamWEMA([torch.zeros(1)], lr=-1.0), ValueError, "lr -1.0"),
    (lambda: AdamWEMA([torch.zeros(1)], betas=(0.9, 1.0)), ValueError, "betas are"),
    (lambda: AdamWEMA([torch.zeros(1)], ema_decay=2.0), ValueError, "ema_decay is 2.0"),
    (lambda: AdamWEMA([torch.zeros(1)], max_grad_norm=0.0), ValueError, "max_grad_norm is 0.0"),
]


# What is no tensor, no int, no number or no list at all.
WRONG_TYPES = [
    (lambda: ops.gather_tokens(X, [[0, 2], [1, 5]]), "gather_tokens: ids_keep is of type list, want a tensor"),
    (lambda: ops.scatter_tokens(X[:, :2], IDS, 6.0), "scatter_tokens: num_tokens is of type float, want an int"),
    (lambda: ops.scatter_tokens(X[:, :2], IDS, 6, 0.0), "scatter_tokens: base is of type float, want a tensor"),
    (lambda: ops.linear([0.0], X[0]), "linear: x is of type list, want a tensor"),
    (lambda: ops.linear(X, [0.0]), "linear: weight is of type list, want a tensor"),
    (lambda: ops.linear(X, X[0], 0.0), "linear: bias is of type float, want a tensor"),
    (lambda: ops.gelu(0.0), "gelu: x is of type float, want a tensor"),
    (lambda: ops.masked_attention(QKV[0], cu_seqlens=[0, 1, 3]), "cu_seqlens is of type list, want a tensor"),
    (lambda: ops.masked_attention(QKV, scale="1"), "masked_attention: scale is of type str, want a number"),
    (lambda: ops.masked_dsm_loss(X, X, 2.0), "masked_dsm_loss: weight is of type float, want a tensor"),
    (lambda: ops.masked_dsm_loss(X, X, delta=None), "masked_dsm_loss: delta is of type NoneType, want a number"),
    (lambda: ops.sid_loss(X, 0.0, X), "sid_loss: teacher is of type float, want a tensor"),
    (lambda: ops.sid_loss(X, X, X, weighting="karras", sigma_t=0.5), "sid_loss: sigma_t is of type float, want a"),
    (lambda: _noise(images=numpy.zeros((2, 3, 8, 8), "uint8")), "images is of type ndarray, want a tensor"),
    (lambda: _noise(alpha=0.8), "noise_visible_patches: alpha is of type float, want a tensor"),
    (lambda: _noise(prediction=(1.0, 0.0)), "noise_visible_patches: eps_scale is of type float, want a tensor"),
    (lambda: _noise(patch_size=4.0), "noise_visible_patches: patch_size is of type float, want an int"),
    (lambda: _noise(seed=torch.tensor(3)), "noise_visible_patches: seed is of type Tensor, want an int"),
    (lambda: _noise(step=1.5), "noise_visible_patches: step is of type float, want an int"),
    (lambda: _noise(slots=[0, 1]), "noise_visible_patches: slots is of type list, want a tensor"),
    (lambda: _adamw(params=[None]), r"adamw_ema: params\[0\] is of type NoneType, want a tensor"),
    (lambda: _adamw(params=iter([X])), "adamw_ema: params is of type list_iterator, want a list of tensors"),
    (lambda: _adamw(params=torch.zeros(3)), "adamw_ema: params is of type Tensor, want a list of tensors"),
    (lambda: _adamw(grads=torch.zeros(1, 3)), "adamw_ema: grads is of type Tensor, want a list of tensors"),
    *[(lambda b=b: _adamw(grads=[None], backend=b), r"grads\[0\] is of type NoneType") for b in BACKENDS],
    (lambda: _adamw(grad_scale=1.0), "adamw_ema: grad_scale is of type float, want a tensor"),
    (lambda: _adamw(lr="0.1"), "adamw_ema: lr is of type str, want a number"),
    (lambda: _adamw(betas=(0.9, None)), r"adamw_ema: betas\[1\] is of type NoneType, want a number"),
    *[(lambda b=b: _adamw(step=1.5, backend=b), "adamw_ema: step is of type float, want an int") for b in BACKENDS],
    (lambda: _adamw(ops.lamb_ema, min_ndim=1.5), "lamb_ema: min_ndim is of type float, want an int"),
    (lambda: global_norm(X), "global_norm: tensors is of type Tensor, want a list of tensors"),
    *[(lambda b=b: global_norm([X, None], backend=b), r"tensors\[1\] is of type NoneType") for b in BACKENDS],
]


@pytest.mark.parametrize(("call", "message"), WRONG_TYPES, ids=range(len(WRONG_TYPES)))
def test_wrong_types(call, message):
    """Regression: these were errors of Python or of the dispatcher, which name neither the op nor the argument."""
    with pytest.raises(TypeError, match=message):
        call()


def test_integers_of_numpy_are_integers():
    for wanted, out in zip(_noise(step=3), _noise(step=numpy.int64(3), patch_size=numpy.int32(4)), strict=True):
        assert torch.equal(out, wanted)


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


OUT_OF_RANGE = torch.tensor([[0, 2], [1, 6]])
TWICE = torch.tensor([[0, 2], [5, 5]])
BAD_VALUES = [
    (
        lambda b: ops.gather_tokens(X, OUT_OF_RANGE, backend=b),
        "gather_tokens: ids_keep of image 1 holds 6 at 1, want 0",
    ),
    (lambda b: ops.gather_tokens(X, -IDS, backend=b), "ids_keep of image 0 holds -2 at 1"),
    (lambda b: ops.gather_tokens(X, TWICE, backend=b), "ids_keep of image 1 holds 5 twice, want distinct ids"),
    (lambda b: ops.scatter_tokens(X[:, :2], TWICE, 6, backend=b), "scatter_tokens: ids_keep of image 1 holds 5 twice"),
    (
        lambda b: ops.gather_tokens(X, IDS[0], CU, backend=b),
        "cu_seqlens ends at 3, want the number of packed tokens, 2",
    ),
    (lambda b: ops.masked_attention(QKV[0], cu_seqlens=CU + 1, backend=b), r"cu_seqlens\[0\] is 1, want 0"),
    (lambda b: ops.masked_attention(QKV[0], cu_seqlens=CU[[0, 2, 1]], backend=b), "cu_seqlens falls from 3 to 1 at 2"),
    (lambda b: ops.masked_dsm_loss(X[0], X[0], cu_seqlens=CU, backend=b), "cu_seqlens ends at 3, want .* 6"),
    (lambda b: _noise(ids_keep=OUT_OF_RANGE, backend=b), "noise_visible_patches: ids_keep of image 1 holds 6 at 1"),
    (lambda b: _noise(ids_keep=IDS[0], cu_seqlens=CU, backend=b), "noise_visible_patches: cu_seqlens ends at 3"),
    (
        lambda b: _noise(ids_keep=torch.tensor([3, 0, 4]), cu_seqlens=CU, backend=b),
        "noise_visible_patches: ids_keep of image 1 holds 4 at 1, want 0 <= id < 4",
    ),
]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("call", "message"), BAD_VALUES, ids=range(len(BAD_VALUES)))
def test_wrong_values(call, message, name):
    """Values that only the data shows, on both backends with the same words."""
    with pytest.raises(RuntimeError, match=message):
        call(name)


def test_a_named_backend_never_falls_back():
    meta = QKV.to("meta")
    with pytest.raises(RuntimeError, match="masked_attention: backend 'cpu' cannot run: tensor is on meta"):
        ops.masked_attention(meta, backend="cpu")
    with ops.use_backend("cpu"), pytest.raises(RuntimeError, match="backend 'cpu' cannot run"):
        ops.masked_attention(meta)
    with pytest.raises(ValueError, match="backend is 'cuda9', want one of reference, cpu"):
        ops.masked_attention(QKV, backend="cuda9")
    with pytest.raises(ValueError, match="use_backend: backend is 'cuda9'"), ops.use_backend("cuda9"):
        pass


def _chosen(name: str | None = None) -> str:
    return backend.choose("masked_attention", ops.IMPLEMENTATIONS["masked_attention"], QKV, name)


def test_use_backend_nests_and_recovers():
    with ops.use_backend("reference"):
        with pytest.raises(KeyError), ops.use_backend("cpu"):
            assert _chosen() == "cpu"
            raise KeyError
        assert _chosen() == "reference"
        assert _chosen("cpu") == "cpu"
    assert _chosen() == "cpu"


def test_use_backend_leaves_ops_alone_that_do_not_have_it():
    x = torch.zeros(2)
    with ops.use_backend("sdpa"):
        assert backend.choose("gelu", ops.IMPLEMENTATIONS["gelu"], x, None) == "cpu"
    with pytest.raises(ValueError, match="gelu: it has no backend 'sdpa', want one of reference, cpu"):
        ops.gelu(x, backend="sdpa")


@pytest.mark.parametrize(
    ("installed", "reason"), [(True, "tensor is on cpu"), (False, "triton is not installed")], ids=["cpu", "missing"]
)
@pytest.mark.parametrize("op", ops.IMPLEMENTATIONS)
def test_triton_kernels_that_are_not_loaded_are_named_all_the_same(op, installed, reason, monkeypatch):
    """The table of an op lacks them where they cannot run, which once looked like an op that has none."""
    table = {name: module for name, module in ops.IMPLEMENTATIONS[op].items() if name != "triton"}
    monkeypatch.setattr(backend, "_INSTALLED", backend._INSTALLED | {"triton": installed})
    monkeypatch.setattr(backend, "_TRITON_INTERPRETED", False)
    with ops.use_backend("triton"):
        if op in ("gelu", "linear"):
            assert not backend.is_named(table, None)
            assert backend.choose(op, table, X, None) == "cpu"
        else:
            assert backend.is_named(table, None)
            with pytest.raises(RuntimeError, match=f"{op}: backend 'triton' cannot run: {reason}"):
                backend.choose(op, table, X, None)


def test_an_op_without_the_named_backend_compiles():
    x = torch.randn(2, 3)
    with ops.use_backend("triton"):
        out = torch.compile(ops.gelu, fullgraph=True, backend="eager")(x)
    assert torch.equal(out, ops.gelu(x))


def test_without_the_library_the_reference_serves():
    """As after an install with no compiler: everything works, and status says how to mend it."""
    code = """
import pathlib
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self: False if self.name.endswith(".so") else exists(self)
import torch
from maskdm_fast import ops
from maskdm_fast.ops import backend
assert not backend.has_native()
qkv = torch.randn(2, 3, 3, 2, 4, requires_grad=True)
ops.masked_attention(qkv).sum().backward()
assert backend.choose("masked_attention", ops.IMPLEMENTATIONS["masked_attention"], qkv, None) == "reference"
table = backend.status(ops.IMPLEMENTATIONS)
assert all(row["reference"] == "ok" and "not built" in row["cpu"] for row in table.values()), table
try:
    ops.masked_attention(qkv, backend="cpu")
except RuntimeError as error:
    assert "pip install --no-build-isolation" in str(error)
else:
    raise AssertionError("a named backend fell back")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert result.returncode == 0, result.stderr
    assert "maskdm_fast runs on its slow reference backend: the native library is not built" in result.stderr
