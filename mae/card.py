"""The model card of an export: what the weights are, how they were made, and how they score.

Scores are those that a run of benchmark.py left of the checkpoint, with the interval that chance in the
validation images makes (`common.areas`).
"""

import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

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


def write_card(
    path: Path, checkpoint: dict[str, Any], checkpoint_path: Path, *, library: str, lines: str,
    licence: str | None,
) -> None:  # fmt: skip
    """Write README.md: the hub's metadata, then the same for people."""
    made, scores = checkpoint["config"], list(find_scores(checkpoint_path))
    method, images = made["mask_method"], checkpoint["images"]
    name = f"{made['model']} {method}, {checkpoint['epochs_completed']} epochs"
    data = ModelCardData(
        library_name="mmsegmentation" if library == "mmseg" else library, license=licence, model_name=name,
        pipeline_tag="image-feature-extraction", tags=["masked-autoencoder", "vit", "SegMAE"],
        eval_results=scores or None,
    )  # fmt: skip
    # A plugin's method need not be known here.
    about = (METHODS[method].__doc__ or "").partition("\n")[0] if method in METHODS else ""
    # Not all settings: paths of this machine are nobody's business.
    settings = aligned([(key, str(made[key])) for key in SHOWN if key in made])
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"
    rows = "".join(map(_row, scores))
    table = f"| dataset | metric | value |\n|---|---|---|\n{rows}" if scores else "None that is known.\n"
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

He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022, arXiv:2111.06377
""")
    write_text(path, str(card))


def find_scores(checkpoint_path: Path) -> Iterator[EvalResult]:
    """What a run left of its checkpoint: RUN/pretrain_output/<run>/checkpoint-N.pth."""
    epochs, run = epochs_of(checkpoint_path), checkpoint_path.parent.name
    root = checkpoint_path.resolve().parent.parent.parent
    # Scores lie beside pretrain_output/, in folders of the checkpoint's name, one for each seed.
    named = re.compile(rf"{re.escape(run)}_{epochs}(-evalseed\d+)?")
    for path in sorted(root.glob(f"*_output/*/{RESULT}")):
        if not named.fullmatch(path.parent.name):
            continue
        # Both have a result.json; a probe's holds several scores, each with areas of its own.
        if path.parent.parent.name == "probe_output":
            probed = read_json(path, ProbeResult)
            for probe, how in PROBES.items():
                if probe in probed:
                    areas = path.with_name(PROBE_AREAS[probe])
                    yield _score(how, probed, probed[probe]["mean_iou"], areas)
        else:
            found = read_json(path, Result)
            recipe = found.get("recipe")
            name = recipe.get("name") if isinstance(recipe, dict) else "unknown"
            how = f"finetuned, recipe {name}, seed {found.get('seed', 0)}"
            yield _score(how, found, found["mean_iou"], path.with_name(AREAS))


def _score(how: str, found: Mapping[str, Any], mean_iou: float, areas: Path) -> EvalResult:
    dataset = str(found["settings"].get("dataset", "segmentation"))
    drawn = draw_images(areas) if areas.is_file() else np.zeros(0)
    interval = [round(float(end), 4) for end in np.percentile(drawn, INTERVAL)] if len(drawn) else None
    return EvalResult(
        task_type="image-segmentation", dataset_type=dataset, dataset_name=dataset,
        metric_type="mean_iou", metric_name=f"mean IoU, {how}", metric_value=round(mean_iou, 4),
        metric_args={"interval_95": interval} if interval else None,
    )  # fmt: skip


def _row(score: EvalResult) -> str:
    """Of the table for people."""
    within = ""
    if score.metric_args:
        low, high = score.metric_args["interval_95"]
        within = f" (95% interval {low:.2f} to {high:.2f})"
    return f"| {score.dataset_name} | {score.metric_name} | {score.metric_value:.2f}{within} |\n"
