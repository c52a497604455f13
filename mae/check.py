"""`pretrain --dry-run check`: all that can be known before the work starts. Writes nothing.

`benchmark.py` calls `check_pretraining` in its own process, which never loads torch: what takes
torch to look into is judged apart, by `look_inside`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.console import heavy_imports
from common.files import check_output_folder
from common.images import ImagePath, evenly_spread
from common.step_files import OF_PRETRAINING, find_resumable
from engine.config import batches_ahead
from engine.logbook import check_trackers, unusual
from engine.schedule import BatchPlan
from mae.config import PretrainConfig, make_method

SOME = 4  # images that `doctor` opens
Listings = dict[Any, Any]  # what was listed before, so that it is listed once; see `make_listing`


@dataclass(frozen=True, kw_only=True)
class PretrainFacts:
    """What a run will be."""

    train: int  # images
    left_out: int  # those that have no segment
    val: int
    val_left_out: int
    digest: str = ""  # of the list of training images
    plan: BatchPlan
    # (epoch, rate, what is there) at the epochs that matter, ascending.
    learning_rates: tuple[tuple[float, float, str], ...]
    checkpoint_bytes: int  # about the size of one with the optimizer
    some_images: tuple[ImagePath, ...]  # training images, evenly spread

    @property
    def model_bytes(self) -> int:
        """About the size of one without: AdamW keeps two numbers of each weight."""
        return self.checkpoint_bytes // 3


def check_pretraining(
    config: PretrainConfig, processes: int, *, packed: bool = True, known: Listings | None = None
) -> PretrainFacts:
    """What the run will be. Raises ValueError for what would stop it at once.

    packed, known: see `make_listing`.
    """
    from mae.listing import make_listing  # numpy, and what reads segments: not for --help

    listing = make_listing(config.data, config.method, packed=packed, known=known)
    plan = plan_batches(config, len(listing.train), processes)
    # Last, since a wrong dataset is the likelier mistake: it writes only over what is its own.
    run, folder = config.optimisation, config.run.output_dir
    found, end, whole = find_resumable(folder), config.epochs_this_round, plan.epochs_until(run.epochs)
    check_output_folder(folder, reads=config.data.reads)
    config.run.check_folder(OF_PRETRAINING, is_run=found is not None)
    config.run.check_resume(found)
    named = {  # of two at the same place, the later counts
        min(end, whole): "end of this round", whole / 2: "middle",
        run.warmup_fraction * whole: "end of warm-up", 0: "start", whole: "end",
    }  # fmt: skip
    return PretrainFacts(
        train=len(listing.train), left_out=listing.left_out, val=len(listing.val),
        val_left_out=listing.val_left_out, plan=plan, digest=listing.digest,
        learning_rates=tuple((n, run.rate_at(n / whole), named[n]) for n in sorted(named)),
        checkpoint_bytes=config.model.checkpoint_bytes,
        some_images=tuple(
            listing.train_folder / listing.train[index].decode()
            for index in evenly_spread(range(len(listing.train)), SOME)
        ),
    )  # fmt: skip


def plan_batches(config: PretrainConfig, num_images: int, processes: int) -> BatchPlan:
    """Split the effective batch into equal parts of at most --batch-size images per process.

    Raises ValueError if that cannot be, or if there are fewer images than one batch.
    """
    effective = config.optimisation.effective_batch_size
    if num_images < effective:
        raise ValueError(f"--effective-batch-size {effective}: there are images for at most {num_images}")
    if effective % processes:
        raise ValueError(
            f"--effective-batch-size {effective} cannot be split over {processes} processes: "
            f"give a multiple of {processes}"
        )
    share = effective // processes
    accumulation = math.ceil(share / config.run.most_at_once)
    while share % accumulation:  # equal parts, so that each weighs the same
        accumulation += 1
    plan = BatchPlan(
        num_images=num_images, effective_batch_size=effective, processes=processes,
        micro_batch_size=share // accumulation, seed=config.optimisation.seed,
        end=config.optimisation.end,
    )  # fmt: skip
    config.run.check_passes(plan.accumulation_steps)
    return plan


def shared_memory_bytes(config: PretrainConfig, plan: BatchPlan, processes: int) -> int:
    """About what the loaders of so many processes on one machine hold ready in /dev/shm."""
    workers, share = config.run.workers_of(processes), plan.effective_batch_size // plan.processes
    at_once = share if config.run.batch_size == "auto" else plan.micro_batch_size
    batch_bytes = at_once * 4 * config.model.image_size**2  # RGB, and what is hidden
    return processes * workers * batches_ahead(workers, batch_bytes) * batch_bytes if workers else 0


def needs_torch(config: PretrainConfig) -> bool:
    """Whether there is something that only `look_inside` can judge."""
    # torch takes seconds to import, and a planner has tens of runs.
    run = config.run
    return bool(run.init or find_resumable(run.output_dir) or unusual(run.log_with))


def look_inside(config: PretrainConfig, known: Listings | None = None) -> None:
    """Raise ValueError unless checkpoints and trackers are what the run needs; loads torch."""
    check_trackers(config.run.log_with)
    if (path := find_resumable(config.run.output_dir)) is not None:
        with heavy_imports():
            from mae.listing import make_listing
            from mae.weights import open_own_checkpoint
        listing = make_listing(config.data, config.method, known=known)
        open_own_checkpoint(config, listing, path, lazily=True)
    elif config.run.init is not None:  # a run that goes on does not look at it again
        _check_init(config, config.run.init)


def _check_init(config: PretrainConfig, path: Path) -> None:
    """Whether an official checkpoint fits the model, by shapes alone."""
    with heavy_imports():
        import torch

        from engine.weights import CLASSIFIERS, read_vit_weights
        from mae.model import MaskedAutoencoder
        from mae.weights import fit_official
    weights = read_vit_weights(path, ignored=CLASSIFIERS, lazily=True)
    with torch.device("meta"):  # no memory is taken for a model of 600 million weights
        model = MaskedAutoencoder(config.model, make_method(config.method, config.model))
    try:
        fit_official(model.state_dict(), weights)
    except ValueError as error:
        raise ValueError(f"--init {path}: {error}") from error


def segments_at(path: Path) -> Literal["packed", "loose", "none"]:
    """In which form there are segments: training reads packed ones only."""
    from segments.forms import form_of
    from segments.store import PackedStore

    form = form_of(path)
    return "packed" if form == PackedStore.name else "none" if form == "none" else "loose"
