from __future__ import annotations

import copy
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.errors import ConfigError, DataError
from trimtab.core.types import Demonstration, Message
from trimtab.data.chat import Chat, fit
from trimtab.data.layouts import load
from trimtab.data.templates import DEFAULT_TEMPLATE, SPECIAL_TOKENS

from .conftest import CHATML, byte_level, make

NAMES = ("ours", "chatml", "thinking", "llama3", "llama2", "plain", "base")
# Of the templates that close a turn with a special token and write contents as they are (but for blanks).
FAITHFUL = ("ours", "chatml", "thinking", "llama3", "llama2", "base")
CONTENTS = st.text(st.sampled_from("abAB .\n\t:?é☃<|>/s"), min_size=1, max_size=12).filter(str.strip)


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


@pytest.fixture(scope="module")
def chats(tokenizers) -> dict[str, Chat]:
    return {name: Chat(tokenizers[name]) for name in NAMES}


TALK = [user("Hello there"), assistant("I am fine."), user("What is it?"), assistant("It is four.")]


def plain_dicts(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


@pytest.mark.parametrize("name", FAITHFUL)
def test_a_conversation_is_tokenised_as_its_rendered_text_up_to_the_last_end_token(chats, tokenizers, name):
    text = tokenizers[name].apply_chat_template(plain_dicts(TALK), tokenize=False)
    expected = tokenizers[name](text, add_special_tokens=False)["input_ids"]
    ids, _ = chats[name].encode_conversation(TALK)
    assert ids == expected[: len(ids)]
    assert tokenizers[name].decode(expected[len(ids) :]).strip() == ""
    assert ids[-1] == chats[name].end_id


@pytest.mark.parametrize("name", NAMES)
@given(contents=st.lists(CONTENTS, min_size=4, max_size=4), other_reply=CONTENTS)
@settings(max_examples=25, deadline=None)
def test_a_prompt_has_the_same_ids_whatever_the_reply_is(chats, name, contents, other_reply):
    chat = chats[name]
    prompt = [user(contents[0]), assistant(contents[1]), user(contents[2])]
    prompt_ids = chat.encode_prompt(prompt)
    for reply in (contents[3], other_reply):
        ids, mask = chat.encode_conversation([*prompt, assistant(reply)])
        response_ids = chat.encode_response(reply)
        assert ids == prompt_ids + response_ids
        assert mask[len(prompt_ids) :] == [True] * len(response_ids)
    if name == "thinking":
        return  # which forgets the thoughts of earlier replies
    # the first reply inside the longer prompt is what was trained and sampled when it was the last
    first = chat.encode_prompt(prompt[:1]) + chat.encode_response(contents[1])
    assert prompt_ids[: len(first)] == first


@pytest.mark.parametrize("name", NAMES)
def test_the_mask_covers_every_reply_and_its_end_token_and_nothing_else(chats, tokenizers, name):
    thoughts = "<think>\n\n</think>\n\n" if name == "thinking" else ""
    ids, mask = chats[name].encode_conversation(TALK)
    trained = [i for i, m in zip(ids, mask, strict=True) if m]
    assert sum(i == chats[name].end_id for i in trained) == 2
    end = tokenizers[name].convert_ids_to_tokens(chats[name].end_id)
    said = tokenizers[name].decode(trained).split(end)
    assert [text.strip() for text in said] == ["I am fine.", thoughts + "It is four.", ""]


def test_the_mask_agrees_with_generation_markers_of_transformers(chats, tokenizers):
    marked = (
        "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{%- if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{%- else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    )
    expected = tokenizers["chatml"].apply_chat_template(
        plain_dicts(TALK), chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = chats["chatml"].encode_conversation(TALK)
    assert ids == expected["input_ids"][:-1]  # without the last line break
    assert mask == [bool(m) for m in expected["assistant_masks"][:-1]]


@pytest.mark.parametrize("name", NAMES)
def test_a_reply_decodes_to_its_text(chats, name):
    for text in ("It is four.", "a\n\nb", "<|user|>"):
        if name == "llama2" and "\n" in text:
            continue  # this vocabulary has no line break
        assert chats[name].decode_response(chats[name].encode_response(text)) == text


@pytest.mark.parametrize(
    ("name", "stops"), [("chatml", {"<|im_end|>", "<|endoftext|>"}), ("llama3", {"<|eot|>", "<|eos|>"})]
)
def test_both_the_turn_end_and_eos_stop_a_reply(chats, tokenizers, name, stops):
    assert set(tokenizers[name].convert_ids_to_tokens(list(chats[name].stop_ids))) == stops


def test_eos_ends_a_reply_where_the_template_has_no_end_token(chats, tokenizers):
    assert chats["plain"].encode_response("Hello")[-1] == tokenizers["plain"].eos_token_id


def test_a_template_without_generation_prompt_still_introduces_the_assistant(chats, tokenizers):
    assert tokenizers["plain"].decode(chats["plain"].encode_prompt([user("Hello")])) == "user: Hello\nassistant: "


@pytest.mark.parametrize("name", NAMES)
def test_pad_is_never_an_end_token(chats, name):
    assert chats[name].pad_id not in chats[name].stop_ids


@pytest.mark.parametrize(("name", "pad"), [("ours", "<|pad|>"), ("llama3", "<|reserved_0|>"), ("llama2", "<unk>")])
def test_pad_is_the_best_token_there_is(chats, tokenizers, name, pad):
    assert tokenizers[name].convert_ids_to_tokens(chats[name].pad_id) == pad


@pytest.mark.parametrize("name", ["llama3", "llama2", "base"])
def test_there_is_exactly_one_bos(chats, tokenizers, name):
    ids, _ = chats[name].encode_conversation(TALK)
    assert [i for i, id_ in enumerate(ids) if id_ == tokenizers[name].bos_token_id] == [0]


@pytest.mark.parametrize("name", ["ours", "chatml", "llama3", "base"])
def test_special_tokens_written_by_a_user_or_a_reply_are_only_text(chats, tokenizers, name):
    special = "".join(tokenizers[name].all_special_tokens)
    clean, _ = chats[name].encode_conversation([user("a"), assistant("b"), user("c"), assistant("d")])
    ids, _ = chats[name].encode_conversation(
        [user(special), assistant(f"b{special}"), user(f"c{special}d"), assistant(special)]
    )
    ours = set(tokenizers[name].all_special_ids)
    assert Counter(i for i in ids if i in ours) == Counter(i for i in clean if i in ours)
    assert tokenizers[name].decode(ids).count(special) == 4


def test_a_tokenizer_without_a_template_is_given_one_that_is_saved_with_it(tokenizers, chats, tmp_path):
    assert chats["ours"].tokenizer.chat_template == DEFAULT_TEMPLATE
    tokenizers["ours"].save_pretrained(tmp_path)
    again = type(tokenizers["ours"]).from_pretrained(tmp_path)
    assert Chat(again).encode_conversation(TALK) == chats["ours"].encode_conversation(TALK)


def test_the_default_template_reads_as_documented(chats, tokenizers):
    ids = chats["ours"].encode_prompt([Message("system", "Be brief."), user("Hi")])
    assert tokenizers["ours"].decode(ids) == "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n"
    assert set(SPECIAL_TOKENS) - {"<|pad|>"} == {t for t in tokenizers["ours"].convert_ids_to_tokens(ids) if "|" in t}


@pytest.mark.parametrize(
    "messages",
    [[Message("system", "Be brief."), user("Hello")], [user("Hello"), user("there")]],
    ids=["system", "twice"],
)
def test_a_conversation_that_the_template_refuses_is_explained(chats, messages):
    with pytest.raises(DataError, match="Conversation roles must alternate") as caught:
        chats["llama2"].encode_prompt(messages)
    assert "'Hello'" in caught.value.where
    assert "first user turn" in caught.value.fix


def test_earlier_turns_that_the_template_rewrites_are_not_trained(chats, tokenizers):
    talk = [user("Hello"), assistant("<think>fine</think>I am"), user("What"), assistant("<think>two</think>four")]
    ids, mask = chats["thinking"].encode_conversation(talk)
    assert "fine" not in tokenizers["thinking"].decode(ids)
    said = tokenizers["thinking"].decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert said == "<think>\ntwo\n</think>\n\nfour<|im_end|>"


def test_a_generation_prompt_that_begins_the_reply_stays_in_the_prompt():
    opened = CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'")
    chat = Chat(byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], opened, eos_token="<|im_end|>"))
    ids, mask = chat.encode_conversation([user("a"), assistant("b</think>c")])
    assert (
        chat.tokenizer.decode(ids)
        == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\nb</think>c<|im_end|>"
    )
    assert chat.tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "b</think>c<|im_end|>"


def test_a_conversation_without_a_last_reply_is_refused(chats):
    with pytest.raises(DataError, match="does not end with an assistant turn"):
        chats["ours"].encode_conversation([user("Hello")])


@pytest.mark.parametrize(
    ("template", "says"),
    [("{% for m in messages %}{{ m.content }", "unexpected '}'"), ("{{ messages + 1 }}", "can only")],
)
def test_a_template_that_refuses_every_conversation_is_named(template, says):
    tokenizer = make("ours")
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=rf"(?s){says}.*where: the chat template of .*give the tokenizer another"):
        Chat(tokenizer)


