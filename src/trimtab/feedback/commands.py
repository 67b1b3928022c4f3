"""What `trimtab feedback agreement` and `trimtab feedback cost` print and write."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trimtab.core.errors import ConfigError, DataError
from trimtab.core.files import write_out
from trimtab.core.terminal import printable, visible
from trimtab.feedback import agreement_page, campaign
from trimtab.feedback.campaign import Campaign
from trimtab.feedback.vote_files import read_votes
from trimtab.reports.page import write
from trimtab.votes.study import Study, study

if TYPE_CHECKING:
    from trimtab.feedback.store import Store


def agreement(
    source: str,
    *,
    out: Path | None,
    columns: str,
    annotator_columns: str,
    missing: str,
    order: str,
    as_given: bool,
    seed: int,
) -> None:
    """Prints the agreement of a source's votes, writes a page about it and, beside the page, the figures as JSON."""
    name = Path(source).name.partition(".")[0] or "votes"
    page = out or Path(f"{name}-agreement.html")
    figures = page.with_suffix(".json")
    if page == figures or Path(source).resolve() in (page.resolve(), figures.resolve()):
        raise ConfigError(
            f"the page {str(page)!r} and its figures {str(figures)!r} would replace each other or the votes",
            where="--out",
            fix="name a page, such as agreement.html, whose name with .json is free",
        )
    votes = read_votes(
        source,
        columns=parse_columns(columns),
        annotator_columns=_names(annotator_columns),
        missing=_names(missing),
        order=_names(order),
    )
    found = study(votes, as_given=as_given, seed=seed)
    for line in _study_lines(found):
        click.echo(visible(line))
    page.parent.mkdir(parents=True, exist_ok=True)
    write(agreement_page.page_of(found, title=Path(source).name), page)
    told = found.to_dict() | {"command": shlex.join(["trimtab", *sys.argv[1:]])}
    write_out(figures, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    click.echo(f"page: {page}\nfigures: {figures}")


def cost(plan: Campaign, *, half_width: float, votes_per_item: int, pilot: str) -> None:
    """Prints what a campaign costs, what it can show and what is assumed."""
    if not 0 < half_width < 0.5:
        raise ConfigError(f"half_width is {half_width}", where="trimtab feedback cost", fix="make it such as 0.03")
    for line in _cost_lines(plan, half_width, votes_per_item, pilot):
        click.echo(line)


def _study_lines(found: Study) -> list[str]:
    lines = [agreement_page.counted(found), ""]
    rows: list[Sequence[str]] = [
        (one.name, one.text + (f"  ({one.note})" if one.note else "")) for one in found.coefficients
    ]
    if found.noise is not None:
        rows.append((found.noise.name, found.noise.text))
    lines += _aligned(rows)
    if found.slices:
        lines += ["", "by slice", *_aligned([(name, raw.text, alpha.text) for name, raw, alpha in found.slices])]
    flagged = [(card.name, flag) for card in found.annotators for flag in card.flags]
    if flagged:
        lines += ["", "to look at", *_aligned(flagged)]
    if found.ladder is not None:
        rated = [(player.name, player.text, f"{player.elo.count} games") for player in found.ladder.players]
        lines += ["", "ratings", *_aligned(rated)]
    if found.notes:
        lines += ["", *(f"note: {note}" for note in found.notes)]
    return [*lines, ""]


def _cost_lines(plan: Campaign, half_width: float, votes_per_item: int, pilot: str) -> list[str]:
    p, q = plan.vote_accuracy, plan.label_accuracy
    items = campaign.items_for_agreement(half_width, agreement=plan.agreement, votes_per_item=votes_per_item)
    lines = _aligned(
        [
            ("judgements", f"{plan.judgements:,}", f"{plan.items:,} items × {plan.overlap:g}, with checks"),
            ("price of one", f"{plan.price_per_judgement:,.2f}", "with the platform's fee"),
            ("cost", f"{plan.cost:,.0f}", f"{plan.cost / plan.items:,.2f} for an item"),
            ("work", f"{plan.hours:,.0f} h", f"{plan.days:,.1f} days of {plan.annotators} people"),
            ("a vote is right", f"{p:.3f}", f"from an agreement of {plan.agreement:g}"),
            ("a label is right", f"{q:.3f}", "majority of its votes"),
            ("effective items", f"{plan.effective_items:,.0f}", "items × (2q - 1)²"),
        ]
    )
    overlaps = [
        (f"{r['overlap']:g} votes", f"{r['items']:,.0f} items", f"label {r['label_accuracy']:.3f}",
         f"{r['effective_items']:,.0f} effective")
        for r in campaign.overlaps_for_the_money(plan)
    ]  # fmt: skip
    lines += ["", "the same money, spread otherwise", *_aligned(overlaps)]
    lines += [
        "",
        f"for ±{half_width:g} (95%)",
        *_aligned(
            [
                ("a win rate", f"{campaign.items_for_win_rate(half_width):,} independent judgements"),
                ("raw agreement", f"{items:,} items with {votes_per_item} votes each"),
            ]
        ),
        "",
        "expected reward model",
    ]
    if pilot:
        points = campaign.parse_pilot(pilot)
        curve = campaign.fit_learning_curve(points, highest=p)
        now, then = points[-1][0], points[-1][0] + plan.effective_items / (2 * p - 1) ** 2
        gain = curve.accuracy(then) - curve.accuracy(now)
        lines += [
            f"  acc(n) = {curve.limit:.3f} - {curve.scale:.3f} n^-{curve.exponent:.2f}, fitted to the pilot; n counts "
            "single-vote items",
            f"  {now:,.0f} → {then:,.0f} items: {curve.accuracy(now):.3f} → {curve.accuracy(then):.3f} ({gain:+.3f}, "
            f"{100_000 * gain / plan.cost if plan.cost else math.inf:.2f} points for each 1,000 spent)",
        ]
    else:
        lines += [
            "  acc(n) = a - b n^-c: needs a pilot, --pilot ITEMS:ACCURACY,…, of reward models trained on parts of what "
            "you have",
            f"  without one: a ≤ {p:.3f} on single votes; at c = 0.5, four times the effective items halve what is "
            "missing to a",
        ]
    return [*lines, "", "assumed", *(f"  - {text}" for text in campaign.ASSUMPTIONS)]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def item_lines(store: Store, item_id: int) -> list[str]:
    """An item as text: its prompt, its replies by the letters or numbers that a decision names, and what was said."""
    import sqlalchemy as sa

    from trimtab.feedback import tables as t
    from trimtab.feedback.board import said_of
    from trimtab.feedback.votes import cast_votes

    with store.read() as connection:
        item = connection.execute(sa.select(t.items).where(t.items.c.id == item_id)).first()
        casts = list(cast_votes(connection, purposes=("task", "adjudication"), items=[item_id]))
    if item is None:
        raise DataError(
            f"there is no item {item_id}", where="trimtab feedback adjudicate", fix="see the list without ITEM"
        )
    lines = [f"{turn['role']}:\n{visible(turn['content'])}\n" for turn in item.prompt["messages"]]
    names = "AB" if item.kind == "pairs" else [str(i + 1) for i in range(len(item.replies))]
    lines += [f"{name}:\n{visible(reply['text'])}\n" for name, reply in zip(names, item.replies, strict=False)]
    for cast in casts:
        words = " ".join(filter(None, (cast.answer.rationale, cast.answer.reason)))
        decided = "decision, " if cast.purpose == "adjudication" else ""
        lines.append(f"{decided}{printable(cast.annotator)}: {said_of(cast)}  {printable(words)}".rstrip())
    return lines


def refuse_idle_options(source: str | None, model: str | None) -> None:
    """Raises ConfigError for options of `feedback import` that would do nothing: how to read a source that is not
    named, how to sample without a model, or columns of samples, which have names of their own."""
    context, typed = click.get_current_context(), click.core.ParameterSource.COMMANDLINE
    options = [option for option in context.command.params if isinstance(option, click.Option)]
    given = {
        option.opts[0]: option.name
        for option in options
        if option.name is not None and context.get_parameter_source(option.name) is typed
    }
    of_sampling = ("num_samples", "temperature", "max_new_tokens", "seed")
    where, fix = "trimtab feedback import", "name what they are for, or leave them away"
    if idle := [option for option, name in given.items() if source is None or (model is None and name in of_sampling)]:
        missing = "SOURCE" if source is None else "--model"
        raise ConfigError(f"{', '.join(idle)} without {missing}", where=where, fix=fix)
    if model is not None and "--columns" in given:
        fix = f"name columns of the prompts behind the source: {source}?columns=question:prompt"
        raise ConfigError("--columns with --model", where=where, fix=fix)


def parse_columns(text: str) -> dict[str, str]:
    """The column for each name in "item=COLUMN,choice=COLUMN". Raises ConfigError for anything else."""
    found = {}
    for part in _names(text):
        name, equals, column = part.partition("=")
        if not (name and equals and column):
            fix = "write NAME=COLUMN,NAME=COLUMN, such as item=id,choice=winner"
            raise ConfigError(f"{part!r} names no column", where="--columns", fix=fix)
        found[name.strip()] = column.strip()
    return found


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
