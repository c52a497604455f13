"""One declaration of an option gives the flag, the YAML key, the help and the error."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import click
import pytest

from common.command import CONTEXT, command
from common.console import run_program
from common.options import (
    Layer,
    OptionGroup,
    as_arguments,
    check_same,
    decisive_values,
    differences,
    load_plugin,
    make,
    make_all,
    merge,
    older_values,
    option,
    option_of,
)


@dataclass(frozen=True, kw_only=True)
class Small(OptionGroup):
    title: ClassVar[str] = "Small things"
    folder: Path = option("Where it is.")
    epochs: int = option("How often.", 5, at_least=1)
    rate: float = option("How fast.", 0.1, above=0)
    share: float | None = option("How much.", None, at_least=0, below=1)
    kind: Literal["auto", "four_channels"] = option("Which.", "auto", neutral=True)
    ratios: tuple[float, ...] = option("Several.", (15.0,), at_least=0, at_most=100)
    stack: bool = option("On another.", False)
    wide: bool = option("Broad.", True)
    later: int = option("Came later.", 3, older=7)
    parts: Mapping[str, object] = option("Options of a part.", {})


made = []


@click.group(context_settings=CONTEXT)
def cli():
    """Nothing."""


@command(cli, small=Small)
@click.option("--check", is_flag=True, help="Only check.")
def go(small, check):
    """Go."""
    made.append((small, check))


def run(*arguments):
    """Exit code, and what was made."""
    made.clear()
    with pytest.raises(SystemExit) as end:
        run_program(cli, "program", ["go", *map(str, arguments)])
    return end.value.code, made[0][0] if made else None


def test_defaults_are_those_of_the_fields():
    code, small = run("--folder", "/data")
    assert code == 0
    assert small == Small(folder=Path("/data"))


def test_dashes_and_underscores_are_equal_in_names_and_choices():
    _, small = run("--folder", "/data", "--kind", "four-channels", "--ratios", "1, 2.5", "--no_wide")
    assert (small.kind, small.ratios, small.wide) == ("four_channels", (1.0, 2.5), False)


def test_paths_become_absolute_and_keep_links(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    assert run("--folder", "link")[1].folder == tmp_path / "link"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("--folder", "~/x")[1].folder == tmp_path / "x"


def test_yaml_gives_defaults_and_the_command_line_wins(tmp_path):
    (tmp_path / "a.yml").write_text(
        "folder: /data\nepochs: 7\nrate: 1e-3\nratios: [3, 4]\nstack: true\nwide: false\n"
        "parts: {compile: off, time: 24:00:00, base-lr: 1.5e-4}\n"
    )
    _, small = run("--config", tmp_path / "a.yml", "--epochs", 8, "--parts", "epochs=2")
    assert (small.epochs, small.rate, small.ratios) == (8, 0.001, (3.0, 4.0))
    assert (small.stack, small.wide) == (True, False)
    assert small.parts == {"compile": "off", "time": "24:00:00", "base_lr": 1.5e-4, "epochs": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--folder is missing: Where it is."),
        (["--folder", ""], "--folder is ''; give a path"),
        (["--folder", "~nosuchuser/x"], "Could not determine home directory"),
        (["--epochs", "0"], "--epochs is '0'; it should be greater than or equal to 1"),
        (["--epochs", "1.9"], "--epochs is '1.9'; it should be a valid integer"),
        (["--epochs", "1_0"], "--epochs is '1_0'; give a number"),
        (["--epochs", "1" * 5000], "as an integer"),
        (["--rate", "nan"], "--rate is 'nan'; it should be a finite number"),
        (["--rate", "inf"], "--rate is 'inf'; it should be a finite number"),
        (["--rate", "fast"], "--rate is 'fast'; it should be a valid number"),
        (["--share", "1"], "--share is '1'; it should be less than 1"),
        (["--ratios", "5,101"], "--ratios is '101'; it should be less than or equal to 100"),
        (["--ratios", "5,,6"], "--ratios is ''; it should be a valid number"),
        (["--kind", "other"], "--kind is 'other'; choose one of auto, four_channels"),
        (["--parts", "epochs"], "--parts is 'epochs'; give KEY=VALUE"),
        (["--parts", "epochs=[1"], "--parts epochs=[1 is not YAML"),
        (["--epoch", "3"], "Did you mean '--epochs'?"),
    ],
)
def test_a_wrong_value_is_one_line_with_what_is_allowed(capsys, arguments, message):
    given = [] if not arguments or "--folder" in arguments else ["--folder", "/data"]
    assert run(*given, *arguments) == (2, None)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 1.9", "--epochs is 1.9; it should be a valid integer"),
        ("epochs: true", "--epochs is True; give a number"),
        ("epochs: [1]", "--epochs is [1]; it should be a valid integer"),
        (f"epochs: {'1' * 5000}", "a.yml"),
        ("folder: 7", "--folder is 7; give a path"),
        ("folder: [a]", "--folder is ['a']; give a path"),
        ("stack: yes", "--stack is 'yes'; it should be a valid boolean"),
        ("rate: .nan", "--rate is nan"),
        ("parts: 3", "--parts is 3; give `option: value` lines"),
        ("epoch: 3", "there is no 'epoch'; did you mean epochs"),
        ("epochs: 3\nepochs: 4", "epochs is given twice"),
        ("stack: true\nrate: 1\nra-te: 2", "there is no 'ra_te'; did you mean rate"),
        ("[1, 2]", "has to hold `key: value` lines"),
        ("a: [1", "a.yml is not YAML: line 2"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("kind: &a [x, *a]", "line 1: write the value instead of *alias"),
        ("a: !!python/object:os.system 1", "a.yml is not YAML"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(capsys, tmp_path, text, message):
    (tmp_path / "a.yml").write_text(text + "\n")
    assert run("--folder", "/data", "--config", tmp_path / "a.yml") == (2, None)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "a.yml" in lines[0]
    assert message in lines[0]


def test_help_has_a_section_for_each_group_and_shows_defaults(capsys):
    assert run("--help")[0] == 0
    text = capsys.readouterr().out
    assert "Small things:" in text
    for part in ("[required]", "[default: 5]", "[auto|four_channels]", "--no-wide", "Only check."):
        assert part in text


def test_later_layers_win_and_pairs_add_up_and_each_is_judged():
    layers = [Layer({"rate": 1, "parts": {"a": 1, "b": 1}}, "a.yml"), Layer({"parts": ["b=2"]})]
    small = make(Small, merge([Small], [*layers, Layer({"folder": Path("/x")})]))
    assert (small.rate, small.parts) == (1.0, {"a": 1, "b": 2})
    with pytest.raises(ValueError, match=r"a\.yml: --epochs is 0; it should be greater"):
        merge([Small], [Layer({"epochs": 0}, "a.yml"), Layer({"epochs": 1})])


def test_an_early_option_gives_a_layer_below_what_was_written_and_may_bring_choices():
    words = ["plain"]

    def read_recipe(name):
        words.append("new")
        return Layer({"rate": 7, "share": 0.5}, name)

    @dataclass(frozen=True, kw_only=True)
    class Cook(OptionGroup):
        title: ClassVar[str] = "Cook"
        style: str = option("How.", "plain", choices=lambda: words)
        recipe: str = option("Which.", "own.yml", early=read_recipe)

    groups = {"small": Small, "cook": Cook}
    made = make_all(groups, [Layer({"folder": "/x", "rate": "8", "style": "new"})])
    assert (made["small"].rate, made["small"].share, made["cook"].style) == (8.0, 0.5, "new")
    with pytest.raises(ValueError, match=r"cook\.yml: --share is 2; it should be less than 1"):
        make_all({"small": Small, "cook": Dear}, [Layer({"folder": "/x"})])


@dataclass(frozen=True, kw_only=True)
class Dear(OptionGroup):
    title: ClassVar[str] = "A wrong recipe"
    recipe: str = option("Which.", "cook.yml", early=lambda name: Layer({"share": 2}, name))
    epochs: int | None = option_of(Small, "epochs", default=None)


def test_an_option_of_another_group_keeps_its_range_and_may_be_left_out():
    assert make(Dear, {}).epochs is None
    with pytest.raises(ValueError, match="--epochs is 0; it should be greater than or equal to 1"):
        merge([Dear], [Layer({"epochs": 0})])


def test_an_older_file_counts_as_what_the_option_says():
    assert older_values(Small, stored={})["later"] == 7
    assert "folder" not in older_values(Small, stored={})  # every file has it


def test_a_command_line_holds_what_a_process_would_not_have_by_itself():
    group = Small(folder=Path("/a"), stack=True, wide=False, ratios=(1.0, 2.0), share=None)
    words = ["--folder", "/a", "--ratios", "1.0,2.0", "--stack", "--no-wide"]
    assert as_arguments(group) == words
    below = {"stack": True, "wide": True, "ratios": (1.0, 2.0), "rate": 0.2}
    assert as_arguments(group, below=below) == ["--folder", "/a", "--rate", "0.1", "--no-wide"]


def test_what_decides_leaves_out_speed_and_place():
    decisive = decisive_values(Small(folder=Path("/a"), kind="four_channels"))
    assert (decisive["folder"], decisive["ratios"]) == ("/a", [15.0])
    assert "kind" not in decisive


def test_numbers_are_equal_however_they_are_written():
    stored = {
        "ratio": "15",
        "rate": "0.00015",
        "seed": 1,
        "flag": "True",
        "path": "/a",
        "off": None,
    }
    wanted = {"ratio": 15.0, "rate": 1.5e-4, "seed": "1", "flag": True, "path": Path("/a")}
    assert differences(stored, wanted | {"off": None}, {}) == []


def test_a_setting_that_came_later_counts_as_the_older_behaviour():
    older = {"drop_path": 0.0, "loss": "mse"}
    assert differences({}, {"drop_path": 0.0, "loss": "mse"}, older) == []
    assert differences({}, {"drop_path": 0.1}, older) == ["drop_path: 0.0 -> 0.1"]
    assert differences({"drop_path": 0.1}, {"drop_path": 0.0}, older) == ["drop_path: 0.1 -> 0.0"]


def test_true_is_not_one_and_text_is_not_none():
    assert differences({"a": True}, {"a": 1}, {})
    assert differences({"a": None}, {"a": "x"}, {})
    assert differences({"a": (1, 2)}, {"a": [1, 2]}, {}) == []


def test_the_error_names_what_differs_and_what_to_do():
    with pytest.raises(ValueError, match=r"run was made with .*\(seed: 0 -> 1\); use those, or"):
        check_same({"seed": 0}, {"seed": 1}, {}, what="run")


@dataclass(frozen=True, kw_only=True)
class Hungry(OptionGroup):
    title: ClassVar[str] = "Memory"
    batch_size: int = option("Images at once.", 64, memory=True)
    recompute: bool = option("Less memory.", False, memory=True)
    epochs: int = option("How often.", 5)


@pytest.mark.parametrize(
    ("group", "advice"),
    [
        (Hungry, "lower --batch-size or give --recompute; the result stays the same"),
        (Small, "use a GPU that has more"),
    ],
)
def test_too_little_gpu_memory_ends_in_one_line_that_says_what_helps(group, advice, capsys):
    torch = pytest.importorskip("torch")

    @command(click.Group("program"), "go", group=group)
    def go(group):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 31.73 "
            "GiB of which 1.19 GiB is free.\nSee the documentation for Memory Management"
        )

    with pytest.raises(SystemExit) as end:
        run_program(go, "program", [] if group is Hungry else ["--folder", "/data"])
    assert end.value.code == 1
    expected = f"Error: CUDA out of memory. Tried to allocate 2.00 GiB: {advice}\n"
    assert capsys.readouterr().err == expected


def test_a_plugin_leaves_nothing_beside_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for name, text in (("good.py", "x = 1\n"), ("bad.py", "1 / 0\n")):
        (tmp_path / name).write_text(text)
    load_plugin(tmp_path / "good.py")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        load_plugin(tmp_path / "bad.py")
    assert {path.name for path in tmp_path.iterdir()} == {"good.py", "bad.py"}
