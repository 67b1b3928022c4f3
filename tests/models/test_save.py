"""What is written behaves in plain transformers as it does here: ends, padding, dtype, template."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DeepseekV3Config,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from tests.tiny import TEXTS
from trimtab.batches.trees import TokenTrees, response_tree
from trimtab.core.errors import EngineError
from trimtab.core.types import Message, Prompt
from trimtab.data.chat import Chat
from trimtab.models.forward import sequence_scores_of
from trimtab.models.load import load_causal, load_scalar, load_tokenizer
from trimtab.models.roles import ScalarModel
from trimtab.models.save import round_as_written, save_model
from trimtab.rewards.scorer import RewardModelScorer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ENDS_IN_EOS = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"


def tokenizer(special, template, **roles):
    """A byte-level tokenizer with these special tokens, and these of them as eos_token and so on."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, **roles)
    made.chat_template = template
    return made


BASES = {
    "end of the template is not eos": lambda: tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], CHATML, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ),
    "pad is eos, and unk is there": lambda: tokenizer(
        ["<unk>", "</s>"], ENDS_IN_EOS, eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    ),
    "eos is the only special token": lambda: tokenizer(["<|endoftext|>"], ENDS_IN_EOS, eos_token="<|endoftext|>"),
}


def write_base(directory, tok, *, dtype=torch.float32, rows=None, kind=LlamaConfig):
    torch.manual_seed(0)
    size = {"vocab_size": rows or len(tok), "eos_token_id": tok.eos_token_id, "bos_token_id": None}
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    if kind is GPT2Config:
        shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 96}
    model = AutoModelForCausalLM.from_config(kind(**size, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    model.to(dtype).save_pretrained(directory)
    tok.save_pretrained(directory)
    return directory


def rewrite(base, out):
    save_model(load_causal(base), load_tokenizer(base), out)
    return out


@pytest.mark.parametrize("name", BASES)
def test_a_reply_ends_in_transformers_where_it_ends_here(name, tmp_path):
    out = rewrite(write_base(tmp_path / "base", BASES[name]()), tmp_path / "out")
    chat = Chat(load_tokenizer(out))
    model, tok = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    for settings in (GenerationConfig.from_pretrained(out), model.generation_config, model.config):
        ids = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        assert set(ids) == chat.stop_ids
        assert tok.eos_token_id in ids
    head = model.get_output_embeddings()
    with torch.no_grad():  # after anything, the likeliest token is the end of the template
        head.weight = torch.nn.Parameter(torch.zeros_like(head.weight))
        head.bias = torch.nn.Parameter(torch.nn.functional.one_hot(torch.tensor(chat.end_id), len(head.weight)).float())
    prompt = torch.tensor([chat.encode_prompt([Message("user", "Hello")])])
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=9, do_sample=False)
    assert written[0, prompt.shape[1] :].tolist() == [chat.end_id]


@pytest.mark.parametrize("special", [[], ["<|spare|>"]])
def test_generate_without_a_mask_reads_the_whole_prompt(tmp_path, special):
    """Without a mask it masks every pad token, so the tokens that a template writes cannot be one."""
    made = tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special], CHATML, eos_token="<|endoftext|>")
    out = rewrite(write_base(tmp_path / "base", made), tmp_path / "out")
    model, tok = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}] * 2
    prompt = tok.apply_chat_template(turns, return_dict=True, return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 9, "do_sample": False}
    whole = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert model.generate(prompt, **options).tolist() == whole.tolist()
    assert tok.pad_token == (special[0] if special else "<|endoftext|>")


@pytest.mark.parametrize("name", BASES)
def test_a_reward_model_scores_a_padded_batch_in_transformers_as_each_text_here(name, tmp_path):
    base = write_base(tmp_path / "base", BASES[name]())
    model, tok = load_scalar(base, head_seed=0), load_tokenizer(base)
    chat = Chat(tok)
    replies = ["Oslo.", "The capital of Norway is Oslo, I think, and so on!", "!!!!"]
    role = ScalarModel(model, pad_id=chat.pad_id)
    tree = response_tree(chat.encode_prompt([Message("user", "Hi")]), [chat.encode_response(r) for r in replies])
    expected = sequence_scores_of(role, TokenTrees.build([tree]), 10**9)
    save_model(model, tok, tmp_path / "out")

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.pad_token_id == plain.config.pad_token_id
    assert theirs.pad_token_id not in chat.stop_ids
    rows = [{"input_ids": [*tree.prompt, *branch.ids]} for branch in tree.branches]
    batch = theirs.pad(rows, return_tensors="pt")
    with torch.no_grad():
        together = plain(**batch).logits[:, 0]
        alone = torch.cat([plain(torch.tensor([row["input_ids"]])).logits[:, 0] for row in rows])
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone, expected, atol=1e-4, rtol=1e-4)
    again = ScalarModel(load_scalar(tmp_path / "out"), pad_id=Chat(load_tokenizer(tmp_path / "out")).pad_id)
    torch.testing.assert_close(sequence_scores_of(again, TokenTrees.build([tree]), 10**9), expected)


