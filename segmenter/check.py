"""`train --dry-run check`: all that can be known before the work starts. Writes nothing.

`benchmark.py` calls `check_run` in its own process, which never loads torch: what takes torch to
look into is judged apart, by `look_inside`.
"""

import dataclasses
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.console import heavy_imports
from common.files import check_output_folder
from common.formats import ProbeResult, Result, plain, read_json
from common.images import open_images
from common.options import check_same, older_values
from common.step_files import CHECKPOINT, PROBE_AREAS, RESULT
from engine.logbook import check_trackers, unusual
from engine.schedule import BatchPlan
from engine.vit import IMAGE_CHANNELS, transformer_parameters
from segmenter.config import (
    AUTO,
    AUXILIARY_WIDTH,
    GROUPS,
    PROBE_GROUPS,
    RANDOM,
    ProbeConfig,
    TrainConfig,
    check_encoder,
    encoder_label,
    encoder_path,
    is_library,
)
from segmenter.dataset import TRAIN, VAL, DatasetDescription, other_names, read_description
from segmenter.labels import check_split

MOST_CHECKED = 500  # pairs of a split before training; `prepare check` looks at all of them


@dataclass(frozen=True, kw_only=True)
class ScoringFacts:
    """What a run will be. train, val: images.

    checkpoint_bytes, model_bytes: about, of a checkpoint with and without the optimizer; 0 where none
    is kept.
    """

    train: int
    val: int
    digest: str = ""  # of the lists of images
    checkpoint_bytes: int = 0
    model_bytes: int = 0


def dataset_name(path: Path) -> str:
    """What names of files may have of it; of a file that is still to be made, that file's name."""
    name = read_description(path).name if path.exists() else path.stem
    return re.sub(r"[^\w.]", "_", name)


def read_checked(path: Path) -> DatasetDescription:
    """A dataset some of whose labels were looked at. Raises ValueError."""
    dataset = read_description(path)
    check_some_labels(dataset)
    return dataset


def check_some_labels(dataset: DatasetDescription) -> None:
    """Raise ValueError if there is nothing to train on, or to score by."""
    check_split(dataset, TRAIN, dataset.train, most=MOST_CHECKED)
    check_split(dataset, VAL, dataset.val, most=MOST_CHECKED)


def check_run(
    config: TrainConfig | ProbeConfig, dataset: DatasetDescription, *, processes: int
) -> ScoringFacts:
    """What the run will be. Raises ValueError for what would stop it at once."""
    train, val, reads = len(dataset.train), len(dataset.val), list(dataset.reads)
    flag, model_bytes, checkpoint_bytes = "ENCODER", 0, 0
    if isinstance(config, TrainConfig):
        flag = "--init"
        plan_batches(config, dataset, processes)
        model_bytes = _model_bytes(config, dataset.num_classes)
        # SGD keeps a momentum of each weight, AdamW two means.
        checkpoint_bytes = model_bytes * (2 if config.optimisation.optimizer == "sgd" else 3)
        if config.model.dropout and is_library(config.init):
            raise ValueError("--dropout is of plain ViTs; encoders of libraries have --drop-path")
    elif config.run.image_folder is not None:
        open_images(config.run.image_folder, config.run.index_dir)
        reads.append(config.run.image_folder)
    check_output_folder(config.run.output_dir, reads=reads)
    check_encoder(config.init, flag)
    if config.model.patch_size and is_library(config.init):
        raise ValueError(f"--patch-size is of plain ViTs; {config.init} has its own")
    if config.init == RANDOM:
        _ = config.model.encoder  # a size has to be named
    names = "\n".join(pair.name for pair in (*dataset.train, *dataset.val))
    return ScoringFacts(
        train=train, val=val, digest=hashlib.sha256(names.encode()).hexdigest()[:16],
        checkpoint_bytes=checkpoint_bytes, model_bytes=model_bytes,
    )  # fmt: skip


