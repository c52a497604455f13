"""Steps on fake CUDA tensors: copies between host and device that keep the host waiting."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Notes copies that wait for the device. Fake tensors refuse by themselves to be read."""

    def __init__(self):
        super().__init__()
        self.copies = 0  # of all kinds
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        names = (argument.name for argument in function._schema.arguments)
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        source = given.get("src", given.get("self"))  # of `copy_`, of all others
        if isinstance(source, torch.Tensor) and isinstance(result, torch.Tensor):
            devices = source.device.type, result.device.type
            if devices[0] != devices[1]:
                self.copies += 1
                if not given.get("non_blocking"):
                    self.found.append(devices)
        return result


def fill_gradients(optimizer):
    """What a backward pass leaves."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
