"""What the parts know, by asking them: their commands answer in JSON, and nobody knows it twice.

`ask_facts` is asked once per call; everything else takes its answer as a value.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.yamlfile import plain
from pipeline.plan.layout import Layout
from pipeline.plan.machine import REPO_ROOT
from pipeline.plan.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Masking methods, recipes and options, as the parts have them."""

    methods: Mapping[str, Mapping[str, Any]]
    """By name: uses_segments, all_segments (and not only the nearest to a coverage ratio), and
    settings, the options that matter to the method."""
    recipes: Mapping[str, Mapping[str, Any]]
    options: Mapping[str, Mapping[str, Mapping[str, Any]]]
    """By kind of step and name: default, neutral (of speed or place only), and older, what a file
    of an earlier version counts as that does not have it."""
    official_checkpoints: tuple[str, ...] = ()
    """The models of which there are published ones."""
    has_official: bool = False
    """Whether that of this model is at hand."""
    image_classes: Path | None = None
    """val/, where it has a folder for each class."""
    packing: tuple[Path, Path] | None = None
    """Segments that have to be packed before pretraining reads them, and the store to write."""
    making: Path | None = None
    """The store to write where there are no segments."""
    generators: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """What makes segments, and by name the options of each."""
    val_dir: Path | None = None
    """The held-out images, where there are some."""

    def uses(self, setting: str, method: str) -> bool:
        """Whether a setting of masking matters to the method."""
        return setting in self.methods[method]["settings"]

    def idle(self, method: Any) -> set[str]:
        """Settings that matter to other methods only; none for a method that is not known."""
        if method not in self.methods:
            return set()
        every = {name for known in self.methods.values() for name in known["settings"]}
        return every - set(self.methods[method]["settings"])

    def resolve(self, kind: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Every setting that decides what a step makes, in plain values: given, recipe, default.

        Then what each of them counts as where an earlier version's record does not have it.
        """
        recipe = self.recipes.get(str(given.get("recipe")), {})
        resolved, older = {}, {}
        for name, fact in self.options.get(kind, {}).items():
            if not fact["neutral"]:
                chosen, value = recipe.get(name, fact["default"]), given.get(name)
                resolved[name] = plain(chosen if value is None else value)
                # `older` says more than a recipe only where it is another value than the default.
                older[name] = chosen if fact["older"] == fact["default"] else fact["older"]
        return resolved, older


def ask_facts(settings: Settings | None = None) -> Facts:
    """Asks both parts beside each other; ValueError says what one of them does not accept."""
    data, plugin = (settings.data, settings.parts.plugin) if settings else (None, None)
    mae, segmenter = ask(
        [
            part_command(
                ["mae", "methods"],
                {
                    "plugin": plugin,
                    "in1k_dir": data and data.in1k_dir,
                    "masks_dir": data and data.masks_dir,
                },
            ),
            part_command(["segmenter", "recipes"], {"plugin": plugin}),
        ]
    )
    packing = making = val_dir = None
    if data is not None and data.in1k_dir is not None:
        segments, val_dir = mae["segments"], data.in1k_dir / "val"
        source, store = Path(segments["path"]), Path(segments["store"])
        if not os.access(next(p for p in (source, *source.parents) if p.exists()), os.W_OK):
            store = Layout(data.output_dir).segments
        packing = (source, store) if segments["needs_packing"] else None
        making = store if segments["needs_making"] else None
    return Facts(
        methods=mae["methods"],
        recipes=segmenter["recipes"],
        options={
            "pretrain": mae["options"],
            "probe": segmenter["probe"],
            "evaluate": segmenter["options"],
        },
        official_checkpoints=tuple(mae["official_checkpoints"]),
        has_official=settings is not None and _has_official(settings),
        image_classes=_image_classes(val_dir) if val_dir else None,
        packing=packing,
        making=making,
        generators=mae["generators"],
        val_dir=val_dir if val_dir and val_dir.is_dir() else None,
    )


def _has_official(settings: Settings) -> bool:
    experiment, paths = settings.experiment, Layout(settings.data.output_dir)
    file = experiment.mae_checkpoint or paths.official_checkpoint(experiment.model)
    return file.is_file()


def _image_classes(folder: Path) -> Path | None:
    if not folder.is_dir() or sum(entry.is_dir() for entry in os.scandir(folder)) < 2:
        return None
    return folder


def part_command(program: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """The command line of one process of a part."""
    return [sys.executable, "-m", *program, *as_arguments(options)]


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Options as command-line words: True and False become --x and --no-x, None is left out."""
    words = []
    for key, value in options.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list | tuple) and value:
            words += [f"--{name}", ",".join(str(part) for part in value)]
        elif value is not None and value != [] and value != ():
            words += [f"--{name}", str(value)]
    return words


def ask(
    commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]] | None = None
) -> list[dict[str, Any]]:
    """What each command prints, as JSON; as many beside each other as there are cores.

    environments: what each gets beside this process's own. Raises ValueError with the reasons of
    those that fail, each once.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ended = list(pool.map(_run, commands, environments or [{}] * len(commands)))
    complaints = [_complaint(done) for done in ended if done.returncode != 0]
    if complaints:
        raise ValueError("\n".join(dict.fromkeys(complaints)))
    try:
        return [json.loads(done.stdout) for done in ended]
    except ValueError:
        said = " | ".join(done.stdout.strip()[:200] for done in ended)
        raise ValueError(f"a part did not answer in JSON, but: {said}") from None


def _run(
    command: Sequence[str], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=REPO_ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that the part said, else the end of what it said."""
    lines = (done.stderr or done.stdout).strip().splitlines()
    said = [line.partition("Error: ")[2] for line in lines if "Error: " in line]
    return said[0] if said else "\n".join(lines[-3:]) or "it gave no reason"
