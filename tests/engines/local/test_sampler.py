from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.architectures.families import causal as family
from tests.tiny import DECODERS, VOCAB, causal, write_model_directory
from trimtab.batches.rollouts import in_groups, rollout_trees
from trimtab.core.compiled import SWITCH
from trimtab.core.errors import ConfigError, DataError, EngineError
from trimtab.core.types import Message, Prompt
from trimtab.data.chat import Chat
from trimtab.engines.local.form_choice import FormChoice, choose_form, forms
from trimtab.engines.local.fused import LLAMA_LIKE, FusedForward
from trimtab.engines.local.kernels import Kernels, find
from trimtab.engines.local.sampler import LocalSampler, Sampling
from trimtab.engines.local.slots import SlotForm
from trimtab.math.logprobs import truncated_logprobs
from trimtab.models.forward import token_logprobs_of
from trimtab.models.load import load_causal, load_tokenizer
from trimtab.models.roles import Policy


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_model_directory(tmp_path_factory.mktemp("model") / "base", seed=3)


def generator(model_dir, **sampling):
    chat = Chat(load_tokenizer(model_dir))
    settings = Sampling(**{"max_new_tokens": 12, **sampling})
    policy = Policy(load_causal(model_dir), pad_id=chat.pad_id, temperature=settings.temperature)
    return LocalSampler(policy, chat, settings)


def prompts(*texts):
    return [Prompt(messages=(Message("user", t),)) for t in texts]


SOME = prompts(
    "I want a refund!", "What is 12 + 30?", "Item: lamp. Policy: refund within 30 days.", "Thank you", "lamp"
)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_sampled_logprobs_are_the_policys_own(model_dir, temperature):
    g = generator(model_dir, temperature=temperature)
    rollouts = g.generate(SOME, group_size=3, seed=1)
    scored = token_logprobs_of(g.policy, rollout_trees(in_groups(rollouts, 3)), 10**9)
    sampled = torch.tensor([x for r in rollouts for x in r.logprobs])
    torch.testing.assert_close(sampled, scored, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"top_p": 0.6}, {"top_k": 3}, {"top_p": 0.9, "top_k": 5, "temperature": 0.8}])
def test_truncated_sampling_records_logprobs_under_exactly_that_distribution(model_dir, options):
    g = generator(model_dir, **options)
    for r in g.generate(SOME, group_size=2, seed=1):
        ids = torch.tensor([r.prompt_ids + r.response_ids])
        with torch.no_grad():
            logits = g.policy.model(input_ids=ids).logits[0, len(r.prompt_ids) - 1 : -1]
        defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        expected = truncated_logprobs(logits, **defaults | options).gather(1, ids[0, len(r.prompt_ids) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(r.logprobs), expected, atol=3e-5, rtol=1e-5)


def test_the_same_seed_gives_the_same_rollouts_whatever_the_batch_and_the_order_of_prompts(model_dir):
    def drawn(batch_size, some):
        rollouts = generator(model_dir, batch_size=batch_size).generate(some, group_size=2, seed=5)
        return sorted((r.prompt.id, r.response_ids) for r in rollouts)

    whole = drawn(100, SOME)
    assert drawn(2, SOME) == whole
    assert drawn(4, SOME[::-1]) == whole
    assert (
        sorted((r.prompt.id, r.response_ids) for r in generator(model_dir).generate(SOME, group_size=2, seed=6))
        != whole
    )


def test_the_form_is_chosen_in_float32_whatever_is_asked_first(model_dir, monkeypatch):
    rounded = []

    def choose(*arguments):
        rounded.append(torch.is_autocast_enabled("cpu"))
        return choose_form(*arguments)

    monkeypatch.setattr("trimtab.engines.local.sampler.choose_form", choose)
    g = generator(model_dir, precision="bfloat16")
    g.continue_ids([[3, 4, 5]], group_size=1, uniforms=torch.full((1, 4), 0.5, dtype=torch.float64))
    assert rounded == [False]


def test_a_prompt_that_comes_twice_gets_different_replies(model_dir):
    first, second = generator(model_dir).generate([SOME[0], SOME[0]], group_size=1, seed=0)
    assert first.response_ids != second.response_ids


def test_replies_end_at_the_end_token_or_at_the_limit_and_say_which(model_dir):
    g = generator(model_dir, max_new_tokens=40)
    rollouts = g.generate(SOME * 6, group_size=2, seed=2)
    for r in rollouts:
        ended = [i for i, token in enumerate(r.response_ids) if token in g.chat.stop_ids]
        if r.finish_reason == "stop":
            assert ended == [len(r.response_ids) - 1]
        else:
            assert not ended
            assert len(r.response_ids) == 40
        assert len(r.logprobs) == len(r.response_ids)
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}


