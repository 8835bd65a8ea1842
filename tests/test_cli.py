import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from maskdm_fast import cli, commands
from maskdm_fast.eval.features import FeatureNetwork
from maskdm_fast.ops import backend, nvidia_apex
from maskdm_fast.train import PRESETS


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    """Run in an empty folder, with its own cache, on one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:02d}.png")
    return str(folder)


class MeanFeatures(FeatureNetwork):
    """Stands in for the network of the scores, which is slow."""

    name, kernel_name, num_features, fingerprint = "FD-mean", "KID-mean", 12, "mean"

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


@pytest.fixture
def cheap_features(monkeypatch):
    monkeypatch.setattr("maskdm_fast.commands.evaluation.load_features", lambda name: MeanFeatures())
    monkeypatch.setattr("maskdm_fast.demo.load_features", lambda name="lite0": MeanFeatures(), raising=False)


def run(*arguments) -> int:
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as end:  # tyro's own errors and --help
        return end.code


SMALL = ("--num-images", 32, "--batch-size", 8, "--log-images", 16)


def test_help_teaches(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    for word in ("demo", "train", "sample", "evaluate", "bench", "info", "examples:"):
        assert word in text
    assert run() == 2


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("maskdm-fast 0.")


def test_help_needs_no_torch():
    code = "import sys; from maskdm_fast import cli; cli.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_dry_run_explains_and_leaves_nothing(capsys, tmp_path):
    assert run("train", "smoke", "--dry-run", "--device", "cpu", "--pretrain.mask", "patch:0.75", "--out", "run") == 0
    text = capsys.readouterr().out
    for word in ("1-pretrain", "2-finetune", "patch:0.75", "parameters", "4 of 16 patches", "masking gain", "images/s"):
        assert word in text
    assert list(tmp_path.iterdir()) == []
    assert run("train", "smoke", "--dry-run", "--pretrain.batch-size", "0") == 2


def test_dry_run_on_other_machines(capsys):
    assert run("train", "smoke-pretrain", "--dry-run", "--hardware", "h100", "b200") == 0
    text = capsys.readouterr().out
    for word in ("H100 SXM (67 TFLOP/s, 3.35 TB/s)", "B200 SXM", "bound by launches", "% MFU", "FLOPs a byte"):
        assert word in text
    assert "measured now" not in text


def test_bench_estimates_every_part_on_every_machine(capsys):
    assert run("bench", "--estimate", "--preset", "smoke", "--precision", "tf32") == 0
    text = capsys.readouterr().out
    for word in (
        "smoke 1-pretrain: 8 of 16",
        "smoke 2-finetune: 16 of 16",
        "qkv",
        "optimizer, EMA",
        "MFU",
        "data sheet",
    ):
        assert word in text
    for name in ("a100", "h100", "h200", "b200", "here"):
        assert text.count(f" {name}") == 3  # a column of each stage, and a line below
    assert "494 TFLOP/s tf32" in text


def test_bench_estimates_as_json(capsys):
    options = ("--preset", "small64", "--mask-ratio", "0.9", "--batch-size", "64", "--hardware", "h100", "--json")
    assert run("bench", "--estimate", *options) == 0
    found = json.loads(capsys.readouterr().out)
    [stage] = found["stages"]
    assert (stage["visible"], stage["patches"], stage["batch_size"], stage["precision"]) == (26, 256, 64, "bf16")
    assert sum(part["flops"] for part in stage["parts"]) == pytest.approx(stage["flops"])
    assert sum(part["launches"] for part in stage["parts"]) == pytest.approx(stage["launches"])
    machine = stage["hardware"]["h100"]
    assert machine["images_per_s"] == pytest.approx(64 / machine["step_seconds"])
    assert machine["mfu"] == pytest.approx(stage["model_flops"] / machine["step_seconds"] / 989e12)
    assert machine["bound"] in ("compute", "memory", "launches")


@pytest.mark.parametrize("other", ["--estimate", "--json"])
def test_the_gpu_report_stands_alone(other, capsys):
    assert run("bench", "--gpu-report", other) == 2
    assert "--gpu-report stands alone" in capsys.readouterr().err


def test_bench_runs_the_benchmarks_of_a_checkout(monkeypatch, capsys, tmp_path):
    commands_run = []

    def record(command, cwd):
        commands_run.append(command[2:])
        return subprocess.CompletedProcess(command, int("benchmarks.sampling" in command and failing))

    failing = False
    monkeypatch.setattr("maskdm_fast.commands.benchmarking.subprocess.run", record)
    assert run("bench", "--json") == 0
    assert commands_run == [
        *([f"benchmarks.{name}", "--save", "--json"] for name in ("ops", "step", "sampling", "scaling", "predict")),
        ["benchmarks.readme"],
    ]
    commands_run.clear()
    assert run("bench", "--gpu-report") == 0
    assert commands_run == [["benchmarks.gpu_report"]]
    failing = True
    assert run("bench") == 2
    assert "python -m benchmarks.sampling failed with exit code 1" in capsys.readouterr().err
    monkeypatch.setattr("maskdm_fast.commands.benchmarking._ROOT", tmp_path)
    assert run("bench") == 2
    assert "is no checkout of maskdm_fast" in capsys.readouterr().err


def test_train_help_lists_the_presets(capsys):
    assert run("train", "--help") == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    for name, preset in PRESETS.items():
        assert [name, *preset.__doc__.split()] in rows


@pytest.mark.parametrize("command", ["demo", "sample", "evaluate", "bench", "info"])
def test_help_of_every_command(command, capsys):
    assert run(command, "--help") == 0
    assert f"usage: maskdm-fast {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        (
            "emoji32-scratch",
            ["--num-images", "--mask none|patch:RATIO", "--lr", "--dim", "default: 192", "--init-from"],
        ),
        ("emoji32", ["--pretrain.num-images", "--finetune.mask", "default: block:0.75:4", "--dim"]),
    ],
)
def test_help_of_a_preset_shows_options_and_defaults(preset, words, capsys):
    assert run("train", preset, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian'; the nearest is 'train'"),
        (["train", "emoij32"], "unknown preset 'emoij32'; the nearest is 'emoji32'"),
        (
            ["train", "smoke-pretrain", "--num-imags", "3"],
            "unknown option '--num-imags'; the nearest is '--num-images'",
        ),
        (["train", "smoke", "--lr", "3"], "unknown option '--lr'; the nearest is '--pretrain.lr'"),
        (["train", "smoke", "--preview", "3"], "unknown option '--preview'; the nearest is '--preview-images'"),
        (["sample", "here", "--step", "3"], "unknown option '--step'; the nearest is '--steps'"),
        (["sample", "here", "there"], "sample: 'there' is one argument too many (see maskdm-fast sample --help)"),
        (["sample", "here", "--runs", "there"], "unknown option '--runs'; the nearest is '--out'"),
        (["train", "smoke", "there"], "'there' is one argument too many"),
        (["train", "smoke", "--hardware", "h100"], "--hardware goes with --dry-run"),
        (["bench", "--preset", "smoke"], "--preset goes with --estimate"),
        (["bench", "--estimate", "--preset", "smok"], "--preset is 'smok', want one of emoji32"),
        (["bench", "--estimate", "--preset", "smoke", "--hardware", "h10"], "want one of a100, h100, h200, b200, here"),
        (["bench", "--estimate", "--preset", "smoke", "--mask-ratio", "2"], "PatchMask: ratio is 2.0"),
        (["bench", "--estimate", "--preset", "smoke", "--batch-size", "0"], "batch_size is 0, want more than 0"),
        (["info", "--jsn"], "unknown option '--jsn'; the nearest is '--json'"),
        (["train", "smoke-pretrain", "--batch-size", "0"], "batch_size is 0, want more than 0"),
        (["train", "smoke-pretrain", "--mask", "block:0.5:3"], "block_size 3 does not divide the grid"),
        (["train", "smoke-pretrain", "--mask", "crop:2", "--mask-schedule", "linear:0@9"], "is CropMask(size=2)"),
        (["train", "smoke-pretrain", "--data", "nowhere"], "nowhere"),
        (["train", "smoke-pretrain", "--device", "cuda:99"], "device 'cuda:99' is not there"),
        (["train", "emoji32-finetune"], "nothing to start from: no such run or checkpoint folder: emoji32-pretrain"),
        (["sample", "nowhere"], "no such run or checkpoint folder: nowhere"),
        (["sample", "."], "holds no checkpoint"),
        (["sample", ".", "--num-images", "0"], "--num-images is 0, want at least 1"),
        (["evaluate", "nowhere", "--data", "emoji"], "there is no run, folder or file 'nowhere'"),
        (["demo", "--minutes", "0"], "--minutes is 0.0, want more than 0"),
    ],
)
def test_errors_are_one_line_and_exit_2(arguments, message, capsys, images):
    if arguments[:2] == ["train", "emoji32-finetune"]:
        arguments = [*arguments, "--data", images]
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("maskdm-fast: error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "smoke-pretrain", "--lr", "fast"], ["--lr", "fast"]),
        (["train", "smoke-pretrain", "--mask", "patch:2"], ["--mask", "ratio is 2.0"]),
        (["train", "smoke-pretrain", "--mask-schedule", "ramp:0@9"], ["--mask-schedule", "kind is 'ramp'"]),
        (["train", "smoke-pretrain", "--dim", "33"], ["dim 33 is not a multiple of"]),
        (["train", "smoke-pretrain", "--precision", "fp8"], ["--precision", "fp32"]),
        (["sample"], ["RUN"]),
    ],
)
def test_values_are_checked_before_work_starts(arguments, words, capsys, tmp_path):
    assert run(*arguments) == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    for word in words:
        assert word in error
    assert not (tmp_path / "runs").exists()


def test_missing_package_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert run("train", "smoke") == 2
    assert "'tyro' is not installed; install it with: pip install 'maskdm_fast[train]'" in capsys.readouterr().err


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    with pytest.raises(FileNotFoundError):
        run("sample", "nowhere")


def test_divergence_exits_1(images, capsys):
    arguments = ("--data", images, "--lr", "1e18", "--warmup-images", 0, "--max-grad-norm", "None", "--num-images", 800)
    assert run("train", "smoke-pretrain", *arguments) == 1
    assert "became NaN or infinite at step" in capsys.readouterr().err


def test_train_resume_sample_evaluate(images, tmp_path, capsys, cheap_features):
    train = ("train", "smoke", "--data", images, "--pretrain.num-images", 32, "--finetune.num-images", 32)
    assert run(*train, "--preview-images", 0) == 0
    assert "runs/smoke/2-finetune: 32 images" in capsys.readouterr().out
    assert run(*train, "--preview-images", 0) == 0
    assert run(*train, "--pretrain.lr", 0.5) == 2
    assert "stage.lr: 0.001 -> 0.5" in capsys.readouterr().err

    assert run("sample", "runs/smoke", "--num-images", 5, "--steps", 2, "--out", "a.png") == 0
    assert run("sample", "runs/smoke", "--num-images", 5, "--steps", 2, "--out", "b.png", "--batch-size", 2) == 0
    assert "5 images from runs/smoke/2-finetune/checkpoints/step-00000002 (ema weights" in capsys.readouterr().out
    assert Image.open("a.png").size == (3 * 18 + 2, 2 * 18 + 2)
    assert np.abs(np.asarray(Image.open("a.png"), int) - np.asarray(Image.open("b.png"), int)).max() <= 1
    assert run("sample", "runs/smoke", "--num-images", 4, "--steps", 2, "--out", "drawn", "--weights", "raw") == 0
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 4 and not (tmp_path / "runs/smoke/samples").exists()

    capsys.readouterr()
    assert run("evaluate", "runs/smoke", "--num-images", 6, "--steps", 2) == 0
    text = capsys.readouterr().out
    assert "FD-mean" in text and "floor" in text and "n = 6 generated against 12 real" in text
    record = json.loads((tmp_path / "runs/smoke/evaluation.json").read_text())
    assert record["sets"][0]["scores"]["num_generated"] == 6 and record["versions"]["torch"]
    assert run("evaluate", "drawn", "--data", images, "--image-size", 16, "--out", "scores.json") == 0
    assert json.loads((tmp_path / "scores.json").read_text())["sets"][0]["scores"]["num_generated"] == 4
    capsys.readouterr()
    assert run("evaluate", "drawn") == 2
    assert "--data must say which real images" in capsys.readouterr().err


def test_global_generators_do_not_reach_samples(images, cheap_features):
    run("train", "smoke-pretrain", "--data", images, *SMALL, "--preview-images", 0)
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        state = torch.get_rng_state()
        run("sample", "runs/smoke-pretrain", "--num-images", 2, "--steps", 3, "--eta", 1, "--out", f"{seed}.png")
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(np.asarray(Image.open(f"{seed}.png")))
    assert np.array_equal(*drawn)


def test_info(capsys):
    assert run("info") == 0
    assert "masked_attention" in capsys.readouterr().out
    assert run("info", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == commands.collect_info()
    assert {"python", "torch", "triton", "deepspeed", "xformers", "numpy", "maskdm_fast"} <= found["versions"].keys()
    assert found["ops"]["adamw_ema"]["reference"] == found["ops"]["masked_attention"]["sdpa"] == "ok"
    assert {"system", "cpu", "devices"} <= found["machine"].keys() and "library" in found["native"]
    assert found["apex"].keys() == {"FusedAdam", "FusedLayerNorm"}


def test_info_needs_no_extra():
    """An install of torch and numpy alone is told to ask it what is missing."""
    code = """
