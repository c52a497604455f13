"""What files hold, checked once where it comes in: values of the right type, or one clear error.

YAML as it is written, JSON by shapes, TypedDicts or dataclasses, which pydantic compares; and those
of the files by which a step's own part and the plan meet.
"""

import difflib
import json
import re
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NotRequired

import yaml
from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # typing's is not enough before Python 3.12

from common.files import read_text, shortened


def read_yaml(path: Path) -> dict[str, Any]:
    """A file of `key: value` lines. Raises ValueError, in one line, for anything else."""
    content = parse_value(read_text(path), str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} has to hold `key: value` lines")
    return {str(key): value for key, value in content.items()}


def parse_value(text: str, what: str) -> Any:
    """What a text stands for as YAML. Raises ValueError that begins with `what`."""
    try:
        return yaml.load(text, _PlainLoader)
    except RecursionError:
        raise ValueError(f"{what}: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: an integer of a million digits
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{what} is not YAML: {where}{reason}") from None


class _PlainLoader(yaml.SafeLoader):
    """YAML 1.2 as far as it matters: `off` and `24:00:00` stay words, `1e-3` is a number."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """As PyYAML does, but without aliases: those of lists of aliases would fill the memory."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "write the value instead of *alias", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML does, but a key that stands twice is an error and not the last one's value."""
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                text, mark = f"{key.value} is given twice", key.start_mark
                raise yaml.constructor.ConstructorError(None, None, text, mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """As PyYAML does, but without NUL, which no path and no name may hold."""
        if "\0" in node.value:
            raise yaml.constructor.ConstructorError(None, None, "a value holds NUL", node.start_mark)
        return super().construct_scalar(node)


_PlainLoader.yaml_implicit_resolvers = {}
# What is left out of YAML 1.1, such as times, dates and `yes`, stays a word. PyYAML looks a form up
# by its first letter.
for _tag, _letters, _form in (
    ("null", ["~", "n", "N", ""], r"~|null|Null|NULL|"),
    ("bool", list("tTfF"), r"true|True|false|False"),
    ("int", list("-+0123456789"), r"[-+]?(?:0|[1-9][0-9]*)"),
    ("float", list("-+.0123456789"), r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))"
                                     r"(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan"),
):  # fmt: skip
    _form_alone = re.compile(f"^(?:{_form})$")
    _PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _form_alone, _letters)


def check_names(
    given: Collection[str], known: Collection[str], what: str,
    *, elsewhere: Callable[[str], str] = lambda name: "",
) -> None:  # fmt: skip
    """Raise ValueError for a name that is not known: where it is one, or those that are spelled alike."""
    for name in given:
        if name not in known:
            # Any word may be wrong; only one that is spelled nearly right gets a hint.
            near = difflib.get_close_matches(name, known)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            hint = f", {said}" if (said := elsewhere(name)) else hint
            raise ValueError(f"{what}: there is no {name!r}{hint}")


def plain(value: Any) -> Any:
    """A value as YAML and JSON know it: paths as text, tuples as lists."""
    return json.loads(json.dumps(value, default=str))


def read_json(path: Path, shape: Any) -> Any:
    """A JSON file's content as `shape` has it. Raises FileNotFoundError, or a ValueError."""
    if not path.exists():  # often no error: it is not written yet
        raise FileNotFoundError(2, "No such file or directory", str(path))
    return parsed_text(read_text(path), shape, f"{path} is damaged")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The epochs of a log.txt; none if there is no file. Raises ValueError for a damaged one."""
    records = list(read_json_lines(path, LogRecord)) if path.exists() else []
    for number, record in enumerate(records, start=1):
        if not isinstance(record.get("epoch"), int):
            raise ValueError(f"{path}:{number} is damaged: it is of no epoch")
    return records


def read_json_lines(path: Path, shape: Any) -> Iterator[Any]:
    """The lines of a file that is appended to. Raises ValueError that names file and line."""
    # What stands behind the last line break is nothing, or what a kill has cut.
    *lines, _ = read_text(path).split("\n")
    for number, line in enumerate(lines, start=1):
        yield parsed_text(line, shape, f"{path}:{number} is damaged")


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
    # strict about all else. What JSON has no word for is of the wrong type as text, too.
    return parsed_text(json.dumps(content, default=repr, skipkeys=True), shape, source)


def parsed_text(text: str | bytes, shape: Any, source: str) -> Any:
    """The same for JSON as text."""
    try:
        return _adapter(shape).validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError(f"{source}: {_said(error)}") from None


_adapter: Callable[[Any], TypeAdapter[Any]] = lru_cache(TypeAdapter)


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
    return f"{text}, not {shortened(repr(first['input']), 60)}"


Percent = Annotated[FiniteFloat, Field(ge=0, le=100)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[FiniteFloat, Field(ge=0)]
# A line of log.txt: "epoch" from 1, numbers by name. No training says 1e30, and it would be all
# that a figure's axis shows.
LogRecord = dict[str, Annotated[int | float, Field(ge=-1e30, le=1e30)] | None]


@with_config(ConfigDict(extra="allow"))
class _Shape(TypedDict):
    """What it does not name is kept: later versions add to the files, and older ones read them."""


class Scores(_Shape):
    """What the areas of a split amount to, in percent."""

    pixel_accuracy: Percent
    mean_accuracy: Percent
    mean_iou: Percent
    class_iou: dict[str, Percent | None]


class Result(Scores):
    """result.json: the scores of a finetuning, and what they depend on."""

    format_version: int
    epochs: Count
    best_mean_iou: NotRequired[Percent | None]
    seed: NotRequired[Count]
    minutes: NotRequired[Positive | None]
    settings: dict[str, Any]


class ProbeResult(_Shape):
    """result.json of `segmenter probe`: what was asked for, and what it depends on."""

    format_version: int
    linear: NotRequired[Scores]
    knn: NotRequired[Scores]
    knn_raw: NotRequired[Scores]
    dinov2_linear: NotRequired[Scores]
    dinov3_linear: NotRequired[Scores]
    capi_knn: NotRequired[Scores]
    capi_logreg: NotRequired[Scores]
    hummingbird: NotRequired[Scores]
    image_knn: NotRequired[dict[str, Positive]]  # "accuracy", in percent
    image_linear: NotRequired[dict[str, Positive]]
    rankme: NotRequired[Positive]
    first_direction_percent: NotRequired[Positive]
    position_percent: NotRequired[Positive]
    seed: Count
    seconds: dict[str, FiniteFloat]
    settings: dict[str, Any]


class StepProgress(_Shape, total=False):
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


def rle_annotation(height: int, width: int, counts: bytes) -> dict[str, Any]:
    """One segment, from COCO's compressed run lengths, as Segment Anything's `amg.py` writes it.

    area: in pixels. bbox: x, y, width, height (https://cocodataset.org/#format-data).
    """
    from pycocotools import mask as coco_rle  # whoever plans with this need not load it

    rle = {"size": [height, width], "counts": counts}
    left, top, box_width, box_height = (int(value) for value in coco_rle.toBbox(rle))
    return {
        "segmentation": {**rle, "counts": counts.decode("ascii")},
        "area": int(coco_rle.area(rle)),
        # amg.py subtracts the first pixel from the last: a box of one pixel is 0 wide, not 1.
        "bbox": [left, top, max(0, box_width - 1), max(0, box_height - 1)],
    }
