"""--log-with: the values of log.txt to TensorBoard, Weights & Biases, ... through accelerate.

Trackers cannot take back what they got, so what they got is written down: .trackers.json holds the
last epoch sent and the names by which a run is found again.
"""

import logging
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import write_json
from common.formats import read_json

logger = logging.getLogger(__name__)

PROJECT = "segmae"
STATE = ".trackers.json"
NONE = "none"
# They keep what they got in memory until they are closed, and ignore a step that they have already.
BUFFERING = {"wandb"}
LOG_OPTIONS = {"wandb": {"commit": True}}  # it would hold a step back until the next


def unusual(names: Sequence[str]) -> set[str]:
    """Those that only accelerate can judge, which takes seconds to import."""
    return set(names) - {"tensorboard", NONE}  # always installed


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


class Trackers:
    """Sends each epoch once, also over kills and restarts; a tracker starts with the first."""

    def __init__(self, output_dir: Path, names: Sequence[str], settings: Mapping[str, Any]) -> None:
        self.output_dir, self.path, self.settings = output_dir, output_dir / STATE, settings
        self.names = [name for name in dict.fromkeys(names) if name != NONE]
        stored = self._read()
        self.ids: dict[str, str] = stored.get("ids", {})
        self.safe: dict[str, int] = stored.get("sent", {})  # last epoch that a kill cannot take
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
        run = name if name == "tensorboard" else PROJECT  # there it is a folder of logging_dir
        self.trackers[name] = tracker = LOGGER_TYPE_TO_CLASS[name](run, **options)
        tracker.start()
        if name == "mlflow":  # it gives the names itself
            self.ids[name] = tracker.active_run.info.run_id
        if is_new and name != "tensorboard":  # its hparams would be a second run there
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
            "tensorboard": {"logging_dir": output_dir, "purge_step": self.sent.get(name, 0) + 1},
            "wandb": {
                "id": run_id, "name": output_dir.name, "resume": "allow", "dir": str(output_dir),
            },
            "trackio": {"name": f"{output_dir.name}-{run_id}", "resume": "allow"},
        }  # fmt: skip
        return options.get(name, {})

    def _read(self) -> dict[str, Any]:
        try:
            return read_json(self.path, dict[str, dict[str, int | str]])
        except FileNotFoundError:
            return {}
        except ValueError as error:  # it decides nothing: a run does not end for it
            logger.warning("%s: trackers get a new run", error)
            return {}

    def _write(self, *, closed: bool = False) -> None:
        self.safe |= {n: e for n, e in self.sent.items() if closed or n not in BUFFERING}
        write_json(self.path, {"ids": self.ids, "sent": self.safe})