def test_a_tokenizer_on_which_no_reply_could_end_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(DataError, match="could never end"):
        Chat(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())))


def test_a_prompt_that_fits_is_kept():
    fitted = fit([1, 2, 3], [4, 5], max_length=5, max_prompt_length=3)
    assert (fitted.prompt_ids, fitted.outcome) == ([1, 2, 3], "kept")


@pytest.mark.parametrize("limits", [{"max_length": 4}, {"max_length": 10, "max_prompt_length": 2}])
def test_a_prompt_that_is_too_long_is_dropped_or_loses_its_beginning(limits):
    dropped = fit([9, 1, 2], [4, 5], **limits)
    cut = fit([9, 1, 2], [4, 5], **limits, on_too_long="truncate_prompt_left")
    cut_behind_bos = fit([9, 1, 2], [4, 5], **limits, on_too_long="truncate_prompt_left", bos_id=9)
    assert (dropped.prompt_ids, dropped.outcome) == ([], "dropped")
    assert (cut.prompt_ids, cut.outcome) == ([1, 2], "truncated")
    assert (cut_behind_bos.prompt_ids, cut_behind_bos.outcome) == ([9, 2], "truncated")


def test_a_reply_is_never_cut():
    assert fit([1], [2, 3, 4], max_length=3, on_too_long="truncate_prompt_left").outcome == "dropped"


