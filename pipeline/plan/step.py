"""What a plan consists of: child processes, told by options or words, which meet in files only."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from common import step_files as files
from mae.check import PretrainFacts
from mae.config import GROUPS as PRETRAIN_GROUPS
from mae.config import PretrainConfig
from segmenter.check import ScoringFacts
from segmenter.config import GROUPS as FINETUNE_GROUPS
from segmenter.config import PROBE_GROUPS, ProbeConfig, TrainConfig

Facts = PretrainFacts | ScoringFacts
PartConfig = PretrainConfig | TrainConfig | ProbeConfig
# What the options that pass something on are made of.
PARTS = {"pretrain": PRETRAIN_GROUPS, "finetune": FINETUNE_GROUPS, "probe": PROBE_GROUPS}
Kind = Literal["fetch", "pack", "generate", "merge", "pretrain", "probe", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One child process and what it has to leave behind."""

    name: str  # unique, usable as a file name: pretrain_four_channels_5
    kind: Kind
    what: str  # it does, in a few words
    run: str  # the run's name; its folder is called so
    epochs: int = 0  # of pretraining, completed when the step is done
    program: tuple[str, ...]  # Python module and command, such as ("mae", "pretrain")
    # What it is told: a part's options, or for a step that trains and scores nothing, words.
    config: PartConfig | None = None
    words: tuple[str, ...] = ()
    folder: Path  # where it writes, console.log included
    device: Literal["auto", "cpu", "cuda"] = "auto"
    nodes: int = 1  # machines that share it
    processes: int = 1  # on each
    needs: tuple[str, ...] = ()  # names of steps
    outputs: tuple[Path, ...]  # files that have to be there, and not empty, afterwards
    # All that decides what it makes, plain; paths in the output directory are relative to it.
    settings: Mapping[str, Any] = field(default_factory=dict)
    # GPUs of this machine, of which it gets one for each process; None = all that are visible.
    gpus: tuple[int, ...] | None = None
    # How torchrun's processes find each other; one machine picks a free port by itself.
    rendezvous: tuple[str, ...] = ("--standalone",)
    facts: Facts | None = None  # what its check found, where it was checked and is a part's

    @property
    def plugin(self) -> Path | None:
        """Whose code is part of what it runs."""
        return self.config.run.plugin if self.config else None

    @property
    def console_log(self) -> Path:
        """What the step printed."""
        return self.folder / files.CONSOLE_LOG

    @property
    def devices(self) -> int:
        """What it occupies: GPUs, or 1 for the CPU."""
        return self.processes if self.device == "cuda" else 1

    @property
    def places(self) -> int:
        """How many steps like it run beside each other: as many as there are GPUs for."""
        return max(1, len(self.gpus or ()) // self.processes)

    @property
    def lane(self) -> str:
        """Without GPUs, steps of different lanes may run beside each other."""
        return "evaluate" if self.kind == "probe" else self.kind  # both need a checkpoint

    @property
    def command(self) -> list[str]:
        """The command line; torchrun's module form when there are several processes."""
        words = ["-m", *self.program, *(self.config.arguments() if self.config else self.words)]
        if self.processes > 1 or self.rendezvous != ("--standalone",):
            launch = ["-m", "torch.distributed.run", *self.rendezvous]
            words = [*launch, f"--nproc-per-node={self.processes}", *words]
        return [sys.executable, *words]

    def with_options(self, **groups: Mapping[str, Any]) -> Self:
        """The same with other options: with_options(data={"masks_dir": path})."""
        config: Any = self.config
        changed = {name: replace(getattr(config, name), **groups[name]) for name in groups}
        return replace(self, config=replace(config, **changed))


def step_of_words(
    room: str, kind: Kind, subject: str, words: Sequence[str], what: str, folder: Path, out: Path, **more: Any
) -> Step:
    """A step that trains and scores nothing."""
    return Step(
        name=f"{kind}_{subject}", kind=kind, what=what, run=room, program=(room, kind),
        words=tuple(words), folder=folder, outputs=(out,), **more,
    )  # fmt: skip
