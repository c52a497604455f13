"""Commands made of options: --config, --help by groups, and the groups as arguments."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from common.formats import plain
from common.options import (
    REQUIRED,
    Field,
    Layer,
    OptionGroup,
    absolute_path,
    fields_of,
    make_all,
    read_layer,
)

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
        # Only judged by it: error messages and outputs show the path as it was written.
        absolute_path(value, str(param.human_readable_name if param else "the argument"))
        return Path(value).expanduser()


PATH = PathArgument()


class OptionCommand(click.Command):
    """A command whose options are groups; its function gets them, made, as keyword arguments.

    Click only collects the words: `make_all` judges them, with those of --config, in one way.
    own: values that lie below all others, of a command that is another with other defaults.
    """

    def __init__(
        self, *, groups: Mapping[str, type[OptionGroup]], own: Mapping[str, Any], **more: Any
    ) -> None:
        super().__init__(**more)
        self.groups, self.own = groups, own
        self.titles = {f: group.title for group in groups.values() for f in fields_of(group)}
        text = "YAML file of `option: value` lines; the command line wins."
        self.params.append(click.Option(["--config"], metavar="FILE", help=text))
        for group in groups.values():
            self.params += [_click_option(f, group.no_default) for f in fields_of(group).values()]

    def invoke(self, ctx: click.Context) -> Any:
        """Click's hook: makes the groups, then runs the function."""
        given = {name: ctx.params.pop(name) for name in self.titles}
        # What is not given is None, or () where an option may stand several times.
        layers = [Layer({name: v for name, v in given.items() if v is not None and v != ()})]
        config = ctx.params.pop("config")
        if config is not None:
            path = absolute_path(config, "--config")
            layers.insert(0, read_layer(path, self.groups.values()))
        ctx.params |= make_all(self.groups, [Layer(self.own), *layers])
        try:
            return super().invoke(ctx)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which need not be loaded
                raise
            what = str(error).partition(". GPU ")[0]  # then follow its numbers and torch's advice
            raise RuntimeError(f"{what}: {self._less_memory()}") from error

    def _less_memory(self) -> str:
        """What needs less of a device's memory."""
        fields = [f for f in fields_of(*self.groups.values()).values() if f.memory]
        fields.sort(key=lambda field: field.kind is bool)  # what costs no time comes first
        advice = " or ".join(("give " if f.kind is bool else "lower ") + f.flag for f in fields)
        return f"{advice}; the result stays the same" if advice else "use a GPU that has more"

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Click's hook: --help has one section for each group."""
        # Groups of one title share a section; click's own options come last.
        sections: dict[str, list[tuple[str, str]]] = {
            title: [] for title in (*self.titles.values(), "Options")
        }
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                sections[self.titles.get(str(param.name), "Options")].append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def command(
    parent: click.Group,
    name: str | None = None,
    *,
    own: Mapping[str, Any] | None = None,
    epilog: str | None = None,
    **groups: type[OptionGroup],
) -> Callable[[Callable[..., Any]], click.Command]:
    """Decorator: a command of `parent` with these groups; click's own decorators may follow it."""
    return parent.command(
        name, cls=OptionCommand, groups=groups, own=own or {}, epilog=epilog,
        context_settings=CONTEXT,
    )  # fmt: skip


TIMED_STEPS = 20  # of --dry-run time


def dry_run(*kinds: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: --dry-run, which answers a question in place of the work; `kinds`: which ones.

    check: whether the work could begin, options, paths and checkpoints included. time: seconds of
    some real steps, as JSON. Neither writes anything.
    """
    metavar = f"[{'|'.join(kinds)}]"
    text = "check: judge everything, write nothing."
    text += " time: time some steps, too, and print seconds as JSON." if "time" in kinds else ""
    return click.option("--dry-run", type=click.Choice(kinds), metavar=metavar, help=text)


def _click_option(field: Field, no_default: str) -> click.Option:
    flag, note = field.flag, ""
    more: dict[str, Any] = {}
    default = None if field.default is REQUIRED else plain(field.default)
    if field.kind is bool:
        # Both ways, since a file of --config may have it on.
        flag += f"/--no-{flag[2:]}"
        note = "default: on" if default else ""
    elif field.is_mapping:
        more = {"multiple": True, "metavar": "KEY=VALUE"}
    else:
        if field.default is REQUIRED:
            note = no_default
        elif default not in (None, []):
            note = f"default: {','.join(map(str, default)) if field.several else default}"
        words = field.words()
        kinds = "|".join([_METAVARS.get(field.kind, "TEXT"), *field.instead])
        metavar = f"[{'|'.join(words)}]" if words else kinds
        more = {"metavar": metavar + (",..." if field.several else "")}
    help_text = field.help + (f"  [{note}]" if note else "")
    # No default for click: what is not given must not hide what a recipe or --config says.
    return click.Option([flag, field.name], default=None, help=help_text, **more)


_METAVARS = {int: "N", float: "X", Path: "PATH"}
