"""Which implementation of an op runs, and the one place that asks what hardware and libraries there are.

A backend is a module with the forward and backward functions of an op. Every op has ``reference`` (plain PyTorch, any
device); compiled kernels come as ``cpu`` and ``cuda``, kernels that are compiled when they are first called as
``triton``; ``sdpa`` and ``xformers`` are other libraries' attention. The automatic choice is the first usable one of
`AUTOMATIC` for the device; a backend that was named never falls back.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from maskdm_fast.ops import control_groups, nvidia_apex

BACKENDS = ("reference", "cpu", "cuda", "triton", "sdpa", "xformers")
AUTOMATIC: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # else: reference

LIBRARY_FOLDER = Path(__file__).resolve().parents[1] / "lib"
CPU_LIBRARY = LIBRARY_FOLDER / "libmaskdm_fast_cpu.so"
CUDA_LIBRARY = LIBRARY_FOLDER / "libmaskdm_fast_cuda.so"
BUILD_RECORD = LIBRARY_FOLDER / "build.json"

_CUDA_DEVICE_MISSING = "there is no CUDA device"

_named: str | None = None

# The packages of the ops that have Triton kernels. Where these cannot run they are not loaded, and `IMPL` lacks them.
_WITH_TRITON = frozenset(
    f"{__package__}.{kernels.parent.name}" for kernels in Path(__file__).parent.glob("*/triton_impl.py")
)


def _load_cpu_library() -> str | None:
    """Load the compiled library; return None, or, with a warning, the reason why it is not there."""
    reason = None
    if not CPU_LIBRARY.exists():
        reason = (
            "the native library is not built; with torch and a C++20 compiler installed, run "
            "`pip install --no-build-isolation .` in a checkout of maskdm_fast"
        )
    else:
        try:
            torch.ops.load_library(CPU_LIBRARY)
        except (OSError, RuntimeError) as error:
            reason = f"{CPU_LIBRARY.name} does not load into torch {torch.__version__}: {error}"
    if reason is not None:
        # pip hides what a build prints when it succeeds, so this may be the first that the user hears of it.
        warnings.warn(f"maskdm_fast runs on its slow reference backend: {reason}", RuntimeWarning, stacklevel=2)
    return reason


_CPU_LIBRARY_MISSING = _load_cpu_library()


def has_native() -> bool:
    """Whether the schemas of ``torch.ops.maskdm_fast`` exist in this process."""
    return _CPU_LIBRARY_MISSING is None


def has_cuda() -> bool:
    """Whether there is a CUDA device that this build of torch can use; asked without starting CUDA."""
    return torch.cuda.device_count() > 0


def _build_record() -> dict[str, Any] | None:
    """What the build wrote down; None if there was none."""
    return json.loads(BUILD_RECORD.read_text()) if BUILD_RECORD.exists() else None


def _load_cuda_library() -> str | None:
    """Load the compiled CUDA kernels, which needs no GPU; return None, or the reason why they are not there."""
    if not has_native():
        return _CPU_LIBRARY_MISSING
    if not CUDA_LIBRARY.exists():
        if "cuda_failed" in (_build_record() or {}):
            return f"the CUDA kernels did not compile; 'cuda_failed' in {BUILD_RECORD} says why"
        return (
            "the CUDA kernels are not built; with nvcc installed, run `pip install --no-build-isolation .` in a "
            "checkout of maskdm_fast"
        )
    try:
        torch.ops.load_library(CUDA_LIBRARY)
    except (OSError, RuntimeError) as error:
        return f"{CUDA_LIBRARY.name} does not load into torch {torch.__version__}: {error}"
    return None


_CUDA_LIBRARY_MISSING = _load_cuda_library()
_TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("triton", "xformers")}


def has_triton() -> bool:
    """Whether Triton kernels can run: it is installed, and there is a CUDA device or its interpreter is switched on."""
    return _INSTALLED["triton"] and (_TRITON_INTERPRETED or has_cuda())


_OLDEST_GPU = (8, 0)
_CAPABILITIES: dict[torch.device, tuple[int, int]] = {}


def _too_old(device: torch.device) -> str | None:
    """Why the compiled CUDA kernels do not run on a GPU, if they do not; starts CUDA, for tensors that are there."""
    found = None if torch.compiler.is_compiling() else _CAPABILITIES.get(device)
    if found is None:
        found = torch.cuda.get_device_capability(device) if has_cuda() else _OLDEST_GPU  # of fake tensors
        if not torch.compiler.is_compiling():
            _CAPABILITIES[device] = found
    if found >= _OLDEST_GPU:
        return None
    return "its kernels are for compute capability {}.{} and up, this GPU has {}.{}".format(*_OLDEST_GPU, *found)


def has_flash_attention(device: torch.device) -> bool:
    """Whether PyTorch's flash attention runs on `device`: its kernels are for compute capability 8.0 and up."""
    if device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def autotuning() -> bool:
    """Whether Triton kernels time their configs when first called and remember the best on disk; else the first runs.

    Switched on by ``MASKDM_FAST_AUTOTUNE=1`` in the environment.
    """
    return os.environ.get("MASKDM_FAST_AUTOTUNE") == "1"


