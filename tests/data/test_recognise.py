"""What would be read wrongly without a word is refused, with a way out that works when it is followed."""

from __future__ import annotations

import json
import re

import pytest

from tests.data.records import CALL, REPLY, said, user
from trimtab.core.errors import DataError
from trimtab.core.types import Comparison, Demonstration, LabelledResponse, PreferencePair, Prompt, SteppedResponse
from trimtab.data.layouts import load

PAIR = {"prompt": "Hi", "chosen": "Yo", "rejected": "No"}

ROWS = {
    "tools": (Demonstration, REPLY, {"tools": CALL}, "tools holds"),
    "functions of a pair": (PreferencePair, PAIR, {"functions": CALL}, "functions holds"),
    "pictures": (Demonstration, REPLY, {"images": ["cat.png"]}, "only text is read"),
    "a picture of a prompt": (Prompt, {"prompt": "Hi"}, {"image": "cat.png"}, "only text is read"),
    "reasoning": (Demonstration, REPLY, {"thinking": "Hm."}, "holds reasoning"),
    "reasoning of a pair": (PreferencePair, PAIR, {"reasoning": "Hm."}, "holds reasoning"),
    "a weight of the row": (Demonstration, REPLY, {"weight": 0}, "weight is 0"),
    "a weight of a pair": (PreferencePair, PAIR, {"sample_weight": 0.5}, "sample_weight is 0.5"),
    "a weight in camel case": (Demonstration, REPLY, {"sampleWeight": 0.5}, "weight is 0.5"),
    "reasoning under another name": (Demonstration, REPLY, {"Complex_CoT": "Hm."}, "holds reasoning"),
    "tools under another name": (Demonstration, REPLY, {"toolSchemas": CALL}, "tool_schemas holds"),
    "arguments of the template": (Demonstration, REPLY, {"chat_template_kwargs": {"tools": CALL}}, "kwargs holds"),
    "an image as text": (Demonstration, REPLY, {"image-base64": "iVBORw0"}, "only text is read"),
    "several images": (Demonstration, REPLY, {"image_urls": ["cat.png"]}, "only text is read"),
    "two systems": (
        Demonstration,
        {"messages": [{"role": "system", "content": "a"}, user("b"), said("c")]},
        {"system": "d"},
        "begins with another system turn",
    ),
    "scores that say the contrary": (PreferencePair, PAIR, {"score_chosen": 1, "score_rejected": 2}, "the better one"),
    "ratings that say the contrary": (PreferencePair, PAIR, {"chosen-rating": 1, "rejected-rating": 2}, "better one"),
    "scores under the names of the replies": (
        PreferencePair,
        {"prompt": "Hi", "response_j": "Yo", "response_k": "No"},
        {"score_j": 1, "score_k": 2},
        "the better one",
    ),
    "scores of a winner": (
        PreferencePair,
        {"prompt": "Hi", "winner": "Yo", "loser": "No"},
        {"winner_score": 1, "loser_score": 2},
        "the better one",
    ),
    "scores of the responses": (
        PreferencePair,
        {"prompt": "Hi", "chosen_response": "Yo", "rejected_response": "No"},
        {"chosen_response_score": 1, "rejected_response_score": 2},
        "the better one",
    ),
    "scores in camel case": (PreferencePair, PAIR, {"chosenScore": 1, "rejectedScore": 2}, "the better one"),
    "a weight of a vote": (
        Comparison,
        {"prompt": "Hi", "response_a": "a", "response_b": "b", "choice": "A"},
        {"weight": 0.1},
        "weight is 0.1",
    ),
    "a weight of ranked replies": (
        PreferencePair,
        {"prompt": "Hi", "responses": ["Yo", "No"], "scores": [2, 1]},
        {"weight": 0.1},
        "weight is 0.1",
    ),
    "a weight of steps": (
        SteppedResponse,
        {"prompt": "Hi", "completions": ["a"], "labels": [True]},
        {"weight": 0},
        "weight is 0",
    ),
    "reasoning beside steps": (
        SteppedResponse,
        {"prompt": "Hi", "completions": ["a"], "labels": [True]},
        {"reasoning": "Hm."},
        "holds reasoning",
    ),
    "a weight of instances": (
        Demonstration,
        {"instruction": "Hi", "instances": [{"input": "a", "output": "b"}]},
        {"weight": 0},
        "weight is 0",
    ),
    "label of a pair": (PreferencePair, PAIR, {"label": 0}, "label is 0"),
    "a category as label of a pair": (PreferencePair, PAIR, {"label": "x"}, "label is 'x'"),
    "a fact that has another value": (
        Prompt,
        {"prompt": "2+2?", "facts": {"answer": "4"}},
        {"answer": "5"},
        "answer is '5' in its column and '4' in facts",
    ),
    "a vote against the scores": (
        Comparison,
        {"prompt": "Hi", "response_a": "a", "response_b": "b", "choice": "A"},
        {"score_a": 1, "score_b": 2},
        "the other reply is the better one",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_column_that_changes_what_a_row_means_is_a_bad_row_and_can_be_left_out(file, name):
    kind, row, more, message = ROWS[name]
    with pytest.raises(DataError, match=message) as caught:
        load(kind, file(row, row | more))
    assert caught.value.where.endswith("data.jsonl, row 2")
    assert len(load(kind, file(row, row | more), on_bad_row="drop").records) == 1
    (source,) = re.findall(r"\S*data\.jsonl\?ignore=[\w,-]+", caught.value.fix)
    assert len(load(kind, source).records) == 2


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (said("Let me look.", tool_calls=CALL), "calls a tool"),
        (said(None, tool_calls=CALL), "calls a tool"),
        (said("4", function_call={"name": "f"}), "calls a tool"),
        ({"from": "function_call", "value": "{}"}, "calls a tool"),
        (said("4", reasoning_content="Two and two."), "holds reasoning"),
        (said([{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "4"}]), "holds reasoning"),
        (said([{"type": "image"}, {"type": "text", "text": "4"}]), "a part of the type 'image'"),
        (said([{"image": "cat.png", "text": "4"}]), "only text is read"),
        (said([{"type": "text", "text": "4", "image_url": {"url": "cat.png"}}]), "only text is read"),
        (said("4", think="Hm."), "holds reasoning"),
        (said("4", reasoning_details=[{"text": "Hm."}]), "holds reasoning"),
        (said("4", functionCalls="weather()"), "calls a tool"),
        (said("4", functions=CALL), "tools that the model is told of"),
        (said("4", attachments=["cat.png"]), "only text is read"),
        (said("4", value="5"), "has the contents content"),
        (said("4", mask=True), "whether such turns are to be learnt from"),
        (said("4", training=False), "marked as not to be learnt from"),
        (said("4", weight=0.5), "weight is 0.5"),
        (said("4", weight=0), "the last reply of messages is marked as not to be learnt from"),
        (said("", refusal="No."), "only text is read"),
        (said(None), "content is None"),
    ],
)
def test_a_field_of_a_message_that_changes_its_meaning_is_a_bad_row(file, turn, message):
    good = {"messages": [user("a"), said("b")]}
    path = file(good, {"messages": [user("a"), turn]})
    with pytest.raises(DataError, match=message) as caught:
        load(Demonstration, path)
    assert caught.value.where.endswith("row 2")
    assert len(load(Demonstration, path, on_bad_row="drop").records) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"reasoning": "Hm."}, "holds reasoning"),
        ({"images": ["cat.png"]}, "only text is read"),
        ({"tool_calls": CALL}, "calls a tool"),
    ],
)
def test_a_field_of_one_of_several_replies_that_changes_its_meaning_is_a_bad_row(file, more, message):
    ranked = {"prompt": "Hi", "answers": [{"answer": "Yo", "rank": 1, **more}, {"answer": "No", "rank": 2}]}
    with pytest.raises(DataError, match=message):
        load(PreferencePair, file(ranked))
    with pytest.raises(DataError, match=message):
        load(Demonstration, file({"instruction": "Hi", "instances": [{"input": "a", "output": "b", **more}]}))


