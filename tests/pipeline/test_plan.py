from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mae.config import PretrainConfig
from pipeline.launch import view
from pipeline.plan.check import init_of
from pipeline.plan.layout import Layout
from pipeline.plan.settings import Experiment, Settings
from pipeline.plan.step import Step
from pipeline.plan.steps import make_plan

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
    configs: list[Any] = [steps[f"pretrain_four_channels_{epochs}"].config for epochs in (2, 4)]
    assert [config.optimisation.epochs for config in configs] == [4, 4]
    assert [config.run.stop_after for config in configs] == [2, 4]


@pytest.mark.parametrize(
    ("epochs", "freq", "points"),
    [(4, 2, (2, 4)), (5, 2, (2, 4, 5)), (1, 5, (1,)), (3, 1, (1, 2, 3))],
)
def test_a_shorter_last_round_is_added_where_epochs_do_not_divide(
    epochs: int, freq: int, points: tuple[int, ...]
) -> None:
    assert Experiment(pretrain_epochs=epochs, eval_freq=freq).eval_points == points


def test_evaluation_points_as_a_list_with_the_untrained_model(settings: Make) -> None:
    found = names(settings("--pretrain-epochs 5 --eval-epochs 0,1 --mask-method patches,segments"))
    assert found == [
        "pretrain_patches_0",
        "evaluate_patches_0",
        "pretrain_patches_1",
        "evaluate_patches_1",
        "pretrain_patches_5",
        "pretrain_segments_0",
        "evaluate_segments_0",
        "pretrain_segments_1",
        "evaluate_segments_1",
        "pretrain_segments_5",
    ]


def test_several_ratios_and_seeds_share_what_does_not_depend_on_them(settings: Make) -> None:
    call = "--mask-method patches,segments --coverage-ratio 10,15 --pretrain-epochs 1"
    assert [n for n in names(settings(call)) if n.startswith("pretrain")] == [
        "pretrain_patches_1",
        "pretrain_segments-cov10_1",
        "pretrain_segments_1",
    ]
    seeded = names(settings(call + " --seed 0,1 --eval-epochs 0,1"))
    # A ratio begins with the same model as another, and so does a control.
    untrained = {f"evaluate_{run}_0" for run in ("patches", "patches-seed1")}
    untrained |= {f"evaluate_{run}_0" for run in ("segments-cov10", "segments-cov10-seed1")}
    assert {name for name in seeded if name.startswith("evaluate") and "_0" in name} == untrained
    assert len(seeded) == len(set(seeded)) == 2 * 4 + 2 * 6
    assert "pretrain_segments-cov10-seed1_1" in seeded
    assert "pretrain_segments_1" in seeded


def test_stack_fetches_the_official_checkpoint_once_and_starts_from_it(settings: Make) -> None:
    call = "--stack --model vit_base --pretrain-epochs 1 --mask-method patches,segments"
    steps = by_name(settings(call + " --eval-epochs 0,1"))
    official = steps["fetch_vit_base"].outputs[0]
    assert official.name == "mae_pretrain_vit_base.pth"
    for method in ("patches", "segments"):
        start, first = steps[f"pretrain_{method}_0"], steps[f"pretrain_{method}_1"]
        assert init_of(start) == init_of(first) == official
        assert (start.needs, first.needs) == (("fetch_vit_base",), (start.name,))


def test_a_local_official_checkpoint_needs_no_fetching(settings: Make, tmp_path: Path) -> None:
    local = tmp_path / "mae.pth"
    local.write_text("x")
    steps = make_plan(settings(f"--stack --mae-checkpoint {local} --pretrain-epochs 1"))
    assert [step.kind for step in steps] == ["pretrain", "evaluate"]
    assert init_of(steps[0]) == local


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


def test_scores_of_one_gpu_come_after_all_pretraining_that_needs_more(settings: Make) -> None:
    call = "--pretrain-epochs 2 --eval-freq 1 --probe-freq 1 --baselines scratch"
    steps = make_plan(settings(call + " --num-gpus 8"))
    assert [step.kind for step in steps] == ["pretrain"] * 2 + ["probe"] * 3 + ["evaluate"] * 3
    assert [step.gpus for step in steps] == [tuple(range(8))] * 8
    assert [step.processes for step in steps] == [8] * 2 + [1] * 6
    in_turn = [step.kind for step in make_plan(settings(call))]
    for words in ("--num-gpus 8 --gpus-per-eval 8", "--num-gpus 1", "--num-gpus 8 --eval-gpus 7"):
        assert [step.kind for step in make_plan(settings(f"{call} {words}"))] == in_turn


