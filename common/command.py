"""Commands made of options: --config, --help by groups, and the groups as arguments."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from common.options import (
    REQUIRED,
    Field,
    Layer,
    OptionGroup,
    absolute_path,
    fields_of,
    item_type,
    make,
    merge,
    read_layer,
)
from common.plugins import load_plugin
from common.yamlfile import plain

# Dashes and underscores are the same.
CONTEXT: dict[str, Any] = {
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
}


class PathArgument(click.ParamType):
    """An argument that names a file or a folder; it stays as it was given."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Click's hook."""
        absolute_path(value, str(param.human_readable_name if param else "the argument"))
        return Path(value).expanduser()


PATH = PathArgument()


class OptionCommand(click.Command):
    """A command whose options are groups; its function gets them, made, as keyword arguments.

    own_layers: files of the part that lie below --config, such as a recipe; it gets what the
    command line and --config say.
    """

    def __init__(
        self,
        *args: Any,
        groups: Mapping[str, type[OptionGroup]],
        own_layers: Callable[[Mapping[str, Any]], Sequence[Layer]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.groups = groups
        self.own_layers = own_layers
        self.titles: dict[str, str] = {}
        self.plugins: list[str] = []
        text = "YAML file of `option: value` lines; the command line wins."
        self.params.append(click.Option(["--config"], metavar="FILE", help=text))
        for group in groups.values():
            for field in fields_of(group).values():
                self.params.append(_click_option(field, group.no_default))
                self.titles[field.name] = group.title
                self.plugins += [field.name] if field.spec.is_plugin else []

    def invoke(self, ctx: click.Context) -> Any:
        """Click's hook: makes the groups, then runs the function."""
        given = {name: ctx.params.pop(name) for name in self.titles}
        layers = [Layer({name: v for name, v in given.items() if v is not None and v != ()})]
        config = ctx.params.pop("config")
        groups = self.groups.values()
        if config is not None:
            layers.insert(0, read_layer(absolute_path(config, "--config"), groups))
        for name in self.plugins:  # before anything is judged: it may bring a choice
            named = [layer for layer in layers if layer.values.get(name) is not None]
            if named:
                alone = Layer({name: named[-1].values[name]}, named[-1].source)
                load_plugin(merge(groups, [alone])[name])
        if self.own_layers is not None:
            layers = [*self.own_layers(merge(groups, layers)), *layers]
        values = merge(groups, layers)
        ctx.params |= {name: make(group, values) for name, group in self.groups.items()}
        try:
            return super().invoke(ctx)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which need not be loaded
                raise
            what = str(error).partition(". GPU ")[0]  # then follow its numbers and torch's advice
            raise RuntimeError(f"{what}: {self._less_memory()}") from error

    def _less_memory(self) -> str:
        """What needs less of a device's memory."""
        fields = [f for f in fields_of(*self.groups.values()).values() if f.spec.memory]
        fields.sort(key=lambda field: field.kind is bool)  # what costs no time comes first
        advice = " or ".join(("give " if f.kind is bool else "lower ") + f.flag for f in fields)
        return f"{advice}; the result stays the same" if advice else "use a GPU that has more"

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Click's hook: --help has one section for each group."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                sections.setdefault(self.titles.get(str(param.name), "Options"), []).append(record)
        for title in dict.fromkeys([*self.titles.values(), "Options"]):
            if sections.get(title):
                with formatter.section(title):
                    formatter.write_dl(sections[title])


def command(
    parent: click.Group,
    name: str | None = None,
    *,
    own_layers: Callable[[Mapping[str, Any]], Sequence[Layer]] | None = None,
    epilog: str | None = None,
    **groups: type[OptionGroup],
) -> Callable[[Callable[..., Any]], click.Command]:
    """Decorator: a command of `parent` with these groups; click's own decorators may follow it."""
    return parent.command(
        name, cls=OptionCommand, groups=groups, own_layers=own_layers, epilog=epilog,
        context_settings=CONTEXT,
    )  # fmt: skip


def _click_option(field: Field, no_default: str) -> click.Option:
    """Click only collects the words; `merge` converts and judges them."""
    flag, note = field.flag, ""
    more: dict[str, Any] = {}
    shown = plain(field.default) if field.default is not REQUIRED else None
    if field.kind is bool:
        flag += f"/--no-{flag[2:]}"
        note = "default: on" if shown else ""
    elif field.is_mapping:
        more = {"multiple": True, "metavar": "KEY=VALUE"}
    else:
        if field.default is REQUIRED:
            note = no_default
        elif shown is not None and shown != []:
            text = ",".join(map(str, shown)) if isinstance(shown, list) else shown
            note = f"default: {text}"
        words, kind = field.words(), item_type(field.kind)
        metavar = f"[{'|'.join(words)}]" if words else "|".join([_METAVARS[kind], *field.instead])
        more = {"metavar": metavar + (",..." if typing.get_origin(field.kind) is tuple else "")}
    help_text = field.spec.help + (f"  [{note}]" if note else "")
    return click.Option([flag, field.name], default=None, help=help_text, **more)


_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
