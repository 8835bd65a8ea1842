"""One process or several, in one piece or several, whatever the engine: the same images, masks, times and noise at
every step, and the same curve but for the order of sums."""

import math
from dataclasses import replace

import pytest

from maskdm_fast.diffusion.masking import NoMask, PatchMask
from tests.train.distributed.conftest import ODD
from tests.train.distributed.curves import apart, draws, far, far_weights

STEPS, BATCH = 20, 8
KINDS = {
    "masked": {},
    "whole": {"mask": NoMask(), "model": replace(ODD, final_conv=True)},
    "packed": {"mask": PatchMask(0.25, 0.75), "unmasked_share": 0.25},
    "classes": {"class_conditional": True, "label_drop": 0.5},
    "checkpointed": {"activation_checkpointing": True},
}
CASES = [
    *(("masked", engine, 2, micro) for engine in ("ddp", "zero1", "zero2", "zero3") for micro in (None, 2)),
    ("masked", "zero3-offload", 2, 2),
    *(("masked", engine, 1, micro) for engine, micro in (("plain", 2), ("zero1", None), ("zero3", 3))),
    *(("whole", engine, 2, None) for engine in ("ddp", "zero1", "zero2", "zero3")),
    *(("packed", engine, 2, micro) for engine, micro in (("ddp", None), ("ddp", 2), ("zero2", 2))),
    *(("classes", engine, 2, None) for engine in ("ddp", "zero3")),
    *(("checkpointed", engine, 2, micro) for engine, micro in (("ddp", 2), ("zero3", None))),
]


def changes_of(kind, class_folder):
    return {**KINDS[kind], "checkpoint_images": 160, **({"data": str(class_folder)} if kind == "classes" else {})}


@pytest.mark.parametrize(("kind", "engine", "processes", "micro"), CASES)
def test_fp32(make_run, class_folder, reference, finish, tmp_path, kind, engine, processes, micro):
    changes = changes_of(kind, class_folder)
    config = make_run(engine, **changes, micro_batch_size=micro)
    paths = [tmp_path / f"draws-{rank}" for rank in range(processes)]
    finish(config, tmp_path / "run", processes, faults={rank: {"record": str(path)} for rank, path in enumerate(paths)})
    alone = reference(**changes)
    found, wanted = draws(*paths), draws(alone.with_name("draws"))
    assert found.keys() == wanted.keys() and len(found) == STEPS * BATCH
    for place, row in wanted.items():
        assert {**found[place], "loss": 0} == {**row, "loss": 0}, place
        assert math.isclose(found[place]["loss"], row["loss"], rel_tol=1e-4), place
    assert far(alone, tmp_path / "run") < 1e-5
    for which in ("raw", "ema"):
        assert far_weights(alone, tmp_path / "run", which) < 1e-4


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3", "zero3-offload"])
def test_bf16(make_run, reference, finish, tmp_path, engine):
    """Engines round at other places: no two are farther apart than twice what bf16 is from fp32."""
    finish(make_run(engine, precision="bf16", micro_batch_size=2), tmp_path / "run")
    exact, alone = reference(), reference(precision="bf16")
    assert far(alone, tmp_path / "run") < 2 * far(exact, alone)
    for which in ("raw", "ema"):
        assert apart(alone, tmp_path / "run", which) < 2 * apart(exact, alone, which)
