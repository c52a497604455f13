"""Segments by Segment Anything: any checkpoint that `transformers` can load for mask generation.

The procedure is that of Kirillov et al., Segment Anything, ICCV 2023, appendix B: a grid of points,
three masks per point, those kept that the model thinks good and that hardly change with the cutoff,
duplicates removed by their boxes. Several images share a batch of the encoder and of the decoder.
Masks stay on the device until they are chosen; only their run lengths leave it.

Where only the nearest to some coverage ratios are wanted (`Search`), an image is finished when each
has a segment within the tolerance, and a candidate that cannot be nearer than what was found is
dropped as the decoder leaves it, before it is upsampled.

Shapes: B images, P points of each, K candidates, h x w pixels of the decoder's masks, H x W of the
image.
"""

import zlib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Self

import torch
from accelerate.utils import recursively_apply
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms

from common.environment import lacks_to_compile, number_of
from segments.config import SamSettings, as_stored
from segments.generate import InputImage
from segments.segment import Segment, ordered, segment_from_flips

MOST_PIXELS_AT_ONCE = 1 << 28  # of upsampled masks: a gibibyte of float32
# Where a checkpoint's weights belong, as regular expressions: transformers 5.24 does not find those
# of the tracker in SAM 3's.
NAMES_OF_WEIGHTS = {
    "sam3_video": {
        r"^detector_model\.vision_encoder\.backbone\.": "vision_encoder.backbone.",
        r"^tracker_neck\.": "vision_encoder.neck.",
        r"^tracker_model\.": "",
    }
}
ROUNDING = 1e-3  # points: more than sums of float32 are off
LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


