"""The encoders, in numbers: sizes of the ViTs, and the pixels that they expect. No torch here."""

from dataclasses import dataclass

IMAGE_CHANNELS = 3
IMAGE_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, RGB, for pixels from 0 to 1
IMAGE_STD = (0.229, 0.224, 0.225)
VISIBLE = 1  # what an input channel beyond the image's holds where a pixel is shown


@dataclass(frozen=True, kw_only=True)
class VitSize:
    """A ViT encoder: width, depth, heads, and the patch size that belongs to it.

    timm_name: of the model in timm that has these sizes, if it has one.
    """

    width: int
    depth: int
    heads: int
    patch_size: int = 16
    timm_name: str | None = None

    def __post_init__(self) -> None:  # a plugin's may be anything
        numbers = (self.width, self.depth, self.heads, self.patch_size)
        if not all(isinstance(n, int) and n > 0 for n in numbers) or self.width % self.heads:
            raise ValueError(
                f"{self}: give whole numbers from 1, and a width that can be split into its heads"
            )


VIT_SIZES: dict[str, VitSize] = {
    "vit_tiny": VitSize(width=192, depth=12, heads=3, timm_name="vit_tiny_patch16_224"),
    "vit_small": VitSize(width=384, depth=12, heads=6, timm_name="vit_small_patch16_224"),
    "vit_base": VitSize(width=768, depth=12, heads=12, timm_name="vit_base_patch16_224"),
    "vit_large": VitSize(width=1024, depth=24, heads=16, timm_name="vit_large_patch16_224"),
    "vit_huge": VitSize(width=1280, depth=32, heads=16, patch_size=14, timm_name="vit_huge_patch14_224"),
}


def vit_size(model: str) -> VitSize:
    """The sizes of a model. Raises ValueError if there is none of that name."""
    if model not in VIT_SIZES:
        known = ", ".join(VIT_SIZES)
        raise ValueError(f"there is no {model} among {known}; give the --plugin that defines it")
    return VIT_SIZES[model]


def transformer_parameters(width: int, depth: int) -> int:
    """Weights of so many blocks: 12 width^2 in four matrices, 13 width in biases and norms."""
    return depth * (12 * width**2 + 13 * width)
