"""Write the weights of a run to one file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from maskdm_fast.commands.out_files import check_file
from maskdm_fast.train import export as export_weights
from maskdm_fast.train.engine import DTYPES
from maskdm_fast.train.extras import require

tyro = require("tyro")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write the weights of a run to one safetensors file, whatever engine and number of processes trained them.

    The file needs neither the run folder nor DeepSpeed: sample and evaluate take it, and so does --init-from of train.

    example: maskdm-fast export runs/first first.safetensors --dtype bf16
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder (its newest checkpoint), a recipe folder (its last stage), or a checkpoint folder."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.safetensors")]
    """The file to make; one that is there is replaced once the new one is whole."""
    weights: Literal["ema", "raw"] = "ema"
    """The moving average, or the trained weights themselves."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the tensors in the file."""

    def check(self) -> None:
        """Raise ValueError for the first value that cannot work."""
        if Path(self.out).suffix != ".safetensors":
            raise ValueError(f"{self.out!r} is no name for the file: want one like {Path(self.out).stem}.safetensors")


def export(options: ExportOptions) -> None:
    """Write the file and say where the weights came from.

    Raises:
        As `maskdm_fast.train.export`.
    """
    options.check()
    check_file(Path(options.out))
    source = export_weights(options.run, options.out, options.weights, DTYPES[options.dtype])
    size = Path(options.out).stat().st_size
    print(
        f"wrote {options.out}: {size / 2**20:,.1f} MiB, {options.weights} weights of {source.path} in {options.dtype}"
    )
