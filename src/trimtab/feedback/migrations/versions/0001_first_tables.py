"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from trimtab.feedback.tables import metadata

revision = "20261127"  # until the first release the day on which the tables changed last: older stores are refused
down_revision = None


def upgrade() -> None:
    """Makes every table, and has those that are only added to refuse changes."""
    # The first release freezes the tables here, column by column; until then there is no store to carry over.
    metadata.create_all(op.get_bind())
    for statement in _refuse_changes(op.get_bind().dialect.name):
        op.execute(sa.text(statement))


def _refuse_changes(dialect: str) -> list[str]:
    tables = ("items", "votes", "audit", "guidelines")
    if dialect == "sqlite":
        return [
            f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
            f"BEGIN SELECT RAISE(ABORT, '{table} are only ever added to'); END"
            for table in tables
            for verb in ("UPDATE", "DELETE")
        ]
    function = (
        "CREATE FUNCTION only_added_to() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION '% are only ever added to', TG_TABLE_NAME; END $$"
    )
    return [function] + [
        f"CREATE TRIGGER {table}_no_change BEFORE UPDATE OR DELETE ON {table} "
        "FOR EACH ROW EXECUTE FUNCTION only_added_to()"
        for table in tables
    ]
