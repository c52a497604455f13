"""`probe`: tokens of the training images once, then what a frozen encoder knows of the others.

Shapes: N tokens of an image, T kept ones of all, D features, K classes, P pixels per patch side.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from common.files import write_json
from common.images import find_images
from common.interruption import Interruption
from common.progress import Counter
from common.step_files import PROBE_AREAS, RESULT
from engine.devices import working_in
from engine.schedule import TOKENS
from segmenter.check import earlier_output
from segmenter.config import ProbeConfig
from segmenter.data import TestImage, WholeImages, scaled_images
from segmenter.dataset import DatasetDescription, Pair, read_classes, read_image
from segmenter.decoder import LinearDecoder
from segmenter.evaluate import each_group, evaluate_model, patch_logits
from segmenter.finetune import depends_on, start_model
from segmenter.model import Segmenter

MOST_TOKENS = 200_000  # kept of all images together: 0.8 GB of ViT-L's
MOST_IMAGES = 5000  # of class folders
MOST_ITERATIONS = 100
# What a probe may be made with; a fifth of the training images says which is best for an encoder.
WEIGHT_DECAYS = (1e-6, 1e-5, 1e-4, 1e-3)  # of the linear one
DIRECTIONS = (8, 16, 32, 64, 128, 256, 512)  # that kNN looks along
CHOOSING_TOKENS = 10_000  # at most, of either part
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of DINO's evaluation (Caron et al. 2021, arXiv:2104.14294)
MOST_SIMILARITIES = 2**26  # held at once
RANKME_TOKENS = 25_600  # as many as its paper takes

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
        folders = ClassFolders(folder, like)
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


class TrainingTokens(NamedTuple):
    """features [T, D] fp32, class, number of the image, and place in its window [T] of each."""

    features: Tensor
    labels: Tensor
    images: Tensor
    places: Tensor


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

    def __init__(self, folder: Path, like: WholeImages) -> None:
        names = [name for name in find_images(folder) if "/" in name]
        names = names[:: -(-len(names) // MOST_IMAGES) or 1]
        pairs = [Pair(n, folder / n, folder / n) for n in names]
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


# --- What is asked of them: a linear classifier, nearest neighbours, their rank ---

Fit = Callable[[Tensor, Tensor, int, Any], nn.Module]  # of tokens [T, D], labels [T], classes, value


def choose(fit: Fit, values: Sequence[float], found: TrainingTokens, num_classes: int) -> float:
    """The value with which four of five images tell most of the fifth, by mean IoU of its tokens.

    The middle one where there are less than five images. The validation images have no say in it.
    """
    held_out = found.images % 5 == 4
    train, test = (
        rows[:: -(-len(rows) // CHOOSING_TOKENS) or 1]  # evenly spread
        for rows in (part.nonzero()[:, 0] for part in (~held_out, held_out))
    )
    if not len(train) or not len(test):
        return values[len(values) // 2]
    labels, scores = found.labels[test], []
    for value in values:
        decoder = fit(found.features[train], found.labels[train], num_classes, value)
        with torch.no_grad():
            predicted = decoder(found.features[test][None])[0].argmax(-1)
        confusion = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
        table = confusion.view(num_classes, num_classes).double()
        there = table.sum(1) > 0
        iou = table.diag() / (table.sum(0) + table.sum(1) - table.diag()).clamp(min=1)
        scores.append(iou[there].mean().item())
    return values[scores.index(max(scores))]


class LinearProbe(LinearDecoder):
    """In fp32: its logits are small differences of large numbers."""

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to class logits [B, N, K]."""
        with torch.autocast(tokens.device.type, enabled=False):
            return super().forward(tokens.float())


def fit_linear(tokens: Tensor, labels: Tensor, num_classes: int, weight_decay: float) -> LinearProbe:
    """Batch norm and linear layer that classify tokens [T, D] with labels [T], as one layer."""
    # Multinomial logistic regression of the standardised tokens: scikit-learn's LogisticRegression
    # with C = 1 / (weight_decay * T).
    mean, deviation = _statistics(tokens)
    features = (tokens - mean) / deviation
    decoder = LinearProbe(tokens.shape[1], num_classes).to(tokens.device)
    weight, bias = decoder.head.weight, decoder.head.bias
    nn.init.zeros_(weight)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=MOST_ITERATIONS, line_search_fn="strong_wolfe",
        tolerance_change=1e-7,
    )  # fmt: skip

    def loss() -> Tensor:
        solver.zero_grad()
        decay = weight_decay / 2 * weight.square().sum()  # the bias does not decay
        value = F.cross_entropy(decoder(features), labels) + decay
        value.backward()
        return value

    solver.step(loss)
    with torch.no_grad():  # (x - mean) / deviation becomes part of the layer
        weight.div_(deviation)
        bias.sub_(weight @ mean)
    return decoder


