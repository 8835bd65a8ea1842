"""What is compared of two runs."""

import json
import math
from pathlib import Path

import torch

from maskdm_fast.models import UViT
from maskdm_fast.train import checkpoint, load_weights, read_metrics

NAMES = ("loss", "grad_norm", "mask_ratio")


def curve(folder: Path) -> list[tuple[float, ...]]:
    """Step, learning rate and `NAMES` of every line of the log."""
    logs = [record for record in read_metrics(folder) if record["kind"] == "log"]
    return [(log["step"], log["lr"], *(log[name] for name in NAMES)) for log in logs]


def far(a: Path, b: Path) -> float:
    """The largest relative difference of two loss curves, which must have the same steps and learning rates."""
    first, second = curve(a), curve(b)
    assert [row[:2] for row in first] == [row[:2] for row in second]
    assert [row[4] for row in first] == [row[4] for row in second]  # mask ratios
    return max(abs(x[2] - y[2]) / abs(x[2]) for x, y in zip(first, second, strict=True))


def far_weights(a: Path, b: Path, which: str) -> float:
    """The largest difference of a weight, as a share of the largest weight of its tensor or 1 % of 1."""
    first, second = load_weights(a, which).tensors, load_weights(b, which).tensors
    assert first.keys() == second.keys()
    worst = 0.0
    for name, tensor in first.items():
        assert second[name].dtype == tensor.dtype == torch.float32 and second[name].shape == tensor.shape
        scale = max(float(tensor.abs().max()), 0.01)
        worst = max(worst, float((second[name] - tensor).abs().max()) / scale)
    return worst


def apart(a: Path, b: Path, which: str) -> float:
    """How far the weights of two runs are from each other, as a share of how far the first has come."""
    first, second = load_weights(a, which), load_weights(b, which).tensors
    begin = UViT(first.config.model, seed=first.config.seed).state_dict()

    def norm(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> float:
        return math.sqrt(sum(float((x[name] - y[name]).square().sum()) for name in x))

    return norm(first.tensors, second) / norm(first.tensors, begin)


def bits(folder: Path) -> tuple[int, dict[str, bytes], list[tuple[float, ...]]]:
    """Step and tensor files of the newest checkpoint, and the curve."""
    newest = checkpoint.newest(folder)
    return newest.step, {path.name: path.read_bytes() for path in newest.path.glob("*.safetensors")}, curve(folder)


def draws(*paths: Path) -> dict[tuple[int, int], dict]:
    """What `faults.record` wrote in all processes, by step and slot."""
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    found = {(row.pop("step"), row.pop("slot")): row for row in rows}
    assert len(found) == len(rows), "two processes trained on one slot"
    return found
