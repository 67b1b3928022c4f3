"""Where steps end in the ids of a reply, and labels at these places."""

import pytest

from tests.data.conftest import NAMES
from trimtab.core.errors import DataError
from trimtab.core.types import LabelledResponse, Message, Prompt, RatedResponse, SteppedResponse
from trimtab.data.chat import Chat
from trimtab.data.graded import grade_outcome, grade_rating, grade_steps, group_graded, step_ends

PROMPT = Prompt(messages=(Message("user", "What is two plus two?"),))


def text_up_to(chat, ids, end):
    return chat.tokenizer.decode(ids[: end + 1], skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("separator", [" is ", "four"])
def test_each_step_ends_at_the_first_token_that_completes_its_separator(tokenizers, name, separator):
    chat = Chat(tokenizers[name])
    ids = chat.encode_response(separator.join(["It", "Hello there", "two plus"]))
    ends = step_ends(chat, ids, separator)
    assert len(ends) == 3
    assert ends[-1] == len(ids) - 1
    for number, end in enumerate(ends[:-1], 1):
        assert text_up_to(chat, ids, end).count(separator) == number
        assert text_up_to(chat, ids, end - 1).count(separator) == number - 1


@pytest.mark.parametrize(
    ("text", "num"),
    [
        ("one", 1),
        ("one\ntwo", 2),
        ("\none\n\n\ntwo\n", 2),  # blank lines are no steps
        ("one\n \ntwo\nthree\n\n", 3),
        ("\n", 1),
        ("naïve café\nein Ding 🙂\n漢字", 3),  # characters of several tokens
    ],
)
def test_blanks_are_no_steps_and_a_character_may_be_several_tokens(tokenizers, text, num):
    chat = Chat(tokenizers["chatml"])
    ids = chat.encode_response(text)
    ends = step_ends(chat, ids, "\n")
    assert (len(ends), ends[-1]) == (num, len(ids) - 1)
    for end, piece in zip(ends[:-1], [line for line in text.split("\n") if line.strip()], strict=False):
        assert text_up_to(chat, ids, end).rstrip("\n ").endswith(piece)


def test_a_reply_that_was_cut_off_ends_its_last_step_where_it_was_cut(tokenizers):
    chat = Chat(tokenizers["ours"])
    ids = chat.encode_response("one\ntwo", ended=False)
    assert step_ends(chat, ids, "\n")[-1] == len(ids) - 1
    assert step_ends(chat, [], "\n") == []


def stepped(*labels, steps=("It is four.", "Hello there")):
    return SteppedResponse(prompt=PROMPT, steps=steps, labels=labels)


def test_labels_stand_at_the_ends_of_the_steps_that_are_judged(tokenizers):
    chat = Chat(tokenizers["ours"])
    grade = grade_steps(stepped(None, 0.25), chat, separator="\n")
    assert grade.ids == tuple(chat.encode_response("It is four.\nHello there"))
    assert (grade.places, grade.labels) == ((len(grade.ids) - 1,), (0.25,))
    both = grade_steps(stepped(1.0, 0.0), chat, separator="\n")
    assert text_up_to(chat, both.ids, both.places[0]) == "It is four.\n"


def test_a_step_that_holds_the_separator_is_refused(tokenizers):
    with pytest.raises(DataError, match="cuts their text into 3") as caught:
        grade_steps(stepped(1.0, 0.0, steps=("It is\nfour.", "Yes")), Chat(tokenizers["ours"]), separator="\n")
    assert "loss.separator" in caught.value.fix


def test_outcomes_and_ratings_are_labels_of_tokens_too(tokenizers):
    chat = Chat(tokenizers["ours"])
    right = LabelledResponse(prompt=PROMPT, response="four", label=True)
    everywhere = grade_outcome(right, chat, tokens="all")
    assert everywhere.places == tuple(range(len(everywhere.ids)))
    assert set(everywhere.labels) == {1.0}
    assert grade_outcome(right, chat, tokens="last").places == (len(everywhere.ids) - 1,)
    rated = grade_rating(RatedResponse(prompt=PROMPT, response="four", rating=3.5), chat)
    assert (rated.places, rated.labels) == ((len(rated.ids) - 1,), (3.5,))


def test_replies_of_a_prompt_are_one_tree_and_what_does_not_fit_is_counted(tokenizers):
    chat = Chat(tokenizers["ours"])
    long = SteppedResponse(
        prompt=Prompt(messages=(Message("user", "Hello"),)), steps=("It", "is four. " * 40), labels=(1.0, 1.0)
    )
    records = [stepped(1.0, 0.0), stepped(None, 1.0), long]
    counts = {}
    found = group_graded(
        [(record, grade_steps(record, chat, separator="\n")) for record in records],
        chat, max_tokens=60, on_too_long="drop", token_budget=4096, counts=counts,
    )  # fmt: skip
    assert counts == {"dropped_too_long": 1}
    assert [len(tree.branches) for tree in found.trees] == [2]
    batch = found.batch()
    assert batch.labels.tolist() == [1.0]
    assert batch.last_labels.tolist() == [0.0, 1.0]
    # The label of the first step is read at its last token, from which the trained token behind it is predicted.
    read_at = int(batch.trees.predict_from[0])
    assert text_up_to(chat, batch.trees.input_ids.tolist(), read_at).endswith("It is four.\n")


def test_a_long_reply_is_left_out_and_not_those_to_the_same_prompt(tokenizers):
    chat, counts = Chat(tokenizers["ours"]), {}
    long = stepped(1.0, 1.0, steps=("It", "is four. " * 40))
    records = [(one, grade_steps(one, chat, separator="\n")) for one in (stepped(1.0, 0.0), long, stepped(0.0, 1.0))]
    found = group_graded(records, chat, max_tokens=60, on_too_long="drop", token_budget=4096, counts=counts)
    assert found.grades == [(records[0][1], records[2][1])]
    assert counts == {"dropped_too_long": 1}
    counts.clear()
    room = len(long_ids := records[1][1].ids) + 3
    cut = group_graded(
        records, chat, max_tokens=room, on_too_long="truncate_prompt_left", token_budget=4096, counts=counts
    )
    assert [len(one) for one in cut.grades] == [3]
    assert len(cut.trees[0].prompt) + len(long_ids) == room
    assert counts == {"truncated_too_long": 3}


def test_replies_that_are_more_than_a_forward_pass_takes_are_several_trees_of_one_prompt(tokenizers):
    chat = Chat(tokenizers["ours"])
    other = SteppedResponse(prompt=Prompt(messages=(Message("user", "Hi"),)), steps=("a", "b"), labels=(1.0, 0.0))
    records = [(one, grade_steps(one, chat, separator="\n")) for one in [*[stepped(1.0, 0.0)] * 5, other]]
    prompt, own = len(chat.encode_prompt(PROMPT.messages)), len(records[0][1].ids)

    def trees(budget):
        return group_graded(records, chat, max_tokens=999, on_too_long="drop", token_budget=budget, counts={})

    found = trees(prompt + 2 * own)
    assert [len(grades) for grades in found.grades] == [2, 2, 1, 1]
    assert found.prompts == [0, 0, 0, 1]
    assert all(tree.num_tokens <= prompt + 2 * own for tree in found.trees)
    assert [len(grades) for grades in trees(1).grades] == [1] * 6  # a reply is never cut
    assert found.batch().labels.tolist() == trees(4096).batch().labels.tolist()


def test_the_first_step_that_nobody_judged_is_remembered(tokenizers):
    chat = Chat(tokenizers["ours"])
    labels = [((1.0, 0.0), None), ((None, 1.0), 0), ((1.0, None), 1)]
    for own, gap in labels:
        assert grade_steps(stepped(*own), chat, separator="\n").num_before_gap == gap
