import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from maskdm_fast.models import UViTConfig
from maskdm_fast.train import RunConfig

_REFERENCES = pytest.StashKey[dict[str, Path]]()
WORKER = Path(__file__).with_name("worker.py")
ODD = UViTConfig(image_size=12, patch_size=3, dim=16, depth=3, num_heads=2)
"""Its last bias has 27 values, and the sum of all is odd: ZeRO has to pad what it divides among two processes."""


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code, negative for a signal; None if it never ended by itself.
        seconds: when, from the start.
        result: what it returned.
        error: what it raised, type and message.
        log: its stderr.
    """

    code: int | None
    seconds: float
    result: dict | None
    error: str | None
    log: str


@pytest.fixture(scope="session")
def server() -> Iterator[Callable[[dict], list[dict]]]:
    """Launches processes, see worker.py; lives as long as the tests."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(WORKER)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:

        def serve(job: dict) -> list[dict]:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            assert answer, f"{WORKER.name} has ended; its stderr says why"
            return json.loads(answer)

        yield serve
        process.stdin.close()


@pytest.fixture
def launch(server, tmp_path) -> Callable[..., list[Ended]]:
    """Train in several processes; ``faults[rank]`` names what of faults.py happens in which."""
    number = 0

    def start(
        config: RunConfig | list[RunConfig],
        folder: Path | list[Path],
        processes: int = 2,
        *,
        faults: dict[int, dict] | None = None,
        timeout: float = 120.0,
        **environment: str,
    ) -> list[Ended]:
        nonlocal number
        number += 1
        configs = config if isinstance(config, list) else [config] * processes
        folders = folder if isinstance(folder, list) else [folder] * processes
        ranks = [
            {
                "config": config.to_dict(),
                "folder": str(folder),
                "faults": {"kept_values": 20, **(faults or {}).get(rank, {})},
                "environment": environment,
            }
            for rank, (config, folder) in enumerate(zip(configs, folders, strict=True))
        ]
        return answers(server, ranks, tmp_path / f"logs-{number}", timeout)

    return start


def answers(server, ranks: list[dict], logs: Path, timeout: float) -> list[Ended]:
    """Run a job of worker.py."""
    found = server({"ranks": ranks, "logs": str(logs), "timeout": timeout})
    texts = [(logs / f"rank-{rank}.txt").read_text() for rank in range(len(ranks))]
    return [
        Ended(one["code"], one["seconds"], one.get("result"), one.get("error"), text)
        for one, text in zip(found, texts, strict=True)
    ]


@pytest.fixture
def finish(launch) -> Callable[..., list[Ended]]:
    """`launch`, for a run that has to end well."""

    def start(*arguments, **options) -> list[Ended]:
        ended = launch(*arguments, **options)
        assert [one.code for one in ended] == [0] * len(ended), "\n".join(one.log for one in ended)
        return ended

    return start


@pytest.fixture
def make_run(make_config) -> Callable[..., RunConfig]:
    """20 steps of 8 images, logged by twos, with a checkpoint every 5."""

    def make(engine: str = "plain", **changes) -> RunConfig:
        if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("DeepSpeed is not installed")
        defaults = {
            "model": ODD,
            "num_images": 160,
            "batch_size": 8,
            "warmup_images": 16,
            "ema_half_life_images": 32,
            "log_images": 16,
            "checkpoint_images": 40,
            "keep_checkpoints": 9,
        }
        return make_config(**{**defaults, "engine": engine, **changes})

    return make


@pytest.fixture
def reference(make_run, finish, tmp_path_factory, request) -> Callable[..., Path]:
    """Folder of a run in one process on the engine plain, made once for each set of changes; what it drew lies in
    ``draws`` beside it."""
    made = request.config.stash.setdefault(_REFERENCES, {})

    def get(**changes) -> Path:
        key = json.dumps(make_run(**changes).to_dict())
        if key not in made:
            made[key] = tmp_path_factory.mktemp("reference") / "run"
            finish(make_run(**changes), made[key], 1, faults={0: {"record": str(made[key].with_name("draws"))}})
        return made[key]

    return get


@pytest.fixture(scope="session")
def class_folder(image_folder, tmp_path_factory) -> Path:
    """The images, in three classes."""
    folder = tmp_path_factory.mktemp("classes")
    for number, path in enumerate(sorted(image_folder.iterdir())):
        (folder / str(number % 3)).mkdir(exist_ok=True)
        shutil.copy(path, folder / str(number % 3))
    return folder


def on(config: RunConfig, engine: str, micro_batch_size: int | None = None) -> RunConfig:
    """The same run on another engine."""
    return replace(config, machine=replace(config.machine, engine=engine, micro_batch_size=micro_batch_size))
