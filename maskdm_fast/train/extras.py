"""Imports of packages that only come with an extra of this package."""

import importlib
from types import ModuleType


def require(module: str, extra: str = "train") -> ModuleType:
    """Import `module`, or raise RuntimeError that names the extra of maskdm_fast which installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A package that is there but lacks a dependency of its own must not be reported as missing itself.
        missing = error.name or module
        raise RuntimeError(
            f"the Python package '{missing}' is not installed; install it with: pip install 'maskdm_fast[{extra}]'"
        ) from error
