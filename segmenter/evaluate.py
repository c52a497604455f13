"""Score models on whole images: the `evaluate` command, and what `train` and `probe` score with.

areas = evaluate_model(accelerator, model, WholeImages(description, pairs, protocol), devices)
print(areas.scores(classes.names)["mean_iou"])

Shapes: K classes, H x W original pixels, h x w pixels at a scale of the protocol.
"""

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from common.files import NOTHING_WRITTEN, beside, check_output_folder
from common.images import Unreadable, evenly_spread
from common.interruption import Interruption
from common.progress import Counter
from engine.devices import make_accelerator
from segmenter.config import ProtocolConfig, ScoringConfig
from segmenter.data import TestImage, WholeImages, start_worker
from segmenter.dataset import Pair, other_names, read_classes, read_description
from segmenter.labels import check_labels, check_split, read_label_file
from segmenter.loading import load_segmenter
from segmenter.metrics import Areas
from segmenter.model import Segmenter
from segmenter.use_config import EvaluateConfig, ProtocolChanges

MOST_CHECKED = 5000  # pairs that are looked at first
MOST_WINDOWS = 32  # in one forward pass


def evaluate_checkpoint(
    checkpoint: Path, evaluation: EvaluateConfig, changes: ProtocolChanges, devices: ScoringConfig
) -> dict[str, Any]:
    """Scores of a checkpoint, with what they depend on, in plain values. Raises ValueError."""
    description = read_description(evaluation.dataset)
    pairs = description.pairs(evaluation.split)
    accelerator, loaded = make_accelerator(devices), load_segmenter(checkpoint)
    names, wanted = loaded.classes.names, read_classes(description).names
    if len(names) != len(wanted):
        raise ValueError(f"the checkpoint has {len(names)} classes, {description.name} has {len(wanted)}")
    differing = other_names(names, wanted)
    if differing and not evaluation.classes_by_number:
        remedy = "if they mean the same, --classes-by-number scores them"
        raise ValueError(f"{checkpoint} has other classes than {description.name}: {differing}; {remedy}")
    check_split(description, evaluation.split, pairs, most=MOST_CHECKED)
    target, protocol = evaluation.save_predictions, changes.applied_to(loaded.protocol)
    if target is not None:
        check_output_folder(target, "--save-predictions", reads=description.reads)
        if target.is_symlink() or (target.exists() and any(target.iterdir())):
            raise ValueError(f"--save-predictions {target} is not empty; {NOTHING_WRITTEN}")
    model = loaded.model.to(accelerator.device)
    images = WholeImages(description, pairs, protocol, model.interpolation)
    counter = Counter("evaluate", total=len(pairs))
    saving = _saving(target, pairs, description.file_labels, accelerator) if target else nullcontext()
    with saving as save, counter:
        areas = evaluate_model(
            accelerator, model, images, devices, on_prediction=save,
            on_progress=counter.reach if accelerator.is_main_process else None,
        )  # fmt: skip
    assert areas is not None  # nothing interrupts it
    return _result(areas, names, description.name, protocol.described())


@contextmanager
def _saving(
    path: Path, pairs: Sequence[Pair], file_labels: np.ndarray, accelerator: Accelerator
) -> Iterator[Callable[[int, Tensor], None]]:
    """What saves label maps to a folder that gets the name `path` when everything is in it."""
    unfinished = beside(path)
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a call that was killed
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()

    def save(index: int, predicted: Tensor) -> None:
        file, labels = unfinished / f"{pairs[index].name}.png", predicted.numpy()
        file.parent.mkdir(parents=True, exist_ok=True)  # a name may hold folders
        # In the numbering of the dataset's annotation files, so that they can be compared.
        Image.fromarray(file_labels[labels]).save(file)

    try:
        yield save
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unfinished.replace(path)  # an empty folder may be there


