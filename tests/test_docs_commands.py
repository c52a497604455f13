"""The commands of every document: each block runs as it stands there, or says what it needs.

It says so by a comment before it, which no page shows: `<!-- needs: real data -->`, with the tests
that run it elsewhere, if there are: `<!-- needs: minutes; tests/test_sample_run.py -->`. Whether a
block runs or not, its commands are judged by click, down to each value.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import click
import pytest
import timm
import torch
import yaml
from timm.models._hub import save_for_hf

from common.options import fields_of
from pipeline.plan.steps import PARTS
from tests.pipeline.finished_run import write_run
from tests.pipeline.whole_run import write_inputs
from tests.processes import ended, start

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT)) for folder in (ROOT, *ROOT.glob("[a-z]*/")) for path in folder.glob("*.md")
)
NEEDS = ("a run", "real data", "minutes", "a GPU", "a cluster", "a download", "a choice")
CLIS = {"benchmark": "main", "mae.cli": "cli", "segments.cli": "masks", "segmenter.cli": "cli"}
CALL = re.compile(
    r"(?:\./run_benchmark\.sh|\bbenchmark\.py|-m (?P<room>mae|segments|segmenter|perf\.\w+))"
    r"(?P<words>(?: .*)?)$"
)
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\S*)\n(?P<text>.*?)^```$", re.M | re.S)
# What makes a command small: nothing that the page says is changed.
SIZES = "--image-size 64 --crop-size 64 --window-size 64 --window-stride 48"
SMALLER = {
    "run": "--dry-run",
    "score": "--dry-run --num-gpus 0",
    "pretrain": "--model vit_tiny --image-size 64 --decoder-depth 1 --effective-batch-size 4 "
    "--device cpu --workers 0",
    "probe": f"--workers 0 --device cpu {SIZES}",
    "draw-features": "--device cpu --model vit_tiny",
    "generate": "--processes 1",
    "inspect": "--processes 1",
}
SAYS = {  # a part of a command: of what it has to say
    "methods --plugin stripes.py": "stripes",
    "patches,stripes": "stripes",
    "prepare check": "all sound",
    "power --effect": "seeds",
}
OF_OTHERS = (
    "--nnodes --node-rank --master-addr --master-port --nproc-per-node --standalone --shutdown-timeout "
    "--logdir --gpus --shm-size --nv --convert-to-rle --help"
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. mark: the comment before it, or empty."""

    page: str
    language: str
    text: str
    mark: str

    @property
    def lines(self) -> list[str]:
        """Its commands, without comments."""
        joined = self.text.replace("\\\n", " ").splitlines()
        return [shlex.join(words) for line in joined if (words := shlex.split(line, comments=True))]


def blocks(page: str) -> list[Block]:
    return [
        Block(page, found["language"], found["text"], found["mark"] or "")
        for found in BLOCK.finditer((ROOT / page).read_text())
    ]


def inline(page: str) -> list[str]:
    """What stands in the text between backticks."""
    spans = re.findall(r"`([^`]+)`", BLOCK.sub("", (ROOT / page).read_text()))
    return [" ".join(span.split()) for span in spans]


def in_a_process(work: Callable[[], object], folder: Path) -> tuple[int | None, str]:
    """Its exit code, and what it printed."""
    output = folder.with_name("output.txt")
    output.unlink(missing_ok=True)
    (code,) = ended(start(partial(_work, work, folder), 1, output))
    return code, output.read_text()


def _work(work: Callable[[], object], folder: Path, rank: int) -> int:
    os.chdir(folder)
    work()
    return 0


def command_line(room: str | None) -> tuple[click.Command, str]:
    module = f"{room}.cli" if room else "benchmark"
    return getattr(import_module(module), CLIS[module]), f"python -m {room}" if room else "benchmark.py"


def _call(room: str | None, words: list[str]) -> None:
    from common.console import run_program

    run_program(*command_line(room), words)


