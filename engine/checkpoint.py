"""Checkpoint files: written whole or not at all, read as tensors and plain values only."""

import contextlib
import pickle
import time
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NotRequired, Self

import torch
from accelerate.utils import recursively_apply
from pydantic import ConfigDict, PositiveFloat, with_config
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from typing_extensions import TypedDict

from common.files import also_save_as, replacing, shortened
from common.formats import Count, parsed

FORMAT_VERSION = 1
MOST_NAMED = 5


class LossScaling(TypedDict):
    """Of fp16, see `GuardedUpdate`: the scale, steps since the last overflow, and overflows."""

    scale: PositiveFloat
    clean_steps: Count
    skipped_steps: Count


@with_config(ConfigDict(extra="allow", arbitrary_types_allowed=True))
class Checkpoint(TypedDict):
    """What a training's checkpoint holds, whatever it trains, beside the format's version."""

    model: dict[str, Tensor]
    optimizer: NotRequired[dict[str, Any]]  # in the rolling one: what training goes on from
    epochs_completed: Count
    steps_completed: Count
    config: dict[str, Any]
    state: NotRequired[dict[str, Any]]
    loss_scaling: NotRequired[LossScaling]


def save_checkpoint(
    content: dict[str, Any], path: Path, also: Path | None = None, *, keep_optimizer: bool = True
) -> None:
    """Replace `path`; a kill at any moment leaves the old file or the new one.

    also: a second name that it gets. keep_optimizer: else only that one holds the optimizer, which is
    twice as large as the model. Raises RuntimeError if the disk does not take it, or a tensor
    is not finite.
    """
    damage = not_finite(content)
    if damage:
        raise RuntimeError(f"{damage} is not finite; {path} was not saved")
    _write(content, path)
    if also is not None:
        also_save_as(path, also)
        # Last: until the other is there, training goes on from this one.
        if not keep_optimizer:
            _write({name: value for name, value in content.items() if name != "optimizer"}, path)


def _write(content: dict[str, Any], path: Path) -> None:
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        torch.save({"format_version": FORMAT_VERSION, **content}, file)


class Saver:
    """As a context: saves in a thread, one checkpoint after the other, while training goes on.

    A kill loses what is still being written, as if it had come a moment earlier. Of several
    processes only the first may save.
    """

    def __init__(self, every_minutes: float | None) -> None:
        """every_minutes: between saves, so that one is due; None: it never is."""
        self.seconds = float("inf") if every_minutes is None else every_minutes * 60
        self.saved_at = time.monotonic()
        self.thread = ThreadPoolExecutor(1)
        self.running: Future[None] | None = None
        self.afterwards: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown()  # waits

    @property
    def is_due(self) -> bool:
        """Whether the last save is so long ago."""
        return time.monotonic() - self.saved_at >= self.seconds

    def save(
        self,
        content: dict[str, Any],
        path: Path,
        *,
        also: Path | None = None,
        keep_optimizer: bool = True,
        afterwards: Callable[[], None] | None = None,
    ) -> None:
        """Take a copy of what is to be saved, and begin to write it when the one before is done.

        also, keep_optimizer: see `save_checkpoint`. afterwards: is called by `settle`. Raises
        RuntimeError if the one before could not be written.
        """
        self.settle(wait=True)  # there is never more than one copy in memory
        # Training changes the tensors meanwhile.
        copied = recursively_apply(lambda tensor: tensor.detach().to("cpu", copy=True), content)
        save = partial(save_checkpoint, copied, path, also, keep_optimizer=keep_optimizer)
        self.running = self.thread.submit(save)
        self.afterwards, self.saved_at = afterwards, time.monotonic()

    def settle(self, *, wait: bool) -> None:
        """Call the `afterwards` of what has been written. Raises RuntimeError if that failed."""
        if self.running is None or not (wait or self.running.done()):
            return
        running, self.running = self.running, None
        running.result()
        if self.afterwards is not None:
            self.afterwards()


def load_checkpoint(path: Path, *, program: str, shape: Any, lazily: bool = False) -> dict[str, Any]:
    """Read a checkpoint of `program` onto the CPU. Raises ValueError if the file is none.

    shape: a TypedDict of what it has to hold. lazily: tensors come from disk when they are used,
    and are not judged, for a look at the settings; not for a file that is replaced meanwhile,
    perhaps by another machine.
    """
    content = read_torch_file(path, lazily=lazily)
    if not isinstance(content, dict) or "format_version" not in content:
        raise ValueError(f"{path} is not a checkpoint of `{program}`")
    if content["format_version"] != FORMAT_VERSION:
        version = shortened(content["format_version"], 40)
        raise ValueError(f"{path} has format {version}; this version reads {FORMAT_VERSION}")
    content = parsed(shape, content, f"{path} is not a checkpoint of `{program}`")
    if not lazily:
        refuse_damaged(content, path)
    return content


