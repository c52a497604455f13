"""Where generated segments go: a folder of RLE JSON, or a packed store."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from mae.segments.forms import JsonFolder
from mae.segments.pack import Failure, write_json
from mae.segments.segment import Segment
from mae.segments.store import PackedStore, store_settings
from mae.segments.writing import StoreWriter, Summary, pack_image, part_path

SETTINGS_FILE = "generator.yml"


class StoreSink:
    """A packed store. A finished one is reopened only when there is something new to add."""

    def __init__(self, out: Path, source: str, settings: dict[str, Any]) -> None:
        self.out, self.source, self.settings = out, source, settings
        self.writer: StoreWriter | None = None
        self.finished = PackedStore(out) if out.exists() else None
        if self.finished:
            _refuse_other_settings(out, store_settings(self.finished.meta), settings)
        elif not out.parent.is_dir():
            raise ValueError(f"{out.parent} is not a folder")

    def done(self) -> set[str]:
        """The keys that need not be made again."""
        if self.finished:
            return self.finished.images() | self.finished.listed_empty()
        if not part_path(self.out).exists():
            return set()
        with self._open() as writer:
            return writer.keys()

    def __enter__(self) -> StoreSink:
        if not self.finished:
            self.writer = self._open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.writer:
            self.writer.__exit__(kind, error, trace)

    def add(self, key: str, segments: list[Segment]) -> None:
        """Keep an image's segments."""
        self._reopened().add(pack_image(key, segments))

    def add_failure(self, failure: Failure) -> None:
        """Record an image that could not be done."""
        if self.finished and self.finished.failures().get(failure.key) == failure.reason:
            return
        self._reopened().add_failure(failure.key, failure.reason)

    def pause(self) -> None:
        """Keep what is there for the next run."""
        if self.writer:
            self.writer.commit()

    def finish(self) -> None:
        """Everything was tried."""
        if self.writer:
            self.writer.finish()

    def summary(self, *, already_there: int, interrupted: bool = False) -> Summary:
        """What is there now."""
        if interrupted and self.writer:
            return self.writer.summary(already_there=already_there, interrupted=True)
        store = PackedStore(self.out)
        return Summary(
            out=self.out,
            images=len(store.images()),
            without=len(store.listed_empty()),
            left_out=len(store.failures()),
            already_there=already_there,
            interrupted=interrupted,
        )

    def _reopened(self) -> StoreWriter:
        """The writer; takes a finished store away from its readers until `finish`."""
        if self.writer is None:
            self.out.replace(part_path(self.out))
            self.finished = None
            self.writer = self._open()
        return self.writer

    def _open(self) -> StoreWriter:
        return StoreWriter(self.out, source=self.source, settings=self.settings)


class FolderSink:
    """A folder of RLE JSON, class folders kept; `generator.yml` says how it was made."""

    def __init__(self, out: Path, settings: dict[str, Any], failed_name: str) -> None:
        self.out, self.settings = out, settings
        self.failed_path = out / failed_name
        self.failures: list[Failure] = []
        path = out / SETTINGS_FILE
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is a file; name a folder, or a store ending in .sqlite")
        if path.exists():
            _refuse_other_settings(path, yaml.safe_load(path.read_text()), settings)

    def done(self) -> set[str]:
        """The keys that need not be made again."""
        source = JsonFolder(self.out, ())
        return source.images() | source.listed_empty()

    def __enter__(self) -> FolderSink:
        self.out.mkdir(parents=True, exist_ok=True)
        _write(self.out / SETTINGS_FILE, yaml.safe_dump(self.settings))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.pause()

    def add(self, key: str, segments: list[Segment]) -> None:
        """Keep an image's segments."""
        write_json(self.out, key, segments)

    def add_failure(self, failure: Failure) -> None:
        """Record an image that could not be done."""
        self.failures.append(failure)

    def pause(self) -> None:
        """Write the failures of this run."""
        lines = [f"{failure.key}\t{failure.reason}\n" for failure in self.failures]
        if lines:
            _write(self.failed_path, "".join(lines))
        else:
            self.failed_path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Everything was tried; `pause` has the rest."""

    def summary(self, *, already_there: int, interrupted: bool = False) -> Summary:
        """What is there now."""
        source = JsonFolder(self.out, ())
        return Summary(
            out=self.out,
            images=len(source.images()),
            without=len(source.listed_empty()),
            left_out=len(self.failures),
            already_there=already_there,
            interrupted=interrupted,
        )


def _refuse_other_settings(where: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    if there == wanted:
        return
    names = sorted(
        name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name)
    )
    differences = ", ".join(f"{n} {there.get(n)} there, {wanted.get(n)} now" for n in names)
    raise ValueError(f"{where} was made with other settings: {differences}; name another --out")


def _write(path: Path, text: str) -> None:
    from os import getpid

    aside = path.with_name(f".{path.name}.{getpid()}")
    aside.write_text(text)
    aside.replace(path)
