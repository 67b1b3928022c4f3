"""Mistakes of the field that concern the online algorithms, each held off by a test that is named for what must hold.

The threads tell how it went wrong elsewhere. Those that are not tested here are held by a test in its own place:

| trap | threads | held by |
|---|---|---|
| loss scaling: the mean of means of micro-batches | OpenRLHF#923, OpenRLHF#1249, trl#3021, trl#5619 |
  engines/test_local_learner `test_the_loss_is_the_mean_over_all_tokens_of_the_step_not_of_means`,
  stages/test_online_invariance `test_every_policy_loss_gives_the_same_update_for_any_split_order_and_form` |
| loss scaling: a generation trained on in several steps | trl#6024 | parity/test_trl_online
  `test_the_step_is_divided_by_its_own_tokens_and_not_by_a_share_of_the_generation_batch` |
| loss scaling: a constant length | trl#3021 | math/losses/test_policy
  `test_a_constant_length_divides_by_it_whatever_the_lengths_are` |
| metrics: weights missing from the logged reward | trl#5353 | stages/test_online
  `test_several_rewards_add_up_with_their_weights` |
| metrics: raw ratios of another sampler | trl#5231, trl#5814 | stages/test_online_family
  `test_weights_of_a_sampler_that_is_not_the_policy_by_hand` |
| precision: log-probabilities in half precision | OpenRLHF#620, OpenRLHF#634 | math/losses/test_policy
  `test_half_precision_logprobs_are_subtracted_in_float32`, models/test_precision |
| precision: no temperature in training | trl#4159 | math/test_logprobs `test_temperature_is_part_of_the_distribution`,
  stages/test_online_arithmetic and test_online_family, which sample and train at 0.9 |
| precision: a sampler that drifts away | trl#4873 | stages/test_online
  `test_a_sampler_that_is_not_the_policy_is_refused_before_any_update` |
| masks: position ids and padding | OpenRLHF#217, OpenRLHF#351 | models/test_forward
  `test_logprobs_are_those_of_transformers_on_each_sequence_alone` |
| weights: stale or freed copies in the sampler | trl#4571, trl#5147, trl#5313 | engines/test_local_generator
  `test_the_fused_copy_follows_the_weights` |
| weights: wrappers in what is saved | trl#3998, trl#5245 | stages/test_online
  `test_a_value_head_leaves_no_trace_in_the_model`, stages/test_plain_transformers |
| reward model: no `num_labels`, no pad id | trl#937, trl#5066 | stages/test_plain_transformers
  `test_a_reward_model_gives_the_same_scores` |
| data: Dr. GRPO with one sample | OpenRLHF#1250 | math/test_advantages
  `test_a_group_of_one_has_no_advantage_and_no_nan`, stages/test_online_family
  `test_settings_that_contradict_each_other_are_refused_before_anything_is_loaded` |
| state: the KL coefficient after a resume | verl#2653, verl#7013 | stages/test_resume |
"""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from tests.stages.commands import FAST, online_settings, rows, run_stage
from tests.tiny import VOCAB, causal, write_model_directory
from trimtab import worlds
from trimtab.batches.rollouts import PolicyBatch, rollout_trees
from trimtab.batches.trees import TokenTrees, response_tree
from trimtab.core import config
from trimtab.core.metrics import Metrics
from trimtab.core.types import Rollout
from trimtab.data.chat import Chat
from trimtab.engines.local.learner import AdamW, LocalLearner
from trimtab.engines.local.sampler import LocalSampler, Sampling
from trimtab.math.advantages import GRPO, RLOO, Episodes, token_rewards
from trimtab.math.losses.policy import PPO
from trimtab.models.adapters import LoRA, add_adapter, save_adapter, using
from trimtab.models.forward import token_logprobs_of
from trimtab.models.load import load_causal, load_scalar, load_tokenizer
from trimtab.models.roles import Policy
from trimtab.models.save import save_model
from trimtab.rewards.combined import CombinedReward, RewardPart
from trimtab.rewards.scorer import RewardModelScorer
from trimtab.stages.online.models import load_models
from trimtab.stages.online.objectives import minibatches
from trimtab.stages.online.settings import OnlineSettings


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model_directory(tmp_path_factory.mktemp("traps") / "base")


@pytest.fixture(scope="module")
def pad_is_eos(tmp_path_factory, base):
    """A model whose tokenizer pads with its end token, as many do."""
    directory = tmp_path_factory.mktemp("traps") / "pad_is_eos"
    model, tokenizer = load_causal(base), load_tokenizer(base)
    tokenizer.pad_token = tokenizer.eos_token
    model.save_pretrained(directory)  # as others write it
    tokenizer.save_pretrained(directory)
    again = load_tokenizer(directory)
    assert again.pad_token_id == again.eos_token_id
    return directory