WITHOUT_END = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"


@pytest.mark.parametrize("template", [CHATML, ENDS_IN_EOS, WITHOUT_END, "\n" + CHATML + "\n"])
@pytest.mark.parametrize("named", [False, True])
def test_other_programs_read_a_reward_model_where_it_was_trained(tmp_path, template, named):
    made = tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], template, eos_token="<|endoftext|>")
    if named:
        made.chat_template = {"default": template, "other": CHATML}
    base = write_base(tmp_path / "base", made)
    model = load_scalar(base, head_seed=0)
    model.config.update({"reward_shift": 0.5})
    save_model(model, load_tokenizer(base), tmp_path / "first")
    save_model(load_scalar(tmp_path / "first"), load_tokenizer(tmp_path / "first"), tmp_path / "out")

    talk, replies = (
        [Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "Where?")],
        ["Oslo.", "I see!"],
    )
    if template == WITHOUT_END:
        talk = talk[:1]  # it closes no earlier reply, and those here are closed as they were written
    scorer = RewardModelScorer.from_directory(str(tmp_path / "out"), token_budget=4096)
    ours = scorer.score_texts([(Prompt(messages=tuple(talk)), reply) for reply in replies])
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    talks = [[{"role": m.role, "content": m.content} for m in [*talk, Message("assistant", r)]] for r in replies]
    batch = theirs.apply_chat_template(talks, padding=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits[:, 0] - 0.5, ours, atol=1e-4, rtol=1e-4)
    for row in talks:
        asked = {"tokenize": False, "add_generation_prompt": True}
        assert theirs.apply_chat_template(row[:-1], **asked) == made.apply_chat_template(row[:-1], **asked)


def test_generation_settings_say_where_a_reply_ends_and_stay(tmp_path):
    base = write_base(tmp_path / "base", BASES["end of the template is not eos"]())
    settings = GenerationConfig(eos_token_id=[0, 7], temperature=0.6, top_p=0.9)
    settings.do_sample = True
    settings.save_pretrained(base)
    assert Chat(load_tokenizer(base)).stop_ids == {0, 2, 7}
    # As published: a temperature without do_sample, which transformers reads with a warning and refuses to write.
    file = base / "generation_config.json"
    file.write_text(file.read_text().replace('"do_sample": true,', ""))
    out = rewrite(base, tmp_path / "out")
    written = GenerationConfig.from_pretrained(out)
    assert (set(written.eos_token_id), written.temperature, written.top_p) == ({0, 2, 7}, 0.6, 0.9)
    assert not written.do_sample  # vLLM samples at this temperature, and plain generate decodes greedily, as before
    assert Chat(load_tokenizer(out)).stop_ids == {0, 2, 7}


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
        {"forced_eos_token_id": 1},
        {"bad_words_ids": [[5]], "suppress_tokens": [6]},
        {"min_new_tokens": 4, "stop_strings": ["a"]},
    ],
)
def test_settings_of_a_base_that_make_another_policy_of_it_are_said_and_not_written(tmp_path, capsys, changes):
    base = write_base(tmp_path / "base", BASES["end of the template is not eos"]())
    file = base / "generation_config.json"
    usual = {"repetition_penalty": 1.0, "num_beams": 1, "temperature": 0.6}
    file.write_text(json.dumps({"eos_token_id": 0, "do_sample": True, **usual, **changes}))
    out = rewrite(base, tmp_path / "out")
    said = capsys.readouterr().err
    assert all(f"{name} = {value}" in said for name, value in changes.items())
    written = json.loads((out / "generation_config.json").read_text())
    assert written["temperature"] == 0.6
    assert not set(changes) & set(written)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.tensor([[3, 10, 12, 10]])
    plain = ids
    with torch.no_grad():
        for _ in range(6):
            plain = torch.cat([plain, model(input_ids=plain).logits[:, -1:].argmax(-1)], 1)
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert found[0].tolist() == plain[0, : found.shape[1]].tolist()


