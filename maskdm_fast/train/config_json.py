"""Configurations as JSON, and how two of them differ."""

import dataclasses
import math
import types
import typing
from typing import Any

from maskdm_fast.diffusion.mask_schedule import MaskSchedule
from maskdm_fast.diffusion.mask_text import format_mask, format_mask_schedule, parse_mask, parse_mask_schedule
from maskdm_fast.diffusion.masking import Mask

MAY_CHANGE = ("data", "stage.num_images", "stage.max_seconds", "machine", "output")
"""What may differ when a run folder is resumed; everything else decides the result and is fixed. The data set may have
another name: whether it is the same is told by its checksum."""


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines ``key: old value -> new value`` for the values that may not change between two `RunConfig.to_dict`
    results."""
    old, new = flatten(old), flatten(new)
    return [
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not f"{key}.".startswith(tuple(f"{name}." for name in MAY_CHANGE))
    ]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with keys such as ``stage.lr``."""
    flat = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def check_finite(values: dict[str, Any]) -> None:
    """Raise ValueError for the first number that is NaN or infinite: no option has a use for it, and JSON no word."""
    for name, value in flatten(values).items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{name.rpartition('.')[2]} is {number}, want a finite number")


def to_json(value: Any) -> Any:
    """A configuration as JSON values; masks and their schedules in their text forms, one of several by its `kind`."""
    if isinstance(value, Mask):
        return format_mask(value)
    if isinstance(value, MaskSchedule):
        return format_mask_schedule(value)
    if dataclasses.is_dataclass(value):
        kind = {"kind": value.kind} if hasattr(value, "kind") else {}
        return kind | {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def from_json(kind: Any, value: Any) -> Any:
    """Read a value of type `kind` that `to_json` wrote; keys that are missing take their defaults.

    Raises:
        ValueError: a key is unknown.
    """
    if kind == Mask:
        return parse_mask(value)
    if kind == MaskSchedule:
        return parse_mask_schedule(value)
    if isinstance(kind, types.UnionType) and isinstance(value, dict):
        return _from_union(typing.get_args(kind), value)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        unknown = value.keys() - {f.name for f in dataclasses.fields(kind)}
        if unknown:
            raise ValueError(
                f"{kind.__name__} has no {', '.join(sorted(unknown))}; another version of the package wrote it"
            )
        return kind(**{name: from_json(hints[name], item) for name, item in value.items()})
    return tuple(value) if isinstance(value, list) else value


def _from_union(kinds: tuple[type, ...], value: dict[str, Any]) -> Any:
    """One of several configurations, by its word; the first of them where an older version wrote none."""
    word = value.get("kind", kinds[0].kind)
    found = [kind for kind in kinds if kind.kind == word]
    if not found:
        raise ValueError(f"there is no stage of kind {word!r}; another version of the package wrote it")
    return from_json(found[0], {name: item for name, item in value.items() if name != "kind"})