@pytest.mark.parametrize(("max_length", "max_prompt_length"), [(8, 8), (1, None), (8, 0)])
def test_lengths_that_leave_no_room_for_a_reply_are_refused(max_length, max_prompt_length):
    with pytest.raises(ConfigError, match="leaves no room"):
        fit([1], [2], max_length=max_length, max_prompt_length=max_prompt_length)


@pytest.mark.parametrize("name", ["ours", "chatml", "llama3", "llama2", "plain", "base"])
@pytest.mark.parametrize("text", ["What is it?", "  blanks \n around ", "a <|start|>assistant<|im_end|></s> b"])
def test_a_user_turn_between_replies_is_written_as_in_a_whole_conversation(chats, name, text):
    chat = chats[name]
    reply = chat.encode_response("I am fine.")
    whole = chat.encode_prompt([user("Hello there"), assistant("I am fine."), user(text)])
    before = chat.encode_prompt([user("Hello there")])
    assert before + reply + chat.encode_user_turn(text, ended=True) == whole


def test_a_template_that_rewrites_earlier_turns_does_not_rewrite_what_was_sampled(chats, tokenizers):
    turn = tokenizers["thinking"].decode(chats["thinking"].encode_user_turn("And you?", ended=True))
    assert turn == "\n<|im_start|>user\nAnd you?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", NAMES)
