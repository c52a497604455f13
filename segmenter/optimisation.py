"""The optimizer: SGD or AdamW, without decay of what is no matrix, slower for earlier blocks."""

from __future__ import annotations

from timm.optim import param_groups_layer_decay
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

from segmenter.config import OptimisationConfig
from segmenter.model import Segmenter

ADAM_BETA2 = 0.999


def make_optimizer(model: Segmenter, optimisation: OptimisationConfig) -> Optimizer:
    """Groups carry `lr_scale`, by which the schedule's rate is multiplied.

    Layer-wise rate decay (Clark et al. 2020, arXiv:2003.10555; as BEiT and MAE finetune) as timm
    has it: the decoder has 1, the encoder's last block layer_decay, its embeddings the least.
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
    for parameter in model.parameters():
        members.setdefault(of_parameter[parameter], []).append(parameter)
    groups = [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in members.items()
    ]
    if optimisation.optimizer == "sgd":
        return SGD(groups, lr=optimisation.lr, momentum=optimisation.momentum, fused=True)
    betas = (optimisation.momentum, ADAM_BETA2)
    return AdamW(groups, lr=optimisation.lr, betas=betas, fused=True)
