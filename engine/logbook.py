"""What a run tells while it goes: log.txt, progress.json, and the trackers of --log-with.

Those get the values of log.txt through accelerate: TensorBoard, Weights & Biases, ... They cannot
take back what they got, so that is written down: .trackers.json holds the last epoch sent and the
names by which a run is found again.
"""

import json
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from typing_extensions import TypedDict

from common.files import write_json, write_text
from common.formats import Count, LogRecord, parsed, read_json, read_log
from common.progress import Display, progress_text
from common.step_files import LOG, PROGRESS, TENSORBOARD, TRACKERS
from engine.config import TrainingConfig

logger = logging.getLogger(__name__)

PROJECT = "segmae"
NONE = "none"
# They keep what they got in memory until they are closed, and ignore a step that they have already.
BUFFERING = {"wandb"}
LOG_OPTIONS = {"wandb": {"commit": True}}  # it would hold a step back until the next


class Logbook:
    """Log, trackers and progress of one run, written by the first process only.

    The log is cut back to the checkpoint that the run continues from. A record reaches the trackers
    when its checkpoint is saved (`saved`), so that it reaches them once.
    """

    def __init__(
        self, config: TrainingConfig, settings: Mapping[str, Any], *, epochs_completed: int,
        epochs_total: int, images_per_epoch: int,
    ) -> None:  # fmt: skip
        """settings: what trackers show of the run."""
        self.path = config.output_dir / LOG
        # Epochs that are in no checkpoint are trained, and logged, again.
        self.records = [r for r in read_log(self.path) if r["epoch"] <= epochs_completed]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in self.records))
        self.trackers = Trackers(config.output_dir, config.log_with, settings)
        self.trackers.send(self.records)
        # progress.json, and a bar on a terminal or a line now and then in a file.
        self.display = Display(epochs_total, config.output_dir / PROGRESS)
        self.epochs_total, self.images_per_epoch = epochs_total, images_per_epoch
        self.epoch = float(epochs_completed)
        self.images_done = 0  # by this call, as are the seconds
        self.seconds = 0.0  # of training; evaluations are not part of the rate

    def add_epoch(self, record: dict[str, Any]) -> None:
        """Append one epoch; on disk when this returns, for the checkpoint that follows."""
        try:  # NaN, say, would be damage to whoever reads it
            parsed(LogRecord, record, f"epoch {record['epoch']}")
        except ValueError as error:
            raise RuntimeError(f"{error}; the last checkpoint is from before") from None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)
        logger.info("%s", "  ".join(f"{name} {_short(value)}" for name, value in record.items()))

    def saved(self, epochs_completed: int) -> None:
        """So many epochs are in a checkpoint now."""
        self.trackers.send([r for r in self.records if r["epoch"] <= epochs_completed])

    def advance(self, epoch: float, images: int, seconds: float) -> None:
        """Report `images` more in `seconds`; epoch: completed ones, with the share of this one."""
        self.epoch = epoch
        self.images_done += images
        self.seconds += seconds
        now = self._progress()
        self.display.show(epoch, progress_text(now), "train", **now)

    def evaluating(self, done: int, total: int) -> None:
        """Report that `done` of `total` held-out images are scored."""
        text = f"evaluated {done} of {total} images"
        self.display.show(self.epoch, text, "evaluate", **self._progress())

    def close(self, outcome: str) -> None:
        """The end: done, stopped or failed."""
        self.trackers.close()
        self.display.close()
        self.display.write(outcome, "train", **self._progress())

    def _progress(self) -> dict[str, Any]:
        rate = self.images_done / max(self.seconds, 1e-9)  # mean of this call
        left = max(0.0, (self.epochs_total - self.epoch) * self.images_per_epoch)
        return {
            "epoch": round(self.epoch, 4),
            "epochs_total": self.epochs_total,
            "images_per_second": round(rate, 2),
            "seconds_left": round(left / rate, 1) if rate else None,  # nothing was trained yet
        }


