"""Any input at all gives a value or a ValueError that names its source; never another exception."""

import contextlib
import json
import sqlite3

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from common.formats import (
    ProbeResult,
    Result,
    StepProgress,
    parse_value,
    read_json,
    read_log,
    read_yaml,
)
from common.images import decode_rgb, jpeg_header
from common.options import Layer, fields_of, make, merge
from mae.config import GROUPS as PRETRAIN_GROUPS
from pipeline.plan.layout import RunId, parse_eval_name
from pipeline.plan.records import Record
from pipeline.plan.settings import GROUPS as PLAN_GROUPS
from segmenter.config import GROUPS as TRAIN_GROUPS
from segmenter.config import PROBE_GROUPS
from segmenter.dataset import read_description
from segments.forms import open_folder, read_empty_list
from segments.segment import segment_from_rle
from segments.store import PackedStore

ANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from([10**400, -(10**30), "~nosuchuser/x", "\0", "x" * 300, "1e400", "٣", "NaN"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
GROUPS = [
    group
    for groups in (PRETRAIN_GROUPS, TRAIN_GROUPS, PROBE_GROUPS, PLAN_GROUPS)
    for group in groups.values()
]
OPTIONS = [(group, name) for group in GROUPS for name in fields_of(group)]


def value_or_named(work, *names):
    """What `work` gives, or None if it raises a ValueError that names one of these."""
    try:
        return work()
    except ValueError as error:
        text = str(error)
        assert any(str(name) in text for name in names), text
        assert len(text) < 2000
        return None


@ANY
@given(option=st.sampled_from(OPTIONS), value=VALUES)
def test_options(option, value):
    group, name = option
    layer = Layer({name: value}, "own.yml")
    found = value_or_named(lambda: merge([group], [layer]), "own.yml")
    if found and name in found and all(f.default is not None for f in fields_of(group).values()):
        value_or_named(lambda: make(group, found), "--", "the ")


@ANY
@given(text=st.text(max_size=200) | st.binary(max_size=200).map(lambda b: b.decode("latin-1")))
def test_yaml_values_and_files(text, tmp_path):
    value_or_named(lambda: parse_value(text, "--pretrain x"), "--pretrain x")
    (tmp_path / "a.yml").write_text(text, encoding="utf-8", errors="surrogatepass")
    found = value_or_named(lambda: read_yaml(tmp_path / "a.yml"), "a.yml")
    assert found is None or isinstance(found, dict)


@ANY
@given(content=st.binary(max_size=300))
def test_yaml_files_of_any_bytes(content, tmp_path):
    (tmp_path / "a.yml").write_bytes(content)
    value_or_named(lambda: read_yaml(tmp_path / "a.yml"), "a.yml")


RUNS = st.one_of(st.text(max_size=40), st.lists(st.integers(-5, 5000), max_size=12), st.integers(), st.none())


@ANY
@given(size=st.one_of(st.lists(st.integers(-3, 60), min_size=2, max_size=2), VALUES), counts=RUNS)
def test_run_lengths(size, counts):
    try:
        segment = segment_from_rle({"size": size, "counts": counts})
    except ValueError:
        return
    inside = segment.decode()
    assert inside.shape == tuple(size)
    assert 100 * inside.mean() == pytest.approx(segment.coverage_percent)
    rle = {"size": list(size), "counts": segment.counts}
    assert np.array_equal(inside, coco.decode(rle))


@ANY
@given(content=st.one_of(VALUES.map(lambda v: json.dumps(v).encode()), st.binary(max_size=200)))
def test_json_of_segments(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    folder = open_folder(tmp_path)
    folder.images()
    value_or_named(lambda: folder.segments("a", lambda text: None), "a.json")


@ANY
@given(content=st.binary(max_size=200) | st.text("0123456789. ,\n/x-", max_size=80).map(str.encode))
@pytest.mark.parametrize("table", ["table.txt", "metadata.csv"])
def test_tables_of_segments(table, content, tmp_path):
    (tmp_path / "a").mkdir(exist_ok=True)
    (tmp_path / "a" / table).write_bytes(content)
    folder = open_folder(tmp_path)
    folder.images()
    value_or_named(lambda: folder.segments("a", lambda text: None), str(tmp_path))


@ANY
@given(content=st.binary(max_size=200))
def test_lists_of_images_without_segments(content, tmp_path):
    (tmp_path / "emptyfiles.txt").write_bytes(content)
    assert isinstance(read_empty_list(tmp_path / "emptyfiles.txt"), set)


@ANY
@given(changes=st.dictionaries(
    st.sampled_from(["name", "images", "annotations", "splits", "image_suffix", "classes",
                     "annotation_suffix", "palette", "reduce_zero_label", "ignore_index"]),
    VALUES, max_size=4,
))  # fmt: skip
def test_dataset_files(changes, tmp_path):
    whole = {"images": {"train": "x"}, "annotations": {"train": "x"}, "classes": ["a", "b"]}
    (tmp_path / "d.yml").write_text(json.dumps({**whole, **changes}, default=str))
    value_or_named(lambda: read_description(tmp_path / "d.yml"), "d.yml")


@ANY
@given(content=st.one_of(VALUES.map(lambda v: json.dumps(v).encode()), st.binary(max_size=200)))
def test_what_runs_leave(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content + b"\n")
    for shape in (Result, ProbeResult, StepProgress, Record):
        value_or_named(lambda shape=shape: read_json(tmp_path / "a.json", shape), "a.json")
    value_or_named(lambda: read_log(tmp_path / "a.json"), "a.json")


@ANY
@given(
    table=st.sampled_from(["images", "segments", "meta"]),
    column=st.integers(0, 4),
    value=st.one_of(st.none(), st.integers(-(2**62), 2**62), st.floats(), st.binary(max_size=99),
                    st.text(max_size=20)),
)  # fmt: skip
def test_values_of_stores(table, column, value, shared_world, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "masks.sqlite"
    with sqlite3.connect(shared_world / "in1k/masks/masks.sqlite") as source:
        target = sqlite3.connect(path)
        for name in ("images", "segments", "meta"):
            rows = source.execute(f"SELECT * FROM {name}").fetchall()
            width = len(rows[0])
            target.execute(f"CREATE TABLE {name} ({columns_of(source, name)})")
            target.executemany(f"INSERT INTO {name} VALUES ({','.join('?' * width)})", rows)
        names = columns_of(target, table).split(", ")
        target.execute(f"UPDATE {table} SET {names[column % len(names)]} = ?", (value,))
        target.commit()
        target.close()

    def look():
        store = PackedStore(path)
        for key in sorted(store.images())[:3]:
            for segment in [store.nearest(key, 15), *store.segments(key)]:
                if segment is not None:
                    segment.decode()

    value_or_named(look, path, "its runs", "its counts")


def columns_of(connection, table):
    return ", ".join(row[1] for row in connection.execute(f"PRAGMA table_info({table})"))


@ANY
@given(content=st.binary(max_size=400), start=st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n"]))
def test_pictures(content, start):
    with contextlib.suppress(ValueError):
        assert decode_rgb(start + content + b"\xff\xd9").shape[2] == 3
    jpeg_header(start + content)


@ANY
@given(name=st.text(max_size=30))
def test_names_of_runs(name):
    for parse in (RunId.parse, parse_eval_name):
        value_or_named(lambda parse=parse: parse(name), repr(name), "run name", "evaluation")
