"""What the campaign is made of: rows that are measured once, their table, and their bench.

A row runs the project's own code: its configurations, `build_run`, `EpochTrainer`.
"""

import json
import platform
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import yaml

import mae.config
import segmenter.config
from common.console import EXIT_FAILED, EXIT_STOPPED
from common.files import write_json, write_text
from common.formats import check_names
from common.options import Layer, fields_of, make_all
from engine.devices import choose_device, device_name
from mae.config import PretrainConfig
from pipeline.plan.machine import gpus
from pipeline.plan.sample import write_sample
from segmenter.config import DEFAULT_RECIPE, ProbeConfig, TrainConfig, recipe_values
from segments.forms import form_of
from segments.pack import pack

TINY: dict[str, Any] = {  # in place of the models and sizes that are asked for
    "model": "vit_tiny", "image_size": 32, "patch_size": 16, "crop_size": 32, "window_size": 32,
    "window_stride": 32, "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 4,
    "workers": 0,
}  # fmt: skip
ROW_SECONDS = 200  # after which a row is given up
TIMES_SMALLER = 32  # batches, numbers of images and steps of --tiny
GROUPS_OF: dict[type, Mapping[str, Any]] = {
    PretrainConfig: mae.config.GROUPS, TrainConfig: segmenter.config.GROUPS,
    ProbeConfig: segmenter.config.PROBE_GROUPS,
}  # fmt: skip
Config = TypeVar("Config", PretrainConfig, TrainConfig, ProbeConfig)


