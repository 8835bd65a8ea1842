"""The table of the largest networks."""

from benchmarks import largest
from maskdm_fast.train.memory import memory_per_rank

OPTIONS = {"micro_batch_size": 1, "precision": "bf16"}


def test_the_largest_network_fits_and_a_wider_one_does_not():
    config, memory = largest.largest("ddp", 8, 8e9, 100e9, **OPTIONS)
    assert memory.total <= 0.9 * 8e9
    wider = largest.run_of_width(config.model.dim + 64, 8, **OPTIONS)
    assert memory_per_rank(wider, "ddp", 8).total > 0.9 * 8e9


def test_offloading_is_bound_by_the_machine():
    (small, _), (large, _) = (largest.largest("zero3-offload", 8, 40e9, size, **OPTIONS) for size in (50e9, 200e9))
    assert small.model.dim < large.model.dim
    assert largest.largest("ddp", 8, 1e9, 100e9, **OPTIONS) is None


def test_the_table_has_every_engine(capsys):
    largest.main(["--device-gb", "3", "--host-gb", "10"])
    text = capsys.readouterr().out
    assert "| `plain` |" in text and "| `zero3-offload` |" in text and text.count("\n") == 8
