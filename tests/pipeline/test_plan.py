from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from mae.config import OptimisationConfig
from mae.schedule import make_batch_plan
from pipeline.plan import Step, as_arguments, make_plan, nodes_of
from pipeline.settings import PretrainSchedule, Settings, eval_points

Make = Callable[..., Settings]


def names(settings: Settings) -> list[str]:
    return [step.name for step in make_plan(settings)]


def by_name(settings: Settings) -> dict[str, Step]:
    return {step.name: step for step in make_plan(settings)}


def test_rounds_and_evaluations_alternate(settings: Make) -> None:
    assert names(settings("--pretrain-epochs 4 --eval-freq 2")) == [
        "pretrain_four_channels_2",
        "evaluate_four_channels_2",
        "pretrain_four_channels_4",
        "evaluate_four_channels_4",
    ]


def test_a_round_needs_the_one_before_and_an_evaluation_only_its_own(settings: Make) -> None:
    steps = by_name(settings("--pretrain-epochs 4 --eval-freq 2"))
    assert steps["pretrain_four_channels_2"].needs == ()
    assert steps["evaluate_four_channels_2"].needs == ("pretrain_four_channels_2",)
    assert steps["pretrain_four_channels_4"].needs == ("pretrain_four_channels_2",)


def test_the_schedule_belongs_to_the_whole_run(settings: Make) -> None:
    steps = by_name(settings("--pretrain-epochs 4 --eval-freq 2"))
    options = [steps[f"pretrain_four_channels_{epochs}"].options for epochs in (2, 4)]
    assert [option["epochs"] for option in options] == [4, 4]
    assert [option["stop_after"] for option in options] == [2, 4]


@pytest.mark.parametrize(
    ("epochs", "freq", "points"),
    [(4, 2, (2, 4)), (5, 2, (2, 4, 5)), (1, 5, (1,)), (3, 1, (1, 2, 3))],
)
def test_a_shorter_last_round_is_added_where_epochs_do_not_divide(
    epochs: int, freq: int, points: tuple[int, ...]
) -> None:
    assert eval_points(epochs, freq) == points


def test_evaluation_points_as_a_list_with_the_untrained_model(settings: Make) -> None:
    found = names(settings("--pretrain-epochs 5 --eval-epochs 0,1 --mask-method patches,segments"))
    assert found == [
        "evaluate_scratch_0",
        "pretrain_patches_1",
        "evaluate_patches_1",
        "pretrain_patches_5",
        "pretrain_segments_1",
        "evaluate_segments_1",
        "pretrain_segments_5",
    ]


def test_several_ratios_and_seeds_share_what_does_not_depend_on_them(settings: Make) -> None:
    call = "--mask-method patches,segments --coverage-ratio 10,15 --pretrain-epochs 1"
    assert [n for n in names(settings(call)) if n.startswith("pretrain")] == [
        "pretrain_patches_1",
        "pretrain_segments-cov10_1",
        "pretrain_segments-cov15_1",
    ]
    seeded = names(settings(call + " --seed 0,1 --eval-epochs 0,1"))
    assert seeded[:2] == ["evaluate_scratch-seed0_0", "evaluate_scratch-seed1_0"]
    assert len(seeded) == len(set(seeded)) == 2 + 2 * 6
    assert "pretrain_segments-cov10-seed1_1" in seeded


def test_stack_fetches_the_official_checkpoint_once_and_starts_from_it(settings: Make) -> None:
    call = "--stack --model vit_base --pretrain-epochs 1 --mask-method patches,segments"
    steps = by_name(settings(call + " --eval-epochs 0,1"))
    official = steps["fetch_vit_base"].outputs[0]
    assert official.name == "mae_pretrain_vit_base.pth"
    assert steps["evaluate_mae_0"].options["init"] == str(official)
    for method in ("patches", "segments"):
        first = steps[f"pretrain_{method}_1"]
        assert first.options["init"] == official
        assert first.needs == ("fetch_vit_base",)


def test_a_local_official_checkpoint_needs_no_fetching(settings: Make, tmp_path: Path) -> None:
    local = tmp_path / "mae.pth"
    local.write_text("x")
    steps = make_plan(settings(f"--stack --mae-checkpoint {local} --pretrain-epochs 1"))
    assert [step.kind for step in steps] == ["pretrain", "evaluate"]
    assert steps[0].options["init"] == local


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("3", ["evaluate_four_channels_3"]),
        ("scratch", ["evaluate_scratch_0"]),
        ("mae", ["fetch_vit_large", "evaluate_mae_0"]),
    ],
)
def test_eval_only(settings: Make, only: str, expected: list[str]) -> None:
    assert names(settings(f"--eval {only}")) == expected


