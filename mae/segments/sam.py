"""Segments by Segment Anything, any SAM or SAM 2 checkpoint that `transformers` can load.

The procedure is that of Kirillov et al., Segment Anything, ICCV 2023, appendix B: a grid of points,
three masks per point, those kept that the model thinks good and that hardly change with the cutoff,
duplicates removed by their boxes. Images go through the encoder in batches, points through the
decoder in batches, and masks stay on the device until they are chosen.

Shapes: B images, P points at a time, K candidates kept, H x W pixels of an image.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mae.segments.segment import Segment, segment_from_pixels, verify_all

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MODEL_TYPES = ("sam", "sam2", "sam2_video")
MOST_PIXELS_AT_ONCE = 1 << 28  # of upsampled masks: a gibibyte of float32


@dataclass(frozen=True, kw_only=True)
class SamSettings:
    """How Segment Anything is used.

    model: name on the Hugging Face hub, or a folder. points_per_side: of the grid of points.
    pred_iou_thresh: least quality that the model predicts, 0 to 1. stability_score_thresh: least
    overlap, 0 to 1, of the masks cut stability_score_offset above and below the cutoff (logits).
    box_nms_thresh: of two boxes that overlap more, the one of lower quality is dropped.
    points_per_batch, batch_size: points and images at once.
    """

    model: str = "facebook/sam-vit-huge"
    points_per_side: int = 32
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    points_per_batch: int = 64
    batch_size: int = 4
    precision: Literal["auto", "bf16", "fp32"] = "auto"

    def __post_init__(self) -> None:
        for name in ("points_per_side", "points_per_batch", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is below 1")


class Sam:
    """Makes segments by Segment Anything."""

    name = "sam"
    in_processes = False

    def __init__(self, settings: SamSettings, *, device: str = "auto", local_rank: int = 0) -> None:
        """Load the model. Raises ValueError if that fails, saying what to do."""
        transformers = _import_transformers()
        import torch

        self.wanted = settings
        self.batch_size = settings.batch_size
        self.device = _device(device, local_rank)
        self.precision = _precision(settings.precision, self.device)
        model_type = _model_type(transformers, settings.model)
        if model_type not in MODEL_TYPES:
            raise ValueError(
                f"--model {settings.model} is of type {model_type}; allowed: {MODEL_TYPES}"
            )
        self.processor = transformers.AutoImageProcessor.from_pretrained(settings.model)
        model = transformers.AutoModelForMaskGeneration.from_pretrained(settings.model)
        self.model = model.eval().to(self.device)
        self.inference = torch.inference_mode

    @property
    def settings(self) -> dict[str, Any]:
        """What is stored with the segments."""
        return {"generator": self.name, **asdict(self.wanted), "precision": self.precision}

    def segments(self, images: list[np.ndarray]) -> list[list[Segment]]:
        """Segments of each image [H, W, 3] uint8, the smallest first."""
        import torch

        inputs = self.processor(images=[image.copy() for image in images], return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.device)
        sizes = inputs.get("reshaped_input_sizes")
        low_precision = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision == "bf16"
        )
        with self.inference(), low_precision:
            features = self.model.get_image_embeddings(pixels)
            return [
                self._segments_of(
                    _take(features, index),
                    size=image.shape[:2],
                    input_size=tuple(pixels.shape[-2:]) if sizes is None else sizes[index].tolist(),
                )
                for index, image in enumerate(images)
            ]

    def _segments_of(
        self, features: Any, *, size: tuple[int, int], input_size: tuple[int, int]
    ) -> list[Segment]:
        """Segments of one image. size: H, W; input_size: what of the model's input it fills.

        Hundreds of candidates wait for their boxes to be compared: each is kept as bits.
        """
        import torch
        from torchvision.ops import masks_to_boxes, nms

        bits, boxes, quality = [], [], []
        for points in self._grid(input_size).split(self.wanted.points_per_batch):
            logits, scores = self._predict(features, points)
            chosen = scores > self.wanted.pred_iou_thresh
            logits, scores = logits[chosen], scores[chosen]
            most = max(1, MOST_PIXELS_AT_ONCE // (size[0] * size[1]))
            for part, part_scores in zip(logits.split(most), scores.split(most), strict=True):
                if len(part):
                    full = self._upsample(part, size, input_size)
                    stable = self._is_stable(full)
                    inside = full[stable] > 0
                    boxes.append(masks_to_boxes(inside))
                    bits += list(np.packbits(inside.cpu().numpy(), axis=-1))
                    quality.append(part_scores[stable])
        if not bits:
            return []
        kept = nms(torch.cat(boxes), torch.cat(quality), self.wanted.box_nms_thresh).tolist()
        unpacked = (np.unpackbits(bits[index], axis=-1, count=size[1]) for index in kept)
        return verify_all(map(segment_from_pixels, unpacked))

    def _grid(self, input_size: tuple[int, int]) -> Tensor:
        """Points [N, 2], x and y in pixels of the model's input, evenly over the image.

        SAM pads the image, SAM 2 stretches it: the points follow what the image really fills.
        """
        import torch

        side = self.wanted.points_per_side
        steps = (torch.arange(side) + 0.5) / side
        y, x = torch.meshgrid(steps, steps, indexing="ij")
        return torch.stack([x * input_size[1], y * input_size[0]], -1).reshape(-1, 2)

    def _predict(self, features: Any, points: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [3P, h, w] at the decoder's resolution, and predicted quality [3P]."""
        import torch

        output = self.model(
            image_embeddings=features,
            input_points=points[None, :, None].to(self.device),
            input_labels=torch.ones(1, len(points), 1, dtype=torch.int64, device=self.device),
            multimask_output=True,
        )
        return output.pred_masks.flatten(0, 2).float(), output.iou_scores.flatten().float()

    def _upsample(
        self, logits: Tensor, size: tuple[int, int], input_size: tuple[int, int]
    ) -> Tensor:
        """Logits [K, h, w] to the image's pixels [K, H, W]; the processor knows about padding."""
        full = self.processor.post_process_masks(
            [logits[:, None]],
            [list(size)],
            reshaped_input_sizes=[list(input_size)],
            binarize=False,
        )
        return full[0][:, 0].float()

    def _is_stable(self, logits: Tensor) -> Tensor:
        """Whether the cutoff hardly matters to a mask that is not empty, [K] bool.

        The higher cut lies inside the lower one, so the ratio of their areas is their overlap.
        """
        offset = self.wanted.stability_score_offset
        inner = (logits > offset).sum((1, 2))
        outer = (logits > -offset).sum((1, 2))
        stable = inner >= self.wanted.stability_score_thresh * outer
        return stable & (logits > 0).any(-1).any(-1)


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "--generator sam needs the optional package transformers: pip install transformers, "
            "or use --generator felzenszwalb"
        ) from None
    return transformers


def _model_type(transformers: Any, model: str) -> str:
    try:
        return str(transformers.AutoConfig.from_pretrained(model).model_type)
    except (OSError, ValueError) as error:
        what = "folder" if Path(model).is_dir() else "model (a folder, or a name on the hub)"
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--model {model} cannot be loaded as a {what}: {reason}") from None


def _device(wanted: str, local_rank: int) -> torch.device:
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU is usable here")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def _precision(wanted: str, device: torch.device) -> str:
    import torch

    if wanted == "auto":
        # torch also emulates bf16, slowly, on GPUs that have none.
        on_cuda = device.type == "cuda"
        has_it = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_it else "fp32"
    return wanted


def _take(features: Any, index: int) -> Any:
    """One image's features; SAM has one map [B, C, h, w], SAM 2 a list of them."""
    if isinstance(features, list | tuple):
        return [level[index : index + 1] for level in features]
    return features[index : index + 1]