import sys
from maskdm_fast import cli
sys.modules |= dict.fromkeys(("tyro", "tqdm", "PIL", "safetensors", "braceexpand"))  # as if not installed
assert cli.main(["info"]) == 0
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "masked_attention" in result.stdout


def test_info_shows_what_cannot_run_and_says_why_once(capsys, monkeypatch):
    missing = {
        "_INSTALLED": {"triton": True, "xformers": False},
        "_TRITON_INTERPRETED": False,
        "_CUDA_LIBRARY_MISSING": "the kernels are not built",
        "has_cuda": lambda: False,
    }
    for name, value in missing.items():
        monkeypatch.setattr(backend, name, value)
    monkeypatch.setattr(nvidia_apex, "find", lambda: None)
    assert run("info") == 0
    text = capsys.readouterr().out
    header = next(line for line in text.splitlines() if line.startswith("ops "))
    row = next(line for line in text.splitlines() if line.startswith("  masked_attention "))
    assert header.split()[1:] == list(backend.BACKENDS)
    assert row.split()[1:] == ["ok", "ok", "no", "no", "ok", "no"]
    assert "apex FusedAdam        no" in text
    why = " ".join(text.partition("why not")[2].split())
    for reason in (
        "cuda: the kernels are not built",
        "triton: there is no CUDA device",
        "xformers: xformers is not installed (pip install xformers)",
        "apex FusedAdam, apex FusedLayerNorm: NVIDIA's apex is not installed",
    ):
        assert why.count(reason) == text.count(reason.partition(": ")[2][:20]) == 1, reason
    assert max(map(len, text.partition("ops ")[2].splitlines())) <= 100


def test_info_of_a_machine_that_has_everything(capsys, monkeypatch, install_apex):
    install_apex("nvidia_apex")
    ready = {"_INSTALLED": {"triton": True, "xformers": True}, "_CUDA_LIBRARY_MISSING": None, "has_cuda": lambda: True}
    for name, value in ready.items():
        monkeypatch.setattr(backend, name, value)
    assert run("info") == 0
    text = capsys.readouterr().out
    assert "why not" not in text and "no" not in text.partition("\nops ")[2].split()
    assert set(backend.apex_status().values()) == {"ok"}


def test_sigterm_saves_and_exits_0(images, tmp_path):
    command = [sys.executable, "-m", "maskdm_fast.cli", "train", "smoke-pretrain", "--data", images]
    command += ["--num-images", "100000000", "--checkpoint-images", "100000000", "--preview-images", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    metrics = tmp_path / "runs/smoke-pretrain/metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "ended by SIGTERM; the same command goes on" in out
    assert len(list((tmp_path / "runs/smoke-pretrain/checkpoints").iterdir())) == 1
