"""What is asked before a run: how many seeds it takes (`power`), and what it is to answer (`freeze`)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from common.command import PATH, command
from common.console import say
from pipeline.launch.estimate import with_hours
from pipeline.plan.check import checked_plan
from pipeline.plan.layout import Layout
from pipeline.plan.settings import GROUPS, Settings
from pipeline.plan.step import PARTS


def add_to(main: click.Group, settings_of: Callable[[dict[str, Any]], Settings]) -> None:
    """Adds the two commands. settings_of: makes the settings of what the command line gave."""

    @command(main, "freeze", passed_on=PARTS, **GROUPS)
    @click.option("--primary", metavar="A-B,...", required=True, help="The differences that are asked for.")
    def freeze(primary: str, **groups: Any) -> None:
        """Write preregistration.yml, given a run's flags: what is asked, and by what, before it is run."""
        from pipeline.plan.preregistration import write_frozen

        settings = with_hours(settings_of(groups))
        paths = Layout(settings.data.output_dir)
        digest = write_frozen(paths, settings, checked_plan(settings), primary)
        say(f"{paths.preregistration}\ndigest {digest}")

    @main.command()
    @click.argument("folder", type=PATH, required=False)
    @click.option("--effect", type=float, required=True, help="The difference that matters, in points.")
    @click.option("--primary", metavar="A-B", help="Of which lines.  [default: the mean of all pairs]")
    def power(folder: Path | None, effect: float, primary: str | None) -> None:
        """Say how many seeds, and hours, show a difference, by a pilot in FOLDER or published spreads."""
        from pipeline.report.power import power_text

        say(power_text(Layout(folder.resolve()) if folder else None, effect, primary))
