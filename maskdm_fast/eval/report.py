"""The report of an experiment as one self-contained HTML file."""

import base64
import importlib.resources
import os
from pathlib import Path

import numpy as np

from maskdm_fast.eval.features import Images
from maskdm_fast.eval.grid import make_grid, png_bytes
from maskdm_fast.eval.plots import NUM_COLOURS, loss_curves
from maskdm_fast.eval.results import NeighbourStrip, ReportData
from maskdm_fast.eval.summary import SCORES_NOTE, score_sizes, scored_runs, verdict

_LEGIBLE = 96  # px: a browser that enlarges a smaller image blurs it, or shows pixels of unequal size


def _data_uri(image: np.ndarray, side: int) -> str:
    """PNG of a picture made of images of `side` pixels, enlarged by a whole factor where they are small."""
    scale = max(1, _LEGIBLE // side)
    enlarged = image.repeat(scale, axis=0).repeat(scale, axis=1)
    return "data:image/png;base64," + base64.b64encode(png_bytes(enlarged)).decode()


def _sheet(images: Images) -> str:
    return _data_uri(make_grid(images, padding=1), images.shape[1])


def _neighbour_columns(strip: NeighbourStrip) -> list[dict]:
    return [
        {
            "sample": _data_uri(sample, len(sample)),
            "nearest": [
                {"image": _data_uri(image, len(image)), "distance": float(distance)}
                for image, distance in zip(images, distances, strict=True)
            ],
        }
        for sample, images, distances in zip(strip.samples, strip.neighbours, strip.distances, strict=True)
    ]


def render_report(data: ReportData) -> str:
    """HTML of the report; images, curves and style are inside, nothing is loaded from elsewhere.

    Raises:
        ImportError: jinja2, matplotlib or Pillow is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("the report needs jinja2: pip install 'maskdm_fast[eval]'") from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(
        importlib.resources.files(__package__).joinpath("report.html.j2").read_text("utf-8")
    )
    scored = scored_runs(data)
    largest_fd = max((max(run.scores.fd, run.scores.fd_floor) for run in scored), default=0.0)
    fastest = max((stage.images_per_s for run in data.runs for stage in run.stages), default=0.0)
    return template.render(
        data=data,
        verdict=verdict(data),
        runs=[
            {
                "result": run,
                "colour": f"var(--run-{number % NUM_COLOURS})",
                "grid": _sheet(run.samples),
                "neighbours": _neighbour_columns(run.neighbours) if run.neighbours is not None else [],
            }
            for number, run in enumerate(data.runs)
        ],
        real_grid=_sheet(data.real) if data.real is not None else "",
        floor=scored[0].scores if scored else None,
        sizes=score_sizes(data),
        scores_note=SCORES_NOTE,
        percent_fd=lambda value: 100 * max(value, 0.0) / largest_fd if largest_fd > 0 else 0.0,
        percent_speed=lambda value: 100 * value / fastest if fastest > 0 else 0.0,
        curves=[jinja2.utils.markupsafe.Markup(loss_curves(data.runs, axis)) for axis in ("seconds", "images")],
    )


def write_report(data: ReportData, path: str | os.PathLike[str]) -> None:
    """Write `render_report` to a file; its folder is made if missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_report(data), encoding="utf-8")