def test_a_content_that_stands_twice_in_a_message_is_one(file):
    turns = [{**user("Hi"), "parts": [{"type": "text", "text": "Hi"}]}, said("Yo")]
    assert load(Demonstration, file({"messages": turns})).records[0].prompt.text == "Hi"


FILES = {
    "rating": (Demonstration, REPLY | {"rating": 2}, "judges the replies", "ignore=rating"),
    "score as text": (Demonstration, REPLY | {"score": "2.5"}, "judges the replies", "ignore=score"),
    "a reward": (Demonstration, REPLY | {"reward": -3.0}, "judges the replies", "ignore=reward"),
    "a share of stars": (Demonstration, REPLY | {"rating": "1/5"}, "judges the replies", "ignore=rating"),
    "a thumb with a hyphen": (Demonstration, REPLY | {"feedback": "thumbs-down"}, "thumbs up or", "ignore=feedback"),
    "a word as quality": (Demonstration, REPLY | {"quality": "bad"}, "judges the replies", "ignore=quality"),
    "stars as label": (Demonstration, REPLY | {"label": 4}, "judges the replies", "ignore=label"),
    "two replies": (Demonstration, REPLY | {"output": "No"}, "two columns may be the reply", "ignore=output"),
    "a reply beside messages": (
        Demonstration,
        {"messages": [user("a"), said("b")], "response": "c"},
        "two columns may be the reply",
        "ignore=response",
    ),
    "two questions": (Demonstration, REPLY | {"question": "Who?"}, "no part of the prompt", "ignore=question"),
    "options that the question lacks": (
        Demonstration,
        {"question": "Which is it?", "choices": ["Yes", "No"], "answer": "A"},
        "no part of the prompt",
        "ignore=choices",
    ),
    "a question beside messages": (
        Demonstration,
        {"query": "Who?", "messages": [user("a"), said("b")]},
        "no part of the prompt",
        "ignore=query",
    ),
    "a hidden prompt": (
        PreferencePair,
        {"request": "What is it?", "chosen": "It is a.", "rejected": "It is b."},
        "that may be it",
        "columns=request:prompt",
    ),
    "a title": (
        PreferencePair,
        {"title": "What is it?", "chosen": "It is a.", "rejected": "It is b."},
        "that may be it",
        "columns=title:prompt",
    ),
    "replies that repeat the prompt": (
        PreferencePair,
        {"prompt": "Question: Hi", "chosen": "Question: Hi Yo", "rejected": "Question: Hi No"},
        "begin with the prompt",
        "ignore=prompt",
    ),
    "an answer to a prompt": (
        Demonstration,
        {"prompt": "Hi", "answer": "Yo"},
        "holds prompts",
        "columns=answer:completion",
    ),
    "a lone chosen": (Demonstration, {"prompt": "Hi", "chosen": "Yo"}, "holds prompts", "columns=chosen:completion"),
    "plain text": (Prompt, {"text": "Once upon a time"}, "no known layout", "columns=text:prompt"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_may_mean_something_else_is_refused_and_the_way_out_works(file, name):
    kind, row, message, option = FILES[name]
    path = file(row, row)
    for on_bad_row in ("stop", "drop"):
        with pytest.raises(DataError, match=message) as caught:
            load(kind, path, on_bad_row=on_bad_row)
        assert f"{path}?{option}" in caught.value.fix
    assert load(kind, f"{path}?{option}").records


def test_a_rating_is_no_thumb_even_where_other_rows_look_like_thumbs(file):
    rows = [REPLY | {"label": label} for label in (1, 5, 0)]
    with pytest.raises(DataError, match="label is 5") as caught:
        load(LabelledResponse, file(*rows), on_bad_row="drop")
    assert caught.value.where.endswith("row 2")


def test_step_labels_with_a_neutral_one_are_refused(file):
    rows = [{"prompt": "Hi", "completions": ["a", "b"], "labels": labels} for labels in ([1, 0], [1, -1])]
    with pytest.raises(DataError, match="may be neutral"):
        load(SteppedResponse, file(*rows), on_bad_row="drop")


@pytest.mark.parametrize("choice", [1, 10**400, "model_0", "model_3"])
def test_a_choice_that_may_be_either_side_is_refused(file, choice):
    row = {"prompt": "Hi", "response_a": "a", "response_b": "b", "choice": choice}
    with pytest.raises(DataError, match="nothing says which one that is"):
        load(PreferencePair, file(row), on_bad_row="drop")


@pytest.mark.parametrize("choice", ["model-v1", "a model", "models a"])
def test_a_choice_that_names_no_side_is_a_bad_row(file, choice):
    row = {"prompt": "Hi", "response_a": "a", "response_b": "b", "choice": choice}
    with pytest.raises(DataError, match="a comparison labelled"):
        load(PreferencePair, file(row))


def test_a_short_reply_that_happens_to_begin_like_its_prompt_is_read(file):
    assert load(Demonstration, file({"prompt": "Hi", "completion": "Hi there!"})).records


def test_a_question_that_the_prompt_contains_is_only_not_used(file):
    row = {"prompt": "Answer: Who is it?", "question": "Who is it?", "completion": "Me"}
    assert load(Demonstration, file(row)).unused == ("question",)


def test_pairs_for_imitation_name_the_setting(file):
    with pytest.raises(DataError) as caught:
        load(Demonstration, file(PAIR))
    assert "chosen_as_demonstrations = true" in caught.value.fix


def test_a_mistake_names_the_column_as_the_file_does(file):
    with pytest.raises(DataError, match=r"completion is empty \(completion is the column 'output'\)"):
        load(Demonstration, file({"instruction": "Hi", "output": " "}))


@pytest.mark.parametrize(
    "text", ["[{'role': 'user', 'content': 'a'}\n {'role': 'b'}]", '[{"role": "user", "content": ']
)
def test_a_conversation_that_a_table_printed_is_not_taken_for_text(file, text):
    with pytest.raises(DataError, match="a conversation is written as text, but not as JSON"):
        load(Demonstration, file({"prompt": text, "completion": "b"}))


def test_a_transcript_with_something_before_the_first_speaker_is_a_bad_row(file):
    head = "Be brief.\n\nHuman: Hi\n\nAssistant:"
    with pytest.raises(DataError, match="before anybody speaks"):
        load(PreferencePair, file({"prompt": head, "chosen": " Yo", "rejected": " No"}))


@pytest.mark.parametrize("begin", ["", " Yes, "])
def test_two_transcripts_with_something_before_the_first_speaker_are_a_bad_row(file, begin):
    head = "Be brief.\n\nHuman: Hi\n\nAssistant:" + begin
    with pytest.raises(DataError, match="before anybody speaks"):
        load(PreferencePair, file({"chosen": head + " Yo", "rejected": head + " No"}))


def test_options_that_say_nothing_are_refused(file):
    path = file(REPLY)
    with pytest.raises(DataError, match="no row has a column 'compltion'"):
        load(Demonstration, f"{path}?ignore=compltion")
    with pytest.raises(DataError, match="no option is called 'rows'"):
        load(Demonstration, f"{path}?rows=3")
    with pytest.raises(DataError, match="there is one of that name already"):
        load(Demonstration, f"{file(REPLY | {'answer': 'x'})}?columns=answer:completion")
    with pytest.raises(DataError, match="does not say what becomes what"):
        load(Demonstration, f"{path}?columns=prompt")


def test_options_that_are_given_twice_are_put_together(file):
    path = file(REPLY | {"rating": 4, "stars": 5})
    with pytest.raises(DataError, match="judges the replies") as caught:
        load(Demonstration, f"{path}?ignore=rating")
    (source,) = re.findall(r"\S*data\.jsonl\?\S+", caught.value.fix)
    assert source == f"{path}?ignore=rating&ignore=stars"
    assert load(Demonstration, source).records
    with pytest.raises(DataError, match="split is 'train' and 'test'"):
        load(Demonstration, f"{path}?split=train&split=test")


def test_options_that_the_question_states_are_only_not_used(file):
    row = {"question": "Yes or No?", "options": {"A": "Yes", "B": "No"}, "answer": "A"}
    assert load(Demonstration, file(row)).unused == ("options",)


def test_a_column_in_capitals_that_few_rows_fill_in_changes_these_rows(file):
    rows = [{"prompt": f"Question {i}?", "completion": "Yo"} for i in range(9)]
    found = load(Demonstration, file(*rows, {"prompt": "Hi", "completion": "Yo", "System": "Be rude."}))
    assert [m.role for m in found.records[9].prompt.messages] == ["system", "user"]
    assert found.unused == ()
    with pytest.raises(DataError, match=r"weight is 0.*weight is the column 'Weight'"):
        load(Demonstration, file(*rows, {"prompt": "Hi", "completion": "Yo", "Weight": 0}))


@pytest.mark.parametrize("name", ["systemPrompt", "system-prompt", "System Prompt", "sys_prompt"])
def test_a_system_turn_is_read_in_every_spelling(file, name):
    [found] = load(Demonstration, file(REPLY | {name: "Be brief."})).records
    assert [(m.role, m.content) for m in found.prompt.messages] == [("system", "Be brief."), ("user", "Hi")]


def test_a_row_with_two_spellings_of_a_column_is_a_bad_row(file):
    path = file(REPLY, REPLY | {"system": "Be rude."}, REPLY | {"System": "Be brief.", "system": "Be rude."})
    with pytest.raises(DataError, match="System is read as 'system', and this row fills in a column of that name"):
        load(Demonstration, path)
    [first, second] = load(Demonstration, file(REPLY | {"System": "a", "system": ""}, REPLY | {"system": "b"})).records
    assert [found.prompt.messages[0].content for found in (first, second)] == ["a", "b"]


def test_a_row_with_two_columns_of_one_meaning_is_a_bad_row(file):
    """The later column was taken, in that row alone."""
    rows = [{"prompt": f"Question {i}?", "response": "Yo"} for i in range(9)]
    path = file(*rows, {"prompt": "Hi", "response": "one", "completion": "other"})
    with pytest.raises(DataError, match="response is read as 'completion', and this row fills in a column of that"):
        load(Demonstration, path)
    assert load(Demonstration, f"{path}?ignore=completion").records[9].response == "one"


@pytest.mark.parametrize("values", [["5", "1", ""], ["", "5", "1"], ["5", "1", "N/A"], ["5/5", "1/5", "not rated"]])
def test_a_rating_is_one_although_a_cell_is_empty_or_another_word(tmp_path, values):
    path = tmp_path / "data.csv"
    path.write_text("prompt,completion,rating\n" + "".join(f"Hi {v},Yo,{v}\n" for v in values), encoding="utf-8")
    with pytest.raises(DataError, match=r"rating is .*: it judges the replies"):
        load(Demonstration, path)


def test_a_thumb_is_one_although_the_first_cell_is_empty(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("prompt,completion,liked\nHi,Yo,\nWho?,Me,no\nHo,Hi,yes\n", encoding="utf-8")
    with pytest.raises(DataError, match="thumbs up or down"):
        load(Demonstration, path)
    assert [found.label for found in load(LabelledResponse, path, on_bad_row="drop").records] == [False, True]


def test_feedback_in_words_is_only_not_used(file):
    rows = [REPLY | {"feedback": text} for text in ("Good point, but long.", "good", "Say more.")]
    assert load(Demonstration, file(*rows)).unused == ("feedback",)


def test_a_label_that_may_be_a_category_is_asked_about(file):
    path = file(REPLY | {"label": "science"}, REPLY | {"label": "history"})
    with pytest.raises(DataError, match="label is 'science': if it judges the replies") as error:
        load(Demonstration, path)
    assert f"leave it out with {path}?ignore=label" in error.value.fix


@pytest.mark.parametrize("prompt", [{"messages": [user("Hi")]}, json.dumps({"messages": [user("Hi")]})])
def test_columns_beside_a_prompt_that_is_an_object_count(file, prompt):
    row = {"prompt": prompt, "completion": "Yo", "system": "Be brief.", "input": "a, b"}
    [found] = load(Demonstration, file(row)).records
    assert [m.content for m in found.prompt.messages] == ["Be brief.", "Hi\n\na, b"]


def test_tools_in_a_prompt_that_is_an_object_are_refused(file):
    path = file({"prompt": {"messages": [user("Hi")], "tools": CALL}, "completion": "Yo"})
    with pytest.raises(DataError, match="tools holds") as error:
        load(Demonstration, path)
    assert f"{path}?ignore=tools" in error.value.fix
    assert load(Demonstration, f"{path}?ignore=tools").records[0].response == "Yo"


def test_a_dialogue_that_is_a_text_is_no_list_of_messages(file):
    path = file({"dialogue": "#Ann#: Hi #Bob#: Yo", "summary": "They greet."})
    with pytest.raises(DataError, match="no known layout has the columns dialogue, summary") as error:
        load(Demonstration, path)
    assert f"{path}?columns=NAME:prompt,OTHER:completion" in error.value.fix
    [found] = load(Demonstration, f"{path}?columns=dialogue:prompt,summary:completion").records
    assert found.response == "They greet."


def test_a_misspelled_column_to_ignore_is_named_however_few_rows_are_read(tmp_path):
    path = tmp_path / "pairs.jsonl"
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "system": "s"}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(5)))
    with pytest.raises(DataError, match="no row has a column 'sytem'"):
        load(PreferencePair, f"{path}?ignore=sytem", limit=2)
    # A column that only later rows have may be left out of the first ones.
    assert len(load(PreferencePair, f"{path}?ignore=comment", limit=2).records) == 2


