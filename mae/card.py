"""The model card of an export: what the weights are, how they were made, and how they score.

Scores are those that a run of benchmark.py left of the checkpoint, with the interval that chance in the
validation images makes (`common.areas`).
"""

import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from common.areas import draw_images
from common.console import aligned
from common.files import mark, write_text
from common.formats import ProbeResult, Result, read_json
from common.step_files import AREAS, PROBE_AREAS, RESULT, epochs_of
from mae.masking import METHODS
from mae.weights import KIND

INTERVAL = (2.5, 97.5)  # percentiles
PROBES = {"linear": "linear probe of the frozen encoder", "knn": "nearest neighbours of frozen tokens"}
# What a reader asks for first; the rest stands in the checkpoint.
SHOWN = (
    "mask_method", "coverage_ratio", "segments_from", "segment_variety", "hide", "mask_ratio", "model",
    "image_size", "patch_size", "norm_pix_loss", "epochs", "effective_batch_size", "base_lr",
    "warmup_fraction", "weight_decay", "seed", "precision", "init",
)  # fmt: skip
CITED = "He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022, arXiv:2111.06377"


@dataclass(frozen=True, kw_only=True)
class Score:
    """One mean IoU, in percent."""

    how: str
    dataset: str
    value: float
    interval: tuple[float, float] | None  # 95%; None where there are too few images

    @property
    def text(self) -> str:
        """The value, and its interval."""
        within = f" (95% interval {self.interval[0]:.2f} to {self.interval[1]:.2f})" if self.interval else ""
        return f"{self.value:.2f}{within}"


def write_card(
    path: Path, checkpoint: dict[str, Any], checkpoint_path: Path, *, library: str, lines: str,
    licence: str | None,
) -> None:  # fmt: skip
    """Write README.md: the hub's metadata, then the same for people."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData  # not for --help

    made, scores = checkpoint["config"], list(find_scores(checkpoint_path))
    method, images = made["mask_method"], checkpoint["images"]
    name = f"{made['model']} {method}, {checkpoint['epochs_completed']} epochs"
    results = [
        EvalResult(
            task_type="image-segmentation", dataset_type=score.dataset, dataset_name=score.dataset,
            metric_type="mean_iou", metric_name=f"mean IoU, {score.how}", metric_value=round(score.value, 4),
            metric_args={"interval_95": [*score.interval]} if score.interval else None,
        )
        for score in scores
    ]  # fmt: skip
    data = ModelCardData(
        library_name="mmsegmentation" if library == "mmseg" else library, license=licence, model_name=name,
        pipeline_tag="image-feature-extraction", tags=["masked-autoencoder", "vit", "SegMAE"],
        eval_results=results or None,
    )  # fmt: skip
    about = (METHODS[method].__doc__ or "").partition("\n")[0] if method in METHODS else ""
    settings = aligned([(key, str(made[key])) for key in SHOWN if key in made])
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"
    rows = "\n".join(f"| {score.dataset} | {score.how} | {score.text} |" for score in scores)
    table = f"| dataset | how | mean IoU |\n|---|---|---|\n{rows}" if scores else "None that is known."
    card = ModelCard(f"""---
{data.to_yaml()}
---

<!-- {mark(KIND)} -->

# {name}

The encoder of a masked autoencoder that was pretrained by SegMAE, as a plain ViT with 3 input channels.
Masking method `{method}`: {about}

```python
{lines}
```

Pixels are RGB from 0 to 1, normalised by ImageNet's mean and deviation.

## Scores

{table}

Percent; intervals hold what chance in the validation images makes, not that between pretrainings.

## How it was made

{checkpoint["epochs_completed"]} of {made["epochs"]} epochs of {images["count"]} images, of whose list
{images["digest"]} is the digest.

```
{settings}
```

Exported with {versions}.

## Licence

{licence or "Not stated by whoever exported it."} The images that it was trained on have terms of their own.

{CITED}
""")
    write_text(path, str(card))


def find_scores(checkpoint_path: Path) -> Iterator[Score]:
    """What a run left of its checkpoint: RUN/pretrain_output/<run>/checkpoint-N.pth."""
    epochs, run = epochs_of(checkpoint_path), checkpoint_path.parent.name
    root = checkpoint_path.resolve().parent.parent.parent
    # Scores lie beside pretrain_output/, in folders of the checkpoint's name, one for each seed.
    named = re.compile(rf"{re.escape(run)}_{epochs}(-evalseed(\d+))?")
    for path in sorted(root.glob(f"*_output/*/{RESULT}")):
        if not named.fullmatch(path.parent.name):
            continue
        found: dict[str, Any] = read_json(path, dict[str, Any])
        is_finetuning = "mean_iou" in found
        found = read_json(path, Result if is_finetuning else ProbeResult)
        dataset = str(found["settings"].get("dataset", "segmentation"))
        if is_finetuning:
            recipe = found.get("recipe")
            name = recipe.get("name") if isinstance(recipe, dict) else "unknown"
            how = f"finetuned, recipe {name}, seed {found.get('seed', 0)}"
            yield _score(how, dataset, found["mean_iou"], path.with_name(AREAS))
        for probe, how in PROBES.items():
            if not is_finetuning and probe in found:
                yield _score(how, dataset, found[probe]["mean_iou"], path.with_name(PROBE_AREAS[probe]))


def _score(how: str, dataset: str, value: float, areas: Path) -> Score:
    drawn = draw_images(areas) if areas.is_file() else np.zeros(0)
    low_high = np.percentile(drawn, INTERVAL) if len(drawn) else None
    interval = None if low_high is None else (round(float(low_high[0]), 4), round(float(low_high[1]), 4))
    return Score(how=how, dataset=dataset, value=value, interval=interval)
