"""Which implementation of an op runs, and the one place that asks what hardware and libraries there are.

A backend is a module with the forward and backward functions of an op. Every op has ``reference`` (plain PyTorch, any
device); compiled kernels come as ``cpu``. The automatic choice is the first usable one of `AUTOMATIC` for the device; a
backend that was named never falls back.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

BACKENDS = ("reference", "cpu")
AUTOMATIC: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "reference")}  # other devices: reference

LIBRARY_FOLDER = Path(__file__).resolve().parents[1] / "lib"
CPU_LIBRARY = LIBRARY_FOLDER / "libmaskdm_fast_cpu.so"

_named: str | None = None


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


def is_named(backend: str | None) -> bool:
    """Whether a backend was named, here or by `use_backend`."""
    return (backend or _named) is not None


def _why_not(backend: str, device_type: str) -> str | None:
    """None if `backend` can serve tensors of `device_type`, else the reason."""
    if backend == "cpu":
        if device_type != "cpu":
            return f"tensor is on {device_type}"
        return _CPU_LIBRARY_MISSING
    return None


# The automatic choice of every device: looking again at each call would cost as much as the checks of its arguments.
_CHOICE = {
    device_type: next((name for name in candidates if _why_not(name, device_type) is None), "reference")
    for device_type, candidates in AUTOMATIC.items()
}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op of the block on the backend `name`, in all threads of the process.

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


def choose(op: str, device: torch.device, backend: str | None) -> str:
    """The backend that `op` runs on: `backend` if named here or by `use_backend`, else the first usable one.

    Raises:
        ValueError: no such backend.
        RuntimeError: the named backend cannot run on `device`.
    """
    named = backend or _named
    if named is None:
        return _CHOICE.get(device.type, "reference")
    if named not in BACKENDS:
        raise ValueError(f"{op}: backend is {named!r}, want one of {', '.join(BACKENDS)}")
    reason = _why_not(named, device.type)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {named!r} cannot run: {reason}")
    return named


def status(implementations: dict[str, dict[str, ModuleType]]) -> dict[str, dict[str, str]]:
    """``status[op][backend]`` is ``"ok"`` or the reason why the backend cannot run on this machine."""
    return {
        op: {backend: _why_not(backend, "cpu") or "ok" for backend in BACKENDS if backend in table}
        for op, table in implementations.items()
    }


def native_info() -> dict[str, Any]:
    """How the native library was built (compiler, CUDA toolkit), and what runs here: ISA level, float32 products."""
    record = LIBRARY_FOLDER / "build.json"
    info: dict[str, Any] = {
        "library": str(CPU_LIBRARY) if has_native() else None,
        "missing": _CPU_LIBRARY_MISSING,
        "build": json.loads(record.read_text()) if record.exists() else None,
    }
    if has_native():
        level = torch.ops.maskdm_fast.cpu_isa_level()
        info["isa"] = f"x86-64-v{level}" if level else "base"
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


def package_versions() -> dict[str, str | None]:
    """Installed versions of the packages that the library builds on or works with; None where one is missing.

    PyPI's ``apex`` is not NVIDIA's: NVIDIA's is told by its module ``apex.optimizers``.
    """
    names = ("torch", "numpy", "triton", "deepspeed", "xformers")
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    versions["apex"] = None
    if importlib.util.find_spec("apex") is not None and importlib.util.find_spec("apex.optimizers") is not None:
        versions["apex"] = importlib.metadata.version("apex")
    return versions
