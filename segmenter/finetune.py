"""Finetuning: what a segmentation model gives the trainer. Read engine/trainer.py first.

dataset = read_description(config.run.dataset)
finetune(config, dataset)           # all of it, or what is left
"""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

from common.environment import versions
from common.files import write_json
from common.formats import parsed_plain
from common.interruption import Interruption
from common.step_files import AREAS, BEST, CHECKPOINT, PREDICTIONS, RESULT
from engine.devices import device_name
from engine.schedule import BatchPlan
from engine.task import Built, Earlier, Evaluation, Run, State, Task
from engine.trainer import save, train
from engine.vit import IMAGE_CHANNELS
from segmenter.check import all_settings, earlier_output, plan_batches
from segmenter.config import (
    RANDOM,
    SCORES,
    EncoderConfig,
    ModelConfig,
    OptimisationConfig,
    ProbeConfig,
    ProtocolConfig,
    TrainConfig,
)
from segmenter.data import TrainingCrops, WholeImages, collate, start_worker
from segmenter.dataset import DatasetDescription, read_classes
from segmenter.encoder import Encoder, EncoderShape, read_encoder, start_encoder
from segmenter.evaluate import evaluate_model, evaluate_some
from segmenter.libraries import LibraryEncoder, LibraryShape, encoder_cost, freeze_unused, make_encoder
from segmenter.loading import load_checkpoint
from segmenter.model import Segmenter, SegmenterShape, TrainingLoss
from segmenter.predict import draw_predictions

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "onedl-mmsegmentation", "onedl-mmcv")
ADAM_BETA2 = 0.999


def finetune(config: TrainConfig, dataset: DatasetDescription) -> bool:
    """Run a finetuning, or what is left of it; see `engine.trainer.train`."""
    with Interruption() as interruption:
        return train(Finetuning(config, dataset), interruption)


