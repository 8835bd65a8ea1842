"""The benchmarks run and print what they promise. No test looks at a time."""

import dataclasses
import gc
import importlib
import json

import pytest
import torch

from benchmarks import harness, ops, peers, readme, tasks

TINY = {
    "noise_visible_patches": {"num_images": 2, "height": 16, "width": 16, "num_visible": 5},
    "gather_tokens": {"num_images": 2, "num_tokens": 9, "num_visible": 4, "width": 8},
    "gelu": {"shape": (2, 9)},
    "linear": {"rows": (3,), "fan_in": 8, "fan_out": 8},
    "masked_attention": {"lengths": (5, 5), "num_heads": 2, "head_dim": 8},
    "masked_dsm_loss": {"lengths": (5, 5), "width": 12},
    "sid_loss": {"shape": (2, 5, 12)},
    "adamw_ema": {"shapes": ((3, 4), (5,))},
    "lamb_ema": {"shapes": ((3, 4), (5,))},
}


@pytest.fixture
def tiny_cases(monkeypatch):
    def benchmark_cases(op):
        case = importlib.import_module(f"maskdm_fast.ops.{op}.cases").BENCHMARKS[0]
        return (dataclasses.replace(case, name="tiny", **TINY[op]),)

    monkeypatch.setattr(peers, "benchmark_cases", benchmark_cases)


def test_report_has_the_promised_keys(tiny_cases):
    result = ops.report(list(peers.BUILDERS), repeats=1, compile_peers=False)
    assert json.loads(json.dumps(result)) == result
    assert {"machine", "versions", "commit", "command", "rows", "overhead_us"} == set(result)
    assert {"cpu", "cores", "threads", "isa"} <= set(result["machine"])
    assert {"torch", "python", "maskdm_fast"} == set(result["versions"])
    names = [*peers.BUILDERS]
    names.insert(names.index("gather_tokens") + 1, "scatter_tokens")
    assert [row["op"] for row in result["rows"]] == names
    for row in result["rows"]:
        assert {"op", "case", "dtype", "ms", "gb_per_s", "copy_gb_per_s"} <= set(row)
        assert list(row["ms"]) == ["ours", "eager", "compiled"]
        assert row["ms"]["ours"] > 0
        assert row["ms"]["eager"] > 0
        assert row["ms"]["compiled"] is None
    assert [row["op"] for row in result["overhead_us"]] == names
    text = ops.table(result)
    assert all(name in text for name in names)


def test_saved_and_printed_json_agree(tiny_cases, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(peers, "BUILDERS", {"masked_attention": peers.BUILDERS["masked_attention"]})
    # A real one takes ten seconds.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    before = torch.get_num_threads()
    try:
        ops.main(["--json", "--save", "--repeats", "1", "--threads", "1"])
    finally:
        torch.set_num_threads(before)
    printed = json.loads(capsys.readouterr().out)
    (saved,) = (tmp_path / "results").glob("ops-*.json")
    assert json.loads(saved.read_text()) == printed
    assert printed["machine"]["threads"] == 1


def test_a_peer_that_computes_something_else_is_found(tiny_cases):
    (task,) = peers.BUILDERS["masked_attention"](peers.benchmark_cases("masked_attention")[0])
    wrong = dataclasses.replace(task, peers={"wrong": lambda qkv: qkv[:, :, 0] * 2})
    with pytest.raises(AssertionError, match="masked_attention, tiny, result 0"):
        ops.measure(wrong, repeats=1, compile_peers=False)


def test_contestants_take_turns():
    order = []
    times = harness.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, shortest_ms=0)
    assert set(times) == {"a", "b"}
    assert "".join(order[-6:]) == "abbaab"


def test_no_garbage_is_collected_while_they_are_timed():
    collecting = []
    harness.interleave({"a": lambda: collecting.append(gc.isenabled())}, 1, shortest_ms=0)
    assert not any(collecting) and gc.isenabled()


def test_a_time_is_the_median(monkeypatch):
    """Three samples of a millisecond, of which one met a busy neighbour."""
    monkeypatch.setattr(harness, "_sample_on_cpu", lambda function, calls: function() or next(samples))
    samples = iter([1.0, 1.0, 1.0, 100.0, 2.0])  # the first two find how often to call
    assert harness.interleave({"a": lambda: None}, 3) == {"a": 2.0}


@pytest.mark.parametrize(
    ("module", "given"),
    [
        ("ops", ["--op", "gelu"]),
        ("step", ["--size", "small64"]),
        ("step", ["--no-compile"]),
        ("scaling", ["--engines", "plain"]),
        ("scaling", ["--size", "small64"]),
        ("scaling", ["--processes", "4"]),
        ("scaling", ["--batch", "64"]),
        ("scaling", ["--precision", "bf16"]),
        ("distill", ["--students"]),
        ("dxmi2d", ["--seeds", "1"]),
        ("dxmi2d", ["--iterations", "2"]),
    ],
)
def test_a_part_does_not_replace_a_saved_result(module, given, capsys):
    """It did, and what was not measured again was lost."""
    with pytest.raises(SystemExit):
        importlib.import_module(f"benchmarks.{module}").main(["--save", *given])
    assert f"--save is for the whole benchmark; leave {given[0]} out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "given", "message"),
    [
        ("scaling", ["--processes", "0"], "--batch and --processes must be at least 1"),
        ("scaling", ["--processes", "1", "-1"], "--batch and --processes must be at least 1"),
        ("scaling", ["--batch", "0"], "--batch and --processes must be at least 1"),
        ("largest", ["--micro-batch-size", "0"], "--micro-batch-size must be at least 1"),
        ("largest", ["--device-gb", "0"], "--device-gb and --host-gb must be more than 0"),
        ("largest", ["--host-gb", "nan"], "--device-gb and --host-gb must be more than 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(module, given, message, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(f"benchmarks.{module}").main(given)
    assert message in capsys.readouterr().err


def test_help_writes_no_page(monkeypatch, capsys):
    """It wrote them all."""
    monkeypatch.setattr(readme, "pages", lambda: pytest.fail("pages are made"))
    with pytest.raises(SystemExit):
        readme.main(["--help"])
    assert "benchmarks/results" in capsys.readouterr().out


def test_file_name_of_a_machine():
    machine = {"cpu": "AMD EPYC (TM) 9", "cores": 2, "isa": "x86-64-v4"}
    assert harness.machine_slug(machine) == "amd-epyc-tm-9-2c-x86-64-v4"


def test_a_compiled_peer_draws_as_pytorch_does():
    """Inductor's own generator made the compiled peer of a draw on the CPU eight times as slow as it can be."""

    def noised(x):
        return 2.0 * torch.randn_like(x) + x

    x = torch.zeros(64)
    torch.manual_seed(0)
    want = noised(x)
    torch.manual_seed(0)
    assert torch.equal(tasks.compile_static(noised)(x), want)