def test_the_table_says_what_each_step_runs_on(
    settings: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = settings("--pretrain-epochs 1 --num-gpus 4 --eval-gpus 2,3")
    monkeypatch.setattr(view, "checked_plan", make_plan)
    view.show(chosen, verbose=False)
    pretrain, evaluate = (re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()[3:5])
    assert "2 GPUs" in pretrain
    assert "1 of 2 GPUs" in evaluate


def test_options_of_the_parts_are_passed_on_in_either_spelling(settings: Make) -> None:
    call = "--pretrain patch-size=8 --pretrain compile=off --finetune decoder=linear"
    pretrain, evaluate = make_plan(settings(call + " --pretrain-epochs 1"))
    assert "--patch-size 8" in " ".join(pretrain.command)
    assert "--compile off" in " ".join(pretrain.command)
    assert "--decoder linear" in " ".join(evaluate.command)


def test_settings_of_a_step_are_all_that_changes_its_result(settings: Make) -> None:
    def made_with(words: str, step: int = 0) -> Mapping[str, Any]:
        return make_plan(settings("--pretrain-epochs 1 " + words))[step].settings

    assert made_with("") == made_with("--pretrain workers=3 --pretrain batch_size=2")
    assert made_with("") == made_with("--pretrain base_lr=1.5e-4")
    assert made_with("") != made_with("--pretrain base_lr=1")
    assert made_with("", 1) != made_with("--finetune batch_size=2", 1)
    assert made_with("", 1) == made_with("--finetune batch_size=8", 1), "the recipe's"
    assert made_with("--recipe fast", 1)["epochs"] == 8
    assert made_with("", 1)["init"] == "pretrain_output/four_channels/checkpoint-1.pth"
    patches = made_with("--mask-method patches --coverage-ratio 30")
    assert patches == made_with("--mask-method patches")


def test_all_methods_train_on_the_images_with_segments_where_there_are_any(settings: Make) -> None:
    """Else a difference between methods could be one between images."""
    for step in make_plan(settings("--pretrain-epochs 1 --mask-method patches,segment_patches,segments")):
        if isinstance(step.config, PretrainConfig):
            assert not step.config.data.use_unmasked_images, step.name


def test_finetuning_seeds_are_evaluations_of_one_checkpoint(settings: Make) -> None:
    steps = make_plan(settings("--pretrain-epochs 1 --eval-epochs 0,1 --eval-seeds 3 --seed 2"))
    found = {step.name: step for step in steps}
    assert list(found) == [
        *("pretrain_four_channels-seed2_0", "evaluate_four_channels-seed2_0"),
        *("evaluate_four_channels-seed2_0-evalseed1", "evaluate_four_channels-seed2_0-evalseed2"),
        *("pretrain_four_channels-seed2_1",),
        *("evaluate_four_channels-seed2_1", "evaluate_four_channels-seed2_1-evalseed1"),
        "evaluate_four_channels-seed2_1-evalseed2",
    ]
    last = found["evaluate_four_channels-seed2_1-evalseed2"]
    assert last.settings["seed"] == 2_000_002
    assert last.needs == ("pretrain_four_channels-seed2_1",)
    assert last.folder.name == "four_channels-seed2_1-evalseed2"


def test_finetunings_of_two_pretrainings_share_no_seed(settings: Make) -> None:
    call = "--pretrain-epochs 1 --eval-seeds 3 --seed 0,1,2,4294967295"
    steps = make_plan(settings(call))
    seeds = [step.settings["seed"] for step in steps if step.kind == "evaluate"]
    assert len(set(seeds)) == len(seeds) == 12
    assert max(seeds) == 4294967295


def test_a_finetuning_that_an_earlier_version_began_keeps_its_seed(settings: Make) -> None:
    call = "--pretrain-epochs 1 --eval-seeds 2 --seed 1"
    made = settings(call)
    paths, name = Layout(made.data.output_dir), "evaluate_four_channels-seed1_1-evalseed1"
    paths.records.mkdir(parents=True)
    for earlier, expected in ((2, 2), ("2", 2), (1_000_001, 1_000_001), (7, 1_000_001)):
        paths.record(name).write_text(json.dumps({"fingerprint": {"seed": earlier}}))
        assert by_name(made)[name].settings["seed"] == expected


def test_plugin_and_trackers_reach_every_step_that_has_them(settings: Make, tmp_path: Path) -> None:
    plugin = tmp_path / "p.py"
    plugin.touch()
    call = f"--pretrain-epochs 1 --plugin {plugin} --log-with wandb,tensorboard"
    for step in make_plan(settings(call)):
        words = " ".join(step.command)
        assert f"--plugin {plugin}" in words
        assert "--log-with wandb,tensorboard" in words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--coverage-ratio 101", "less than or equal to 100"),
        ("--coverage-ratio many", "should be a valid number"),
        ("--eval-epochs 3 --pretrain-epochs 2", "eval-epochs"),
        ("--eval-freq -1", "greater than or equal to 0"),
        ("--pretrain-epochs 0", "greater than or equal to 1"),
        ("--eval-seeds -1", "greater than or equal to 0"),
        ("--seed 1,1", "twice"),
        ("--pretrain lr", "KEY=VALUE"),
        ("--num-gpus 2 --eval-gpus 2", "GPUs 0 to 1"),
        ("--eval-gpus 0 --num-gpus 1", "leaves no GPU"),
        ("--num-gpus 4 --eval-gpus 3 --gpus-per-eval 2", "to evaluate on are 1"),
        ("--num-gpus 0 --gpus-per-eval 2", "to evaluate on are 0"),
        ("--mae-checkpoint /nowhere", "is not a file"),
        ("--segments-from mine", "choose one of own, borrowed, blob, block"),
        ("--segments-from own,own", "twice"),
        ("--baselines none,mae", "one or the other"),
        ("--baselines mine", "scratch, mae, none"),
        ("--probe-freq -1", "greater than or equal to 0"),
        ("--probe-freq 1 --probe epochs=3", "epochs"),
        ("--probe-freq 1 --probe model=vit_base", "use --model"),
        ("--pretrain mask_method=patches", "use --mask-method"),
        ("--pretrain seed=9", "use --seed"),
        ("--finetune init=random", "contradict the plan"),
        ("--num-gpus 0 --eval-gpus 1", "there is no GPU here"),
    ],
)
def test_bad_input_is_named_with_what_is_allowed(settings: Make, words: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        make_plan(settings(words))


def test_config_gives_defaults_and_the_command_line_wins(settings: Make, tmp_path: Path) -> None:
    config = tmp_path / "c.yml"
    config.write_text(
        "mask_method: [patches, four-channels]\npretrain-epochs: 7\nseed: 3\n"
        "pretrain: {patch-size: 8, base_lr: 1.0e-3}\n"
    )
    found = settings(f"--config {config} --seed 4 --pretrain patch_size=16")
    assert found.experiment.mask_method == ("patches", "four_channels")
    assert (found.experiment.pretrain_epochs, found.experiment.seed) == (7, (4,))
    assert found.parts.pretrain == {"patch_size": 16, "base_lr": 1e-3}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mask_metod: patches\n", "mask_method"),
        ("- a\n", "key: value"),
        ("a: [\n", "is not YAML"),
        ("seed: 1\nSEED: 2\n", "no 'SEED'"),
        ("eval-freq: 1\neval_freq: 2\n", "twice"),
        ("pretrain: 3\n", "option: value"),
    ],
)
def test_a_config_with_mistakes_is_refused(settings: Make, tmp_path: Path, text: str, said: str) -> None:
    config = tmp_path / "c.yml"
    config.write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)):
        settings(f"--config {config}")


