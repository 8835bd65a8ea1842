"""What engines do alike with optimizers of few slots, with gradients that are no numbers, and at rest."""

import importlib.util
from pathlib import Path

import pytest
import torch

from maskdm_fast.train.pieces import FileReader, group_of
from tests.train.distributed.conftest import answers

LEAN = {"betas": (0.0, 0.99), "ema_decay": None}
FULL = {"betas": (0.9, 0.99), "ema_decay": 0.9}
SHARED = [("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("zero3-offload", 2), ("zero1", 1), ("zero3", 1)]
BIT = {"rtol": 0, "atol": 0}


@pytest.fixture
def train(server, tmp_path):
    """``train(engine, processes, ...)``: what `calls.train_engine` returned in the first process, and its files."""
    number = 0

    def run(engine, processes=1, folder=None, **arguments):
        nonlocal number
        if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("DeepSpeed is not installed")
        number += 1
        folder = tmp_path / f"pieces-{number}" if folder is None else folder
        folder.mkdir(exist_ok=True)
        job = {"call": "train_engine", "arguments": {"engine": engine, "folder": str(folder), **arguments}}
        ended = answers(server, [job] * processes, tmp_path / f"logs-{number}", 120.0)
        assert [one.code for one in ended] == [0] * processes, "\n".join(one.log for one in ended)
        assert all(one.result["norms"] == ended[0].result["norms"] for one in ended)
        return ended[0].result, tensors_in(folder)

    return run


def tensors_in(folder: Path):
    """All that was saved, whole, by group and name."""
    files = {}
    for path in sorted(folder.iterdir()):
        files.setdefault(group_of(path.name), []).append(path)
    reader = FileReader(files)
    return {(group, name): reader.tensor(group, name) for group in files for name in reader.names(group)}


def assert_same(found, wanted, rtol=1e-5, atol=1e-6):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    ("engine", "processes", "max_grad_norm"), [*((*case, 0.5) for case in SHARED), ("zero3-offload", 2, None)]
)
def test_gradients_are_cut_by_value_after_the_mean_and_before_the_norm(train, engine, processes, max_grad_norm):
    """In one process, whose gradients are cut by the optimizer itself, and wherever else that happens."""
    settings = {**FULL, "max_grad_value": 0.3, "max_grad_norm": max_grad_norm}
    alone, wanted = train("plain", optimizer=settings, steps=(0, 4), bad=True)
    result, found = train(engine, processes, optimizer=settings, steps=(0, 4), bad=True, num_micro=2)
    assert all(value.isfinite().all() for value in wanted.values())
    assert max(alone["norms"]) < 0.3 * 73**0.5
    assert result["norms"] == pytest.approx(alone["norms"], rel=1e-5)
    assert_same(found, wanted)
    assert all(int(value) == 4 for (_, name), value in found.items() if name.startswith("step."))  # none was skipped


@pytest.mark.parametrize(("engine", "processes"), SHARED)
def test_gradients_of_16_bits_are_cut_as_well(train, engine, processes):
    result, found = train(
        engine, processes, optimizer={**FULL, "max_grad_value": 0.3}, steps=(0, 3), precision="bf16", bad=True
    )
    assert max(result["norms"]) < 0.31 * 73**0.5  # bfloat16 has 0.3008
    assert all(value.isfinite().all() for value in found.values())
    assert found["optimizer", "step.gain"] == 3


def test_without_a_cut_they_do_harm(train):
    _, found = train("plain", optimizer=FULL, steps=(0, 1), bad=True)
    assert found["model", "gain"].isnan().any()


@pytest.mark.parametrize("optimizer", [LEAN, {**LEAN, "ema_decay": 0.9}], ids=["one slot", "no first moment"])
def test_few_slots_go_from_engine_to_engine(train, tmp_path, optimizer):
    """And the weights are those of an optimizer that has all of them."""
    parts = [("plain", 1), ("zero3", 2), ("ddp", 2), ("zero1", 2), ("zero3-offload", 2), ("plain", 1)]
    _, wanted = train("plain", optimizer=optimizer, steps=(0, 6))
    folder = tmp_path / "handed-on"
    for step, (engine, processes) in enumerate(parts):
        result, found = train(engine, processes, folder, optimizer=optimizer, steps=(step, step + 1))
        averages = optimizer["ema_decay"] is not None
        assert result["groups"] == (["ema", "model", "optimizer"] if averages else ["model", "optimizer"])
        assert result["slots"] == ["exp_avg_sq", "step"]
        if averages:
            for name, value in result["averaged"].items():
                torch.testing.assert_close(torch.tensor(value), found["ema", name], **BIT)
        else:
            assert result["averaged"].endswith("ema_decay is None, so there is no average of the weights")
    assert_same(found, wanted)
    _, kept = train("plain", optimizer={**optimizer, "betas": (1e-30, 0.99)}, steps=(0, 6))
    assert ("optimizer", "exp_avg.gain") in kept
    assert_same({key: kept[key] for key in wanted}, wanted)


@pytest.mark.parametrize(("engine", "processes"), [("plain", 1), ("ddp", 2), ("zero2", 2), ("zero3", 2)])
def test_rest_changes_no_bit(train, tmp_path, engine, processes):
    """Steps, pieces and the average are those of a network that never rests, also after a restart."""
    result, wanted = train(engine, processes, optimizer=FULL, steps=(0, 4))
    folder = tmp_path / "rested"
    train(engine, processes, folder, optimizer=FULL, steps=(0, 2), rests=True)
    rested, found = train(engine, processes, folder, optimizer=FULL, steps=(2, 4), rests=True)
    assert result["norms"][2:] == rested["norms"] and result["averaged"] == rested["averaged"]
    assert_same(found, wanted, **BIT)


@pytest.mark.parametrize("engine", ["plain", "zero1", "zero3"])
def test_what_was_not_saved_is_said(train, server, tmp_path, engine):
    folder = tmp_path / "lean"
    train(engine, 1, folder, optimizer=LEAN, steps=(0, 1))
    for changes, slot in (({"betas": (0.9, 0.99)}, "exp_avg"), ({"ema_decay": 0.9}, "ema")):
        arguments = {"engine": engine, "folder": str(folder), "optimizer": {**LEAN, **changes}, "steps": (1, 2)}
        (ended,) = answers(server, [{"call": "train_engine", "arguments": arguments}], tmp_path / slot, 120.0)
        assert ended.error.startswith("ValueError: ") and f"what was saved has no {slot}" in ended.error
