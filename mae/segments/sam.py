"""Segments by Segment Anything, any SAM or SAM 2 checkpoint that `transformers` can load.

The procedure is that of Kirillov et al., Segment Anything, ICCV 2023, appendix B: a grid of points,
three masks per point, those kept that the model thinks good and that hardly change with the cutoff,
duplicates removed by their boxes. Images go through the encoder in batches, points through the
decoder in batches, and masks stay on the device until they are chosen.

Shapes: B images, P points at a time, K candidates kept, H x W pixels of an image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes, nms

from common.console import number_of
from common.devices import choose_device, choose_precision
from mae.segments.segment import Segment, ordered, segment_from_pixels
from mae.segments.settings import SamSettings, as_stored

MODEL_TYPES = ("sam", "sam2", "sam2_video")
MOST_PIXELS_AT_ONCE = 1 << 28  # of upsampled masks: a gibibyte of float32


class Sam:
    """Makes segments by Segment Anything."""

    name = "sam"
    in_processes = False

    def __init__(self, options: SamSettings) -> None:
        """Load the model. Raises ValueError if that fails, saying what to do."""
        self.options = options
        self.batch_size = options.batch_size
        local_rank = number_of("LOCAL_RANK", number_of("SLURM_LOCALID", 0))
        self.device = choose_device(options.device, local_rank)
        self.precision = choose_precision(options.precision, on_cuda=self.device.type == "cuda")
        self.settings = as_stored(self.name, options, precision=self.precision)
        self.processor, model = _load(options.model)
        self.model = model.eval().to(self.device)

    def segments(self, images: list[np.ndarray]) -> list[list[Segment]]:
        """Segments of each image [H, W, 3] uint8, the smallest first."""
        inputs = self.processor(images=[image.copy() for image in images], return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.device)
        sizes = inputs.get("reshaped_input_sizes")
        low_precision = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision == "bf16"
        )
        with torch.inference_mode(), low_precision:
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
        bits, boxes, quality = [], [], []
        for points in self._grid(input_size).split(self.options.points_per_batch):
            logits, scores = self._predict(features, points)
            chosen = scores > self.options.pred_iou_thresh
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
        kept = nms(torch.cat(boxes), torch.cat(quality), self.options.box_nms_thresh).tolist()
        unpacked = (np.unpackbits(bits[index], axis=-1, count=size[1]) for index in kept)
        return ordered(map(segment_from_pixels, unpacked))

    def _grid(self, input_size: tuple[int, int]) -> Tensor:
        """Points [N, 2], x and y in pixels of the model's input, evenly over the image.

        SAM pads the image, SAM 2 stretches it: the points follow what the image really fills.
        """
        side = self.options.points_per_side
        steps = (torch.arange(side) + 0.5) / side
        y, x = torch.meshgrid(steps, steps, indexing="ij")
        return torch.stack([x * input_size[1], y * input_size[0]], -1).reshape(-1, 2)

    def _predict(self, features: Any, points: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [3P, h, w] at the decoder's resolution, and predicted quality [3P]."""
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
        offset = self.options.stability_score_offset
        inner = (logits > offset).sum((1, 2))
        outer = (logits > -offset).sum((1, 2))
        stable = inner >= self.options.stability_score_thresh * outer
        return stable & (logits > 0).any(-1).any(-1)


def _load(name: str) -> tuple[Any, Any]:
    """The image processor and the model."""
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "`generate sam` needs the optional package transformers: pip install transformers, "
            "or use `generate felzenszwalb`"
        ) from None
    try:
        kind = transformers.AutoConfig.from_pretrained(name).model_type
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--model {name} cannot be loaded (a folder, or a name on the hub): {reason}"
        ) from None
    if kind not in MODEL_TYPES:
        raise ValueError(f"--model {name} is of type {kind}; allowed: {', '.join(MODEL_TYPES)}")
    processor = transformers.AutoImageProcessor.from_pretrained(name)
    return processor, transformers.AutoModelForMaskGeneration.from_pretrained(name)


def _take(features: Any, index: int) -> Any:
    """One image's features; SAM has one map [B, C, h, w], SAM 2 a list of them."""
    if isinstance(features, list | tuple):
        return [level[index : index + 1] for level in features]
    return features[index : index + 1]