def test_greedy_decoding_is_that_of_transformers(model_dir):
    g = generator(model_dir, top_k=1)
    for r in g.generate(SOME, group_size=1, seed=0):
        ids = torch.tensor([r.prompt_ids])
        out = g.policy.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=sorted(g.chat.stop_ids),
        )
        assert tuple(out[0, ids.shape[1] :].tolist()) == r.response_ids


def test_sampling_follows_the_distribution(model_dir):
    g = generator(model_dir, max_new_tokens=1, batch_size=512)
    rollouts = g.generate(SOME[:1], group_size=4000, seed=0)
    with torch.no_grad():
        ids = torch.tensor([rollouts[0].prompt_ids])
        probabilities = g.policy.model(input_ids=ids).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([r.response_ids[0] for r in rollouts]), minlength=len(probabilities))
    expected = probabilities * 4000
    likely = expected > 5
    chi_square = float(((counts - expected)[likely] ** 2 / expected[likely]).sum())
    degrees = int(likely.sum()) - 1
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_a_prompt_that_is_too_long_is_named(model_dir):
    with pytest.raises(DataError, match=r"a prompt of .* tokens; the longest allowed is 8"):
        generator(model_dir, max_prompt_tokens=8).generate(SOME, group_size=1, seed=0)


def drawn_by(name, *, batch_size, form="own", group_size=3):
    """Replies of a tiny model of an architecture, drawn in its own way or in another that it supports."""
    torch.manual_seed(4)
    chat = SimpleNamespace(stop_ids={1, 5, 9, 13}, pad_id=0)
    policy = Policy(causal(name), pad_id=0)
    policy.model.generation_config.eos_token_id = None
    sampling = Sampling(max_new_tokens=17, batch_size=batch_size)
    choice = None if form == "own" else FormChoice(name, {f.name: f for f in forms(policy, sampling, chat)}[form], {})
    g = LocalSampler(policy, chat, sampling, choice=choice)
    lengths = (5, 1, 12, 3, 7, 2, 9)
    prompts = [torch.randint(2, VOCAB, (n,)).tolist() for n in lengths]
    uniforms = torch.rand(len(prompts) * group_size, 17, dtype=torch.float64)
    return g, prompts, g.continue_ids(prompts, group_size=group_size, uniforms=uniforms)