def _execute(code: str) -> None:
    exec(compile(code, "the page", "exec"), {"__name__": "page"})


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that pages talk about, by the names that they use."""
    folder = tmp_path_factory.mktemp("things")
    config = write_inputs(folder)
    (folder / "in1k").rename(folder / "IN1K")
    (folder / "segmentation").rename(folder / "data")
    for kind, suffix in (("train", "JPEG"), ("masks", "json")):
        old = sorted((folder / "IN1K" / kind).glob(f"*/*_0005.{suffix}"))[0]
        (folder / f"IN1K/{kind}/n01440764").mkdir()
        old.rename(folder / f"IN1K/{kind}/n01440764/n01440764_10026.{suffix}")
    photos = sorted((folder / "data/images/validation").iterdir())
    (folder / "photos").mkdir()
    for number, photo in enumerate(photos):
        shutil.copy(photo, folder / f"photos/{number:03d}.jpg")
    shutil.copy(photos[0], folder / "photo.jpg")
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64)
    torch.save({"state_dict": vit.state_dict()}, folder / "encoder.pth")
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 56}
    dinov2 = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **small)
    save_for_hf(dinov2, str(folder / "dinov2_small"), model_args=small, safe_serialization=True)
    mine = {
        **yaml.safe_load(config.read_text()), "in1k_dir": "IN1K", "eval_dataset": "data/dataset.yml",
        "mask_method": ["patches", "segment_patches"], "output_dir": "out", "pretrain_epochs": 2,
    }  # fmt: skip
    (folder / "mine.yml").write_text(yaml.safe_dump(mine))
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "docs").mkdir()
    (folder / "docs/study.yml").symlink_to(ROOT / "docs/study.yml")
    for name in ("DIR", "A", "B", "PILOT"):
        write_run(folder / name, methods=("patches", "four_channels"), seeds=(0, 1), probes=True)
    for block in (block for page in PAGES for block in blocks(page)):
        if name := file_name(block):
            (folder / name).write_text(block.text)
    pretrain = f"pretrain --in1k-dir IN1K --output-dir OUT --mask-method four_channels {SMALLER['pretrain']}"
    made = [("mae", f"{pretrain} --stop-after 0"), ("segments", "pack IN1K/masks")]
    for room, line in (*made[::-1], (None, "bundle A"), (None, "bundle B")):
        code, said = in_a_process(partial(_call, room, line.split()), folder)
        assert code == 0, said
    (folder / "OUT/checkpoint-0.pth").rename(folder / "OUT/checkpoint-50.pth")
    return folder


def file_name(block: Block) -> str | None:
    """Of a file that the block is: its first line."""
    found = re.match(r"# (\w+\.py)\n", block.text)
    return found[1] if found and block.language == "python" else None


@pytest.mark.parametrize("page", PAGES)
def test_a_block_says_what_it_is(page: str) -> None:
    assert (ROOT / page).read_text().count("```") == 2 * len(blocks(page))
    for block in blocks(page):
        assert re.fullmatch(r"sh|python|yaml|text|\{[\w-]+\}", block.language), (block.language, block.text)
        if block.mark:
            mark = re.fullmatch(r"needs: ([\w ]+?)(?:; (tests/\S+\.py))?", block.mark)
            assert mark and mark[1] in NEEDS, f"{block.mark}; allowed: needs: {', '.join(NEEDS)}"
            assert mark[2] is None or (ROOT / mark[2]).exists(), mark[2]


def to_run(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language in ("sh", "python") and not block.mark]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if to_run(page)])
def test_the_blocks_of_a_page_run(page: str, things: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    shutil.copytree(things, folder, symlinks=True)
    for block in to_run(page):
        if block.language == "python":
            code, said = in_a_process(partial(_execute, block.text), folder)
            assert code == 0, said
            assert all((folder / out).exists() for out in re.findall(r'out=Path\("(.*?)"\)', block.text))
            continue
        for line in block.lines:
            call = CALL.search(line)
            assert call and call["words"], f"{page}: {line}: cannot run here; mark the block by what it needs"
            words = shlex.split(call["words"])
            words += SMALLER.get("run" if words[0].startswith("-") else words[0], "").split()
            code, said = in_a_process(partial(_call, call["room"], words), folder)
            assert code == 0, f"{page}: {line}\n{said}"
            assert all(text in said for part, text in SAYS.items() if part in line), said
            for flag, value in pairwise(words):
                if flag in ("--out", "--output-dir", "--paper"):
                    made = any((folder / f"{value}{suffix}").exists() for suffix in ("", ".png"))
                    assert made == ("--dry-run" not in words), (line, value)


def calls() -> Iterator[tuple[str, str, bool]]:
    """(page, command, whether something may be missing) of blocks and of the text."""
    for page in PAGES:
        for block in blocks(page):
            for line in block.lines if block.language == "sh" else ():
                yield page, line, "..." in line
        yield from ((page, span, True) for span in inline(page))


def test_every_command_is_one_that_click_takes(things: Path) -> None:
    code, said = in_a_process(partial(_judge, list(calls())), things)
    assert code == 0, said
    assert int(said.split()[-1]) > 80, said  # judged


def _judge(lines: list[tuple[str, str, bool]]) -> None:
    """Ends with 1 where one is wrong, and prints it."""
    click.Command.invoke = lambda self, ctx: None  # judged, not run
    wrong, judged = [], 0
    for page, line, may_lack in lines:
        call = CALL.search(line)
        if not call or not call["words"]:
            continue
        judged += 1
        # Of a synopsis all that may be chosen; of what is left out nothing.
        words = [word.strip("[]") for word in shlex.split(call["words"]) if word not in ("|", "...")]
        room = "segments" if call["room"] == "mae" and words[0] == "masks" else call["room"]
        words = words[1:] if room != call["room"] else words
        if not words:
            continue
        try:
            if room and room.startswith("perf."):
                _judge_argparse(room, words)
            else:
                cli, name = command_line(room)
                cli.main(words, prog_name=name, standalone_mode=False)
        except (click.ClickException, ValueError) as error:
            lacks = isinstance(error, click.MissingParameter) or "is missing" in str(error)
            if not (may_lack and (lacks or "Missing command" in str(error))):
                wrong.append(f"{page}: {line}\n    {getattr(error, 'message', error)}")
        except click.exceptions.Exit:
            pass
    sys.stdout.write("\n".join([*wrong, str(judged)]))
    sys.exit(bool(wrong))


def _judge_argparse(module: str, words: list[str]) -> None:
    parse = argparse.ArgumentParser.parse_args

    def only_parse(self: argparse.ArgumentParser, *given: object) -> None:
        parse(self, words)
        raise SystemExit(0)

    argparse.ArgumentParser.parse_args = only_parse
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise ValueError(f"{module} does not take {words}") from None
    finally:
        argparse.ArgumentParser.parse_args = parse


def test_every_flag_in_the_text_is_one_of_a_command() -> None:
    known = set(OF_OTHERS.split())
    for room in (None, "mae", "segments", "segmenter"):
        todo = [command_line(room)[0]]
        while todo:
            command = todo.pop()
            todo += command.commands.values() if isinstance(command, click.Group) else ()
            for param in command.params:
                known |= {flag.replace("_", "-") for flag in (*param.opts, *param.secondary_opts)}
    for path in (ROOT / "perf").glob("*.py"):
        known |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', path.read_text()))
    for page in PAGES:
        for span in inline(page):
            for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", span):
                assert flag.replace("_", "-") in known, (page, span)
        for part, name in re.findall(
            r"--(pretrain|finetune|probe)[ =]([a-z_-]+)=", (ROOT / page).read_text()
        ):
            assert name.replace("-", "_") in fields_of(*PARTS[part].values()), (page, part, name)


@pytest.mark.slow
def test_the_encoders_of_the_page_are_scored(things: Path, tmp_path: Path) -> None:
    line = to_run("docs/score.md")[0].lines[0]
    words = [str(ROOT / "benchmark.py"), *shlex.split(line)[2:], "--num-gpus", "0", "--model", "vit_tiny"]
    words += re.sub(r"--(\S+) (\d+)", r"--probe \1=\2", SIZES).split()
    shutil.copytree(things, folder := tmp_path / "here", symlinks=True)
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "scores/report.html").exists()
    made = {path.name for path in (folder / "scores/probe_output").iterdir()}
    assert made == {"mine_0", "dinov2_0", "scratch_0"}
    assert all(name in done.stdout for name in ("by the frozen linear probe", "mine", "GFLOPs an image"))
