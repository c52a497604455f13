"""Every option of every command, with values of the wrong kind, on the command line and in YAML."""

import zlib
from pathlib import Path

import pytest
import yaml

from common.options import fields_of
from mae.config import GROUPS as PRETRAIN_GROUPS
from pipeline.plan.settings import GROUPS as PLAN_GROUPS
from segmenter.config import GROUPS as TRAIN_GROUPS
from segmenter.config import PROBE_GROUPS
from tests.wrong.world import (
    assert_clear,
    benchmark_words,
    call,
    pretrain_words,
    probe_words,
    train_words,
)

NUMBERS = ["nan", "inf", "-inf", "1e400", "abc", "", "1_0", "0x10", "9" * 400, "[]", "true", "1,,2"]
WHOLE = [*NUMBERS, "1.5", "1e3", "٣"]
IN_YAML = [True, [1, [2]], {"a": 1}, "2020-01-01", float("nan"), float("inf"), "~nosuchuser/x"]
PATHS = ["", "~nosuchuser/x", "x" * 300]
PAIRS = ["", "x", "=1", "a=[1", "a=!!python/object:os.system 1", "nosuch=1"]
OF_EACH = 3
PROGRAMS = {
    "mae": (PRETRAIN_GROUPS, pretrain_words), "segmenter": (TRAIN_GROUPS, train_words),
    "probe": (PROBE_GROUPS, probe_words), "benchmark": (PLAN_GROUPS, benchmark_words),
}  # fmt: skip
OPTIONS = [
    (program, field)
    for program, (groups, _) in PROGRAMS.items()
    for field in fields_of(*groups.values()).values()
]


def some_of(values, name):
    """So many of them, others for each option: all values are met, and all options."""
    first = zlib.crc32(name.encode()) % len(values)
    return [values[(first + n) % len(values)] for n in range(min(OF_EACH, len(values)))]


def wrong_words():
    """(program, flag, value) for every option that is no switch."""
    for program, field in OPTIONS:
        if field.is_mapping:
            # Slurm knows which parameters there are.
            values = PAIRS[:-1] if field.name == "sbatch" else PAIRS
        elif field.words():
            values = ["nonsense", "", "NONE"]
        else:
            values = {int: WHOLE, float: NUMBERS, Path: PATHS}.get(field.kind, [])
        for value in some_of(values, field.name) if values else ():
            yield program, field.flag, value


def wrong_yaml():
    """(program, name, value) of types that a YAML file may hold."""
    for program, field in OPTIONS:
        kind, words = field.kind, field.words()
        for value in some_of(IN_YAML, field.name):
            if field.is_mapping and isinstance(value, dict):
                continue
            if kind is bool and value is True:
                continue
            if kind is str and not words and (isinstance(value, str | float) or field.several):
                continue
            if kind is Path and value == "2020-01-01":
                continue
            if value is True and words and (field.several or {"on", "off"} & set(words)):
                continue  # what YAML's readers often make of on
            yield program, field.name, value


@pytest.mark.parametrize(
    ("program", "flag", "value"), wrong_words(),
    ids=lambda value: value if len(str(value)) < 30 else f"{str(value)[:8]}...",
)  # fmt: skip
def test_a_wrong_word_on_the_command_line(program, flag, value, shared_world, capsys):
    words = [*PROGRAMS[program][1](shared_world), f"{flag}={value}"]
    if program == "benchmark":
        words.append("--dry-run")
    refused(words, "", shared_world, capsys)


@pytest.mark.parametrize(("program", "name", "value"), wrong_yaml(), ids=str)
def test_a_wrong_type_in_yaml(program, name, value, shared_world, tmp_path, capsys):
    words = PROGRAMS[program][1](shared_world)
    flag = f"--{name}"
    while flag in words or f"--{name.replace('_', '-')}" in words:
        at = words.index(flag)
        del words[at : at + 2]
    (tmp_path / "own.yml").write_text(yaml.safe_dump({name: value}))
    words += ["--config", str(tmp_path / "own.yml")]
    if program == "benchmark":
        words.append("--dry-run")
    refused(words, "own.yml", shared_world, capsys)


def refused(words, says, world, capsys):
    """As `check` does, in a world that is not looked through every time."""
    code, _, err = call(words, capsys)
    assert code == 2, err
    assert_clear(err, says)
    assert not (world / "new").exists()
