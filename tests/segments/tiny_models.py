"""A tiny random model of every type that transformers loads for mask generation, in a folder."""

from pathlib import Path

PROMPTS = {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 8}
DECODER = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
LAYERS = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
FPN = {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_hidden_size": 32}
MEMORY = {
    "memory_attention_hidden_size": 32, "memory_attention_num_layers": 1,
    "memory_attention_num_attention_heads": 1, "memory_attention_rope_feat_sizes": [4, 4],
    "memory_encoder_hidden_size": 32, "memory_encoder_output_channels": 16,
    "mask_downsampler_embed_dim": 32, "memory_fuser_embed_dim": 32,
    "memory_fuser_intermediate_dim": 32,
}  # fmt: skip
PERCEIVER = {
    "perceiver_resampler_hidden_size": 16, "perceiver_resampler_mlp_intermediate_size": 32,
    "perceiver_resampler_num_latents": 4, "perceiver_resampler_num_latents_2d": 4,
    "perceiver_resampler_num_layers": 1,
}  # fmt: skip
SAM3_PROMPTS = {**PROMPTS, "image_size": 56, "patch_size": 14}


def make_tiny_model(kind: str, folder: Path) -> Path:
    """Save it as `from_pretrained` reads it."""
    import torch
    import transformers

    torch.manual_seed(0)  # of position embeddings, which are no parameters
    model = MODELS[kind](transformers)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():  # so that masks of all sizes come out
        if parameter.dim() > 1:
            parameter.data.normal_(0, 2 / parameter[0].numel() ** 0.5, generator=generator)
            if "upscale_conv" in name:  # no chequered masks
                parameter.data[:] = parameter.data[:, :, :1, :1].clone()
        elif name.endswith("bias"):
            parameter.data.normal_(0, 0.1, generator=generator)
    model.save_pretrained(folder)
    processor(transformers, kind).save_pretrained(folder)
    return folder


def processor(t, kind):
    if kind in ("sam", "sam_hq"):
        return t.SamImageProcessor(
            size={"longest_edge": 64}, pad_size={"height": 64, "width": 64},
            mask_size={"longest_edge": 16}, mask_pad_size={"height": 16, "width": 16},
        )  # fmt: skip
    make, side = (t.Sam3ImageProcessor, 56) if "sam3" in kind else (t.Sam2ImageProcessor, 64)
    return make(size={"height": side, "width": side}, mask_size={"height": 16, "width": 16})


def image_model(t, name, vision, prompts=PROMPTS, **decoder):
    """Of an encoder of images, one of prompts and a decoder: the shape of every type."""
    config = getattr(t, f"{name}Config")(
        vision_config=vision, prompt_encoder_config=prompts,
        mask_decoder_config={**DECODER, **decoder},
    )  # fmt: skip
    return getattr(t, f"{name}Model")(config)


def video_config(t, name, vision, prompts=PROMPTS, **more):
    """The same with a memory of earlier frames."""
    return getattr(t, f"{name}Config")(
        vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=DECODER,
        image_size=prompts["image_size"], **MEMORY, **more,
    )  # fmt: skip


def vit():
    return {
        "hidden_size": 32, "image_size": 64, "patch_size": 16, "output_channels": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "window_size": 2,
        "global_attn_indexes": [1], "mlp_dim": 64, "num_pos_feats": 16,
    }  # fmt: skip


def hiera(t):
    backbone = t.Sam2HieraDetConfig(
        hidden_size=16, num_attention_heads=1, blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[16, 32, 64, 128], num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[4, 4, 4, 4], global_attention_blocks=[3], image_size=[64, 64],
        window_positional_embedding_background_size=[4, 4],
    )  # fmt: skip
    return t.Sam2VisionConfig(backbone_config=backbone, backbone_channel_list=[128, 64, 32, 16], **FPN)


def sam3_video(t):
    tracker = video_config(
        t, "Sam3TrackerVideo", sam3_vision(t), SAM3_PROMPTS,
        memory_attention_feed_forward_hidden_size=32,
    )  # fmt: skip
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "projection_dim": 32, "vocab_size": 100,
        "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    detector = t.Sam3Config(
        vision_config=sam3_vision(t), text_config=text, geometry_encoder_config=LAYERS,
        detr_encoder_config=LAYERS, detr_decoder_config={**LAYERS, "num_queries": 4},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2},
    )  # fmt: skip
    return t.Sam3VideoModel(t.Sam3VideoConfig(detector_config=detector, tracker_config=tracker))


def sam3_vision(t):
    backbone = t.Sam3ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=56, patch_size=14, window_size=2, global_attn_indexes=[1],
        pretrain_image_size=28,
    )  # fmt: skip
    return t.Sam3VisionConfig(backbone_config=backbone, **FPN)


def repvit(t):
    model_args = {
        "in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3],
        "embed_dim": [8, 16, 24, 32], "depth": [1, 1, 1, 1],
    }  # fmt: skip
    backbone = t.TimmWrapperConfig(architecture="repvit_m1", model_args=model_args)
    return t.EdgeTamVisionConfig(backbone_config=backbone, backbone_channel_list=[32, 24, 16, 8], **FPN)


MODELS = {
    "sam": lambda t: image_model(t, "Sam", vit()),
    "sam_hq": lambda t: image_model(t, "SamHQ", vit(), vit_dim=32),
    "sam2": lambda t: image_model(t, "Sam2", hiera(t)),
    "sam2_video": lambda t: t.Sam2VideoModel(
        video_config(t, "Sam2Video", hiera(t), memory_attention_feed_forward_hidden_size=32)),
    "sam3_tracker": lambda t: image_model(t, "Sam3Tracker", sam3_vision(t), SAM3_PROMPTS),
    "sam3_video": sam3_video,
    "edgetam": lambda t: image_model(t, "EdgeTam", repvit(t)),
    "edgetam_video": lambda t: t.EdgeTamVideoModel(video_config(
        t, "EdgeTamVideo", repvit(t), memory_attention_mlp_hidden_size=32, **PERCEIVER)),
}  # fmt: skip
