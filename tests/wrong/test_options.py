"""Every option of every command, with values of the wrong kind, on the command line and in YAML."""

import zlib
from pathlib import Path

import pytest
import yaml

from common.options import fields_of
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


def groups_of_command(program):
    if program == "mae":
        from mae.config import GROUPS
    elif program == "segmenter":
        from segmenter.config import GROUPS
    elif program == "probe":
        from segmenter.config import PROBE_GROUPS as GROUPS
    else:
        from pipeline.plan.settings import GROUPS
    return GROUPS


OF_EACH = 3


def some_of(values, name):
    """So many of them, others for each option: all values are met, and all options."""
    first = zlib.crc32(name.encode()) % len(values)
    return [values[(first + n) % len(values)] for n in range(min(OF_EACH, len(values)))]


WORDS = {
    "mae": pretrain_words, "segmenter": train_words, "probe": probe_words,
    "benchmark": benchmark_words,
}  # fmt: skip


def wrong_words():
    """(program, flag, value) for every option that is no switch."""
    for program in WORDS:
        for group in groups_of_command(program).values():
            for field in fields_of(group).values():
                kind, words = field.kind, field.words()
                if field.is_mapping:
                    values = ["", "x", "=1", "a=[1", "a=!!python/object:os.system 1", "nosuch=1"]
                elif words:
                    values = ["nonsense", "", "NONE"]
                elif kind is int:
                    values = WHOLE
                elif kind is float:
                    values = NUMBERS
                elif kind is Path:
                    values = PATHS
                else:
                    continue
                if field.name == "sbatch":
                    values = values[:-1]  # Slurm knows what there is
                for value in some_of(values, field.name):
                    yield program, field.flag, value


def wrong_yaml():
    """(program, name, value) of types that a YAML file may hold."""
    for program in WORDS:
        for group in groups_of_command(program).values():
            for field in fields_of(group).values():
                kind, words = field.kind, field.words()
                for value in some_of(IN_YAML, field.name):
                    several = field.several
                    is_text = kind is str and not words
                    if field.is_mapping and isinstance(value, dict):
                        continue
                    if kind is bool and value is True:
                        continue
                    if is_text and (isinstance(value, str | float) or several):
                        continue
                    if kind is Path and value == "2020-01-01":
                        continue
                    if {"on", "off"} & set(words) and value is True:
                        continue  # what YAML's readers often make of on
                    if words and several and value is True:
                        continue
                    yield program, field.name, value


@pytest.mark.parametrize(
    ("program", "flag", "value"), wrong_words(),
    ids=lambda value: value if len(str(value)) < 30 else f"{str(value)[:8]}...",
)  # fmt: skip
def test_a_wrong_word_on_the_command_line(program, flag, value, shared_world, capsys):
    words = [*WORDS[program](shared_world), f"{flag}={value}"]
    if program == "benchmark":
        words.append("--dry-run")
    refused(words, "", shared_world, capsys)


@pytest.mark.parametrize(("program", "name", "value"), wrong_yaml(), ids=str)
def test_a_wrong_type_in_yaml(program, name, value, shared_world, tmp_path, capsys):
    words = WORDS[program](shared_world)
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
