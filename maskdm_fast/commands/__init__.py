"""What the commands pack, sample, evaluate, export, bench and info do.

Each module is imported when one of its names is asked for: all but that of info need packages of the extra train.
"""

import importlib
from typing import Any

_HOMES = {
    "BenchOptions": "benchmarking",
    "EvaluateOptions": "evaluation",
    "ExportOptions": "exporting",
    "PackOptions": "packing",
    "SampleOptions": "sampling",
    "bench": "benchmarking",
    "collect_info": "machine_info",
    "evaluate": "evaluation",
    "export": "exporting",
    "info": "machine_info",
    "pack": "packing",
    "sample": "sampling",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
