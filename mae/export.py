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

import torch
from PIL.Image import Resampling
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from common.files import UNFINISHED, check_output_folder, is_marked, read_bytes
from engine.vit import IMAGE_CHANNELS, IMAGE_MEAN, IMAGE_STD
from mae.card import write_card
from mae.config import MethodConfig, ModelConfig, parse_group
from mae.masking import METHODS
from mae.weights import KIND, load_checkpoint, make_encoder

Library = Literal["timm", "transformers", "mmseg"]
CARD, MAE_FOLDER, BACKBONE = "README.md", "mae", "backbone.pth"
# Our names to those of transformers' files, which all of its versions read: each is applied in turn.
TRANSFORMERS_NAMES = {
    r"\bpos_embed$": "embeddings.position_embeddings",
    r"\bcls_token$": "embeddings.cls_token",
    r"\bpatch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"\bblocks\.": "encoder.layer.",
    r"\bnorm\.": "layernorm.",
    r"\bdecoder_blocks\.": "decoder_layers.",
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
    checkpoint_path: Path, to: Library, out: Path, *, licence: str | None = None, push: str | None = None
) -> str:
    """Write the folder `out` for a library, and upload it to the repository `push` of the hub, if any.

    Returns the lines of Python that load it. Raises ValueError if a path cannot be used, or the folder
    is there and was not made so; RuntimeError if the hub does not take it.
    """
    if push is not None:
        _check_repository(push)
    checkpoint = load_checkpoint(checkpoint_path)
    config = parse_group(ModelConfig, checkpoint["config"], checkpoint_path)
    encoder = make_encoder(checkpoint["model"], config, checkpoint_path)
    with _replacing_folder(out) as folder:
        # The lines say FOLDER: on the hub, where the card is read, its path here would mean nothing.
        if to == "timm":
            # config.json tells size, mean and deviation, so that whoever loads it need not know them.
            save_for_hf(encoder, str(folder), safe_serialization=True)
            lines = "import timm\n\n"
            lines += 'model = timm.create_model("local-dir:FOLDER", pretrained=True)  # any img_size='
        elif to == "transformers":
            method = parse_group(MethodConfig, checkpoint["config"], checkpoint_path)
            lines = _for_transformers(encoder, checkpoint["model"], config, method, folder)
        else:
            lines = _for_mmseg(encoder, config, folder)
        write_card(folder / CARD, checkpoint, checkpoint_path, library=to, lines=lines, licence=licence)
    if push is not None:
        _upload(out, push)
    return lines.replace("FOLDER", str(out))


def _for_transformers(
    encoder: VisionTransformer, weights: Mapping[str, Tensor], config: ModelConfig, method: MethodConfig,
    folder: Path,
) -> str:  # fmt: skip
    about: dict[str, Any] = {
        "architectures": ["ViTModel"], "model_type": "vit",
        "hidden_size": config.encoder.width, "num_hidden_layers": config.encoder.depth,
        "num_attention_heads": config.encoder.heads, "intermediate_size": 4 * config.encoder.width,
        "image_size": config.image_size, "patch_size": config.patch_pixels, "num_channels": IMAGE_CHANNELS,
        "layer_norm_eps": 1e-6,  # theirs is 1e-12; what is not here is as transformers has it by default
    }  # fmt: skip
    _save_transformers(folder, encoder.state_dict(), about)
    lines = "from transformers import ViTModel\n\n"
    # Its pooler is a layer that pretraining does not have.
    lines += 'model = ViTModel.from_pretrained("FOLDER", add_pooling_layer=False)'
    chosen = METHODS[method.mask_method]
    if chosen.removes_tokens and not chosen.extra_channels:  # as MAE does: the whole of it, with its decoder
        about |= {
            "architectures": ["ViTMAEForPreTraining"], "model_type": "vit_mae",
            "decoder_hidden_size": config.decoder_width, "decoder_num_hidden_layers": config.decoder_depth,
            "decoder_num_attention_heads": config.decoder_heads,
            "decoder_intermediate_size": 4 * config.decoder_width,
            "mask_ratio": method.mask_ratio, "norm_pix_loss": config.norm_pix_loss,
        }  # fmt: skip
        of_decoder = ("decoder", "mask_token")
        parts = {name: "decoder." if name.startswith(of_decoder) else "vit." for name in weights}
        whole = {parts[name] + name: weight for name, weight in weights.items()}
        _save_transformers(folder / MAE_FOLDER, whole, about)
        lines += "\n\nfrom transformers import ViTMAEForPreTraining  # with its decoder\n\n"
        lines += f'whole = ViTMAEForPreTraining.from_pretrained("FOLDER", subfolder="{MAE_FOLDER}")'
    return lines


def _save_transformers(folder: Path, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Weights, configuration, and what prepares images for them."""
    content = {}
    for name, weight in _renamed(weights, TRANSFORMERS_NAMES).items():
        before, is_qkv, after = name.partition(".attn.qkv.")
        if is_qkv:  # [3 D, D] or [3 D]: timm makes all three by one matrix
            for part, piece in zip(("query", "key", "value"), weight.chunk(3), strict=True):
                content[f"{before}.attention.attention.{part}.{after}"] = piece.contiguous()
        else:
            content[name] = weight
    folder.mkdir(exist_ok=True)
    # Without the format from_pretrained refuses the file.
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    size = {"height": about["image_size"], "width": about["image_size"]}
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": size,
        "resample": Resampling.BILINEAR, "do_rescale": True,
        "do_normalize": True, "image_mean": IMAGE_MEAN, "image_std": IMAGE_STD,
    }  # fmt: skip
    for name, settings in (("config.json", about), ("preprocessor_config.json", processor)):
        (folder / name).write_text(json.dumps(settings, indent=1) + "\n")


def _for_mmseg(encoder: VisionTransformer, config: ModelConfig, folder: Path) -> str:
    weights, size = _renamed(encoder.state_dict(), MMSEG_NAMES), config.encoder
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


def _renamed(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, weight in weights.items():
        for pattern, new in names.items():
            name = re.sub(pattern, new, name)
        renamed[name] = weight
    return renamed


@contextmanager
def _replacing_folder(out: Path) -> Iterator[Path]:
    """Yields a folder to write into; after the block it is called `out`. What was there was made so."""
    check_output_folder(out, "--out")
    card = out / CARD  # it bears our mark
    is_ours = card.is_file() and is_marked(KIND)(read_bytes(card))
    if out.exists() and any(out.iterdir()) and not is_ours:
        raise ValueError(f"--out {out} is there, and this command did not make it; name another")
    aside = out.with_name(out.name + UNFINISHED)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        if out.exists():  # renaming replaces empty folders only
            shutil.rmtree(out)
        aside.replace(out)
    except OSError as error:
        raise RuntimeError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_repository(name: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)  # before anything is written
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