@pytest.mark.parametrize("name", ["margin", "label"])
def test_a_number_too_large_for_any_computer_is_a_bad_row(tmp_path, name):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b", name: 10**400}) + "\n")
    with pytest.raises(DataError, match=name):
        load(PreferencePair, path)


def test_a_turn_that_is_none_is_a_bad_row_with_columns_left_out_too(file):
    with pytest.raises(DataError, match="oops"):
        load(Demonstration, f"{file({'messages': [user('Hi'), 'oops'], 'x': 1})}?ignore=x")


@pytest.mark.parametrize("kind", [Demonstration, PreferencePair])
def test_a_reply_of_a_tree_without_text_is_a_bad_row(file, kind):
    replies = [{"role": "assistant", "rank": 0}, {"role": "assistant", "rank": 1, "text": "Yes"}]
    tree = {"message_tree_id": "1", "prompt": {"role": "prompter", "text": "Hi", "replies": replies}}
    with pytest.raises(DataError, match="text"):
        load(kind, file(tree))


def test_a_row_with_two_reasons_is_counted_under_the_same_one_every_time(file):
    row = {"prompt": "a", "completion": "b", "weight": 0.5, "reasoning": "x"}
    with pytest.raises(DataError, match="1 reasoning"):
        load(Demonstration, file(row))