@pytest.mark.parametrize("kernels", ["compiled", "torch"])
@pytest.mark.parametrize("group_size", [3, 1])
@pytest.mark.parametrize("name", DECODERS)
def test_every_architecture_draws_from_its_own_distribution_whatever_rows_it_is_given(
    name, group_size, kernels, monkeypatch
):
    if kernels == "compiled" and not find(torch.zeros(1)).compiled:
        pytest.skip("no C compiler with OpenMP on this machine")
    monkeypatch.setenv(SWITCH, kernels)
    g, prompts, whole = drawn_by(name, batch_size=100, group_size=group_size)
    for i, (ids, logprobs, _) in enumerate(whole):
        full = torch.tensor([prompts[i // group_size] + ids])
        with torch.no_grad():
            expected = causal(name)(input_ids=full).logits[0, len(prompts[i // group_size]) - 1 : -1].log_softmax(-1)
        expected = expected.gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=3e-5, rtol=1e-5)
    assert {len(ids) for ids, _, _ in whole} > {17}, "replies of many lengths, or no row was ever refilled"
    assert g.method == ("fused" if type(g.policy.model.base_model).__name__ in LLAMA_LIKE else "rows")
    assert g.sampler == (f"{g.method}, compiled" if kernels == "compiled" else g.method)
    own = ((3, "own"), (7, "own")) if kernels == "torch" else ((7, "own"),)
    others = ((100, "padded"), (6, "lockstep"), (100, "uncached")) if kernels == "torch" else ()
    for batch_size, form in (*own, *others):
        other = drawn_by(name, batch_size=batch_size, form=form, group_size=group_size)[2]
        assert [(ids, stopped) for ids, _, stopped in other] == [(ids, stopped) for ids, _, stopped in whole]


def test_the_fused_copy_follows_the_weights(model_dir):
    g = generator(model_dir)
    before = g.generate(SOME, group_size=2, seed=1)
    # The fused optimizer writes to weights without raising their version counter: a copy kept until the counter
    # changes would be stale, and nothing would say so.
    optimizer = torch.optim.AdamW(g.policy.model.parameters(), lr=0.05, fused=True)
    g.policy(rollout_trees(in_groups(before, 2))).logprobs.sum().backward()
    optimizer.step()
    after = g.generate(SOME, group_size=2, seed=1)
    assert before != after
    scored = token_logprobs_of(g.policy, rollout_trees(in_groups(after, 2)), 10**9)
    torch.testing.assert_close(torch.tensor([x for r in after for x in r.logprobs]), scored, atol=3e-5, rtol=1e-5)


def test_a_copy_that_is_not_the_model_is_refused():
    model = Policy(causal("qwen3"), pad_id=0).model
    fused = FusedForward(model, 8, Kernels())
    fused.prove_fresh(model)
    with torch.no_grad():
        model.base_model.layers[1].mlp.down_proj.weight.add_(0.05)
    with pytest.raises(EngineError, match="the fused copy that replies are sampled from differs"):
        fused.prove_fresh(model)


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"lora_bias": True}, {"target_modules": ["embed_tokens", "q_proj"]}, {"bias": "all"}],
    ids=["dora", "bias", "embedding", "biases of the base"],
)
def test_adapters_that_are_more_than_an_addition_to_a_weight_are_sampled_from_all_the_same(options):
    from peft import LoraConfig, inject_adapter_in_model

    model = causal("qwen2" if "lora_bias" in options else "qwen3")
    inject_adapter_in_model(LoraConfig(r=4, **{"target_modules": ["q_proj", "v_proj"], **options}), model, "policy")
    g = LocalSampler(
        Policy(model, pad_id=0, adapter="policy"),
        SimpleNamespace(stop_ids={1}, pad_id=0),
        Sampling(max_new_tokens=9),
    )
    assert g.method == ("fused" if "bias" in options else "rows"), "before training it computes what its base does"
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    g.continue_ids([[5, 6, 7], [9, 10]], group_size=3, uniforms=torch.rand(6, 9, dtype=torch.float64))
    assert 0 < g.difference < 1e-4


def test_a_reply_ends_with_a_stop_text_which_is_not_part_of_its_text(model_dir):
    free = generator(model_dir, max_new_tokens=40).generate(SOME, group_size=4, seed=3)
    letter = free[0].response[3]
    stopped = generator(model_dir, max_new_tokens=40, stop=(letter, "no such text")).generate(
        SOME, group_size=4, seed=3
    )
    for a, b in zip(free, stopped, strict=True):
        assert b.response == a.response.split(letter)[0]
        assert b.response_ids == a.response_ids[: len(b.response_ids)]
        if letter in a.response:
            assert b.finish_reason == "stop"
            assert len(b.response_ids) <= len(a.response_ids)


def test_a_small_cache_means_fewer_replies_at_a_time_and_the_same_replies(model_dir):
    tight = generator(model_dir, cache_gb=3e-5)
    encoded = tight.encode(SOME)
    assert tight.choice.form.num_groups(encoded, 3, 12) == 1
    assert generator(model_dir).choice.form.num_groups(encoded, 3, 12) == len(SOME)
    assert [r.response_ids for r in tight.generate(SOME, group_size=3, seed=1)] == [
        r.response_ids for r in generator(model_dir).generate(SOME, group_size=3, seed=1)
    ]


def test_a_cache_that_cannot_hold_one_prompt_is_refused_before_anything_is_drawn(model_dir, monkeypatch):
    huge = generator(model_dir, max_new_tokens=10**9)
    monkeypatch.setattr(huge, "uniforms", lambda *_, **__: pytest.fail("a billion random numbers"))
    with pytest.raises(
        EngineError, match=r"(?s)one prompt and its replies take .* GB, and cache_gb = 4.*lower max_new"
    ):
        huge.generate(SOME[:1], group_size=1, seed=1)


def test_a_reply_stops_where_the_models_generation_settings_say_too(model_dir):
    g = generator(model_dir)
    letter = g.chat.tokenizer.convert_tokens_to_ids("a")
    model, ends = g.policy.model, g.chat.stop_ids
    for named, configured, more in (([letter], None, {letter}), (letter, letter, set()), (None, letter, set())):
        # What only the configuration says is the default of a class as often as not, and "a" is no special token.
        model.generation_config.eos_token_id, model.config.eos_token_id = named, configured
        assert LocalSampler(g.policy, g.chat, g.sampling).stop_ids == ends | more


def test_rows_of_the_embedding_that_are_no_token_are_never_drawn(model_dir):
    g = generator(model_dir, max_new_tokens=30)
    tokens = len(g.chat.tokenizer)
    assert LocalSampler(g.policy, g.chat, g.sampling)._unnamed is None
    g.policy.model.resize_token_embeddings(tokens + 200, mean_resizing=False)
    padded = Policy(g.policy.model, pad_id=g.chat.pad_id)
    for sampling in (g.sampling, replace(g.sampling, top_p=0.99)):
        wide = LocalSampler(padded, g.chat, sampling)  # which compares its numbers with the whole softmax
        rollouts = wide.generate(SOME, group_size=8, seed=0)
        assert max(i for r in rollouts for i in r.response_ids) < tokens
        assert wide.difference < 1e-4


def test_sequences_beyond_the_models_positions_are_refused_before_anything_is_computed():
    chat = SimpleNamespace(stop_ids={1}, pad_id=0)
    policy = Policy(causal("gpt2"), pad_id=0)
    g = LocalSampler(policy, chat, Sampling(max_new_tokens=100))
    g.check_room(28, 100)
    with pytest.raises(ConfigError, match=r"need 129 positions; the model has 128[^$]*max_new_tokens to at most 99"):
        g.continue_ids([[5] * 29], group_size=1, uniforms=torch.rand(1, 100, dtype=torch.float64))
    LocalSampler(Policy(causal("llama"), pad_id=0), chat, Sampling()).check_room(10**6, 10**6)


def test_rows_whose_positions_depend_on_their_length_are_sampled_as_far_as_they_do_not():
    policy = Policy(family("phi3 with long positions"), pad_id=0)
    g = LocalSampler(policy, SimpleNamespace(stop_ids=(), pad_id=0), Sampling(max_new_tokens=9))
    uniforms = torch.rand(4, 9, dtype=torch.float64)
    g.continue_ids([[5, 6, 7, 8, 9, 10, 11], [9, 8, 7]], group_size=2, uniforms=uniforms)
    assert 0 < g.difference < 1e-4
    with pytest.raises(EngineError, match=r"past 16 the positions of this model depend on the length of the whole row"):
        g.continue_ids([[5] * 8, [9]], group_size=2, uniforms=uniforms)
    g.continue_ids([[5] * 8, [9]], group_size=2, uniforms=uniforms, limits=torch.tensor([8, 2, 9, 9]))


@pytest.mark.parametrize("truncation", [{}, {"top_k": 1}, {"top_p": 0.8}])
def test_a_sampler_that_is_not_the_policy_is_refused(model_dir, truncation, monkeypatch):
    g = generator(model_dir, **truncation)
    g.generate(SOME, group_size=2, seed=0)
    assert g.difference < 1e-4
    decode = SlotForm.decode

    def with_other_weights(form, *arguments):
        weight = g.policy.model.base_model.layers[0].mlp.down_proj.weight
        weight.data.add_(0.1)
        decode(form, *arguments)
        weight.data.sub_(0.1)

    monkeypatch.setattr(SlotForm, "decode", with_other_weights)
    with pytest.raises(EngineError, match="sampler and policy disagree by"):
        g.generate(SOME, group_size=2, seed=0)


def test_no_prompts_give_no_rollouts(model_dir):
    assert generator(model_dir).generate([], group_size=2, seed=0) == []
