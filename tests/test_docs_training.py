"""The commands of docs/training.md can be given, those of its first section run, its table of memory is computed."""

import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser

from maskdm_fast import cli, commands
from maskdm_fast.train.engine_choice import choose_engine
from maskdm_fast.train.hardware import HARDWARE
from maskdm_fast.train.memory import memory_per_rank
from maskdm_fast.train.plan import num_parameters

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "training.md"
TEXT = PAGE.read_text()
OPTIONS = {
    "pack": commands.PackOptions,
    "sample": commands.SampleOptions,
    "evaluate": commands.EvaluateOptions,
    "export": commands.ExportOptions,
}
LAUNCHED = re.compile(r"-m maskdm_fast |--module maskdm_fast |maskdm-fast ")
_PROCESSES = 8


def command_lines(text):
    """Every line of a code block that starts our program, by whatever launcher; and what the prose has of them."""
    *pairs, last = text.replace("\\\n", " ").split("\n```")
    outside, inside = [*pairs[0::2], last], pairs[1::2]
    assert len(pairs) % 2 == 0, "a code block is not closed"
    lines = [line for block in inside if not block.startswith("python") for line in block.splitlines()]
    lines += re.findall(r"`(maskdm-fast [^`]+)`", "\n".join(outside))
    return [line for line in lines if LAUNCHED.search(line) and not line.startswith("#")]


def launcher_and_command(line):
    """``(words before our program, command, its arguments)``."""
    match = LAUNCHED.search(line)
    words = shlex.split(line[match.end() :], comments=True)
    return shlex.split(line[: match.start()] + match.group()), words[0], words[1:]


def parsed(command, arguments):
    """What our program understands of a command; SystemExit or ValueError if it does not."""
    if command == "train":
        return cli._train_options(arguments[0], arguments[1:])
    return cli._parse(OPTIONS[command], arguments, command)


def check_command(line):
    """Raise if our program, or what launches it, does not understand a line of a page."""
    launcher, command, arguments = launcher_and_command(line)
    options = parsed(command, arguments)
    if command != "train" and hasattr(options, "check"):
        options.check()
    if launcher[0] == "torchrun":
        ours = ["train", "smoke"] if launcher[-1] == "maskdm_fast" else []
        assert get_args_parser().parse_args([*launcher[1:], *ours]).module
    elif launcher[0] == "deepspeed":
        runner = pytest.importorskip("deepspeed.launcher.runner", reason="deepspeed is optional")
        assert runner.parse_args([*launcher[1:], "train"]).module
    else:
        assert launcher[0] in ("maskdm-fast", "srun")


COMMANDS = [
    pytest.param(line, id=f"{number}-{line[:50]}")
    for number, line in enumerate(line for line in command_lines(TEXT) if launcher_and_command(line)[2])
]


@pytest.mark.parametrize("line", COMMANDS)
def test_command_can_be_given(line):
    check_command(line)


def test_there_are_commands_of_every_launcher():
    first = [launcher_and_command(line)[0][0] for line in command_lines(TEXT)]
    assert {"maskdm-fast", "torchrun", "deepspeed", "srun"} == set(first)
    assert first.count("maskdm-fast") >= 25 and first.count("torchrun") >= 3


def known_flags(capsys):
    """Options of our program, and of the launchers and tools that the page names."""
    for preset in ("smoke", "smoke-pretrain"):
        with pytest.raises(SystemExit):
            cli.main(["train", preset, "--help"])
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", capsys.readouterr().out))
    for kind in OPTIONS.values():
        flags |= set(cli._flags(kind))
    flags |= {flag for action in get_args_parser()._actions for flag in action.option_strings}
    srun = {"--gpu-bind", "--kill-on-bad-exit", "--job-name", "--open-mode", "--nodes", "--ntasks-per-node"}
    srun |= {"--gpus-per-node", "--cpus-per-task", "--time", "--signal", "--dependency"}
    return flags | srun | {"--num_gpus", "--hostfile", "--module", "--ipc"}  # deepspeed, docker