class _Image:
    """One image's way through the points. whole: height and width of the model's input."""

    def __init__(
        self, given: InputImage, input_size: list[int], whole: tuple[int, ...], options: SamSettings
    ) -> None:
        self.key, self.size = given.key, (given.height, given.width)  # H, W
        self.most_at_once = max(1, MOST_PIXELS_AT_ONCE // (given.height * given.width))
        # SAM pads an image, its successors stretch it: points are for what it really fills.
        self.input_size = input_size  # pixels, high and wide
        self.fills = input_size[0] / whole[0], input_size[1] / whole[1]
        places = visiting_order(options.points_per_side, given.key)  # [N, 2] in (0, 1)
        self.points = places * torch.tensor(input_size[::-1])  # x, y
        tolerance, overlap = options.tolerance, options.box_nms_thresh
        self.searches = [Search(r, tolerance, overlap) for r in given.ratios or (None,)]

    @property
    def finished(self) -> bool:
        return all(search.finished for search in self.searches)


class Sam:
    """Makes segments by Segment Anything."""

    name = "sam"
    in_processes = False

    def __init__(self, options: SamSettings) -> None:
        """Load the model. Raises ValueError if that fails, saying what to do."""
        self.options = options
        self.batch_size = options.batch_size
        self.device = _choose_device(options.device)
        self.precision = _choose_precision(options.precision, self.device)
        dtype = LOW_PRECISION.get(self.precision)
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype is not None)
        self.settings = as_stored(self.name, options, precision=self.precision)
        self.processor, model = _load(options.model)
        self.model = model.eval().to(self.device)
        # Only the encoder: the decoder's batch changes its size as images are finished.
        if self.device.type == "cuda" and not lacks_to_compile():
            self.model.vision_encoder.compile()
        self.read_side = max(dict(self.processor.size).values())
        self.tally: Counter[str] = Counter()

    @torch.inference_mode()
    def segments(self, given: Sequence[InputImage]) -> list[list[Segment]]:
        """Segments of each image, the smallest first."""
        images, features = self.encode(given)
        # An image is judged after every `size` points. Where others are finished it takes their
        # places in the decoder's batch, too, but is judged in the same steps: it ends as if alone.
        size = max(1, self.options.points_per_batch // self.batch_size)
        active, visited = list(range(len(images))), 0
        while active and visited < self.options.points_per_side**2:
            until = visited + size * max(1, self.batch_size // len(active))
            points = torch.stack([images[number].points[visited:until] for number in active])
            left = recursively_apply(lambda feature, some: feature[some], features, active)
            logits, quality = self.decode(left, points)
            for number, masks, scores in zip(active, logits, quality, strict=True):
                for step in zip(masks.split(3 * size), scores.split(3 * size), strict=True):
                    if not images[number].finished:
                        self.judge(images[number], *step)
            self.tally["points"] += points.shape[0] * points.shape[1]
            # Most images are finished by a few points: the others get their places.
            active, visited = [n for n in active if not images[n].finished], until
        self.tally["images"] += len(images)
        return [self.run_lengths(image) for image in images]

    def encode(self, given: Sequence[InputImage]) -> tuple[list[_Image], dict[str, Any]]:
        """The images, and what the decoder needs of them: tensors [B, ...], or lists of those."""
        arrays = [image.pixels for image in given]
        inputs = self.processor(
            images=arrays, return_tensors="pt", device=self.device, input_data_format="channels_last"
        )
        pixels = inputs["pixel_values"].to(self.device)  # [B, 3, side, side]
        with self.autocast:
            features = self.model.get_image_embeddings(pixels)
        names = ("image_embeddings", "intermediate_embeddings")  # SAM-HQ has both
        named = zip(names, features if isinstance(features, tuple) else (features,), strict=False)
        whole = tuple(pixels.shape[-2:])
        sizes = inputs.get("reshaped_input_sizes", torch.tensor([whole] * len(given))).tolist()
        pairs = zip(given, sizes, strict=True)
        return [_Image(one, size, whole, self.options) for one, size in pairs], dict(named)

    def decode(self, features: dict[str, Any], points: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, 3P, h, w] and predicted quality [B, 3P] at points [B, P, 2]."""
        labels = torch.ones(*points.shape[:2], 1, dtype=torch.int64, device=self.device)
        where = {"input_points": points[:, :, None].to(self.device), "input_labels": labels}
        with self.autocast:
            out = self.model(**where, multimask_output=True, **features)
        return out.pred_masks.flatten(1, 2), out.iou_scores.flatten(1, 2).float()

    def judge(self, image: _Image, logits: Tensor, quality: Tensor) -> None:
        """Give to the searches which of [K, h, w] are good enough, and may be what they want.

        Raises RuntimeError where the model computes what is no number: nothing would be good enough.
        """
        if not (logits.isfinite().all() and quality.isfinite().all()):
            other = "damaged weights" if self.precision == "fp32" else "give --precision fp32, or bf16"
            raise RuntimeError(f"{image.key}: the model's masks are not finite in {self.precision}: {other}")
        # From the cheapest test to the dearest: quality, bounds of the coverage, full size.
        good = quality > self.options.pred_iou_thresh
        logits, quality = logits[good], quality[good]
        searches = [search for search in image.searches if not search.finished]
        possible = torch.ones(len(searches), len(logits), dtype=torch.bool, device=self.device)
        if len(logits) and None not in [search.ratio for search in searches]:
            low = logits.shape[1], logits.shape[2]
            bounds = coverage_bounds(logits, pixel_weights(image.size, low, image.fills))
            possible = torch.stack([search.possible(*bounds) for search in searches])
        some = possible.any(0)
        logits, quality, possible = logits[some], quality[some], possible[:, some]
        self.tally["masks upsampled"] += len(logits)
        most, offset = image.most_at_once, self.options.stability_score_offset
        for start in range(0, len(logits), most):
            part = slice(start, start + most)
            full = self._upsample(logits[part], image)
            # The higher cut lies inside the lower one, so the ratio of areas is their overlap.
            inner, area, outer = (_count(full > cut) for cut in (offset, 0, -offset))
            stable = (inner >= self.options.stability_score_thresh * outer) & (area > 0)
            coverage = area.double() * 100 / (image.size[0] * image.size[1])
            found = Candidates(logits[part], _boxes(full), quality[part], coverage)
            for search, wanted in zip(searches, possible[:, part] & stable, strict=True):
                search.add(found.take(wanted))

    def run_lengths(self, image: _Image) -> list[Segment]:
        """The segments of an image whose search is over: where they begin and end is copied."""
        segments: set[Segment] = set()  # one may be the nearest to two ratios
        for search in image.searches:
            found = search.result()
            for logits in found.logits.split(image.most_at_once) if found else ():
                # [K, W * H], down the columns as COCO counts.
                inside = (self._upsample(logits, image) > 0).transpose(1, 2).flatten(1)
                before = F.pad(inside[:, :-1], (1, 0))
                mask, place = (inside != before).nonzero(as_tuple=True)
                counts = torch.bincount(mask, minlength=len(logits)).tolist()
                for flips in place.int().cpu().split(counts):
                    segments.add(segment_from_flips(flips.numpy(), *image.size))
            self.tally["choices"] += search.ratio is not None and found is not None
            self.tally["choices that duplicates changed"] += search.changed
        return ordered(segments)

    def _upsample(self, logits: Tensor, image: _Image) -> Tensor:
        """Logits [K, h, w] to the image's pixels [K, H, W]; the processor knows about padding."""
        masks, sizes = [logits[:, None].float()], {"reshaped_input_sizes": [image.input_size]}
        full = self.processor.post_process_masks(masks, [[*image.size]], **sizes, binarize=False)
        return full[0][:, 0]


class Candidates(NamedTuple):
    """Masks of one image that are good enough, on the device."""

    logits: Tensor  # [K, h, w] as the decoder left them
    boxes: Tensor  # [K, 4] corners in pixels
    quality: Tensor  # [K] as the model predicts it
    coverage: Tensor  # [K] float64, percent of the image, counted from its pixels

    def take(self, chosen: Tensor) -> Self:
        """Some of them, by number or as a [K] bool."""
        return type(self)(*(values[chosen] for values in self))


class Search:
    """For all segments of an image (ratio: None), or for the one nearest to a coverage in percent.

    Each ratio searches by itself, so that adding one later chooses what both at once would have.
    """

    def __init__(self, ratio: float | None, tolerance: float, overlap: float) -> None:
        self.ratio, self.tolerance, self.overlap = ratio, tolerance, overlap
        self.parts: list[Candidates] = []
        self.chosen: Tensor | None = None  # the number of the nearest
        self.distance = float("inf")  # of the nearest so far, in points
        self.finished = False  # whether no further point is needed
        self.changed = False  # whether the nearest gave way to a duplicate of higher quality

    def possible(self, low: Tensor, high: Tensor) -> Tensor:
        """[K] bool: whether what covers `low` to `high` percent may be as near as the nearest."""
        assert self.ratio is not None
        farther = torch.maximum(low - self.ratio, self.ratio - high)
        return farther <= self.distance + ROUNDING

    def add(self, candidates: Candidates) -> None:
        """Take those that were possible."""
        if not len(candidates.quality):
            return
        self.parts.append(candidates)
        if self.ratio is None:
            return
        # The nearest that is no duplicate, the smaller on a tie: every candidate so far competes.
        found, kept = self._distinct()
        # Numbers of Python: one copy from the device, and exact comparisons.
        percent = found.coverage.tolist()
        order = [(abs(each - self.ratio), each, number) for number, each in enumerate(percent)]
        nearest = min(order[number] for number in kept.tolist())
        self.changed = nearest != min(order)
        self.distance = nearest[0]
        self.chosen = kept.new_tensor(nearest[2:])
        self.finished = self.distance <= self.tolerance

    def result(self) -> Candidates | None:
        """All distinct segments, or the nearest one; None: there is none."""
        if not self.parts:
            return None
        found, kept = self._distinct()
        return found.take(kept if self.chosen is None else self.chosen)

    def _distinct(self) -> tuple[Candidates, Tensor]:
        """All so far, and the numbers of those that are no duplicates."""
        self.parts = [found := Candidates(*map(torch.cat, zip(*self.parts, strict=True)))]
        return found, nms(found.boxes, found.quality, self.overlap)


def visiting_order(side: int, key: str) -> Tensor:
    """Every point of a grid once, [side * side, 2] of x and y in (0, 1), evenly spread."""
    # A Sobol sequence has a point in each cell of any power of two before it has two in one.
    cells = 1 << (side - 1).bit_length()  # a power of two; points outside the grid are dropped
    sequence = (torch.quasirandom.SobolEngine(2).draw(cells * cells) * cells).long()
    visited = sequence[(sequence < side).all(1)]
    # Turned round the edges by an offset that is the image's own: no place is always first.
    digest = zlib.crc32(key.encode())
    offset = torch.tensor([digest % side, digest // side % side])
    return ((visited + offset) % side + 0.5) / side


def coverage_bounds(logits: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Least and most percent of the image that masks [K, h, w] can cover once upsampled: [K] each.

    weights: see `pixel_weights`. A pixel of the image is interpolated from the neighbours of the
    decoder's pixel below it: if all nine are inside, so is the pixel, and so for outside.
    """
    # The most: whatever has a neighbour inside; the least: whatever has all of them inside.
    inside, weights = (logits > 0).float(), weights.to(logits.device)
    most = F.max_pool2d(inside, 3, stride=1, padding=1)
    least = 1 - F.max_pool2d(1 - inside, 3, stride=1, padding=1)
    return 100 * (least * weights).sum((1, 2)), 100 * (most * weights).sum((1, 2))


@lru_cache(64)  # images of one size are many
def pixel_weights(size: tuple[int, int], low: tuple[int, int], fills: tuple[float, ...]) -> Tensor:
    """[h, w] float: the share of the image's H x W pixels above each pixel of the decoder's.

    fills: how much of the decoder's rows and columns the image takes up; the rest is padding.
    """
    shares = []  # of the rows, and of the columns
    for pixels, few, share in zip(size, low, fills, strict=True):
        below = ((torch.arange(pixels) + 0.5) / pixels * (few * share)).long()
        shares.append(torch.bincount(below, minlength=few) / pixels)
    return shares[0][:, None] * shares[1]


def _count(inside: Tensor) -> Tensor:
    """Pixels inside each of [K, H, W] bool, [K]."""
    # In two steps: a tenth of the time on a CPU.
    return inside.sum(-1, dtype=torch.int32).sum(-1)


def _boxes(logits: Tensor) -> Tensor:
    """Corners [K, 4], x and y, of what is above 0 in [K, H, W]."""
    # As torchvision's masks_to_boxes, which takes ten times as long on a CPU.
    corners = []
    for some in (logits.amax(1) > 0, logits.amax(2) > 0):  # [K, W] columns, [K, H] rows
        first = some.int().argmax(1)
        corners += [first, some.shape[1] - 1 - some.flip(1).int().argmax(1)]
    left, right, top, bottom = corners
    return torch.stack([left, top, right, bottom], 1).float()


def _choose_device(wanted: str) -> torch.device:
    """The GPU of this process, by torchrun's or Slurm's number, or the CPU."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and not there:
        what = f"torch {torch.__version__}, for CUDA {torch.version.cuda}, has no GPU here"
        raise ValueError(f"--device cuda: {what}; use cpu, or see ./run_benchmark.sh doctor")
    local_rank = number_of("LOCAL_RANK", number_of("SLURM_LOCALID", 0))
    use_gpu = there and wanted != "cpu"
    return torch.device("cuda", local_rank % there) if use_gpu else torch.device("cpu")


def _choose_precision(wanted: str, device: torch.device) -> str:
    if wanted != "auto" or device.type == "cpu":
        return wanted.replace("auto", "fp32")
    # What the hardware has: torch also emulates bf16, slowly.
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _load(name: str) -> tuple[Any, Any]:
    """The image processor and the model."""
    try:
        import transformers
    except ImportError:
        what = "`generate sam` needs transformers, `generate felzenszwalb` does not"
        raise ValueError(f"{what}: pip install transformers") from None
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()  # the error below says once what each try would
    config = _loaded(name, transformers.AutoConfig)
    # Judged before gigabytes of weights are downloaded.
    if type(config) not in transformers.MODEL_FOR_MASK_GENERATION_MAPPING:
        known = transformers.models.auto.modeling_auto.MODEL_FOR_MASK_GENERATION_MAPPING_NAMES
        allowed = ", ".join(sorted(known))
        raise ValueError(f"--model {name} is of type {config.model_type}; allowed: {allowed}")
    processor = _loaded(name, transformers.AutoImageProcessor)
    model, loaded = _loaded(
        name, transformers.AutoModelForMaskGeneration,
        key_mapping=NAMES_OF_WEIGHTS.get(config.model_type), output_loading_info=True,
    )  # fmt: skip
    if missing := loaded["missing_keys"]:  # transformers would go on with random weights
        what = f"{len(missing)} weights for mask generation: {min(missing)} ..."
        raise ValueError(f"--model {name} lacks {what}")
    return processor, model


def _loaded(name: str, kind: Any, **options: Any) -> Any:
    """A part of the model. Raises ValueError if it cannot be had."""
    try:
        return kind.from_pretrained(name, **options)
    except Exception as error:  # what is in a damaged folder can make the library raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = "cannot be loaded (a folder, or a name on the hub)"
        raise ValueError(f"--model {name} {what}: {reason}") from None