class Finetuning(Task):
    """A ViT encoder with a decoder, on images with a class for every pixel."""

    counts: ClassVar[tuple[str, ...]] = ()
    remedy = "the last checkpoint is from before. A lower --lr or --clip-grad 1 may help"

    def __init__(self, config: TrainConfig, dataset: DatasetDescription) -> None:
        optimisation = config.optimisation
        self.config, self.run, self.dataset = config, config.run, dataset
        self.settings = all_settings(config, dataset)
        self.seed, self.clip_grad = optimisation.seed, optimisation.clip_grad
        self.rate_at = optimisation.rate_at
        self.epochs = self.total_epochs = optimisation.epochs
        self.values_per_image = config.protocol.crop_size**2
        self.auto_batch = config.run.device_batch_size == "auto"
        self.evaluations, self.num_heldout = optimisation.evaluations, len(dataset.val)
        self.classes = read_classes(dataset)
        self.collate, self.start_worker = collate, start_worker

    def find_earlier(self) -> Earlier:
        """result.json, with which all is done, or checkpoint.pth."""
        path = earlier_output(self.config, self.dataset)
        if path is None or path.name == RESULT:
            return Earlier(path=path, is_complete=path is not None)
        return Earlier(path=path, checkpoint=load_checkpoint(path))

    def build(self, accelerator: Accelerator, checkpoint: dict[str, Any]) -> Built:
        """The model as a checkpoint says, or with the encoder of --init."""
        config = self.config
        if checkpoint:
            source = f"{self.run.output_dir / CHECKPOINT}: shape"
            shape = parsed_plain(SegmenterShape, checkpoint["shape"], source)
            model = Segmenter(shape, config.model)
        else:
            num_classes = self.dataset.num_classes
            model = start_model(config.init, config.model, config.protocol, num_classes)
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            # UPerNet's means are over the batch of all GPUs; on CPUs torch has no such layer.
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model.to(accelerator.device)
        if isinstance(model.encoder, LibraryEncoder):
            freeze_unused(model.encoder)
        dataset, protocol, scaling = self.dataset, config.protocol, model.interpolation
        self.train_set = TrainingCrops(dataset, dataset.train, protocol, self.seed, scaling)
        self.images = WholeImages(dataset, dataset.val, protocol, scaling)
        loss = TrainingLoss(model, self.dataset.ignored)
        return Built(model, loss, make_optimizer(model, config.optimisation))

    def plan(self, processes: int) -> BatchPlan:
        """As many images at once as --device-batch-size allows."""
        return plan_batches(self.config, self.dataset, processes)

    def example(self, images: int) -> tuple[Tensor, ...]:
        """Empty crops."""
        side = self.config.protocol.crop_size
        crops = torch.zeros(images, IMAGE_CHANNELS, side, side, dtype=torch.uint8)
        return crops, crops[:, 0], torch.full((images, 2), side)

    def describe(self) -> str:
        """Model, dataset and recipe."""
        config, dataset, optimisation = self.config, self.dataset, self.config.optimisation
        return (
            f"{config.model.model} with {config.model.decoder}, {dataset.name}: "
            f"{len(dataset.train)} training and {len(dataset.val)} test images, "
            f"{dataset.num_classes} classes; {optimisation.optimizer}, rate {optimisation.lr:g}; "
            f"recipe {config.run.recipe}"
        )

    def evaluate(self, run: Run, state: State) -> Evaluation | None:
        """Scores in percent, every so many epochs and at the end; areas are left in a file."""
        number = state.epochs_completed + 1
        if number % self.config.optimisation.eval_every and number != self.epochs:
            return Evaluation({})
        save(run, state)  # it may take longer than the epoch
        # Running means of UPerNet's norms differ by process on CPUs; the first one's are saved.
        broadcast(list(run.model.buffers()))
        areas = evaluate_model(
            run.accelerator, run.model, self.images, self.config.run,
            on_progress=run.logbook.evaluating if run.logbook else None,
            interruption=run.interruption,
        )  # fmt: skip
        if areas is None:
            return None
        if run.accelerator.is_main_process:  # of this evaluation, or of one that is made again
            areas.save(self.run.output_dir / AREAS, [pair.name for pair in self.dataset.val])
        state.scores = scores = areas.scores(self.classes.names)
        is_best = state.best_score is None or scores["mean_iou"] > state.best_score
        if is_best:
            state.best_score = scores["mean_iou"]
        return Evaluation({f"val_{name}": scores[name] for name in SCORES}, is_best)

    def evaluate_some(self, run: Run, images: int) -> None:
        """To see how long it takes."""
        evaluate_some(run.accelerator, run.model, self.images, self.config.run, images)

    def record(self, run: Run, state: State, scores: dict[str, float]) -> dict[str, Any]:
        """Loss, rate, speed and scores."""
        steps = run.plan.steps_per_epoch
        updates = (state.epochs_completed + 1) * steps
        return {
            "num_updates": updates,
            "train_loss": state.sums["loss"] / steps,
            "train_learning_rate": self.rate_at((updates - 1) / (steps * self.epochs)),
            "unreadable_images": round(state.sums["unreadable_images"]),
            **run.speed(state),
            **scores,
        }

    def extra_state(self, run: Run) -> dict[str, Any]:
        """What evaluating and predicting need without the dataset."""
        return {
            "shape": dataclasses.asdict(run.model.shape),
            "classes": list(self.classes.names),
            "palette": self.classes.palette.tolist(),
            "dataset": {"name": self.dataset.name, "reduce_zero_label": self.dataset.reduce_zero_label},
            "protocol": self.config.protocol.described(),
        }

    def checkpoint_names(self, epochs_completed: int, *, is_best: bool) -> Sequence[str]:
        """checkpoint.pth, and best.pth if this is the best."""
        return (BEST, CHECKPOINT) if is_best else (CHECKPOINT,)

    def after_round(self, run: Run, state: State) -> None:
        """Draw; then the last epoch's scores (percent, 0 to 100) and all that they depend on."""
        folder = self.run.output_dir
        draw_predictions(run.accelerator, run.model, self.images, self.classes, folder / PREDICTIONS)
        assert state.scores is not None
        result = {
            "format_version": 1,
            "epochs": self.epochs,
            "num_updates": self.epochs * run.plan.steps_per_epoch,
            **{name: state.scores[name] for name in SCORES},
            "best_mean_iou": state.best_score,
            "class_iou": state.scores["class_iou"],
            "unreadable_images": state.scores.get("unreadable_images", 0),
            "seed": self.seed,
            "minutes": state.total_seconds / 60,
            "recipe": self.config.recipe(),
            **depends_on(self.config, run.accelerator, self.dataset, run.model),
        }
        write_json(folder / RESULT, result)