def evaluate_predictions(evaluation: EvaluateConfig) -> dict[str, Any]:
    """Scores of label maps that `--save-predictions` wrote, or that are annotations themselves.

    What a prediction leaves undecided (the ignored label) counts as wrong where the annotation
    has a class. Raises ValueError if a prediction is missing or does not fit.
    """
    folder = evaluation.predictions
    if folder is None or not folder.is_dir():
        raise ValueError(f"--predictions {folder} is not a folder")
    description = read_description(evaluation.dataset)
    names, pairs = read_classes(description).names, description.pairs(evaluation.split)
    areas, stored = Areas(len(pairs), len(names), description.ignored), []
    for pair in pairs:
        # .png is what this command saves, whatever the suffix there.
        paths = [folder / f"{pair.name}{end}" for end in (".png", *description.annotation_suffix)]
        stored.append(pair._replace(annotation=next(filter(Path.is_file, paths), paths[1])))
    check_split(description, evaluation.split, pairs)  # all: nothing is skipped here
    check_labels(description, stored)
    for index, both in enumerate(zip(stored, pairs, strict=True)):
        predicted, labels = (read_label_file(pair.annotation, description) for pair in both)
        classes = (torch.as_tensor(description.as_classes(one)) for one in (predicted, labels))
        areas.add(index, *classes)
    return _result(areas, names, description.name, None)  # of whose protocol nobody knows


def _result(areas: Areas, classes: Sequence[str], dataset: str, protocol: Any) -> dict[str, Any]:
    told = {"name": dataset, "num_images": len(areas.by_image)}
    return {**areas.scores(classes), "dataset": told, "protocol": protocol}


def evaluate_some(
    accelerator: Accelerator, model: Segmenter, images: WholeImages, scoring: ScoringConfig, count: int
) -> None:
    """So many of them, evenly spread, to see how long it takes."""
    pairs = evenly_spread(images.pairs, count)
    some = WholeImages(images.description, pairs, images.protocol, images.interpolation)
    evaluate_model(accelerator, model, some, scoring)