@pytest.mark.parametrize("broken", [math.nan, 1e5])
def test_weights_that_the_dtype_cannot_hold_are_not_written(tmp_path, broken):
    base = write_base(tmp_path / "base", BASES["end of the template is not eos"]())
    model, tokenizer = load_causal(base), load_tokenizer(base)
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 0] = broken
    with pytest.raises(EngineError, match=r"nan or infinity in float16, such as .*embed.*not written"):
        save_model(model, tokenizer, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_an_eos_id_that_only_the_class_of_the_configuration_chose_ends_nothing(tmp_path):
    tok = BASES["eos is the only special token"]()
    base = write_base(tmp_path / "base", tok)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.eos_token_id = model.generation_config.eos_token_id = 2  # the default of Llama's, here a "!"-like word
    model.generation_config._from_model_config = True
    model.save_pretrained(base)
    assert Chat(load_tokenizer(base)).stop_ids == {tok.eos_token_id}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scalar", [False, True])
def test_weights_are_written_in_the_dtype_they_were_stored_in(tmp_path, dtype, scalar):
    base = write_base(tmp_path / "base", BASES["pad is eos, and unk is there"](), dtype=dtype)
    model = load_scalar(base, head_seed=0) if scalar else load_causal(base)
    assert model.dtype == torch.float32
    before = model.get_input_embeddings().weight.detach().clone()
    with torch.no_grad():
        model.get_input_embeddings().weight += 1e-5  # less than bfloat16 can hold
    save_model(model, load_tokenizer(base), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {dtype}  # noqa: SIM118
    kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    assert kind.from_pretrained(tmp_path / "out", dtype="auto").dtype == dtype
    again = (load_scalar if scalar else load_causal)(tmp_path / "out").get_input_embeddings().weight
    torch.testing.assert_close(again, model.get_input_embeddings().weight.to(dtype).float(), rtol=0, atol=0)
    round_as_written(model)
    torch.testing.assert_close(again, model.get_input_embeddings().weight, rtol=0, atol=0)
    assert not torch.equal(before, again) or dtype == torch.bfloat16
    save_model(model, load_tokenizer(base), tmp_path / "asked", dtype=torch.float32)
    assert kind.from_pretrained(tmp_path / "asked", dtype="auto").dtype == torch.float32


def test_what_a_router_chooses_by_stays_float32_as_transformers_keeps_it(tmp_path):
    tok = BASES["pad is eos, and unk is there"]()
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8}
    widths = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16}
    sizes = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    config = DeepseekV3Config(
        vocab_size=len(tok), num_hidden_layers=1, first_k_dense_replace=0, **experts, **heads, **widths, **sizes
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    gate = model.model.layers[0].mlp.gate
    with torch.no_grad():
        gate.e_score_correction_bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))  # none of them a bfloat16 number
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.written_dtype = torch.bfloat16
    save_model(model, tok, tmp_path)
    round_as_written(model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
        assert torch.equal(tensor, before[name]) == ("gate." in name or "norm" in name), name


def test_a_pad_token_that_the_model_has_no_row_for_is_not_chosen(tmp_path):
    tok = tokenizer(["<s>", "</s>"], ENDS_IN_EOS, eos_token="</s>", bos_token="<s>")
    rows = len(tok)
    tok.add_special_tokens({"pad_token": "[PAD]"})
    base = write_base(tmp_path / "base", tok, rows=rows)
    chat = Chat(load_tokenizer(base))
    assert chat.pad_id < rows
    save_model(load_scalar(base, head_seed=0), load_tokenizer(base), tmp_path / "out")
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out").pad_token_id
        == load_scalar(tmp_path / "out").config.pad_token_id
    )
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")


def test_the_live_tokenizer_is_left_as_it_is(tmp_path):
    base = write_base(tmp_path / "base", BASES["eos is the only special token"]())
    tok = load_tokenizer(base)
    save_model(load_scalar(base, head_seed=0), tok, tmp_path / "out")
    assert tok.pad_token is None
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(tok) + 1


def test_gpt2_has_the_pad_of_its_end_token_only_where_no_score_depends_on_it(tmp_path):
    out = rewrite(
        write_base(tmp_path / "base", BASES["eos is the only special token"](), kind=GPT2Config), tmp_path / "out"
    )
    tok, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert tok.pad_token_id == tok.eos_token_id == model.config.pad_token_id
    assert model.get_input_embeddings().num_embeddings == len(tok)
