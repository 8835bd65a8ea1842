"""Work of adamw_ema and of the global norm."""

from maskdm_fast.ops.work import FLOAT, Work


def global_norm(num_values: float, item: int) -> Work:
    """Reads every gradient.

    Args:
        num_values: of all gradients.
        item: bytes of a value.
    """
    return Work(bytes=num_values * item)


def step_(
    num_values: float,
    item: int,
    *,
    copy: int = 0,
    state: int = FLOAT,
    first_moment: bool = True,
    average: bool = True,
) -> Work:
    """Reads weight, gradient, two moments and average, writes all but the gradient, and a copy where there is one.

    Args:
        num_values: of all weights.
        item: bytes of a weight and of its gradient.
        copy: bytes of a value of the 16-bit copy; 0: none.
        state: bytes of a moment and of the average.
        first_moment, average: whether they are there.
    """
    return Work(bytes=num_values * (3 * item + 2 * (1 + first_moment + average) * state + copy))
