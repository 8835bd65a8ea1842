"""The CUDA kernels of sid_loss, emulated, where the parity cases do not go.

Images over several blocks, more images than a block has warps, addresses off the boundaries of wide accesses.
"""

import pytest
import torch

from maskdm_fast import ops, testing
from maskdm_fast.ops.sid_loss import cases
from maskdm_fast.testing import draw

ALL = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("weighting", ["l1", "l1_xt"])
def test_images_over_several_blocks(in_every_order, weighting, dtype, reduction):
    """Three blocks an image; all images but the first begin between two boundaries."""
    case = cases.Case("blocks", (3, 7, 349), weighting=weighting, reduction=reduction, bad=(0.0, float("nan")))
    inputs = cases.make_inputs(case, dtype, "cpu", seed=3)
    in_every_order(lambda: testing.check_parity(cases, inputs, "cpu"))


@pytest.mark.parametrize("num_images", [31, 32, 33, 70])
def test_more_images_than_warps(in_every_order, num_images):
    """Four images a block, or all in one block of 32 warps."""
    for reduction in ("mean", "none"):
        case = cases.Case("images", (num_images, 5), reduction=reduction)
        inputs = cases.make_inputs(case, torch.float32, "cpu", seed=4)
        in_every_order(lambda inputs=inputs: testing.check_parity(cases, inputs, "cpu"))


@pytest.mark.parametrize("moved", ["generated", "teacher", "fake", "xt"])
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_off_the_boundary(emulated, dtype, moved):
    """The same contiguous values one element past a boundary of 16 bytes: then those of all tensors go one by one."""
    case = cases.Case("moved", (3, 9, 24), weighting="l1_xt")
    inputs = cases.make_inputs(case, dtype, "cpu", seed=5)
    memory = torch.empty(inputs[moved].numel() + 1, dtype=dtype)
    inputs[moved] = memory[1:].view(case.shape).copy_(inputs[moved])
    assert inputs[moved].data_ptr() % 16 != 0
    testing.check_parity(cases, inputs, "cpu")


def test_gradients_that_are_not_wanted_are_not_written(emulated):
    """Bit for bit those of all three together."""
    images = [draw((3, 50), torch.float32, "cpu", seed) for seed in range(3)]
    scale, upstream = torch.tensor([1.0, 0.0, -2.0]), torch.tensor([3.0, float("nan"), 1.0])

    def backward(*wanted):
        return emulated.sid_loss_bwd(upstream, scale, *images, 1.2, False, *wanted)

    together = backward(True, True, True)
    assert all((grad[1] == 0).all() and grad.isfinite().all() for grad in together)
    for which in range(3):
        wanted = [which == other for other in range(3)]
        for grad, other, want in zip(backward(*wanted), together, wanted, strict=True):
            assert torch.equal(grad, other) if want else grad.numel() == 0


def test_the_sum_of_many_values_is_accurate(emulated):
    """300,000 equal values, in float32 one after another, would be off by a thousandth."""
    generated, teacher = torch.zeros(1, 300_000), torch.full((1, 300_000), 0.1)
    loss = ops.sid_loss(generated, teacher, generated, alpha=0.5, weighting="none", backend="cpu")
    assert abs(loss.double() / (0.5 * torch.tensor(0.1).double().square()) - 1) < 1e-7


def test_float64_is_refused(emulated):
    images = draw((2, 3), torch.float64, "cpu", seed=1)
    with pytest.raises(RuntimeError, match="sid_loss: the CUDA kernels have no float64"):
        ops.sid_loss(images, images, images, backend="cpu")
