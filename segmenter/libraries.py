"""Encoders of others: timm's, transformers' and those of a Python file, each asked its own way.

Their tokens, mean, deviation, interpolation and position embeddings are the library's; `maps.py`
finds the maps among what it returns. Read `make_encoder` first.

Shapes: B images, H x W pixels, C channels, maps [B, C, h, w], of stride H / h.
"""

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.files import shortened
from common.options import load_plugin
from engine.vit import IMAGE_CHANNELS
from segmenter.config import ProbeConfig, TrainConfig, encoder_path
from segmenter.encoder import Encoder, read_encoder
from segmenter.maps import LEVELS, all_maps, last_map, pyramid_levels, set_size, stride_of

Interpolation = Literal["bilinear", "bicubic", "lanczos", "nearest"]
PIL_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
# Of a name without timm's own groups: what comes before the blocks, and which block it is of.
STEM = re.compile(r"(.*\.)?(patch_)?embed(ding)?s?\.|.*pre_la?y?r?norm|(cls|mask)_token$|pos_embed$")
BLOCK = re.compile(r"(?:.*?\.)?(?:layers?|blocks?|stages?|h)\.(\d+)\.(?:(?:layers?|blocks?)\.(\d+)\.)?")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LibraryShape:
    """All that makes an encoder again, without its weights, and how it is used."""

    library: Literal["timm", "hf", "python"]
    name: str  # timm's architecture, transformers' type of model, or FILE.py:FUNCTION
    arguments: dict[str, Any]  # of timm.create_model, or transformers' configuration
    image_size: Annotated[int, Field(ge=1)]  # pixels per side that it is made for
    patch_size: Annotated[int, Field(ge=1)]  # the stride of its last map; images are padded to it
    widths: list[int]  # channels of each map that is used: one, or UPerNet's four
    strides: list[int]
    places: list[int]  # of those maps among all that it gives; empty: its final tokens
    mean: list[float]  # of RGB pixels in 0 to 1
    std: list[float]
    interpolation: Interpolation  # by which images are scaled for it


class LibraryEncoder(nn.Module):
    """Tokens [B, N, C] of normalised images, or UPerNet's four maps, from a model of others."""

    def __init__(self, model: Any, shape: LibraryShape) -> None:
        super().__init__()
        self.model: Any = model
        self.shape, self.embed_dim = shape, shape.widths[-1]
        self.depths = shape.places

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """[B, 3, H, W] normalised pixels, whole patches, to tokens [B, N, C]; four [B, C, h, w]."""
        if self.depths:
            maps = all_maps(self.model, self.shape.library, images, self.shape.image_size)
            return [maps[place] for place in self.depths]
        last = last_map(self.model, self.shape.library, images, self.shape.image_size)
        return last.flatten(2).transpose(1, 2)

    def group_matcher(self, coarse: bool = False) -> Callable[[str], Any]:
        """timm's hook for layer-wise rates: the model's own groups, else blocks by their names."""
        if hasattr(self.model, "group_matcher"):
            groups = self.model.group_matcher(coarse=False)
            # One by one, since groups are numbered by what all names of the model have.
            names = [("", None), *((name, None) for name, _ in self.model.named_parameters())]
            numbers = group_with_matcher(iter(names), groups, reverse=True)
            return lambda name: numbers[name.removeprefix("model.")]
        return lambda name: _layer_of(name.removeprefix("model."))

    def no_weight_decay(self) -> set[str]:
        """timm's hook: the model's own, else embeddings of tokens and places."""
        if hasattr(self.model, "no_weight_decay"):
            own = set(self.model.no_weight_decay())
        else:
            tokens = re.compile(r"(^|[._])(position|pos|cls|class|mask|register)_?(embed\w*|tokens?)")
            own = {name for name, _ in self.model.named_parameters() if tokens.search(name)}
        return {f"model.{name}" for name in own}


def _layer_of(name: str) -> tuple[float, ...]:
    """(0,) of embeddings, (1, block, ...) of blocks, and infinity of what comes after them."""
    if found := BLOCK.match(name):
        return (1.0, *(float(number) for number in found.groups() if number is not None))
    return (0.0,) if STEM.match(name) else (math.inf,)


# --- Making one ---


