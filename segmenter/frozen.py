"""What tokens of a frozen encoder are asked: a linear classifier, nearest neighbours, their spread.

    decoder = fit_linear(found.features, found.labels, num_classes, weight_decay=1e-5)
    decoder(tokens)    # [B, N, D] to class logits [B, N, K]

Shapes: N tokens of an image, T kept ones of all, D features, K classes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segmenter.decoder import LinearDecoder

MOST_ITERATIONS = 100
# What a probe may be made with; a fifth of the training images says which is best for an encoder.
WEIGHT_DECAYS = (1e-6, 1e-5, 1e-4, 1e-3)  # of the linear one
DIRECTIONS = (8, 16, 32, 64, 128, 256, 512)  # that kNN looks along
CHOOSING_TOKENS = 10_000  # at most, of either part
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of DINO's evaluation (Caron et al. 2021, arXiv:2104.14294)
MOST_SIMILARITIES = 2**26  # held at once
RANKME_TOKENS = 25_600  # as many as its paper takes


class TrainingTokens(NamedTuple):
    """features [T, D] fp32, class, number of the image, and place in its window [T] of each.

    shares: [T, K] of the classes in its patch, where they were asked for.
    """

    features: Tensor
    labels: Tensor
    images: Tensor
    places: Tensor
    shares: Tensor = torch.zeros(0)


# CAPI's probes: facebookresearch/capi, eval_segmentation.py.
CAPI_NEIGHBOURS = tuple(f"{k} by {metric}" for k in (1, 3, 10, 30) for metric in ("cosine", "L2"))
CAPI_C = tuple(10 ** (-6 + 11 * step / 7) for step in range(8))  # 10 ** linspace(-6, 5, 8)
CAPI_SHARE = 10  # one of so many training images chooses
# Hummingbird's: vpariza/open-hummingbird-eval, hbird_eval.py.
RETRIEVED, RETRIEVAL_TEMPERATURE = 30, 0.02

Value = TypeVar("Value", float, str)
Fit = Callable[[Tensor, Tensor, int, Any], nn.Module]  # of tokens [T, D], labels [T], classes, value


def choose(
    fit: Fit, values: Sequence[Value], found: TrainingTokens, num_classes: int, one_of: int = 5
) -> Value:
    """The value with which four of five images tell most of the fifth, by mean IoU of its tokens.

    The middle one where there are less than five images. The validation images have no say in it.
    one_of: five.
    """
    held_out = found.images % one_of == one_of - 1
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


class Retrieval(nn.Module):
    """What the nearest training tokens are, as CAPI (each of them one vote) and Hummingbird ask."""

    def __init__(
        self, tokens: Tensor, values: Tensor, neighbours: int, *, metric: str = "cosine",
        standardised: bool = True, temperature: float | None = None,
    ) -> None:  # fmt: skip
        """Tokens [T, D] with values [T, K]: classes, or shares of them.

        temperature: of the softmax of cosines that weighs them; None: all weigh the same.
        """
        super().__init__()
        self.mean, self.deviation = _statistics(tokens)
        if not standardised:
            self.mean, self.deviation = torch.zeros_like(self.mean), torch.ones_like(self.mean)
        self.metric, self.temperature, self.values = metric, temperature, values
        self.neighbours, self.bank = min(neighbours, len(tokens)), self.project(tokens)

    def project(self, tokens: Tensor) -> Tensor:
        """[..., D], standardised; of length 1 where angles are compared."""
        projected = (tokens - self.mean) / self.deviation
        return F.normalize(projected, dim=-1) if self.metric == "cosine" else projected

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to the mean value of the nearest [B, N, K]."""
        with torch.autocast(tokens.device.type, enabled=False):
            queries = self.project(tokens.float().flatten(0, 1))
            parts = queries.split(max(1, MOST_SIMILARITIES // len(self.bank)))
            found = torch.cat([self._mean_value(part) for part in parts])
        return found.unflatten(0, tokens.shape[:2])

    def _mean_value(self, queries: Tensor) -> Tensor:
        near = queries @ self.bank.T if self.metric == "cosine" else -torch.cdist(queries, self.bank)
        nearest = near.topk(self.neighbours)  # [n, k]
        weights = torch.full_like(nearest.values, 1 / self.neighbours)
        if self.temperature is not None:
            weights = (nearest.values / self.temperature).softmax(-1)
        return torch.einsum("nk,nkc->nc", weights, self.values[nearest.indices])


def fit_capi_knn(tokens: Tensor, labels: Tensor, num_classes: int, chosen: str) -> Retrieval:
    """The nearest standardised tokens, as many and by the metric that was chosen: "10 by cosine"."""
    number, _, metric = chosen.split()
    return Retrieval(tokens, F.one_hot(labels, num_classes).float(), int(number), metric=metric)


def fit_capi_logreg(tokens: Tensor, labels: Tensor, num_classes: int, c: float) -> LinearProbe:
    """scikit-learn's (cuML's) LogisticRegression(C) of standardised tokens."""
    return fit_linear(tokens, labels, num_classes, 1 / (c * len(tokens)))


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
