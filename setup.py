"""Builds the native libraries with CMake and packs them as plain data: no Python ABI, one wheel per platform.

Environment:
    MASKDM_WITH_NATIVE=0    do not compile anything; =1: fail when it cannot be compiled; default: warn, go on
    MASKDM_WITH_CUDA=0      do not compile the CUDA kernels; =1: fail when they cannot be; default: if nvcc is there
    MASKDM_SANITIZE=1       build with AddressSanitizer and UndefinedBehaviorSanitizer
    CUDA_HOME               root of the CUDA toolkit, looked at first
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import setuptools

# pip reads build-system.requires in an isolated build only.
if int(setuptools.__version__.partition(".")[0]) < 77:
    raise SystemExit(
        f"maskdm_fast builds with setuptools >= 77, this is {setuptools.__version__}: "
        "pip install 'setuptools>=77' 'cmake>=3.22' ninja, then install again"
    )

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def _output_of(*command: str | Path) -> str:
    """What `command` prints, or nothing if it cannot run."""
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout


def _toolkit_root_of(nvcc: str) -> Path:
    """The root that `nvcc` itself reports: right for wrapper scripts too, which lie anywhere.

    Called through a link, nvcc looks for its files beside the link and reports nothing; then what the link leads to
    is asked.
    """
    for command in (nvcc, os.path.realpath(nvcc)):
        output = _output_of(command, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull)
        match = re.search(r"^#\$ TOP=(.+)$", output, re.MULTILINE)
        if match:
            return Path(match[1].strip()).resolve()
    return Path(nvcc)


def _is_toolkit(root: Path) -> bool:
    nvcc, header = root / "bin" / "nvcc", root / "include" / "cuda_runtime.h"
    return os.access(nvcc, os.X_OK) and header.exists() and (root / "lib64").is_dir()


def find_cuda_toolkit(environ: dict[str, str], standard: str = "/usr/local/cuda") -> dict[str, str]:
    """Find a CUDA toolkit: CUDA_HOME, then the standard install location, then nvcc on PATH.

    Returns:
        ``{"root", "found_by", "version"}``, or ``{"missing": reason}``. A root counts only when it holds bin/nvcc,
        include/cuda_runtime.h and lib64/.
    """
    candidates: list[tuple[str, Path]] = []
    if environ.get("CUDA_HOME"):
        candidates.append(("CUDA_HOME", Path(environ["CUDA_HOME"])))
    candidates.append(("standard location", Path(standard)))
    nvcc = shutil.which("nvcc", path=environ.get("PATH", ""))
    if nvcc is not None:
        candidates.append(("nvcc on PATH", _toolkit_root_of(nvcc)))
    for found_by, path in candidates:
        root = path.resolve()
        if _is_toolkit(root):
            match = re.search(r"release ([\d.]+)", _output_of(root / "bin" / "nvcc", "--version"))
            return {"root": str(root), "found_by": found_by, "version": match[1] if match else "unknown"}
    tried = ", ".join(f"{path} ({found_by})" for found_by, path in candidates)
    return {"missing": f"no CUDA toolkit with bin/nvcc, include/cuda_runtime.h and lib64/ at: {tried}"}


def _wanted(variable: str) -> str:
    """``"0"``, ``"1"``, or ``"auto"`` where the environment does not say."""
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "0", "1"):
        raise ValueError(f"{variable} is {value!r}, want 0 or 1")
    return value


def _find_tool(name: str) -> str | None:
    """A program that pip installed beside Python, else one on PATH, which may be older than the CUDA toolkit."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


