"""The tables of a store. Rows of what people said are only ever added; tables that may change stand in a section."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()


def _id() -> sa.Column[int]:
    return sa.Column("id", sa.Integer, primary_key=True, autoincrement=True)


def _text(name: str, **options: object) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=False, **options)  # type: ignore[arg-type]


def _no(name: str) -> sa.Column[bool]:
    return sa.Column(name, sa.Boolean, nullable=False, default=False)


def _at(name: str = "created_at", *, nullable: bool = False) -> sa.Column[float]:
    return sa.Column(name, sa.Double, nullable=nullable)  # seconds since 1970, UTC


# --- never changed: triggers refuse updates and deletions ---

items = sa.Table(
    "items",
    metadata,
    _id(),
    _text("sha256", unique=True),  # of kind, prompt, replies, purpose and gold
    _text("kind"),
    _text("purpose"),  # task, gold or quiz
    _text("prompt_id", index=True),
    sa.Column("prompt", sa.JSON, nullable=False),  # {"messages", "id", "facts"}
    sa.Column("replies", sa.JSON, nullable=False),  # [{"text", "sha256", "source"}]; for steps the steps
    sa.Column("gold", sa.JSON, nullable=False),  # the expected answer, {} if there is none
    _text("slice"),
    sa.Column("sensitive", sa.Boolean, nullable=False),
    _at(),
)

votes = sa.Table(
    "votes",
    metadata,
    _id(),
    sa.Column("item_id", sa.ForeignKey("items.id"), nullable=False, index=True),
    sa.Column("person_id", sa.ForeignKey("people.id"), nullable=False),
    sa.Column("lease_id", sa.ForeignKey("leases.id")),
    _text("purpose"),  # task, gold, quiz, reask or adjudication
    _text("choice"),  # A, B, tie, both_bad, cannot_judge, skip, done (other kinds) or undone
    sa.Column("strength", sa.Integer),
    _text("item_a"),  # hash of the reply in place 0, "" if there is none
    _text("item_b"),
    sa.Column("shown_left", sa.Text),  # A or B
    sa.Column("shown_order", sa.JSON, nullable=False),  # places of the replies in the order on the screen
    sa.Column("answer", sa.JSON, nullable=False),  # ranking, rating, steps, flags, criteria, taxonomy
    sa.Column("writing_sha256", sa.Text),  # of the row in `writings`, which can be deleted
    sa.Column("seconds", sa.Double),
    sa.Column("guideline_version", sa.Integer, nullable=False),
    _text("key", unique=True),  # idempotency key
    sa.Column("replaces", sa.ForeignKey("votes.id")),
    sa.Column("arm", sa.Text),  # random, active or None
    sa.Column("propensity", sa.Double),
    _at(),
    sa.Index("votes_latest", "person_id", "item_id", "purpose", "id"),
    sa.Index(
        "votes_decisions",
        "item_id",
        sqlite_where=sa.text("purpose = 'adjudication'"),
        postgresql_where=sa.text("purpose = 'adjudication'"),
    ),
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
    _at("at"),
    sa.Column("actor", sa.Integer),  # a person's id; None is the command line
    _text("action"),
    _text("subject"),
    sa.Column("detail", sa.JSON, nullable=False),
    _text("previous"),
    _text("sha256"),
)

guidelines = sa.Table(
    "guidelines",
    metadata,
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    _text("text"),
    _text("sha256"),
    _at(),
)

# --- may change ---

writings = sa.Table(  # what people wrote in their own words; deleted when they ask
    "writings",
    metadata,
    sa.Column("vote_id", sa.ForeignKey("votes.id"), primary_key=True),
    _text("rationale"),
    _text("reason"),
    _text("text"),
)

queue = sa.Table(  # the state of each item of purpose "task"
    "queue",
    metadata,
    sa.Column("item_id", sa.ForeignKey("items.id"), primary_key=True),
    sa.Column("cap", sa.Integer, nullable=False),
    sa.Column("taken", sa.Integer, nullable=False, default=0),  # leases that are open or done
    sa.Column("open", sa.Boolean, nullable=False, default=True),
    sa.Column("scores", sa.JSON, nullable=False),  # {"reward model": [score of each reply]}
    _text("author"),  # who wrote the prompt, "" if not known; not in `items`, since a name can be deleted
    sa.Column("given", sa.Double, nullable=False),
    sa.Column("score", sa.Double, nullable=False),  # of the policy; higher is asked sooner
    sa.Column("arm", sa.Text),  # how it was first chosen, and with which probability
    sa.Column("propensity", sa.Double),
    sa.Index("queue_open", "open", "taken"),
)

people = sa.Table(
    "people",
    metadata,
    _id(),
    _text("name", unique=True),
    _text("role"),  # annotator, adjudicator or admin
    _text("state", default="active"),  # active, paused or banned
    sa.Column("place", sa.Double, nullable=False),  # of the first name, in [0, 1): whether their votes are held out
    _no("deleted"),  # the state stays: votes of a banned person never count again
    _text("password"),
    sa.Column("qualified", sa.Boolean),  # None: not yet decided
    _no("opted_out"),  # of sensitive items
    _no("warned"),  # has seen the content warning
    sa.Column("keys", sa.JSON, nullable=False, default=dict),  # own keys: {"tie": "x"}
    sa.Column("view", sa.JSON, nullable=False, default=dict),  # stacked, raw, diff
    _at("streak_since", nullable=True),
    _at("last_vote_at", nullable=True),
    _at(),
)

leases = sa.Table(
    "leases",
    metadata,
    _id(),
    _text("token", unique=True),  # named in the page and, once answered, the key of the vote
    sa.Column("item_id", sa.ForeignKey("items.id"), nullable=False),
    sa.Column("person_id", sa.ForeignKey("people.id"), nullable=False),
    _text("purpose"),
    _text("state"),  # open, done, skipped or expired
    _no("standing"),  # a change of an answer that stands until then
    sa.Column("position", sa.Integer, nullable=False),  # how many leases the person had before
    sa.Column("shown_order", sa.JSON, nullable=False),
    sa.Column("arm", sa.Text),
    sa.Column("propensity", sa.Double),
    sa.Column("draft", sa.JSON, nullable=False, default=dict),
    _at(),
    _at("opened_at"),
    _at("expires_at"),
    sa.UniqueConstraint("person_id", "item_id", "purpose", name="one_lease_each"),
    sa.Index("leases_person", "person_id", "state"),
    sa.Index("leases_expiry", "state", "expires_at"),
    sa.Index("leases_item", "item_id"),
)

readings = sa.Table(  # who has read which guideline
    "readings",
    metadata,
    sa.Column("person_id", sa.ForeignKey("people.id"), primary_key=True),
    sa.Column("version", sa.ForeignKey("guidelines.version"), primary_key=True),
    _at(),
)

invites = sa.Table(
    "invites",
    metadata,
    _id(),
    _text("token_sha256", unique=True),
    _text("role"),
    sa.Column("person_id", sa.Integer),  # whose new password it sets; None for somebody new
    sa.Column("uses_left", sa.Integer, nullable=False),
    _at(),
    _at("expires_at"),
)

sessions = sa.Table(
    "sessions",
    metadata,
    _text("token_sha256", primary_key=True),
    sa.Column("person_id", sa.ForeignKey("people.id"), nullable=False, index=True),
    _text("kind"),  # browser, or api for a token of the REST interface
    _text("name"),
    _at(),
    _at("seen_at"),
    _at("expires_at"),
)

deliveries = sa.Table(
    "deliveries",
    metadata,
    _id(),
    _text("url"),
    _text("event"),
    sa.Column("body", sa.JSON, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False, default=0),
    _at("next_at", nullable=True),  # None once delivered or given up
    _at("delivered_at", nullable=True),
    _text("last_error", default=""),
    _at(),
)

facts = sa.Table(  # what the store knows of itself: its secret, its settings
    "facts",
    metadata,
    _text("name", primary_key=True),
    _text("value"),
)
