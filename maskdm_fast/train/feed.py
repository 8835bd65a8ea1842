"""What the training loop reads: the micro-batches of each step, prepared while the device computes the step before."""

import concurrent.futures
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from maskdm_fast.data import DataOrder
from maskdm_fast.eval import subset_indices
from maskdm_fast.ops import backend
from maskdm_fast.ops.streams import SideStream
from maskdm_fast.train.config import RunConfig
from maskdm_fast.train.stages import Batch
from maskdm_fast.train.world import World

DEVICE_SHARE = 0.5
"""The images are kept in the memory of a GPU by themselves if they take at most this share of what is free there."""

_CHUNK_BYTES = 1 << 26


class Store(Protocol):
    """What a feed needs of a data set.

    Attributes:
        labels: int64 ``[n]``.
        nbytes: size of all images in bytes, as `batch` returns them.
        is_mapped: whether the images lie on the disk as they are, else each is decoded when it is asked for.
    """

    labels: Tensor
    nbytes: int
    is_mapped: bool

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images ``[B, h, w, C]`` and labels, int64 ``[B]``, of the images at `indices`, int64 ``[B]``; on the CPU."""
        ...


def _nothing() -> None:
    """There is nothing to wait for."""


class Feed:
    """The micro-batches of one process, step by step: a pure function of configuration, data set and step number.

    On a GPU a thread prepares the step that follows the one last asked for: it looks up the order of the data (drawn
    anew for each epoch), gathers the images into pinned memory and copies them to the device on a stream of its own.
    Whoever asks for a batch makes the device, not the host, wait for the copy. Where the images are kept on the device
    (`images_on_device`), only their indices travel and the device gathers them. The thread begins no batch before the
    device has come within two steps of it: a host that launches graphs could be a hundred steps ahead, and as many
    batches in memory.

    On the CPU only images that must be decoded are prepared ahead. From a packed store everything is read when it is
    asked for: a thread would take its time from the cores that compute and has nothing to hide. Gathering 128 images of
    32 px takes 0.05 ms of a step of 21.9 ms; with a thread the step took 21.7 ms, which is the same (medians of 10
    times 12 steps, one core of an EPYC).

    Args:
        config: of the run.
        store: the data set; a `DataOrder` over its `data_share` decides what is read.
        world: the processes.
        still_needed: bytes of memory on the device that training will take besides what it has already; `data_device`
            auto leaves them free.
        ahead: whether to prepare steps ahead; None: on a GPU, and where images are decoded.

    Attributes:
        images_on_device: whether the images are kept in the memory of the GPU.

    Raises:
        ValueError: images are to be kept on a GPU, but the run is on the CPU; `batch_size` cannot be shared evenly;
            classes are to be balanced, but there are none.
        RuntimeError: they are to be kept on a GPU, where they do not fit.
    """

    def __init__(
        self, config: RunConfig, store: Store, world: World, *, still_needed: int = 0, ahead: bool | None = None
    ) -> None:
        self._store = store
        self._batch_size = config.stage.batch_size
        # Always by the seed 0: runs of other seeds, and the stages of a recipe, train on the same share.
        count = max(1, round(config.data_share * len(store)))
        self._chosen = subset_indices(len(store), count, seed=0).sort().values
        self._order = DataOrder(
            count, config.seed, labels=store.labels[self._chosen], class_balance=config.stage.class_balance
        )
        self._slots = world.micro_batches(self._batch_size, config.machine.micro_batch_size)
        self._slots_there = [slots.to(world.device) for slots in self._slots]
        on_gpu = world.device.type == "cuda"
        self._side = SideStream(world.device) if on_gpu else None
        self._there: tuple[Tensor, Tensor] | None = None
        self.images_on_device = keeps_on_device(
            config.machine.data_device,
            num_bytes=store.nbytes * count // len(store) if on_gpu else 0,
            free_bytes=backend.free_memory(world.device) if on_gpu else None,
            still_needed=still_needed,
        )
        if self.images_on_device:
            # On the side stream, which is the only one to read them.
            images, labels = self._side.queue(lambda: self._copy_all(world.device))()
            self._there = images, labels
        self._device = world.device
        self._thread = None
        if (on_gpu or not store.is_mapped) if ahead is None else ahead:
            self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._guess: tuple[int, concurrent.futures.Future[Callable[[], list[Batch]]]] | None = None
        self._earlier_done = _nothing

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of the step that follows `step` finished ones, on the device.

        Steps may be asked for in any order; one after the other is fastest.

        Raises:
            StoreError, OSError, ...: what reading the data set raised, also if that happened in the thread.
        """
        if self._thread is None:
            return self._prepare(step)()
        guess, self._guess = self._guess, None
        if guess is not None and guess[0] == step:
            future = guess[1]
        else:
            if guess is not None:
                guess[1].cancel()
            future = self._thread.submit(self._prepare, step)
        prepared = future.result()
        # What was launched before the call before this one: this step and the one before it may be under way.
        self._guess = step + 1, self._thread.submit(self._prepare, step + 1, self._earlier_done)
        self._earlier_done = _nothing if self._side is None else self._side.mark()
        return prepared()

    def close(self) -> None:
        """End the thread; waits for what it is reading now."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _prepare(self, step: int, earlier_done: Callable[[], None] = _nothing) -> Callable[[], list[Batch]]:
        """Wait for the device, then begin to make the batches of a step.

        Returns:
            What hands them over to the stream that computes.
        """
        earlier_done()
        order = self._order.indices(step * self._batch_size, self._batch_size)
        parts = [order[slots] for slots in self._slots]
        if self._side is None:
            pairs = [self._store.batch(self._chosen[part]) for part in parts]
            return lambda: self._with_slots(pairs)
        if self._there is None:
            handed_over = self._side.queue(lambda: self._copy(parts))
        else:
            handed_over = self._side.queue(lambda: self._gather_there(parts))

        def take() -> list[Batch]:
            tensors = handed_over()
            return self._with_slots(list(zip(tensors[0::2], tensors[1::2], strict=True)))

        return take

    def _with_slots(self, pairs: list[tuple[Tensor, Tensor]]) -> list[Batch]:
        return [Batch(*pair, slots) for pair, slots in zip(pairs, self._slots_there, strict=True)]

    def _copy(self, parts: list[Tensor]) -> list[Tensor]:
        """Images and labels in turn, read on the host."""
        return [self._send(tensor) for part in parts for tensor in self._store.batch(self._chosen[part])]

    def _gather_there(self, parts: list[Tensor]) -> list[Tensor]:
        """Images and labels in turn, of those that the device holds."""
        indices = [self._send(part) for part in parts]
        return [held.index_select(0, part) for part in indices for held in self._there]

    def _send(self, tensor: Tensor) -> Tensor:
        # Of pinned memory only does a copy neither wait for the device nor hold up what it computes.
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _copy_all(self, device: torch.device) -> list[Tensor]:
        """All chosen images and their labels, copied to the device in pieces."""
        images: Tensor | None = None
        per_image = max(1, self._store.nbytes // len(self._store))
        for start in range(0, len(self._chosen), max(1, _CHUNK_BYTES // per_image)):
            chunk, _ = self._store.batch(self._chosen[start : start + max(1, _CHUNK_BYTES // per_image)])
            if images is None:
                images = torch.empty((len(self._chosen), *chunk.shape[1:]), dtype=chunk.dtype, device=device)
            images[start : start + len(chunk)].copy_(chunk)
        return [images, self._store.labels[self._chosen].to(device)]


def keeps_on_device(
    wanted: Literal["auto", "cpu", "device"], *, num_bytes: int, free_bytes: int | None, still_needed: int = 0
) -> bool:
    """Whether the images are kept in the memory of the GPU.

        auto:  num_bytes <= DEVICE_SHARE * (free_bytes - still_needed)

    Args:
        wanted: as `MachineConfig.data_device`.
        num_bytes: of the images.
        free_bytes: of the GPU; None where the run is on the CPU.
        still_needed: of the free bytes, what training will take itself.

    Raises:
        ValueError: they are wanted there, but there is no GPU.
        RuntimeError: they are wanted there, but do not fit.
    """
    if wanted == "cpu" or (wanted == "auto" and free_bytes is None):
        return False
    if free_bytes is None:
        raise ValueError("data_device is 'device', but the run is on the CPU; want auto or cpu, or a GPU (--device)")
    left = free_bytes - still_needed
    if wanted == "auto":
        return num_bytes <= DEVICE_SHARE * left
    if num_bytes > left:
        raise RuntimeError(
            f"data_device is 'device', but the images take {num_bytes / 2**20:,.0f} MiB, and training leaves "
            f"{max(left, 0) / 2**20:,.0f} MiB of the GPU's memory; want --data-device auto or cpu"
        )
    return True
