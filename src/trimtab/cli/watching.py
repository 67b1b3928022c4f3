"""The commands that look at runs: `trimtab report`, for a page that stands alone, and `trimtab ui`, for live ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from trimtab.cli.helpers import FILE
from trimtab.cli.tables import add_row, new_table
from trimtab.core.terminal import printable

_PAGE = "page"


class ReportCommands(click.Group):
    """Commands of which one needs no name: `trimtab report DIR` is `trimtab report page DIR`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses the arguments, with the name of the page's command put before them if they begin with none."""
        named = not args or args[0] in self.commands or args[0] in ctx.help_option_names
        return super().parse_args(ctx, args if named else [_PAGE, *args])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of the first argument, or that of the page if the first argument is a directory."""
        return super().resolve_command(ctx, args if args[0] in self.commands else [_PAGE, *args])

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the two ways to call it."""
        formatter.write_usage(ctx.command_path, "DIRECTORY [--out PAGE]")
        formatter.write_usage(ctx.command_path, "diff A B [--out PAGE]")


@click.group(cls=ReportCommands)
def report() -> None:
    """Write the page of a run or a pipeline, or of what changed between two."""


@report.command(_PAGE)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--out", type=FILE, help="The page.  [default: report.html in the directory]")
@click.option(
    "--json",
    "json_out",
    type=FILE,
    help="The dossier, what the page shows as JSON.  [default: report.json in the directory, without --out]",
)
@click.option(
    "--suite",
    "suites",
    multiple=True,
    type=FILE,
    help="Results of `trimtab eval SUITE MODEL BASELINE --out FILE`, for the page and the dossier.",
)
@click.option(
    "--agreement",
    "agreements",
    multiple=True,
    type=FILE,
    help="Figures that `trimtab feedback agreement` has written beside its page.",
)
def page(directory: Path, out: Path | None, json_out: Path | None, **beside: tuple[Path, ...]) -> None:
    """Write the page of a run or a pipeline, and its dossier as JSON; the name of this command may be left out.

    Both hold, for every figure, the command that repeats it.
    """
    from trimtab.reports.dossier import write_dossier

    if json_out is None and out is None:
        json_out = directory / "report.json"
    write_report(directory, out, **beside)
    if json_out is not None:
        click.echo(f"dossier: {write_dossier(directory, json_out, **beside)}")


@report.command()
@click.argument("first", type=click.Path(path_type=Path), metavar="A")
@click.argument("second", type=click.Path(path_type=Path), metavar="B")
@click.option("--out", type=FILE, help="A page with the curves of both.")
def diff(first: Path, second: Path, out: Path | None) -> None:
    """Tell what changed from run A to run B, and whether it is more than noise.

    Settings, hashes of data and models, versions, last figures. Scores of the samples are compared prompt by prompt.
    """
    from trimtab.core.files import check_out
    from trimtab.reports.collect import collect
    from trimtab.reports.difference_page import difference_page
    from trimtab.reports.page import write

    check_out(out)
    found = difference_page(collect(first), collect(second))
    for section in found.sections:
        if section.title:
            click.echo(f"\n# {printable(section.title)}")
        _show(section.parts)
    if out is not None:
        click.echo(f"page: {write(found, out)}")


def _show(parts: Any) -> None:
    """Texts and tables of a page on the terminal; its charts are for the page alone."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=140, highlight=False)
    heading = ""
    for part in parts:
        if part.kind == "text" and part.voice == "heading":
            heading = part.text
            continue
        if part.kind in ("text", "table") and heading:
            console.print(Text(f"\n{heading}"))
            heading = ""
        if part.kind == "text":
            console.print(Text(f"  {printable(part.text)}"))
        elif part.kind == "table":
            table = new_table(*part.head)
            for row in part.rows:
                add_row(table, *map(str, row))
            console.print(table)


def write_report(directory: Path, out: Path | None = None, **beside: tuple[Path, ...]) -> None:
    """Writes the page of a run or a pipeline, and says where it is."""
    from trimtab.reports import run_page

    click.echo(f"report: {run_page.write_report(directory, out, **beside)}")


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="An address of this machine alone.")
@click.option("--port", default=8790, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
def ui(directory: Path, host: str, port: int) -> None:
    """Watch all runs below a directory in a browser, also while they run.

    It only reads. Curves and samples come as they are written; runs can be compared, and asked to stop.
    """
    from trimtab.ui.serve import serve

    serve(directory, host=host, port=port, show=click.echo)