def test_several_processes_go_through_torchrun(settings: Make) -> None:
    single = make_plan(settings("--pretrain-epochs 1"))[0].command
    assert single[:4] == [sys.executable, "-m", "mae", "pretrain"]
    several = make_plan(settings("--pretrain-epochs 1 --num-processes 2"))[0].command
    assert several[:7] == [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "mae"),
    ]


def test_eval_gpus_are_taken_off_pretraining(settings: Make) -> None:
    pretrain, evaluate = make_plan(settings("--pretrain-epochs 1 --num-gpus 4 --eval-gpus 3"))
    assert (pretrain.gpus, pretrain.processes) == ((0, 1, 2), 3)
    assert (evaluate.gpus, evaluate.processes) == ((3,), 1)


def test_options_of_the_parts_are_passed_on_in_either_spelling(settings: Make) -> None:
    call = "--pretrain patch-size=8 --pretrain compile=off --finetune decoder=linear"
    pretrain, evaluate = make_plan(settings(call + " --pretrain-epochs 1"))
    assert "--patch-size 8" in " ".join(pretrain.command)
    assert "--compile off" in " ".join(pretrain.command)
    assert "--decoder linear" in " ".join(evaluate.command)


def test_fingerprint_ignores_what_changes_no_result(settings: Make, tmp_path: Path) -> None:
    def fingerprint(words: str, step: int = 0) -> dict[str, str]:
        return make_plan(settings("--pretrain-epochs 1 " + words))[step].fingerprint(
            tmp_path / "out"
        )

    assert fingerprint("") == fingerprint("--pretrain workers=3 --pretrain batch_size=2")
    assert fingerprint("") != fingerprint("--pretrain base_lr=1")
    assert fingerprint("", 1) != fingerprint("--finetune batch_size=2", 1)
    assert fingerprint("", 1)["init"] == "pretrain_output/four_channels/checkpoint-1.pth"


def test_true_and_false_become_flags() -> None:
    assert as_arguments({"a_b": True, "c": False, "d": None, "e": [1, 2]}) == [
        *("--a-b", "--no-c", "--e", "1,2"),
    ]


def test_learning_rate_rises_to_its_peak_and_falls_to_its_minimum() -> None:
    schedule = PretrainSchedule(effective_batch_size=512, base_lr=1.0, min_lr=0.5)
    assert schedule.peak_lr == 2.0
    assert schedule.lr_at(0) == 0
    assert schedule.lr_at(0.025) == pytest.approx(1.0)
    assert schedule.lr_at(0.05) == pytest.approx(2.0)
    assert schedule.lr_at(0.525) == pytest.approx(1.25)
    assert schedule.lr_at(1) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--mask-method pathces", "patches, segments, four_channels, preencoder"),
        ("--coverage-ratio 101", "0 to 100"),
        ("--coverage-ratio many", "float"),
        ("--eval-epochs 3 --pretrain-epochs 2", "eval-epochs"),
        ("--eval-freq 0", "at least 1"),
        ("--pretrain-epochs 0", "at least 1"),
        ("--seed 1,1", "twice"),
        ("--eval last", "scratch or mae"),
        ("--pretrain lr", "KEY=VALUE"),
        ("--num-gpus 2 --eval-gpus 2", "GPUs 0 to 1"),
        ("--eval-gpus 0 --num-gpus 1", "leaves no GPU"),
        ("--stack --mae-checkpoint /nowhere", "is not a file"),
        ("--mae-checkpoint /nowhere", "--stack or --eval mae"),
        ("--pretrain mask_method=patches", "use --mask-method"),
        ("--pretrain seed=9", "use --seed"),
        ("--finetune init=random", "contradict the plan"),
        ("--num-gpus 0 --eval-gpus 1", "there is no GPU here"),
        ("--masks-dir /nowhere", "needs segments"),
        ("--in1k-dir /nowhere", "not a directory"),
        ("--eval-dataset /nowhere.yml", "does not exist"),
    ],
)
def test_bad_input_is_named_with_what_is_allowed(settings: Make, words: str, said: str) -> None:
    with pytest.raises(click.UsageError) as error:
        settings(words)
    assert said in error.value.format_message()


