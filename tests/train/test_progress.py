import io
import sys

import pytest

from maskdm_fast.train.config import DenoisingConfig
from maskdm_fast.train.progress import Progress, format_seconds, step_bar

RECORD = {"images": 500, "seconds": 10.0, "loss": 0.25, "images_per_s": 1234.5, "model_tflops": 0.25}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_where_there_is_no_terminal():
    file = io.StringIO()
    progress = Progress("run", DenoisingConfig(num_images=1000), file)
    progress.advance(250, 5.0)
    assert file.getvalue() == ""
    progress.log(RECORD)
    progress.close()
    assert file.getvalue() == "run  50%: 500 images, 1,234 images/s, 0.25 TFLOP/s, loss 0.2500, 0:10 left\n"


def test_utilisation_where_the_peak_is_known():
    file = io.StringIO()
    Progress("run", DenoisingConfig(num_images=1000), file).log({**RECORD, "mfu": 0.4321})
    assert "1,234 images/s, 43.2% MFU, loss" in file.getvalue()


def test_what_holds_a_step_up_is_shown_if_it_is_much():
    file = io.StringIO()
    progress = Progress("run", DenoisingConfig(num_images=1000), file)
    split = {"data_ms": 30.0, "forward_ms": 20.0, "backward_ms": 40.0, "optimizer_ms": 10.0, "communication_ms": 25.0}
    progress.log({**RECORD, **split})
    assert "0.25 TFLOP/s, data 30% of a step, communication 25% of a step, loss" in file.getvalue()
    progress.log({**RECORD, **split, "data_ms": 3.0, "communication_ms": 3.0})
    assert "0.25 TFLOP/s, loss" in file.getvalue().splitlines()[1]


def test_a_bar_on_a_terminal():
    file = Terminal()
    progress = Progress("run", DenoisingConfig(num_images=1000), file)
    progress.advance(500, 10.0)
    progress.log(RECORD)
    progress.message("wrote it")
    progress.close()
    assert "run  50%|" in file.getvalue() and "1,234 images/s, 0.25 TFLOP/s, loss 0.2500, 0:10 left" in file.getvalue()
    assert "wrote it\n" in file.getvalue()


@pytest.mark.parametrize(
    ("num_images", "max_seconds", "percent"), [(1000, 12.5, 80), (None, 20.0, 50), (625, 40.0, 80)]
)
def test_percent_is_of_the_rule_met_first(num_images, max_seconds, percent):
    file = io.StringIO()
    Progress("run", DenoisingConfig(num_images=num_images, max_seconds=max_seconds), file).log(RECORD)
    assert f"run  {percent}%" in file.getvalue()


def test_step_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with step_bar("sampling") as progress:
        progress(1, 4)
        progress(4, 4)
    assert "sampling" in sys.stderr.getvalue()


def test_format_seconds():
    assert [format_seconds(value) for value in (0, 59.6, 3599, 3661)] == ["0:00", "1:00", "59:59", "1:01:01"]
