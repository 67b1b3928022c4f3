"""The commands of `trimtab feedback` that keep a project. Nothing heavy is imported until one of them runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import trimtab
from trimtab.core.terminal import printable

if TYPE_CHECKING:
    from trimtab.feedback.items import Purpose
    from trimtab.feedback.labels import LabelSplit
    from trimtab.feedback.people import PersonRole, State

_project = click.argument("project", type=click.Path(path_type=Path))
_file = click.Path(dir_okay=False, path_type=Path)
DEFAULT_PROJECT = Path("feedback/project.toml")


def add_to(group: click.Group) -> None:
    """Adds the commands to the group. Its object (`ctx.obj`) is called to sample replies of a model."""
    for command in (
        init, serve, import_, export, status, invite, people, token, adjudicate, guideline, queue, scores, simulate,
        audit, backup, agreement, cost,
    ):  # fmt: skip
        group.add_command(command)


def _open(project: Path, *, must_exist: bool = True) -> Any:
    from trimtab.feedback.store import open_store

    return open_store(project, must_exist=must_exist)


def _tell(counts: dict[str, int]) -> None:
    click.echo(", ".join(f"{num} {name.replace('_', ' ')}" for name, num in counts.items()) or "nothing")


@click.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path), default=DEFAULT_PROJECT.parent)
def init(directory: Path) -> None:
    """Write a project to begin with: its settings and a guideline."""
    _copy_example(directory)


def _copy_example(directory: Path) -> None:
    from trimtab.core.errors import ConfigError

    names = ("project.toml", "guideline.md", "reward.toml")
    if there := [name for name in names if (directory / name).exists()]:
        raise ConfigError(
            f"{str(directory)!r} holds {', '.join(there)} already",
            where="trimtab feedback init",
            fix="name a new folder, or move them aside",
        )
    package = Path(trimtab.__file__).parent
    examples = package / "examples" if (package / "examples").is_dir() else package.parents[1] / "examples"
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(examples / "feedback" / name, directory / name)
    click.echo(f"{directory / 'project.toml'}: edit it, then trimtab feedback serve {directory / 'project.toml'}")


@click.command()
@click.argument("project", type=click.Path(path_type=Path), required=False)
@click.option("--host", help="Address to listen on.  [the project's: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on; 0 takes a free one.  [8765]")
def serve(project: Path | None, host: str | None, port: int | None) -> None:
    """Serve the pages of a project.

    Without PROJECT it is feedback/project.toml, which is made from the example if there is none.
    """
    from trimtab.feedback.server import serve as serving

    if project is None:
        project = DEFAULT_PROJECT
        if not project.is_file():
            _copy_example(project.parent)
    serving.serve(project, host=host, port=port, show=click.echo)


@click.command("import")
@_project
@click.argument("source", required=False)
@click.option("--gold", "purpose", flag_value="gold", help="Hidden items with an expected answer.")
@click.option("--quiz", "purpose", flag_value="quiz", help="Questions of the quiz, with an expected answer.")
@click.option("--slice", "part", default="", help="Name of the slice of rows that name none.")
@click.option("--with-votes", is_flag=True, help="Take the choices of a comparisons file as votes.")
@click.option("--columns", default="", help="The file's columns: prompt=question,response_a=first,choice=winner.")
@click.option("--on-bad-row", type=click.Choice(["stop", "drop"]), default="stop", show_default=True)
@click.option("--limit", type=click.IntRange(min=1), help="Read only the first rows.")
@click.option("--model", help="Sample replies of this checkpoint to the prompts of SOURCE (needs trimtab[train]).")
@click.option(
    "--num-samples", type=click.IntRange(min=1), default=2, show_default=True, help="Replies sampled of each prompt."
)
@click.option("--temperature", default=1.0, show_default=True)
@click.option("--max-new-tokens", default=256, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.pass_obj
def import_(
    sample: Callable[..., object],
    project: Path,
    source: str | None,
    purpose: Purpose | None,
    part: str,
    with_votes: bool,
    columns: str,
    on_bad_row: str,
    limit: int | None,
    model: str | None,
    num_samples: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> None:
    """Add items: a file in any layout, samples of `trimtab generate`, a dump, a world or a checkpoint.

    Without SOURCE, the project's own data is imported.
    """
    from trimtab.feedback import importing
    from trimtab.feedback.commands import parse_columns, refuse_idle_options

    refuse_idle_options(source, model)
    store = _open(project, must_exist=False)
    if source is None:
        _tell(importing.seed_items(store) or {"new items: the project's data is in the store": 0})
        return
    options = importing.Options(
        purpose=purpose or "task",
        slice=part,
        with_votes=with_votes,
        on_bad_row=on_bad_row,
        limit=None if model else limit,  # of a model's prompts, each of which has several samples
        columns=parse_columns(columns),
    )
    if model is None:
        _tell(importing.import_source(store, source, options))
        return
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        sampled = Path(folder) / "samples.jsonl"
        sampling = {"temperature": temperature, "max_new_tokens": max_new_tokens, "top_p": 1.0, "top_k": 0}
        drawn = {"model": model, "num_samples": num_samples, "seed": seed, "limit": limit, **sampling}
        sample(data=source, prompt=None, out=sampled, **drawn)
        origin = {"model": model, "sampling": sampling, "seed": seed}
        rows = [json.loads(line) | origin for line in sampled.read_text(encoding="utf-8").split("\n") if line]
        sampled.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        _tell(importing.import_source(store, str(sampled), options))


@click.command()
@_project
@click.option("--layout", default="preference", show_default=True, help="See `trimtab feedback export --list`.")
@click.option("--out", type=_file, help="File to write: .jsonl, .csv or .parquet.  [LAYOUT.jsonl]")
@click.option("--split", type=click.Choice(["all", "train", "held_out"]), default="all", show_default=True)
@click.option("--list", "show_layouts", is_flag=True, help="Say what each layout holds.")
def export(project: Path, layout: str, out: Path | None, split: LabelSplit, show_layouts: bool) -> None:
    """Write what people said, in a layout that trainers read or without loss, with a card of where it comes from."""
    from trimtab.core.errors import ConfigError
    from trimtab.feedback import exporting

    if show_layouts:
        for name, what in exporting.LAYOUTS.items():
            click.echo(f"{name:15} {what}")
        return
    if layout not in exporting.LAYOUTS:
        raise ConfigError(f"no layout {layout!r}", where="--layout", fix=f"use {', '.join(exporting.LAYOUTS)}")
    out = out or Path(f"{layout}.jsonl")
    card = exporting.write_export(_open(project), layout, out, split=split)
    click.echo(f"{out}: {card['counts']['rows']} rows")
    if not card["counts"]["rows"]:
        click.echo(f"nothing of what {layout!r} holds was collected yet; --list says what that is")
    if counted := {name: num for name, num in card["counts"].items() if name != "rows"}:
        _tell(counted)


@click.command()
@_project
@click.option("--json", "as_json", is_flag=True, help="Everything the board shows, as JSON.")
def status(project: Path, as_json: bool) -> None:
    """Say how far a project is: the board as text."""
    from trimtab.feedback.board import make_board

    board = make_board(_open(project), num_resamples=1000)
    if as_json:
        click.echo(json.dumps(board.to_dict(), indent=2))
        return
    c = board.counts
    click.echo(f"{c['answers']} of {c['answers_wanted']} answers, {c['items_full']} of {c['items']} items complete")
    if board.study is not None:
        for k in board.study.coefficients:
            click.echo(f"{k.name}: {k.text}")
    click.echo(f"gold items as expected: {board.gold}" if board.gold.count else "no gold items answered")
    for row in board.rows:
        remarks = f"  ({'; '.join(row.flags)})" if row.flags else ""
        click.echo(f"{row.person_id:4} {printable(row.name):24} {row.state:8} {row.votes:6} answers{remarks}")


@click.command()
@_project
@click.option(
    "--role", type=click.Choice(["annotator", "adjudicator", "admin"]), default="annotator", show_default=True
)
@click.option("--uses", default=1, show_default=True, type=click.IntRange(1, 1000), help="People who can join with it.")
@click.option("--hours", default=168.0, show_default=True, help="How long it is good for.")
@click.option("--address", help="Address of the server, for a whole link.")
@click.option("--list", "show_open", is_flag=True, help="List the invitations and links that can still be used.")
@click.option("--revoke", type=int, help="Make the invitation of this number useless.")
def invite(
    project: Path, role: PersonRole, uses: int, hours: float, address: str | None, show_open: bool, revoke: int | None
) -> None:
    """Make an invitation, or list or revoke them."""
    from trimtab.feedback import people

    store = _open(project, must_exist=False)
    if revoke is not None:
        people.revoke_invite(store, revoke)
    if show_open or revoke is not None:
        for row in people.open_invites(store):
            click.echo(f"{row.id:4} {row.role:12} {row.uses_left:4} uses  {printable(row.name or '')}".rstrip())
        return
    click.echo(f"{_join_address(store, address)}#{people.make_invite(store, role, uses=uses, hours=hours)}")


@click.command()
@_project
@click.argument("name", required=False)
@click.option("--state", type=click.Choice(["active", "paused", "banned"]), help="Let in, pause or ban NAME.")
@click.option("--role", type=click.Choice(["annotator", "adjudicator", "admin"]), help="Give NAME another role.")
@click.option("--link", is_flag=True, help="Make a link with which NAME sets a new password.")
@click.option("--links", is_flag=True, help="Make such a link for everybody who has no password.")
@click.option("--sign-out", is_flag=True, help="End NAME's sessions and tokens.")
@click.option("--address", help="Address of the server, for whole links.")
@click.option("--delete", is_flag=True, help="Delete NAME's name and words; their choices stay without a name.")
def people(
    project: Path, name: str | None, state: State | None, role: PersonRole | None, link: bool, links: bool,
    sign_out: bool, address: str | None, delete: bool,
) -> None:  # fmt: skip
    """List people, or change one: state, role, password, sessions, deletion."""
    from trimtab.core.errors import ConfigError
    from trimtab.feedback import people as module

    store = _open(project)
    if not name and (state or role or link or sign_out or delete):
        raise ConfigError("nobody is named", where="trimtab feedback people", fix="write the name after the project")
    if name and links:
        fix = "write --link for one person, and --links without a name for all"
        raise ConfigError("--links makes one for everybody", where="trimtab feedback people", fix=fix)
    person = _person(store, name) if name else None
    if person is not None and role:
        module.set_role(store, person.id, role)
    if person is not None and sign_out:
        module.end_sessions(store, person.id)
    if person is not None and state:
        module.set_state(store, person.id, state)
    if person is not None and delete:
        module.delete_person(store, person.id)
    with store.read() as connection:
        everyone = module.everyone(connection)
    without = [p for p in everyone if not p.has_password and p.state not in ("banned", "deleted")]
    for one in [person] if link and person is not None else without if links else []:
        click.echo(f"{printable(one.name)}: {_join_address(store, address)}#{module.make_link(store, one.id)}")
    if link or links:
        return
    for one in everyone:
        remark = "" if one.has_password or one.state == "deleted" else "  no password"
        click.echo(f"{one.id:4} {printable(one.name):24} {one.role:12} {one.state}{remark}")


def _join_address(store: Any, address: str | None) -> str:
    server = store.project.settings.server
    return f"{(address or f'http://{server.host}:{server.port}').rstrip('/')}/join"


def _person(store: Any, name: str) -> Any:
    from trimtab.core.errors import DataError
    from trimtab.feedback.people import by_name

    with store.read() as connection:
        person = by_name(connection, name)
    if person is None:
        raise DataError(f"nobody is called {name!r}", where=str(store.project.path), fix="see trimtab feedback people")
    return person


@click.command()
@_project
@click.argument("name")
@click.option("--days", default=90.0, show_default=True, help="How long it is good for.")
def token(project: Path, name: str, days: float) -> None:
    """Make a token of the REST interface for NAME."""
    from trimtab.feedback.people import start_session

    store = _open(project)
    click.echo(start_session(store, _person(store, name), hours=24 * days, kind="api", name="command"))


@click.command()
@_project
@click.argument("item", type=int, required=False)
@click.option("--as", "name", help="The adjudicator.")
@click.option("--choice", help="A, B, tie or both_bad (of a pair).")
@click.option("--strength", default=1, show_default=True)
@click.option("--cause", help="Why people differed.")
@click.option("--reason", default="", help="In words.")
def adjudicate(
    project: Path, item: int | None, name: str | None, choice: str | None, strength: int, cause: str | None, reason: str
) -> None:
    """List the items on which people differ, show ITEM with its replies A and B, or decide about it."""
    from trimtab.core.errors import ConfigError
    from trimtab.feedback import voting
    from trimtab.feedback.answers import Answer
    from trimtab.feedback.board import disagreements

    store = _open(project)
    if item is None and (name or choice or cause):
        fix = "write its number after the project; without one, the command lists the items on which people differ"
        raise ConfigError("no item is named", where="trimtab feedback adjudicate", fix=fix)
    if item is None:
        with store.read() as connection:
            for found in disagreements(connection):
                said = ", ".join(f"{k} × {v}" for k, v in found["said"].items())
                click.echo(f"{found['item_id']:5} {found['disagreement']:.0%}  {said}  {found['prompt'][:60]!r}")
        return
    if not (name or choice or cause):
        from trimtab.feedback.commands import item_lines

        for line in item_lines(store, item):
            click.echo(line)
        return
    if not (name and choice and cause):
        raise ConfigError("a decision needs --as, --choice and --cause", where="adjudicate", fix="give all three")
    person = _person(store, name)
    if not person.may_adjudicate:
        raise ConfigError(f"{name!r} is an annotator", where="--as", fix="name an adjudicator or admin")
    answer = Answer(choice=choice, strength=strength if choice in ("A", "B") else None, taxonomy=cause, reason=reason)
    import secrets

    receipt = voting.adjudicate(store, person, item, answer, key=secrets.token_hex(12))
    click.echo(f"decision {receipt.vote_id}")


@click.command()
@_project
@click.argument("file", type=_file, required=False)
def guideline(project: Path, file: Path | None) -> None:
    """Print the guideline, or make FILE its next version."""
    from trimtab.feedback import store as module
    from trimtab.feedback.project import read_guideline
    from trimtab.feedback.webhooks import publish_guideline

    store = _open(project)
    if file is not None:
        with store.write() as connection:
            text = read_guideline(file)
            version = publish_guideline(store, connection, None, text)
        click.echo(f"version {version}")
        return
    with store.read() as connection:
        click.echo(module.guideline(connection).text)


@click.command()
@_project
@click.argument("state", type=click.Choice(["open", "paused"]))
def queue(project: Path, state: str) -> None:
    """Pause a project or go on with it."""
    from trimtab.feedback.assign import set_open

    set_open(_open(project), state == "open")
    click.echo("the project is open" if state == "open" else "the project is paused: nothing new is given out")


@click.command()
@_project
@click.argument("file", type=_file)
def scores(project: Path, file: Path) -> None:
    """Set reward-model scores: JSON lines with item (its hash) and scores ({model: [one for each reply]})."""
    from trimtab.core.errors import DataError
    from trimtab.data.sources import read_good_rows
    from trimtab.feedback.items import set_scores

    rows = read_good_rows(file, fix="see the command's help")
    of_items: dict[str, dict[str, Any]] = {}
    for where, row in rows.rows:
        item, given = row.get("item"), row.get("scores")
        if not isinstance(item, str) or not isinstance(given, dict):
            raise DataError("a row without item or scores", where=where, fix="see the command's help")
        if again := of_items.setdefault(item, {}).keys() & given.keys():
            raise DataError(
                f"{sorted(again)[0]!r} has scored item {item} already", where=where, fix="give each model's scores once"
            )
        of_items[item] |= given
    num = set_scores(_open(project), of_items)
    unknown = f", {len(of_items) - num} of {len(of_items)} are not in the project" if num < len(of_items) else ""
    click.echo(f"{num} items{unknown}")


@click.command()
@_project
@click.option(
    "--world", "world_name", default="helpdesk", show_default=True, help="Whose annotators vote, by its true reward."
)
@click.option("--annotators", "num_annotators", default=20, show_default=True, type=click.IntRange(min=1))
@click.option("--agreement", default=0.7, show_default=True, help="How often two of them agree.")
@click.option("--limit", type=click.IntRange(min=1), help="Votes to give; all that are wanted without it.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def simulate(project: Path, **options: Any) -> None:
    """Have a world's simulated annotators vote through the store, as people do."""
    from trimtab.feedback import simulate as simulating

    _tell(simulating.simulate(_open(project, must_exist=False), **options))