def sampled(directory, *, num=4, group_size=3, max_new_tokens=8):
    chat = Chat(load_tokenizer(directory))
    policy = Policy(load_causal(directory), pad_id=chat.pad_id)
    prompts = worlds.load("arithmetic").prompts("train", num)
    generator = LocalSampler(policy, chat, Sampling(max_new_tokens=max_new_tokens))
    return generator.generate(prompts, group_size=group_size, seed=0), policy, chat


def ids(n, seed=0):
    return torch.randint(2, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def policy_batch(trees, seed=0):
    """A batch with random numbers in every place."""
    draw = torch.Generator().manual_seed(seed)
    names = ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns")
    numbers = {name: torch.randn(trees.num_trained, generator=draw) for name in names}
    return PolicyBatch(trees=trees, correction=torch.ones(trees.num_trained), **numbers)


def learner_of(role, **options):
    return LocalLearner(role, AdamW(learning_rate=1e-3), token_budget=10**9, num_updates=1, name="policy", **options)


def gradient(role, batch, loss):
    learner = learner_of(role)
    metrics = learner.update([(batch, [loss])])
    return torch.cat([p.grad.flatten() for p in learner.parameters.values() if p.grad is not None]), metrics


# ---- loss scaling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant_length"])
def test_replies_left_out_of_the_loss_are_left_out_of_its_denominator(aggregation):
    """trl#6439: cut-off replies gave no gradient and were still counted, which shrank every step."""
    trees = TokenTrees.build([response_tree(ids(3), [ids(5, 1), ids(2, 2)]), response_tree(ids(4), [ids(6, 3)])])
    kept = torch.tensor([True, False, True])
    batch = policy_batch(trees).filter(kept)
    alone = TokenTrees.build([response_tree(ids(3), [ids(5, 1)]), response_tree(ids(4), [ids(6, 3)])])
    loss = PPO(aggregation=aggregation, length=8 if aggregation == "constant_length" else None)
    assert float(loss.weight(batch)) == {"token_mean": 11, "sequence_mean": 2, "constant_length": 16}[aggregation]
    whole = policy_batch(trees)
    tokens = kept[whole.sequence_ids]
    numbers = ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns", "correction")
    told = PolicyBatch(trees=alone, **{name: getattr(whole, name)[tokens] for name in numbers})
    torch.testing.assert_close(
        gradient(Policy(causal(), pad_id=0), batch, loss)[0], gradient(Policy(causal(), pad_id=0), told, loss)[0]
    )


def test_tokens_an_environment_wrote_count_in_no_denominator():
    """trl#6439 for tools: what was not chosen has no loss, so the mean is over what was."""
    trees = TokenTrees.build([response_tree(ids(3), [ids(6, 1)], [[True, True, False, False, False, True]])])
    assert float(PPO().weight(policy_batch(trees))) == 3


# ---- metrics -------------------------------------------------------------------------------------------------------


def test_metrics_of_a_step_are_means_over_its_tokens_however_many_minibatches_it_had(tmp_path, base):
    """trl#6380: means of parts of different sizes were averaged as if the parts were equal."""
    found = []
    for num_minibatches in (1, 3):
        frozen = {"learning_rate": 1e-30}  # the policy stays, so every minibatch sees the same one
        settings = grpo(base, num_minibatches=num_minibatches, optimizer=frozen, num_steps=1, prompts_per_step=5)
        found.append(rows(run_stage("online", tmp_path / f"run-{num_minibatches}", **settings))[0])
    one, three = found
    assert three["optimizer/policy_updates"] == 3
    for name in ("policy/entropy", "policy/loss", "policy/approx_kl", "policy/ratio_mean", "policy/clip_fraction"):
        assert three[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name


def test_entropy_and_divergence_are_of_the_tokens_that_were_chosen():
    """TRL's PPO took both over the whole padded rectangle. Here a reply that an environment wrote half of gives the
    metrics of the other half, padded or not."""
    masks = [[True, True, False, False, True], [True] * 9]
    trees = TokenTrees.build([response_tree(ids(3), [ids(5, 1), ids(9, 2)], masks)])
    logged: list[Metrics] = []
    for tree_form in (True, False):
        role = Policy(causal(), pad_id=0)
        role.tree_form = tree_form
        logged.append(gradient(role, policy_batch(trees), PPO())[1])
    role, batch = Policy(causal(), pad_id=0), policy_batch(trees)
    with torch.no_grad():
        outputs = role(trees, entropy=True)
    assert len(outputs.entropy) == 3 + 9
    moved = outputs.logprobs - batch.old_logprobs
    for metrics in logged:
        assert metrics["policy/entropy"].value == pytest.approx(float(outputs.entropy.mean()), rel=1e-5)
        assert metrics["policy/approx_kl"].value == pytest.approx(float((moved.exp() - 1 - moved).mean()), rel=1e-4)


# ---- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "gpt_neox", "mistral_windowed"])
def test_logprobs_do_not_depend_on_what_they_are_computed_beside(architecture):
    """verl#6280: log-probabilities changed with the micro-batch, and ratios were not 1 before the first update."""
    trees = TokenTrees.build([response_tree(ids(2 + i, i), [ids(3 + 2 * i, 9 + i), ids(5, 20 + i)]) for i in range(5)])
    role = Policy(causal(architecture), pad_id=0)
    together = token_logprobs_of(role, trees, 10**9)
    for budget in (1, 25, 60):
        torch.testing.assert_close(token_logprobs_of(role, trees, budget), together, atol=1e-5, rtol=1e-5)
    backwards = token_logprobs_of(role, trees.select([4, 3, 2, 1, 0]), 10**9)
    torch.testing.assert_close(backwards[trees.select([4, 3, 2, 1, 0]).index_of("token", [4, 3, 2, 1, 0])], together)


def test_nothing_has_moved_before_the_first_update_whatever_the_budget(tmp_path, base):
    """The same in a run: the ratio of the first update is 1 for every token."""
    for budget in (4096, 30):
        (row,) = rows(run_stage("online", tmp_path / f"run-{budget}", **grpo(base, num_steps=1, token_budget=budget)))
        assert row["policy/ratio_mean"] == pytest.approx(1, abs=1e-6)
        assert row["policy/clip_fraction"] == 0
        assert row["policy/approx_kl"] < 1e-9


# ---- end tokens, padding, masks ------------------------------------------------------------------------------------


def test_the_end_token_is_trained_where_it_is_the_pad_token_too(pad_is_eos):
    """trl#6357: masking padding by its id also masked the end of every reply, which then was never learned."""
    chat = Chat(load_tokenizer(pad_is_eos))
    assert chat.pad_id not in chat.stop_ids
    rollouts, policy, _ = sampled(pad_is_eos, num=2)
    prompt, reply = rollouts[0].prompt_ids, (*rollouts[0].response_ids[:3], chat.tokenizer.eos_token_id)
    trees = TokenTrees.build([response_tree(prompt, [reply, rollouts[1].response_ids])])
    own = trees.sequence_ids == 0
    assert trees.targets[own].tolist() == list(reply)
    for tree_form in (True, False):
        policy.tree_form = tree_form
        with torch.no_grad():
            logprobs = policy(trees).logprobs[own]
            full = policy.model(input_ids=torch.tensor([[*prompt, *reply]])).logits[0].log_softmax(-1)
        at_end = full[len(prompt) + 2, chat.tokenizer.eos_token_id]
        torch.testing.assert_close(logprobs[-1], at_end, atol=1e-5, rtol=1e-5)


def test_exactly_the_reply_is_trained_and_none_of_the_prompt():
    """trl#1718: the mask began at the wrong token."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        groups, expected = [], []
        for _ in range(3):
            lengths = torch.randint(1, 7, (3,), generator=draw).tolist()
            prompt, *replies = (torch.randint(2, VOCAB, (n,), generator=draw).tolist() for n in lengths)
            groups.append(response_tree(prompt, replies))
            expected += [(token, [*prompt, *reply[:i]]) for reply in replies for i, token in enumerate(reply)]
        trees = TokenTrees.build(groups)
        assert trees.targets.tolist() == [token for token, _ in expected]
        rows_ = trees.padded(0)
        for place, (_, before) in zip(rows_.predict_from.tolist(), expected, strict=True):
            row, last = divmod(place, rows_.input_ids.shape[1])
            assert rows_.input_ids[row, : last + 1].tolist() == before


@pytest.mark.parametrize("padding", ["its own", "the end token"])
def test_a_score_is_read_at_the_end_of_the_reply_and_never_at_padding(tmp_path, base, pad_is_eos, padding):
    """trl#3750, trl#5338: the score came from the first pad, or from whatever padding the longest reply made."""
    policy_dir = base if padding == "its own" else pad_is_eos
    directory = tmp_path / "reward"
    model = load_scalar(policy_dir, head_seed=0)
    model.config.reward_shift = 0.0  # as the reward stage writes; models of others are read where they were trained
    save_model(model, load_tokenizer(policy_dir), directory)
    scorer = RewardModelScorer.from_directory(str(directory), token_budget=10**9)
    rollouts, _, chat = sampled(policy_dir)
    ends = [(*r.response_ids[: 1 + i % 7], chat.end_id) for i, r in enumerate(rollouts)]
    rollouts = [replaced(r, end, chat.decode_response(end[:-1])) for r, end in zip(rollouts, ends, strict=True)]
    together, _ = scorer.score(rollouts)
    plain = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    for rollout, score in zip(rollouts, together.tolist(), strict=True):
        assert float(scorer.score([rollout])[0]) == pytest.approx(score, abs=1e-5)
        with torch.no_grad():
            hidden = plain.model(input_ids=torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]]))
            assert float(plain.score(hidden.last_hidden_state[0, -1])) == pytest.approx(score, abs=1e-5)