class BuildNative(build_ext):
    """Runs CMake and puts the libraries, with a record of how they were built, into ``maskdm_fast/lib``."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        target = (ROOT if in_place else Path(self.build_lib)) / "maskdm_fast" / "lib"
        wanted, with_cuda = _wanted("MASKDM_WITH_NATIVE"), _wanted("MASKDM_WITH_CUDA")
        if wanted == "0" and with_cuda == "1":
            raise ValueError("MASKDM_WITH_NATIVE=0 declines all kernels, and MASKDM_WITH_CUDA=1 demands some of them")
        record: dict[str, object] = {"cuda_toolkit": find_cuda_toolkit(dict(os.environ))}
        if wanted == "0":
            record["skipped"] = "MASKDM_WITH_NATIVE=0"
        else:
            try:
                record |= self.compile_all(target, record["cuda_toolkit"])
            except (RuntimeError, OSError) as error:
                if "1" in (wanted, with_cuda):
                    raise
                record["failed"] = str(error)
                self.warn_loudly(
                    "maskdm_fast is installed WITHOUT its native kernels and will run on the slow reference backend.",
                    str(error),
                    "a C++20 compiler: GCC >= 11 or Clang >= 14",
                )
        if "cuda_failed" in record:
            self.warn_loudly(
                "maskdm_fast is installed WITHOUT its CUDA kernels; on a GPU it will run on Triton or the reference.",
                str(record["cuda_failed"]),
                "a CUDA toolkit >= 12.0 with a compiler that it supports; or decline: MASKDM_WITH_CUDA=0",
            )
        target.mkdir(parents=True, exist_ok=True)
        for name, built in (("cpu", "compiler" in record), ("cuda", "cuda_compiler" in record)):
            if not built:
                (target / f"libmaskdm_fast_{name}.so").unlink(missing_ok=True)
        (target / "build.json").write_text(json.dumps(record, indent=2) + "\n")
        print("maskdm_fast native build:", json.dumps(record))

    def compile_all(self, target: Path, toolkit: dict[str, str]) -> dict[str, str]:
        """The CPU library, and the CUDA one if it is wanted or can be had; returns how they were built."""
        wanted = _wanted("MASKDM_WITH_CUDA")
        if wanted == "1" and "missing" in toolkit:
            raise RuntimeError(f"MASKDM_WITH_CUDA=1, and {toolkit['missing']}")
        if wanted == "0" or "missing" in toolkit or os.environ.get("MASKDM_SANITIZE") == "1":
            return self.compile(target)
        nvcc = Path(toolkit["root"]) / "bin" / "nvcc"
        try:
            return self.compile(target, nvcc) | {"cuda_compiler": str(nvcc)}
        except (RuntimeError, OSError) as error:
            if wanted == "1":
                raise
            return self.compile(target) | {"cuda_failed": str(error)}

    def compile(self, target: Path, nvcc: Path | None = None) -> dict[str, str]:
        spec = importlib.util.find_spec("torch")
        if spec is None:
            raise RuntimeError(
                "torch is not installed in the build environment; install it, then build again "
                "with --no-build-isolation"
            )
        torch_root = Path(spec.origin).parent
        cmake = _find_tool("cmake")
        if cmake is None:
            raise RuntimeError("cmake was not found; pip install cmake")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "TORCH_INCLUDE_DIR": torch_root / "include",
            "TORCH_LIB_DIR": torch_root / "lib",
            "CMAKE_INSTALL_PREFIX": target.resolve(),
            "MASKDM_SANITIZE": "ON" if os.environ.get("MASKDM_SANITIZE") == "1" else "OFF",
        }
        if nvcc is not None:
            options["CMAKE_CUDA_COMPILER"] = nvcc
        ninja = _find_tool("ninja")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        settings = [f"-D{key}={value}" for key, value in options.items()]
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        # A folder of its own: the cache of an earlier build may name a compiler or a torch that is gone, and another
        # build of this checkout may be under way.
        with tempfile.TemporaryDirectory(prefix="native-", dir=self.build_temp) as build:
            self.call([cmake, "-S", str(ROOT), "-B", build, *generator, *settings])
            self.call([cmake, "--build", build, "--parallel", str(os.cpu_count())])
            self.call([cmake, "--install", build])
            cache = Path(build, "CMakeCache.txt").read_text()
        compiler = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.+)$", cache, re.MULTILINE)
        version = (torch_root / "version.py").read_text()
        return {
            "compiler": compiler[1] if compiler else "unknown",
            "built_with_torch": re.search(r"__version__ = '([^']+)'", version)[1],
        }

    def call(self, command: list[str]) -> None:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        sys.stdout.write(result.stdout)
        if result.returncode:
            tail = "\n".join(result.stdout.strip().splitlines()[-15:])
            raise RuntimeError(f"`{' '.join(command[:3])} ...` failed with exit code {result.returncode}:\n{tail}")

    def warn_loudly(self, what: str, reason: str, mend: str) -> None:
        line = "!" * 100
        sys.stderr.write(
            f"\n{line}\n"
            f"!! {what}\n"
            f"!! Why: {reason}\n"
            f"!! Mend it ({mend}), then install again.\n"
            f"!! `maskdm-fast info` shows the state.\n{line}\n\n"
        )

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / "maskdm_fast" / "lib").glob("*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        sources = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
        return ["CMakeLists.txt", *(str(path.relative_to(ROOT)) for path in sources)]


class PlatformWheel(bdist_wheel):
    """Tags the wheel py3-none-PLATFORM: the libraries are loaded by torch and know nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("maskdm_fast.lib", sources=[])],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
        distclass=BinaryDistribution,
    )
