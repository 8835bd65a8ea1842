"""The counted work of the ops: bytes against the tensors that their backends are given and return, FLOPs against
PyTorch's counter."""

import importlib
import math
from collections import defaultdict

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from maskdm_fast import ops
from maskdm_fast.ops import backend
from maskdm_fast.ops.work import Work
from maskdm_fast.testing import draw

needs_native = pytest.mark.skipif(not backend.has_native(), reason="the native library is not built")


_LOSSES = ("masked_dsm_loss", "sid_loss")  # for the gradient of a weight they take another forward pass


def cases_of(op):
    return importlib.import_module(f"maskdm_fast.ops.{op}.cases")


def cost_of(op):
    return importlib.import_module(f"maskdm_fast.ops.{op}.cost")


def every_case(op):
    return [pytest.param(case, id=case.name) for case in cases_of(op).CASES]


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def num_bytes(value):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(value))


def passes_of(module):
    """Names of the functions of a backend."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]


@pytest.fixture
def passes(monkeypatch):
    """``run(op, call)`` runs call() on the reference and returns the passes of the backend that it took, as ``{name:
    [(arguments, result), ...]}``."""

    def run(op, call):
        found, inside = defaultdict(list), []
        module = ops.IMPLEMENTATIONS[op]["reference"]

        def recorded(name, function):
            def record(*arguments):
                inside.append(name)
                result = function(*arguments)
                inside.pop()
                if not inside:  # a pass may be made of others
                    found[name].append((arguments, result))
                return result

            return record

        for name in passes_of(module):
            monkeypatch.setattr(module, name, recorded(name, getattr(module, name)))
        call()
        return found

    return run


def run_case(op, case, passes, dtype=torch.float32):
    """Inputs of the case, and the passes of the op and of its gradient."""
    module = cases_of(op)
    inputs = module.make_inputs(case, dtype, "cpu", seed=0)
    for name in module.WITH_GRAD:
        if inputs[name] is not None and name != "target" and not (op in _LOSSES and name == "weight"):
            inputs[name] = inputs[name].detach().requires_grad_()

    def call():
        outputs = module.call(inputs, "reference")
        with_grad = [output for output in outputs.values() if output.requires_grad]
        if with_grad:
            torch.autograd.backward(with_grad, [torch.ones_like(output) for output in with_grad])

    return inputs, passes(op, call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", every_case("masked_attention"))
def test_bytes_of_masked_attention(case, dtype, passes):
    inputs, found = run_case("masked_attention", case, passes, dtype)
    cost, item = cost_of("masked_attention"), dtype.itemsize
    shape = (sum(case.lengths), sum(n * n for n in case.lengths), case.num_heads, case.head_dim, item)
    index = 0 if inputs["cu_seqlens"] is None else num_bytes(inputs["cu_seqlens"])  # as small as a few tokens
    for name in ("forward", "backward"):
        [(arguments, result)] = found[name]
        assert getattr(cost, name)(*shape).bytes + index == num_bytes(arguments) + num_bytes(result)
    tokens, products = sum(n * n for n in case.lengths) * case.num_heads * case.head_dim, cost.forward(*shape)
    assert products.flops == 4 * tokens and products.model_flops == products.flops
    assert cost.backward(*shape).flops == 10 * tokens and cost.backward(*shape).model_flops == 8 * tokens


@pytest.mark.parametrize("case", every_case("linear"))
def test_bytes_of_linear(case, passes):
    _, found = run_case("linear", case, passes)
    cost, shape = cost_of("linear"), (math.prod(case.rows), case.fan_in, case.fan_out, 4)
    forward = cost.forward(*shape, bias=case.bias, residual=case.residual)
    backward = cost.backward(*shape, bias=case.bias)
    for name, work in (("forward", forward), ("backward", backward)):
        [(arguments, result)] = found[name]
        assert work.bytes == num_bytes(arguments) + num_bytes(result)
    assert backward.flops == 2 * forward.flops == 4 * math.prod(shape[:3])
    without_x = cost.backward(*shape, bias=case.bias, grad_x=False)
    assert backward.bytes - without_x.bytes == 4 * case.fan_in * (shape[0] + case.fan_out)
    frozen = cost.backward(*shape, bias=case.bias, grad_weight=False)
    assert frozen.flops == without_x.flops == forward.flops
    assert frozen.bytes == 4 * (shape[0] * (case.fan_in + case.fan_out) + case.fan_in * case.fan_out)


@pytest.mark.parametrize("case", every_case("gelu"))
def test_bytes_of_gelu(case, passes):
    _, found = run_case("gelu", case, passes)
    for name in ("forward", "backward"):
        [(arguments, result)] = found[name]
        work = getattr(cost_of("gelu"), name)(math.prod(case.shape), 4)
        assert work.bytes == num_bytes(arguments) + num_bytes(result)


@pytest.mark.parametrize("case", every_case("gather_tokens"))
def test_bytes_of_gather_and_scatter(case, passes):
    """What is not read of an argument: rows that no id names, and those of a base that an id names."""
    inputs, found = run_case("gather_tokens", case, passes)
    cost, ids = cost_of("gather_tokens"), inputs["ids_keep"]
    visible, total, width = ids.numel(), case.num_images * case.num_tokens, case.width
    [((x, *_), result)] = found["gather"]
    assert cost.gather(visible, width, 4).bytes == 2 * num_bytes(result) + num_bytes(ids)
    assert num_bytes(x) == 4 * total * width
    # Forward onto zeros and onto a base; and the gradient of gather, onto zeros.
    assert [arguments[2] is not None for arguments, _ in found["scatter"]] == [False, True, False]
    for (kept, _, base, *_), result in found["scatter"]:
        read = num_bytes(kept) if base is None else num_bytes(base)  # kept rows take the places of rows of the base
        work = cost.scatter(visible, total, width, 4, base=base is not None)
        assert work.bytes == read + num_bytes(result) + num_bytes(ids)
    (grad, *_), result = next(entry for entry in found["split"] if all(entry[0][-2:]))
    assert cost.split(visible, total, width, 4).bytes == num_bytes(grad) + num_bytes(result) + num_bytes(ids)


@pytest.mark.parametrize("case", every_case("noise_visible_patches"))
def test_bytes_of_noise_visible_patches(case, passes):
    """Of the images only visible pixels are read; step, flips and cumulative counts are left out of the count."""
    _, found = run_case("noise_visible_patches", case, passes)
    [(arguments, result)] = found["forward"]
    images, ids, _, *levels, slots, _, _ = arguments[:10]
    pixel = images.element_size()
    read = num_bytes(result) // 2 // 4 * pixel  # as many pixels as noisy values
    work = cost_of("noise_visible_patches").forward(
        case.num_images,
        result[0].shape[:-1].numel(),
        case.patch_size**2 * case.channels,
        pixel,
        4,
        all_visible=ids is None,
    )
    assert len(levels) == 4
    assert work.bytes == read + num_bytes(result) + num_bytes(ids) + num_bytes(levels) + num_bytes(slots)


@pytest.mark.parametrize("case", every_case("masked_dsm_loss"))
def test_bytes_of_masked_dsm_loss(case, passes):
    inputs, found = run_case("masked_dsm_loss", case, passes)
    index = 0 if inputs["cu_seqlens"] is None else num_bytes(inputs["cu_seqlens"])
    for name in ("forward", "backward"):
        [(arguments, result)] = found[name]
        work = getattr(cost_of("masked_dsm_loss"), name)(
            len(case.lengths), inputs["pred"].numel(), 4, weighted=case.weighted, mean=case.reduction == "mean"
        )
        assert work.bytes + index == num_bytes(arguments) + num_bytes(result)


@pytest.mark.parametrize("case", every_case("sid_loss"))
def test_bytes_of_sid_loss(case, passes):
    inputs, found = run_case("sid_loss", case, passes)
    cost, shape, mean = cost_of("sid_loss"), (case.shape[0], math.prod(case.shape), 4), case.reduction == "mean"
    [(arguments, result)] = found["forward"]
    of_xt, weighted = case.weighting == "l1_xt", case.weighted or case.weighting == "karras"
    levels = num_bytes(inputs["alpha_t"]) if of_xt and case.levels else 0  # one number an image
    forward = cost.forward(*shape, weighted=weighted, mean=mean, of_xt=of_xt)
    assert forward.bytes + levels == num_bytes(arguments) + num_bytes(result)
    [(arguments, result)] = found["backward"]
    assert cost.backward(*shape, mean=mean).bytes == num_bytes(arguments) + num_bytes(result)
    assert cost.backward(*shape, mean=mean, num_grads=1).bytes == num_bytes(arguments) + num_bytes(result[0])


@pytest.mark.parametrize("case", every_case("adamw_ema"))
def test_bytes_of_adamw_ema(case, passes):
    """All of what is written but the copies is read as well."""
    _, found = run_case("adamw_ema", case, passes)
    cost, count = cost_of("adamw_ema"), sum(math.prod(shape) for shape in case.shapes)
    [((grads,), _)] = found["global_norm"]
    assert cost.global_norm(count, 4).bytes == num_bytes(grads)
    [(arguments, _)] = found["step_"]
    params, grads, *state, copies = arguments[:6]
    assert [bool(slot) for slot in state] == [case.first_moment, True, case.average]
    touched = num_bytes(grads) + 2 * num_bytes(params) + 2 * num_bytes(state) + num_bytes(copies)
    slots = {"first_moment": case.first_moment, "average": case.average}
    assert cost.step_(count, 4, copy=2 if case.copy else 0, **slots).bytes == touched
    assert cost.step_(count, 4, first_moment=False).bytes == cost.step_(count, 4, average=False).bytes == 28 * count
    assert cost.step_(count, 4).bytes + cost.global_norm(count, 4).bytes == 40 * count


@pytest.mark.parametrize("case", every_case("lamb_ema"))
def test_bytes_of_lamb_ema(case, passes):
    """Parameters and moments are read a second time, after the norms."""
    _, found = run_case("lamb_ema", case, passes)
    [(arguments, _)] = found["step_"]
    params, grads, m, v, emas, copies = arguments[:6]
    touched = num_bytes(grads) + 3 * num_bytes([params, m, v]) + 2 * num_bytes(emas) + num_bytes(copies)
    count = sum(math.prod(shape) for shape in case.shapes)
    assert cost_of("lamb_ema").step_(count, 4, copy=2 if case.copy else 0).bytes == touched
    assert cost_of("lamb_ema").step_(count, 4).bytes == 48 * count


def test_every_op_has_a_cost_for_every_pass():
    for op, table in ops.IMPLEMENTATIONS.items():
        missing = {name for name in passes_of(table["reference"]) if not hasattr(cost_of(op), name)}
        assert not missing, f"{op}: cost.py has no {missing}"


def test_work_adds_up():
    work = Work(6.0, 2.0, 3.0) + Work(bytes=1.0) * 3
    assert work == Work(6.0, 2.0, 6.0) and (work.model_flops, work.intensity) == (4.0, 1.0)
    assert Work().intensity == 0.0


def counted(call):
    """FLOPs of a call and of the backward pass of its result, by PyTorch's counter."""
    ops.register_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        call().sum().backward()
    return counter.get_total_flops()


