"""The code in the documents runs."""

import re
from pathlib import Path

import pytest

from benchmarks import readme

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = [
    pytest.param(block, id=f"{path.name}-{number}")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_example_runs(block):
    exec(compile(block, "<example>", "exec"), {})


def test_links_lead_somewhere():
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_tables_are_the_measured_ones():
    pages = readme.pages()
    for path, table in pages.items():
        assert readme.updated(path, table) == path.read_text(), "run python -m benchmarks.readme"
    assert "| train step, `small64`" in pages[ROOT / "README.md"]
    assert "| `masked_attention` |" in pages[ROOT / "docs" / "measure.md"]
