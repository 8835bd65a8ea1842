"""Ground truth of gather_tokens and scatter_tokens in plain PyTorch."""

from torch import Tensor

from maskdm_fast.ops.checks import check_ids, image_of_token


def gather(x: Tensor, ids_keep: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    check_ids("gather_tokens", ids_keep, x.shape[1], cu_seqlens, distinct=True)
    if cu_seqlens is None:
        return x.gather(1, ids_keep[:, :, None].expand(-1, -1, x.shape[2]))
    return x[image_of_token(cu_seqlens, ids_keep.shape[0]), ids_keep]


def scatter(x: Tensor, ids_keep: Tensor, base: Tensor | None, cu_seqlens: Tensor | None, num_tokens: int) -> Tensor:
    check_ids("scatter_tokens", ids_keep, num_tokens, cu_seqlens, distinct=True)
    num_images = ids_keep.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if base is None:
        base = x.new_zeros(num_images, num_tokens, x.shape[-1])
    if cu_seqlens is None:
        return base.scatter(1, ids_keep[:, :, None].expand(-1, -1, x.shape[-1]), x)
    return base.index_put((image_of_token(cu_seqlens, ids_keep.shape[0]), ids_keep), x)


def split(
    grad: Tensor, ids_keep: Tensor, cu_seqlens: Tensor | None, to_x: bool, to_base: bool
) -> tuple[Tensor, Tensor]:
    nothing = grad.new_empty(0)
    grad_x = gather(grad, ids_keep, cu_seqlens) if to_x else nothing
    if not to_base:
        return grad_x, nothing
    zeros = grad.new_zeros(*ids_keep.shape, grad.shape[2])
    return grad_x, scatter(zeros, ids_keep, grad, cu_seqlens, grad.shape[1])