def replaced(rollout, response_ids, response=None):
    return Rollout(
        prompt=rollout.prompt,
        response=rollout.response if response is None else response,
        prompt_ids=rollout.prompt_ids,
        response_ids=response_ids,
        logprobs=(0.0,) * len(response_ids),
        finish_reason="stop",
    )


# ---- token identity ------------------------------------------------------------------------------------------------


def test_the_tokens_that_were_sampled_are_trained_and_not_those_their_text_makes(base):
    """trl#5224, trl#5242: replies were decoded and tokenised again, and other tokens were trained than were drawn."""
    rollouts, policy, chat = sampled(base)
    again = [tuple(chat.encode_response(r.response)) for r in rollouts]
    assert any(ids_ != r.response_ids for ids_, r in zip(again, rollouts, strict=True)), "the test is to have a case"
    trees = rollout_trees([rollouts[i : i + 3] for i in range(0, len(rollouts), 3)])
    assert trees.targets.tolist() == [token for r in rollouts for token in r.response_ids]
    drawn = torch.tensor([x for r in rollouts for x in r.logprobs])
    torch.testing.assert_close(token_logprobs_of(policy, trees, 10**9), drawn, atol=1e-4, rtol=1e-4)


# ---- weights and references ----------------------------------------------------------------------------------------


