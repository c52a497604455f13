"""`probe`: tokens of the training images once, then what a frozen encoder knows of the others.

Shapes: N tokens of an image, T kept ones of all, D features, K classes, P pixels per patch side.
"""

import dataclasses
import json
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

from common.console import say
from common.files import write_json
from common.images import open_images
from common.interruption import Interruption
from common.progress import Counter
from common.step_files import FEATURES, PROBE_AREAS, RESULT
from engine.devices import make_accelerator, working_in
from engine.schedule import TOKENS
from engine.trainer import seconds_of_all, seconds_since_start
from segmenter.check import earlier_output
from segmenter.config import ProbeConfig
from segmenter.data import TestImage, TrainingCrops, WholeImages, scaled_images
from segmenter.dataset import DatasetDescription, Pair, read_classes
from segmenter.evaluate import each_group, evaluate_model, evaluate_some, patch_logits
from segmenter.features import draw_some
from segmenter.finetune import depends_on, start_model
from segmenter.frozen import (
    CAPI_C,
    CAPI_NEIGHBOURS,
    CAPI_SHARE,
    DIRECTIONS,
    RETRIEVAL_TEMPERATURE,
    RETRIEVED,
    WEIGHT_DECAYS,
    Fit,
    NearestNeighbours,
    Retrieval,
    TrainingTokens,
    choose,
    fit_capi_knn,
    fit_capi_logreg,
    fit_linear,
    rankme,
    spread,
)
from segmenter.labels import read_image
from segmenter.model import Segmenter
from segmenter.stepwise import PROBES as STEPWISE
from segmenter.stepwise import fit_by_steps

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
            images = WholeImages(dataset, dataset.val, config.protocol, model.interpolation)
            draw_some(model, accelerator, images, config.run.output_dir / FEATURES)
            about = {"seed": config.run.seed, "seconds": run.seconds}
            about |= depends_on(config, accelerator, dataset, model)
            write_json(config.run.output_dir / RESULT, {"format_version": 1, **answers, **about})
        accelerator.wait_for_everyone()
        return True