def send_to_trackers(config: TrainingConfig, settings: Mapping[str, Any]) -> None:
    """Epochs of the log that no tracker has got: a kill came after their checkpoint was saved."""
    trackers = Trackers(config.output_dir, config.log_with, settings)
    trackers.send(read_log(config.output_dir / LOG))
    trackers.close()


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def unusual(names: Sequence[str]) -> set[str]:
    """Those that only accelerate can judge, which takes seconds to import."""
    return set(names) - {TENSORBOARD, NONE}  # always installed


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for a tracker that accelerate does not know, or whose package is missing."""
    if not (wanted := unusual(names)):
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    there = {str(name) for name in get_available_trackers()}
    for name in sorted(wanted):
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted([*LOGGER_TYPE_TO_CLASS, NONE]))
            raise ValueError(f"--log-with is {name!r}; choose of {known}")
        if name not in there:
            package = name.replace("_", "-")
            raise ValueError(f"--log-with {name}: the package is missing; pip install {package}")


# By tracker: the name of its run, and the last epoch that it got.
class _Told(TypedDict):
    ids: dict[str, str]
    sent: dict[str, Count]


class Trackers:
    """Sends each epoch once, also over kills and restarts; a tracker starts with the first."""

    def __init__(self, output_dir: Path, names: Sequence[str], settings: Mapping[str, Any]) -> None:
        self.output_dir, self.path, self.settings = output_dir, output_dir / TRACKERS, settings
        self.names = [name for name in dict.fromkeys(names) if name != NONE]
        stored = self._read()
        self.ids: dict[str, str] = stored["ids"]
        self.safe: dict[str, int] = stored["sent"]  # last epoch that a kill cannot take
        self.sent = dict(self.safe)
        self.trackers: dict[str, Any] = {}

    def send(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Whatever of these epochs has not been sent."""
        for name in self.names:
            for record in records:
                if record["epoch"] > self.sent.get(name, 0):
                    values = {k: v for k, v in record.items() if k != "epoch" and v is not None}
                    tracker = self.trackers.get(name) or self._start(name)
                    tracker.log(values, step=record["epoch"], **LOG_OPTIONS.get(name, {}))
                    self.sent[name] = record["epoch"]
        if self.trackers:
            self._write()

    def close(self) -> None:
        """Finish what the trackers still have to write."""
        for tracker in self.trackers.values():
            tracker.finish()
        if self.trackers:
            self._write(closed=True)

    def _start(self, name: str) -> Any:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        is_new = name not in self.ids
        options = self._start_options(name)
        run = name if name == TENSORBOARD else PROJECT  # there it is a folder of logging_dir
        self.trackers[name] = tracker = LOGGER_TYPE_TO_CLASS[name](run, **options)
        tracker.start()
        if name == "mlflow":  # it gives the names itself
            self.ids[name] = tracker.active_run.info.run_id
        if is_new and name != TENSORBOARD:  # its hparams would be a second run there
            plain = bool | int | float | str
            settings = {k: v if isinstance(v, plain) else str(v) for k, v in self.settings.items()}
            tracker.store_init_configuration(settings)
        self._write()
        return tracker

    def _start_options(self, name: str) -> dict[str, Any]:
        """What makes a tracker go on with the run of an earlier call."""
        run_id, output_dir = self.ids.get(name), self.output_dir
        if name == "mlflow":
            return {"run_id": run_id} if run_id else {"run_name": output_dir.name}
        run_id = self.ids.setdefault(name, uuid.uuid4().hex[:12])
        options: dict[str, dict[str, Any]] = {
            TENSORBOARD: {"logging_dir": output_dir, "purge_step": self.sent.get(name, 0) + 1},
            "wandb": {
                "id": run_id, "name": output_dir.name, "resume": "allow", "dir": str(output_dir),
            },
            "trackio": {"name": f"{output_dir.name}-{run_id}", "resume": "allow"},
        }  # fmt: skip
        return options.get(name, {})

    def _read(self) -> _Told:
        try:
            return cast(_Told, read_json(self.path, _Told))
        except FileNotFoundError:
            pass
        except ValueError as error:  # it decides nothing: a run does not end for it
            logger.warning("%s: trackers get a new run", error)
        return {"ids": {}, "sent": {}}

    def _write(self, *, closed: bool = False) -> None:
        self.safe |= {n: e for n, e in self.sent.items() if closed or n not in BUFFERING}
        write_json(self.path, {"ids": self.ids, "sent": self.safe})
