"""What is asked of frozen features: a linear classifier, nearest neighbours, their rank.

Shapes: T training tokens, B x N tokens of windows, D features, K classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segmenter.decoder import LinearDecoder

# What is learned lies in small directions, which a stronger decay would hide: on CamVid's patches
# this told 100 epochs of MAE from five random seeds by 28 of their standard deviations, in one to
# two seconds; 1e-4 by 8, 1e-3 by 4, a ridge classifier (0.1 seconds) by 12.
WEIGHT_DECAY, MOST_ITERATIONS = 1e-5, 100
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of DINO's evaluation (Caron et al. 2021, arXiv:2104.14294)
MOST_SIMILARITIES = 2**26  # held at once
RANKME_TOKENS = 25_600  # as many as its paper takes


class LinearProbe(LinearDecoder):
    """In fp32: its logits are small differences of large numbers."""

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to class logits [B, N, K]."""
        with torch.autocast(tokens.device.type, enabled=False):
            return super().forward(tokens.float())


def fit_linear(tokens: Tensor, labels: Tensor, num_classes: int) -> LinearProbe:
    """Batch norm and linear layer that classify tokens [T, D] with labels [T], as one layer.

    Multinomial logistic regression of the standardised tokens: scikit-learn's LogisticRegression
    with C = 1 / (WEIGHT_DECAY * T).
    """
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
        decay = WEIGHT_DECAY / 2 * weight.square().sum()  # the bias does not decay
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

    def __init__(self, tokens: Tensor, labels: Tensor, num_classes: int) -> None:
        """Tokens [T, D] and their labels [T]."""
        super().__init__()
        self.mean, self.deviation = _statistics(tokens)
        self.bank, self.labels, self.num_classes = self.directions(tokens), labels, num_classes

    def directions(self, tokens: Tensor) -> Tensor:
        """[..., D] standardised, to length 1: else what all tokens share outweighs the rest."""
        return F.normalize((tokens - self.mean) / self.deviation, dim=-1)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to each class's share of the votes [B, N, K]."""
        queries = self.directions(tokens.float().flatten(0, 1))
        # In bf16 most neighbours would be equally near.
        with torch.autocast(tokens.device.type, enabled=False):
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


def rankme(tokens: Tensor) -> float:
    """How many directions tokens [T, D] spread over, 1 to D (Garrido et al., arXiv:2210.02885).

    The exponential of the entropy of the singular values; of evenly spaced tokens.
    """
    step = -(-len(tokens) // RANKME_TOKENS)
    values = torch.linalg.svdvals(tokens[::step].double())
    return float(torch.special.entr(values / values.sum()).sum().exp())
