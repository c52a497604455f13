"""A run as one file: what is in it, that comparing it is comparing the run, and what is refused."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pipeline.plan.layout import Layout
from pipeline.report.answer import answers
from pipeline.report.bundle import opened, write_bundle
from pipeline.report.comparisons import Comparison
from pipeline.report.page import write_report
from pipeline.report.scores import make_lines
from tests.pipeline.finished_run import write_run
from tests.pipeline.programs import run_benchmark


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Layout]:
    """Runs of two labs on the same images, one of which trained longer; with weights."""
    folder, methods = tmp_path_factory.mktemp("labs"), ("patches", "segments")
    made: Any = {"seeds": (0, 1, 2), "chance": 0.3, "probes": True, "sources": ("own", "blob")}
    runs = [write_run(folder / name, methods, epochs=(end,), **made) for name, end in (("a", 5), ("b", 7))]
    for paths in runs:
        (paths.pretrain_dir("patches") / "checkpoint-5.pth").write_bytes(b"weights" * 10**5)
        write_bundle(paths, folder / f"{paths.root.name}.bundle")
    return runs


def comparisons(places: list[Path]) -> list[Comparison]:
    with opened(places) as layouts:
        return [c for one in answers(make_lines(layouts)) for c in one.comparisons]


def test_two_bundles_are_compared_with_the_same_intervals_as_their_directories(two: list[Layout]) -> None:
    folders = comparisons([paths.root for paths in two])
    bundles = comparisons([paths.root.with_suffix(".bundle") for paths in two])
    assert len(folders) == len(bundles) > 10
    assert any(c.kind == "directory" and c.shown and c.shown.of_images for c in bundles)
    for one, other in zip(folders, bundles, strict=True):
        assert other.first.label == one.first.label.replace("(a)", "(a.bundle)").replace("(b)", "(b.bundle)")
        assert (other.by_seed, other.difference, other.p_value) == (one.by_seed, one.difference, one.p_value)


def test_a_bundle_has_neither_weights_nor_pictures_and_is_the_same_every_time(two: list[Layout]) -> None:
    bundle = two[0].root.with_suffix(".bundle")
    again = bundle.with_name("again.bundle")
    write_bundle(two[0], again)
    assert again.read_bytes() == bundle.read_bytes()
    with zipfile.ZipFile(bundle) as archive:
        names, manifest = archive.namelist(), json.loads(archive.read("segmae-bundle.json"))
    assert {Path(name).suffix for name in names} == {".json", ".yml", ".txt", ".npz"}
    assert list(manifest["weights"]) == ["pretrain_output/patches/checkpoint-5.pth"]
    assert bundle.stat().st_size < 200_000


def test_a_report_of_bundles_leaves_them_and_writes_one_page(two: list[Layout], tmp_path: Path) -> None:
    bundles = [paths.root.with_suffix(".bundle") for paths in two]
    before = [bundle.read_bytes() for bundle in bundles]
    write_report(bundles, tmp_path / "both.html")
    assert "patches (b.bundle)" in (tmp_path / "both.html").read_text()
    assert [bundle.read_bytes() for bundle in bundles] == before
    assert not two[0].results_csv.exists()


def test_what_is_no_whole_bundle_is_refused_by_name(two: list[Layout], tmp_path: Path) -> None:
    whole, page = two[0].root.with_suffix(".bundle").read_bytes(), tmp_path / "page.html"
    place = whole.index(b"run.yml") + 60  # in the compressed text
    damaged = {
        "cut": whole[:-500], "changed": whole[:place] + b"\0" * 40 + whole[place + 40 :],
        "text": b"no bundle", "zip": b"PK\x03\x04" + b"\0" * 200,
    }  # fmt: skip
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is (damaged|neither)"):
            write_report([tmp_path / name], page)
    with zipfile.ZipFile(tmp_path / "leads-out", "w") as archive:
        files = {"../../out": "0" * 64}
        manifest = {"format_version": 1, "files": files, "weights": {}}
        archive.writestr("segmae-bundle.json", json.dumps(manifest))
        archive.writestr("../../out", "x")
    with pytest.raises(ValueError, match="no name of a file below"):
        write_report([tmp_path / "leads-out"], page)
    assert not page.exists()


def test_the_bundle_command_replaces_bundles_only(two: list[Layout], tmp_path: Path) -> None:
    out = tmp_path / "a.bundle"
    done = run_benchmark("bundle", two[0].root, "--out", out)
    assert (done.returncode, done.stdout.split(",")[0]) == (0, str(out))
    out.write_text("mine")
    refused = run_benchmark("bundle", two[0].root, "--out", out)
    assert refused.returncode == 2
    assert "this command did not make it" in refused.stderr
    assert out.read_text() == "mine"
