"""What the commands pack, sample, evaluate, export, bench and info do."""

from maskdm_fast.commands.benchmarking import BenchOptions, bench
from maskdm_fast.commands.evaluation import EvaluateOptions, evaluate
from maskdm_fast.commands.exporting import ExportOptions, export
from maskdm_fast.commands.machine_info import InfoOptions, collect_info, info
from maskdm_fast.commands.packing import PackOptions, pack
from maskdm_fast.commands.sampling import SampleOptions, sample

__all__ = [
    "BenchOptions",
    "EvaluateOptions",
    "ExportOptions",
    "InfoOptions",
    "PackOptions",
    "SampleOptions",
    "bench",
    "collect_info",
    "evaluate",
    "export",
    "info",
    "pack",
    "sample",
]
