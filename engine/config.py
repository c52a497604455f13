"""How a call runs, whatever it trains: the options that both parts have, and what it runs on."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from common.environment import PROCESSES_HERE, number_of
from common.files import NOTHING_WRITTEN
from common.options import MOST_PROCESSES, OptionGroup, load_plugin, option
from common.step_files import LOCK, LOG, OF_RUNS, PROGRESS, TENSORBOARD, TRACKERS
from engine.vit import VIT_SIZES, VitSize

Precision = Literal["auto", "bf16", "bf16-residual", "float8", "fp16", "fp32"]
AHEAD_BYTES = 2 * 2**30  # of a call's loaders together, unless a batch each is more


def _load_plugin(path: Path) -> None:
    load_plugin(path)
    # What a dictionary takes is judged by nobody; a method is, by its class.
    if wrong := [name for name, size in VIT_SIZES.items() if not isinstance(size, VitSize)]:
        raise ValueError(f"--plugin {path}: VIT_SIZES[{wrong[0]!r}] is no VitSize")


@dataclass(frozen=True, kw_only=True)
class PluginConfig(OptionGroup):
    """For commands that know methods or models."""

    title: ClassVar[str] = "Options"
    plugin: Path | None = option(
        "Python file with masking methods or models of your own.", None, neutral=True, early=_load_plugin
    )


@dataclass(frozen=True, kw_only=True)
class DeviceConfig(PluginConfig):
    """Where a command runs; only `precision` changes more than the rounding."""

    title: ClassVar[str] = "Devices"
    device: Literal["auto", "cpu", "cuda"] = option("auto: a GPU if there is one.", "auto", neutral=True)
    precision: Precision = option(
        "auto: bf16 where a GPU has it, fp16 (with loss scaling) on other GPUs, fp32 on a CPU. In training, "
        "bf16-residual: the sums of the blocks in bf16, too; float8: that, and the encoder's matrices by "
        "torchao.", "auto",
    )  # fmt: skip
    attention: Literal["auto", "cudnn", "flash", "efficient", "math"] = option(
        "torch's kernel that comes first; others do what it cannot. auto: cudnn on Hopper.", "auto",
        neutral=True,
    )  # fmt: skip
    workers: int | None = option(
        "Loader processes per device. Default: by the number of cores.", None,
        at_least=0, at_most=MOST_PROCESSES, neutral=True,
    )  # fmt: skip

    @property
    def loader_workers(self) -> int:
        """Of this process, among the others on its machine."""
        return self.workers_of(max(number_of("LOCAL_WORLD_SIZE", 1), number_of(PROCESSES_HERE, 1), 1))

    def workers_of(self, processes: int) -> int:
        """Of each of so many; by default the cores that are left to it but one, at most 12."""
        if self.workers is not None:
            return self.workers
        return max(1, min(12, len(os.sched_getaffinity(0)) // processes - 1))


def batches_ahead(workers: int, batch_bytes: int) -> int:
    """How many batches of that size each loader process of a call holds ready in /dev/shm."""
    return max(1, min(4, AHEAD_BYTES // (workers * batch_bytes)))


@dataclass(frozen=True, kw_only=True)
class OutputConfig(DeviceConfig):
    """Where a run goes."""

    title: ClassVar[str] = "Run"
    output_dir: Path = option("Where everything goes.", neutral=True)

    def check_folder(self, own: Collection[str], *, is_run: bool) -> None:
        """Raise ValueError if files of the output directory are not those of such a run.

        own: patterns of their names. is_run: whether there is something to go on from; a run that
        was killed before has left its lock.
        """
        folder = self.output_dir
        for pattern in set(OF_RUNS) - set(own):
            for path in folder.glob(pattern):
                raise ValueError(f"--output-dir: {path} is of a run of another kind")
        trackers = folder / TENSORBOARD
        if os.path.lexists(trackers) and not trackers.is_dir():
            raise ValueError(f"--output-dir: {trackers} is no folder; {NOTHING_WRITTEN}")
        for path in (path for pattern in (*own, LOG, PROGRESS, TRACKERS) for path in folder.glob(pattern)):
            if path.exists() and not path.is_file():
                raise ValueError(f"--output-dir: {path} is no regular file; {NOTHING_WRITTEN}")
            if not is_run and not (folder / LOCK).exists():
                raise ValueError(
                    f"--output-dir: {path} is there, and no run here made it; name another folder; "
                    f"{NOTHING_WRITTEN}"
                )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(OutputConfig):
    """How a training is kept."""

    compile: Literal["auto", "on", "off"] = option("torch.compile; auto: on a GPU.", "auto", neutral=True)
    compile_mode: Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs"] = option(
        "What torch.compile aims at.", "default", neutral=True
    )
    compile_regions: bool = option(
        "Compile a block once for all that are alike: sooner done, a little slower then.", False, neutral=True
    )
    activation_checkpointing: bool = option(
        "Keep a block's input only, and compute it twice: much less memory, a third slower.", False,
        neutral=True, memory=True,
    )  # fmt: skip
    resume: Literal["auto", "never", "required"] = option("Continue what is there?", "auto", neutral=True)
    save_every_minutes: float | None = option(
        "Also save inside an epoch. Default: after epochs only.", None, above=0, neutral=True
    )
    keep_optimizer: bool = option(
        "In every checkpoint, which is then three times as large; else in the rolling one alone.", False,
        neutral=True,
    )  # fmt: skip
    log_with: tuple[str, ...] = option(
        "Trackers of accelerate that get the values of log.txt: tensorboard, wandb, ...; or none.",
        ("tensorboard",), neutral=True,
    )  # fmt: skip

    def check_passes(self, passes: int) -> None:
        """Raise ValueError if so many forward passes per step cannot be compiled as asked for."""
        # A CUDA graph may take over the buffers that gradients are added to: of four passes the last
        # one counts (https://github.com/pytorch/pytorch/issues/169545).
        if passes > 1 and self.compile_mode == "reduce-overhead" and self.compile != "off":
            raise ValueError(
                f"--compile-mode reduce-overhead: gradients of {passes} passes per step would be lost; "
                "give a larger batch per device, or leave it out"
            )

    def check_resume(self, found: Path | None) -> None:
        """Raise ValueError if `found`, an earlier call's file, is not what --resume asks for."""
        if self.resume == "required" and found is None:
            raise ValueError(f"--resume required: there is no checkpoint in {self.output_dir}")
        if self.resume == "never" and found is not None:
            raise ValueError(
                f"--resume never: {found} is there already; remove it or use another --output-dir"
            )
