"""What `memory_per_rank` says against what engines hold, and the choice of an engine."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from maskdm_fast import cli
from maskdm_fast.models import CONFIGS
from maskdm_fast.ops import backend
from maskdm_fast.ops.control_groups import memory_limits
from maskdm_fast.train import PRESETS
from maskdm_fast.train.config import DenoisingConfig, MachineConfig, RunConfig
from maskdm_fast.train.engine_choice import check_engine, choose_engine, room_for_data
from maskdm_fast.train.estimate import describe
from maskdm_fast.train.memory import ENGINES, OVERHEAD, memory_per_rank, zero_sizes
from maskdm_fast.train.plan import num_parameters

CPU = torch.device("cpu")
HARNESS = Path(__file__).with_name("memory_harness.py")
HUGE = replace(
    PRESETS["celebahq-base-finetune"](),
    model=CONFIGS["uvit-huge-latent32"],
    stage=DenoisingConfig(batch_size=256),
)


def on(config: RunConfig, **machine: object) -> RunConfig:
    return replace(config, machine=replace(config.machine, **machine))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bytes_of_a_plain_step_are_those_that_are_allocated(checkpointing):
    """Within 5 % of the peak; the optimizer's state exactly."""
    config = RunConfig(
        model=replace(CONFIGS["emoji32"], depth=5, dim=96, num_heads=3),
        stage=DenoisingConfig(batch_size=24),
        machine=MachineConfig(micro_batch_size=12, activation_checkpointing=checkpointing),
    )
    command = [sys.executable, str(HARNESS), "plain", json.dumps(config.to_dict())]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    steady, passes, update = json.loads(result.stdout)
    said = memory_per_rank(config, "plain", 1, place="cpu")
    assert sum(said.steady.values()) - OVERHEAD["cpu"] == pytest.approx(steady, rel=0.01)
    assert said.total - OVERHEAD["cpu"] == pytest.approx(steady + passes, rel=0.05)
    assert update < 0.01 * steady


