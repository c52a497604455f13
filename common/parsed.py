"""What files hold, checked once where it comes in: values of the right type, or one clear error.

A shape is a dataclass or TypedDict of the values; pydantic compares. Also here are the shapes of
the files by which a step's own part and the plan meet.
"""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # typing's is not enough before Python 3.12

from common.files import read_text, shortened

Percent = Annotated[FiniteFloat, Field(ge=0, le=100)]
Count = Annotated[int, Field(ge=0)]

LARGEST = 1e30  # of what a log holds
LogRecord = dict[str, int | float | None]  # a line of log.txt: "epoch" from 1, numbers by name

# What a shape does not name is kept: later versions add to these files, and older ones read them.


@with_config(ConfigDict(extra="allow"))
class Scores(TypedDict):
    """What the areas of a split amount to, in percent."""

    pixel_accuracy: Percent
    mean_accuracy: Percent
    mean_iou: Percent
    class_iou: dict[str, Percent | None]


@with_config(ConfigDict(extra="allow"))
class Result(Scores):
    """result.json: the scores of a finetuning, and what they depend on."""

    format_version: int
    epochs: Count
    best_mean_iou: NotRequired[Percent | None]
    seed: NotRequired[Count]
    minutes: NotRequired[Annotated[FiniteFloat, Field(ge=0)] | None]
    settings: dict[str, Any]


@with_config(ConfigDict(extra="allow"))
class ImageScore(TypedDict):
    """The share of images whose class is told by their neighbours, in percent."""

    accuracy: Percent


@with_config(ConfigDict(extra="allow"))
class ProbeResult(TypedDict):
    """result.json of `segmenter probe`: what was asked for, and what it depends on."""

    format_version: int
    linear: NotRequired[Scores]
    knn: NotRequired[Scores]
    image_knn: NotRequired[ImageScore]
    rankme: NotRequired[Annotated[FiniteFloat, Field(ge=0)]]
    seed: Count
    seconds: dict[str, FiniteFloat]
    settings: dict[str, Any]


@with_config(ConfigDict(extra="allow"))
class StepProgress(TypedDict, total=False):
    """progress.json: where a step is."""

    state: str
    stage: str
    epoch: FiniteFloat
    epochs_total: Count
    images_per_second: FiniteFloat
    seconds_left: FiniteFloat | None
    done: Count
    total: Count
    unit: str
    per_second: FiniteFloat


def parsed(shape: Any, content: Any, source: str) -> Any:
    """The content as `shape` has it. Raises ValueError that begins with `source`."""
    try:
        # Strictly: "1" is no number and 1 no switch, as a file that is damaged might have it.
        return _adapter(shape).validate_python(content, strict=True)
    except ValidationError as error:
        raise ValueError(f"{source}: {_said(error)}") from None


def parsed_plain(shape: Any, content: Any, source: str) -> Any:
    """The same for plain values, of which `shape` may be a dataclass, too."""
    # By way of JSON: there pydantic makes a dataclass of an object and a tuple of a list, and is
    # strict about all else.
    try:
        return _adapter(shape).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise ValueError(f"{source}: {_said(error)}") from None
    except (TypeError, ValueError, RecursionError) as error:  # of what JSON cannot say
        raise ValueError(f"{source}: {shortened(error)}") from None


def read_json(path: Path, shape: Any) -> Any:
    """A JSON file's content as `shape` has it. Raises ValueError that names the file.

    A missing file raises FileNotFoundError.
    """
    if not path.exists():  # often no error: it is not written yet
        raise FileNotFoundError(2, "No such file or directory", str(path))
    return parsed_text(read_text(path), shape, str(path))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The epochs of a log.txt; none if there is no file. A last line cut by a kill is dropped.

    Raises ValueError that names file and line for anything else.
    """
    records: list[dict[str, Any]] = []
    for record in read_json_lines(path, LogRecord) if path.exists() else ():
        where = f"{path}:{len(records) + 1} is damaged"
        if not isinstance(record.get("epoch"), int):
            raise ValueError(f"{where}: it is of no epoch")
        for name, value in record.items():
            # No training says this, and it would be all that a figure's axis shows.
            if value and (abs(value) > LARGEST or abs(value) < 1 / LARGEST):
                raise ValueError(f"{where}: {name} is out of any range")
        records.append(record)
    return records


def read_json_lines(path: Path, shape: Any) -> Iterator[Any]:
    """The lines of a file that is appended to; a last line that a kill has cut is left out.

    Raises ValueError that names file and line.
    """
    # What stands behind the last line break is not whole, or nothing.
    *lines, _ = read_text(path).split("\n")
    for number, line in enumerate(lines, start=1):
        yield parsed_text(line, shape, f"{path}:{number}")


def parsed_text(text: str | bytes, shape: Any, source: str) -> Any:
    """The same for JSON as text."""
    try:
        return _adapter(shape).validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError(f"{source} is damaged: {_said(error)}") from None


@lru_cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def _said(error: ValidationError) -> str:
    """The first problem: where, and what was expected."""
    # One is enough: behind the first of a damaged file there are often hundreds.
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    said = first["msg"].removeprefix("Value error, ")  # of a shape's own __post_init__
    text = f"{shortened(where)}: {said}" if where else said
    # The input is all that stands around it.
    if first["type"] in ("missing", "json_invalid", "value_error"):
        return text
    given = json.dumps(first["input"], default=lambda value: type(value).__name__)
    return f"{text}, not {shortened(given, 60)}"
