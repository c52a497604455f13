"""Damaged checkpoints and stores: no training starts from them, or goes on."""

import pytest
import torch

from tests.wrong.damage import INF, NAN, NO_CHECKPOINTS, PRE, STORES, change, poison
from tests.wrong.world import Case, call, check, pretrain_words, probe_words, train_words

# Any file of a ViT's weights will do, whatever else it holds.
NO_MATTER = (
    "of another format", "of a strange format", "epochs that are text", "settings that are text",
    "a model that is a number", "a model that is not known", "a size that is text",
    "a size that is negative", "a size that is not the weights'", "no settings",
    *[name for name in NO_CHECKPOINTS if "fixed set" in name],
)  # fmt: skip
STARTS = {name: prepare for name, prepare in NO_CHECKPOINTS.items() if name not in NO_MATTER}


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("check_only", [[], ["--dry-run", "check"]])
def test_a_finetuning_does_not_start_from_it(name, world, capsys, check_only):
    STARTS[name](world)
    words = [*train_words(world), *check_only]
    words[words.index("--init") + 1] = str(world / PRE)
    check(Case(name, words, "checkpoint-1.pth"), world, capsys)


@pytest.mark.parametrize("name", STARTS)
def test_a_probe_does_not_start_from_it(name, world, capsys):
    STARTS[name](world)
    check(Case(name, probe_words(world, init=str(world / PRE)), "checkpoint-1.pth"), world, capsys)


@pytest.mark.parametrize("name", [n for n in NO_CHECKPOINTS if n not in ("a folder", "a pipe")])
def test_a_pretraining_does_not_go_on_from_it(name, world, capsys):
    NO_CHECKPOINTS[name](world)
    (world / "pre/last.pth").unlink(missing_ok=True)
    if name == "a link to nothing":
        (world / PRE).unlink()
        (world / "pre/last.pth").symlink_to("nothing")
    check(Case(name, pretrain_words(world, "pre"), "pre"), world, capsys)


NO_PROGRESS = {
    "99 steps": {"steps_completed": 99}, "99 epochs": {"epochs_completed": 99},
    "fewer steps than none": {"steps_completed": -1}, "no sums": {"state__sums": {}},
    "other sums": {"state__sums": {"loss": 1.0}}, "NaN seconds": {"state__seconds": NAN},
    "NaN in sums": {"state__sums": lambda sums: dict.fromkeys(sums, NAN)},
    "a score below 0": {"state__best_score": -1.0},
}  # fmt: skip


@pytest.mark.parametrize("name", NO_PROGRESS)
def test_no_training_goes_on_from_what_contradicts_itself(name, world, capsys):
    change("pre/last.pth", **NO_PROGRESS[name])(world)
    says = "99 epochs already" if name == "99 epochs" else "last.pth"
    check(Case(name, pretrain_words(world, "pre"), says), world, capsys)
    (world / "fine/result.json").unlink()
    change("fine/checkpoint.pth", **NO_PROGRESS[name])(world)
    check(Case(name, train_words(world, "fine"), "checkpoint.pth"), world, capsys)


POSITIONS = {
    "no square": torch.zeros(1, 8, 16), "two at once": torch.zeros(2, 10, 16), "flat": torch.zeros(5, 16),
    "another width": torch.zeros(1, 10, 7), "no width": torch.zeros(1, 10, 0),
    "whole numbers": torch.zeros(1, 10, 16, dtype=torch.long), "of the class alone": torch.zeros(1, 1, 16),
    "more than there is": torch.zeros(1, 1, 16).expand(1, 10**10 + 1, 16),
}  # fmt: skip


@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("check_only", [[], ["--dry-run", "check"]])
def test_nothing_starts_from_odd_position_embeddings(name, world, capsys, check_only):
    change(PRE, model__pos_embed=POSITIONS[name])(world)
    words = [*pretrain_words(world), "--init", str(world / PRE), *check_only]
    check(Case(name, words, "checkpoint-1.pth"), world, capsys)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_damaged_weights_are_not_trained_on(world, capsys, value, part):
    path = world / "pre/last.pth"  # the rounds' own have no optimizer
    content = torch.load(path, weights_only=True)
    if part == "model":
        content["model"] = poison(value)(content["model"])
    else:
        content["optimizer"]["state"][0]["exp_avg"].fill_(value)
    torch.save(content, path)
    check(Case(part, pretrain_words(world, "pre"), ("is not finite", part)), world, capsys)


@pytest.mark.parametrize("name", STORES)
def test_a_pretraining_does_not_use_a_damaged_store(name, world, capsys):
    """Found when it starts, or image by image: then too many are unreadable."""
    STORES[name](world)
    code, _, err = call(pretrain_words(world), capsys)
    assert code in (1, 2), err
    assert "Traceback" not in err
    assert "Error: " in err
    assert not list((world / "new").glob("*.pth"))
