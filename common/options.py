"""Options: one dataclass field is the command line's option, YAML's key, --help's line, the error.

    @dataclass(frozen=True, kw_only=True)
    class Optimisation(OptionGroup):
        title: ClassVar[str] = "Optimisation"
        base_lr: float = option("Learning rate per 256 images.", 1.5e-4, above=0)

    @command(cli, optimisation=Optimisation)
    def train(optimisation: Optimisation) -> None: ...

A value's way: it stands in a `Layer` (a recipe, the file of --config, the command line) as it was
written; `Field.judge` turns it into the field's type or refuses it, the only place that does;
`merge` lets later layers win over earlier ones; `make` fills in the defaults.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from common.files import shortened
from common.yamlfile import check_names, parse_value, plain, read_yaml

REQUIRED = dataclasses.MISSING
LARGEST = 10**15  # larger numbers are slips, and overflow somewhere
MOST_EPOCHS, MOST_PROCESSES = 100_000, 1024  # more are slips of the hand
MOST_SEED = 2**32 - 1  # of numpy's legacy generators, which mmcv's transforms draw from
Group = TypeVar("Group", bound="OptionGroup")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What the author of an option says beyond its type and default.

    choices: the allowed words, where the type is not a Literal; asked when a value is judged, since
        plugins add some.
    at_least, above, at_most, below: the range of a number, or of each of several.
    neutral: it decides speed or place, not what comes out.
    older: what a file counts as that was written before this option existed.
    memory: a lower number of it, or the switch, needs less of a device's memory.
    early: called with the value before any other option is judged: it may load what brings
        choices, or give a layer, such as a recipe, that lies below all that the user wrote.
    """

    help: str
    choices: Callable[[], Iterable[str]] | None = None
    at_least: float | None = None
    above: float = -LARGEST
    at_most: float | None = None
    below: float = LARGEST
    neutral: bool = False
    older: Any = REQUIRED
    memory: bool = False
    early: Callable[[Any], Layer | None] | None = None

    def range_text(self, problem: str) -> str:
        """The allowed numbers, in words; `LARGEST` only where it is the problem."""
        low = f"{self.at_least:g}" if self.at_least is not None else f"more than {self.above:g}"
        if self.at_most is not None:
            return f"{low} to {self.at_most:g}"
        if self.below < LARGEST or problem == "less_than":
            return f"{low} to below {self.below:g}"
        return low if self.at_least is None else f"{low} or more"


def option(help: str, default: Any = REQUIRED, **more: Any) -> Any:
    """A field of an `OptionGroup`; without `default` it has to be given. more: see `Spec`."""
    # A new option whose default keeps the older behaviour says nothing about older files.
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
    """Options that belong together. `__post_init__` is for what concerns several of them."""

    title: ClassVar[str]
    no_default: ClassVar[str] = "required"  # what --help says of options that have none


@dataclass(frozen=True)
class Layer:
    """Values from one place, as they were written. source: the file; empty: the command line."""

    values: Mapping[str, Any]
    source: str = ""

    def judged(self, field: Field) -> Any:
        """The value of a field. Raises ValueError that names the file."""
        try:
            return field.judge(self.values[field.name])
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}" if self.source else error) from None


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


def make_all(groups: Mapping[str, type[OptionGroup]], layers: Iterable[Layer]) -> dict[str, Any]:
    """Each group by its name, made of all layers as a command makes it. Raises ValueError."""
    layers = list(layers)
    # Early ones first, by what was written of them alone: all others may depend on what they bring.
    for name, field in fields_of(*groups.values()).items():
        if field.spec.early is not None:
            given = [layer.judged(field) for layer in layers if layer.values.get(name) is not None]
            value = [field.default, *given][-1]
            below = None if value is None else field.spec.early(value)
            layers = layers if below is None else [below, *layers]
    values = merge(groups.values(), layers)
    return {name: make(group, values) for name, group in groups.items()}


def merge(groups: Iterable[type[OptionGroup]], layers: Iterable[Layer]) -> dict[str, Any]:
    """The judged values of all layers by name, later ones over earlier ones. Raises ValueError."""
    fields = fields_of(*groups)
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.values.items():
            # A recipe holds more than a probe asks for; an empty line of YAML says nothing.
            if name not in fields or (value is None and not fields[name].optional):
                continue
            judged = layer.judged(fields[name])
            if fields[name].is_mapping:
                judged = {**merged.get(name, {}), **judged}
            merged[name] = judged
    return merged


