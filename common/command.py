"""Commands made of options: --config, --help by groups, and the groups as arguments."""

import re
from collections.abc import Callable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import click

from common.options import REQUIRED, Field, Layer, OptionGroup, absolute_path, fields_of, make_all, read_layer

# Dashes and underscores are the same.
CONTEXT: dict[str, Any] = {
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
}


class PathArgument(click.ParamType):
    """An argument that names a file or a folder."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Click's hook."""
        # Only judged by it: error messages and outputs show the path as it was written.
        absolute_path(value, str(param.human_readable_name if param else "the argument"))
        return Path(value).expanduser()


PATH = PathArgument()


def command(
    parent: click.Group, name: str | None = None, *, own: Mapping[str, Any] | None = None,
    passed_on: Mapping[str, Mapping[str, type[OptionGroup]]] | None = None, **groups: type[OptionGroup],
) -> Callable[[Callable[..., Any]], click.Command]:  # fmt: skip
    """Decorator: a command of `parent` with these groups. own: other defaults than theirs.

    passed_on: an option of KEY=VALUE pairs -> the groups whose options these are.
    """
    return parent.command(name, cls=OptionCommand, groups=groups, own=own or {}, passed_on=passed_on or {})


def dry_run(*kinds: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: --dry-run, which answers a question in place of the work; `kinds`: which ones."""
    text = "check: judge everything, write nothing."
    text += " time: time some steps, too, and print seconds as JSON." if "time" in kinds else ""
    metavar = f"[{'|'.join(kinds)}]"
    return click.option("--dry-run", type=click.Choice(kinds), metavar=metavar, help=text)


class OptionCommand(click.Command):
    """A command whose options are groups; its function gets them, made, as keyword arguments."""

    # Click only collects the words: `make_all` judges them, with those of --config, in one way.

    def __init__(
        self, *, groups: Mapping[str, type[OptionGroup]], own: Mapping[str, Any],
        passed_on: Mapping[str, Mapping[str, type[OptionGroup]]], **more: Any
    ) -> None:  # fmt: skip
        super().__init__(context_settings=CONTEXT, **more)
        self.groups, self.own, self.passed_on = groups, own, passed_on
        self.titles = {f: group.title for group in groups.values() for f in fields_of(group)}
        text = "YAML file of `option: value` lines; the command line wins."
        self.params.append(click.Option(["--config"], metavar="FILE", help=text))
        for group in groups.values():
            self.params += [_click_option(f, group.no_default) for f in fields_of(group).values()]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Click's hook: says how an option of a part is given, and several values."""
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            flag = str(error.option_name)
            after = next(
                (i + 1 for i, w in enumerate(words) if w.partition("=")[0].replace("_", "-") == flag), 0
            )
            value = words[after - 1].partition("=")[2] or next(iter(words[after:]), "...")
            if said := self.where_it_is(flag.lstrip("-"), "..." if value.startswith("--") else value):
                raise click.UsageError(f"{flag} is no option here, {said}") from None
            raise
        except click.UsageError as error:
            extra = re.fullmatch(r"Got unexpected extra arguments? \((.*)\)", error.message)
            several = {f.flag for f in fields_of(*self.groups.values()).values() if f.several}
            for flag, value, *more in (words[i:] for i in range(len(words) - 2)):
                if extra and flag.replace("_", "-") in several and more[0] == extra[1].split()[0]:
                    given = ",".join(takewhile(lambda word: not word.startswith("-"), (value, *more)))
                    raise click.UsageError(f"several values are given with commas: {flag} {given}") from None
            if extra:
                raise click.UsageError(
                    f"{extra[1]}: no word stands alone here; give --option value"
                ) from None
            raise

    def where_it_is(self, name: str, value: str = "...") -> str:
        """How an option of a part is passed on; empty for one that no part has."""
        key = name.replace("-", "_")
        places = [
            f"--{section} {key}={value}"
            for section, groups in self.passed_on.items()
            if key in fields_of(*groups.values())
        ]
        return f"but one of a part: {' or '.join(places)}" if places else ""

    def invoke(self, ctx: click.Context) -> Any:
        """Click's hook: makes the groups, then runs the function."""
        given = {name: ctx.params.pop(name) for name in self.titles}
        # What is not given is None, or () where an option may stand several times.
        layers = [Layer({name: v for name, v in given.items() if v is not None and v != ()})]
        if (config := ctx.params.pop("config")) is not None:
            path = absolute_path(config, "--config")
            layers.insert(0, read_layer(path, self.groups.values(), elsewhere=self.where_it_is))
        ctx.params |= make_all(self.groups, [Layer(self.own), *layers])
        try:
            return super().invoke(ctx)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which need not be loaded
                raise
            what = str(error).partition(". GPU ")[0]  # then follow its numbers and torch's advice
            fields = [f for f in fields_of(*self.groups.values()).values() if f.memory]
            fields.sort(key=lambda field: field.kind is bool)  # what costs no time comes first
            advice = " or ".join(("give " if f.kind is bool else "lower ") + f.flag for f in fields)
            # Whoever is in the middle of a study has to know that it stays comparable.
            advice = f"{advice}; the result stays the same" if advice else "use a GPU that has more"
            raise RuntimeError(f"{what}: {advice}") from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Click's hook: --help has one section for each title of groups, click's own come last."""
        titles = (*self.titles.values(), "Options")
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in titles}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                sections[self.titles.get(str(param.name), "Options")].append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _click_option(field: Field, no_default: str) -> click.Option:
    flag, default = field.flag, field.default
    more: dict[str, Any] = {}
    said = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    note = f"  [default: {'on' if default is True else said}]"
    if default is REQUIRED:
        note = f"  [{no_default}]"
    elif said in ("None", "", "{}", "False"):  # it goes without saying
        note = ""
    if field.kind is bool:
        flag += f"/--no-{flag[2:]}"  # both ways, since a file of --config may have it on
    elif field.is_mapping:
        more = {"multiple": True, "metavar": "KEY=VALUE"}
    else:
        kinds = "|".join([_METAVARS.get(field.kind, "TEXT"), *filter(None, field.instead)])
        metavar = f"[{'|'.join(field.words())}]" if field.words() else kinds
        more = {"metavar": metavar + (",..." if field.several else "")}
    # No default for click: what is not given must not hide what a recipe or --config says.
    return click.Option([flag, field.name], default=None, help=field.help + note, **more)


_METAVARS = {int: "N", float: "X", Path: "PATH"}
