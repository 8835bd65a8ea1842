"""Which engine a run takes: the first of `ENGINES` that can run and whose memory fits."""

import dataclasses

from maskdm_fast.ops import backend
from maskdm_fast.train.config import MachineConfig, RunConfig
from maskdm_fast.train.distill_config import DistillationConfig
from maskdm_fast.train.memory import ENGINES, Memory, Place, gigabytes, memory_per_rank
from maskdm_fast.train.plan import plan_of

FITTING_SHARE = 0.9
"""Share of a memory that may be planned for; the rest is for what the estimate leaves out, and for fragmentation."""


def check_engine(config: RunConfig, engine: str, world_size: int, place: Place) -> None:
    """Raise for an engine that cannot do what the run asks for; the message says the mend.

    Args:
        config: of the run.
        engine: one of `ENGINES`.
        world_size: processes.
        place: kind of device.

    Raises:
        ValueError: the engine does not go with the processes, the device or the options.
        RuntimeError: it needs DeepSpeed, which is not installed.
    """
    machine = config.machine
    if engine == "plain" and world_size > 1:
        raise ValueError(f"engine plain is one process, but there are {world_size}; use --engine ddp")
    if engine == "ddp" and world_size == 1:
        raise ValueError("engine ddp is for several processes, but there is one; start it with torchrun, or use plain")
    if machine.cuda_graph:
        _check_cuda_graph(config, engine, place)
    if engine in ("plain", "ddp"):
        return
    if backend.package_versions()["deepspeed"] is None:
        raise RuntimeError(
            f"engine {engine} is DeepSpeed's, which is not installed; pip install 'maskdm_fast[deepspeed]', or use "
            "--engine ddp (one process: plain)"
        )
    if config.stage.optimizer == "lamb":
        raise ValueError(f"optimizer lamb needs the norms of whole tensors, which {engine} divides; use plain or ddp")
    if machine.optimizer_kernel == "apex" or machine.layer_norm == "apex":
        raise ValueError(f"the kernels of apex are for the engines plain and ddp, not for {engine}; leave them out")
    if machine.compile and engine.startswith("zero3"):
        raise ValueError(
            f"{engine} gathers and drops weights around every layer, which torch.compile cannot trace; leave out "
            "--compile, or use zero2"
        )
    if config.precision == "fp16" and place == "cpu":
        raise ValueError(f"engine {engine} computes in float16 on GPUs only; use --precision bf16, or --engine ddp")


def _check_cuda_graph(config: RunConfig, engine: str, place: Place) -> None:
    mend = "; leave out --cuda-graph"
    if isinstance(config.stage, DistillationConfig):
        raise ValueError(f"cuda_graph records denoising only, not distillation{mend}")
    if place == "cpu":
        raise ValueError(f"cuda_graph needs a GPU, but the run is on the CPU{mend}")
    if engine not in ("plain", "ddp"):
        raise ValueError(
            f"cuda_graph goes with the engines plain and ddp, but the engine is {engine}, which decides on the host "
            f"what to move between processes while it computes{mend}, or take --engine plain or ddp"
        )
    stage = config.stage
    if stage.mask.varies or stage.unmasked_share:
        raise ValueError(
            "cuda_graph needs the same number of visible patches in every image, but the mask has a range of ratios or "
            f"some images stay whole (unmasked_share {stage.unmasked_share}){mend}, or give the mask a single ratio"
        )


