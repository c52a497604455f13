"""The masking methods: what is hidden, what the encoder sees, where the loss looks.

A method is one class, here or in a file given by --plugin: defining it registers its name, which is
all that command lines, the plan and the report know. Importing this file does not import torch, so
that `--help` and the planner stay fast; only what runs on the device does.

Shapes: B images, C image channels, H x W pixels, P patch size, N = (H / P) * (W / P) patches.
A *pattern* is what is drawn for one sample on the CPU and decides what is hidden: the visible map
[H, W] uint8 (1 = shown to the encoder, 0 = hidden) or one noise value per patch [N] float32.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from engine.vit import VISIBLE

if TYPE_CHECKING:
    import torch

# Filled by `MaskingMethod.__init_subclass__`; the order of definition is the order in --help.
METHODS: dict[str, type[MaskingMethod]] = {}
NO_METHODS = ("scratch", "mae", "untrained", "none")  # lines of the report that bear such a name


@dataclass(frozen=True, kw_only=True)
class MaskedView:
    """What one masking method makes of a batch.

    encoder_input: [B, C_in, H, W] float, the encoder's (or pre-encoder's) input.
    hidden: [B, N, P * P] or [B, N, 1] float, 1 = this pixel counts in the loss, pixels row by row.
    ids_keep: [B, K] indices of the patches that enter the encoder; None: all of them.
    ids_restore: [B, N] where each patch stands in (kept, removed); None when all are kept.
    """

    encoder_input: torch.Tensor
    hidden: torch.Tensor
    ids_keep: torch.Tensor | None = None
    ids_restore: torch.Tensor | None = None


class MaskingMethod:
    """The interface. One object serves loader workers (numpy) and the device (torch)."""

    name: ClassVar[str]
    uses_segments: ClassVar[bool] = True
    all_segments: ClassVar[bool] = False  # of an image, and not only one near the coverage ratio
    removes_tokens: ClassVar[bool] = False  # then the decoder needs mask tokens
    extra_channels: ClassVar[int] = 0  # input channels of the patch embedding beyond the image's
    # The options that matter to it.
    settings: ClassVar[tuple[str, ...]] = (
        "coverage_ratio", "hide", "segments_from", "segment_variety", "segment_choice",
    )  # fmt: skip

    def __init_subclass__(cls) -> None:
        """A class with a name of its own is a method that can be chosen."""
        if "name" not in vars(cls):  # of its own, not one that it inherits
            return
        # It becomes a part of folders' names, and stands for its line in the report.
        if not re.fullmatch(r"[A-Za-z]\w*", cls.name, re.ASCII) or cls.name in (*METHODS, *NO_METHODS):
            taken = ", ".join((*METHODS, *NO_METHODS))
            raise ValueError(
                f"a method cannot be called {cls.name!r}: give a word of letters, digits and _ that is "
                f"none of {taken}"
            )
        METHODS[cls.name] = cls

    def __init__(
        self, *, image_size: int, patch_size: int, mask_ratio: float, hide: str, noise: str = "green"
    ) -> None:
        self.image_size = image_size
        self.patch_size = patch_size
        self.mask_ratio = mask_ratio
        self.hide = hide
        self.noise = noise

    @property
    def num_patches(self) -> int:
        """Patches per image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_kept(self) -> int:
        """Patches per image that enter the encoder."""
        return self.num_patches

    @property
    def segment_side(self) -> int:
        """Points per side at which `pattern` gets segments; a pixel each, unless fewer will do."""
        return self.image_size

    def pattern(self, rng: np.random.Generator, segment: np.ndarray | None) -> np.ndarray:
        """Draw one sample's pattern.

        segment: [H, W] uint8, 1 inside, already cropped, flipped and resized with the image to
        `segment_side`, or what stands for it (`--segments-from`). With `all_segments` it is
        [M, H, W], the image's M segments; without `uses_segments` it is None.
        """
        assert segment is not None
        return VISIBLE - segment if self.hide == "segment" else segment

    def hidden_pixels(self, pattern: np.ndarray) -> int:
        """How many pixels the pattern hides."""
        return int(pattern.size - np.count_nonzero(pattern))

    def visible_map(self, pattern: torch.Tensor) -> torch.Tensor:
        """Patterns of a batch to [B, 1, H, W] float, 1 = shown, 0 = hidden."""
        return pattern.unsqueeze(1).float()

    def view(self, images: torch.Tensor, pattern: torch.Tensor) -> MaskedView:
        """Hide parts of normalised images [B, C, H, W]; pattern is the batch's [B, ...]."""
        visible = self.visible_map(pattern)
        return MaskedView(
            encoder_input=self.encoder_input(images, visible),
            hidden=patchify(VISIBLE - visible, self.patch_size),
        )

    def encoder_input(self, images: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] and the visible map [B, 1, H, W] to [B, C + extra_channels, H, W]."""
        return images * visible

    def preencoder(self, image_channels: int) -> torch.nn.Module | None:
        """A layer in front of the patch embedding that lives only during pretraining."""
        return None

    def preencoder_weights(self, image_channels: int) -> int:
        """How many of its weights are multiplied with each pixel."""
        layer = self.preencoder(image_channels)
        return sum(p.numel() for p in layer.parameters() if p.dim() > 1) if layer is not None else 0


class Patches(MaskingMethod):
    """MAE (He et al. 2022): a random share of the patches never enters the encoder."""

    name = "patches"
    uses_segments = False
    removes_tokens = True
    settings: ClassVar[tuple[str, ...]] = ("mask_ratio", "use_unmasked_images")

    @property
    def num_kept(self) -> int:
        """The share that `mask_ratio` leaves, rounded down as MAE does."""
        return int(self.num_patches * (1 - self.mask_ratio))

    def pattern(self, rng: np.random.Generator, segment: np.ndarray | None) -> np.ndarray:
        """One noise value per patch; the patches with the smallest are kept."""
        return rng.random(self.num_patches, dtype=np.float32)

    def hidden_pixels(self, pattern: np.ndarray) -> int:
        """Every pixel of the removed patches."""
        return (self.num_patches - self.num_kept) * self.patch_size**2

    def visible_map(self, pattern: torch.Tensor) -> torch.Tensor:
        """Noise [B, N] to [B, 1, H, W]: 1 on the patches that are kept."""
        removed = self._removed(pattern).expand(-1, -1, self.patch_size**2)
        return VISIBLE - unpatchify(removed, self.patch_size)

    def view(self, images: torch.Tensor, pattern: torch.Tensor) -> MaskedView:
        """Whole images, and which of their patches the encoder gets."""
        # Stable, so that equal noises give the same patches on every device.
        ids_shuffle = pattern.argsort(dim=1, stable=True)
        return MaskedView(
            encoder_input=images,
            hidden=self._removed(pattern),
            ids_keep=ids_shuffle[:, : self.num_kept],
            ids_restore=ids_shuffle.argsort(dim=1),
        )

    def _removed(self, pattern: torch.Tensor) -> torch.Tensor:
        """[B, N, 1] float, 1 = removed from the encoder."""
        # The inverse of a permutation is its argsort: where each patch stands among the noises.
        rank = pattern.argsort(dim=1, stable=True).argsort(dim=1)
        return (rank >= self.num_kept).float().unsqueeze(-1)


class Segments(MaskingMethod):
    """The hidden pixels are set to 0, the mean colour after normalising; all tokens are encoded."""

    name = "segments"


class FourChannels(MaskingMethod):
    """As `segments`, and the visible map is the encoder's fourth input channel."""

    name = "four_channels"
    extra_channels = 1

    def encoder_input(self, images: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """[B, C + 1, H, W]: what is shown, then where it is shown."""
        import torch

        return torch.cat([images * visible, visible], dim=1)


class Preencoder(FourChannels):
    """A convolution of the four channels to three, in front of the encoder; thrown away later."""

    name = "preencoder"
    extra_channels = 0  # of the encoder; the convolution takes the fourth

    def preencoder(self, image_channels: int) -> torch.nn.Module:
        """Conv2d over one patch size; it starts by passing the image channels through unchanged.

        A start from noise would feed the encoder something unlike the images that it meets after
        pretraining, and make an official checkpoint (`--init`) useless.
        """
        import torch

        # "Same" padding of an even kernel, the shorter half before, as torch's own would copy.
        before, after = (self.patch_size - 1) // 2, self.patch_size // 2
        padding = torch.nn.ZeroPad2d((before, after, before, after))
        convolution = torch.nn.Conv2d(image_channels + 1, image_channels, self.patch_size)
        with torch.no_grad():
            convolution.weight.zero_()
            for channel in range(image_channels):
                convolution.weight[channel, channel, before, before] = 1
            assert convolution.bias is not None
            convolution.bias.zero_()
        return torch.nn.Sequential(padding, convolution)

    def preencoder_weights(self, image_channels: int) -> int:
        """Those of the convolution, known without torch."""
        return (image_channels + 1) * image_channels * self.patch_size**2


class SegmentPatches(Patches):
    """Whole segments are removed until `mask_ratio` is reached: `patches` but for *which* ones.

    A patch belongs to a segment if more than half of it is inside, by 5 x 5 of its pixels: decoding
    an image's segments at every pixel would cost more than the image.
    """

    name = "segment_patches"
    uses_segments = True
    all_segments = True
    settings = ("mask_ratio", "segments_from", "segment_variety")
    POINTS = 5  # per side of a patch; odd, so that there is no tie

    @property
    def segment_side(self) -> int:
        """So many points for each patch."""
        return self.image_size // self.patch_size * self.POINTS

    def pattern(self, rng: np.random.Generator, segment: np.ndarray | None) -> np.ndarray:
        """Noise as `patches` draws it, raised where segments, in random order, are removed."""
        assert segment is not None
        noise, points = super().pattern(rng, None), self.POINTS
        # How many points of each patch lie inside: first over its rows, then over its columns.
        # Python's sum of whole arrays: numpy's own along so short an axis takes ten times as long.
        inside = sum(segment.reshape(-1, points, self.segment_side).swapaxes(0, 1))
        inside = sum(inside.reshape(-1, points).T)
        belongs = inside.reshape(-1, self.num_patches) > points**2 // 2  # [M, N]
        return remove_segments(noise, rng.permutation(belongs), self.num_patches - self.num_kept)


class BlockPatches(Patches):
    """Rectangles of patches are removed, as BEiT draws them (Bao et al. 2021, 2106.08254, algorithm 1)."""

    name = "block_patches"
    LEAST, ASPECT = 16 / 196, 0.3  # a block's least share of all patches, and side to side

    def pattern(self, rng: np.random.Generator, segment: np.ndarray | None) -> np.ndarray:
        """Noise as `patches` draws it, raised in the blocks; single patches make up the number."""
        noise, side = super().pattern(rng, None), self.image_size // self.patch_size
        count, least = self.num_patches - self.num_kept, self.LEAST * self.num_patches
        removed = np.zeros((side, side), bool)
        while (missing := count - np.count_nonzero(removed)) >= least:
            area, slant = rng.uniform(least, missing), rng.uniform(np.log(self.ASPECT), -np.log(self.ASPECT))
            # Rounded down: a block removes no more than is missing.
            height = max(1, min(side, int(np.sqrt(area * np.exp(slant)))))
            width = max(1, min(side, int(area / height), int(np.sqrt(area * np.exp(-slant)))))
            top, left = rng.integers(side - height + 1), rng.integers(side - width + 1)
            removed[top : top + height, left : left + width] = True
        return noise + removed.ravel().astype(np.float32)


class GreenPatches(Patches):
    """Patches are removed where band-passed noise is high (ColorMAE: Hinojosa et al. 2024, 2407.13036).

    The other colours of `--noise`: red is low-passed, blue high-passed, purple what green leaves.
    """

    name = "green_patches"
    settings = (*Patches.settings, "noise")
    # Deviations in patches of the weak and the strong blur; red's and blue's is the first. Ours: the
    # paper's formula has them as parameters, and its patterns are files. Its figure has the band where
    # these have it, 0.19 and 0.20 cycles per patch, but less than half as wide (docs/related.md).
    WEAK, STRONG = 0.75, 1.5

    def pattern(self, rng: np.random.Generator, segment: np.ndarray | None) -> np.ndarray:
        """Filtered normal noise, of which the smallest values are kept: [N] float32."""
        from scipy.ndimage import gaussian_filter

        side, margin = self.image_size // self.patch_size, int(4 * self.STRONG)  # where the kernels end
        white = rng.standard_normal((side + 2 * margin,) * 2, dtype=np.float32)
        weak = gaussian_filter(white, self.WEAK)
        band = weak - gaussian_filter(white, self.STRONG)
        filtered = {"red": weak, "blue": white - weak, "green": band, "purple": white - band}[self.noise]
        return filtered[margin:-margin, margin:-margin].ravel()


def remove_segments(noise: np.ndarray, segments: np.ndarray, count: int) -> np.ndarray:
    """Noise [N] float32 from 0 to 1, such that its `count` largest values are whole segments first.

    segments: [M, N] bool, the patches of each, in the order in which they are removed. One of which
    more is left than may still be removed is passed over. Single patches, those of the largest
    noise, make up the number.
    """
    # Noise is below 1: with 1 more, the removed patches are the largest.
    removed = np.zeros(len(noise), bool)
    for patches in segments:
        fresh = patches & ~removed
        size = int(np.count_nonzero(fresh))
        if size <= count:
            removed |= fresh
            count -= size
    return noise + removed.astype(np.float32)


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """[B, C, H, W] to [B, N, P * P * C]: patches row by row, in each the channel runs fastest."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    tiles = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    tiles = tiles.permute(0, 2, 4, 3, 5, 1)  # [B, rows, columns, P, P, C]
    return tiles.reshape(batch, rows * columns, patch_size**2 * channels)


def unpatchify(patches: torch.Tensor, patch_size: int) -> torch.Tensor:
    """[B, N, P * P * C] of a square image back to [B, C, H, W]; the inverse of `patchify`."""
    batch, num_patches, values = patches.shape
    side = round(num_patches**0.5)
    channels = values // patch_size**2
    tiles = patches.reshape(batch, side, side, patch_size, patch_size, channels)
    tiles = tiles.permute(0, 5, 1, 3, 2, 4)  # [B, C, rows, P, columns, P]
    return tiles.reshape(batch, channels, side * patch_size, side * patch_size)
