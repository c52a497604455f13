"""Options: one dataclass field is the command line's option, YAML's key, --help's line, the error.

    @dataclass(frozen=True, kw_only=True)
    class Optimisation(OptionGroup):
        title: ClassVar[str] = "Optimisation"
        base_lr: float = option("Learning rate per 256 images.", 1.5e-4, above=0)

    @command(cli, optimisation=Optimisation)
    def train(optimisation: Optimisation) -> None: ...

Values come in layers, the later ones win: the fields' defaults, a part's own files (a recipe), the
file of --config, the command line. All of them are converted and judged here, in the same words.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from common.files import shortened
from common.yamlfile import check_names, parse_value, plain, read_yaml

REQUIRED = dataclasses.MISSING
LARGEST = 1e15  # larger numbers are slips, and overflow somewhere
MOST_EPOCHS, MOST_PROCESSES = 100_000, 1024  # more are slips of the hand
MOST_SEED = 2**32 - 1  # of numpy's legacy generators, which mmcv's transforms draw from
Group = TypeVar("Group", bound="OptionGroup")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a field's metadata say about an option.

    choices: the allowed words, where the type is not a Literal; asked when a value is judged.
    at_least, above, at_most, below: the range of a number.
    neutral: it decides speed or place, not what comes out.
    older: what a file counts as that was written before this option existed.
    is_plugin: a Python file that is loaded before any option is judged.
    memory: a lower number of it, or the switch, needs less of a device's memory.
    """

    help: str
    choices: Callable[[], Iterable[str]] | None = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    neutral: bool = False
    older: Any = REQUIRED
    is_plugin: bool = False
    memory: bool = False

    def range_text(self) -> str:
        """The allowed numbers, in words."""
        if self.at_least is None and self.above is None:
            return "a finite number" if self.at_most is None else f"at most {self.at_most:g}"
        low = f"{self.at_least:g}" if self.at_least is not None else f"more than {self.above}"
        if self.at_most is not None:
            return f"{low} to {self.at_most:g}"
        if self.below is not None:
            return f"{low} to below {self.below:g}"
        return low if self.at_least is None else f"{low} or more"

    def allows(self, number: float) -> bool:
        """Whether the number is in the range; NaN and infinity never are."""
        return (
            -LARGEST < number < LARGEST
            and (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )


def option(help: str, default: Any = REQUIRED, **more: Any) -> Any:
    """A field of an `OptionGroup`; without `default` it has to be given. more: see `Spec`."""
    metadata = {"option": Spec(help=help, **{"older": default, **more})}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def option_of(group: type[OptionGroup], name: str, default: Any) -> Any:
    """A field that is the option `name` of another group, with a default of its own."""
    metadata = group.__dataclass_fields__[name].metadata
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class OptionGroup:
    """Options that belong together. Making one judges every value: ValueError names the option."""

    title: ClassVar[str]
    no_default: ClassVar[str] = "required"  # what --help says of options that have none

    def __post_init__(self) -> None:
        for name, field in fields_of(type(self)).items():
            field.judge(getattr(self, name))


@dataclass(frozen=True)
class Field:
    """One option: its name, its type without `| None`, and what its metadata say.

    instead: words that may stand in the place of a value, as in `Path | Literal["random"]`.
    """

    name: str
    kind: Any
    optional: bool
    default: Any
    spec: Spec
    instead: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        """As it is written on the command line."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def is_mapping(self) -> bool:
        """Whether it holds KEY=VALUE pairs, which layers add to."""
        return typing.get_origin(self.kind) is Mapping

    def words(self) -> tuple[str, ...]:
        """The allowed words, none if any will do."""
        item = item_type(self.kind)
        if typing.get_origin(item) is Literal:
            return typing.get_args(item)
        return tuple(self.spec.choices()) if self.spec.choices else ()

    def convert(self, value: Any) -> Any:
        """What was written, as text or as YAML has it, in the field's type; ValueError if not."""
        if (value is None and self.optional) or value in self.instead:
            return value
        if self.is_mapping:
            return self._pairs(value)
        if typing.get_origin(self.kind) is tuple:
            parts = value if isinstance(value, list | tuple) else str(value).split(",")
            return tuple(self._one(p.strip() if isinstance(p, str) else p) for p in parts)
        return self._one(value)

    def judge(self, value: Any) -> None:
        """Raise ValueError unless a converted value is among the choices and in the range."""
        words = self.words()
        for item in value if isinstance(value, tuple) else (value,):
            if words and item is not None and item not in words:
                raise self._refusal(item, f"choose one of {', '.join(words)}")
            is_number = isinstance(item, int | float) and not isinstance(item, bool)
            if is_number and not self.spec.allows(item):
                below = f", below {LARGEST:g}" if item >= LARGEST else ""
                raise self._refusal(item, self.spec.range_text() + below)

    def _one(self, value: Any) -> Any:
        kind, words = item_type(self.kind), self.words()
        if words:
            if isinstance(value, bool):  # what YAML's readers often make of on and off
                value = "on" if value else "off"
            normal = {word.replace("-", "_"): word for word in words}
            return normal.get(str(value).replace("-", "_"), value)  # `judge` refuses what is none
        if kind is bool:
            if isinstance(value, bool):
                return value
            raise self._refusal(value, "true or false")
        if isinstance(value, bool | list | dict) or value is None:
            raise self._refusal(value, _EXPECTED[kind])
        if kind is Path:
            return absolute_path(value, self.flag)
        if kind is str:
            return str(value)
        text = str(value)
        try:
            if not text.isascii() or "_" in text:  # Python's own ways to write numbers
                raise ValueError
            return kind(text)
        except ValueError:
            raise self._refusal(value, _EXPECTED[kind]) from None

    def _pairs(self, value: Any) -> dict[str, Any]:
        if isinstance(value, Mapping):
            return {str(key).replace("-", "_"): item for key, item in value.items()}
        if not isinstance(value, list | tuple):
            raise self._refusal(value, "`option: value` lines")
        pairs = {}
        for text in value:
            key, equals, given = str(text).partition("=")
            if not equals or not key.strip():
                raise self._refusal(text, "KEY=VALUE")
            name = key.strip().lstrip("-").replace("-", "_")
            pairs[name] = parse_value(given, f"{self.flag} {text}")
        return pairs

    def _refusal(self, value: Any, expected: str) -> ValueError:
        shown = f"{value:g}" if isinstance(value, float) and self.kind is not int else None
        shown = shown or _shortened(value)
        verb = "" if expected.startswith("choose") else "give "
        return ValueError(f"{self.flag} is {shown}; {verb}{expected}")


def absolute_path(value: Any, flag: str) -> Path:
    """With ~ filled in; links stay as they are, so that data may move behind them. ValueError."""
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ValueError(f"{flag} is {_shortened(value)}; give a path")
    try:
        path = Path(os.path.abspath(Path(value).expanduser()))  # noqa: PTH100  (keeps links)
        path.exists()
    except RuntimeError:
        raise ValueError(f"{flag} is {str(value)!r}; give a path; there is no such user") from None
    except OSError as error:
        raise ValueError(f"{flag} is {_shortened(value)}; give a path: {error.strerror}") from None
    return path


def _shortened(value: Any) -> str:
    try:
        return shortened(repr(value), 80)
    except ValueError:  # Python does not print integers of thousands of digits
        return "a number of thousands of digits"


_EXPECTED: dict[Any, str] = {
    int: "a whole number", float: "a number", str: "text", Path: "a path",
}  # fmt: skip


def item_type(kind: Any) -> Any:
    """The type of a tuple's items, else the type itself."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind


def fields_of(*groups: type[OptionGroup]) -> dict[str, Field]:
    """The options of groups by name, in their order."""
    return {name: field for group in groups for name, field in _fields_of(group)}


def _fields_of(group: type[OptionGroup]) -> Iterator[tuple[str, Field]]:
    hints = typing.get_type_hints(group)
    for field in dataclasses.fields(group):
        kind, instead = hints[field.name], ()
        parts = [kind]
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            parts = list(typing.get_args(kind))
            kind, *words = (part for part in parts if part is not type(None))
            instead = tuple(word for literal in words for word in typing.get_args(literal))
        optional = type(None) in parts
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        spec = field.metadata["option"]
        yield field.name, Field(field.name, kind, optional, default, spec, instead)


@dataclass(frozen=True)
class Layer:
    """Values from one place. source: the file, for errors; empty: the command line."""

    values: Mapping[str, Any]
    source: str = ""


def read_layer(path: Path, groups: Iterable[type[OptionGroup]]) -> Layer:
    """A YAML file of options, in either spelling. Raises ValueError for a name that is none."""
    values: dict[str, Any] = {}
    for key, value in read_yaml(path).items():
        name = key.replace("-", "_")
        if name in values:
            raise ValueError(f"{path}: {name} is given twice")
        values[name] = value
    check_names(values, fields_of(*groups), str(path))
    return Layer(values, str(path))


def merge(groups: Iterable[type[OptionGroup]], layers: Iterable[Layer]) -> dict[str, Any]:
    """The converted values of all layers by name. Raises ValueError, naming the file."""
    fields = fields_of(*groups)
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.values.items():
            if name not in fields or (value is None and not fields[name].optional):
                continue
            try:
                converted = fields[name].convert(value)
                if fields[name].is_mapping:
                    converted = {**merged.get(name, {}), **converted}
                else:
                    fields[name].judge(converted)
            except ValueError as error:
                raise ValueError(f"{layer.source}: {error}" if layer.source else error) from None
            merged[name] = converted
    return merged


def make(group: type[Group], values: Mapping[str, Any]) -> Group:
    """The group with these values. Raises ValueError for one that has to be given and is not."""
    fields = fields_of(group)
    for name, field in fields.items():
        if name not in values and field.default is REQUIRED:
            raise ValueError(f"{field.flag} is missing: {field.spec.help}")
    return group(**{name: values[name] for name in fields if name in values})


def groups_of(config: type) -> dict[str, Any]:
    """The groups that a dataclass of groups is made of, by the names of its fields."""
    return typing.get_type_hints(config)


def option_facts(groups: Iterable[type[OptionGroup]]) -> dict[str, dict[str, Any]]:
    """By name: default, whether it is neutral or holds several values, and what an older file
    counts as; plain values."""
    return {
        name: {
            "default": None if field.default is REQUIRED else plain(field.default),
            "neutral": field.spec.neutral,
            "several": typing.get_origin(field.kind) is tuple,
            "older": None if field.spec.older is REQUIRED else plain(field.spec.older),
        }
        for name, field in fields_of(*groups).items()
    }