def current_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Within it the device of a CUDA tensor is the current one, where Triton launches its kernels."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def is_capturing(tensor: Tensor) -> bool:
    """Whether work on `tensor` is now recorded into a CUDA graph instead of run."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


PRODUCTS_VARIABLE = "MASKDM_FAST_PRODUCTS"


def _prefer_onednn() -> bool:
    """Whether float32 products go to oneDNN: by the environment variable, else by the processor.

    On processors with AVX-512 that are not Intel's, MKL, behind PyTorch's own products, runs AVX2 code, half as wide.
    """
    wanted = os.environ.get(PRODUCTS_VARIABLE) or "auto"
    if wanted not in ("auto", "onednn", "pytorch"):
        raise ValueError(f"{PRODUCTS_VARIABLE} is {wanted!r}, want auto, onednn or pytorch")
    if not has_native() or wanted == "pytorch":
        return False
    isa_level, is_intel = torch.ops.maskdm_fast.cpu_isa_level(), torch.ops.maskdm_fast.cpu_is_intel()
    return wanted == "onednn" or (isa_level == 4 and not is_intel)


_PREFER_ONEDNN = _prefer_onednn()


def has_onednn() -> bool:
    """Whether PyTorch carries oneDNN and offers its float32 products."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_is_faster(dtype: torch.dtype) -> bool:
    """Whether `linear` runs by itself on oneDNN; decided by no measurement, so that a resumed run repeats."""
    return dtype == torch.float32 and _PREFER_ONEDNN and has_onednn()


def _has(implementations: Mapping[str, ModuleType], backend: str) -> bool:
    """Whether the op has `backend`, loaded or not."""
    return backend in implementations or (
        backend == "triton" and implementations["reference"].__package__ in _WITH_TRITON
    )


def is_named(implementations: Mapping[str, ModuleType], backend: str | None) -> bool:
    """Whether a backend of the op was named, here or by `use_backend`."""
    return backend is not None or (_named is not None and _has(implementations, _named))


def why_not(backend: str, device_type: str, dtype: torch.dtype | None = None) -> str | None:
    """None if `backend` can serve tensors of this device and dtype, else the reason."""
    if backend == "cpu":
        return f"tensor is on {device_type}" if device_type != "cpu" else _CPU_LIBRARY_MISSING
    if backend in _INSTALLED and not _INSTALLED[backend]:
        return f"{backend} is not installed (pip install {backend})"
    if backend in ("cuda", "triton", "xformers"):
        on_device = device_type == "cuda" or (backend == "triton" and _TRITON_INTERPRETED and device_type == "cpu")
        if not on_device:
            return f"tensor is on {device_type}"
        if backend == "cuda" and _CUDA_LIBRARY_MISSING is not None:
            return _CUDA_LIBRARY_MISSING
        if dtype == torch.float64:
            return "it has no float64 kernels"
    return None