def evaluate_model(
    accelerator: Accelerator, model: Segmenter, images: WholeImages, scoring: ScoringConfig, *,
    on_prediction: Callable[[int, Tensor], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    interruption: Interruption | None = None,
) -> Areas | None:  # fmt: skip
    """Areas over all images and processes, the same on every process; None if interrupted.

    Unusable images are left out; RuntimeError if they are too many. on_prediction gets (index,
    [H, W] uint8 classes) of each image of this process, on_progress the images done and in all.
    """
    device = accelerator.device
    num_classes, ignored = model.shape.num_classes, images.description.ignored
    areas = Areas(len(images), num_classes, ignored, device)

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

    unreadable = each_group(accelerator, model, images, scoring, count, on_progress, interruption)
    if unreadable is None:
        return None
    # Each process has zeros for the images of the others, and integers add up exactly.
    areas.by_image = accelerator.reduce(areas.by_image, reduction="sum").cpu()
    areas.unreadable_images = unreadable
    return areas


def each_group(
    accelerator: Accelerator, model: Segmenter, images: WholeImages, scoring: ScoringConfig,
    work: Callable[[list[tuple[int, TestImage]]], None],
    on_progress: Callable[[int, int], None] | None = None,
    interruption: Interruption | None = None,
) -> int | None:  # fmt: skip
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
    loader: DataLoader[TestImage] = DataLoader(  # one by one: they differ in size
        images, sampler=[index for group in rounds for index in group], batch_size=None,
        num_workers=scoring.loader_workers, pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=start_worker,
    )  # fmt: skip
    samples = iter(loader)
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


@contextmanager
def evaluating(accelerator: Accelerator, model: Segmenter) -> Iterator[None]:
    """Evaluation mode, in which the model stays; no gradients, the run's precision."""
    model.eval()
    with torch.inference_mode(), accelerator.autocast():
        yield


# --- Sliding windows, those of several images in one batch ---


Window = tuple[int, slice, slice]  # an image's number in its group, and rows and columns of it


def predict_classes(
    model: Segmenter, images: Sequence[Sequence[Tensor]], sizes: Sequence[tuple[int, ...]],
    protocol: ProtocolConfig,
) -> Iterable[Tensor]:  # fmt: skip
    """Yield the class of every pixel, [H, W] uint8, image by image, where the model is.

    images: for each image its versions by scale, [3, h, w] uint8 RGB; sizes: original H and W.
    """
    # The result for an image depends on the group it is in by rounding: whoever wants equal numbers
    # from several processes has to form the same groups.
    if not protocol.multi_scale:
        canvases = window_logits(model, [versions[0] for versions in images], protocol)
        for canvas, size in zip(canvases, sizes, strict=True):
            yield _resize(canvas, size).argmax(0).to(torch.uint8)
        return
    for versions, size in zip(images, sizes, strict=True):
        # Class probabilities summed over scales and flips, as the Segmenter paper does.
        total = torch.zeros(model.shape.num_classes, *size, device=model.mean.device)
        for version in (version.to(total.device, non_blocking=True) for version in versions):
            both = [version, version.flip(-1)]  # in one batch
            for flipped, canvas in enumerate(window_logits(model, both, protocol)):
                probabilities = _resize(canvas, size).softmax(0)
                total += probabilities.flip(-1) if flipped else probabilities
        yield total.argmax(0).to(torch.uint8)


def window_logits(model: Segmenter, images: Sequence[Tensor], protocol: ProtocolConfig) -> list[Tensor]:
    """Class logits [K, h, w] of images [3, h, w], averaged where windows overlap."""
    canvases, counts = dict[int, Tensor](), dict[int, Tensor]()  # counts: windows over each pixel
    for (image, rows, columns), logits in patch_logits(model, images, protocol):
        # One window at a time: full-size logits of all of them would be the peak of memory.
        height, width = rows.stop - rows.start, columns.stop - columns.start
        full = model.upsample(_as_batch(logits), height, width)[0]
        size = images[image].shape[-2:]
        if size == (height, width):  # one window is all
            canvases[image] = full
            continue
        if image not in canvases:
            # The decoder's output has the classes innermost, which is what interpolation and
            # argmax over many classes like best: the canvas keeps that order in memory.
            canvases[image] = full.new_zeros(*size, len(full)).permute(2, 0, 1)
            counts[image] = full.new_zeros(size)
        canvases[image][:, rows, columns].add_(full)
        counts[image][rows, columns].add_(1)
    for image, count in counts.items():
        canvases[image].div_(count)
    return [canvases[image] for image in range(len(images))]


def patch_logits(
    model: Segmenter, images: Sequence[Tensor], protocol: ProtocolConfig
) -> Iterator[tuple[Window, Tensor]]:
    """Each window over images [3, h, w] uint8 with its logits [K, h / P, w / P], by P pixels."""
    # Windows of one size make a batch; only images smaller than a window have another size.
    by_size: dict[torch.Size, list[tuple[Window, Tensor]]] = defaultdict(list)
    for number, image in enumerate(images):
        pixels = model.normalise(image.to(model.mean.device, non_blocking=True))
        height, width = pixels.shape[-2:]
        for rows, columns in product(spans(height, protocol), spans(width, protocol)):
            part = pixels[:, rows, columns]
            by_size[part.shape].append(((number, rows, columns), part))
    for same_size in by_size.values():
        for first in range(0, len(same_size), MOST_WINDOWS):
            windows, parts = zip(*same_size[first : first + MOST_WINDOWS], strict=True)
            yield from zip(windows, model.patch_logits(torch.stack(parts)), strict=True)


def spans(length: int, protocol: ProtocolConfig) -> list[slice]:
    """The windows along a side of so many pixels; the last one ends at the border."""
    side, stride = protocol.window_size, protocol.window_stride
    last = max(0, length - side)  # an image smaller than a window is one window
    starts = [min(start, last) for start in range(0, last + stride, stride)]
    return [slice(start, min(start + side, length)) for start in starts]


def _resize(canvas: Tensor, size: tuple[int, ...]) -> Tensor:
    """[K, h, w] to [K, H, W]."""
    if canvas.shape[-2:] == size:
        return canvas
    return F.interpolate(_as_batch(canvas), size, mode="bilinear", align_corners=False)[0]


def _as_batch(canvas: Tensor) -> Tensor:
    """[K, h, w] to [1, K, h, w] with strides that torch recognises as classes-innermost."""
    # Plain `canvas[None]` has not, and interpolation then copies its whole output.
    return canvas.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
