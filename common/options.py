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

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic import Field as Limits

from common.files import shortened
from common.formats import check_names, parse_value, plain, read_yaml

REQUIRED = dataclasses.MISSING
LARGEST = 10**15  # larger numbers are slips, and overflow somewhere
MOST_EPOCHS, MOST_PROCESSES = 100_000, 1024  # more are slips of the hand
MOST_SEED = 2**32 - 1  # of numpy's legacy generators, which mmcv's transforms draw from
Group = TypeVar("Group", bound="OptionGroup")
groups_of = typing.get_type_hints  # of a dataclass of groups: they, by the names of its fields


def option(help: str, default: Any = REQUIRED, **more: Any) -> Any:
    """A field of an `OptionGroup`; without `default` it has to be given. more: see `Field`."""
    # A new option whose default keeps the older behaviour says nothing about older files.
    metadata = {"older": default, **more, "help": help, "default": default}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def option_of(group: type[OptionGroup], name: str, default: Any) -> Any:
    """A field that is the option `name` of another group, with a default of its own."""
    return option(**{**group.__dataclass_fields__[name].metadata, "default": default})


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


def read_layer(
    path: Path, groups: Iterable[type[OptionGroup]], *, elsewhere: Callable[[str], str] = lambda name: ""
) -> Layer:
    """A YAML file of options, in either spelling. Raises ValueError for a name that is none.

    elsewhere: says of such a name where it is one.
    """
    content = read_yaml(path)
    values = {key.replace("-", "_"): value for key, value in content.items()}
    if len(values) < len(content):
        raise ValueError(f"{path}: an option is given twice, with - and with _")
    check_names(values, fields_of(*groups), str(path), elsewhere=elsewhere)
    return Layer(values, str(path))


def make_all(groups: Mapping[str, type[OptionGroup]], layers: Iterable[Layer]) -> dict[str, Any]:
    """Each group by its name, made of all layers as a command makes it. Raises ValueError."""
    layers = list(layers)
    # Early ones first, by what was written of them alone: all others may depend on what they bring.
    for name, field in fields_of(*groups.values()).items():
        if field.early is not None:
            alone = [Layer({name: x.values[name]}, x.source) for x in layers if name in x.values]
            value = merge(groups.values(), alone).get(name, field.default)
            below = None if value is None else field.early(value)
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
            if name not in fields or (value is None and None not in fields[name].instead):
                continue
            try:
                judged = fields[name].judge(value)
            except ValueError as error:
                raise ValueError(f"{layer.source}: {error}" if layer.source else error) from None
            merged[name] = merged.get(name, {}) | judged if fields[name].is_mapping else judged
    return merged


def make(group: type[Group], values: Mapping[str, Any]) -> Group:
    """The group of judged values. Raises ValueError for one that has to be given and is not."""
    fields = fields_of(group)
    for name, field in fields.items():
        if name not in values and field.default is REQUIRED:
            raise ValueError(f"{field.flag} is missing: {field.help}")
    return group(**{name: values[name] for name in fields if name in values})


def older_values(*groups: type[OptionGroup], stored: Mapping[str, Any]) -> dict[str, Any]:
    """What each option counts as in a file with these values, which is older than the option."""
    fields = fields_of(*groups).items()
    return {name: field.counts_as(stored) for name, field in fields if field.older is not REQUIRED}


def decisive_values(*groups: OptionGroup) -> dict[str, Any]:
    """The options that decide what comes out, in plain values; those of speed and place are not."""
    decide = [(g, f.name) for g in groups for f in fields_of(type(g)).values() if not f.neutral]
    return {name: plain(getattr(group, name)) for group, name in decide}


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], older: Mapping[str, Any]) -> list[str]:
    """`name: stored -> wanted` for each that differs; older: what one not stored counts as."""
    pairs = {name: (stored.get(name, older.get(name)), wanted[name]) for name in wanted}
    unlike = {name: (a, b) for name, (a, b) in pairs.items() if _normal(a) != _normal(b)}
    return [f"{name}: {a} -> {b}" for name, (a, b) in unlike.items()]