def make_encoder(init: str, side: int, *, pyramid: bool, drop_path: float = 0.0) -> LibraryEncoder:
    """With the library's weights, for images of so many pixels per side. Raises ValueError.

    pyramid: four maps, for UPerNet.
    """
    with _said_of(init):
        library, name, arguments, model, pixels = _load(init, drop_path)
    model.eval()
    # What it gives is seen by asking it, as whoever uses it will.
    with _said_of(init), torch.inference_mode():
        patch = stride_of(model, library, pixels)
        side += -side % patch
        set_size(model, side)
        image = torch.zeros(1, IMAGE_CHANNELS, side, side)
        maps, places = [last_map(model, library, image, side)], list[int]()
        if pyramid:
            found = all_maps(model, library, image, side)
            places = pyramid_levels([side // one.shape[-1] for one in found])
            maps = [found[place] for place in places]
            if len(maps) != LEVELS:
                raise ValueError(f"--decoder upernet needs four depths or stages; it has {len(maps)}")
    shape = LibraryShape(
        library=library, name=name, arguments=arguments, image_size=side, patch_size=patch,
        widths=[one.shape[1] for one in maps], strides=[side // one.shape[-1] for one in maps],
        places=places, mean=pixels["mean"], std=pixels["std"], interpolation=pixels["interpolation"],
    )  # fmt: skip
    return LibraryEncoder(model, shape)


def remake_encoder(shape: LibraryShape, drop_path: float = 0.0) -> LibraryEncoder:
    """The same without its weights, which a checkpoint has. Raises ValueError."""
    with _said_of(shape.name):
        if shape.library == "timm":
            model = _timm_model(shape.name, shape.arguments, drop_path)
        elif shape.library == "hf":
            model = _hf_model(shape.arguments, drop_path)
        else:
            model = _called(shape.name)[0]
        set_size(model, shape.image_size)
    return LibraryEncoder(model, shape)


def look_at_encoder(config: TrainConfig | ProbeConfig) -> None:
    """Raise ValueError unless the encoder is there and is what the run needs; fetches nothing."""
    pyramid = isinstance(config, TrainConfig) and config.model.decoder == "upernet"
    if isinstance(config.init, Path):
        read_encoder(config.init, config.model, lazily=True, pyramid=pyramid)
    elif encoder_path(config.init) is not None:
        make_encoder(config.init, config.protocol.crop_size, pyramid=pyramid)
    elif config.init.startswith("timm:"):
        import timm

        name = config.init.partition(":")[2]
        if not timm.is_model(name.partition(".")[0]):
            raise ValueError(f"{config.init}: timm has no such model; its names: timm.list_pretrained()")


@contextmanager
def _said_of(init: str) -> Iterator[None]:
    """Whatever goes wrong in a library, in one line about the encoder."""
    try:
        yield
    # A model of others can raise anything: for its configuration, its weights, its imports.
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        text = f"its configuration has no {text}" if isinstance(error, KeyError) else text
        if isinstance(error, OSError) or "offline" in text.lower() or "internet" in text.lower():
            is_path = encoder_path(init) is not None
            text = shortened(text.splitlines()[0], 160)
            text += "" if is_path else "; where there is no network, give a folder instead of a name"
        raise ValueError(f"{init} cannot be used: {shortened(text.splitlines()[0], 300)}") from error


def _load(init: str, drop_path: float) -> tuple[Any, str, dict[str, Any], Any, dict[str, Any]]:
    """Library, name, arguments, the model with its weights, and what it says of pixels."""
    path = encoder_path(init)
    source = str(path or init.partition(":")[2])
    if init.startswith("timm:"):
        return "timm", *_load_timm(source, path is not None, drop_path)
    if init.startswith("hf:"):
        return "hf", *_load_hf(source, drop_path)
    model, told = _called(init)
    return "python", init, {}, model, told


def _load_timm(
    source: str, is_folder: bool, drop_path: float
) -> tuple[str, dict[str, Any], Any, dict[str, Any]]:
    from timm.models._hub import load_model_config_from_path

    name, arguments = source, dict[str, Any]()
    if is_folder:
        _, name, given = load_model_config_from_path(source)
        arguments = dict(given or {})
    model = _timm_model(f"local-dir:{source}" if is_folder else source, arguments, drop_path, pretrained=True)
    own = model.pretrained_cfg
    scaling = own.get("interpolation", "bicubic")
    told = {"mean": own["mean"], "std": own["std"], "interpolation": scaling}
    return name, arguments, model, _pixels(told)


def _timm_model(
    name: str, arguments: Mapping[str, Any], drop_path: float, *, pretrained: bool = False
) -> Any:
    """timm's model without a head, for images of any size where it has that."""
    import timm

    given = {**arguments, "num_classes": 0}
    if drop_path:
        given["drop_path_rate"] = drop_path
    ways: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {})
    for any_size in ways:
        try:
            model = timm.create_model(name, pretrained=pretrained, **given, **any_size)
            break
        except TypeError:  # it has no such argument: a convolution needs none
            if not any_size:
                raise
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"timm's {name} gives no patch tokens (it has no forward_intermediates)")
    return model


def _load_hf(source: str, drop_path: float) -> tuple[str, dict[str, Any], Any, dict[str, Any]]:
    from transformers import AutoConfig, AutoModel
    from transformers.image_processing_base import ImageProcessingMixin
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()  # of a pooler that it lacks, and that is not used
    config = AutoConfig.from_pretrained(source)
    if config.model_type == "timm_wrapper":
        raise ValueError("it is timm's; give timm:FOLDER, or timm:NAME")
    config = _hf_config(config, drop_path)
    model = AutoModel.from_pretrained(source, config=config, dtype=torch.float32)
    model = _vision_part(model)
    try:
        said, _ = ImageProcessingMixin.get_image_processor_dict(source)
        scaling = PIL_INTERPOLATIONS[said.get("resample", 3)]
        told = {"mean": said["image_mean"], "std": said["image_std"], "interpolation": scaling}
    except (OSError, KeyError) as error:
        raise ValueError(
            "its preprocessor_config.json, with image_mean, image_std and resample, is missing"
        ) from error
    return config.model_type, config.to_dict(), model, _pixels(told)


def _hf_model(arguments: Mapping[str, Any], drop_path: float) -> Any:
    from transformers import AutoConfig, AutoModel

    given = {name: value for name, value in arguments.items() if name != "model_type"}
    config = AutoConfig.for_model(arguments["model_type"], **given)
    return _vision_part(AutoModel.from_config(_hf_config(config, drop_path)))


def _hf_config(config: Any, drop_path: float) -> Any:
    if drop_path and hasattr(config, "drop_path_rate"):
        config.drop_path_rate = drop_path
    elif drop_path:
        logger.info("transformers' %s has no drop path", config.model_type)
    if hasattr(config, "mask_ratio"):  # ViTMAE hides nothing here
        config.mask_ratio = 0.0
    return config


def _vision_part(model: Any) -> Any:
    """Of a model of images and text, that of images; without a pooler, which nothing here uses."""
    model = getattr(model, "vision_model", model)
    model.pooler = None
    if getattr(model, "use_head", False):  # SigLIP's pooler
        model.use_head, model.head = False, None
    return model


def _called(name: str) -> tuple[Any, dict[str, Any]]:
    """What FILE.py:FUNCTION returns: a module, and mean, std and stride in a dictionary."""
    import sys

    file, _, function = name.rpartition(":")
    load_plugin(Path(file))
    made = getattr(sys.modules[f"segmae_plugin_{Path(file).resolve()}"], function, None)
    if not callable(made):
        raise ValueError(f"{file} has no function {function}")
    returned = made()
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], nn.Module)):
        raise ValueError("it has to return a module, and {'mean': ..., 'std': ..., 'stride': ...}")
    model, told = returned
    if missing := {"mean", "std", "stride"} - set(told):
        raise ValueError(f"it does not say {', '.join(sorted(missing))}")
    return model, {**_pixels({"interpolation": "bilinear", **told}), "stride": int(told["stride"])}


