"""`python -m mae` as a user meets it: real processes, exit codes, one clear line."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from common.command import command
from common.console import EXIT_STOPPED
from mae.check import check_pretraining
from mae.cli import cli, main
from mae.config import GROUPS, PretrainConfig
from tests.mae.conftest import SMALL_RUN, make_config, read_epochs

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLE = REPOSITORY / "../shared/data/imagenet-sample"


def run(*arguments):
    command = [sys.executable, "-m", "mae", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)


def exit_code(capsys, *arguments):
    """Run in this process: exit code and the lines on stderr."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code, capsys.readouterr().err.splitlines()


@pytest.fixture
def settings(in1k_dir, tmp_path):
    """A configuration file for a small run."""
    path = tmp_path / "small.yml"
    path.write_text(yaml.safe_dump({"in1k-dir": str(in1k_dir), **SMALL_RUN}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("masks", ["masks-amg-rle", "masks"])
def test_real_photographs_with_real_segments(tmp_path, masks):
    if not SAMPLE.is_dir():
        pytest.skip(f"the sample of ImageNet is not at {SAMPLE}")
    store = tmp_path / "masks.sqlite"
    assert run("masks", "pack", SAMPLE / masks, "--out", store).returncode == 0
    options = {
        "in1k_dir": SAMPLE, "masks_dir": store, "output_dir": tmp_path / "out",
        "allow_missing_segments": True, "epochs": 1, "image_size": 64, "mask_method": "preencoder",
    }  # fmt: skip
    from mae.pretrain import pretrain

    assert pretrain(make_config(**options))
    record = read_epochs(tmp_path / "out")[0]
    assert record["unreadable_images"] == 0
    assert 8 < record["coverage_percent_mean"] < 25
    assert 0 < record["train_loss"] < 10


def test_help_and_check_say_and_write_nothing_and_import_no_torch(settings, tmp_path):
    code = (
        "import sys\n"
        "from mae.cli import main\n"
        "for words in (['--help'], ['pretrain', '--help'], ['export', '--help'], sys.argv[1:]):\n"
        "    print('--', flush=True)\n"
        "    try:\n        main(words)\n"
        "    except SystemExit as end:\n        assert end.code == 0, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    before = sorted(tmp_path.rglob("*"))
    words = f"pretrain --dry-run check --config {settings} --output-dir {tmp_path / 'new/out'}"
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n--\n"), "the check printed something"
    assert sorted(tmp_path.rglob("*")) == before


def test_exit_codes_are_those_of_the_contract():
    assert EXIT_STOPPED == 75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mask-method", "segment"], "choose one of patches, segments, four_channels"),
        (["--coverage-ratio", "150"], "--coverage-ratio is '150'; it should be less"),
        (["--epochs", "0"], "--epochs is '0'"),
        (["--stop-after", "9"], "to the 4 epochs"),
        (["--image-size", "40"], "not a multiple of the patch size 16"),
        (["--decoder-heads", "5"], "cannot be split into 5 heads"),
        (["--model", "vit_giant"], "vit_huge"),
        (["--effective-batch-size", "999"], "there are images for at most 24"),
        (["--masks-dir", "/nowhere"], "/nowhere is no folder of segments"),
        (["--in1k-dir", "/nowhere"], "/nowhere/train is not a folder"),
        (["--init", "/nowhere.pth"], "/nowhere.pth does not exist"),
        (["--resume", "required"], "there is no checkpoint"),
        (["--use-unmasked-images"], "four_channels needs them"),
        (["--base-lr", "nan"], "--base-lr is 'nan'; it should be a finite number"),
    ],
)
@pytest.mark.parametrize("check", [[], ["--dry-run", "check"]])
def test_bad_input_is_one_line_and_exit_code_2_and_nothing_written(
    capsys, settings, tmp_path, arguments, message, check
):
    out = tmp_path / "out"
    code, lines = exit_code(capsys, "pretrain", "--config", settings, "--output-dir", out, *arguments, *check)
    errors = [line for line in lines if "Error: " in line]
    assert code == 2
    assert len(errors) == 1
    assert message in errors[0]
    assert not out.exists()


def test_an_output_directory_that_is_a_file(capsys, settings, tmp_path):
    (tmp_path / "out").write_text("a file")
    words = ("--config", settings, "--output-dir", tmp_path / "out", "--dry-run", "check")
    code, lines = exit_code(capsys, "pretrain", *words)
    assert code == 2
    assert "is not a folder" in lines[-1]


def test_what_a_run_will_be_is_known_before(in1k_dir, tmp_path):
    config = make_config(in1k_dir, tmp_path / "out", model="vit_tiny", epochs=7)
    facts = check_pretraining(config, processes=1)
    assert (facts.train, facts.left_out, facts.val, facts.val_left_out) == (24, 2, 5, 0)
    plan = facts.plan
    assert (plan.effective_batch_size, plan.micro_batch_size, plan.processes) == (8, 8, 1)
    assert (plan.accumulation_steps, plan.steps_per_epoch) == (1, 3)
    peak = SMALL_RUN["base_lr"] * 8 / 256
    assert facts.learning_rates == (
        (0.0, 0.0, "start"), (1.75, pytest.approx(peak), "end of warm-up"),
        (3.5, pytest.approx(peak * 0.75), "middle"), (7.0, pytest.approx(0, abs=1e-9), "end"),
    )  # fmt: skip
    assert 60e6 < facts.checkpoint_bytes < 80e6
    assert config.settings()["patch_size"] == 16


def test_a_config_prints_the_command_line_that_makes_it(in1k_dir, tmp_path):
    config = make_config(in1k_dir, tmp_path / "out", norm_pix_loss=True, clip_grad=0.5)
    words = config.arguments()
    made = []

    @command(group := click.Group(), "pretrain", **GROUPS)
    def pretrain(**groups):
        made.append(PretrainConfig(**groups))

    group.main(["pretrain", *words], standalone_mode=False)
    assert made == [config]
    assert "--weight-decay" not in words, "it is the default"


def test_timing_gives_seconds_and_writes_nothing(capsys, settings, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as end:
        main(f"pretrain --dry-run time --config {settings} --output-dir {out}".split())
    said = capsys.readouterr()
    assert end.value.code == 0, said.err
    seconds = json.loads(said.out)
    assert seconds["setup_seconds"] > 0
    # Three steps of eight images in an epoch.
    assert seconds["epoch_seconds"] == pytest.approx(24 / seconds["images_per_second"])
    assert seconds["evaluation_seconds"] > 0
    assert seconds["evaluations"] == seconds["epochs"]
    assert sorted(tmp_path.rglob("*")) == before


def test_methods_are_shown_to_people_with_those_of_a_plugin(tmp_path):
    plugin = tmp_path / "stripes.py"
    plugin.write_text(
        "import sys\nfrom mae.masking import MaskingMethod\nassert 'torch' not in sys.modules\n"
        "class Stripes(MaskingMethod):\n    'Every other column.'\n    name = 'stripes'\n"
    )
    done = run("methods", "--plugin", plugin)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    named = [line for line in lines[: lines.index("")] if not line.startswith(" ")]
    assert [line.split()[0] for line in named] == [
        "method", "patches", "segments", "four_channels", "preencoder", "segment_patches",
        "block_patches", "green_patches", "stripes",
    ]  # fmt: skip
    row = named[3].split()
    assert row[1:] == ["one", "all", "4", "--coverage-ratio", "--hide", "--segments-from"]
    assert lines[lines.index(named[3]) + 1].split() == ["--segment-variety", "--segment-choice"]
    assert lines[-1] == "stripes: Every other column."
    assert max(map(len, lines)) <= 100


def test_processes_that_srun_started_without_torchrun_are_refused(capsys, settings, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    code, lines = exit_code(capsys, "pretrain", "--config", settings, "--output-dir", "out")
    assert code == 2
    assert "srun started 2 processes, which are not connected" in lines[0]


def test_every_option_has_help_and_a_field(settings):
    for option in cli.commands["pretrain"].params:
        assert option.help
    help_text = CliRunner().invoke(cli, ["pretrain", "--help"]).output
    assert "--effective-batch-size" in help_text