def test_every_option_that_is_named_exists(capsys):
    named = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", TEXT))
    assert len(named) > 50
    assert not named - known_flags(capsys)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder `photos` with two classes and a broken file; a cache of its own."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 18, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        path = tmp_path / "photos" / ("cats", "dogs")[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "photos" / "cats" / "broken.jpg").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def test_the_whole_way_runs(folder, capsys):
    section = TEXT.split("\n## ")[1]
    lines = command_lines(section)
    assert len(lines) == 10
    for line in lines:
        launcher, command, arguments = launcher_and_command(line)
        if command == "train":
            arguments = [*arguments, "--device", "cpu"]
        if launcher[0] == "torchrun":
            program = [sys.executable, "-m", "torch.distributed.run", *launcher[1:], command, *arguments]
            found = subprocess.run(program, capture_output=True, text=True, timeout=300)
            assert found.returncode == 0, found.stderr
        else:
            assert cli.main([command, *arguments]) == 0, line
    said = capsys.readouterr()
    assert "1 left out" in said.out and "memory of one process" in said.out
    for path in (
        "photos.store",
        "grid.png",
        "first.safetensors",
        "runs/first/evaluation.json",
        "runs/next/config.json",
    ):
        assert (folder / path).exists(), path
    steps = sorted(path.name for path in (folder / "runs/more/checkpoints").iterdir())
    assert steps[-1] == f"step-{960 // 16:08d}"


def memory_row(options):
    """Cells of the table, from the words after ``train``."""
    preset, *rest = shlex.split(options)
    config, *_ = cli._train_options(preset, rest)
    cells = [f"`{options}`", f"{num_parameters(config) / 1e6:,.0f} M"]
    for engine in ("plain", "ddp", "zero1", "zero2", "zero3", "zero3-offload"):
        memory = memory_per_rank(config, engine, 1 if engine == "plain" else _PROCESSES)
        host = f" + {memory.host_total / 1e9:.1f}" if memory.host else ""
        cells.append(f"{memory.total / 1e9:.1f}{host}")
    size = HARDWARE["h100"].memory
    return [*cells, ", ".join(choose_engine(config, number, size, math.inf)[0] for number in (1, _PROCESSES))]


def test_the_table_of_memory_is_computed():
    """Within a few percent, so that the estimate may be refined; the engines are those that are chosen."""
    rows = re.findall(r"^\| (`(?:small|celebahq)[^`]*` \| [\d,]+ M \|.*) \|$", TEXT, re.MULTILINE)
    assert len(rows) >= 5
    for row in rows:
        stated, *rest = row.split(" | ")
        computed = memory_row(stated.strip("`"))
        message = f"the row should be\n| {' | '.join(computed)} |"
        assert [rest[0], rest[-1]] == [computed[1], computed[-1]], message
        sizes, wanted = (numbers(" ".join(cells)) for cells in (rest[1:-1], computed[2:-1]))
        assert sizes == [pytest.approx(size, rel=0.05, abs=0.15) for size in wanted], message


def test_links_into_pages_find_their_heading():
    for page, anchor in re.findall(r"\]\(([\w.-]*)#([\w-]+)\)", TEXT):
        text = (PAGE.parent / page).read_text() if page else TEXT
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], anchor


MESSAGES = (
    "became NaN or infinite at step",
    "no engine fits",
    "cannot be divided evenly",
    "was begun with another configuration",
    "the data set has changed",
    "another process is training in",
    "watchdog of",
    "lost contact with another process",
    "cannot write checkpoint",
    "falling back",
    "of a step",
)


@pytest.mark.parametrize("message", MESSAGES)
def test_the_program_says_what_the_table_of_failures_quotes(message):
    sources = "\n".join(path.read_text() for path in (ROOT / "maskdm_fast").rglob("*.py"))
    assert message in sources
    assert message in TEXT.split("\n## When it fails")[1]


def test_the_page_starts_from_published_values():
    """The table of recipes agrees with the presets."""
    from maskdm_fast.train.presets import PRESETS

    for preset in ("small64", "celebahq-base", "emoji32"):
        (row,) = re.findall(rf"^\| `{preset}`: (.*) \|$", TEXT, re.MULTILINE)
        _, batch, rate, warmup, clip, decay, _, shown = row.split(" | ")
        stages = [stage for _, stage in PRESETS[preset]().stages]
        assert numbers(batch) == [stage.batch_size for stage in stages]
        assert spread(rate, stages) == [stage.lr for stage in stages]
        assert spread(warmup, stages) == [stage.warmup_images // stage.batch_size for stage in stages]
        assert {"none": None, "1": 1.0}[clip] == stages[-1].max_grad_norm
        assert spread(decay, stages) == [pytest.approx(stage.ema_decay, abs=1e-4) for stage in stages]
        assert numbers(shown) == [pytest.approx(stage.num_images / 1e6, rel=0.1) for stage in stages]


def numbers(cell):
    return [float(word) for word in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", cell.replace(",0", "0"))]


def spread(cell, stages):
    found = numbers(cell)
    return found * len(stages) if len(found) == 1 else found