def _pixels(told: Mapping[str, Any]) -> dict[str, Any]:
    """Mean, deviation and interpolation, judged."""
    values = {name: [float(value) for value in told[name]] for name in ("mean", "std")}
    if any(len(value) != IMAGE_CHANNELS for value in values.values()) or min(values["std"]) <= 0:
        raise ValueError(f"mean and std have to be {IMAGE_CHANNELS} numbers each, std above 0")
    # timm's "random" means one of two in training.
    scaling = told["interpolation"]
    return {**values, "interpolation": "bicubic" if scaling == "random" else scaling}


def freeze_unused(encoder: LibraryEncoder) -> None:
    """Nothing learns that has no part in the tokens: poolers, a norm behind the pyramid's maps.

    Several processes would wait for its gradients.
    """
    side = encoder.shape.image_size
    device = next(encoder.parameters()).device
    found = encoder.eval()(torch.zeros(1, IMAGE_CHANNELS, side, side, device=device))
    torch.stack([one.sum() for one in (found if isinstance(found, list) else [found])]).sum().backward()
    for parameter in encoder.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


# --- What it costs ---


def encoder_cost(encoder: Encoder | LibraryEncoder, side: int, device: Any) -> dict[str, float]:
    """Weights of an encoder, and FLOPs of an image of so many pixels per side, forwards."""
    was_training, image = encoder.training, torch.zeros(1, IMAGE_CHANNELS, side, side, device=device)
    encoder.eval()
    # As plain products, which are counted: torch knows no FLOPs of a CPU's fused attention.
    kernel = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), kernel, FlopCounterMode(display=False) as counter:
        encoder(F.pad(image, (0, -side % encoder.shape.patch_size) * 2))
    encoder.train(was_training)
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    return {"parameters": parameters, "flops_per_image": counter.get_total_flops(), "image_size": side}
