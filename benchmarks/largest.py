"""The largest network that each engine trains, by `maskdm_fast.train.memory`: an estimate, nothing is run.

    python -m benchmarks.largest [--device-gb 80] [--host-gb 2000] [--precision bf16] [--micro-batch-size 8]

The networks are U-ViTs of one shape: heads 64 wide, one block for every 40 values of width, as the original's H has
(1152 wide, 29 blocks), on latents of 32x32 in patches of 2. Blocks are computed twice (activation checkpointing).
"""

import argparse

from maskdm_fast.models import UViTConfig
from maskdm_fast.train.config import DenoisingConfig, MachineConfig, RunConfig
from maskdm_fast.train.engine_choice import FITTING_SHARE
from maskdm_fast.train.memory import ENGINES, Memory, memory_per_rank
from maskdm_fast.train.plan import num_parameters

PROCESSES = (1, 8, 64)
PER_MACHINE = 8
_STEP, _WIDEST = 64, 1024  # widths are tried in steps of 64, up to 64 * 1024


def run_of_width(dim: int, processes: int, micro_batch_size: int, precision: str) -> RunConfig:
    """A run with a network so wide, whose processes have one micro-batch each."""
    return RunConfig(
        model=UViTConfig(
            image_size=32, patch_size=2, channels=4, num_classes=1000, dim=dim, depth=dim // 40, num_heads=dim // 64
        ),
        precision=precision,
        stage=DenoisingConfig(batch_size=micro_batch_size * processes),
        machine=MachineConfig(activation_checkpointing=True),
    )


def largest(
    engine: str, processes: int, device_bytes: float, host_bytes: float, **options
) -> tuple[RunConfig, Memory] | None:
    """The widest network that fits, and what a process takes of it; None if the narrowest does not fit."""

    def fits(width: int) -> bool:
        config = run_of_width(width * _STEP, processes, **options)
        memory = memory_per_rank(config, engine, processes)
        on_host = memory.host_total * min(processes, PER_MACHINE)
        return memory.total <= FITTING_SHARE * device_bytes and on_host <= FITTING_SHARE * host_bytes

    low, high = 0, _WIDEST
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    if low == 0:
        return None
    config = run_of_width(low * _STEP, processes, **options)
    return config, memory_per_rank(config, engine, processes)


def main(arguments: list[str] | None = None) -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device-gb", type=float, default=80.0, help="memory of a GPU in decimal gigabytes")
    parser.add_argument("--host-gb", type=float, default=2000.0, help="memory of a machine with up to 8 GPUs")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="images of a GPU's micro-batch")
    options = parser.parse_args(arguments)
    if options.micro_batch_size < 1:
        parser.error("--micro-batch-size must be at least 1")
    if not (options.device_gb > 0 and options.host_gb > 0):
        parser.error("--device-gb and --host-gb must be more than 0")
    print("| engine |" + "".join(f" {count} GPU{'s' * (count > 1)} |" for count in PROCESSES))
    print("|---|" + "--:|" * len(PROCESSES))
    for engine in ENGINES:
        cells = []
        for processes in PROCESSES:
            if (engine, processes == 1) in (("plain", False), ("ddp", True)):
                cells.append("-")
                continue
            found = largest(
                engine,
                processes,
                options.device_gb * 1e9,
                options.host_gb * 1e9,
                micro_batch_size=options.micro_batch_size,
                precision=options.precision,
            )
            if found is None:
                cells.append("none")
                continue
            config, memory = found
            host = f"; {memory.host_total * min(processes, PER_MACHINE) / 1e9:,.0f} GB" if memory.host else ""
            cells.append(f"{num_parameters(config) / 1e9:,.1f} B ({config.model.dim}{host})")
        print(f"| `{engine}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