class NearestNeighbours(nn.Module):
    """Classes of the training tokens that point the same way (Wu et al. 2018, arXiv:1805.01978)."""

    def __init__(
        self, tokens: Tensor, labels: Tensor, num_classes: int, directions: int | None = None
    ) -> None:
        """Tokens [T, D] and their labels [T].

        directions: along so many principal ones, each scaled to the same variance (whitened): else
        one that has most of it, and tells places and not things, decides who is near. None: each
        feature is scaled by itself (standardised).
        """
        super().__init__()
        self.mean, deviation = _statistics(tokens)
        self.projection = deviation.reciprocal().diag()  # [D, D], or [D, directions]
        if directions is not None:
            variances, axes = torch.linalg.eigh(_covariance(tokens - self.mean))  # ascending
            scaled = axes / variances.clamp(min=1e-6 * variances[-1]).sqrt()
            self.projection = scaled[:, -directions:].float()
        self.bank, self.labels, self.num_classes = self.project(tokens), labels, num_classes

    def project(self, tokens: Tensor) -> Tensor:
        """[..., D] to length 1 along what is looked at."""
        return F.normalize((tokens - self.mean) @ self.projection, dim=-1)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to each class's share of the votes [B, N, K]."""
        # In bf16 most neighbours would be equally near.
        with torch.autocast(tokens.device.type, enabled=False):
            queries = self.project(tokens.float().flatten(0, 1))
            parts = queries.split(max(1, MOST_SIMILARITIES // len(self.bank)))
            votes = [self._votes(part @ self.bank.T) for part in parts]
        return torch.cat(votes).unflatten(0, tokens.shape[:2])

    def of_the_others(self) -> Tensor:
        """[T, K]: each training token by all but itself."""
        return self._votes((self.bank @ self.bank.T).fill_diagonal_(-torch.inf))

    def _votes(self, cosines: Tensor) -> Tensor:
        """[Q, T] to [Q, K]; a vote weighs exp(cosine / TEMPERATURE)."""
        # [Q, NEIGHBOURS] values and indices.
        nearest = cosines.topk(min(NEIGHBOURS, len(self.bank)))
        weights = (nearest.values / TEMPERATURE).softmax(-1)
        votes = cosines.new_zeros(len(cosines), self.num_classes)
        for weight, label in zip(weights.T, self.labels[nearest.indices].T, strict=True):
            votes.scatter_add_(1, label[:, None], weight[:, None])  # one per row: always the same
        return votes


def _statistics(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation [D] of each feature, as batch norm takes them."""
    deviation, mean = torch.std_mean(tokens, dim=0, correction=0)
    return mean, deviation.clamp(min=1e-6)


def _covariance(centred: Tensor) -> Tensor:
    """[D, D] fp64 of tokens [T, D] whose mean is 0."""
    return (centred.T @ centred / len(centred)).double()


def spread(found: TrainingTokens) -> dict[str, float]:
    """What the variance of standardised tokens consists of, in percent of it.

    first_direction_percent: along their first principal direction. position_percent: between places
    in the image, less what chance makes of so many places (omega squared, Hays 1963).
    """
    mean, deviation = _statistics(found.features)
    tokens = (found.features - mean) / deviation
    variances = torch.linalg.eigvalsh(_covariance(tokens))
    places, of_each = found.places.unique(return_inverse=True)
    sums = tokens.new_zeros(len(places), tokens.shape[1]).index_add_(0, of_each, tokens)
    total = tokens.square().sum().item()
    if not total:
        raise RuntimeError("the encoder gives the same token everywhere: nothing of it can be scored")
    between = (sums.square().sum(1) / of_each.bincount()).sum().item()
    within = (total - between) / max(1, len(tokens) - len(places))
    position = (between - (len(places) - 1) * within) / (total + within)
    return {
        "first_direction_percent": 100 * (variances[-1] / variances.sum()).item(),
        "position_percent": 100 * max(0.0, position),
    }


def rankme(tokens: Tensor) -> float:
    """How many directions tokens [T, D] spread over, 1 to D (Garrido et al., arXiv:2210.02885)."""
    # The exponential of the entropy of the singular values; of evenly spaced tokens.
    step = -(-len(tokens) // RANKME_TOKENS)
    values = torch.linalg.svdvals(tokens[::step].double())
    return float(torch.special.entr(values / values.sum()).sum().exp())