def test_bytes_of_several_processes_are_those_that_are_held():
    """Two processes, two micro-batches, networks of eight buckets: what stays to 0.1 %, the peak within 5 %, and what
    the passes take of it within 20 %."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed (pip install 'maskdm_fast[deepspeed]')")
    cases = ("ddp:bf16", "zero1:fp32", "zero2:bf16", "zero3:bf16", "zero3-offload:bf16")
    cases += ("ddp:fp32:sid", "zero3:fp32:sid")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, str(HARNESS), *cases],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    found = json.loads(lines[-1])
    assert tuple(found) == cases
    for case, sizes in found.items():
        assert sizes["said_steady"] == pytest.approx(sizes["steady"], rel=0.001), case
        assert sizes["said_passes"] == pytest.approx(sizes["passes"], rel=0.2), case
        real, said = (
            sizes[f"{who}steady"] + max(sizes[f"{who}passes"], sizes[f"{who}update"]) for who in ("", "said_")
        )
        assert said == pytest.approx(real, rel=0.05), case
        if case.startswith("zero"):  # the others go with the last reference
            assert sizes["left"] < 0.01 * sizes["steady"], case


def test_what_is_divided_and_what_is_not():
    values = num_parameters(HUGE)
    assert values == 500_832_016
    plain, ddp = (memory_per_rank(HUGE, name, count) for name, count in (("plain", 1), ("ddp", 8)))
    assert ddp.of("moments") == plain.of("moments") == 8 * values
    assert plain.of("16-bit weights") == 2 * values and plain.of("average") == plain.of("gradients") == 4 * values
    for name in ("zero1", "zero2", "zero3"):
        one, eight = (memory_per_rank(HUGE, name, count) for count in (1, 8))
        for what in ("master weights", "moments", "average"):
            assert eight.of(what) == pytest.approx(one.of(what) / 8, rel=1e-6)
        assert eight.of("weights") == pytest.approx(2 * values / (8 if name == "zero3" else 1), rel=1e-6)
        assert not eight.host
    offloaded = memory_per_rank(HUGE, "zero3-offload", 8)
    assert offloaded.host_total == pytest.approx((2 + 2 + 16 + 4) * values / 8, rel=1e-6)
    assert offloaded.of("moments") == 0 and offloaded.of("gathered weights") < 2 * values
    assert memory_per_rank(HUGE, "zero3-offload", 8, place="cpu").host_total == 0
    assert memory_per_rank(HUGE, "ddp", 8).of("activations") == pytest.approx(plain.of("activations") / 8)
    # Without 16 bits there are no copies of another precision, and ZeRO still holds the trained weights apart.
    exact = replace(HUGE, precision="fp32")
    assert memory_per_rank(exact, "plain", 1).of("16-bit weights") == 0
    assert memory_per_rank(exact, "zero1", 2).of("weights") == 4 * values


def test_engines_take_less_from_first_to_last():
    totals = [memory_per_rank(HUGE, name, 64).total for name in ENGINES[1:]]
    assert totals == sorted(totals, reverse=True)


def test_accumulated_gradients_are_counted():
    split = on(HUGE, micro_batch_size=16)
    values = num_parameters(HUGE)
    for config in (HUGE, split):  # ddp adds them up in its buckets
        assert memory_per_rank(config, "ddp", 8).of("gradients") == 4 * values
    assert memory_per_rank(HUGE, "zero1", 8).passes["gradients"] == pytest.approx(2 * values / 8, rel=1e-6)
    assert memory_per_rank(split, "zero1", 8).passes["gradients"] == pytest.approx(2 * values * 9 / 8, rel=1e-6)
    assert memory_per_rank(split, "zero2", 8).passes["gradients"] == pytest.approx(2 * values / 4, rel=1e-6)
    with pytest.raises(ValueError, match="cannot be divided evenly among 3"):
        memory_per_rank(HUGE, "ddp", 3)


@pytest.mark.parametrize("count", [1, 1001, 30_000_001, 400_000_001, 8_000_000_001])
def test_sizes_of_zero_are_even_and_bounded(count):
    sizes = zero_sizes(count)
    assert sizes.bucket % 2 == 0 and 0 < sizes.bucket <= min(count + 1, 500_000_000)


@pytest.mark.parametrize(
    ("processes", "device_memory", "engine"),
    [
        (1, 100e9, "plain"),
        (1, 86e9, "zero3-offload"),
        (1, None, "plain"),
        (8, 80e9, "ddp"),
        (8, None, "ddp"),
        (8, 24e9, "zero1"),
        (8, 13e9, "zero3-offload"),
    ],
)
def test_auto_takes_the_first_engine_that_fits(processes, device_memory, engine):
    found, why = choose_engine(HUGE, processes, device_memory, math.inf)
    assert found == engine
    if device_memory is None:
        assert "not known" in why
    else:
        memory = memory_per_rank(HUGE, engine, processes)
        assert (
            memory.total <= 0.9 * device_memory and f"{memory.total / 1e9:.1f} GB of {device_memory / 1e9:.1f}" in why
        )


def test_offloading_needs_memory_of_the_host_and_another_device():
    assert choose_engine(HUGE, 1, 86e9, 14e9)[0] == "zero3-offload"
    with pytest.raises(ValueError, match=r"zero3-offload takes [\d.]+ GB and 12.0 GB of the CPU's"):
        choose_engine(HUGE, 1, 86e9, 12e9)
    with pytest.raises(ValueError, match="no engine fits") as caught:
        choose_engine(HUGE, 1, 80e9, None)  # the device is the CPU
    assert "offload" not in str(caught.value)


def test_auto_passes_over_engines_that_cannot_run(monkeypatch):
    lamb = replace(HUGE, stage=replace(HUGE.stage, optimizer="lamb"))
    with pytest.raises(ValueError, match="needs the norms of whole tensors"):
        choose_engine(lamb, 8, 20e9, math.inf)
    compiled = on(HUGE, compile=True)
    assert choose_engine(compiled, 8, 24e9, math.inf)[0] == "zero1"
    monkeypatch.setattr(backend, "package_versions", lambda: {"deepspeed": None})
    with pytest.raises(ValueError, match=r"pip install 'maskdm_fast\[deepspeed\]'"):
        choose_engine(HUGE, 8, 20e9, math.inf)


def test_what_is_said_to_fit_fits():
    with pytest.raises(ValueError, match="no engine fits 8 processes") as caught:
        choose_engine(HUGE, 8, 12e9, math.inf)
    text = str(caught.value)
    for option, changed, processes in (
        ("--micro-batch-size 16 (zero1", on(HUGE, micro_batch_size=16), 8),
        ("--activation-checkpointing (zero1", on(HUGE, activation_checkpointing=True), 8),
        ("16 processes (zero1", HUGE, 16),
    ):
        assert option in text
        assert choose_engine(changed, processes, 12e9, math.inf)[0] == "zero1"
    with pytest.raises(ValueError, match="no engine"):
        choose_engine(on(HUGE, micro_batch_size=32), 8, 12e9, math.inf)
    with pytest.raises(ValueError, match="Make the model smaller"):
        choose_engine(HUGE, 8, 1e9, math.inf)


def test_float16_under_zero_needs_a_gpu():
    config = on(replace(HUGE, precision="fp16"), engine="zero2")
    assert choose_engine(config, 2, 80e9, math.inf)[0] == "zero2"
    with pytest.raises(ValueError, match="zero2 computes in float16 on GPUs only"):
        choose_engine(config, 2, 80e9, None)
    assert choose_engine(on(config, engine="auto"), 2, 1e12, None)[0] == "ddp"


@pytest.mark.parametrize(
    ("engine", "processes", "changes", "mend"),
    [
        ("plain", 2, {}, "use --engine ddp"),
        ("ddp", 1, {}, "torchrun"),
        ("zero2", 2, {"cuda_graph": True}, "leave out --cuda-graph"),
        ("zero3", 2, {"compile": True}, "use zero2"),
        ("zero3-offload", 2, {"compile": True}, "use zero2"),
        ("zero1", 2, {"layer_norm": "apex"}, "kernels of apex"),
        ("zero1", 2, {"optimizer_kernel": "apex"}, "kernels of apex"),
    ],
)
def test_named_engines_that_cannot_work_name_the_mend(engine, processes, changes, mend):
    config = on(HUGE, engine=engine, **changes)
    with pytest.raises(ValueError, match=mend):
        choose_engine(config, processes, None)
    if changes:
        mended = on(config, **{name: getattr(MachineConfig(), name) for name in changes})
        check_engine(mended, engine, processes, "cuda")


def test_named_engines_are_taken_whether_they_fit_or_not():
    assert choose_engine(on(HUGE, engine="zero2"), 2, 1e9, math.inf) == ("zero2", "named by --engine")


def test_room_for_data():
    memory = memory_per_rank(HUGE, "ddp", 8)
    assert room_for_data(memory, 80e9) == int(0.9 * 80e9 - memory.total)
    assert room_for_data(memory, 1e9) == 0
    assert memory.still_needed(1e9) == math.ceil(memory.total - 1e9) and memory.still_needed(1e12) == 0


def test_memory_of_the_machine(tmp_path):
    assert 1e8 < backend.device_memory(CPU) < 1e14
    groups = tmp_path / "cgroup"
    for controllers, name, lines in (
        ("", "memory.max", "0::/job/step\n"),
        ("memory", "memory.limit_in_bytes", "9:cpu:/x\n8:memory:/job/step\n"),
    ):
        top = tmp_path / "root" / controllers
        (top / "job" / "step").mkdir(parents=True, exist_ok=True)
        groups.write_text(lines)
        (top / "job" / "step" / name).write_text("max\n")
        (top / "job" / name).write_text("1000\n")
        (top / name).write_text("4000\n")
        assert memory_limits(groups, tmp_path / "root") == [1000, 4000]
    assert memory_limits(tmp_path / "absent") == []


def test_dry_run_tells_engine_and_memory():
    text = describe(replace(HUGE, stage=replace(HUGE.stage, num_images=256)), ("h100", "h200"), (1, 8))
    describe(replace(HUGE, model=replace(HUGE.model, depth=1)), ("h100",), (1,))  # some of its parts are called never
    for name in ENGINES:
        assert text.count(f"\n  {name} ") == (1 if name in ("plain", "ddp") else 2)
    plain, ddp = (memory_per_rank(HUGE, name, count) for name, count in (("plain", 1), ("ddp", 8)))
    assert f"{plain.total / 1e9:.2f}" in text and f"{ddp.total / 1e9:.2f}" in text
    assert "engine on H100 SXM  none. no engine fits one process with 80.0 GB" in text
    assert f"engine on H200 SXM  plain: {plain.total / 1e9:.1f} GB of 141.0 GB a process" in text


def test_bench_estimates_the_memory_of_one_process(capsys):
    assert cli.main(["bench", "--estimate", "--preset", "smoke-pretrain", "--hardware", "a100", "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert stage["memory_bytes"] == memory_per_rank(PRESETS["smoke-pretrain"](), "plain", 1).total


def test_dry_run_on_the_command_line(capsys):
    assert cli.main(["train", "smoke-pretrain", "--dry-run", "--num-processes", "2", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "one of 2 processes" in text and "engine on cpu, which is here  ddp: 60" in text
    assert "on the host" not in text
    assert cli.main(["train", "smoke-pretrain", "--dry-run", "--num-processes", "3", "--hardware", "h100"]) == 2
    assert "cannot be divided evenly among 3" in capsys.readouterr().err
    assert cli.main(["train", "smoke-pretrain", "--num-processes", "2"]) == 2
    assert "--num-processes goes with --dry-run" in capsys.readouterr().err
    assert cli.main(["train", "smoke-pretrain", "--dry-run", "--num-processes", "0"]) == 2
