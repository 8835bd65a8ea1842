"""The GPU report without a GPU: its parts measure the CPU in small, and whatever goes wrong is reported, not fatal."""

import dataclasses
import importlib
import json
import sys
import time

import pytest
import torch

from benchmarks import gpu_parts, gpu_report, harness, peers, step
from benchmarks.step import Case
from maskdm_fast import ops
from maskdm_fast.models import UViTConfig

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


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    def benchmark_cases(op):
        case = importlib.import_module(f"maskdm_fast.ops.{op}.cases").BENCHMARKS[0]
        return (dataclasses.replace(case, name="tiny", **TINY[op]),)

    monkeypatch.setattr(peers, "benchmark_cases", benchmark_cases)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # a real one takes ten seconds
    config = UViTConfig(image_size=16, patch_size=4, dim=32, depth=3, num_heads=2)
    monkeypatch.setitem(step.CONFIGS, "tiny", config)
    monkeypatch.setattr(gpu_parts, "STEPS", (Case("tiny", 0.75, 4), Case("tiny", 0.0, 2)))
    monkeypatch.setattr(gpu_parts, "LENGTHS", (5, 9))
    monkeypatch.setattr(gpu_parts, "NUM_SWEEPS", 1)
    monkeypatch.setattr(gpu_parts, "REPEATS", 1)


def _rows(part):
    rows = list(gpu_parts.PARTS[part]("cpu"))
    assert json.loads(json.dumps(rows)) == rows
    return rows


def test_every_part_has_a_time_and_a_command():
    assert set(gpu_report.commands()) == set(gpu_report.SECONDS) == {"tests", *gpu_parts.PARTS}
    assert sum(gpu_report.SECONDS.values()) <= 570, "ten minutes, with what lies between the parts"
    assert all((harness.ROOT / folder).is_dir() for folder in gpu_report.TESTS)


def test_parity(monkeypatch):
    for op in ops.IMPLEMENTATIONS:
        cases = importlib.import_module(f"maskdm_fast.ops.{op}.cases")
        monkeypatch.setattr(cases, "CASES", cases.CASES[:1])
    rows = _rows("parity")
    assert {row["op"] for row in rows} == set(ops.IMPLEMENTATIONS)
    assert {"cpu", "reference"} <= {row["backend"] for row in rows}
    assert all(row["cases"] == 2 and row["failures"] == [] for row in rows)


def test_a_wrong_op_is_reported(monkeypatch):
    cases = importlib.import_module("maskdm_fast.ops.gelu.cases")
    monkeypatch.setattr(gpu_parts, "ops", type("Ops", (), {"IMPLEMENTATIONS": {"gelu": ops.IMPLEMENTATIONS["gelu"]}}))
    right = cases.call
    monkeypatch.setattr(cases, "call", lambda inputs, name: {"out": right(inputs, name)["out"] + (name == "cpu")})
    by_backend = {(row["backend"], row["dtype"]): row["failures"] for row in gpu_parts.parity("cpu")}
    assert all(bool(failures) == (name == "cpu") for (name, _), failures in by_backend.items())
    assert "AssertionError: out: error" in by_backend["cpu", "float32"][0]


def test_ops():
    rows = _rows("ops")
    found = {(row["op"], row["dtype"]) for row in rows}
    names = [*ops.IMPLEMENTATIONS, "scatter_tokens"]
    assert found >= {(op, "float32") for op in names}
    assert found >= {(op, "bfloat16") for op in names if op not in ("adamw_ema", "lamb_ema")}
    for row in rows:
        assert row["errors"] == {}, row["op"]
        assert {"cpu", "reference"} <= set(row["ms"])
        assert len(row["ms"]) > 2, "no peer took part"
        assert row["gb_per_s"].keys() == row["tflop_per_s"].keys() == row["ms"].keys()
        assert row["gb_per_s"]["cpu"] == pytest.approx(row["bytes"] / row["ms"]["cpu"] * 1e-6, abs=0.1)
    assert all(name in gpu_report.summary("ops", {"seconds": 1, "rows": rows}) for name in names)


def test_a_peer_that_fails_or_differs_is_reported_and_the_others_are_measured():
    (task,) = peers.masked_attention(peers.benchmark_cases("masked_attention")[0])

    def broken(qkv):
        raise RuntimeError("no such kernel")

    wrong = {"broken": broken, "wrong": lambda qkv: qkv[:, :, 0] * 2}
    task = dataclasses.replace(task, peers=task.peers | wrong, to_compile=())
    row = gpu_parts._op_row(task, "masked_attention", "cpu", torch.float32)
    assert row["errors"].keys() == wrong.keys()
    assert "no such kernel" in row["errors"]["broken"]
    assert {"cpu", "reference", "sdpa"} == row["ms"].keys()


