"""What every Triton kernel takes from a GPU, found without one: registers, local and shared memory, matrix instruction.

The ops are called as users call them, on CPU tensors, while launches are recorded instead of made; then each distinct
launch is compiled ahead of time as Triton itself would compile it. Runs in a process of its own (`measure_op` starts
it): the interpreter must be off before a kernel is defined.
"""

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import cuobjdump

CAPABILITIES = (80, 90, 100)
DTYPES = (torch.float32, torch.bfloat16)  # float16 differs from bfloat16 in the names of instructions only
_INSTRUCTIONS = {"tcgen05.mma": "tcgen05", "wgmma.mma_async": "wgmma", "mma.sync": "mma.sync"}  # in PTX


@dataclasses.dataclass(frozen=True)
class Launch:
    """One call of a kernel: positional arguments, and by name the rest with num_warps and its like."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextlib.contextmanager
def recorded(*, every_config: bool = True) -> Iterator[list[Launch]]:
    """Collect the launches of the block; none is made.

    Args:
        every_config: one launch for every configuration of an autotuned kernel, else for the first only.
    """
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(kernel, args, kwargs))

    def run_all(tuner: Any, *args: Any, **kwargs: Any) -> None:
        tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
        for config in tuner.prune_configs(kwargs)[: None if every_config else 1]:
            tuner.fn.run(*args, **kwargs, **config.all_kwargs())

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(Autotuner, "run", run_all):
        yield launches


class Specialized:
    """A launch as Triton would compile it for one target."""

    def __init__(self, launch: Launch, capability: int) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        self.kernel, self.target = launch.kernel, GPUTarget("cuda", capability, 32)
        backend = make_backend(self.target)
        kwargs = {**launch.kwargs, "debug": False, "instrumentation_mode": ""}
        binder = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, options = binder(*launch.args, **kwargs)
        packed = self.kernel._pack_args(backend, kwargs, bound, specialization, options)
        self.options, self.signature, self.constants, self.attributes = packed

    @property
    def name(self) -> str:
        """The kernel, its floating-point types and its constants; which integers 16 divides is left out."""
        pointers = {type.lstrip("*") for type in self.signature.values() if type.startswith("*")}
        types = "+".join(sorted(type for type in pointers if type.startswith(("fp", "bf"))))
        params = [param.name for param in self.kernel.params]
        constants = [f"{params[path[0]]}={getattr(value, 'value', value)}" for path, value in self.constants.items()]
        values = {name: getattr(self.options, name) for name in ("num_warps", "num_stages", "maxnreg")}
        options = [f"{name}={value}" for name, value in values.items() if value is not None]
        return " ".join(word for word in (self.kernel.__name__, types, *constants, *options) if word)

    def resources(self) -> dict[str, Any]:
        """``{registers, local, shared, instruction}`` of the compiled kernel."""
        import triton
        from triton.compiler import ASTSource

        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        compiled = triton.compile(source, target=self.target, options=self.options.__dict__)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            (usage,) = cuobjdump.usage(file.name)
        instruction = next((name for text, name in _INSTRUCTIONS.items() if text in compiled.asm["ptx"]), None)
        return usage.row() | {"shared": usage.shared + compiled.metadata.shared, "instruction": instruction}


# Few images are enough, but 16: Triton compiles another kernel where 16 does not divide an integer.
_NUM_IMAGES = 16
_LENGTHS, _HEAD_DIMS = (16, 27, 64, 104, 257), (16, 32, 64, 128)  # one of each row of the tables of tile sizes


def _measured(op: str) -> list[Any]:
    """The cases that the op is measured on, of moderate size; attention in every class of shapes."""
    cases = importlib.import_module(f"maskdm_fast.ops.{op}.cases").BENCHMARKS
    if op == "masked_attention":
        shapes = [(n, width, False) for n, width in itertools.product(_LENGTHS, _HEAD_DIMS)]
        shapes += [(27, width, True) for width in _HEAD_DIMS]
        return [
            dataclasses.replace(cases[0], lengths=(n,) * _NUM_IMAGES, head_dim=width, packed=packed)
            for n, width, packed in shapes
        ]
    smaller: dict[str, dict[str, Any]] = {
        "noise_visible_patches": {"num_images": _NUM_IMAGES},
        "gather_tokens": {"num_images": _NUM_IMAGES, "num_tokens": 256, "num_visible": 26},
        "sid_loss": {"shape": (_NUM_IMAGES, 64, 48)},
        "adamw_ema": {"shapes": ((64, 64), (64,))},
        "lamb_ema": {"shapes": ((64, 64), (64,))},
    }
    if op in smaller:
        return [dataclasses.replace(case, **smaller[op]) for case in cases]
    return [dataclasses.replace(case, lengths=case.lengths[:_NUM_IMAGES]) for case in cases]


# What else changes the code of a kernel: each is applied to the first case that the op is measured on, and compiled in
# 16 bits only, for compiling takes half a second.
_VARIATIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "noise_visible_patches": (
        {"packed": True},
        {"num_visible": None},
        {"pixels": "float"},
        {"prediction": "v", "flip": True},
    ),
    "gather_tokens": ({"packed": True},),
    "masked_dsm_loss": ({"packed": True}, {"kind": "l1"}, {"kind": "huber"}, {"reduction": "none"}),
    "sid_loss": (
        {"weighted": True},
        {"weighting": "none"},
        {"weighting": "l1_xt"},
        {"weighting": "l1_xt", "levels": False},
        {"reduction": "none"},
    ),
    "adamw_ema": (
        {"copy": "bfloat16"},
        {"clipped": False},
        {"in_memory": True, "found_inf": 0.0},
        {"first_moment": False},
        {"average": False},
        {"first_moment": False, "average": False},
    ),
    "lamb_ema": ({"copy": "bfloat16"}, {"clipped": False}, {"in_memory": True, "found_inf": 0.0}),
}


def launches(op: str, *, every_config: bool) -> list[Launch]:
    """What the op starts on its Triton backend for representative inputs, in float32 and in 16 bits.

    Args:
        op: its name.
        every_config: also with the configurations that only autotuning tries.
    """
    from maskdm_fast import ops, testing
    from maskdm_fast.ops import backend

    module = importlib.import_module(f"maskdm_fast.ops.{op}.cases")
    implementation = importlib.import_module(f"maskdm_fast.ops.{op}.triton_impl")
    for table in (ops.IMPLEMENTATIONS[op], importlib.import_module(f"maskdm_fast.ops.{op}.op").IMPL):
        table["triton"] = implementation
    cases = _measured(op)
    variations = [dataclasses.replace(cases[0], **variation) for variation in _VARIATIONS.get(op, ())]
    # Nothing runs, so tensors on the CPU do, as under the interpreter.
    with mock.patch.object(backend, "_TRITON_INTERPRETED", True), recorded(every_config=every_config) as found:
        for group, dtypes in ((cases, DTYPES), (variations, DTYPES[-1:])):
            for case, dtype in itertools.product(group, dtypes):
                testing.run(module, module.make_inputs(case, dtype, "cpu", seed=0), "triton")
    return found


def measure(found: list[Launch], capabilities: Sequence[int] = CAPABILITIES) -> dict[str, dict[str, Any]]:
    """``rows[kernel][capability]``, one row for every distinct launch, by `Specialized.name`."""
    rows: dict[str, dict[str, Any]] = {}
    for launch in found:
        for capability in capabilities:
            special = Specialized(launch, capability)
            row = rows.setdefault(special.name, {})
            if str(capability) not in row:
                row[str(capability)] = special.resources()
    return rows


def version() -> str:
    """The compiler: Triton, whose packages bring their own ptxas."""
    import triton

    return f"triton {triton.__version__}"


def measure_op(
    op: str, *, every_config: bool = False, capabilities: Sequence[int] = CAPABILITIES
) -> dict[str, dict[str, dict[str, Any]]]:
    """`measure` of the `launches` of `op`, in a process without the interpreter.

    Raises:
        RuntimeError: a kernel does not compile; the message is what the compiler printed.
    """
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ |= {"MASKDM_FAST_AUTOTUNE": "1", "OMP_NUM_THREADS": "1"}  # autotuning offers all configurations
    words = [*(["--every-config"] if every_config else []), op, *map(str, capabilities)]
    command = [sys.executable, "-m", "benchmarks.triton_resources", *words]
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=root)
    if result.returncode:
        # A compiler that fails prints the whole kernel, first its own words.
        raise RuntimeError(f"{op}: {result.stderr[-3000:]}\n{result.stdout[:3000]}")
    return json.loads(result.stdout)


def main(arguments: list[str] | None = None) -> None:
    """Print what `measure_op` returns, as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.triton_resources", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("op")
    parser.add_argument("capabilities", nargs="*", type=int, help=f"default: {CAPABILITIES}")
    parser.add_argument("--every-config", action="store_true", help="also what only autotuning tries")
    options = parser.parse_args(arguments)
    found = launches(options.op, every_config=options.every_config)
    print(json.dumps(measure(found, options.capabilities or CAPABILITIES)))


if __name__ == "__main__":
    main()
