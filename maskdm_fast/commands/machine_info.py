"""What this machine can run."""

import json
from dataclasses import dataclass
from typing import Any

from maskdm_fast.ops import IMPLEMENTATIONS, backend
from maskdm_fast.train.metrics import git_commit, machine, package_versions


@dataclass(frozen=True)
class InfoOptions:
    """Show what this machine can run, and what is missing: versions, devices, native library, backends of every op."""

    json: bool = False
    """Print one JSON object."""


def info(options: InfoOptions) -> None:
    """Print what `collect_info` finds, as text or JSON."""
    found = collect_info()
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print("versions")
    for name, version in found["versions"].items():
        print(f"  {name:<14} {version or 'not installed'}")
    print(f"  {'commit':<14} {found['commit'] or 'not a checkout'}")
    print(f"machine\n  {found['machine']['system']}\n  {found['machine']['cpu']}")
    for name, value in {**found["machine"]["devices"], **found["native"]}.items():
        print(f"  {name:<14} {_in_words(value)}")
    print("ops")
    for op, backends in found["ops"].items():
        for name, state in backends.items():
            print(f"  {op:<22} {name:<10} {state}")


def collect_info() -> dict[str, Any]:
    """Versions, commit, machine, native library, and ``ops[op][backend]`` = ``"ok"`` or why not; JSON values."""
    return {
        "versions": package_versions(),
        "commit": git_commit(),
        "machine": machine(),
        "native": backend.native_info(),
        "ops": backend.status(IMPLEMENTATIONS),
    }


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_in_words(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
