"""Pretraining: what a masked autoencoder gives the trainer. Read engine/trainer.py first.

pretrain(config)    # a round, or what is left of it
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.environment import peak_flops, world_size
from common.images import evenly_spread
from common.interruption import Interruption
from common.step_files import LAST, checkpoint_path, find_resumable, reconstructions_path
from engine.devices import device_name
from engine.schedule import BatchPlan
from engine.task import Built, Earlier, Evaluation, Run, State, Task, start_loader_process
from engine.trainer import train
from engine.vit import IMAGE_CHANNELS
from engine.weights import CLASSIFIERS, read_vit_weights
from mae.check import check_pretraining, look_inside, plan_batches
from mae.config import OptimisationConfig, PretrainConfig, make_method, training_flops
from mae.controls import SegmentSource
from mae.data import MaskedImages, collate
from mae.hidden import Hidden
from mae.listing import make_listing
from mae.model import MaskedAutoencoder
from mae.reconstruct import FIXED_SET_SIZE, draw_reconstructions
from mae.weights import open_own_checkpoint, start_from_official

logger = logging.getLogger(__name__)

BETAS = (0.9, 0.95)
FEW_IMAGES = 64  # not worth starting loader processes for


def pretrain(config: PretrainConfig) -> bool:
    """Run one round of pretraining, or what is left of it; see `engine.trainer.train`."""
    with Interruption() as interruption:  # from now on: listing a million images takes a while
        known: dict[Any, Any] = {}  # the images are listed once
        check_pretraining(config, processes=world_size(), known=known)  # before anything is written
        look_inside(config, known)
        return train(Pretraining(config, known), interruption)


class Pretraining(Task):
    """A masked autoencoder on ImageNet's images."""

    remedy = "the last checkpoint is from before. A lower --base-lr or --clip-grad 1 may help"
    counts: ClassVar[tuple[str, ...]] = ("coverage", "coverage_square")

    def __init__(self, config: PretrainConfig, known: dict[Any, Any] | None = None) -> None:
        optimisation = config.optimisation
        self.config, self.run, self.settings = config, config.run, config.settings()
        self.seed, self.clip_grad = optimisation.seed, optimisation.clip_grad
        self.rate_at = optimisation.rate_at
        self.epochs, self.total_epochs = config.epochs_this_round, optimisation.epochs
        self.values_per_image = config.model.image_size**2 * IMAGE_CHANNELS
        self.auto_batch = config.run.batch_size == "auto"
        self.listing = listing = make_listing(config.data, config.method, known=known)
        store, donors, segments = listing.source, listing.train, None
        if store is not None:
            segments = SegmentSource(store=store, donors=donors, options=config.method, seed=self.seed)
        self.train_set = self.images = MaskedImages(
            folder=listing.train_folder, paths=listing.train, segments=segments,
            method=make_method(config.method, config.model), seed=self.seed,
        )  # fmt: skip
        self.hidden = Hidden(self.images)
        self.collate, self.start_worker = collate, start_loader_process
        self.heldout = replace(self.images, folder=listing.val_folder, paths=listing.val, is_fixed=True)
        self.num_heldout = len(self.heldout)
        self.evaluations = self.total_epochs if self.num_heldout else 0

    def find_earlier(self) -> Earlier:
        """The furthest checkpoint; all is done if it is of this round's end, or beyond."""
        path, own = find_resumable(self.run.output_dir), checkpoint_path(self.run.output_dir, self.epochs)
        self.run.check_resume(path)
        # The model before the first epoch is made anew, however far the run is.
        if path is None or (self.epochs == 0 and not own.is_file()):
            return Earlier()
        checkpoint = open_own_checkpoint(self.config, self.listing, path)
        # Rounds may be asked for in any order: this one's end may lie behind us.
        reached = checkpoint["epochs_completed"]
        if reached >= self.epochs and not own.is_file():
            raise ValueError(f"the run is at {reached} epochs already, but {own} is missing")
        # A kill may have come between the last checkpoint and its picture.
        is_drawn = reconstructions_path(path.parent, self.epochs).is_file()
        is_complete = reached > self.epochs or (reached == self.epochs and is_drawn)
        return Earlier(path=own if is_complete else path, checkpoint=checkpoint, is_complete=is_complete)

    def build(self, accelerator: Accelerator, checkpoint: dict[str, Any]) -> Built:
        """The autoencoder is its own loss module."""
        self.device = accelerator.device
        model = MaskedAutoencoder(self.config.model, self.images.method).to(self.device)
        if checkpoint:
            self.fixed_set = checkpoint["fixed_set"]
        else:
            if (init := self.config.run.init) is not None:
                fresh = start_from_official(model, read_vit_weights(init, ignored=CLASSIFIERS))
                logger.info("started from %s; fresh: %s", init, ", ".join(fresh) or "nothing")
            # The training images that every round's picture shows: evenly spread, with segments.
            paths = self.images.paths[evenly_spread(range(len(self.images)), FIXED_SET_SIZE)]
            fixed = replace(self.images, paths=paths, is_fixed=True)
            samples = [fixed[0, index] for index in range(len(fixed))]
            hidden = torch.tensor([sample.hidden_pixels for sample in samples])
            images, pattern = collate(samples).inputs
            self.fixed_set = {"images": images, "pattern": pattern, "hidden_pixels": hidden}
        return Built(model, model, make_optimizer(model, self.config.optimisation))

    def plan(self, processes: int) -> BatchPlan:
        """Equal micro-batches."""
        return plan_batches(self.config, len(self.images), processes)

    def example(self, images: int) -> tuple[Tensor, ...]:
        """Copies of an image of the fixed set."""
        return self.fixed_set["images"][[0] * images], self.fixed_set["pattern"][[0] * images]

    def describe(self) -> str:
        """Model, method, images, and how the rate follows from the batch."""
        optimisation, listing = self.config.optimisation, self.listing
        return (
            f"{self.config.model.model}, {self.config.method.mask_method}, {len(self.images)} "
            f"images ({listing.left_out} without a segment left out), {self.num_heldout} held out "
            f"({listing.val_left_out} left out); learning rate {optimisation.learning_rate:g} = "
            f"{optimisation.base_lr:g} x {optimisation.effective_batch_size} / 256"
        )

    def evaluate(self, run: Run, state: State) -> Evaluation:
        """The held-out loss, where there are held-out images."""
        if not self.num_heldout:
            return Evaluation({})
        if run.logbook is not None:
            run.logbook.evaluating(0, self.num_heldout)
        return Evaluation({"val_loss": self.heldout_loss(run, self.num_heldout)})

    def evaluate_some(self, run: Run, images: int) -> None:
        """To see how long it takes."""
        self.heldout_loss(run, images)

    @torch.no_grad()
    def heldout_loss(self, run: Run, images: int) -> float:
        """Mean squared error over all hidden pixels and channels of so many images of val/.

        They are always cropped and hidden in the same way; the processes share them.
        """
        accelerator, model = run.accelerator, run.model
        # The plain model: the compiled one would be compiled anew for the last, smaller batch.
        chosen = [(0, index) for index in evenly_spread(range(self.num_heldout), images)]
        share = chosen[accelerator.process_index :: accelerator.num_processes]
        sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        model.eval()
        loader: Any = DataLoader(
            self.heldout, sampler=share, batch_size=run.plan.micro_batch_size,
            num_workers=0 if len(share) <= FEW_IMAGES else self.run.loader_workers,
            collate_fn=collate, worker_init_fn=start_loader_process,
        )  # fmt: skip
        for batch in loader:
            for text in batch.unreadable:
                logger.warning("skipped %s", text)
            with accelerator.autocast():
                errors = model(*(tensor.to(sums.device) for tensor in batch.inputs))
            sums[0] += errors.double().sum()
            sums[1] += batch.num_values
        model.train()
        total = accelerator.reduce(sums, reduction="sum")
        return float(total[0] / total[1].clamp(min=1))

    def record(self, run: Run, state: State, scores: dict[str, float]) -> dict[str, Any]:
        """Losses, rate, what was hidden, cost and speed."""
        plan, epochs = run.plan, state.epochs_completed
        steps = plan.steps_in(epochs)
        images = steps * plan.effective_batch_size
        of_image = training_flops(self.config.model, self.images.method)
        coverage = state.sums["coverage"] / images
        if not coverage:
            raise RuntimeError(
                f"epoch {epochs + 1} hid nothing of any image, so that nothing was learned: "
                "`python -m segments check` and `inspect` look at the segments"
            )
        variance = max(0.0, state.sums["coverage_square"] / images - coverage**2)
        accelerator = run.accelerator
        last_step = epochs + (steps - 1) / plan.steps_per_epoch  # a step's rate is its beginning's
        record = {
            "train_loss": state.sums["loss"] / steps,
            **scores,
            "train_lr": self.rate_at(last_step / plan.epochs_until(self.total_epochs)),
            "coverage_percent_mean": coverage,
            "coverage_percent_std": math.sqrt(variance),
            **(self.hidden.in_epoch(epochs) if accelerator.is_main_process else {}),
            "train_flops": plan.images_per_epoch * of_image * plan.epochs_until(epochs + 1),
            "unreadable_images": round(state.sums["unreadable_images"]),
            **run.speed(state),
        }
        peak = peak_flops(device_name(accelerator.device), accelerator.mixed_precision)
        if peak is not None:
            record["mfu"] = images * of_image / state.seconds / (peak * accelerator.num_processes)
        return record

    def extra_state(self, run: Run) -> dict[str, Any]:
        """What drawing and continuing need."""
        return {
            "images": {"count": len(self.images), "digest": self.listing.digest},
            "fixed_set": self.fixed_set,
            "learning_rate": self.config.optimisation.learning_rate,
            "processes": run.plan.processes,
        }

    def checkpoint_names(self, epochs_completed: int, *, is_best: bool) -> Sequence[str]:
        """A round's own, and last.pth."""
        own = checkpoint_path(self.run.output_dir, epochs_completed).name
        if epochs_completed < self.epochs:
            return (LAST,)
        return (own, LAST) if self.epochs else (own,)

    def after_round(self, run: Run, state: State) -> None:
        """The picture that belongs to the round's checkpoint."""
        path = reconstructions_path(self.run.output_dir, self.epochs)
        draw_reconstructions(run.model, self.fixed_set, path)


def make_optimizer(model: nn.Module, optimisation: OptimisationConfig) -> torch.optim.AdamW:
    """AdamW as MAE uses it, over the trained parameters; biases and norms do not decay."""
    # A decay of 1, for two groups in any case: the order of parameters is part of checkpoints, and
    # there the matrices come first.
    without_decay, with_decay = param_groups_weight_decay(model, weight_decay=1.0)
    groups = [{**with_decay, "weight_decay": optimisation.weight_decay}, without_decay]
    return torch.optim.AdamW(groups, lr=optimisation.learning_rate, betas=BETAS, fused=True)