def test_times_and_words_in_a_config_stay_as_they_are_written(settings: Make, tmp_path: Path) -> None:
    config = tmp_path / "cluster.yml"
    config.write_text(
        "time: 24:00:00\nlauncher: slurm\nnum_gpus: 0\nfinetune: {compile: off}\n"
        "sbatch: {account: 0891234, begin: 010}\n"
    )
    chosen = settings(f"--config {config}")
    assert chosen.cluster.time == "24:00:00"
    assert chosen.cluster.sbatch == {"account": "0891234", "begin": "010"}
    assert chosen.parts.finetune["compile"] == "off"


def test_links_stay_links(settings: Make, data: Path, tmp_path: Path) -> None:
    link = tmp_path / "images"
    link.symlink_to(data / "in1k")
    assert settings(f"--in1k-dir {link}").data.in1k_dir == link


def test_flags_without_effect_are_mentioned(settings: Make) -> None:
    first, second = settings("--nodes 2 --partition gpu --coverage-ratio 0.15").notes()
    assert first == "--nodes, --partition: only used with --launcher slurm"
    assert "0.15 % of the image" in second


def test_scores_that_wait_for_the_end_are_mentioned(settings: Make) -> None:
    (said,) = settings("--eval-freq 1 --num-gpus 8").notes()
    assert "after pretraining" in said and "--eval-gpus" in said
    for words in ("--num-gpus 8 --eval-gpus 7", "--num-gpus 1", "--eval scratch --num-gpus 8"):
        assert list(settings(f"--eval-freq 1 {words}").notes()) == []


def test_only_pretraining_is_spread_over_nodes(settings: Make) -> None:
    words = "--pretrain-epochs 1 --launcher slurm --nodes 2 --num-gpus 8 --stack --model vit_base"
    chosen = settings(words)
    assert [step.nodes for step in make_plan(chosen)] == [1, 2, 1]