def test_train_step():
    masked, whole = _rows("train_step")
    assert [masked["mask_ratio"], whole["mask_ratio"]] == [0.75, 0.0]
    for row in (masked, whole):
        assert row["errors"] == {}
        assert {"ours", "device step", "plain", "compiled", "official_way", "matmul"} == row["ms"].keys()
        assert row["images_per_s"]["ours"] == pytest.approx(row["batch"] / row["ms"]["ours"] * 1e3, rel=1e-2)
        assert row["mfu"] is None, "nobody stated the peak of a CPU"
    assert "images/s" in gpu_report.summary("train_step", {"seconds": 1, "rows": [masked]})


def test_crossover():
    *rows, conclusion = _rows("crossover")
    assert [row["tokens"] for row in rows] == [5, 9]
    assert all("sdpa" in row["ms"] for row in rows)
    assert conclusion["cuda"] is None


def test_the_conclusion_is_the_longest_that_won_throughout():
    times = [(27, 1, 2, 3), (64, 2, 1, 3), (128, 3, 2, 3), (256, 2, 5, 3), (512, 9, 9, 3)]
    rows = [
        {"tokens": tokens, "ms": {}, "graph_ms": {"cuda": cuda, "triton": triton, "sdpa flash": sdpa, "reference": 0.1}}
        for tokens, cuda, triton, sdpa in times
    ]
    assert gpu_parts._longest(rows) == {"cuda": 256, "triton": 128, "cuda or triton": 256}
    assert gpu_parts._longest([{"tokens": 27, "error": "it did not run"}]) == dict.fromkeys(
        ("cuda", "triton", "cuda or triton")
    )


def _python(code):
    return [sys.executable, "-c", code]


def test_a_part_that_fails_keeps_what_it_had():
    result = gpu_report.run_part(_python('print("{\\"op\\": 1}"); print("words"); raise ValueError("bad luck")'), 60)
    assert result["rows"] == [{"op": 1}]
    assert result["output"] == ["words"]
    assert result["error"].startswith("exit code 1: ")
    assert "bad luck" in result["error"]


def test_a_part_that_hangs_is_stopped_with_its_children(tmp_path):
    code = (
        "import pathlib, subprocess, sys, time\n"
        "print('{\"op\": 1}', flush=True)\n"
        "late = 'import time, pathlib; time.sleep(4); pathlib.Path(\"late\").touch()'\n"
        f"subprocess.Popen([sys.executable, '-c', late], cwd={str(tmp_path)!r})\n"
        "time.sleep(100)"
    )
    result = gpu_report.run_part(_python(code), 2.5)
    assert result["rows"] == [{"op": 1}]
    assert result["error"].startswith("stopped after")
    assert result["seconds"] < 20
    time.sleep(3)
    assert not (tmp_path / "late").exists()


def test_counts_of_pytest():
    assert gpu_report.counts(["FAILED a", "1 failed, 20 passed, 3 skipped in 5.0s"]) == {
        "failed": 1,
        "passed": 20,
        "skipped": 3,
    }
    assert gpu_report.counts(["killed"]) == {}


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu_report.backend, "has_cuda", lambda: False)
    assert gpu_report.main([]) == 2
    assert "needs a CUDA device, and PyTorch sees none here" in capsys.readouterr().err


def test_the_report_goes_on_after_a_failure_and_is_saved(monkeypatch, tmp_path, capsys):
    """With a device that is not there, and parts that are not the real ones."""
    rows = {"crossover": {"tokens": 27, "ms": {"cuda": 0.5}, "graph_ms": {}}, "ops": {"op": "gelu", "error": "E: no"}}
    lines = {part: f"print({json.dumps(json.dumps(row))})" for part, row in rows.items()}
    codes = {part: _python(lines.get(part, "")) for part in gpu_report.SECONDS} | {"parity": _python("exit(3)")}
    codes["tests"] = _python("print('7 passed in 1s')")
    monkeypatch.setattr(gpu_report, "commands", lambda: codes)
    monkeypatch.setattr(gpu_report.backend, "has_cuda", lambda: True)
    monkeypatch.setattr(gpu_report, "device", lambda: {"name": "NVIDIA Test (80GB)"})
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    assert gpu_report.main([]) == 1
    result = json.loads((tmp_path / "gpu-nvidia-test-80gb.json").read_text())
    assert {"machine", "versions", "commit", "command", "device", "parts"} <= result.keys()
    assert list(result["parts"]) == list(gpu_report.SECONDS)
    assert result["parts"]["parity"]["error"].startswith("exit code 3")
    assert result["parts"]["crossover"]["rows"] == [rows["crossover"]]
    said = capsys.readouterr().err
    assert "tests: " in said
    assert "{'passed': 7}" in said
    assert "gelu: E: no" in said
    assert "27: cuda 0.500 ms" in said
