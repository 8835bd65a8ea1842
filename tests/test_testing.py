"""The tolerance rule, computed by hand: what it lets pass, and what it finds."""

import pytest
import torch

from maskdm_fast.testing import assert_close

EPS = torch.finfo(torch.float32).eps
EPS64 = torch.finfo(torch.float64).eps


@pytest.mark.parametrize(
    ("dtype", "low_dtype", "low_error", "largest", "bound"),
    [
        (torch.float32, torch.float32, 0.0, 0.25, 3 * EPS),  # a rounding of 1 where values are smaller
        (torch.float32, torch.float32, 0.0, 8.0, 24 * EPS),  # of the largest where they are larger
        (torch.float32, torch.float32, 2.0**-10, 0.25, 3 * (2.0**-10 + EPS)),  # and the error of the dtype
        (torch.float64, torch.float32, 2.0**-10, 0.25, 3 * (2.0**-10 * EPS64 / EPS + EPS64)),  # which scales to float64
    ],
)
def test_the_bound_of_the_tolerance_rule(dtype, low_dtype, low_error, largest, bound):
    ref64 = torch.tensor([0.0, -largest], dtype=torch.float64)
    low = ref64.to(low_dtype)
    low[0] = low_error

    def out(error):
        return torch.tensor([error, -largest], dtype=dtype)

    assert_close("x", out(0.99 * bound), ref64, low)
    with pytest.raises(AssertionError, match=r"x: error .* exceeds"):
        assert_close("x", out(1.01 * bound), ref64, low)
    with pytest.raises(AssertionError, match=r"x: error .* exceeds"):
        assert_close("x", out(-1.01 * bound), ref64, low)


def test_what_has_another_shape_or_is_not_finite_is_found():
    ref64 = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"x: shape \[1, 2\], want \[2\]"):
        assert_close("x", torch.zeros(1, 2), ref64, torch.zeros(2))
    # A comparison with NaN is false, whichever way it is asked.
    with pytest.raises(AssertionError, match="x: not finite"):
        assert_close("x", torch.tensor([0.0, float("nan")]), ref64, torch.zeros(2))
    assert_close("x", torch.zeros(0), ref64[:0], torch.zeros(0))