def time_probing(config: ProbeConfig, dataset: DatasetDescription) -> None:
    """Print seconds of setting up, and of all validation images once, as JSON: --dry-run time.

    Writes nothing. Fitting is not timed.
    """
    accelerator = make_accelerator(config.run)
    model = start_model(config.init, config.model, config.protocol, dataset.num_classes)
    model.to(accelerator.device)
    images = WholeImages(dataset, dataset.val, config.protocol, model.interpolation)
    some = partial(evaluate_some, accelerator, model, images, config.run)
    told = {
        "setup_seconds": seconds_since_start(),
        "evaluation_seconds": seconds_of_all(some, len(images), accelerator.num_processes),
    }
    if accelerator.is_main_process:
        say(json.dumps(told))


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
        images = WholeImages(dataset, dataset.train, protocol, self.model.interpolation)
        found = self.tokens("tokens", images)
        if "linear" in asked.probes:
            fixed = asked.linear_weight_decay
            decays = WEIGHT_DECAYS if fixed is None else (fixed,)
            answers["linear"] = self.chosen("linear", fit_linear, decays, found)
        if "knn" in asked.probes:
            fewer = [number for number in DIRECTIONS if number < found.features.shape[1]]
            answers["knn"] = self.chosen("knn", NearestNeighbours, fewer, found)
            raw = partial(NearestNeighbours, found.features, found.labels, dataset.num_classes)
            answers["knn_raw"] = self.scores("knn_raw", raw)
        if "capi_knn" in asked.probes:
            answers["capi_knn"] = self.chosen("capi_knn", fit_capi_knn, CAPI_NEIGHBOURS, found, CAPI_SHARE)
        if "capi_logreg" in asked.probes:
            answers["capi_logreg"] = self.chosen("capi_logreg", fit_capi_logreg, CAPI_C, found, CAPI_SHARE)
        if "hummingbird" in asked.probes:
            told: dict[str, Any] = {"standardised": False, "temperature": RETRIEVAL_TEMPERATURE}
            retrieval = partial(Retrieval, found.features, found.shares, RETRIEVED, **told)
            answers["hummingbird"] = self.scores("hummingbird", retrieval)
        for name in (name for name in STEPWISE if name in asked.probes):
            answers[name] = self.trained(name)
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

    def trained(self, name: str) -> dict[str, Any]:
        """Scores of a probe that is trained by steps."""
        run, recipe, began = self.config.run, STEPWISE[name], time.monotonic()
        protocol, scaling = self.config.protocol, self.model.interpolation
        crops = TrainingCrops(self.dataset, self.dataset.train, protocol, run.seed, scaling)
        steps = run.probe_steps or recipe.steps
        with Counter(f"train {name}", total=steps) as counter:
            decoder = fit_by_steps(
                self.model, crops, recipe, self.accelerator, run, steps=steps,
                on_progress=counter.reach if self.accelerator.is_main_process else None,
                interruption=self.interruption,
            )  # fmt: skip
        if decoder is None:
            raise _StoppedError
        seconds = time.monotonic() - began
        scores = self.scores(name, lambda: decoder)
        self.seconds[name] += seconds
        return {**scores, "made_with": {**dataclasses.asdict(recipe), "steps": steps}}

    def chosen(
        self, name: str, fit: Fit, values: Sequence[Any], found: TrainingTokens, one_of: int = 5
    ) -> dict[str, Any]:
        """Scores of a probe that is made with the value that suits the encoder best."""
        classes = self.dataset.num_classes
        best = values[0] if len(values) == 1 else choose(fit, values, found, classes, one_of)
        decoder = partial(fit, found.features, found.labels, self.dataset.num_classes, best)
        return {**self.scores(name, decoder), "made_with": best}

    def tokens(self, name: str, images: WholeImages) -> TrainingTokens:
        """Those of images, the same on every process."""
        wants_shares = "hummingbird" in self.config.run.probes and name == "tokens"
        classes = self.dataset.num_classes if wants_shares else 0
        tokens = Tokens(self.model, images, self.config.run.seed, classes)
        # Without a decoder, a model's logits are its tokens.
        self.over(name, images, each_group, tokens.add, decoder=nn.Identity)
        return tokens.total(self.accelerator)

    def scores(self, name: str, decoder: Callable[[], nn.Module]) -> dict[str, Any]:
        """Of the validation images, as `train` scores them; leaves their areas."""
        dataset = self.dataset
        images = WholeImages(dataset, dataset.val, self.config.protocol, self.model.interpolation)
        areas = self.over(name, images, evaluate_model, decoder=decoder)
        if self.accelerator.is_main_process:
            path = self.config.run.output_dir / PROBE_AREAS[name]
            areas.save(path, [pair.name for pair in dataset.val])
        scores: dict[str, Any] = areas.scores(read_classes(dataset).names)
        logger.info("%s: mean IoU %.2f", name, scores["mean_iou"])
        return scores

    def image_knn(self, folder: Path, like: WholeImages) -> dict[str, Any]:
        """Accuracy of whole images' mean tokens: one folder serves, no other images are needed.

        kNN: each image by all but itself. Linear: a fifth of the images by the others.
        """
        folders = ClassFolders(folder, like, self.config.run.index_dir)
        classes = len(folders.classes)
        if classes < 2:
            logger.info("no image kNN: %s has no two class folders", folder)
            return {}
        means, labels, *_ = self.tokens("image_knn", folders)
        counts = {"num_images": len(labels), "num_classes": classes}
        predicted = NearestNeighbours(means, labels, classes).of_the_others().argmax(1)
        found = {"image_knn": {"accuracy": _percent_equal(predicted, labels), **counts}}
        # A linear classifier of four fifths, evenly spread over the classes, tells the last one.
        rows = torch.arange(len(labels), device=labels.device)
        train, test = rows[rows % 5 != 4], rows[rows % 5 == 4]
        if len(test):
            known = TrainingTokens(means[train], labels[train], torch.arange(len(train)).to(rows), train)
            decay = choose(fit_linear, WEIGHT_DECAYS, known, classes)
            decoder = fit_linear(known.features, known.labels, classes, decay)
            with torch.no_grad():
                predicted = decoder(means[test][None])[0].argmax(-1)
            told = {"accuracy": _percent_equal(predicted, labels[test]), "num_tested": len(test)}
            found["image_linear"] = {**told, **counts}
        return found

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


def _percent_equal(predicted: Tensor, labels: Tensor) -> float:
    return 100 * (predicted == labels).double().mean().item()


# --- What the encoder makes of images: tokens with labels ---