def test_the_reference_of_an_adapter_that_was_trained_before_is_a_copy_and_stays(tmp_path, base):
    """trl#4723, trl#6043, trl#6591: switching the adapter off gave the base as reference, with a KL from the start."""
    directory = trained_adapter(tmp_path / "adapter", base)
    values = grpo(directory, adapter={"rank": 4, "alpha": 8.0})
    settings = config.resolve(OnlineSettings, values, where="the test")
    models = load_models(settings, Chat(load_tokenizer(str(base))))
    trees = TokenTrees.build([response_tree(ids(4), [ids(6, 1), ids(3, 2)])])
    start = token_logprobs_of(models.policy, trees, 10**9)
    torch.testing.assert_close(token_logprobs_of(models.reference, trees, 10**9), start, rtol=0, atol=0)
    without = token_logprobs_of(Policy(models.policy.model, pad_id=0, adapter=None), trees, 10**9)
    assert float((without - start).abs().max()) > 0.01, "the base is another model"
    gradient(models.policy, policy_batch(trees), PPO())
    torch.testing.assert_close(token_logprobs_of(models.reference, trees, 10**9), start, rtol=0, atol=0)
    assert not torch.equal(token_logprobs_of(models.policy, trees, 10**9), start)


def trained_adapter(directory, base):
    model = load_causal(base)
    add_adapter(model, "policy", LoRA(rank=4, alpha=8.0), seed=0)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad(), using(model, "policy"):
        for name, parameter in model.named_parameters():
            if "lora_B." in name:
                parameter.normal_(0, 0.3, generator=draw)
    save_adapter(model, "policy", directory, base=str(base))
    load_tokenizer(base).save_pretrained(directory)
    return directory


