"""A job that several functions can do: what it takes to compare and to time them."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maskdm_fast import ops
from maskdm_fast.ops.work import Work
from maskdm_fast.testing import draw

Outputs = tuple[Tensor, ...]
Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the inputs of a task lie, and the dtype of those that are in the tested one."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def item(self) -> int:
        """Bytes of a value."""
        return self.dtype.itemsize

    def inputs(self, op: str, case: Any) -> dict[str, Any]:
        """The inputs of a case of an op."""
        cases = importlib.import_module(f"maskdm_fast.ops.{op}.cases")
        return cases.make_inputs(case, self.dtype, self.device, seed=0)


HERE = Place()


@dataclasses.dataclass(frozen=True)
class Task:
    """One job on one set of inputs.

    Attributes:
        work: forward and backward, by the op's own `cost.py`: every input read once, every output written once.
        ours: the job by maskdm_fast.
        peers: the job in plain PyTorch, by name.
        run: does the whole job with one of these functions, as it is timed.
        check: the same with anything random fed in; what it returns agrees between all functions.
        compiled: makes the compiled form of a peer.
        to_compile: names of the peers that are worth compiling.
        fresh: makes ours anew, if it holds a state of its own.
    """

    op: str
    case: str
    work: Work
    ours: Function
    peers: dict[str, Function]
    run: Callable[[Function], Outputs]
    check: Callable[[Function], Outputs]
    compiled: Callable[[str], Function]
    to_compile: tuple[str, ...]
    fresh: Callable[[], Function] | None = None

    def ours_on(self, backend: str) -> Function:
        """The job by maskdm_fast on one backend."""
        function = self.ours if self.fresh is None else self.fresh()

        def call(*arguments: Any, **options: Any) -> Any:
            with ops.use_backend(backend):
                return function(*arguments, **options)

        return call

    def check_parity(self, function: Function) -> None:
        """Raise AssertionError unless `function` gives what ours gives."""
        wanted = self.check(self.ours)
        exact = all(want.dtype == torch.float32 for want in wanted)
        rtol, atol = (2e-4, 2e-5) if exact else (3e-2, 3e-2)
        for index, (have, want) in enumerate(zip(self.check(function), wanted, strict=True)):
            # Long sums in another order cancel to small values with the error of large ones.
            largest = want.abs().max().item() if want.numel() else 0.0
            torch.testing.assert_close(
                have,
                want,
                rtol=rtol,
                atol=atol * max(1.0, largest),
                msg=lambda text, i=index: f"{self.op}, {self.case}, result {i}: {text}",
            )


def compile_static(function: Function, device: str = "cpu") -> Function:
    """`function` under torch.compile, for one set of shapes, as fast as it can be on `device`."""
    # Inductor's own generator is part of a GPU's kernel. On the CPU it is many times as slow as PyTorch's.
    return torch.compile(function, fullgraph=True, dynamic=False, options={"fallback_random": device == "cpu"})


def with_gradients(
    op: str,
    case: str,
    work: Work,
    ours: Function,
    peers: dict[str, Function],
    leaves: Outputs,
    *,
    to_compile: tuple[str, ...] | None = None,
) -> Task:
    """A task whose functions take `leaves` and return one tensor; the gradient of every leaf is part of the job."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    with torch.no_grad():
        out = ours(*leaves)
    upstream = draw(tuple(out.shape), out.dtype, out.device, seed=99)

    def run(function: Function) -> Outputs:
        output = function(*leaves)
        return (output, *torch.autograd.grad(output, leaves, upstream))

    names = to_compile if to_compile is not None else tuple(peers)
    return Task(op, case, work, ours, peers, run, run, lambda name: compile_static(peers[name]), names)
