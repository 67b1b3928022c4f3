"""A reward model of another program reads what its chat template writes, up to where transformers reads its score."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from tests.models.test_save import tokenizer, write_base
from trimtab.core.errors import EngineError
from trimtab.core.types import Message, Prompt, Rollout
from trimtab.models.load import load_causal
from trimtab.rewards.scorer import RewardModelScorer
from trimtab.stages.export import export

TURNS = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endfor %}"
ASKS = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
TEMPLATES = {
    "ends with eos": TURNS + ASKS,
    "eos behind the conversation": TURNS.replace("</s>", "\\n") + ASKS.replace("endif", "else %}</s>{% endif"),
    "a thought opened in the prompt only": TURNS + ASKS.replace("|>'", "|>think\\n'"),
    "the system turn before the last question": (
        "{% for m in messages %}{% if loop.last and m.role == 'user' and messages[0].role == 'system' %}"
        "{{ messages[0].content }}{% endif %}"
        "{% if m.role != 'system' %}{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endif %}{% endfor %}" + ASKS
    ),
    "earlier replies end with nothing": TURNS.replace("+ '</s>'", "") + ASKS,
}
TALKS = (
    [Message("user", "I want a refund!")],
    [Message("system", "Be brief."), Message("user", "Hello"), Message("assistant", "Yes?"), Message("user", "Why?")],
)
REPLIES = ("We can refund it.", "No", "")


@pytest.fixture
def foreign(tmp_path):
    """A reward model as other programs write it, with a pad token of theirs."""

    def make(template, *, pad_id=1):
        tok = tokenizer(["<unk>", "</s>"], template, eos_token="</s>", pad_token="</s>", unk_token="<unk>")
        shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=len(tok), num_labels=1, pad_token_id=pad_id, **shape)
        model = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8.0 if parameter.ndim > 1 else 1.0)
        model.save_pretrained(tmp_path / "reward")
        tok.save_pretrained(tmp_path / "reward")
        return str(tmp_path / "reward")

    return make


def plain_scores(path, model=None):
    tok = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path) if model is None else model
    found = []
    for talk in TALKS:
        for reply in REPLIES:
            turns = [{"role": m.role, "content": m.content} for m in [*talk, Message("assistant", reply)]]
            ids = tok.apply_chat_template(turns, return_dict=True, return_tensors="pt")
            with torch.no_grad():
                found.append(model(**ids).logits[0, 0])
    return torch.stack(found)


@pytest.mark.parametrize("pad_id", [None, 0, 1])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_score_is_the_one_of_transformers_for_the_text_of_the_template(foreign, name, pad_id):
    path = foreign(TEMPLATES[name], pad_id=pad_id)
    scorer = RewardModelScorer.from_directory(path, token_budget=4096)
    texts = [(Prompt(messages=tuple(talk)), reply) for talk in TALKS for reply in REPLIES]
    torch.testing.assert_close(scorer.score_texts(texts), plain_scores(path), atol=1e-4, rtol=1e-4)

    rollouts = []
    for prompt, reply in texts:
        prompt_ids, ids = scorer.chat.encode_prompt(prompt.messages), scorer.chat.encode_response(reply)
        own = {"prompt_ids": tuple(prompt_ids), "response_ids": tuple(ids), "logprobs": (0.0,) * len(ids)}
        rollouts.append(Rollout(prompt=prompt, response=reply, finish_reason="stop", **own))
    torch.testing.assert_close(scorer.score(rollouts)[0], plain_scores(path), atol=1e-4, rtol=1e-4)


def test_a_reply_that_was_cut_off_has_no_ending_there_either(foreign):
    scorer = RewardModelScorer.from_directory(
        foreign(TEMPLATES["a thought opened in the prompt only"], pad_id=0), token_budget=4096
    )
    prompt, reply = Prompt(messages=tuple(TALKS[0])), REPLIES[0]
    ids = scorer.chat.encode_response(reply, ended=False)
    own = {"prompt_ids": (5,), "response_ids": tuple(ids), "logprobs": (0.0,) * len(ids)}
    [(begin, end)] = scorer.ids_of([Rollout(prompt=prompt, response=reply, finish_reason="length", **own)])
    [(whole_begin, whole_end)] = scorer.ids_of_texts([(prompt, reply)])
    assert (*begin, *end, *scorer.ending) == (*whole_begin, *whole_end)
    assert scorer.ending


@pytest.mark.parametrize("name", ["ends with eos", "eos behind the conversation"])
@pytest.mark.parametrize("pad_id", [0, 1])
def test_an_exported_model_keeps_the_pad_token_before_which_it_is_read(foreign, tmp_path, name, pad_id):
    path = foreign(TEMPLATES[name], pad_id=pad_id)
    expected = plain_scores(path)
    export(model=path, out=tmp_path / "out")
    torch.testing.assert_close(plain_scores(tmp_path / "out"), expected, atol=1e-5, rtol=1e-5)
    written = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert written.pad_token_id == pad_id


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by peft
def test_an_adapter_on_a_shared_base_is_read_before_the_pad_token_of_its_base(tmp_path):
    tok = tokenizer(["<unk>", "</s>"], TEMPLATES["ends with eos"], eos_token="</s>", pad_token="</s>")
    base = write_base(tmp_path / "base", tok)
    config = json.loads((base / "config.json").read_text()) | {"pad_token_id": 1}
    (base / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    settings = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(plain, settings).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    tok.save_pretrained(tmp_path / "adapter")
    path = str(tmp_path / "adapter")
    scorer = RewardModelScorer.on_shared(load_causal(base), "judge", path, token_budget=4096)
    texts = [(Prompt(messages=tuple(talk)), reply) for talk in TALKS for reply in REPLIES]
    torch.testing.assert_close(scorer.score_texts(texts), plain_scores(path, adapted), atol=1e-4, rtol=1e-4)


def test_without_a_chat_template_nothing_says_how_a_reply_is_read(foreign):
    with pytest.raises(EngineError, match="no chat template, so nothing says how a prompt and a reply are written"):
        RewardModelScorer.from_directory(foreign(None), token_budget=4096)