def check_same(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], older: Mapping[str, Any], *, what: str,
    remedy: str = "use those, or another --output-dir",
) -> None:  # fmt: skip
    """Raise ValueError naming the settings in which `what` differs from what is wanted."""
    if found := differences(stored, wanted, older):
        shown = "; ".join(found[:5]) + " ..." * (len(found) > 5)
        raise ValueError(f"{what} was made with other settings ({shown}); {remedy}")


def _normal(value: Any) -> Any:
    """Comparable: 15, 15.0 and "15" are one number, as records and command lines write them."""
    if isinstance(value, Mapping):
        return {key: _normal(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_normal(item) for item in value]
    try:
        return str(value) if isinstance(value, bool) else float(value)  # True is not 1
    except (TypeError, ValueError):  # None, or a word
        return str(value)


def as_arguments(*groups: OptionGroup, below: Mapping[str, Any] | None = None) -> list[str]:
    """The words that make these groups again, less the defaults and what lies `below`: a recipe."""
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
                words += [field.flag, ",".join(map(str, value)) if field.several else str(value)]
    return words


def fields_of(*groups: type[OptionGroup]) -> dict[str, Field]:
    """The options of groups by name, in their order."""
    return _fields_of(*groups)  # type: ignore[arg-type]


@cache
def _fields_of(*groups: type[OptionGroup]) -> dict[str, Field]:
    found = {}
    for group in groups:
        hints = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            hint = hints[field.name]
            is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
            # The first is what a value is; then come words and None.
            kind, *others = typing.get_args(hint) if is_union else (hint,)
            words = [(None,) if one is types.NoneType else typing.get_args(one) for one in others]
            instead = tuple(word for some in words for word in some)
            several = typing.get_origin(kind) is tuple
            kind = typing.get_args(kind)[0] if several else kind
            found[field.name] = Field(
                name=field.name, kind=kind, several=several, instead=instead, **field.metadata
            )
    return found


@dataclass(frozen=True, kw_only=True)
class Field:
    """One option, as its dataclass field declares it, and the judge of its values.

    choices: the allowed words, where the type is not a Literal; asked when a value is judged, since
        plugins add some.
    at_least, above, at_most, below: the range of a number, or of each of several.
    parse: makes the value of what was written, where its type alone does not; raises ValueError.
    early: called with the value before any other option is judged: it may load what brings
        choices, or give a layer, such as a recipe, that lies below all that the user wrote.
    """

    name: str
    kind: Any  # its type; of a tuple, which is written with commas (`several`), that of the items
    several: bool
    instead: tuple[str | None, ...]  # of a value, as in `Path | Literal["random"] | None`
    help: str
    default: Any
    # What a file counts as that was written before this option existed, or a function of its values.
    older: Any
    choices: Callable[[], Iterable[str]] | None = None
    parse: Callable[[Any], Any] | None = None
    at_least: float | None = None
    above: float = -LARGEST
    at_most: float | None = None
    below: float = LARGEST
    neutral: bool = False  # it decides speed or place, not what comes out
    memory: bool = False  # a lower number of it, or the switch, needs less of a device's memory
    early: Callable[[Any], Layer | None] | None = None

    def counts_as(self, stored: Mapping[str, Any]) -> Any:
        """What it was in a file of these values that does not know it."""
        return self.older(stored) if callable(self.older) else self.older

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
        return tuple(self.choices()) if self.choices else ()

    def judge(self, value: Any) -> Any:
        """What was written, as text or as YAML has it, in the field's type; ValueError if not."""
        if value in self.instead:
            return value
        if self.is_mapping:
            return self._pairs(value)
        is_path = isinstance(value, str | Path | list | tuple)
        if not self.several or (self.kind is Path and not is_path):
            return self._item(value)
        # 15,30 on the command line and as a word of YAML, [15, 30] in YAML, 15 in both.
        is_list = isinstance(value, list | tuple)
        parts = value if is_list else map(str.strip, str(value).split(","))
        return tuple(map(self._item, parts))

    def _item(self, value: Any) -> Any:
        if words := self.words():
            return self._word(value, words)
        if self.parse is not None:
            try:
                return self.parse(value)
            except ValueError as error:
                raise _refusal(self.flag, value, str(error)) from None
        if self.kind is Path:
            return absolute_path(value, self.flag)
        # pydantic takes Python's 1_000, and true for 1; nobody who writes them means a number.
        if self.kind in (int, float) and (isinstance(value, bool) or "_" in str(value)):
            raise _refusal(self.flag, value, "give a number")
        try:
            return self._adapter.validate_python(value)
        except ValidationError as error:
            said = error.errors(include_url=False)[0]["msg"].replace("Input", "it")
            raise _refusal(self.flag, value, said) from None

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        """pydantic's judge of a number, a text or a switch."""
        kind = self.kind
        if kind in (int, float):
            limits = Limits(ge=self.at_least, gt=self.above, le=self.at_most, lt=self.below)
            kind = Annotated[kind, limits]
        strict = kind is bool  # else 1 and "yes" are true
        config = ConfigDict(strict=strict, coerce_numbers_to_str=True, allow_inf_nan=False)
        return TypeAdapter(kind, config=config)

    def _word(self, value: Any, words: Iterable[str]) -> str:
        if isinstance(value, bool):  # what YAML's readers often make of on and off
            value = "on" if value else "off"
        for word in words:  # four-channels is four_channels
            if word.replace("-", "_") == str(value).replace("-", "_"):
                return word
        raise _refusal(self.flag, value, f"choose one of {', '.join(words)}")

    def _pairs(self, value: Any) -> dict[str, Any]:
        if isinstance(value, Mapping):
            return {str(key).replace("-", "_"): item for key, item in value.items()}
        if not isinstance(value, list | tuple):
            raise _refusal(self.flag, value, "give `option: value` lines")
        pairs = {}
        for text in map(str, value):
            # `--pretrain=--base-lr=1`, too: so it stands in the other command.
            name, equals, given = text.strip().lstrip("-").partition("=")
            if not equals or not name.strip():
                raise _refusal(self.flag, text, "give KEY=VALUE")
            pairs[name.strip().replace("-", "_")] = parse_value(given, f"{self.flag} {text}")
        return pairs


def absolute_path(value: Any, flag: str) -> Path:
    """With ~ filled in; links stay as they are, so that data may move behind them. ValueError."""
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise _refusal(flag, value, "give a path")
    try:
        path = Path(os.path.abspath(Path(value).expanduser()))  # noqa: PTH100  (keeps links)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # whoever reads it will say so
            path.stat()  # OSError for a name that no disk takes, a link to itself, a folder that is closed
    except (RuntimeError, OSError) as error:  # the former: ~ of nobody
        raise _refusal(flag, value, f"give a path: {getattr(error, 'strerror', error)}") from None
    return path


def _refusal(flag: str, value: Any, allowed: str) -> ValueError:
    """The one form of an error: what was given, what is allowed."""
    return ValueError(f"{flag} is {shortened(repr(value), 80)}; {allowed}")


def load_plugin(path: Path) -> None:
    """Import the file, once; what it defines registers itself. Raises ValueError if it cannot."""
    name = f"segmae_plugin_{path.resolve()}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    is_pipe = path.exists() and not path.is_file()  # or the like: Python would wait for it
    if spec is None or spec.loader is None or is_pipe:
        raise ValueError(f"--plugin {path}: give a Python file")
    # Known before it runs, as any module is: pickle finds its classes by this name.
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        # Compiled here: importing would leave a __pycache__ beside the user's file, also of one that fails.
        code = compile(path.read_bytes(), str(path), "exec")
        with contextlib.redirect_stdout(sys.stderr):  # stdout may be for a program to read
            exec(code, vars(module))
    # It is the user's code: whatever it raises, the user can mend; an exit would look like success.
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(f"--plugin {path}: {type(error).__name__}: {error}") from error