def plan_batches(config: TrainConfig, dataset: DatasetDescription, processes: int) -> BatchPlan:
    """How the run's batches are split; a dataset smaller than a batch makes one step of an epoch.

    Raises ValueError if a process would have nothing to do, or an image would be alone that may
    not be.
    """
    effective = min(config.optimisation.batch_size, len(dataset.train))
    if effective < processes:
        raise ValueError(
            f"a batch of {effective} images cannot be spread over {processes} processes; raise "
            "--batch-size or use fewer processes"
        )
    most = share = -(-effective // processes)  # rounded up: of the process that has most
    if isinstance(config.run.device_batch_size, int):  # auto is measured later, on a GPU
        most = min(share, config.run.device_batch_size)
    # UPerNet's norms take the mean over a part of a batch, pooled to a pixel per image; the other
    # decoders normalise each token by itself.
    is_upernet = config.model.decoder == "upernet"
    if is_upernet and config.run.device_batch_size == "auto":
        raise ValueError(
            "--device-batch-size auto would let the GPU decide what --decoder upernet learns: its "
            "norms are over the images at once; give a number"
        )
    if is_upernet and processes == 1 and 1 in (most, effective % most):
        raise ValueError(
            f"a batch of {effective} in parts of {most} leaves an image alone, which --decoder "
            "upernet cannot train on: change --batch-size or --device-batch-size"
        )
    plan = BatchPlan(
        num_images=len(dataset.train), effective_batch_size=effective, processes=processes,
        micro_batch_size=most, seed=config.optimisation.seed,
    )  # fmt: skip
    config.run.check_passes(plan.accumulation_steps)
    return plan


def needs_torch(config: TrainConfig | ProbeConfig) -> bool:
    """Whether there is something that only `look_inside`, or reading a checkpoint, can judge."""
    trackers = isinstance(config, TrainConfig) and unusual(config.run.log_with)
    # result.json, where it is there, is read first and takes no torch.
    has_checkpoint = os.path.lexists(config.run.output_dir / CHECKPOINT)
    return bool(config.init != RANDOM or trackers or has_checkpoint)


def look_inside(config: TrainConfig | ProbeConfig) -> None:
    """Raise ValueError unless checkpoint and trackers are what the run needs; loads torch."""
    if config.init != RANDOM:
        with heavy_imports():
            from segmenter.libraries import look_at_encoder
        look_at_encoder(config)
    if isinstance(config, TrainConfig):
        check_trackers(config.run.log_with)


def all_settings(config: TrainConfig | ProbeConfig, dataset: DatasetDescription) -> dict[str, Any]:
    """What has to stay the same: a checkpoint's `config`, result.json's `settings`."""
    init = config.init
    if isinstance(config, TrainConfig):
        own = dataclasses.asdict(config.optimisation)
    else:
        names = ("probes", "seed", "image_folder", "linear_weight_decay", "probe_steps")
        own = {name: plain(getattr(config.run, name)) for name in names}
    return {
        **dataclasses.asdict(config.model),
        **config.protocol.described(),
        "precision": config.run.precision,
        "init": encoder_label(init),
        "init_fingerprint": _fingerprint_of(init),
        **own,
        "dataset": dataset.name,
        "num_classes": dataset.num_classes,
        "num_train": len(dataset.train),
        "num_val": len(dataset.val),
    }


def _fingerprint_of(init: Path | str) -> str | None:
    """Tells encoders of one name apart; of a folder: what holds its weights and settings."""
    path = encoder_path(init)
    if path is None:
        return None
    if not path.is_dir():
        return _fingerprint(path)
    kinds = (".json", ".safetensors", ".bin")
    files = sorted(file for file in path.iterdir() if file.suffix in kinds and file.is_file())
    return hashlib.sha256("".join(map(_fingerprint, files)).encode()).hexdigest()[:16]


def _fingerprint(path: Path) -> str:
    """Short digest of a file's size, first and last MiB: tells checkpoints of one name apart."""
    size, mib = path.stat().st_size, 2**20
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(mib))
        file.seek(max(0, size - mib))  # a zip's directory, with checksums, is at its end
        digest.update(file.read(mib))
    return digest.hexdigest()[:16]


def earlier_output(config: TrainConfig | ProbeConfig, dataset: DatasetDescription) -> Path | None:
    """What this call goes on from: result.json (all is done), checkpoint.pth, or nothing.

    Raises ValueError if it was made with other settings, or is not what --resume asks for.
    """
    # The result comes last: where it is there, all is done. A link to nothing is not nothing.
    paths = (config.run.output_dir / name for name in (RESULT, CHECKPOINT))
    found = next(filter(os.path.lexists, paths), None)
    config.run.check_folder(config.leaves, is_run=found is not None)
    is_training = isinstance(config, TrainConfig)
    if isinstance(config, TrainConfig):
        config.run.check_resume(found)
    if found is None:
        return None
    if found.name == RESULT:
        result = read_json(found, Result if is_training else ProbeResult)
        scores = result if is_training else next((result[name] for name in PROBE_AREAS if name in result), {})
        stored, classes = result["settings"], list(scores.get("class_iou", ()))
    else:
        from segmenter.loading import load_checkpoint

        checkpoint = load_checkpoint(found, lazily=True)
        stored, classes = checkpoint["config"], checkpoint["classes"]
    older = older_values(*(GROUPS if is_training else PROBE_GROUPS).values(), stored={})
    check_same(stored, all_settings(config, dataset), older, what=str(found))
    # To ask for the names of a dataset of mmsegmentation takes seconds, and they do not change.
    names = classes if isinstance(dataset.classes, str) else dataset.classes
    if classes and (differing := other_names(classes, names)):
        raise ValueError(f"{found} is of other classes: {differing}; use another --output-dir")
    return found


def _model_bytes(config: TrainConfig, num_classes: int) -> int:
    """About the size of fp32 weights."""
    model = config.model
    if model.model == AUTO or is_library(config.init):
        path = encoder_path(config.init)  # about as much as its weights
        files = [path] if path and path.is_file() else path.glob("*") if path else []
        return sum(file.stat().st_size for file in files if file.is_file())
    size, patch = model.encoder, model.patch_size or model.encoder.patch_size
    patches = (config.protocol.crop_size // patch) ** 2
    parameters = (
        transformer_parameters(size.width, size.depth)
        + size.width * (IMAGE_CHANNELS * patch**2 + patches + num_classes)
    )  # fmt: skip
    if model.decoder == "mask_transformer":
        parameters += transformer_parameters(size.width, model.decoder_layers) + 3 * size.width**2
    if model.decoder == "upernet":  # UPerHead 115 and pyramid 12 times the width's square
        parameters += 127 * size.width**2 + 9 * size.width * AUXILIARY_WIDTH
        parameters += size.depth * size.heads * 4 * patches  # relative positions
    return 4 * parameters
