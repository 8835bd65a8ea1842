"""A server that forks the processes of distributed runs, so that torch is imported once and a launch costs little.

    python worker.py

Reads jobs from stdin, one JSON object per line, and answers each on stdout with one when all of its processes have
ended:

    {"ranks": [RANK, ...], "logs": FOLDER, "timeout": SECONDS}  ->  [{"code": EXIT CODE, "seconds": SECONDS, ...}, ...]

A RANK is ``{"config": ..., "folder": ...}`` for `train`, ``{"command": [...]}`` for the command line, or ``{"call":
FUNCTION of calls.py, "arguments": {...}}``. ``"faults": {NAME: ARGUMENT}`` names what of faults.py is done to it, and
``"environment"`` adds to what a launcher sets. The code is negative where a signal ended the process, None where it had
to be killed after the timeout. What a process returned is in ``"result"``, what it raised in ``"error"`` (type and
message), what it said in the file ``rank-N.txt`` of the logs.
"""

import contextlib
import gc
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import calls
import faults
import torch
from ports import free_port

from maskdm_fast import cli
from maskdm_fast.train import RunConfig, train, zero_engine

# What the first optimizer and `deepspeed.initialize` import, which takes seconds. Nothing of it starts a thread.
PRELOADED = (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "safetensors.torch",
    "tqdm",
)


def launcher_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun sets; nothing for a process alone."""
    if world_size == 1:
        return {}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), **address}


def run_rank(job: dict[str, Any]) -> Any:
    """What one process does."""
    with contextlib.ExitStack() as stack:
        for name, argument in job.get("faults", {}).items():
            stack.enter_context(getattr(faults, name)(argument))
        if "call" in job:
            return getattr(calls, job["call"])(**job.get("arguments", {}))
        if "command" in job:
            sys.argv[1:] = job["command"]
            cli.run()
        result = train(RunConfig.from_dict(job["config"]), job["folder"])
        return {"reason": result.reason, "step": result.step}


def child(job: dict[str, Any], log: Path, environment: dict[str, str]) -> None:
    """Run in a forked process; leaves what came of it beside the log. Never returns."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    os.environ.update(job.get("environment", {}))
    torch.set_num_threads(1)
    if "command" in job:
        run_rank(job)  # ends as programs do, with all that Python and the libraries do then
    code, outcome = 1, {}
    try:
        outcome["result"] = run_rank(job)
        code = 0
    except BaseException as error:
        traceback.print_exc()
        outcome["error"] = f"{type(error).__name__}: {error}"
    log.with_suffix(".json").write_text(json.dumps(outcome))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Fork the processes of a job and wait for them."""
    logs, ranks, port = Path(job["logs"]), job["ranks"], free_port()
    logs.mkdir(parents=True, exist_ok=True)
    start, alive = time.monotonic(), {}
    for rank, one in enumerate(ranks):
        pid = os.fork()
        if pid == 0:
            child(one, logs / f"rank-{rank}.txt", launcher_environment(rank, len(ranks), port))
        alive[pid] = rank
    answers: list[dict[str, Any]] = [{} for _ in ranks]
    while alive:
        late = time.monotonic() - start > job["timeout"]
        for pid, rank in list(alive.items()):
            if late:
                os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, 0 if late else os.WNOHANG)
            if ended:
                del alive[pid]
                code = None if late else os.waitstatus_to_exitcode(status)
                answers[rank] = {"code": code, "seconds": time.monotonic() - start}
                path = logs / f"rank-{rank}.json"
                answers[rank] |= json.loads(path.read_text()) if path.exists() else {}
        time.sleep(0.005)
    return answers


def main() -> None:
    """Serve until stdin closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    if importlib.util.find_spec("deepspeed"):
        zero_engine._import_deepspeed(torch.device("cpu"))
    for module in PRELOADED:
        if importlib.util.find_spec(module.split(".")[0]):
            importlib.import_module(module)
    gc.freeze()  # else the first collection in every child would copy all memory
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), file=answers, flush=True)
    os._exit(0)  # what the libraries do when they are unloaded takes seconds


if __name__ == "__main__":
    main()
