"""Weights where people need them: folders that timm, transformers or mmsegmentation load by themselves.

    export_folder(Path("OUT/pretrain_output/patches/checkpoint-50.pth"), "timm", Path("encoder"))

Each holds a plain 3-channel ViT, whatever the masking method was, and a model card (mae/card.py).
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor

from common.files import UNFINISHED, check_output_folder, is_marked, read_bytes
from engine.vit import IMAGE_CHANNELS, IMAGE_MEAN, IMAGE_STD
from mae.card import write_card
from mae.config import MethodConfig, ModelConfig, parse_group
from mae.masking import METHODS
from mae.weights import KIND, load_checkpoint, make_encoder, timm_arguments

Format = Literal["timm", "transformers", "mmseg"]
WEIGHTS, CARD = "model.safetensors", "README.md"
MAE_FOLDER, BACKBONE = "mae", "backbone.pth"
# Our names to those of transformers' files, which all of its versions read: each is applied in turn.
TRANSFORMERS_NAMES = {
    r"^pos_embed$": "embeddings.position_embeddings",
    r"^cls_token$": "embeddings.cls_token",
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^blocks\.": "encoder.layer.",
    r"^norm\.": "layernorm.",
    r"^decoder_blocks\.": "decoder_layers.",
    r"\.attn\.proj\.": ".attention.output.dense.",
    r"\.norm1\.": ".layernorm_before.",
    r"\.norm2\.": ".layernorm_after.",
    r"\.mlp\.fc1\.": ".intermediate.dense.",
    r"\.mlp\.fc2\.": ".output.dense.",
}
# To those of mmsegmentation's MAE backbone, as its configurations of MAE expect them.
MMSEG_NAMES = {
    r"^patch_embed\.proj\.": "patch_embed.projection.",
    r"^blocks\.": "layers.",
    r"^norm\.": "norm1.",
    r"\.norm(\d)\.": r".ln\1.",
    r"\.mlp\.fc1\.": ".ffn.layers.0.0.",
    r"\.mlp\.fc2\.": ".ffn.layers.1.",
}


def export_folder(
    checkpoint_path: Path, to: Format, out: Path, *, licence: str | None = None, push: str | None = None
) -> str:
    """Write the folder `out` for a library, and upload it to the repository `push` of the hub, if any.

    Returns the lines of Python that load it. Raises ValueError if a path cannot be used, or the folder
    is there and was not made so; RuntimeError if the hub does not take it.
    """
    if push is not None:
        _check_repository(push)
    check_output_folder(out, "--out")
    checkpoint = load_checkpoint(checkpoint_path)
    config = parse_group(ModelConfig, checkpoint["config"], checkpoint_path)
    method = parse_group(MethodConfig, checkpoint["config"], checkpoint_path)
    with _replacing_folder(out) as folder:
        if to == "timm":
            lines = _for_timm(checkpoint, config, checkpoint_path, folder)
        elif to == "transformers":
            lines = _for_transformers(checkpoint, config, method, checkpoint_path, folder)
        else:
            lines = _for_mmseg(checkpoint, config, checkpoint_path, folder)
        write_card(folder / CARD, checkpoint, checkpoint_path, library=to, lines=lines, licence=licence)
    if push is not None:
        _upload(out, push)
    return lines.replace("FOLDER", str(out))


def _for_timm(checkpoint: dict[str, Any], config: ModelConfig, path: Path, folder: Path) -> str:
    name, values = timm_arguments(config)
    model = timm.create_model(name, **values)
    model.load_state_dict(make_encoder(checkpoint["model"], config, path).state_dict())
    save_for_hf(model, str(folder), safe_serialization=True)
    return 'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True)  # any img_size='


def _for_transformers(
    checkpoint: dict[str, Any], config: ModelConfig, method: MethodConfig, path: Path, folder: Path
) -> str:
    encoder = make_encoder(checkpoint["model"], config, path).state_dict()
    _save_transformers(folder, "ViTModel", "vit", _renamed_for_transformers(encoder), _vit_config(config))
    lines = "from transformers import ViTModel\n\n"
    lines += 'model = ViTModel.from_pretrained("FOLDER", add_pooling_layer=False)'
    chosen = METHODS[method.mask_method]
    if chosen.removes_tokens and not chosen.extra_channels:  # as MAE does: the whole of it, with its decoder
        decoder = {
            "decoder_hidden_size": config.decoder_width,
            "decoder_num_hidden_layers": config.decoder_depth,
            "decoder_num_attention_heads": config.decoder_heads,
            "decoder_intermediate_size": 4 * config.decoder_width,
            "mask_ratio": method.mask_ratio, "norm_pix_loss": config.norm_pix_loss,
        }  # fmt: skip
        whole = {
            ("decoder." if name.startswith(("decoder", "mask_token")) else "vit.") + new: weight
            for name, weight in checkpoint["model"].items()
            for new, weight in _renamed_for_transformers({name: weight}).items()
        }
        (folder / MAE_FOLDER).mkdir()
        settings = {**_vit_config(config), **decoder}
        _save_transformers(folder / MAE_FOLDER, "ViTMAEForPreTraining", "vit_mae", whole, settings)
        lines += "\n\nfrom transformers import ViTMAEForPreTraining  # with its decoder\n\n"
        lines += f'whole = ViTMAEForPreTraining.from_pretrained("FOLDER", subfolder="{MAE_FOLDER}")'
    return lines


def _vit_config(config: ModelConfig) -> dict[str, Any]:
    size = config.encoder
    return {
        "hidden_size": size.width, "num_hidden_layers": size.depth, "num_attention_heads": size.heads,
        "intermediate_size": 4 * size.width,
        "image_size": config.image_size, "patch_size": config.patch_pixels, "num_channels": IMAGE_CHANNELS,
        "layer_norm_eps": 1e-6, "hidden_act": "gelu", "qkv_bias": True,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip


def _renamed_for_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, weight in weights.items():
        new = _renamed(name, TRANSFORMERS_NAMES)
        if ".attn.qkv." not in new:
            renamed[new] = weight
            continue
        for part, piece in zip(("query", "key", "value"), weight.chunk(3), strict=True):
            renamed[new.replace(".attn.qkv.", f".attention.attention.{part}.")] = piece
    return renamed


def _save_transformers(
    folder: Path, architecture: str, model_type: str, weights: Mapping[str, Tensor],
    settings: Mapping[str, Any],
) -> None:  # fmt: skip
    """Weights, configuration, and what prepares images for them."""
    content = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(content, folder / WEIGHTS, metadata={"format": "pt"})  # without it from_pretrained refuses
    about = {"architectures": [architecture], "model_type": model_type, **settings}
    (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n")
    side = settings["image_size"]
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True, "size": {"height": side, "width": side},
        "do_rescale": True, "do_normalize": True, "image_mean": IMAGE_MEAN, "image_std": IMAGE_STD,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")


def _for_mmseg(checkpoint: dict[str, Any], config: ModelConfig, path: Path, folder: Path) -> str:
    encoder = make_encoder(checkpoint["model"], config, path).state_dict()
    weights = {_renamed(name, MMSEG_NAMES): weight for name, weight in encoder.items()}
    size = config.encoder
    for number in range(size.depth):  # BEiT's scales, which MAE has not: by default 0.1
        for name in ("gamma_1", "gamma_2"):
            weights[f"layers.{number}.{name}"] = torch.ones(size.width)
    torch.save({"state_dict": weights}, folder / BACKBONE)
    return (
        f"backbone = dict(type='MAE', img_size={config.image_size}, patch_size={config.patch_pixels}, "
        f"embed_dims={size.width},\n    num_layers={size.depth}, num_heads={size.heads}, mlp_ratio=4, "
        f"init_values=1.0, norm_cfg=dict(type='LN', eps=1e-6),\n"
        f"    init_cfg=dict(type='Pretrained', checkpoint='FOLDER/{BACKBONE}'))"
    )


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for pattern, new in names.items():
        name = re.sub(pattern, new, name)
    return name


@contextmanager
def _replacing_folder(out: Path) -> Iterator[Path]:
    """Yields a folder to write into; after the block it is called `out`. What was there was made so."""
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or _is_ours(out))):
        raise ValueError(f"--out {out} is there, and this command did not make it; name another")
    aside = out.with_name(out.name + UNFINISHED)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        if out.exists():
            shutil.rmtree(out)
        aside.replace(out)
    except OSError as error:
        raise RuntimeError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    return (folder / CARD).is_file() and is_marked(KIND)(read_bytes(folder / CARD))


def _check_repository(name: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"--push {name}: give OWNER/NAME: {error}") from None


def _upload(folder: Path, repository: str) -> None:
    """The one thing here that leaves this machine."""
    from huggingface_hub import HfApi

    try:
        api = HfApi(library_name="SegMAE")
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Weights and model card")
    except Exception as error:  # by its version and the network, a client raises what it likes
        said = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        advice = "`hf auth login` tells it who you are; the same command tries again"
        raise RuntimeError(f"--push {repository}: {said}; {folder} is written. {advice}") from None
