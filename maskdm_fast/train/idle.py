"""The state of an optimizer in the memory of the CPU, while its network is not trained."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from maskdm_fast.ops import streams
from maskdm_fast.optim.ema_optimizer import EMAOptimizer


class IdleState:
    """Moves what an optimizer keeps of its parameters (`EMAOptimizer.SLOTS`) to the CPU and back, bit for bit.

    Tensors stay the same objects, and views of them stay views: only their memory on the device goes and comes again.
    Copies are queued where the device works anyway, from and to pinned memory, and the host waits for none of them. The
    pinned memory is PyTorch's, which rounds each piece up to a power of two and gives it to the next that rests.

    Args:
        optimizer: whose state; each of its tensors has a storage of its own.
        device: where the state is while the network is trained.
        moves: whether there is another memory to move it to.
    """

    def __init__(self, optimizer: EMAOptimizer, device: torch.device, moves: bool) -> None:
        self._optimizer, self._device = optimizer, device
        self._moves = moves
        self._hosts: dict[Tensor, Tensor] = {}
        self._arrived: Callable[[], None] | None = None

    @property
    def resting(self) -> bool:
        """Whether the state is on the CPU."""
        return bool(self._hosts)

    @torch.no_grad()
    def rest(self) -> None:
        """Move the state to the CPU; nothing, if it is there, does not exist yet, or cannot move."""
        if not self._moves or self.resting:
            return
        for state in self._optimizer.state.values():
            for tensor in [state[slot] for slot in EMAOptimizer.SLOTS if slot in state]:
                host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                self._hosts[tensor] = host.copy_(tensor, non_blocking=True)
                # What uses this memory next is queued after the copy.
                tensor.untyped_storage().resize_(0)
        if self._device.type == "cuda":
            self._arrived = streams.mark(self._device)

    @torch.no_grad()
    def wake(self) -> None:
        """Move the state back; nothing, if it does not rest."""
        for tensor, host in self._hosts.items():
            tensor.untyped_storage().resize_(host.nbytes)
            tensor.copy_(host, non_blocking=True)
        self.forget()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """The state is on the device inside, and afterwards where it was before."""
        resting = self.resting
        self.wake()
        yield
        if resting:
            self.rest()

    def held(self, tensor: Tensor) -> Tensor:
        """A tensor of the state, or the copy on the CPU that has its values while it rests; waits for that."""
        if tensor not in self._hosts:
            return tensor
        if self._arrived is not None:
            self._arrived()
            self._arrived = None
        return self._hosts[tensor]

    def forget(self) -> None:
        """Give back the memory on the CPU."""
        self._hosts, self._arrived = {}, None