def make(group: type[Group], values: Mapping[str, Any]) -> Group:
    """The group of judged values. Raises ValueError for one that has to be given and is not."""
    fields = fields_of(group)
    for name, field in fields.items():
        if name not in values and field.default is REQUIRED:
            raise ValueError(f"{field.flag} is missing: {field.spec.help}")
    return group(**{name: values[name] for name in fields if name in values})


def groups_of(config: type) -> dict[str, Any]:
    """The groups that a dataclass of groups is made of, by the names of its fields."""
    return typing.get_type_hints(config)


def older_values(*groups: type[OptionGroup]) -> dict[str, Any]:
    """What each option counts as in a file that was written before it existed."""
    olders = {name: field.spec.older for name, field in fields_of(*groups).items()}
    return {name: older for name, older in olders.items() if older is not REQUIRED}


def decisive_values(*groups: OptionGroup) -> dict[str, Any]:
    """The options that decide what comes out, in plain values; those of speed and place are not."""
    return {
        name: plain(getattr(group, name))
        for group in groups
        for name, field in fields_of(type(group)).items()
        if not field.spec.neutral
    }


def as_arguments(*groups: OptionGroup, below: Mapping[str, Any] | None = None) -> list[str]:
    """The words of a command line that make these groups again.

    Left out is what a process has by itself: the defaults, and what lies `below` the command line,
    such as a recipe.
    """
    words: list[str] = []
    for group in groups:
        for name, field in fields_of(type(group)).items():
            value = getattr(group, name)
            # None has no word: it is the default wherever it is allowed.
            if value is None or value == (below or {}).get(name, field.default):
                continue
            if isinstance(value, bool):
                words.append(field.flag if value else f"--no-{field.flag[2:]}")
            else:
                several = value if isinstance(value, tuple) else (value,)
                words += [field.flag, ",".join(map(str, several))]
    return words


def fields_of(*groups: type[OptionGroup]) -> dict[str, Field]:
    """The options of groups by name, in their order."""
    return {field.name: field for group in groups for field in _fields_of(group)}  # type: ignore[arg-type]


@cache
def _fields_of(group: type[OptionGroup]) -> list[Field]:
    hints, found = typing.get_type_hints(group), []
    for field in dataclasses.fields(group):
        hint = hints[field.name]
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        parts = typing.get_args(hint) if is_union else (hint,)
        # The first is what a value is; behind it stand None and words, as in `Path | Literal["x"]`.
        kind, *others = (part for part in parts if part is not type(None))
        instead = tuple(word for literal in others for word in typing.get_args(literal))
        several = typing.get_origin(kind) is tuple
        kind = typing.get_args(kind)[0] if several else kind
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        spec, optional = field.metadata["option"], type(None) in parts
        found.append(Field(field.name, kind, several, optional, instead, default, spec))
    return found


