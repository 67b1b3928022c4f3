"""An index of the decisions, and invitations for somebody who is known."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Adds the index, and the column that says whose new password an invitation sets."""
    where = sa.text("purpose = 'adjudication'")
    op.create_index("votes_decisions", "votes", ["item_id"], sqlite_where=where, postgresql_where=where)
    op.add_column("invites", sa.Column("person_id", sa.Integer(), nullable=True))
