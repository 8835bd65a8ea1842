"""Whether NVIDIA's apex is installed: the package that PyPI calls apex is another project."""

import importlib.util
from pathlib import Path

_EXTENSIONS = {"optimizers": "amp_C", "normalization": "fused_layer_norm_cuda"}
_BUILD = (
    "build it from source: APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation "
    "git+https://github.com/NVIDIA/apex"
)


def find() -> list[Path] | None:
    """Folders of the package that is called apex; None: there is none. Asked without importing it, for it may be any
    project's."""
    spec = importlib.util.find_spec("apex")
    return None if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]


def why_not(part: str) -> str | None:
    """None if NVIDIA's apex is installed with the kernels of `part` (optimizers, normalization), else the reason.

    NVIDIA's is told by its modules: the package that PyPI calls apex has none of them.
    """
    folders = find()
    if folders is None:
        return f"NVIDIA's apex is not installed, and PyPI's package apex is another project; {_BUILD}"
    if not any((folder / part).is_dir() for folder in folders):
        return (
            "the package apex that is installed is not NVIDIA's (PyPI's apex is another project); "
            f"pip uninstall apex, then for NVIDIA's {_BUILD}"
        )
    extension = _EXTENSIONS[part]
    if importlib.util.find_spec(extension) is None:
        return f"NVIDIA's apex is installed without its kernels (module {extension}); {_BUILD}"
    return None
