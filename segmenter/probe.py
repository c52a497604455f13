"""`probe`: tokens of the training images once, then what a frozen encoder knows of the others.

Shapes: N tokens of an image, T kept ones of all, D features, K classes, P pixels per patch side.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from common.files import write_json
from common.images import open_images
from common.interruption import Interruption
from common.progress import Counter
from common.step_files import PROBE_AREAS, RESULT
from engine.devices import working_in
from engine.schedule import TOKENS
from segmenter.check import earlier_output
from segmenter.config import ProbeConfig
from segmenter.data import TestImage, WholeImages, scaled_images
from segmenter.dataset import DatasetDescription, Pair, read_classes, read_image
from segmenter.evaluate import each_group, evaluate_model, patch_logits
from segmenter.finetune import depends_on, start_model
from segmenter.frozen import (
    DIRECTIONS,
    WEIGHT_DECAYS,
    Fit,
    NearestNeighbours,
    TrainingTokens,
    choose,
    fit_linear,
    rankme,
    spread,
)
from segmenter.model import Segmenter

MOST_TOKENS = 200_000  # kept of all images together: 0.8 GB of ViT-L's
MOST_IMAGES = 5000  # of class folders

logger = logging.getLogger(__name__)


class _StoppedError(Exception):
    """A signal came."""


def probe(config: ProbeConfig, dataset: DatasetDescription) -> bool:
    """Leave areas and, last, result.json. False if stopped by a signal. Raises ValueError."""
    with Interruption() as interruption, working_in(config.run) as accelerator:
        found = earlier_output(config, dataset)
        if found is not None:
            logger.info("nothing to do: %s is there", found)
            return True
        torch.manual_seed(config.run.seed)  # as `train` does: the same random weights
        model = start_model(config.init, config.model, config.protocol, dataset.num_classes)
        run = _Probing(config, dataset, accelerator, interruption, model.to(accelerator.device))
        try:
            answers = run.answers()
        except _StoppedError:
            logger.warning("stopped by a signal; run the same command again")
            return False
        if accelerator.is_main_process:
            about = {"seed": config.run.seed, "seconds": run.seconds}
            about |= depends_on(config, accelerator, dataset)
            write_json(config.run.output_dir / RESULT, {"format_version": 1, **answers, **about})
        accelerator.wait_for_everyone()
        return True


@dataclass
class _Probing:
    config: ProbeConfig
    dataset: DatasetDescription
    accelerator: Accelerator
    interruption: Interruption
    model: Segmenter
    seconds: dict[str, float] = field(default_factory=dict)  # of what was done, by its name

    def answers(self) -> dict[str, Any]:
        """What result.json says of each probe."""
        asked, dataset, answers = self.config.run, self.dataset, dict[str, Any]()
        protocol = dataclasses.replace(self.config.protocol, multi_scale=False)  # tokens of one
        images = WholeImages(dataset, dataset.train, protocol)
        found = self.tokens("tokens", images)
        if "linear" in asked.probes:
            answers["linear"] = self.chosen("linear", fit_linear, WEIGHT_DECAYS, found)
        if "knn" in asked.probes:
            fewer = [number for number in DIRECTIONS if number < found.features.shape[1]]
            answers["knn"] = self.chosen("knn", NearestNeighbours, fewer, found)
            raw = partial(NearestNeighbours, found.features, found.labels, dataset.num_classes)
            answers["knn_raw"] = self.scores("knn_raw", raw)
        if "rankme" in asked.probes:
            answers["rankme"] = rankme(found.features)
            answers |= spread(found)
            logger.info(
                "RankMe %.1f of %d; of the variance, %.0f%% lies along one direction, %.0f%% is position",
                answers["rankme"], found.features.shape[1], answers["first_direction_percent"],
                answers["position_percent"],
            )  # fmt: skip
        if asked.image_folder is not None:
            answers |= self.image_knn(asked.image_folder, images)
        return answers

    def chosen(self, name: str, fit: Fit, values: Sequence[float], found: TrainingTokens) -> dict[str, Any]:
        """Scores of a probe that is made with the value that suits the encoder best."""
        best = choose(fit, values, found, self.dataset.num_classes)
        decoder = partial(fit, found.features, found.labels, self.dataset.num_classes, best)
        return {**self.scores(name, decoder), "made_with": best}

    def tokens(self, name: str, images: WholeImages) -> TrainingTokens:
        """Those of images, the same on every process."""
        tokens = Tokens(self.model, images, self.config.run.seed)
        # Without a decoder, a model's logits are its tokens.
        self.over(name, images, each_group, tokens.add, decoder=nn.Identity)
        return tokens.total(self.accelerator)

    def scores(self, name: str, decoder: Callable[[], nn.Module]) -> dict[str, Any]:
        """Of the validation images, as `train` scores them; leaves their areas."""
        dataset = self.dataset
        images = WholeImages(dataset, dataset.val, self.config.protocol)
        areas = self.over(name, images, evaluate_model, decoder=decoder)
        if self.accelerator.is_main_process:
            path = self.config.run.output_dir / PROBE_AREAS[name]
            areas.save(path, [pair.name for pair in dataset.val])
        scores: dict[str, Any] = areas.scores(read_classes(dataset).names)
        logger.info("%s: mean IoU %.2f", name, scores["mean_iou"])
        return scores

    def image_knn(self, folder: Path, like: WholeImages) -> dict[str, Any]:
        """Each image by all but itself, so that one folder serves: no other images are needed."""
        folders = ClassFolders(folder, like, self.config.run.index_dir)
        classes = len(folders.classes)
        if classes < 2:
            logger.info("no image kNN: %s has no two class folders", folder)
            return {}
        means, labels, *_ = self.tokens("image_knn", folders)
        predicted = NearestNeighbours(means, labels, classes).of_the_others().argmax(1)
        told = {"accuracy": 100 * (predicted == labels).double().mean().item()}
        return {"image_knn": {**told, "num_images": len(labels), "num_classes": classes}}

    def over(
        self, name: str, images: WholeImages, work: Callable[..., Any], *more: Any,
        decoder: Callable[[], nn.Module],
    ) -> Any:  # fmt: skip
        """What `each_group` or `evaluate_model` finds with this decoder, told and timed."""
        began = time.monotonic()  # fitting the decoder counts, too
        self.model.decoder = decoder()
        with Counter(name, total=len(images)) as counter:
            found = work(
                self.accelerator, self.model, images, self.config.run, *more,
                on_progress=counter.reach if self.accelerator.is_main_process else None,
                interruption=self.interruption,
            )  # fmt: skip
        if found is None:
            raise _StoppedError
        self.seconds[name] = time.monotonic() - began
        return found


# --- What the encoder makes of images: tokens with labels ---


class Tokens:
    """Tokens of images, each with the label that most valid pixels of its patch have.

    An image keeps at most its even share of MOST_TOKENS, drawn by (seed, index), in a place of its
    own: the processes' parts add up to what one process would have, in the same order. An image
    that has one label itself keeps the mean of its tokens.
    """

    def __init__(self, model: Segmenter, images: WholeImages, seed: int) -> None:
        # The model's decoder is nn.Identity, so that its patch logits are the encoder's tokens.
        self.model, self.images, self.seed = model, images, seed
        device = model.mean.device
        self.features = torch.zeros(MOST_TOKENS, model.encoder.embed_dim, device=device)
        self.labels = torch.zeros(MOST_TOKENS, dtype=torch.int64)  # from 1; 0: none
        self.places = torch.zeros(MOST_TOKENS, dtype=torch.int64)

    def add(self, usable: list[tuple[int, TestImage]]) -> None:
        """The images of a group, with their indices."""
        found: list[list[tuple[Tensor, ...]]] = [[] for _ in usable]  # by window
        scaled = [sample.scaled[0] for _, sample in usable]
        windows = patch_logits(self.model, scaled, self.images.protocol)
        for (image, rows, columns), features in windows:
            labels = usable[image][1].labels
            if labels.dim() == 2:  # by pixel; else the image's own
                size = scaled[image].shape[-2:]
                fitting = F.interpolate(labels[None, None], size, mode="nearest-exact")[0, 0]
                labels = self._majority(fitting[rows, columns])
            features = features.flatten(1).T.float()  # [D, h, w] to [N, D]
            found[image].append((features, labels, torch.arange(len(features))))
        for (index, sample), by_window in zip(usable, found, strict=True):
            features, labels, places = (torch.cat(parts) for parts in zip(*by_window, strict=True))
            if sample.labels.dim() == 1:
                features, labels, places = features.mean(0, keepdim=True), sample.labels, places[:1]
            self._keep(index, features, labels, places)

    def _majority(self, labels: Tensor) -> Tensor:
        """[h, w] uint8 to [N]: 1 + the class of most valid pixels of each patch, 0 if none is."""
        patch, ignored = self.model.shape.encoder.patch_size, self.images.description.ignore_index
        height, width = labels.shape
        padded = F.pad(labels, (0, -width % patch, 0, -height % patch), value=ignored)
        by_patch = padded.unfold(0, patch, patch).unfold(1, patch, patch)
        pixels = by_patch.flatten(2).flatten(0, 1).long()  # [N, P * P]
        counts = torch.zeros(len(pixels), 256).scatter_add_(1, pixels, torch.ones(pixels.shape))
        counts[:, ignored] = 0  # padding, too
        most, classes = counts.max(1)
        return torch.where(most > 0, classes + 1, 0)

    def _keep(self, index: int, features: Tensor, labels: Tensor, places: Tensor) -> None:
        first, end = ((index + n) * MOST_TOKENS // len(self.images) for n in (0, 1))
        rng = np.random.default_rng([self.seed, TOKENS, index])
        known = rng.permutation(labels.nonzero()[:, 0].numpy())  # those that have a label
        chosen = torch.from_numpy(known[: end - first])
        place = slice(first, first + len(chosen))
        self.features[place] = features[chosen.to(features.device, non_blocking=True)]
        self.labels[place], self.places[place] = labels[chosen], places[chosen]

    def total(self, accelerator: Accelerator) -> TrainingTokens:
        """Those of all processes. RuntimeError if there are none."""
        features, labels, places = (
            accelerator.reduce(part.to(self.features.device), reduction="sum")
            for part in (self.features, self.labels, self.places)
        )
        (kept,) = torch.where(labels > 0)  # places that no image filled, of small images, stay 0
        if not len(kept):
            raise RuntimeError("no pixel of the training images has a label that counts")
        images = ((kept + 1) * len(self.images) - 1) // MOST_TOKENS  # whose share a place is of
        return TrainingTokens(features[kept], labels[kept] - 1, images, places[kept])


class ClassFolders(WholeImages):
    """Images of DIR/<class>/, evenly spaced; the label of one is its class, from 1."""

    def __init__(self, folder: Path, like: WholeImages, index_dir: Path | None = None) -> None:
        images = open_images(folder, index_dir)
        names = [name for name in images.names if "/" in name]
        names = names[:: -(-len(names) // MOST_IMAGES) or 1]
        pairs = [Pair(n, images.source / n, folder / n) for n in names]
        super().__init__(like.description, pairs, like.protocol)
        self.classes = sorted({name.partition("/")[0] for name in names})

    def __getitem__(self, index: int) -> TestImage:
        pair = self.pairs[index]
        label = torch.tensor([1 + self.classes.index(pair.name.partition("/")[0])])
        try:
            image = read_image(pair.image)
        except ValueError as error:
            return TestImage([], label, unreadable=str(error))
        return TestImage(scaled_images(image, self.protocol), label)