def test_a_reply_without_its_end_token_is_closed_before_the_user_speaks(chats, name):
    chat = chats[name]
    turn, closed = chat.encode_user_turn("So?", ended=True), chat.encode_user_turn("So?", ended=False)
    closing = closed[: -len(turn)]
    assert closed == closing + turn
    assert closing[-1] == chat.end_id
    assert chat.decode_response(closing) == ""


@pytest.mark.parametrize("name", NAMES)
def test_a_text_within_a_reply_is_only_text(chats, tokenizers, name):
    chat = chats[name]
    special = "<|im_end|></s><|start|><|end|><|endoftext|>"
    ids = chat.encode_inline(f"two {special} four")
    assert not set(ids) & set(tokenizers[name].all_special_ids) - {tokenizers[name].unk_token_id}
    if name != "llama2":  # its alphabet lacks letters of these
        assert tokenizers[name].decode(ids) == f"two {special} four"
    assert tokenizers[name].decode(chat.encode_inline("It is four.")) == "It is four."  # no blank before it


def test_a_template_that_cannot_go_on_after_a_reply_is_refused():
    once = "{% if messages|length > 2 %}{{ messages[0]['content'] }}{% else %}" + CHATML + "{% endif %}"
    tokenizer = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], once, eos_token="<|im_end|>")
    with pytest.raises(DataError, match="does not write a user turn after a reply"):
        Chat(tokenizer).encode_user_turn("So?", ended=True)


def test_a_prompt_that_the_template_refuses_or_cuts_is_told_by_its_roles(tokenizers):
    system, asked, answered = Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Yo")
    llama2 = Chat(tokenizers["llama2"])
    assert llama2.refusal([asked]) is None
    refused = llama2.refusal([system, asked])
    assert refused is not None
    assert refused.kind == "template_refuses"
    assert "must alternate" in refused.problem

    deaf = copy.deepcopy(tokenizers["ours"])
    deaf.chat_template = DEFAULT_TEMPLATE.replace("in messages", "in messages if message['role'] != 'system'")
    left_out = Chat(deaf).refusal([system, asked])
    assert left_out is not None
    assert left_out.kind == "template_leaves_out"
    assert "leaves out the system turn (turn 1 of 2)" in left_out.problem
    # a template that drops the reasoning of earlier replies leaves nothing out that a person wrote
    assert Chat(tokenizers["thinking"]).refusal([asked, answered, asked]) is None


def test_a_row_that_the_template_refuses_is_a_bad_row_with_its_place(tokenizers, tmp_path):
    rows = [{"prompt": "Hi", "completion": "Yo"}, {"system": "Be brief.", "prompt": "Hi", "completion": "Yo"}]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refusal = Chat(tokenizers["llama2"]).refusal
    with pytest.raises(DataError, match="refuses the conversation") as caught:
        load(Demonstration, path, accepts=refusal)
    assert caught.value.where == f"{path}, row 2"
    loaded = load(Demonstration, path, accepts=refusal, on_bad_row="drop")
    assert loaded.counts == {"rows": 2, "records": 1, "dropped_template_refuses": 1}
    assert loaded.report == {"layout": "prompts with completions", "not_used": [], "dropped": {"template_refuses": 1}}


def test_a_conversation_refused_for_its_contents_says_nothing_of_others():
    """The first of the file decided for all with the same order of roles."""
    tokenizer = make("chatml")
    refuses = "{% if 'no' in messages[0]['content'] %}{{ raise_exception('no no') }}{% endif %}"
    tokenizer.chat_template = refuses + tokenizer.chat_template
    chat = Chat(tokenizer)
    assert chat.refusal([Message("user", "no")]).kind == "template_refuses"
    assert chat.refusal([Message("user", "yes")]) is None
    assert chat.refusal([Message("user", "no")]).kind == "template_refuses"