def test_an_empty_image_folder_is_refused(settings: Make, data: Path) -> None:
    (data / "in1k/train/disc/disc_0.JPEG").unlink()
    with pytest.raises(click.UsageError, match="holds no image"):
        settings()


def test_patches_needs_no_segments(settings: Make) -> None:
    assert settings("--mask-method patches --masks-dir /nowhere")


def test_config_gives_defaults_and_the_command_line_wins(settings: Make, tmp_path: Path) -> None:
    config = tmp_path / "c.yml"
    config.write_text(
        "mask_method: [patches, four-channels]\npretrain-epochs: 7\nseed: 3\n"
        "pretrain: {patch-size: 8, base_lr: 1.0e-3}\n"
    )
    found = settings(f"--config {config} --seed 4 --pretrain patch_size=16")
    assert found.experiment.mask_methods == ("patches", "four_channels")
    assert (found.experiment.pretrain_epochs, found.experiment.seeds) == (7, (4,))
    assert found.pretrain == {"patch_size": 16}
    assert found.schedule.base_lr == 1e-3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mask_metod: patches\n", "mask-method"),
        ("- a\n", "option: value"),
        ("a: [\n", "cannot be read"),
        ("seed: 1\nSEED: 2\n", "no option 'SEED'"),
        ("eval-freq: 1\neval_freq: 2\n", "twice"),
        ("pretrain: 3\n", "has to hold"),
    ],
)
def test_a_config_with_mistakes_is_refused(
    settings: Make, tmp_path: Path, text: str, said: str
) -> None:
    config = tmp_path / "c.yml"
    config.write_text(text)
    with pytest.raises(click.UsageError) as error:
        settings(f"--config {config}")
    assert said in error.value.format_message()


def test_times_and_words_in_a_config_stay_as_they_are_written(
    settings: Make, tmp_path: Path
) -> None:
    config = tmp_path / "cluster.yml"
    config.write_text(
        "time: 24:00:00\nlauncher: slurm\nnum_gpus: 0\nfinetune: {compile: off}\n"
        "sbatch: {account: 0891234, begin: 010}\n"
    )
    chosen = settings(f"--config {config}")
    assert chosen.cluster.time == "24:00:00"
    assert chosen.cluster.sbatch == {"account": "0891234", "begin": "010"}
    assert chosen.finetune["compile"] == "off"


def test_links_stay_links(settings: Make, data: Path, tmp_path: Path) -> None:
    link = tmp_path / "images"
    link.symlink_to(data / "in1k")
    assert settings(f"--in1k-dir {link}").data.in1k_dir == link


def test_flags_without_effect_are_mentioned(
    settings: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    settings("--nodes 2 --partition gpu --coverage-ratio 0.15")
    said = capsys.readouterr().err
    assert "Note: --partition, --nodes: only used with --launcher slurm" in said
    assert "0.15 % of the image" in said


@pytest.mark.parametrize(
    ("effective", "batch", "devices", "expected"),
    [(128, 16, 2, (16, 4)), (40, 16, 1, (10, 4)), (4104, 64, 6, (57, 12)), (8, 64, 8, (1, 1))],
)
def test_batches_are_split_as_pretraining_does(
    effective: int, batch: int, devices: int, expected: tuple[int, int]
) -> None:
    schedule = PretrainSchedule(batch_size=batch, effective_batch_size=effective)
    assert schedule.split(devices) == expected
    optimisation = OptimisationConfig(effective_batch_size=effective)
    plan = make_batch_plan(optimisation, num_images=5000, processes=devices, batch_size=batch)
    assert (plan.micro_batch_size, plan.accumulation_steps) == expected


def test_an_effective_batch_that_cannot_be_split_is_refused_with_one_that_can() -> None:
    with pytest.raises(ValueError, match="effective_batch_size=4098"):
        PretrainSchedule(effective_batch_size=4096).split(6)


def test_only_pretraining_is_spread_over_nodes(settings: Make) -> None:
    words = "--pretrain-epochs 1 --launcher slurm --nodes 2 --num-gpus 8 --stack --model vit_base"
    chosen = settings(words)
    assert [nodes_of(step, chosen) for step in make_plan(chosen)] == [1, 2, 1]
