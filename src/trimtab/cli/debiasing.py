"""The command `trimtab debias`."""

from __future__ import annotations

from typing import Any

import click

from trimtab.cli.helpers import Number, on_bad_row


@click.command()
@click.argument("model")
@click.argument("data", nargs=-1, required=True, metavar="DATA...")
@click.option(
    "--bandwidth",
    default=0.5,
    show_default=True,
    type=Number(min=0, max=1, min_open=True),
    help="The share of the replies that each local line of LOWESS is fitted to.",
)
@on_bad_row
@click.option("--device", metavar="DEVICE", help='Where the model computes: "cpu", "cuda" or for example "cuda:1".')
def debias(**options: Any) -> None:
    """Fit what the reward model MODEL pays for length, so that it can be subtracted.

    DATA are replies, or pairs of them, that it was not trained on. Both curves (regression, LOWESS) are written into
    the directory of the model, and rewards that name it use one with length_correction = "lowess".
    """
    from trimtab.stages import debias as debiasing

    for sentence in debiasing.debias(**options):
        click.echo(sentence)