@click.command()
@_project
@click.option("--head", help="A hash noted earlier, which the log must still hold.")
def audit(project: Path, head: str | None) -> None:
    """Check every hash of the audit log, votes, items and guidelines."""
    from trimtab.core.errors import DataError
    from trimtab.feedback import store as module

    store = _open(project)
    problems = module.verify(store, head=head)
    if problems:
        raise DataError("\n    ".join(problems), where=str(project), fix="restore a backup and compare")
    seq, sha256 = module.audit_head(store)
    click.echo(f"nothing was changed: {seq} entries, head {sha256}")


@click.command()
@_project
@click.argument("out", type=_file)
def backup(project: Path, out: Path) -> None:
    """Write a whole copy of a SQLite store while it is in use."""
    from trimtab.feedback import store as stores

    stores.backup(_open(project), out)
    click.echo(str(out))


@click.command()
@click.argument("source")
@click.option("--out", type=_file, help="The page.  [NAME-agreement.html]")
@click.option("--columns", default="", help="Columns of another table: item=doc+system,annotator=worker,choice=label.")
@click.option("--annotator-columns", default="", help="Columns with one annotator's choices each, in a table of items.")
@click.option("--missing", default="", help="Choices that are no judgement, with commas between them.")
@click.option("--order", default="", help="Categories from low to high, where they have an order.")
@click.option("--as-given", is_flag=True, help="A always means the same, such as a model: keep sides as they are.")
@click.option("--seed", default=0, show_default=True, help="Equal seeds give equal results.")
def agreement(source: str, **options: Any) -> None:
    """Say how far annotators agree, and write a page about it.

    SOURCE is a feedback project, or a table of votes with the columns item, annotator, choice and, if known,
    shown_left, seconds, slice, strength, model_a, model_b (JSON lines, CSV or Parquet), or comparisons.
    """
    from trimtab.feedback import commands

    commands.agreement(source, **options)


