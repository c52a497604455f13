"""`--check`: options, paths and checkpoints, before anything heavy is imported or written."""

from __future__ import annotations

import os

from segmenter.config import TrainConfig, differing_settings
from segmenter.dataset import TRAIN, VAL, read_description
from segmenter.layout import CHECKPOINT, RESULT, read_result, seed_dir
from segmenter.schedule import make_batch_plan


def check_training(config: TrainConfig) -> None:
    """Raise ValueError for what would stop `train` from starting. torch only reads checkpoints."""
    description = read_description(config.run.dataset)
    counts = {f"num_{split}": len(description.pairs(split)) for split in (TRAIN, VAL)}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    make_batch_plan(counts[f"num_{TRAIN}"], config.optimisation.batch_size, processes)
    if config.run.init is not None:
        from segmenter.pretrained import check_encoder_file

        check_encoder_file(config.run.init, config.model)
    wanted = {**config.settings(), "dataset": description.name, **counts}
    _check_output_dir(config, wanted)


def _check_output_dir(config: TrainConfig, wanted: dict[str, object]) -> None:
    output_dir = config.run.output_dir
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output-dir {output_dir} is a file")
    if config.run.resume == "never":
        return
    if config.run.eval_seeds > 1:
        output_dir = seed_dir(output_dir, config.optimisation.seed)
    result = read_result(output_dir)
    if result is not None:
        stored, source = result["settings"], output_dir / RESULT
    elif (output_dir / CHECKPOINT).exists():
        from segmenter.checkpoint import load_checkpoint

        source = output_dir / CHECKPOINT
        stored = load_checkpoint(source, lazily=True)["config"]
    elif config.run.resume == "required":
        raise ValueError(f"--resume required: {output_dir / CHECKPOINT} does not exist")
    else:
        return
    differences = differing_settings(stored, wanted)
    if differences:
        raise ValueError(
            f"{source} was made with other settings ({'; '.join(differences)}); "
            f"use those or another --output-dir, or remove {output_dir} to begin anew"
        )


def is_finished(config: TrainConfig) -> bool:
    """Whether result.json of the same settings is there already."""
    if config.run.resume == "never":
        return False
    result = read_result(config.run.output_dir)
    return result is not None and len(result["seeds"]) == config.run.eval_seeds