# The usable backends of every device: looking again at each call would cost as much as the checks of its arguments.
_USABLE = {
    device_type: tuple(name for name in candidates if why_not(name, device_type) is None)
    for device_type, candidates in AUTOMATIC.items()
}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op of the block that has the backend `name` on it, in all threads of the process.

    An op that has it but cannot run on it raises RuntimeError.

    Raises:
        ValueError: no such backend.
    """
    global _named
    if name not in BACKENDS:
        raise ValueError(f"use_backend: backend is {name!r}, want one of {', '.join(BACKENDS)}")
    before, _named = _named, name
    try:
        yield
    finally:
        _named = before


def choose(op: str, implementations: Mapping[str, ModuleType], tensor: Tensor, backend: str | None) -> str:
    """The backend that `op` runs on: `backend`, else the one of `use_backend`, else the first usable one.

    Args:
        op: name of the op, for messages.
        implementations: the backends of the op that are loaded.
        tensor: one of its arguments; its device and dtype count.
        backend: as given to the op.

    Raises:
        ValueError: no such backend, or the op has none of that name.
        RuntimeError: the named backend cannot run.
    """
    named = backend
    if named is None and _named is not None and _has(implementations, _named):
        named = _named
    if named is None:
        for name in _USABLE.get(tensor.device.type, ()):
            if name not in implementations or (name != "cpu" and tensor.dtype == torch.float64):
                continue
            if name != "cuda" or _too_old(tensor.device) is None:
                return name
        return "reference"
    if named not in BACKENDS:
        raise ValueError(f"{op}: backend is {named!r}, want one of {', '.join(BACKENDS)}")
    reason = why_not(named, tensor.device.type, tensor.dtype)
    if reason is None and named == "cuda":
        reason = _too_old(tensor.device)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {named!r} cannot run: {reason}")
    if named not in implementations:
        raise ValueError(f"{op}: it has no backend {named!r}, want one of {', '.join(implementations)}")
    return named


def status(implementations: Mapping[str, Mapping[str, ModuleType]]) -> dict[str, dict[str, str]]:
    """``status[op][backend]`` is ``"ok"`` or the reason why the backend cannot run on this machine."""

    def state(backend: str) -> str:
        if backend in ("reference", "cpu", "sdpa") or (backend == "triton" and _TRITON_INTERPRETED):
            return why_not(backend, "cpu") or "ok"
        reason = why_not(backend, "cuda") or (None if has_cuda() else _CUDA_DEVICE_MISSING)
        if reason is None and backend == "cuda":
            every = (_too_old(torch.device("cuda", index)) for index in range(torch.cuda.device_count()))
            reason = next(filter(None, every), None)
        return reason or "ok"

    return {op: {name: state(name) for name in BACKENDS if _has(table, name)} for op, table in implementations.items()}


def apex_status() -> dict[str, str]:
    """For each part of NVIDIA's apex that training can use, ``"ok"`` or the reason why it cannot."""
    parts = {"FusedAdam": "optimizers", "FusedLayerNorm": "normalization"}
    missing = None if has_cuda() else _CUDA_DEVICE_MISSING
    return {name: nvidia_apex.why_not(part) or missing or "ok" for name, part in parts.items()}


def native_info() -> dict[str, Any]:
    """How the native library was built (compiler, CUDA toolkit), and what runs here: ISA level, float32 products."""
    info: dict[str, Any] = {
        "library": str(CPU_LIBRARY) if has_native() else None,
        "missing": _CPU_LIBRARY_MISSING,
        "build": _build_record(),
    }
    if has_native():
        level = torch.ops.maskdm_fast.cpu_isa_level()
        info["isa"] = f"x86-64-v{level}" if level else "base"
    info["cuda_library"] = _CUDA_LIBRARY_MISSING or str(CUDA_LIBRARY)
    info["triton"] = (
        "not installed" if not _INSTALLED["triton"] else "interpreted" if _TRITON_INTERPRETED else "compiled"
    )
    info["products"] = "oneDNN" if onednn_is_faster(torch.float32) else "PyTorch's choice"
    return info


def devices() -> dict[str, Any]:
    """The processors that torch sees: CPU capability and threads, and each CUDA device by name."""
    found: dict[str, Any] = {
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        },
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    return found


def default_device() -> torch.device:
    """The device that training and sampling use when none is named: the first CUDA device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_memory(device: torch.device) -> int:
    """Bytes of a device's whole memory: of a GPU; of the machine for the CPU, or of its control group if that has
    less."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *control_groups.memory_limits()])


def free_memory(device: torch.device) -> int:
    """Bytes of a CUDA device's memory that no process holds."""
    return torch.cuda.mem_get_info(device)[0]


def set_device(device: torch.device) -> None:
    """Make a CUDA device the one that this process uses where none is named."""
    torch.cuda.set_device(device)


def allocated_memory(device: torch.device) -> int:
    """Bytes of tensors on a CUDA device; 0 for the CPU, whose memory nobody keeps account of."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done what was launched so far. The CPU never lags behind, and what is recorded into a
    CUDA graph does not run yet."""
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: on CUDA of tensors on `device`, on the CPU of all memory that this process held (its peak
    resident set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux hands getrusage's peak on to the programs that a process starts; this one is the program's own.
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def package_versions() -> dict[str, str | None]:
    """Installed versions of the packages that the library builds on or works with; None where one is missing.

    apex means NVIDIA's; that its kernels are there is another question, of `nvidia_apex.why_not`.
    """
    names = ["torch", "numpy", "triton", "deepspeed", "xformers"]
    versions: dict[str, str | None] = dict.fromkeys([*names, "apex"])
    if any((folder / "optimizers").is_dir() for folder in nvidia_apex.find() or ()):
        names.append("apex")
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
