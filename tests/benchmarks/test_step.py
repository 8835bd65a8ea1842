"""The train-step and sampling benchmarks: the shape of the result, and that a peer which is wrong is found."""

import dataclasses
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness, sampling, step
from benchmarks.step import Case
from maskdm_fast.models import UViTConfig


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    config = UViTConfig(image_size=16, patch_size=4, dim=32, depth=3, num_heads=2)
    monkeypatch.setitem(step.CONFIGS, "tiny", config)
    monkeypatch.setattr(step, "CASES", (Case("tiny", 0.75, 4), Case("tiny", 0.0, 2)))


@pytest.fixture
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_json(tmp_path, monkeypatch, capsys, same_threads):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # a real one takes a minute
    step.main(["--json", "--save", "--repeats", "1", "--threads", "1"])
    result = json.loads(capsys.readouterr().out)
    assert {"machine", "versions", "commit", "command", "rows"} <= set(result)
    masked, dense = result["rows"]
    assert [masked["size"], masked["mask_ratio"], masked["batch"]] == ["tiny", 0.75, 4]
    assert list(masked["ms"]) == ["ours", "plain", "compiled", "official_way", "matmul"]
    assert all(masked["ms"].values())
    rates = [row["gflop"] / row["ms"]["ours"] for row in (masked, dense)]
    assert masked["masking_efficiency"] == pytest.approx(rates[0] / rates[1], abs=1e-3)
    assert dense["masking_efficiency"] is None
    (saved,) = tmp_path.glob("step-*.json")
    assert json.loads(saved.read_text()) == result


def test_products_are_those_of_the_network():
    """Counted by PyTorch, which does not know the CPU's fused attention but its products."""
    for case in step.CASES:
        contest = step.Contest(case, compile_peer=False)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            contest.peers["plain"].gradients(contest.images)
        assert counter.get_total_flops() == step.flops(case)


@pytest.mark.parametrize("what", ["value", "gradient", "clipping", "decay", "average"])
def test_a_peer_that_computes_something_else_is_found(what):
    contest = step.Contest(step.CASES[0], compile_peer=False)
    contest.check_parity()
    peer = contest.peers["official_way"]
    if what == "value":
        with torch.no_grad():
            peer.network.head.bias += 0.1
    elif what == "gradient":
        peer.network.blocks[0].norm1.weight.register_hook(lambda grad: grad * 1.1)
    elif what == "clipping":
        peer.settings = dataclasses.replace(peer.settings, max_grad_norm=1e9)
    elif what == "decay":
        peer.optimizer.param_groups[0]["weight_decay"] = 0.0
    else:
        peer.settings = dataclasses.replace(peer.settings, ema_half_life_images=1)
    with pytest.raises(AssertionError, match="official_way"):
        contest.check_parity()


def test_nothing_is_timed_that_was_not_compared(monkeypatch):
    def differ(contest):
        raise AssertionError("they differ")

    monkeypatch.setattr(step.Contest, "check_parity", differ)
    monkeypatch.setattr(harness, "interleave", lambda *args: pytest.fail("they are timed"))
    with pytest.raises(AssertionError, match="they differ"):
        step.measure(step.CASES[0], repeats=1, compile_peer=False)


def test_table_shows_ratios_to_the_products():
    row = {"size": "tiny", "mask_ratio": 0.75, "batch": 4, "gflop": 1.0, "masking_efficiency": 0.5}
    row["ms"] = dict.fromkeys(step.NAMES, 10.0) | {"ours": 15.0, "compiled": None}
    text = step.table({"rows": [row]})
    assert "1.50x" in text
    assert "75%" in text


def test_sampling_agrees_with_the_plain_loop(monkeypatch):
    monkeypatch.setitem(sampling.CONFIGS, "tiny", step.CONFIGS["tiny"])
    row = sampling.measure("tiny", num_images=2, num_steps=3, repeats=1, compile_peer=False)
    assert list(row["ms"]) == ["ours", "plain"]