class Tokens:
    """Tokens of images, each with the label that most valid pixels of its patch have.

    An image keeps at most its even share of MOST_TOKENS, drawn by (seed, index), in a place of its
    own: the processes' parts add up to what one process would have, in the same order. An image
    that has one label itself keeps the mean of its tokens.
    """

    # shares_of: so many classes have their shares of each patch kept, too; 0: they are not.
    def __init__(self, model: Segmenter, images: WholeImages, seed: int, shares_of: int = 0) -> None:
        # The model's decoder is nn.Identity, so that its patch logits are the encoder's tokens.
        self.model, self.images, self.seed = model, images, seed
        device = model.mean.device
        self.features = torch.zeros(MOST_TOKENS, model.encoder.embed_dim, device=device)
        self.labels = torch.zeros(MOST_TOKENS, dtype=torch.int64)  # from 1; 0: none
        self.places = torch.zeros(MOST_TOKENS, dtype=torch.int64)
        self.shares = torch.zeros(MOST_TOKENS if shares_of else 0, shares_of)

    def add(self, usable: list[tuple[int, TestImage]]) -> None:
        """The images of a group, with their indices."""
        found: list[list[tuple[Tensor, ...]]] = [[] for _ in usable]  # by window
        scaled = [sample.scaled[0] for _, sample in usable]
        windows = patch_logits(self.model, scaled, self.images.protocol)
        for (image, rows, columns), features in windows:
            labels, shares = usable[image][1].labels, self.shares
            features = features.flatten(1).T.float()  # [D, h, w] to [N, D]
            if labels.dim() == 2:  # by pixel; else the image's own
                size = scaled[image].shape[-2:]
                fitting = F.interpolate(labels[None, None], size, mode="nearest-exact")[0, 0]
                labels, shares = self._majority(fitting[rows, columns])
            else:
                shares = torch.zeros(len(features), 0)
            found[image].append((features, labels, torch.arange(len(features)), shares))
        for (index, sample), by_window in zip(usable, found, strict=True):
            features, labels, places, shares = (torch.cat(p) for p in zip(*by_window, strict=True))
            if sample.labels.dim() == 1:
                features, labels, places = features.mean(0, keepdim=True), sample.labels, places[:1]
            self._keep(index, features, labels, places, shares)

    def _majority(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """[h, w] uint8 to [N]: 1 + the class of most valid pixels of each patch, 0 if none is.

        And to [N, K]: the classes' shares of those pixels.
        """
        patch, ignored = self.model.shape.encoder.patch_size, self.images.description.ignored
        height, width = labels.shape
        padded = F.pad(labels, (0, -width % patch, 0, -height % patch), value=ignored)
        by_patch = padded.unfold(0, patch, patch).unfold(1, patch, patch)
        pixels = by_patch.flatten(2).flatten(0, 1).long()  # [N, P * P]
        counts = torch.zeros(len(pixels), 256).scatter_add_(1, pixels, torch.ones(pixels.shape))
        counts[:, ignored] = 0  # padding, too
        most, classes = counts.max(1)
        shares = counts[:, : self.shares.shape[1]] / counts.sum(1, keepdim=True).clamp(min=1)
        return torch.where(most > 0, classes + 1, 0), shares

    def _keep(self, index: int, features: Tensor, labels: Tensor, places: Tensor, shares: Tensor) -> None:
        first, end = ((index + n) * MOST_TOKENS // len(self.images) for n in (0, 1))
        rng = np.random.default_rng([self.seed, TOKENS, index])
        known = rng.permutation(labels.nonzero()[:, 0].numpy())  # those that have a label
        chosen = torch.from_numpy(known[: end - first])
        place = slice(first, first + len(chosen))
        self.features[place] = features[chosen.to(features.device, non_blocking=True)]
        self.labels[place], self.places[place] = labels[chosen], places[chosen]
        if self.shares.numel():
            self.shares[place] = shares[chosen]

    def total(self, accelerator: Accelerator) -> TrainingTokens:
        """Those of all processes. RuntimeError if there are none."""
        features, labels, places, shares = (
            accelerator.reduce(part.to(self.features.device), reduction="sum")
            for part in (self.features, self.labels, self.places, self.shares)
        )
        (kept,) = torch.where(labels > 0)  # places that no image filled, of small images, stay 0
        if not len(kept):
            raise RuntimeError("no pixel of the training images has a label that counts")
        images = ((kept + 1) * len(self.images) - 1) // MOST_TOKENS  # whose share a place is of
        shares = shares[kept] if shares.numel() else shares
        return TrainingTokens(features[kept], labels[kept] - 1, images, places[kept], shares)


class ClassFolders(WholeImages):
    """Images of DIR/<class>/, evenly spaced; the label of one is its class, from 1."""

    def __init__(self, folder: Path, like: WholeImages, index_dir: Path | None = None) -> None:
        images = open_images(folder, index_dir)
        names = [name for name in images.names if "/" in name]
        names = names[:: -(-len(names) // MOST_IMAGES) or 1]
        pairs = [Pair(n, images.source / n, folder / n) for n in names]
        super().__init__(like.description, pairs, like.protocol, like.interpolation)
        self.classes = sorted({name.partition("/")[0] for name in names})

    def __getitem__(self, index: int) -> TestImage:
        pair = self.pairs[index]
        label = torch.tensor([1 + self.classes.index(pair.name.partition("/")[0])])
        try:
            image = read_image(pair.image)
        except ValueError as error:
            return TestImage([], label, unreadable=str(error))
        return TestImage(scaled_images(image, self.protocol, self.interpolation), label)
