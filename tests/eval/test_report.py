import dataclasses
import importlib.resources
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from maskdm_fast.eval import Scores, nearest
from maskdm_fast.eval.plots import loss_curves
from maskdm_fast.eval.report import render_report, write_report
from maskdm_fast.eval.results import NeighbourStrip, ReportData, RunResult, StageResult
from maskdm_fast.eval.summary import render_text, verdict


def _scores(fd, kid):
    return Scores("FD-lite0", "KID-lite0", fd, 100.0, kid, -0.002, 64, 1949, 64, 1885, 7)


def _images(num_images):
    return (torch.arange(num_images * 48) * 91 % 256).to(torch.uint8).reshape(num_images, 4, 4, 3)


def _run(name, fd=200.0, kid=0.1, **changes):
    points = [(64.0 * i, 0.5 * i, 1.0 / i) for i in range(1, 80)]
    stages = [
        StageResult("pretrain", "75 % masked", points[:40], 2560, 20.0, f"runs/{name}/pretrain"),
        StageResult("finetune", "all patches", points[40:], 2496, 19.5),
    ]
    samples = _images(9)
    found = nearest(samples[:3], _images(20), "pixels", k=2)
    strip = NeighbourStrip.of(samples[:3], _images(20), found, "pixel distance")
    run = RunResult(name, "A run.", stages, samples, "The first 9 of 64.", _scores(fd, kid), strip)
    return dataclasses.replace(run, **changes)


def _data(*runs, **changes):
    data = ReportData(
        title="Masked & full",
        lead="Two runs.",
        runs=runs or [_run("masked"), _run("<script>plain", 300.0, 0.2)],
        real=_images(4),
        real_caption="4 of 1,949.",
        facts={"seed": "0", "machine": "a <machine>"},
        paths={"report": "runs/demo/report.html"},
        attribution="Credit where due.",
    )
    return dataclasses.replace(data, **changes)


class _Balanced(HTMLParser):
    void = frozenset({"meta", "img", "br", "link"})

    def __init__(self):
        super().__init__()
        self.stack = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.void:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_startendtag(self, tag, attrs):
        pass


def _check_page(html):
    parser = _Balanced()
    parser.feed(html)
    assert parser.stack == []
    # Self-contained: no picture, style or script comes from elsewhere.
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', html))
    assert "<link" not in html and "<script" not in html and "@import" not in html and "url(http" not in html


def test_report_is_self_contained_and_says_what_matters(tmp_path):
    write_report(_data(), tmp_path / "new" / "report.html")
    html = (tmp_path / "new" / "report.html").read_text("utf-8")
    _check_page(html)
    for text in (
        "Masked &amp; full",
        "&lt;script&gt;plain",
        "a &lt;machine&gt;",
        "n = 64 generated against 1949 real; floor: 64 real against 1885 other real",
        "seed 7",
        "Credit where due.",
        "runs/masked/pretrain",
        "runs/demo/report.html",
        "The first 9 of 64.",
        "4 of 1,949.",
        "pixel distance",
        "33 % lower",
    ):
        assert text in html, text
    assert html.count("<svg") == 2
    assert html == render_report(_data()), "the same data gives the same file"


@pytest.mark.parametrize(
    "data",
    [
        _data(_run("one", scores=None, neighbours=None)),
        _data(_run("one", stages=[])),
        _data(real=None, facts={}, paths={}, attribution=""),
        _data(_run("one", stages=[StageResult("train", "", [(1.0, 1.0, float("nan")), (2.0, 2.0, 0.5)], 0, 0.0)])),
        _data(_run("one", fd=0.0, scores=dataclasses.replace(_scores(0.0, 0.0), fd_floor=0.0))),
    ],
    ids=["no scores", "no stages", "bare", "one finite point", "zero distance"],
)
def test_report_with_parts_missing(data):
    _check_page(render_report(data))
    assert render_text(data)


def test_curves_take_their_colours_from_the_page():
    for axis in ("images", "seconds"):
        svg = loss_curves([_run("a"), _run("b")], axis)
        assert "#1234" not in svg and "var(--muted)" in svg and "var(--run-1)" in svg and "var(--run-2)" not in svg
    assert loss_curves([_run("a", stages=[])], "images") == ""


@pytest.mark.parametrize(
    ("runs", "want"),
    [
        ([_run("a", 200, 0.1), _run("b", 300, 0.2)], ["'a' came out ahead", "33 % lower", "KID-lite0 agrees"]),
        ([_run("a", 300, 0.2), _run("b", 200, 0.1)], ["'b' came out ahead", "KID-lite0 agrees"]),
        ([_run("a", 200, 0.3), _run("b", 300, 0.2)], ["'a' came out ahead", "KID-lite0 prefers 'b'"]),
        ([_run("a", 200, 0.1), _run("b", 202, 0.2)], ["A tie", "less than 5 % apart"]),
        ([_run("a", 200, 0.1)], ["'a' reached FD-lite0 200.0; real images score 100.0"]),
        ([_run("a", scores=None)], ["Nothing was scored."]),
    ],
)
def test_verdict_says_whichever_way_it_went(runs, want):
    text = verdict(_data(*runs))
    assert all(part in text for part in want), text
    assert verdict(_data(*runs, verdict="Given.")) == "Given."


def test_text_shows_the_same_numbers():
    text = render_text(_data(), width=80)
    assert max(map(len, text.splitlines())) <= 80
    lines = [re.sub(r" {2,}", "|", line) for line in text.splitlines()]
    for line in (
        "masked|200.00|0.1000",
        "real images (floor)|100.00|-0.0020",
        "n = 64 generated against 1949 real; floor: 64 real against 1885 other real",
        "masked: pretrain|2,560|20.0|128.0",
        "report: runs/demo/report.html",
        "Credit where due.",
    ):
        assert line in lines, (line, text)


def test_runs_scored_at_different_sizes_say_so():
    other = _run("b", scores=dataclasses.replace(_scores(300.0, 0.2), num_generated=32))
    assert "b: n = 32 generated" in " ".join(render_text(_data(_run("a"), other), width=200).split())


@pytest.mark.parametrize("module", ["jinja2", "matplotlib", "PIL"])
def test_missing_package_is_named(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'maskdm_fast\[eval\]'"):
        render_report(_data())


def test_neighbour_strip_picks_the_images_found():
    reference = _images(20)
    strip = NeighbourStrip.of(reference[[3, 5]], reference, nearest(reference[[3, 5]], reference, "pixels", k=2), "m")
    assert np.array_equal(strip.neighbours[:, 0], reference[[3, 5]].numpy()) and strip.distances[:, 0].max() == 0


def test_template_is_package_data():
    assert importlib.resources.files("maskdm_fast.eval").joinpath("report.html.j2").is_file()