@dataclass(frozen=True)
class Field:
    """One option as its dataclass field declares it, and the judge of its values.

    kind: its type; of a tuple, which is written with commas (`several`), the type of the items.
    instead: words that may stand in the place of a value, as in `Path | Literal["random"]`.
    """

    name: str
    kind: Any
    several: bool
    optional: bool
    instead: tuple[str, ...]
    default: Any
    spec: Spec

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
        if typing.get_origin(self.kind) is Literal:
            return typing.get_args(self.kind)
        return tuple(self.spec.choices()) if self.spec.choices else ()

    def judge(self, value: Any) -> Any:
        """What was written, as text or as YAML has it, in the field's type; ValueError if not."""
        if (value is None and self.optional) or value in self.instead:
            return value
        if self.is_mapping:
            return _pairs(value, self.flag)
        if self.several:
            # 15,30 on the command line and as a word of YAML, [15, 30] in YAML, 15 in both.
            is_list = isinstance(value, list | tuple)
            parts = value if is_list else [part.strip() for part in str(value).split(",")]
            return tuple(self._item(part) for part in parts)
        return self._item(value)

    def _item(self, value: Any) -> Any:
        if words := self.words():
            return _word(value, words, self.flag)
        if self.kind is Path:
            return absolute_path(value, self.flag)
        from pydantic import ValidationError  # as late as `_adapter`, for the same reason

        try:
            return self._adapter.validate_python(value)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]["type"]
        if not problem.startswith(("greater", "less", "finite")):
            raise _refusal(self.flag, value, f"give {_EXPECTED[self.kind]}")
        # It is a number, so it is shown as one, also where it was written as text.
        raise _refusal(self.flag, value, f"give {self.spec.range_text(problem)}", show=str)

    @cached_property
    def _adapter(self) -> Any:
        """pydantic's judge of a number, a text or a switch.

        Made when there is a value to judge: importing pydantic takes longer than all of --help.
        """
        from pydantic import BeforeValidator, ConfigDict, TypeAdapter
        from pydantic import Field as Limits

        config = ConfigDict(
            strict=self.kind is bool, coerce_numbers_to_str=True, allow_inf_nan=False
        )
        if self.kind not in (int, float):
            return TypeAdapter(self.kind, config=config)
        at = self.spec
        limits = Limits(ge=at.at_least, gt=at.above, le=at.at_most, lt=at.below)
        kind: Any = Annotated[self.kind, limits, BeforeValidator(_plain_number)]
        return TypeAdapter(kind, config=config)


_EXPECTED = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _plain_number(value: Any) -> Any:
    # pydantic takes Python's 1_000, and true for 1; nobody who writes them means a number.
    if isinstance(value, bool) or "_" in str(value):
        raise ValueError
    return value


def _word(value: Any, words: Iterable[str], flag: str) -> str:
    if isinstance(value, bool):  # what YAML's readers often make of on and off
        value = "on" if value else "off"
    for word in words:  # four-channels is four_channels
        if word.replace("-", "_") == str(value).replace("-", "_"):
            return word
    raise _refusal(flag, value, f"choose one of {', '.join(words)}")


def _pairs(value: Any, flag: str) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {str(key).replace("-", "_"): item for key, item in value.items()}
    if not isinstance(value, list | tuple):
        raise _refusal(flag, value, "give `option: value` lines")
    pairs = {}
    for text in value:
        key, equals, given = str(text).partition("=")
        if not equals or not key.strip():
            raise _refusal(flag, text, "give KEY=VALUE")
        # `--pretrain=--base-lr=1`, too: so it stands in the other command.
        name = key.strip().lstrip("-").replace("-", "_")
        pairs[name] = parse_value(given, f"{flag} {text}")
    return pairs


def absolute_path(value: Any, flag: str) -> Path:
    """With ~ filled in; links stay as they are, so that data may move behind them. ValueError."""
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise _refusal(flag, value, "give a path")
    try:
        path = Path(os.path.abspath(Path(value).expanduser()))  # noqa: PTH100  (keeps links)
        path.exists()  # raises OSError for a name that no disk takes
    except RuntimeError:
        raise _refusal(flag, value, "give a path; there is no such user") from None
    except OSError as error:
        raise _refusal(flag, value, f"give a path: {error.strerror}") from None
    return path


def _refusal(flag: str, value: Any, advice: str, show: Callable[[Any], str] = repr) -> ValueError:
    """The one form of an error: what was given, what is allowed."""
    try:
        shown = shortened(show(value), 80)
    except ValueError:  # Python does not print integers of thousands of digits
        shown = "a number of thousands of digits"
    return ValueError(f"{flag} is {shown}; {advice}")


def load_plugin(path: Path) -> None:
    """Import the file, once; what it defines registers itself. Raises ValueError if it cannot."""
    name = f"segmae_plugin_{path.resolve()}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path) if path.suffix == ".py" else None
    if spec is None or spec.loader is None:
        raise ValueError(f"--plugin {path}: give a Python file")
    # Known before it runs, as any module is: pickle finds its classes by this name.
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout may be for a program to read
            spec.loader.exec_module(module)
    # It is the user's code: whatever it raises, the user can mend; an exit would look like success.
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--plugin {path}: {type(error).__name__}: {reason}") from error
