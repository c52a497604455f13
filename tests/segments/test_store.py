"""The packed store: equal to its source, resumable, refused when damaged."""

import json
import os
import pickle
import resource
import shutil
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from common.files import beside
from segments import store
from segments.forms import open_any_form, open_segments
from segments.pack import merge, pack, unpack
from segments.segment import nearest
from segments.store import PackedStore
from tests.processes import until

RATIOS = [0, 2, 5, 15, 40, 100]
WHOLE = {"overwrite": False, "allow_damaged": False, "processes": 1}


def blocks(paths):
    """Bytes in 4 KB blocks."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in paths)


def test_a_store_agrees_with_its_source_pixel_by_pixel(sample, packed_table):
    source, store = open_any_form(sample / "masks"), open_segments(packed_table)
    assert store.images() == source.images()
    assert store.listed_empty() == source.listed_empty()
    for key in sorted(source.images()):
        segments = source.segments(key)
        assert store.segments(key) == segments
        for ratio in RATIOS:
            assert store.nearest(key, ratio) == nearest(segments, ratio)
        assert (store.nearest(key, 15).decode() == nearest(segments, 15).decode()).all()
    assert store.nearest("n01735189/n01735189_1185", 15) is None


def test_rle_json_packs_to_the_same_segments_on_many_processes(sample, tmp_path):
    summary = pack(sample / "masks-amg-rle", tmp_path / "a.sqlite", **{**WHOLE, "processes": 2})
    assert (summary.images, summary.without, summary.left_out) == (93, 3, 0)
    source, store = open_any_form(sample / "masks-amg-rle"), open_segments(tmp_path / "a.sqlite")
    assert store.images() == source.images()
    assert store.listed_empty() == source.listed_empty()
    for key in source.images():
        assert store.segments(key) == source.segments(key)


def test_a_store_takes_a_fifth_of_the_bytes_of_pngs(sample, packed_table):
    files = [path for path in (sample / "masks").rglob("*") if path.is_file()]
    assert blocks([packed_table]) <= blocks(files) / 5
    assert [path.name for path in packed_table.parent.iterdir()] == [packed_table.name]


def test_the_nearest_segment_is_one_indexed_query_that_reads_one_segment(packed_table):
    from segments.store import NEAREST

    with sqlite3.connect(packed_table) as connection:
        key = connection.execute("SELECT key FROM images WHERE segments > 5").fetchone()[0]
        plan = connection.execute(f"EXPLAIN QUERY PLAN {NEAREST}", (key, 15)).fetchall()
        assert len(connection.execute(NEAREST, (key, 15)).fetchall()) == 1
    connection.close()
    steps = [row[3] for row in plan]
    assert not [step for step in steps if step.startswith("SCAN") and "subquery" not in step]
    assert sum("USING COVERING INDEX segments_by_coverage" in step for step in steps) == 2


def test_equal_distances_choose_the_smaller(tmp_path, read_json):
    annotations = [
        {"segmentation": {"size": [10, 10], "counts": [100 - area, area]}, "area": area}
        for area in (30, 20, 10)
    ]
    (tmp_path / "image.json").write_text(json.dumps(annotations))
    pack(tmp_path, None, **WHOLE)
    segments = open_segments(tmp_path).segments("image")
    for wanted, chosen in [(15, 10), (25, 20), (25.1, 30), (0, 10), (100, 30), (20, 20)]:
        assert open_segments(tmp_path).nearest("image", wanted).coverage_percent == chosen
        assert nearest(segments, wanted).coverage_percent == chosen
    assert nearest([], 15) is None


def kill_after(images, folder, out, seconds_per_commit):
    store.SECONDS_PER_COMMIT = seconds_per_commit
    add, added = store._add, []

    def add_or_die(connection, image):
        added.append(image)
        if len(added) > images:
            connection.execute("PRAGMA cache_spill = 1")
            os.kill(os.getpid(), signal.SIGKILL)
        add(connection, image)

    store._add = add_or_die
    pack(folder, out, **WHOLE)


@pytest.mark.parametrize(("images", "commit"), [(0, 0), (2, 0), (5, 0), (5, 1e9)])
def test_a_killed_pack_goes_on_to_the_same_file(json_folder, tmp_path, in_child, images, commit):
    whole, killed = tmp_path / "whole.sqlite", tmp_path / "killed.sqlite"
    pack(json_folder, whole, **WHOLE)
    assert in_child(kill_after, images, json_folder, killed, commit) == -signal.SIGKILL
    assert not killed.exists()
    with pytest.raises(ValueError, match="not"):
        open_segments(beside(killed))
    summary = pack(json_folder, killed, **WHOLE)
    assert summary.already_there == (0 if commit else images)
    with sqlite3.connect(whole) as one, sqlite3.connect(killed) as other:
        assert list(one.iterdump()) == list(other.iterdump())
    one.close()
    other.close()
    assert not beside(killed).exists()


def stop_soon(folder, out):
    add = store._add

    def add_and_stop(*arguments):
        add(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    store._add = add_and_stop
    from mae.cli import main

    main(["masks", "pack", str(folder), "--out", str(out), "--processes", "1"])


def test_a_terminated_pack_saves_and_says_so(json_folder, tmp_path, in_child):
    out = tmp_path / "masks.sqlite"
    assert in_child(stop_soon, json_folder, out) == 75
    assert pack(json_folder, out, **WHOLE).already_there == 1


def test_two_packs_of_one_store_do_not_mix(json_folder, tmp_path):
    out = tmp_path / "masks.sqlite"
    with closing(sqlite3.connect(beside(out))) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ValueError, match="another process"):
            pack(json_folder, out, **WHOLE)


def test_a_finished_store_is_replaced_only_when_told(json_folder, masks_command):
    assert masks_command("pack", json_folder)[0] == 0
    before = (json_folder / "masks.sqlite").read_bytes()
    code, said = masks_command("pack", json_folder)
    assert code == 2
    assert "--overwrite" in said
    assert (json_folder / "masks.sqlite").read_bytes() == before
    assert masks_command("pack", json_folder, "--overwrite")[0] == 0
    assert open_segments(json_folder).name == "packed store"


def test_damaged_images_are_named_and_left_out_when_allowed(json_folder, tmp_path, masks_command):
    bad = sorted(json_folder.rglob("*.json"))[1]
    bad.write_text(bad.read_text()[:-50])
    out = tmp_path / "masks.sqlite"
    code, said = masks_command("pack", json_folder, "--out", out)
    assert code == 1
    assert str(bad) in said
    assert not out.exists()
    code, said = masks_command("pack", json_folder, "--out", out, "--allow_damaged")
    assert code == 0
    assert "1 damaged and left out" in said
    key = bad.relative_to(json_folder).with_suffix("").as_posix()
    store = PackedStore(out)
    assert key not in store.images() | store.listed_empty()
    assert str(bad) in store.failures()[key]


def test_unpacked_segments_pack_to_the_same_store(json_folder, tmp_path, masks_command, dump):
    pack(json_folder, tmp_path / "one.sqlite", **WHOLE)
    assert masks_command("unpack", tmp_path / "one.sqlite", tmp_path / "json")[0] == 0
    pack(tmp_path / "json", tmp_path / "two.sqlite", **WHOLE)
    assert dump(tmp_path / "one.sqlite") == dump(tmp_path / "two.sqlite")
    assert unpack(tmp_path / "one.sqlite", tmp_path / "json", processes=1).already_there == 6


def test_a_key_of_a_store_that_leads_out_of_the_folder_is_not_unpacked(packed_table, tmp_path):
    store = tmp_path / "foreign.sqlite"
    shutil.copyfile(packed_table, store)
    with sqlite3.connect(store) as connection:
        connection.execute("UPDATE images SET key = '../../outside' WHERE id = 3")
    connection.close()
    with pytest.raises(ValueError, match=r"'\.\./\.\./outside\.json' is no name of a file below"):
        unpack(store, tmp_path / "a/b", processes=1)
    assert not (tmp_path / "a").exists()


def test_a_folder_that_cannot_be_written_to_needs_another_place(json_folder, tmp_path):
    beside(json_folder / "masks.sqlite").mkdir()  # a permission would not stop root
    with pytest.raises(ValueError, match="name another place"):
        pack(json_folder, None, **WHOLE)
    pack(json_folder, tmp_path / "masks.sqlite", **WHOLE)


def test_merged_stores_hold_what_one_store_would(json_folder, tmp_path, dump):
    files = sorted(json_folder.rglob("*.json"))
    for part in (0, 1):
        for path in files[part::2]:
            to = tmp_path / f"part{part}" / path.relative_to(json_folder)
            to.parent.mkdir(parents=True)
            shutil.copyfile(path, to)
        pack(tmp_path / f"part{part}", tmp_path / f"{part}.sqlite", **WHOLE)
    pack(json_folder, tmp_path / "whole.sqlite", **WHOLE)
    shards = [tmp_path / "1.sqlite", tmp_path / "0.sqlite"]
    merge(shards, tmp_path / "merged.sqlite", overwrite=False)
    assert dump(tmp_path / "merged.sqlite") == dump(tmp_path / "whole.sqlite")


def test_stores_that_disagree_are_not_merged(json_folder, tmp_path, read_json):
    pack(json_folder, tmp_path / "one.sqlite", **WHOLE)
    path = sorted(json_folder.rglob("*.json"))[0]
    path.write_text(json.dumps(read_json(path)[1:]))
    pack(json_folder, tmp_path / "two.sqlite", **WHOLE)
    with pytest.raises(ValueError, match="disagree about"):
        merge([tmp_path / "one.sqlite", tmp_path / "two.sqlite"], tmp_path / "m", overwrite=False)


def changed(*statements):
    def damage(path):
        with closing(sqlite3.connect(path)) as connection, connection:
            for statement in statements:
                connection.execute(statement)

    return damage


OTHER = ("CREATE TABLE other (a)", *(f"DROP TABLE {name}" for name in ("images", "meta")))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (changed("UPDATE meta SET value = '2' WHERE name = 'format_version'"), "newer than this"),
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "cut short"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is cut short: it was"),
        (lambda path: path.write_bytes(b"PNG and not a store" * 100), "not a packed store"),
        (changed(*OTHER), "not a packed store"),
        (changed("UPDATE meta SET value = '0' WHERE name = 'complete'"), "not finished"),
        (lambda path: path.write_bytes(b""), "not a packed store"),
    ],
)
def test_a_damaged_store_is_refused_when_opened(packed_table, tmp_path, damage, reason):
    path = tmp_path / "masks.sqlite"
    shutil.copyfile(packed_table, path)
    damage(path)
    with pytest.raises(ValueError, match=reason) as refused:
        open_segments(tmp_path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_changed_byte_never_gives_a_wrong_segment(packed_table, tmp_path):
    path = tmp_path / "masks.sqlite"
    content = bytearray(packed_table.read_bytes())
    store = PackedStore(packed_table)
    key = min(store.images())
    expected = store.nearest(key, 15)
    with sqlite3.connect(packed_table) as connection:
        (counts,) = connection.execute(
            "SELECT counts FROM segments WHERE coverage = ?", (expected.coverage_percent,)
        ).fetchone()
    connection.close()
    at = content.index(counts) + len(counts) // 2
    content[at] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"masks\.sqlite.*damaged"):
        open_segments(path).nearest(key, 15)


def pack_on_a_small_disk(folder, out):
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    from mae.cli import main

    main(["masks", "pack", str(folder), "--out", str(out), "--processes", "1"])


def test_a_full_disk_stops_a_pack_which_goes_on_later(json_folder, tmp_path, in_child, capfd):
    out = tmp_path / "masks.sqlite"
    assert in_child(pack_on_a_small_disk, json_folder, out) == 1
    said = capfd.readouterr().err
    assert "Make room" in said
    assert "Traceback" not in said
    assert not out.exists()
    summary = pack(json_folder, out, **WHOLE)
    assert summary.images + summary.without == 6
    assert open_segments(out).images() == open_any_form(json_folder).images()


def test_a_read_only_store_is_read_and_nothing_is_written_beside_it(packed_table, tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    path = folder / "masks.sqlite"
    shutil.copyfile(packed_table, path)
    path.chmod(0o444)
    folder.chmod(0o555)
    store = open_segments(folder)
    assert store.nearest(min(store.images()), 15) is not None
    assert [found.name for found in folder.iterdir()] == ["masks.sqlite"]
    folder.chmod(0o755)


def read_in_child(store, key, expected):
    assert store.nearest(key, 15) == expected


def test_an_open_store_is_safe_after_fork_and_pickle(packed_table, in_child):
    store = PackedStore(packed_table)
    key = min(store.images())
    expected = store.nearest(key, 15)
    assert in_child(read_in_child, store, key, expected) == 0
    assert pickle.loads(pickle.dumps(store)).nearest(key, 15) == expected
    assert store.nearest(key, 15) == expected


def pack_many_and_report(folder, out, pids_path):
    from common import parallel

    start = parallel.leave_signals_to_the_main_process

    def start_and_tell(worker):
        with pids_path.open("a") as file:
            file.write(f"{os.getpid()}\n")
        start(worker)

    parallel.leave_signals_to_the_main_process = start_and_tell
    add = store._add

    def add_and_die(*arguments):
        add(*arguments)
        time.sleep(2)  # until the pipe is full of what the workers have done meanwhile
        os.kill(os.getpid(), signal.SIGKILL)

    store._add = add_and_die
    pack(folder, out, **{**WHOLE, "processes": 2})


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(sample, tmp_path, in_child):
    pids = tmp_path / "pids"
    arguments = (sample / "masks-amg-rle", tmp_path / "masks.sqlite", pids)
    assert in_child(pack_many_and_report, *arguments) == -signal.SIGKILL
    workers = [int(line) for line in pids.read_text().split()]
    assert len(workers) == 2
    until(lambda: not any(is_running(pid) for pid in workers))


def test_what_a_worker_raises_is_one_line(packed_table, tmp_path, masks_command):
    def refuse(*_):
        raise ValueError("no: thank you")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("segments.pack.rle_annotation", refuse)
        code, said = masks_command("unpack", packed_table, tmp_path / "json", "--processes", 2)
    assert code == 2
    assert said.startswith("Error: ")
    assert said.endswith(": no: thank you\n")
    assert said.count("\n") == 1


def test_a_worker_that_dies_is_an_error_and_leaves_what_is_done(json_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("segments.pack.pack_image", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError, match="terminated abruptly"):
        pack(json_folder, tmp_path / "masks.sqlite", **{**WHOLE, "processes": 2})
    monkeypatch.undo()
    summary = pack(json_folder, tmp_path / "masks.sqlite", **WHOLE)
    assert summary.images + summary.without == 6


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