@dataclass(frozen=True, kw_only=True)
class Row:
    """measure: gives figures by the columns of its table. predicted: in words, for an H100 SXM."""

    work: str
    measure: Callable[[], dict[str, Any]]
    predicted: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows that answer one question. columns: names of their figures, with the unit.

    turn: tables with a lower one are measured first.
    """

    title: str
    turn: int = 0
    columns: Sequence[str]
    rows: Sequence[Row]


class Results:
    """Measured rows in a file that is complete at any moment: a kill loses one row."""

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        """machine: what rows have to share with this call to count as measured."""
        self.path, self.machine = path, machine
        self.rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []

    def find(self, table: Table, row: Row) -> dict[str, Any]:
        """What is known of a row: `figures`, or the `error` that it ended in; empty if nothing."""
        wanted = {"table": table.title, "work": row.work, **self.machine}
        return next((known for known in self.rows if wanted.items() <= known.items()), {})

    def measure(self, tables: Sequence[Table], *, until: float, wanted: str = "", again: bool = True) -> bool:
        """Measure what is missing, in order; none begins after `until` on the monotonic clock.

        What a row raises is its answer (a batch that does not fit, an option that the card has
        not), but is tried `again` by the next call. wanted: found in "table: work". Returns False
        if the card is lost to this process.
        """
        for table, row in [(one, row) for one in tables for row in one.rows]:
            known = self.find(table, row)
            if "figures" in known or (known and not again) or time.monotonic() >= until:
                continue
            if not re.search(wanted, f"{table.title}: {row.work}"):
                continue
            began = time.monotonic()
            try:
                with _giving_up_after(ROW_SECONDS):
                    answer: dict[str, Any] = {"figures": row.measure()}
            except Exception as error:
                answer = _told(error)
            self._keep(table, row, answer, time.monotonic() - began)
            write_text(self.path.with_suffix(".md"), self.markdown(tables))
            if "CUDA error" in answer.get("said", ""):  # all that follows would fail, too
                return False
        return True

    def _keep(self, table: Table, row: Row, answer: dict[str, Any], seconds: float) -> None:
        about = {"table": table.title, "work": row.work, **self.machine}
        self.rows = [known for known in self.rows if not about.items() <= known.items()]
        self.rows.append({**about, **answer, "predicted": row.predicted, "seconds": seconds})
        write_json(self.path, self.rows)
        print(f"{table.title}: {row.work}: {answer} ({seconds:.0f} s)", flush=True)

    def exit_code(self, tables: Sequence[Table]) -> int:
        """1: something does not pass; 75: something is left for the next call; else 0.

        What ends in an error does not pass where the table is one of verdicts.
        """
        answers = [(table, self.find(table, row)) for table in tables for row in table.rows]
        for table, known in answers:
            failed = "error" in known and "passes" in table.columns
            if failed or known.get("figures", {}).get("passes") is False:
                return EXIT_FAILED
        return 0 if all(known for _, known in answers) else EXIT_STOPPED

    def markdown(self, tables: Sequence[Table]) -> str:
        """For perf/RESULTS.md; what is not measured has empty cells."""
        lines = [", ".join(f"{key} {value}" for key, value in self.machine.items()), ""]
        for table in tables:
            predicts = any(row.predicted for row in table.rows)
            heads = ["", *table.columns, *(["predicted"] if predicts else [])]
            lines += [f"**{table.title}**", "", _line(heads), _line(["---"] * len(heads))]
            for row in table.rows:
                known = self.find(table, row)
                figures = known.get("figures", {table.columns[0]: known.get("error")})
                cells = [_shown(figures.get(column)) for column in table.columns]
                lines.append(_line([row.work, *cells, *([row.predicted] if predicts else [])]))
            lines.append("")
        return "\n".join(lines)


@contextmanager
def _giving_up_after(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in what takes longer."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _told(error: Exception) -> dict[str, Any]:
    """What to mend it by: the message, and where it came from."""
    said = str(error) or type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    where = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames]
    return {
        "error": said.splitlines()[0], "type": type(error).__name__, "said": said[:2000],
        "frames": where[-12:],
    }  # fmt: skip


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where rows are measured. scratch: an empty folder. images, masks: real ones, if any.

    sam: checkpoints for mask generation, to be timed, too.
    """

    wanted: Literal["auto", "cpu", "cuda"]
    tiny: bool
    scratch: Path
    images: Path | None = None
    masks: Path | None = None
    sam: tuple[str, ...] = ()

    @cached_property
    def device(self) -> torch.device:
        """Raises ValueError if the wanted one is not there."""
        return choose_device(self.wanted)

    @property
    def machine(self) -> dict[str, Any]:
        """What every row says of its circumstances. driver: its branch."""
        on_gpu = self.device.type == "cuda"
        name = device_name(self.device) if on_gpu else f"CPU, {torch.get_num_threads()} thread(s)"
        driver = next((gpu.driver for gpu in gpus()), None)
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        return {"card": name, "driver": driver, **versions, "tiny": self.tiny}

    def size(self, number: int, least: int = 2) -> int:
        """A batch, or a number of images or steps; a few in --tiny."""
        return max(least, number // TIMES_SMALLER) if self.tiny else number

    @cached_property
    def sample(self) -> Path:
        """Generated in1k/, packed, and segmentation/ with 150 classes."""
        folder = self.scratch / "sample"
        counts = {"train": 600, "val": 8, "segmentation_train": 48, "segmentation_val": 40}
        write_sample(folder, **{n: self.size(c, 10) for n, c in counts.items()})
        pack(folder / "in1k/masks", None, overwrite=True, allow_damaged=False, processes=None)
        path = folder / "segmentation/dataset.yml"
        description = yaml.safe_load(path.read_text())
        del description["palette"]
        description["classes"] += [f"class {n}" for n in range(len(description["classes"]), 150)]
        path.write_text(yaml.safe_dump(description))
        return folder

    @cached_property
    def photographs(self) -> dict[str, Path]:
        """--in1k-dir and --masks-dir of the images that were given, or of the generated ones."""
        if self.images is None:
            return {"in1k_dir": self.sample / "in1k", "masks_dir": self.sample / "in1k/masks"}
        masks = self.masks or self.images / "masks"
        if form_of(masks) != "packed store":
            store = self.scratch / "masks.sqlite"
            pack(masks, store, overwrite=True, allow_damaged=False, processes=None)
            masks = store
        return {"in1k_dir": self.images, "masks_dir": masks}

    def options(self, kind: type, **given: Any) -> dict[str, Any]:
        """Options of such a configuration: what is given; else random weights, generated data, the
        first recipe. Raises ValueError for one that it has not."""
        known = fields_of(*GROUPS_OF[kind].values())
        check_names(given, known, "this version's options")
        own: dict[str, Any] = {"device": self.device.type, "log_with": "none", "val_images": 0}
        if kind is not PretrainConfig:
            own |= recipe_values(DEFAULT_RECIPE) | {"init": "random"}
        data = {"in1k_dir": "in1k", "dataset": "segmentation/dataset.yml"}
        own |= {n: self.sample / path for n, path in data.items() if n in known.keys() - given.keys()}
        own |= {"epochs": 100, "output_dir": self.scratch / "unused"} | given
        own |= TINY if self.tiny else {}
        return {name: value for name, value in own.items() if name in known}

    def config(self, kind: type[Config], **given: Any) -> Config:
        """What the command line would make of these options."""
        made = make_all(GROUPS_OF[kind], [Layer(self.options(kind, **given))])
        if kind is ProbeConfig:
            made["init"] = "random"
        return kind(**made)