def choose_engine(
    config: RunConfig, world_size: int, device_memory: float | None, host_memory: float | None = None
) -> tuple[str, str]:
    """The engine that a run takes: the one it names, else the first of `ENGINES` that fits.

        fits:  memory_per_rank <= 0.9 device_memory,  and on the host likewise

    Args:
        config: of the run.
        world_size: processes.
        device_memory: bytes of the device for each process; None: not known, then everything fits.
        host_memory: bytes of the CPU's memory for each process that trains on a GPU, inf where it is not known; None:
            training is on the CPU itself, and offloading moves nothing.

    Returns:
        Its name, and in words why.

    Raises:
        ValueError: the named engine cannot work, or none fits.
        RuntimeError: as `check_engine`.
    """
    named, place = config.machine.engine, _place(host_memory)
    if named != "auto":
        check_engine(config, named, world_size, place)
        return named, "named by --engine"
    found = {name: _judge(config, name, world_size, place) for name in _candidates(world_size, place)}
    if device_memory is None:
        name = next(iter(found))
        return name, "the memory of the device is not known"
    passed = []
    for name, memory in found.items():
        if isinstance(memory, str):
            passed.append(memory)
        elif _fits(memory, device_memory, host_memory):
            why = f"{gigabytes(memory.total)} of {gigabytes(device_memory)} a process"
            return name, why + (f" ({'; '.join(passed)})" if passed else "")
        else:
            passed.append(f"{name} takes {gigabytes(memory.total)}" + _on_host(memory))
    raise ValueError(
        f"no engine fits {'one process' if world_size == 1 else f'{world_size} processes'} with "
        f"{gigabytes(device_memory)} each, of which {FITTING_SHARE:.0%} may be planned for: {'; '.join(passed)}. "
        + _mend(config, world_size, device_memory, host_memory)
    )


def room_for_data(memory: Memory, device_memory: float) -> int:
    """Bytes of the device that may hold a data set: what a process may plan for and training does not take."""
    return max(0, int(FITTING_SHARE * device_memory - memory.total))


def _place(host_memory: float | None) -> Place:
    return "cpu" if host_memory is None else "cuda"


def _candidates(world_size: int, place: Place) -> list[str]:
    # Zero 1 to 3 divide nothing in one process.
    names = ["plain", "zero3-offload"] if world_size == 1 else list(ENGINES[1:])
    return [name for name in names if place == "cuda" or name != "zero3-offload"]


def _judge(config: RunConfig, engine: str, world_size: int, place: Place) -> Memory | str:
    """What an engine takes; or, in words, why it cannot run."""
    try:
        check_engine(config, engine, world_size, place)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return memory_per_rank(config, engine, world_size, place=place)


def _fits(memory: Memory, device_memory: float, host_memory: float | None) -> bool:
    on_host = host_memory is None or memory.host_total <= FITTING_SHARE * host_memory
    return on_host and memory.total <= FITTING_SHARE * device_memory


def _on_host(memory: Memory) -> str:
    return f" and {gigabytes(memory.host_total)} of the CPU's" if memory.host else ""


def _mend(config: RunConfig, world_size: int, device_memory: float, host_memory: float | None) -> str:
    """What would fit, as options; the first of each kind."""
    place = _place(host_memory)

    def engine_for(machine: MachineConfig, processes: int) -> str | None:
        changed = dataclasses.replace(config, machine=machine)
        for name in _candidates(processes, place):
            memory = _judge(changed, name, processes, place)
            if isinstance(memory, Memory) and _fits(memory, device_memory, host_memory):
                return f"{name}, {gigabytes(memory.total)}"
        return None

    def smaller(machine: MachineConfig) -> tuple[int, str] | None:
        size = min(machine.micro_batch_size or config.stage.batch_size, config.stage.batch_size // world_size) // 2
        while size:
            engine = engine_for(dataclasses.replace(machine, micro_batch_size=size), world_size)
            if engine is not None:
                return size, engine
            size //= 2
        return None

    machine, mends = config.machine, []
    light = dataclasses.replace(machine, activation_checkpointing=True)
    if found := smaller(machine):
        mends.append("--micro-batch-size {} ({})".format(*found))
    if not machine.activation_checkpointing:
        if engine := engine_for(light, world_size):
            mends.append(f"--activation-checkpointing ({engine})")
        elif not mends and (found := smaller(light)):
            mends.append("--activation-checkpointing with --micro-batch-size {} ({})".format(*found))
    idles = place == "cuda" and len(plan_of(config).trained) > 1 and not machine.offload_idle
    if idles and (engine := engine_for(dataclasses.replace(machine, offload_idle=True), world_size)):
        mends.append(f"--offload-idle ({engine})")
    processes = 2 * world_size
    while config.stage.batch_size % processes == 0:
        if engine := engine_for(machine, processes):
            mends.append(f"{processes} processes ({engine})")
            break
        processes *= 2
    return f"What would fit: {'; '.join(mends)}." if mends else "Make the model smaller (--dim, --depth)."
