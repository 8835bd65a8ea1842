"""Work of linear."""

from maskdm_fast.ops.work import Work


def forward(rows: float, fan_in: int, fan_out: int, item: int, *, bias: bool, residual: bool = False) -> Work:
    """``x W^T + b + residual``; reads all four, writes the result.

    Args:
        rows: of x, all its axes but the last.
        fan_in, fan_out: width of x, and of the result.
        item: bytes of a value.
        bias, residual: whether there are any.
    """
    values = rows * fan_in + fan_in * fan_out + fan_out * bias + rows * fan_out * (1 + residual)
    return Work(_product(rows, fan_in, fan_out), 0.0, values * item)


def backward(
    rows: float,
    fan_in: int,
    fan_out: int,
    item: int,
    *,
    bias: bool,
    grad_x: bool = True,
    grad_weight: bool = True,
) -> Work:
    """``grad W``, ``grad^T x`` and the column sums of grad; arguments as `forward`.

    Reads grad, for `grad_weight` x and for `grad_x` the weight; writes the gradients. That of a residual is grad
    itself. With a frozen weight the bias is frozen, too.
    """
    values = rows * fan_out
    if grad_weight:
        values += rows * fan_in + fan_in * fan_out + fan_out * bias
    if grad_x:
        values += rows * fan_in + fan_in * fan_out
    return Work(_product(rows, fan_in, fan_out) * (grad_x + grad_weight), 0.0, values * item)


def _product(rows: float, fan_in: int, fan_out: int) -> float:
    return 2.0 * rows * fan_in * fan_out
