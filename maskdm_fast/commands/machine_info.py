"""What this machine can run."""

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from maskdm_fast.ops import IMPLEMENTATIONS, backend
from maskdm_fast.train.metrics import git_commit, machine, package_versions

# Commands in the reasons stay in one piece.
_WRAPPER = textwrap.TextWrapper(100, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def info(*, as_json: bool = False) -> None:
    """Show what this machine can run, and what is missing: versions, devices, native library, backends of every op."""
    found = collect_info()
    print(json.dumps(found, indent=1) if as_json else "\n".join(_lines(found)))


def collect_info() -> dict[str, Any]:
    """Versions, commit, machine, native library; ``ops[op][backend]`` and ``apex[part]`` = ``"ok"`` or why not.

    JSON values.
    """
    return {
        "versions": package_versions(),
        "commit": git_commit(),
        "machine": machine(),
        "native": backend.native_info(),
        "ops": backend.status(IMPLEMENTATIONS),
        "apex": backend.apex_status(),
    }


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield "versions"
    for name, version in found["versions"].items():
        yield f"  {name:<14} {version or 'not installed'}"
    yield f"  {'commit':<14} {found['commit'] or 'not a checkout'}"
    yield f"machine\n  {found['machine']['system']}\n  {found['machine']['cpu']}"
    reasons = _reasons(found)
    for name, value in {**found["machine"]["devices"], **found["native"]}.items():
        if name != "missing":  # a reason, and said below
            yield f"  {name:<14} {_in_words(None if value in list(reasons) else value)}"
    yield f"{'ops':<24}" + "".join(f"{name:<10}" for name in backend.BACKENDS).rstrip()
    for op, states in found["ops"].items():
        marks = ["-" if name not in states else _mark(states[name]) for name in backend.BACKENDS]
        yield f"  {op:<22}" + "".join(f"{mark:<10}" for mark in marks).rstrip()
    yield "options of training"
    for name, state in found["apex"].items():
        yield f"  {'apex ' + name:<22}{_mark(state)}"
    if reasons:
        yield "why not"
        for reason, names in reasons.items():
            yield _WRAPPER.fill(f"{', '.join(names)}: {reason}")


def _mark(state: str) -> str:
    return "ok" if state == "ok" else "no"


def _reasons(found: dict[str, Any]) -> dict[str, list[str]]:
    """Each reason once, with the names of what cannot run for it."""
    reasons: dict[str, list[str]] = {}
    states = [item for row in found["ops"].values() for item in row.items()]
    for name, state in [*states, *((f"apex {part}", state) for part, state in found["apex"].items())]:
        if state != "ok" and name not in reasons.setdefault(state, []):
            reasons[state].append(name)
    return reasons


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_in_words(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
