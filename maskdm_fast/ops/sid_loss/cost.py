"""Work of sid_loss."""

from maskdm_fast.ops.work import Work, accumulator_bytes


def forward(num_images: float, num_values: float, item: int, *, weighted: bool, mean: bool, of_xt: bool) -> Work:
    """Reads images and both estimates, with `of_xt` the noisy images, and the weights; writes a loss per image, or
    their mean, and a factor per image for the backward pass.

    Args:
        num_images: B.
        num_values: of all images.
        item: bytes of a value.
        weighted: whether there are weights, as with ``"karras"``.
        mean: whether the result is one number.
        of_xt: whether the weighting is ``"l1_xt"``.
    """
    numbers = num_images * (1 + weighted) + (1 if mean else num_images)
    return Work(bytes=(3 + of_xt) * num_values * item + numbers * accumulator_bytes(item))


def backward(num_images: float, num_values: float, item: int, *, mean: bool, num_grads: int = 3) -> Work:
    """Reads images, both estimates, the factors and the gradient of the result, writes those that are asked for; other
    arguments as `forward`."""
    numbers = num_images + (1 if mean else num_images)
    return Work(bytes=(3 + num_grads) * num_values * item + numbers * accumulator_bytes(item))
