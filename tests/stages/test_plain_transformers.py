"""What a stage writes is an ordinary model: transformers alone loads it and finds the same numbers."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.stages.commands import FAST, online_settings, run_stage
from trimtab import worlds
from trimtab.batches.rollouts import in_groups, rollout_trees
from trimtab.data.chat import Chat
from trimtab.engines.local.sampler import LocalSampler, Sampling
from trimtab.models.forward import token_logprobs_of
from trimtab.models.load import load_causal, load_tokenizer
from trimtab.models.roles import Policy
from trimtab.rewards.scorer import RewardModelScorer


@pytest.fixture(scope="module", params=["sft", "online"])
def policy_dir(request, tmp_path_factory, base, reward_run):
    out = tmp_path_factory.mktemp("plain") / request.param
    if request.param == "sft":
        settings = {"model": str(base), "data": "world:arithmetic?num=16", "batch_size": 8, "optimizer": FAST}
    else:
        settings = online_settings(base, reward_run / "model")
    return run_stage(request.param, out, **settings) / "model"


def rendered(tokenizer, messages, reply=None):
    """Ids of a prompt, or of a whole conversation up to the end token of the reply, by the tokenizer's own template."""
    turns = [{"role": m.role, "content": m.content} for m in messages]
    if reply is None:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": reply}], return_dict=False)
    return ids[: max(i for i, token in enumerate(ids) if token == tokenizer.eos_token_id) + 1]


def test_a_policy_gives_the_same_logprobs_and_the_same_greedy_replies(policy_dir):
    chat = Chat(load_tokenizer(policy_dir))
    policy = Policy(load_causal(policy_dir), pad_id=chat.pad_id)
    prompts = worlds.load("arithmetic").prompts("test", 4)
    greedy = LocalSampler(policy, chat, Sampling(max_new_tokens=8, top_k=1)).generate(prompts, group_size=1, seed=0)
    ours = token_logprobs_of(policy, rollout_trees(in_groups(greedy, 1)), 10**9)

    tokenizer = AutoTokenizer.from_pretrained(policy_dir)
    model = AutoModelForCausalLM.from_pretrained(policy_dir).eval()
    theirs = []
    for rollout in greedy:
        prompt_ids = rendered(tokenizer, rollout.prompt.messages)
        assert tuple(prompt_ids) == rollout.prompt_ids
        with torch.no_grad():
            out = model.generate(
                torch.tensor([prompt_ids]),
                attention_mask=torch.ones(1, len(prompt_ids)),
                max_new_tokens=8,
                do_sample=False,
            )
            logprobs = model(out).logits[0].log_softmax(-1)
        assert tuple(out[0, len(prompt_ids) :].tolist()) == rollout.response_ids
        theirs += [logprobs[i - 1, out[0, i]] for i in range(len(prompt_ids), out.shape[1])]
    torch.testing.assert_close(ours, torch.stack(theirs), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_reward_model_gives_the_same_scores(tmp_path, reward_run, encoder, pairs, kind):
    directory = reward_run / "model"
    if kind == "encoder":
        settings = {"model": str(encoder), "data": str(pairs), "held_out": 0.3, "batch_size": 10, "optimizer": FAST}
        directory = run_stage("reward", tmp_path / "run", **settings) / "model"
    texts = [(d.prompt, d.response) for d in worlds.load("arithmetic").demonstrations("test", 6)]
    ours = RewardModelScorer.from_directory(str(directory), token_budget=100).score_texts(texts)

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    ids = [rendered(tokenizer, prompt.messages, reply) for prompt, reply in texts]
    batch = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        together = model(**batch).logits[:, 0]
        alone = torch.stack([model(torch.tensor([row])).logits[0, 0] for row in ids])
    torch.testing.assert_close(ours, alone - model.config.reward_shift, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, together - model.config.reward_shift, atol=1e-5, rtol=1e-5)
    assert model.config.num_labels == 1


def test_a_base_model_writes_text(tmp_path):
    shape = {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "mlp_size": 48, "max_positions": 256}
    out = run_stage(
        "pretrain",
        tmp_path / "run",
        data="world:arithmetic",
        num_documents=8,
        vocab_size=280,
        architecture=shape,
        batch_size=4,
    )
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    ids = tokenizer("Work out", return_tensors="pt")["input_ids"]
    drawn = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(drawn[0]).startswith("Work out")
