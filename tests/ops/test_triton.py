"""Triton kernels against the float64 reference, where they run: on a GPU, or in the interpreter on CPU tensors.

The interpreter is numpy, which has no bfloat16: there the kernels are tested in float32 and float16.
"""

import importlib
import os
import random

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from maskdm_fast import ops, testing
from maskdm_fast import random as draws
from maskdm_fast.ops import backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
CASES = {
    op: importlib.import_module(f"maskdm_fast.ops.{op}.cases")
    for op, table in ops.IMPLEMENTATIONS.items()
    if "triton" in table
}
NUM_SWEEPS = 12


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(
    ("cases", "case"),
    [pytest.param(CASES[op], case, id=f"{op}-{case.name}") for op in CASES for case in CASES[op].CASES],
)
def test_matches_reference(cases, case, dtype):
    testing.check_parity(cases, cases.make_inputs(case, dtype, DEVICE, seed=0), "triton")


@pytest.mark.parametrize("grad_layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("op", [op for op in CASES if CASES[op].WITH_GRAD])
def test_upstream_gradient_of_any_layout(op, grad_layout):
    cases = CASES[op]
    for case in cases.CASES[::4]:
        testing.check_parity(cases, cases.make_inputs(case, torch.float32, DEVICE, seed=1), "triton", grad_layout)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("op", CASES)
def test_one_input_of_another_layout(op, layout):
    cases = CASES[op]
    for case in cases.CASES[::3]:
        for name, inputs in testing.restride_one(cases.make_inputs(case, torch.float32, DEVICE, seed=0), layout):
            print(f"{case.name}: {name}")  # shown when the test fails
            testing.check_parity(cases, inputs, "triton")


@pytest.mark.parametrize("op", CASES)
def test_random_shapes(op):
    cases = CASES[op]
    for seed in range(NUM_SWEEPS):
        rng = random.Random(seed)
        case, dtype = cases.random_case(rng), rng.choice(DTYPES)
        print(f"seed {seed}: {case} {dtype}")  # shown when the test fails
        testing.check_parity(cases, cases.make_inputs(case, dtype, DEVICE, seed), "triton")


@pytest.mark.parametrize("op", CASES)
def test_repeats_bit_for_bit(op):
    cases = CASES[op]
    for case in cases.CASES[:4] if INTERPRETED else cases.CASES:
        inputs = cases.make_inputs(case, torch.float32, DEVICE, seed=2)
        first, second = testing.run(cases, inputs, "triton"), testing.run(cases, inputs, "triton")
        assert all(torch.equal(value, second[name]) for name, value in first.items()), case.name


class _Recorder(TorchDispatchMode):
    """Collects the calls of operators written with Triton, and what they returned."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func.namespace == "maskdm_fast":
            self.calls.append((func, args, results))
        return results


def _layouts(results):
    results = () if results is None else results if isinstance(results, tuple) else (results,)
    return [(result.shape, result.stride(), result.dtype, result.device) for result in results]


@pytest.mark.parametrize("op", CASES)
def test_fakes_tell_the_layout_of_results(op, monkeypatch):
    """torch.compile takes the strides of the fake at their word."""
    cases = CASES[op]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # then the functions call their operators
    seen = set()
    for case in cases.CASES:
        with _Recorder() as recorder:
            testing.run(cases, cases.make_inputs(case, torch.float16, DEVICE, seed=0), "triton")
        for func, args, results in recorder.calls:
            assert func._opname.rstrip("_").endswith("_triton")
            with FakeTensorMode() as mode:

                def fake(value, mode=mode):
                    if isinstance(value, list):
                        return [fake(item) for item in value]
                    return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

                assert _layouts(func(*map(fake, args))) == _layouts(results), f"{case.name}: {func}"
            seen.add(func)
    module = importlib.import_module(f"maskdm_fast.ops.{op}.fakes")
    assert len(seen) == sum(
        1 for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
    )


if "noise_visible_patches" in CASES:
    from maskdm_fast.ops.noise_visible_patches import triton_impl as noise

    @triton.jit
    def _draw_kernel(words_ptr, slots_ptr, step_ptr, seed: tl.int64, NUM_BLOCKS: tl.constexpr):
        block = tl.arange(0, NUM_BLOCKS)
        slot, step = tl.load(slots_ptr + tl.program_id(0)), tl.load(step_ptr)
        words = noise._draw(seed, block, slot, step)
        for word in tl.static_range(4):
            to = words_ptr + (tl.program_id(0) * NUM_BLOCKS + block) * 4 + word
            tl.store(to, words[word].to(tl.int64))


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (1, 3), (2**31 + 7, 2**31), (2**63 - 1, 2**40 + 5)])
def test_noise_visible_patches_draws_the_words_of_every_backend(seed, step):
    slots = torch.tensor([0, 5, 2**32 - 1, 2**32 + 3], device=DEVICE)
    words = torch.empty(4, 64, dtype=torch.int64, device=DEVICE)
    step = torch.tensor(step, device=DEVICE)  # whose low 32 bits count; an int above is refused
    _draw_kernel[(4,)](words, slots, step, seed, NUM_BLOCKS=16)
    assert torch.equal(words, draws.bits(64, seed=seed, stream=draws.Stream.NOISE, step=step, slots=slots))


def test_noise_visible_patches_is_normal_to_a_few_ulp():
    images = torch.zeros(3, 16, 16, 3, device=DEVICE)
    options = {"patch_size": 4, "seed": 11, "step": 5, "prediction": "x0", "layout": "bhwc"}
    zero, one = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    eps, x0 = ops.noise_visible_patches(images, None, zero, one, backend="triton", **options)
    exact = draws.normal(
        768, seed=11, stream=draws.Stream.NOISE, step=5, slots=torch.arange(3), dtype=torch.float64
    ).to(DEVICE)
    error = (eps.flatten(1).double() - exact).abs() / exact.abs().clamp(min=1.0)
    assert error.max() < 4 * torch.finfo(torch.float32).eps
    assert (x0 == 0).all()


def test_noise_visible_patches_is_nan_for_an_id_out_of_range():
    images = torch.ones(2, 1, 4, 4, device=DEVICE)
    ids_keep = torch.tensor([[-1, 2], [0, 4]], device=DEVICE)
    one, zero = torch.ones(2, device=DEVICE), torch.zeros(2, device=DEVICE)
    for pixels in (images, images.to(torch.uint8)):
        results = ops.noise_visible_patches(pixels, ids_keep, one, zero, patch_size=2, seed=0, step=0, backend="triton")
        for result in results:
            assert torch.equal(result.isnan().all(-1), torch.tensor([[True, False], [False, True]], device=DEVICE))
            assert torch.equal(result.isnan().any(-1), result.isnan().all(-1))


def test_gather_tokens_takes_ids_in_any_order():
    x = testing.draw((2, 40, 20), torch.float32, DEVICE, seed=1)
    ids_keep = torch.stack([draws.permutation(40, seed=2, stream=draws.Stream.MASK, step=step)[:33] for step in (0, 1)])
    ids_keep = ids_keep.to(DEVICE)
    packed, ends = ids_keep.flatten(), torch.tensor([0, 33, 66], dtype=torch.int32, device=DEVICE)
    for ids, cu_seqlens in ((ids_keep, None), (packed, ends)):
        results = []
        for name in ("reference", "triton"):
            tokens = ops.gather_tokens(x, ids, cu_seqlens, backend=name).requires_grad_()
            base = x.clone().requires_grad_()
            full = ops.scatter_tokens(2 * tokens, ids, 40, base, cu_seqlens, backend=name)
            results.append((tokens, full, *torch.autograd.grad((full * x).sum(), (tokens, base))))
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


def test_gather_tokens_stays_inside_for_ids_out_of_range():
    x = testing.draw((2, 3, 4), torch.float32, DEVICE, seed=1)
    ids_keep = torch.tensor([[0, 3], [-1, 2]], device=DEVICE)
    tokens = ops.gather_tokens(x, ids_keep, backend="triton")
    assert tokens.isnan().all(-1).tolist() == [[False, True], [True, False]]
    assert torch.equal(tokens[0, 0], x[0, 0])
    assert torch.equal(tokens[1, 1], x[1, 2])
    full = ops.scatter_tokens(x[:, :2], ids_keep, 3, x, backend="triton")
    assert torch.equal(full[0], torch.stack([x[0, 0], x[0, 1], x[0, 2]]))
    assert torch.equal(full[1], torch.stack([x[1, 0], x[1, 1], x[1, 1]]))


def test_masked_dsm_loss_hides_no_nan():
    for kind in ("mse", "l1", "huber"):
        pred = torch.zeros(2, 3, 5, device=DEVICE)
        pred[1, 2, 4] = float("nan")
        pred.requires_grad_()
        loss = ops.masked_dsm_loss(pred, torch.zeros_like(pred), kind=kind, reduction="none", backend="triton")
        assert loss.isnan().tolist() == [False, True]
        (grad,) = torch.autograd.grad(loss.sum(), pred)
        assert grad.isnan().sum() == 1


def test_masked_dsm_loss_of_no_images_is_nan():
    pred = torch.zeros(0, 3, 5, device=DEVICE)
    assert ops.masked_dsm_loss(pred, pred, backend="triton").isnan()
    assert ops.masked_dsm_loss(pred, pred, reduction="none", backend="triton").shape == (0,)


@pytest.mark.parametrize("op", ["masked_dsm_loss", "sid_loss"])
def test_losses_of_an_image_beyond_the_most_programs(op, monkeypatch):
    """Stretches grow when an image would need more programs than it may have."""
    monkeypatch.setattr(importlib.import_module(f"maskdm_fast.ops.{op}.triton_impl"), "_MAX_PROGRAMS", 2)
    case = next(case for case in CASES[op].CASES if case.name == "long")
    testing.check_parity(CASES[op], CASES[op].make_inputs(case, torch.float32, DEVICE, seed=3), "triton")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("op", ["masked_dsm_loss", "sid_loss"])
def test_losses_of_more_images_than_are_added_at_a_time(op, reduction, monkeypatch):
    monkeypatch.setattr(importlib.import_module(f"maskdm_fast.ops.{op}.triton_impl"), "_SUMS", 2)
    sizes = {"masked_dsm_loss": ((4,) * 5, 3), "sid_loss": ((5, 12),)}[op]
    case = CASES[op].Case("images", *sizes, reduction=reduction)
    testing.check_parity(CASES[op], CASES[op].make_inputs(case, torch.float32, DEVICE, seed=3), "triton")


def _adamw_inputs(**changes):
    cases = CASES["adamw_ema"]
    case = cases.Case("test", ((33, 5), (1100,)), copy="float16")
    return cases.make_inputs(case, torch.float32, DEVICE, seed=4) | changes


@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_adamw_ema_reads_numbers_on_the_device(beta1):
    numbers = {"lr": 0.01, "step": 7, "ema_decay": 0.9999}
    dtypes = {"lr": torch.float32, "step": torch.int64, "ema_decay": torch.float64}
    tensors = {name: torch.tensor(value, dtype=dtypes[name], device=DEVICE) for name, value in numbers.items()}
    cases, betas = CASES["adamw_ema"], {"betas": (beta1, 0.999)}
    by_number = testing.check_parity(cases, _adamw_inputs(**numbers, **betas), "triton")
    by_tensor = testing.run(cases, _adamw_inputs(**tensors, **betas), "triton")
    for name, value in by_number.items():
        torch.testing.assert_close(
            by_tensor[name], value, rtol=1e-6 if value.dtype == torch.float32 else 1e-3, atol=1e-7
        )


def test_adamw_ema_skips_what_is_not_finite():
    inputs = _adamw_inputs(found_inf=torch.ones((), device=DEVICE))
    before = {name: [value.clone() for value in inputs[name]] for name in inputs if isinstance(inputs[name], list)}
    for grad in inputs["grads"]:
        grad.view(-1)[::3] = float("nan")
    ops.adamw_ema(**inputs, backend="triton")
    for name in ("params", "exp_avgs", "exp_avg_sqs", "emas", "copies"):
        assert all(map(torch.equal, inputs[name], before[name])), name
    inputs["found_inf"].zero_()
    ops.adamw_ema(**inputs, backend="triton")
    assert all(value.isnan().any() for value in inputs["params"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_adamw_ema_without_slots(dtype):
    """What is not there changes no bit of the rest."""
    cases = CASES["adamw_ema"]
    case = cases.Case("slots", ((33, 5), (1100,)), copy="float16", first_moment=False)
    inputs = cases.make_inputs(case, dtype, DEVICE, seed=4)
    whole = testing.run(cases, inputs | {"exp_avgs": inputs["exp_avg_sqs"]}, "triton")
    for lacking in ({}, {"emas": None}):
        results = testing.run(cases, inputs | lacking, "triton")
        assert len(results) == (9 if not lacking else 7)
        assert all(torch.equal(value, whole[name]) for name, value in results.items())


@pytest.mark.parametrize("lacking", [(), (2, 4)], ids=["all slots", "one slot"])
def test_adamw_ema_takes_dtypes_and_alignments_side_by_side(lacking):
    """float16 beside float32, tensors that begin inside 16 bytes, and float64, which goes to the reference."""
    from maskdm_fast.ops.adamw_ema import reference, triton_impl

    def tensors(seed, *dtypes):
        return [testing.draw((1031,), dtype, DEVICE, seed + i)[1 - i % 2 :] for i, dtype in enumerate(dtypes)]

    results = []
    for implementation in (reference, triton_impl):
        kinds = (torch.float32, torch.float16, torch.float32, torch.float64)
        states = (torch.float32, torch.float32, torch.float32, torch.float64)
        lists = [tensors(0, *kinds), tensors(10, *kinds), tensors(20, *states)]
        lists += [[v.square() for v in tensors(30, *states)], tensors(40, *states)]
        lists = [[] if index in lacking else tensors for index, tensors in enumerate(lists)]
        beta1 = 0.0 if lacking else 0.9
        implementation.step_(*lists, [], None, 0.01, beta1, 0.99, 1e-8, 0.1, 3, 0.9, None, None, None, None)
        results.append([value for values in lists for value in values])
        results[-1].append(implementation.global_norm(lists[1]))
        results[-1].append(implementation.global_norm(lists[1][:3]))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3 if mine.dtype == torch.float16 else 2e-6, atol=1e-6)


def test_adamw_ema_uploads_addresses_once(monkeypatch):
    """A captured step may not upload: it finds the tables of the step before, or says what is wrong."""
    from maskdm_fast.ops import triton_adam

    monkeypatch.setattr(triton_adam, "_tables", {})
    monkeypatch.setattr(triton_adam, "_captured", {})
    inputs = _adamw_inputs()
    CASES["adamw_ema"].call(inputs, "triton")
    before = list(triton_adam._tables.values())
    assert len(before) == 2  # of the step and of the norm
    monkeypatch.setattr(backend, "is_capturing", lambda tensor: True)
    CASES["adamw_ema"].call(inputs, "triton")
    assert [id(table) for table in triton_adam._tables.values()] == [id(table) for table in before]
    assert set(triton_adam._captured) == set(triton_adam._tables)
    moved = inputs | {"grads": [grad.clone() for grad in inputs["grads"]]}
    with pytest.raises(RuntimeError, match=r"zero_grad\(set_to_none=False\)"):
        CASES["adamw_ema"].call(moved, "triton")
    monkeypatch.setattr(backend, "is_capturing", lambda tensor: False)
    kept = []  # so that each copy has an address of its own
    for _ in range(triton_adam._KEPT_TABLES):
        kept.append([grad.clone() for grad in inputs["grads"]])
        ops.adamw_ema(**inputs | {"grads": kept[-1]}, backend="triton")
    assert len(triton_adam._tables) == triton_adam._KEPT_TABLES
    assert len(triton_adam._captured) == 2  # for as long as the graph may live


def test_lamb_ema_of_tensors_with_more_chunks_than_are_added_at_a_time(monkeypatch):
    from maskdm_fast.ops.lamb_ema import triton_impl

    monkeypatch.setattr(triton_impl, "_SUMS", 2)
    cases = CASES["lamb_ema"]
    case = cases.Case("long", ((5 * triton_impl._CHUNK + 3,), (7,)))
    testing.check_parity(cases, cases.make_inputs(case, torch.float32, DEVICE, seed=4), "triton")