def check_resumable(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError if training cannot go on from the checkpoint at `path`."""
    if "optimizer" not in checkpoint:
        raise ValueError(
            f"{path} holds the model without the optimizer, so that training cannot go on from it; "
            "put the rolling checkpoint back that held both, or use another --output-dir"
        )


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """All of a model's weights from a checkpoint. Raises ValueError if they are another's."""
    refuse_misfits(model.state_dict(), weights, f"{path} does not fit its own settings")
    model.load_state_dict(weights)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> None:
    """An optimizer's state from a checkpoint. Raises ValueError if it is another's."""
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
        for group, own_options in zip(optimizer.param_groups, options, strict=True):
            group.update(own_options)  # the command's, not the file's
        for parameter, own in optimizer.state.items():
            for name, value in own.items():
                if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                    raise ValueError(f"{name} is {tuple(value.shape)}")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: its optimizer state does not fit: {error}") from None


def refuse_damaged(content: Any, path: Path) -> None:
    """Raise ValueError naming a tensor that holds NaN or infinity: nothing can be made of it."""
    damage = not_finite(content)
    if damage:
        raise ValueError(f"{path}: {damage} is not finite (NaN or infinity), or no plain tensor; use another")


def not_finite(content: Any, name: str = "") -> str:
    """The name of the first tensor in nested values that is not sound, else empty."""
    if isinstance(content, Tensor):
        return "" if _is_sound(content) else name
    items: Any = content.items() if isinstance(content, Mapping) else ()
    items = enumerate(content) if isinstance(content, list | tuple) else items
    inner = f"{name}." if name else ""
    return next(filter(None, (not_finite(value, f"{inner}{key}") for key, value in items)), "")


def _is_sound(tensor: Tensor) -> bool:
    """Whether it is a plain tensor whose values are all there, and none of them NaN or infinity."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_complex():
        return False
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return False  # one value that claims to be many
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() == 1:  # torch has no comparison of float8
        tensor = tensor.float()
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


class _StandIn:
    """Takes the place of an object that is not needed; does nothing with what it is given."""

    def __init__(self, *given: Any, **more: Any) -> None: ...

    __setstate__ = __init__


def read_with_stand_ins(path: Path, *, lazily: bool = True) -> Any:
    """What a file holds; stand-ins for all but tensors and plain values, so no code of it runs."""
    # Trainings of others store their arguments, message hubs, numpy's scalars beside the weights.
    names: list[str] = []
    with contextlib.suppress(Exception):  # what is wrong with the file, reading it will say
        if path.is_file():  # a pipe would be waited for
            names = get_unsafe_globals_in_checkpoint(path)
    with safe_globals([(_StandIn, name) for name in names]):
        return read_torch_file(path, lazily=lazily)


def read_torch_file(path: Path, *, lazily: bool = False) -> Any:
    """What a file of torch.save or safetensors holds. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"{path} {'is no file' if path.exists() else 'does not exist'}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mapped = lazily and zipfile.is_zipfile(path)  # older files can only be read as a whole
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:  # torch's text advises to load it unsafely
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is no file of torch.save, or holds more "
            "than tensors and plain values"
        ) from error
    except Exception as error:  # reading a file of another kind can raise anything
        reason = shortened(next(iter(str(error).splitlines()), "") or type(error).__name__)
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error


def refuse_misfits(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], complaint: str, optional: tuple[str, ...] = ()
) -> None:
    """Raise ValueError, with the complaint, that lists what keeps weights from being loaded.

    own: the model's state dict. optional: beginnings of the names that may be missing.
    """
    # torch's own complaint lists hundreds of names, and does not know a wrong dtype.
    problems = [f"{name} is not part of the model" for name in weights if name not in own]
    for name, parameter in own.items():
        if name not in weights:
            if not name.startswith(optional):
                problems.append(f"{name} is missing")
        elif weights[name].shape != parameter.shape:
            have, want = tuple(weights[name].shape), tuple(parameter.shape)
            problems.append(f"{name} is {have} instead of {want}")
        elif weights[name].is_floating_point() != parameter.is_floating_point():
            problems.append(f"{name} is {weights[name].dtype}")
    more = f" and {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
    if problems:
        raise ValueError(f"{complaint}: {'; '.join(problems[:MOST_NAMED])}{more}")
