"""Score models on whole images: the `evaluate` command, and what `train` and `probe` score with.

areas = evaluate_model(accelerator, model, WholeImages(description, pairs, protocol), devices)
print(areas.scores(classes.names)["mean_iou"])
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from common.files import NOTHING_WRITTEN, beside, check_output_folder
from common.images import Unreadable
from common.interruption import Interruption
from common.progress import Counter
from engine.devices import make_accelerator
from segmenter.config import EvaluateConfig, ProtocolChanges, ProtocolConfig, ScoringConfig
from segmenter.data import TestImage, WholeImages, test_images
from segmenter.dataset import Classes, DatasetDescription, read_classes, read_description
from segmenter.inference import predict_classes
from segmenter.labels import check_labels, read_label_file
from segmenter.loading import load_segmenter
from segmenter.metrics import Areas
from segmenter.model import Segmenter

MOST_CHECKED = 5000  # pairs that are looked at first


def evaluate_checkpoint(
    checkpoint: Path, evaluation: EvaluateConfig, changes: ProtocolChanges, devices: ScoringConfig
) -> dict[str, Any]:
    """Scores of a checkpoint, with what they depend on, in plain values.

    Raises ValueError for what the user can fix, before anything is written.
    """
    description = read_description(evaluation.dataset)
    pairs = description.pairs(evaluation.split)
    accelerator, loaded = make_accelerator(devices), load_segmenter(checkpoint)
    # By their number: other names for the same classes are no reason to refuse.
    own, wanted = loaded.classes, read_classes(description)
    if len(own) != len(wanted):
        raise ValueError(
            f"the checkpoint has {len(own)} classes ({own.names[0]}, ...), the dataset "
            f"{description.name} has {len(wanted)} ({wanted.names[0]}, ...)"
        )
    check_labels(description, pairs, most=MOST_CHECKED, forgiving=True)
    target = evaluation.save_predictions
    if target is not None:
        check_output_folder(target, "--save-predictions", reads=description.reads)
        if target.is_symlink() or (target.exists() and any(target.iterdir())):
            problem = "is a link" if target.is_symlink() else "is not empty"
            raise ValueError(f"--save-predictions {target} {problem}; {NOTHING_WRITTEN}")
    protocol = changes.applied_to(loaded.protocol)
    counter = Counter("evaluate", total=len(pairs))
    with _folder_at_once(target, accelerator) as folder, counter:

        def save(index: int, predicted: Tensor) -> None:
            assert folder is not None
            path, labels = folder / f"{pairs[index].name}.png", predicted.numpy()
            path.parent.mkdir(parents=True, exist_ok=True)  # a name may hold folders
            # In the numbering of the dataset's annotation files, so that they can be compared.
            Image.fromarray(labels + 1 if description.reduce_zero_label else labels).save(path)

        areas = evaluate_model(
            accelerator,
            loaded.model.to(accelerator.device),
            WholeImages(description, pairs, protocol),
            devices,
            on_prediction=save if folder else None,
            on_progress=counter.reach if accelerator.is_main_process else None,
        )
    assert areas is not None  # nothing interrupts it
    return _result(areas, own, description, protocol)


def evaluate_predictions(folder: Path, evaluation: EvaluateConfig) -> dict[str, Any]:
    """Scores of label maps that `--save-predictions` wrote, or that are annotations themselves.

    What a prediction leaves undecided (the ignored label) counts as wrong where the annotation
    has a class. Raises ValueError if a prediction is missing or does not fit.
    """
    if not folder.is_dir():
        raise ValueError(f"--predictions {folder} is not a folder")
    description = read_description(evaluation.dataset)
    classes, pairs = read_classes(description), description.pairs(evaluation.split)
    areas = Areas(len(pairs), len(classes), description.ignore_index)
    stored = []
    for pair in pairs:
        path = folder / f"{pair.name}.png"  # what this command saves, whatever the suffix there
        if not path.is_file():
            path = folder / f"{pair.name}{description.annotation_suffix}"
        stored.append(dataclasses.replace(pair, annotation=path))
    check_labels(description, [*pairs, *stored])  # all: nothing is skipped here
    for index, both in enumerate(zip(stored, pairs, strict=True)):
        predicted, labels = (torch.as_tensor(read_label_file(pair.annotation)) for pair in both)
        # uint8 wraps round: with reduce_zero_label 0 becomes 255, which is ignored.
        first = int(description.reduce_zero_label)
        areas.add(index, predicted - first, labels - first)
    return _result(areas, classes, description, None)


def _result(
    areas: Areas,
    classes: Classes,
    description: DatasetDescription,
    protocol: ProtocolConfig | None,  # None: of stored predictions, nobody knows
) -> dict[str, Any]:
    return {
        **areas.scores(classes.names),
        "dataset": {"name": description.name, "num_images": len(areas.by_image)},
        "protocol": protocol.described() if protocol else None,
    }


@contextlib.contextmanager
def _folder_at_once(path: Path | None, accelerator: Accelerator) -> Iterator[Path | None]:
    """A folder to write to that gets the name `path` only when everything is in it."""
    if path is None:
        yield None
        return
    unfinished = beside(path)
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a call that was killed
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unfinished.replace(path)  # an empty folder may be there


def evaluate_model(
    accelerator: Accelerator,
    model: Segmenter,
    images: WholeImages,
    scoring: ScoringConfig,
    *,
    on_prediction: Callable[[int, Tensor], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    interruption: Interruption | None = None,
) -> Areas | None:
    """Areas over all images and processes, the same on every process; None if interrupted.

    Images that cannot be used are named and left out; RuntimeError if they are too many.

    on_prediction gets (index, [H, W] uint8 classes) of every image of this process, on_progress the
    numbers of images done and in all.
    """
    device, ignored = accelerator.device, images.description.ignore_index
    areas = Areas(len(images), model.shape.num_classes, ignored, device)

    def count(usable: list[tuple[int, TestImage]]) -> None:
        shapes = [sample.labels.shape for _, sample in usable]
        scaled = [sample.scaled for _, sample in usable]
        predictions = list(predict_classes(model, scaled, shapes, images.protocol))
        for (index, sample), predicted in zip(usable, predictions, strict=True):
            areas.add(index, predicted, sample.labels.to(device, non_blocking=True))
        if on_prediction is not None and usable:
            # All of a group at once: each copy from a GPU waits for it.
            together = torch.cat([predicted.flatten() for predicted in predictions]).cpu()
            parts = together.split([shape.numel() for shape in shapes])
            for (index, _), part, shape in zip(usable, parts, shapes, strict=True):
                on_prediction(index, part.view(shape))

    unreadable = each_group(
        accelerator, model, images, scoring, count,
        on_progress=on_progress, interruption=interruption,
    )  # fmt: skip
    if unreadable is None:
        return None
    # Each process has zeros for the images of the others, and integers add up exactly.
    areas.by_image = accelerator.reduce(areas.by_image, reduction="sum").cpu()
    areas.unreadable_images = unreadable
    return areas


def each_group(
    accelerator: Accelerator,
    model: Segmenter,
    images: WholeImages,
    scoring: ScoringConfig,
    work: Callable[[list[tuple[int, TestImage]]], None],
    *,
    on_progress: Callable[[int, int], None] | None = None,
    interruption: Interruption | None = None,
) -> int | None:
    """Give `work` the usable images of each group of this process, with their indices.

    Groups are `eval_batch_size` neighbours, and whole groups are given out: the arithmetic, and so
    the areas, are exactly the same for any number of processes. Returns how many images of all
    processes were not usable; None if interrupted.
    """

    def total(number: float) -> float:
        """Of all processes, which have to ask at the same time."""
        told = torch.tensor(float(number), device=accelerator.device)
        return accelerator.reduce(told, reduction="sum").item()

    unreadable = Unreadable()
    size, everything = scoring.eval_batch_size, range(len(images))
    per_round, offset = size * accelerator.num_processes, size * accelerator.process_index
    # This process's group of each round: the last one may be smaller, or empty.
    rounds = [everything[first + offset :][:size] for first in everything[::per_round]]
    samples = test_images(
        images, [index for group in rounds for index in group],
        workers=scoring.loader_workers, pin_memory=accelerator.device.type == "cuda",
    )  # fmt: skip
    with evaluating(accelerator, model):
        for number, group in enumerate(rounds, start=1):
            loaded = [(index, next(samples)) for index in group]
            unreadable.note(sample.unreadable for _, sample in loaded if sample.unreadable)
            work([(index, sample) for index, sample in loaded if not sample.unreadable])
            if on_progress is not None:
                on_progress(min(len(images), number * per_round), len(images))
            if interruption is not None and total(interruption.requested):
                return None
    skipped_images = int(total(len(unreadable.texts)))
    unreadable.check(skipped_images, len(images))
    return skipped_images


@contextlib.contextmanager
def evaluating(accelerator: Accelerator, model: Segmenter) -> Iterator[None]:
    """Evaluation mode, no gradients, the run's precision; training mode is restored."""
    training = model.training
    model.eval()
    with torch.inference_mode(), accelerator.autocast():
        yield
    model.train(training)
