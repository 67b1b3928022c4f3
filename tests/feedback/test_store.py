"""The store: what is added stays, the log shows any change, and the tables are those of the migrations."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa

from tests.feedback.conftest import Make
from tests.feedback.projects import PASSWORD, add, answer_next, item, lease, person
from trimtab.core.errors import ConfigError, DataError
from trimtab.feedback import items, people
from trimtab.feedback import tables as t
from trimtab.feedback.answers import Answer
from trimtab.feedback.exporting import export, write_export
from trimtab.feedback.importing import import_source
from trimtab.feedback.store import audit_head, backup, open_store, verify
from trimtab.feedback.votes import cast_votes
from trimtab.feedback.voting import adjudicate, reopen, save_draft, undo, vote


def test_a_vote_is_stored_about_the_replies_and_not_the_screen(make: Make):
    store = make()
    add(store, 1)
    ann = person(store, "Ann")
    given = lease(store, ann)
    assert given is not None
    vote(store, ann, given.token, Answer(choice="B", strength=1, seconds=0.0))
    with store.read() as connection:
        row = connection.execute(sa.select(t.votes)).one()
        assert (row.choice, row.shown_left) == ("B", "AB"[given.shown_order[0]])
        assert [row.item_a, row.item_b] == [items.reply_hash("reply 0.0"), items.reply_hash("reply 0.1")]
    assert verify(store) == []


def test_sending_an_answer_again_adds_nothing(make: Make):
    store = make()
    add(store, 2)
    ann = person(store, "Ann")
    given = lease(store, ann)
    assert given is not None
    first = vote(store, ann, given.token, Answer(choice="A", strength=1))
    again = vote(store, ann, given.token, Answer(choice="B", strength=1))  # another tab, another mind
    assert (again.vote_id, again.duplicate) == (first.vote_id, True)
    with store.read() as connection:
        assert [cast.answer.choice for cast in cast_votes(connection)] == ["A"]


def test_nobody_can_answer_what_another_has_in_hand(make: Make):
    store = make()
    add(store, 1)
    ann, bob = person(store, "Ann"), person(store, "Bob")
    given = lease(store, ann)
    assert given is not None
    assert lease(store, bob) is None
    with pytest.raises(DataError, match="not in your hands"):
        vote(store, bob, given.token, Answer(choice="A", strength=1))


def test_undo_and_edit_are_further_rows(make: Make):
    store = make()
    add(store, 2)
    ann = person(store, "Ann")
    answer_next(store, ann)
    back = undo(store, ann)
    with store.read() as connection:
        assert list(cast_votes(connection)) == []
    assert back.draft["choice"] == "A"
    receipt = vote(store, ann, back.token, Answer(choice="B", strength=1))
    opened = reopen(store, ann, receipt.vote_id)
    with store.read() as connection:
        assert [c.answer.choice for c in cast_votes(connection)] == ["B"]  # stands until it is replaced
    vote(store, ann, opened.token, Answer(choice="tie"))
    with store.read() as connection:
        assert [c.answer.choice for c in cast_votes(connection)] == ["tie"]
        rows = connection.execute(sa.select(t.votes.c.choice, t.votes.c.replaces).order_by(t.votes.c.id)).all()
    assert [tuple(row) for row in rows] == [("A", None), ("undone", 1), ("B", 2), ("tie", 3)]
    assert verify(store) == []


def test_an_edit_that_is_not_finished_leaves_the_answer(make: Make):
    store = make({"assignment": {"lease_minutes": 1.0}})
    add(store, 1)
    ann = person(store, "Ann")
    receipt = answer_next(store, ann)
    assert receipt is not None
    reopen(store, ann, receipt.vote_id)
    store.clock.seconds += 3600
    assert lease(store, ann) is None
    with store.read() as connection:
        assert [c.answer.choice for c in cast_votes(connection)] == ["A"]
    assert verify(store) == []


def test_a_late_answer_is_taken_while_there_is_a_place(make: Make):
    store = make({"assignment": {"lease_minutes": 1.0}})
    add(store, 1)
    ann, bob = person(store, "Ann"), person(store, "Bob")
    slow = lease(store, ann)
    assert slow is not None
    store.clock.seconds += 120
    other = lease(store, bob)
    assert other is not None
    with pytest.raises(DataError, match="others have answered it"):
        vote(store, ann, slow.token, Answer(choice="A", strength=1))
    store.clock.seconds += 120
    vote(store, bob, other.token, Answer(choice="A", strength=1))  # late too, but the place is free
    assert verify(store) == []


def test_the_database_refuses_to_change_what_was_said(make: Make):
    store = make()
    add(store, 1)
    answer_next(store, person(store, "Ann"))
    for table in ("votes", "items", "audit", "guidelines"):
        for statement in (f"UPDATE {table} SET sha256 = ''", f"DELETE FROM {table}"):
            statement = statement.replace("sha256 = ''", "choice = 'B'") if table == "votes" else statement
            with pytest.raises(sa.exc.DBAPIError, match="only ever added to"), store.write() as connection:
                connection.exec_driver_sql(statement)


def test_the_log_shows_every_change_behind_its_back(small: Make):
    def changed(statement: str) -> list[str]:
        store = small()
        add(store, 2)
        ann = person(store, "Ann")
        answer_next(store, ann, Answer(choice="A", strength=1, rationale="shorter"))
        answer_next(store, ann)
        assert verify(store) == []
        with store.write() as connection:
            for trigger in connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'trigger'").all():
                connection.exec_driver_sql(f"DROP TRIGGER {trigger[0]}")
            connection.exec_driver_sql("PRAGMA defer_foreign_keys = ON")
            connection.exec_driver_sql(statement)
        return verify(store)

    assert changed("UPDATE votes SET choice = 'B' WHERE id = 1") == ["vote 1: changed since it was added"]
    assert changed("DELETE FROM votes WHERE id = 2") == ["vote 2: missing"]
    assert changed("UPDATE items SET slice = 'x' WHERE id = 1") == ["item 1: changed since it was added"]
    assert changed("UPDATE audit SET actor = 9 WHERE seq = 3") == ["audit entry 3: the chain is broken here"]
    assert changed("UPDATE writings SET rationale = 'longer'") == ["vote 1: what was written has changed"]
    assert changed("UPDATE queue SET taken = 0 WHERE item_id = 1") == ["item 1: 0 places taken, 1 leases"]
    assert changed("DELETE FROM audit WHERE seq = 3") != []


def test_a_log_cut_off_at_its_end_is_found_by_a_noted_head(small: Make):
    store = small()
    add(store, 1)
    seq, head = audit_head(store)
    with store.write() as connection:
        connection.exec_driver_sql("DROP TRIGGER audit_no_delete")
        connection.exec_driver_sql(f"DELETE FROM audit WHERE seq = {seq}")
    assert any("cut off" in problem for problem in verify(store, head=head))


def test_adjudication_leaves_the_votes_and_locks_them(make: Make):
    store = make({"assignment": {"overlap": 2}})
    add(store, 1)
    ann, bob, judge = person(store, "Ann"), person(store, "Bob"), person(store, "Jo", "adjudicator")
    first = answer_next(store, ann)
    answer_next(store, bob, Answer(choice="B", strength=1))
    assert first is not None
    with pytest.raises(DataError, match="no cause"):
        adjudicate(store, judge, 1, Answer(choice="B", strength=1), key="k0")
    decided = Answer(choice="B", strength=1, taxonomy="annotator error", reason="A repeats itself")
    adjudicate(store, judge, 1, decided, key="k1")
    assert adjudicate(store, judge, 1, decided, key="k1").duplicate
    with store.read() as connection:
        assert [c.answer.choice for c in cast_votes(connection)] == ["A", "B"]
        assert [c.answer.taxonomy for c in cast_votes(connection, purposes=("adjudication",))] == ["annotator error"]
    with pytest.raises(DataError, match="locked"):
        reopen(store, ann, first.vote_id)


def test_a_ban_frees_places_and_takes_the_votes_out(make: Make):
    store = make()
    add(store, 2)
    ann, bob = person(store, "Ann"), person(store, "Bob")
    answer_next(store, ann)
    lease(store, ann)
    assert lease(store, bob) is None
    people.set_state(store, ann.id, "banned")
    assert verify(store) == []
    answer_next(store, bob)
    answer_next(store, bob)
    with store.read() as connection:
        assert {c.annotator for c in cast_votes(connection)} == {"Bob"}
        assert len(list(cast_votes(connection, banned=True))) == 3
    people.set_state(store, ann.id, "active")
    with store.read() as connection:
        assert {c.annotator for c in cast_votes(connection)} == {"Ann", "Bob"}
    assert verify(store) == []


def test_deleting_a_person_keeps_their_choices_and_nothing_else(make: Make):
    store = make()
    add(store, 1, author="Ann Example")
    add(store, 2, first=1)
    token = people.make_invite(store, "adjudicator")
    ann = people.join(store, token, "Ann Example", PASSWORD)
    for _ in range(2):
        answer_next(store, ann, Answer(choice="skip", reason="my aunt says so"))
    answer_next(store, ann, Answer(choice="A", strength=1, rationale="my aunt says so"))
    adjudicate(store, ann, 1, Answer(choice="A", strength=1, taxonomy="bad data", reason="my aunt says so"), key="k")
    people.delete_person(store, ann.id)
    with store.read() as connection:
        (cast,) = cast_votes(connection)
        tables = [connection.execute(sa.select(table)).all() for table in t.metadata.sorted_tables]
    assert (cast.answer.choice, cast.annotator, cast.answer.rationale) == ("A", f"deleted-{ann.id}", "")
    assert "aunt" not in str(tables)
    assert "Ann Example" not in str(tables)
    assert "Ann Example" not in str(export(store, "dump").rows)
    assert people.sign_in(store, "Ann Example", PASSWORD) is None
    assert verify(store) == []


def test_votes_of_somebody_who_was_banned_count_nowhere_after_deletion_either(make: Make):
    store = make()
    add(store, 1)
    ann, bob = person(store, "Ann"), person(store, "Bob")
    answer_next(store, ann)
    people.set_state(store, ann.id, "banned")
    people.delete_person(store, ann.id)
    with store.read() as connection:
        assert list(cast_votes(connection)) == []
        assert people.by_id(connection, ann.id).state == "deleted"
    assert verify(store) == []
    assert answer_next(store, bob, Answer(choice="B", strength=1)) is not None
    people.set_state(store, ann.id, "active")  # nobody lets in who is not there
    with store.read() as connection:
        assert [cast.answer.choice for cast in cast_votes(connection)] == ["B"]
    assert verify(store) == []


def test_a_name_that_a_dump_took_is_given_to_nobody_else(small: Make, tmp_path):
    store = small()
    add(store, 1)
    gone = person(store, "Ann")
    answer_next(store, gone)
    people.delete_person(store, gone.id)
    write_export(store, "dump", tmp_path / "dump.jsonl")
    again = small()
    bob, eve = person(again, "Bob"), person(again, "Eve")
    people.delete_person(again, bob.id)  # deleted-1 here as well
    import_source(again, str(tmp_path / "dump.jsonl"))
    people.delete_person(again, eve.id)
    people.delete_person(again, eve.id)  # once more changes nothing
    with again.read() as connection:
        assert [someone.name for someone in people.everyone(connection)] == ["deleted-1", "deleted-3", "deleted-2"]
        (cast,) = cast_votes(connection)
    assert cast.person_id == 3


def test_an_answer_that_was_open_for_change_keeps_its_place_when_its_author_is_deleted(make: Make):
    store = make()
    add(store, 1)
    ann = person(store, "Ann")
    receipt = answer_next(store, ann)
    assert receipt is not None
    reopen(store, ann, receipt.vote_id)
    people.delete_person(store, ann.id)
    assert lease(store, person(store, "Bob")) is None
    assert verify(store) == []


def test_equal_items_are_one_item(make: Make):
    store = make()
    counts = items.add_items(store, [("a", item(1)), ("b", item(1)), ("c", item(2))])
    assert counts == {"items": 3, "added": 2, "dropped_known_item": 1}


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (item(1, num=3), "3 replies where pairs needs 2"),
        (items.NewItem(kind="pairs", prompt=item(1).prompt, replies=(items.NewReply(text="x"),) * 2), "twice"),
        (item(1, purpose="gold"), "without an expected answer"),
        (item(1, scores={"rm": [1.0]}), "2 replies"),
        (item(1, kind="rating", num=1, given=float("nan")), "nan"),
        (items.NewItem(kind="rating", prompt=item(1).prompt, replies=(items.NewReply(text="a\0b"),)), "U\\+0000"),
        (items.NewItem(kind="rating", prompt=item(1).prompt, replies=(items.NewReply(text="\ud800"),)), "U\\+D800"),
    ],
)
def test_an_item_that_cannot_be_asked_is_refused(small: Make, new: items.NewItem, said: str):
    with pytest.raises(DataError, match=said):
        items.add_items(small(), [("row 1", new)])


def test_one_writer_at_a_time(make: Make):
    store = make({"assignment": {"overlap": 3}})
    add(store, 4)
    crowd = [person(store, f"p{i}") for i in range(8)]

    def work(someone: people.Person) -> None:
        while answer_next(store, someone) is not None:
            pass

    threads = [threading.Thread(target=work, args=(someone,)) for someone in crowd]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with store.read() as connection:
        votes = list(cast_votes(connection))
    assert len(votes) == 12
    assert len({(v.item_id, v.person_id) for v in votes}) == 12
    assert verify(store) == []


def test_the_tables_are_those_of_the_migrations(make: Make):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with make().read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), t.metadata) == []


def test_a_store_of_another_version_is_refused_in_words(make: Make):
    store = make()
    with store.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0099'")
    with pytest.raises(ConfigError, match=r"another version of trimtab: .*'0099'.* knows 20261127"):
        open_store(store.project)


def test_a_copy_of_a_store_is_a_store(small: Make, tmp_path):
    store = small()
    add(store, 1)
    answer_next(store, person(store, "Ann"))
    backup(store, store.project.directory / "copy.sqlite")
    (store.project.directory / "feedback.sqlite").unlink()
    for left in ("-wal", "-shm"):
        (store.project.directory / f"feedback.sqlite{left}").unlink(missing_ok=True)
    store.close()
    (store.project.directory / "copy.sqlite").rename(store.project.directory / "feedback.sqlite")
    again = open_store(store.project, must_exist=True)
    assert verify(again) == []
    again.close()


def test_a_store_that_is_not_there_is_said_so(tmp_path):
    from tests.feedback.projects import make_project

    with pytest.raises(ConfigError, match="no store yet"):
        open_store(make_project(tmp_path), must_exist=True)
    with pytest.raises(ConfigError, match="no known type"):
        open_store(make_project(tmp_path, {"store": "mysql://x"}))
    with pytest.raises(ConfigError, match="NO_SUCH_NAME"):
        open_store(make_project(tmp_path, {"store": "env:NO_SUCH_NAME"}))


def test_a_damaged_store_is_said_to_be_one(small: Make):
    store = small()
    add(store, 400)
    store.close()
    path = store.project.directory / "feedback.sqlite"
    whole = path.read_bytes()
    path.write_bytes(whole[:8192] + bytes(b ^ 0x55 for b in whole[8192:]))
    with pytest.raises(DataError, match="the store is damaged") as error:
        verify(open_store(store.project))
    assert "backup" in error.value.fix
    path.write_bytes(whole[:20480] + bytes(b ^ 0x55 for b in whole[20480:]))  # what opens it is whole
    with pytest.raises(DataError, match="the store is damaged"):
        backup(open_store(store.project), store.project.directory / "copy.sqlite")
    assert not (store.project.directory / "copy.sqlite").exists()
    path.write_text("this is no database, but a text that is long enough to be looked at" * 9)
    with pytest.raises(DataError, match="not a database"):
        open_store(store.project)


def test_what_a_deleted_person_wrote_is_nowhere_in_the_files(small: Make):
    store = small({"task": {"kind": "demonstration"}})
    add(store, 3, kind="demonstration", num=0)
    ann = person(store, "Ann Averylongname")
    for i in range(2):
        given = lease(store, ann)
        assert given is not None
        text = f"words of a very private kind {i} " * 300  # more than a page of the file holds
        save_draft(store, ann, given.token, {"text": text.upper()})
        save_draft(store, ann, given.token, {"text": "short"})
        vote(store, ann, given.token, Answer(choice="done", text=text, rationale="because of my family"))
    people.delete_person(store, ann.id)
    files = [f for f in store.project.directory.iterdir() if f.name.startswith("feedback.sqlite")]
    for file in files:
        content = file.read_bytes().lower()
        assert not [word for word in (b"very private kind", b"my family", b"averylongname") if word in content], file
    assert verify(store) == []
