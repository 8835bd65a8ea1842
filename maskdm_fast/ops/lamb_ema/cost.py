"""Work of lamb_ema."""

from maskdm_fast.ops.work import FLOAT, Work


def step_(num_values: float, item: int, *, copy: int = 0, state: int = FLOAT) -> Work:
    """Two passes, for the norms take in the whole of a tensor before a weight of it changes: the first reads weight,
    gradient and moments and writes the moments; the second reads weight, moments and average, and writes weight,
    average, and a copy where there is one.

    Args:
        num_values: of all weights.
        item: bytes of a weight and of its gradient.
        copy: bytes of a value of the 16-bit copy; 0: none.
        state: bytes of a moment and of the average.
    """
    return Work(bytes=num_values * (4 * item + 8 * state + copy))