def start_model(
    init: Path | str, config: EncoderConfig, protocol: ProtocolConfig, num_classes: int
) -> Segmenter:
    """A new model, its encoder from `init`; with a linear decoder if only the encoder is given."""
    whole = config if isinstance(config, ModelConfig) else None
    pyramid, weights = whole is not None and whole.decoder == "upernet", dict[str, Tensor]()
    made: LibraryEncoder | None = None
    encoder: EncoderShape | LibraryShape
    if isinstance(init, str) and init != RANDOM:
        drop_path = whole.drop_path if whole else 0.0
        made = make_encoder(init, protocol.crop_size, pyramid=pyramid, drop_path=drop_path)
        encoder = made.shape
    elif isinstance(init, Path):
        weights, stored = read_encoder(init, config, pyramid=pyramid)
        encoder = replace(stored, grid=-(-protocol.crop_size // stored.patch_size))
    else:
        patch = config.patch_size or config.encoder.patch_size
        grid = -(-protocol.crop_size // patch)
        encoder = EncoderShape(model=config.model, patch_size=patch, in_channels=IMAGE_CHANNELS, grid=grid)
    shape = SegmenterShape(
        encoder=encoder, decoder=whole.decoder if whole else "linear",
        decoder_layers=whole.decoder_layers if whole else 0,
        num_classes=num_classes, normalization=protocol.normalization,
    )  # fmt: skip
    model = Segmenter(shape, whole, made)
    if isinstance(encoder, LibraryShape):
        text = "the encoder is %s: stride %d, width %d, mean %s, deviation %s, images scaled %s"
        values = encoder.patch_size, encoder.widths[-1], encoder.mean, encoder.std, encoder.interpolation
        logger.info(text, init, *values)
    elif init == RANDOM:
        logger.info("the encoder starts from random weights")
    else:
        assert isinstance(model.encoder, Encoder)
        fresh = start_encoder(model.encoder, weights)
        logger.info(
            "the encoder starts from %s, %d input channels; fresh: %s",
            init, encoder.in_channels, ", ".join([*fresh, "the decoder"]),
        )  # fmt: skip
    return model


def make_optimizer(model: Segmenter, optimisation: OptimisationConfig) -> Optimizer:
    """SGD or AdamW, without decay of what is no matrix, slower for earlier blocks.

    Groups carry `lr_scale`, by which the schedule's rate is multiplied: layer-wise rate decay
    (Clark et al. 2020, arXiv:2003.10555; as BEiT and MAE finetune) as timm has it. The decoder has
    1, the encoder's last block layer_decay, its embeddings the least.
    """
    of_parameter = {
        parameter: (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(
            model, optimisation.weight_decay, model.no_weight_decay(),
            layer_decay=optimisation.layer_decay,
        )
        for parameter in group["params"]
    }  # fmt: skip
    # One group for each pair of values, in the order of the model: what optimizer states in
    # checkpoints are stored by.
    members: dict[tuple[float, float], list[Parameter]] = {}
    for parameter in filter(of_parameter.__contains__, model.parameters()):  # the others are frozen
        members.setdefault(of_parameter[parameter], []).append(parameter)
    groups = [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in members.items()
    ]
    if optimisation.optimizer == "sgd":
        return SGD(groups, lr=optimisation.lr, momentum=optimisation.momentum, fused=True)
    betas = (optimisation.momentum, ADAM_BETA2)
    return AdamW(groups, lr=optimisation.lr, betas=betas, fused=True)


def depends_on(
    config: TrainConfig | ProbeConfig, accelerator: Accelerator, dataset: DatasetDescription,
    model: Segmenter,
) -> dict[str, Any]:  # fmt: skip
    """What scores depend on, in every result.json; and what the encoder costs."""
    encoder = model.shape.encoder
    return {
        "protocol": config.protocol.described(),
        "model": encoder.name if isinstance(encoder, LibraryShape) else encoder.model,
        "encoder": encoder_cost(model.encoder, config.protocol.window_size, accelerator.device),
        "init": str(config.init),
        "dataset": {"name": dataset.name, "num_classes": dataset.num_classes, "num_val": len(dataset.val)},
        "versions": versions(PACKAGES),
        "device": device_name(accelerator.device),
        "num_processes": accelerator.num_processes,
        "settings": all_settings(config, dataset),
    }