def test_every_weight_takes_part_in_an_update(tmp_path, base):
    """OpenRLHF#1261: most tensors of a model were frozen and nobody was told."""
    out = run_stage("online", tmp_path / "run", **grpo(base, num_steps=2))
    before, after = load_file(base / "model.safetensors"), load_file(out / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []


# ---- reward model --------------------------------------------------------------------------------------------------


def test_a_new_head_is_that_of_its_seed_whatever_was_drawn_before(base):
    """trl#4887: the head of a reward model came from the global generator and differed from run to run."""
    heads = []
    for burned in (0, 5):
        torch.manual_seed(burned)
        torch.randn(burned + 1)
        heads.append(load_scalar(base, head_seed=7).score.weight.detach().clone())
    assert torch.equal(*heads)
    assert not torch.equal(heads[0], load_scalar(base, head_seed=8).score.weight)


class Told:
    def __init__(self, scores):
        self.scores = torch.tensor(scores)

    def score(self, rollouts):
        return self.scores, {}


def test_a_score_of_zero_is_a_score_all_the_way_to_the_advantage():
    """OpenRLHF#1219: 0.0 was taken for a missing score."""
    total, metrics = CombinedReward(
        [RewardPart("a", 1.0, Told([0.0, -1.0])), RewardPart("b", 1.0, Told([0.0, 0.0]))]
    ).score([None] * 2)
    assert total.tolist() == [0.0, -1.0]
    assert metrics["reward/mean"].value == -0.5
    assert metrics["reward/a_failed"].value == metrics["reward/b_failed"].value == 0
    sequence_ids = torch.tensor([0, 0, 1])
    shaped = token_rewards(total, torch.zeros(3), sequence_ids, kl_coef=0.1)
    none = torch.full((2,), torch.nan)
    episodes = Episodes(shaped, shaped, sequence_ids, torch.tensor([0, 0]), none)
    assert RLOO()(episodes).tolist() == [1.0, 1.0, -1.0]


def test_a_score_that_is_missing_is_no_score_of_zero():
    """The other way round: what could not be judged is counted and never 0."""
    for missing in (math.nan, math.inf, -math.inf):
        total, metrics = CombinedReward([RewardPart("a", 2.0, Told([1.0, missing, 3.0]))]).score([None] * 3)
        assert total.isnan().tolist() == [False, True, False]
        assert metrics["reward/a_failed"].value == 1
        assert metrics["reward/mean"].value == 4.0


# ---- data ----------------------------------------------------------------------------------------------------------


def test_a_ragged_last_part_is_trained_on(tmp_path, base):
    """OpenRLHF#1299, OpenRLHF#1300: what did not fill a batch was dropped. Seven prompts, three a step, in two
    minibatches of two prompts and one: every prompt is sampled before any comes again."""
    settings = grpo(base, prompts="world:arithmetic?num=7", prompts_per_step=3, num_minibatches=2, num_steps=7)
    out = run_stage("online", tmp_path / "run", **settings)
    drawn = [s["prompt"] for s in rows(out, "samples.jsonl")][::2]
    assert len(drawn) == 21
    for start in (0, 7, 14):
        assert len(set(drawn[start : start + 7])) == 7
    for row in rows(out):
        assert row["optimizer/policy_updates"] == 2


@pytest.mark.parametrize("num_trees", [2, 3, 5, 7])
def test_minibatches_hold_every_reply_once_however_the_prompts_divide(num_trees):
    """The same for the updates of a step."""
    trees = TokenTrees.build([response_tree([2, 3 + i], [ids(1 + i, i), ids(4, 9)]) for i in range(num_trees)])
    for num_minibatches in (1, 2):
        made = list(minibatches(policy_batch(trees), num_minibatches, seed=0, order=(0, 0)))
        assert len(made) == num_minibatches
        prompts = [tree.prompt for part in made for tree in part.trees.trees]
        assert sorted(prompts) == [tree.prompt for tree in trees.trees]
        assert sum(float(PPO().weight(part)) for part in made) == trees.num_trained


def test_a_reply_left_alone_in_its_group_has_no_advantage_and_no_nan():
    """OpenRLHF#1250: Dr. GRPO with one sample. Where judging fails, a group may shrink to one reply."""
    sequence_ids = torch.tensor([0, 0, 1, 2])
    shaped = token_rewards(torch.tensor([3.0, 1.0, 2.0]), torch.zeros(4), sequence_ids, kl_coef=0.0)
    none = torch.full((3,), torch.nan)
    episodes = Episodes(shaped, shaped, sequence_ids, torch.tensor([0, 1, 1]), none)
    for estimator, expected in ((GRPO(scale="none"), [0, 0, -0.5, 0.5]), (RLOO(), [0, 0, -1, 1])):
        assert estimator(episodes).tolist() == expected
    assert GRPO()(episodes)[:2].tolist() == [0, 0]
    assert GRPO(scale="batch")(episodes).isfinite().all()


def grpo(base, **changed):
    """Two short steps of GRPO against the length of the reply."""
    settings = online_settings(base, base, group_size=2, num_epochs=1, num_minibatches=1, advantage={"name": "grpo"})
    settings["rewards"] = [{"name": "callable", "function": "tests.stages.reward_functions:length"}]
    settings["optimizer"] = FAST
    del settings["critic"]
    return settings | changed