@needs_native
@pytest.mark.parametrize("separate", [False, True])
def test_pytorchs_counter_knows_masked_attention(separate):
    """As PyTorch's own attention on a GPU, whose backward pass counts the scores a second time: 4 and 10 L^2 E."""
    shape = (2, 7, 3, 3, 8)
    qkv = draw(shape, torch.float32, "cpu", seed=0).requires_grad_()
    inputs = qkv.unbind(2) if separate else (qkv,)
    assert counted(lambda: ops.masked_attention(*inputs)) == 14 * 2 * 7 * 7 * 3 * 8


@needs_native
def test_pytorchs_counter_knows_packed_attention():
    """Every image has its own square; without values of cu_seqlens, as on the meta device, images count as equal."""
    lengths = (3, 0, 5)
    qkv = draw((8, 3, 2, 4), torch.float32, "cpu", seed=0).requires_grad_()
    cu_seqlens = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    assert counted(lambda: ops.masked_attention(qkv, cu_seqlens=cu_seqlens)) == 14 * sum(n * n for n in lengths) * 2 * 4
    with FlopCounterMode(display=False) as counter:  # registered by the call above
        q = torch.empty(8, 2, 4, device="meta")
        torch.ops.maskdm_fast.masked_attention_fwd(q, q, q, cu_seqlens.to("meta"), 1.0)
    assert counter.get_total_flops() == int(4 * (8 * 8 / 3) * 2 * 4)


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
@pytest.mark.parametrize("residual", [False, True])
def test_pytorchs_counter_knows_linear(backend_name, residual):
    """On oneDNN's products, with one addition fused, as on PyTorch's."""
    if backend_name == "cpu" and not (backend.has_native() and backend.has_onednn()):
        pytest.skip("the native library is not built, or PyTorch is without oneDNN")
    x, weight, bias = (draw(shape, torch.float32, "cpu", 0).requires_grad_() for shape in ((3, 5, 12), (7, 12), (7,)))
    added = draw((3, 5, 7), torch.float32, "cpu", 0) if residual else None
    flops = counted(lambda: ops.linear(x, weight, bias, residual=added, backend=backend_name))
    assert flops == 6 * 15 * 12 * 7