@click.command()
@click.option("--items", default=2000, show_default=True, help="Different pairs to be judged.")
@click.option("--overlap", default=1.0, show_default=True, help="Votes for each item on average.")
@click.option("--minutes", default=1.0, show_default=True, help="Working time of one judgement.")
@click.option("--wage", default=20.0, show_default=True, help="Pay for an hour, in your currency.")
@click.option("--price", type=float, help="Pay for one judgement, instead of a wage.")
@click.option("--fee", default=0.2, show_default=True, help="Share that a platform adds.")
@click.option("--gold", default=0.05, show_default=True, help="Share of further judgements with a known answer.")
@click.option("--repeats", default=0.03, show_default=True, help="Share of further judgements asked again.")
@click.option("--adjudication", default=0.0, show_default=True, help="Share of further judgements to settle disputes.")
@click.option("--annotators", default=5, show_default=True, help="People at work.")
@click.option("--hours-per-day", default=4.0, show_default=True, help="Of judging, for each of them.")
@click.option("--agreement", default=0.7, show_default=True, help="How often two of them are expected to agree.")
@click.option("--half-width", default=0.03, show_default=True, help="Wanted half of a 95% interval.")
@click.option("--votes-per-item", default=2, show_default=True, help="Of the items that agreement is measured on.")
@click.option("--pilot", default="", help="Reward models so far, ITEMS:ACCURACY,…, to extrapolate.")
def cost(half_width: float, votes_per_item: int, pilot: str, **plan: Any) -> None:
    """Plan a campaign: what it costs and what it can show."""
    from trimtab.feedback import commands
    from trimtab.feedback.campaign import Campaign

    campaign = Campaign(**plan)
    commands.cost(campaign, half_width=half_width, votes_per_item=votes_per_item, pilot=pilot)
