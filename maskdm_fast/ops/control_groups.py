"""The limits that Linux sets to a process by its control groups, as containers and job schedulers use them."""

import contextlib
from pathlib import Path


def memory_limits(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes that this process's control group and those above it may take, where they are limited; versions 1 and 2.

    Args:
        groups: the file that says which groups the process is in; may be absent, as on other systems.
        root: where the groups are mounted.
    """
    limits = []
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        inner = top / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if not folder.is_relative_to(top):
                break
            for name in ("memory.max", "memory.limit_in_bytes"):
                # Within a container the path is often that of the host, which is not there; its limit is at the top.
                with contextlib.suppress(FileNotFoundError, ValueError):  # "max": none
                    limits.append(int((folder / name).read_text()))
    return limits
