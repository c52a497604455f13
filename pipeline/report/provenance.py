"""What a report's numbers came from: settings, versions, hardware, GPU-hours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pipeline.plan.layout import Layout
from pipeline.plan.records import read_all_records
from pipeline.report.results import read_run_yml


def provenance(all_paths: Sequence[Layout]) -> dict[str, Any]:
    """Titled tables of name and value; apart from them the settings that differ between runs."""
    run_ymls = [read_run_yml(paths) for paths in all_paths]
    flat = [dict(flatten(run_yml.get("settings", {}))) for run_yml in run_ymls]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    values = {key: [settings.get(key, "not given") for settings in flat] for key in keys}
    common = [(key, texts[0]) for key, texts in values.items() if len(set(texts)) == 1]
    differing = [(key, texts) for key, texts in values.items() if len(set(texts)) > 1]
    tables = [("Common settings" if len(flat) > 1 else "Settings", common)]
    for name in ("versions", "hardware"):
        found = joined(pair for run_yml in run_ymls for pair in flatten(run_yml.get(name, {})))
        tables.append((name.capitalize(), found))
    tables.append(("Time spent", _time_spent(all_paths)))
    return {
        "settings": [(title, rows) for title, rows in tables if rows],
        "directories": [paths.root.name for paths in all_paths],
        "differing": differing,
    }


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as "group: name" and text; what was not given is left out."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(item, f"{prefix}: {key}" if prefix else str(key))
    elif isinstance(value, list | tuple):
        yield prefix, ", ".join(str(item) for item in value) or "none"
    elif value is not None:
        yield prefix, str(value)


def joined(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """One pair for each name, with all the different texts that go with it."""
    texts: dict[str, dict[str, None]] = {}
    for name, text in pairs:
        texts.setdefault(name, {})[text] = None
    return [(name, ", ".join(different)) for name, different in texts.items()]


def _time_spent(all_paths: Sequence[Layout]) -> list[tuple[str, str]]:
    """Hours by kind of step, from the records: finished attempts, interrupted ones included."""
    hours: dict[str, list[float]] = {}
    for paths in all_paths:
        for record in read_all_records(paths):
            spent = hours.setdefault(record.kind, [0.0, 0.0])
            spent[0] += record.seconds / 3600
            spent[1] += record.seconds * record.devices / 3600
    rows = [
        (f"{kind}, hours (times devices)", f"{wall:.2f} ({device:.2f})")
        for kind, (wall, device) in hours.items()
    ]
    total = sum(device for _, device in hours.values())
    return [*rows, ("total device-hours (GPUs, or the CPU as one)", f"{total:.2f}")]
