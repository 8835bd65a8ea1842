"""What the commands sample, evaluate and info do."""

from maskdm_fast.commands.evaluation import EvaluateOptions, evaluate
from maskdm_fast.commands.machine_info import InfoOptions, collect_info, info
from maskdm_fast.commands.sampling import SampleOptions, sample

__all__ = ["EvaluateOptions", "InfoOptions", "SampleOptions", "collect_info", "evaluate", "info", "sample"]
