"""Who can sign in: after a restore, with a new password, in another role, and no longer."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from tests.feedback.conftest import Make
from tests.feedback.projects import PASSWORD, add, answer_next, make_store, person
from trimtab.core.errors import DataError
from trimtab.feedback import people
from trimtab.feedback.exporting import write_export
from trimtab.feedback.importing import import_source
from trimtab.feedback.server.serve import _show_ways_in
from trimtab.feedback.store import Store, verify


def ways_in(store: Store) -> list[str]:
    said: list[str] = []
    _show_ways_in(store, "http://here", said.append)
    return said


def test_people_of_a_restored_project_sign_in_again_as_themselves(small: Make, tmp_path: Path):
    first = small()
    add(first, 2)
    boss = people.join(first, people.make_invite(first, "admin"), "Boss", PASSWORD)
    ann = people.join(first, people.make_invite(first, "annotator"), "Ann", PASSWORD)
    answer_next(first, ann)
    assert ways_in(first) == []
    write_export(first, "dump", tmp_path / "dump.jsonl")

    store = small()
    import_source(store, str(tmp_path / "dump.jsonl"))
    assert people.sign_in(store, "Boss", PASSWORD) is None
    said = ways_in(store)
    assert "'Boss'" in said[0]
    token = said[1].partition("#")[2]
    with pytest.raises(DataError, match="another name"):
        people.join(store, token, "Mallory", PASSWORD)
    again = people.join(store, token, "Boss", PASSWORD)
    assert (again.role, again.name) == ("admin", boss.name)
    with pytest.raises(DataError, match="used up"):
        people.join(store, token, "Boss", "another long phrase")
    with store.read() as connection:
        known = people.by_name(connection, "Ann")
    assert known is not None
    assert not known.has_password
    with pytest.raises(DataError, match="has this name already") as error:
        people.join(store, people.make_invite(store, "annotator"), "Ann", PASSWORD)
    assert "link" in error.value.fix
    back = people.join(store, people.make_link(store, known.id), "Ann", PASSWORD)
    assert back.id == known.id
    assert people.sign_in(store, "Ann", PASSWORD) is not None
    seen = answer_next(store, back)  # goes on with what she has not answered
    assert seen is not None
    assert answer_next(store, back) is None
    assert ways_in(store) == []
    assert verify(store) == []


def test_the_first_admin_gets_in_where_people_came_with_imported_votes(small: Make):
    store = small()
    person(store, "Imported")
    said = ways_in(store)
    assert said[0].startswith("No admin has joined yet")
    assert people.join(store, said[1].partition("#")[2], "Boss", PASSWORD).role == "admin"


def test_a_new_password_ends_what_the_old_one_began(small: Make):
    store = small()
    ann = people.join(store, people.make_invite(store, "annotator"), "Ann", PASSWORD)
    session = people.start_session(store, ann, hours=1)
    people.join(store, people.make_link(store, ann.id), "Ann", "quite another phrase")
    assert people.person_of_session(store, session, "browser") is None
    assert people.sign_in(store, "Ann", PASSWORD) is None
    assert people.sign_in(store, "Ann", "quite another phrase") is not None


def test_roles_invitations_and_tokens_can_be_taken_back(tmp_path: Path):
    store = make_store(tmp_path, {"webhooks": [{"url": "http://x", "secret_env": "KEY", "events": ["person_joined"]}]})
    boss = people.join(store, people.make_invite(store, "admin"), "Boss", PASSWORD)
    ann = people.join(store, people.make_invite(store, "annotator"), "Ann", PASSWORD)
    people.set_role(store, ann.id, "adjudicator")
    with pytest.raises(DataError, match="last admin"):
        people.set_role(store, boss.id, "annotator")
    people.set_role(store, ann.id, "admin")
    people.set_role(store, boss.id, "annotator")
    token = people.start_session(store, ann, hours=1, kind="api")
    assert people.end_sessions(store, ann.id) == 1
    assert people.person_of_session(store, token, "api") is None
    made = people.make_invite(store, "annotator")
    (row,) = people.open_invites(store)
    people.revoke_invite(store, row.id)
    with pytest.raises(DataError, match="used up"):
        people.join(store, made, "Eve", PASSWORD)
    with pytest.raises(DataError, match="no open invitation"):
        people.revoke_invite(store, row.id)
    people.set_state(store, boss.id, "banned")
    with pytest.raises(DataError, match="is banned"):
        people.make_link(store, boss.id)
    store.close()


@pytest.mark.parametrize("name", ["Ann\u200b", "A\u202enn", "\x1b[31mAnn", "\u200d", "A\u2066nn", "Ann\U000e0041"])
def test_nobody_can_take_a_name_that_looks_like_another(small: Make, name: str):
    store = small()
    with pytest.raises(DataError, match="cannot be seen"):
        people.join(store, people.make_invite(store, "annotator"), name, PASSWORD)


@pytest.mark.parametrize("name", ["José", "Zoë-Li O'Neil", "می\u200cنا", "李 小龍", "🦊"])
def test_a_name_is_the_same_however_its_letters_were_typed(small: Make, name: str):
    store = small()
    apart, together = (unicodedata.normalize(form, name) for form in ("NFD", "NFC"))
    joined = people.join(store, people.make_invite(store, "annotator"), apart, PASSWORD)
    for typed in (apart, together):
        found = people.sign_in(store, typed, PASSWORD)
        assert found is not None
        assert found.id == joined.id
    with pytest.raises(DataError, match="has this name already"):
        people.join(store, people.make_invite(store, "annotator"), together, PASSWORD)


def test_whoever_was_stored_in_another_form_is_found_by_what_they_type(small: Make):
    store = small()
    old = person(store, unicodedata.normalize("NFD", "José"))
    back = people.join(store, people.make_link(store, old.id), "José", PASSWORD)
    assert back.id == old.id
    assert people.sign_in(store, "José", PASSWORD) is not None
