"""What a GPU would refuse, wait for or compute in another precision, found on a pretend device."""

import pytest
import torch

from tests import tiny
from tests.engines import pretend
from trimtab.batches.rollouts import PolicyBatch
from trimtab.batches.trees import TokenTrees, response_tree
from trimtab.core.errors import EngineError
from trimtab.core.types import Message, Prompt
from trimtab.data.chat import Chat
from trimtab.engines.device import EngineSettings
from trimtab.engines.local import kernels
from trimtab.engines.local.form_choice import FormChoice, forms
from trimtab.engines.local.learner import AdamW, LocalLearner
from trimtab.engines.local.sampler import LocalSampler, Sampling
from trimtab.engines.local.scorer import LocalScorer
from trimtab.math.losses.policy import PPO, EntropyBonus
from trimtab.math.losses.value import ValueLoss
from trimtab.models.adapters import LoRA, add_adapter
from trimtab.models.load import load_causal, load_tokenizer
from trimtab.models.roles import Policy, ScalarModel

BUDGET = 64
PROMPTS = [Prompt(messages=(Message("user", text),)) for text in tiny.TEXTS[:3]]


def batch(seed: int = 0) -> PolicyBatch:
    """Six groups of different sizes, with made-up log-probabilities, advantages and values."""
    draw = torch.Generator().manual_seed(seed)

    def some(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=draw))

    def ids(n: int) -> list[int]:
        return torch.randint(2, tiny.VOCAB, (n,), generator=draw).tolist()

    trees = TokenTrees.build(
        [response_tree(ids(some(3, 12)), [ids(some(2, 15)) for _ in range(some(1, 5))]) for _ in range(6)]
    )
    old, ref, values, advantages, returns = torch.randn(5, trees.num_trained, generator=draw).unbind()
    return PolicyBatch(
        trees=trees,
        old_logprobs=-2 + 0.1 * old,
        correction=torch.ones(trees.num_trained),
        ref_logprobs=-2 + 0.1 * ref,
        old_values=values,
        advantages=advantages,
        returns=returns,
    )


def learner(role, name="policy"):
    return LocalLearner(role, AdamW(learning_rate=1e-3), token_budget=BUDGET, num_updates=4, name=name)


def values_of(metrics):
    return {name: metric.value for name, metric in metrics.items()}


@pytest.mark.parametrize("form", ["tree", "padded"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mistral_windowed"])
def test_an_update_never_mixes_devices_and_equals_that_on_the_cpu(family, form):
    work = [(batch(), [PPO(), EntropyBonus(coef=0.01), ValueLoss()])]
    found = {}
    for place in ("cpu", "device"):
        policy = Policy(tiny.causal(family), pad_id=0, with_value_head=True)
        policy.tree_form = form == "tree"
        with pretend.watched() as log:
            if place == "device":
                pretend.on_device(policy)
            made = learner(policy)
            found[place] = [values_of(made.update(work)) for _ in range(2)]
        assert (log.operations > 0) == (place == "device")
        assert not log.mixed
    for on_cpu, on_device in zip(*found.values(), strict=True):
        assert on_device == pytest.approx(on_cpu, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral_windowed"])
def test_an_update_waits_once_for_each_micro_batch_and_once_for_the_norm(family):
    policy = Policy(tiny.causal(family), pad_id=0, with_value_head=True)
    num = len(list(batch().micro_batches(BUDGET)))
    assert num > 2
    with pretend.watched() as log:
        pretend.on_device(policy)
        learner(policy).update([(batch(), [PPO(), EntropyBonus(coef=0.01), ValueLoss()])])
    assert log.num_waits == num + 1


def test_scoring_waits_once_for_each_micro_batch():
    num = len(list(batch().micro_batches(BUDGET)))
    policy, critic = Policy(tiny.causal(), pad_id=0), ScalarModel(tiny.scalar(), pad_id=0, gives="values")
    trees = batch().trees
    on_cpu = [LocalScorer(policy, token_budget=BUDGET).logprobs(trees), critic(trees).values]
    with pretend.watched() as log:
        on_device = [
            LocalScorer(pretend.on_device(policy), token_budget=BUDGET).logprobs(trees),
            LocalScorer(pretend.on_device(critic), token_budget=BUDGET).values(trees),
        ]
    assert not log.mixed
    assert log.num_waits == 2 * num
    for ours, theirs in zip(on_device, on_cpu, strict=True):
        assert type(ours) is torch.Tensor  # results are on the CPU
        torch.testing.assert_close(ours, theirs)


def test_roles_on_one_base_exact_kl_and_encoders_never_mix_devices():
    shared = tiny.causal()
    add_adapter(shared, "policy", LoRA(rank=2), seed=0)
    encoder = ScalarModel(tiny.scalar("bert"), pad_id=0, gives="scores")
    with pretend.watched() as log:
        pretend.on_device(shared)
        policy, reference = Policy(shared, pad_id=0, adapter="policy"), Policy(shared, pad_id=0)
        made = learner(policy)
        trees = batch().trees
        made.update([(batch(), [PPO()])])
        assert float(made.kl_to(LocalScorer(reference, token_budget=BUDGET), trees).max()) > 0
        encoder(trees) if pretend.on_device(encoder) else None
    assert not log.mixed


def test_optimizer_state_is_beside_its_weights_after_a_resume(tmp_path):
    before = learner(Policy(tiny.causal(), pad_id=0))
    before.update([(batch(), [PPO()])])
    before.save(tmp_path)
    policy = Policy(tiny.causal(seed=1), pad_id=0)
    with pretend.watched() as log:
        pretend.on_device(policy)
        after = learner(policy)
        after.load(tmp_path)
        again = values_of(after.update([(batch(1), [PPO()])]))
    assert not log.mixed
    assert again == pytest.approx(values_of(before.update([(batch(1), [PPO()])])), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_products_have_the_precision_that_was_asked_for(precision):
    policy = Policy(tiny.causal(), pad_id=0)
    policy.precision = precision
    seen = set()
    policy.model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, inputs, output: seen.add(output.dtype))
    torch.set_float32_matmul_precision("medium")  # as another library may have left it: TF32 on a GPU
    during = []
    policy.model.model.layers[0].register_forward_hook(lambda *_: during.append(torch.get_float32_matmul_precision()))
    try:
        with pretend.watched():
            pretend.on_device(policy)
            logprobs = policy(batch().trees).logprobs
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == {getattr(torch, precision)}
    assert set(during) == {"highest"}
    assert logprobs.dtype == torch.float32


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("name", ["fused", "rows", "padded", "lockstep", "uncached"])
def test_every_form_of_decoding_draws_the_same_replies_on_a_device(tmp_path, name, group_size):
    chat = Chat(load_tokenizer(tiny.write_model_directory(tmp_path / "model")))
    drawn = {}
    for place in ("cpu", "device"):
        policy = Policy(load_causal(tmp_path / "model"), pad_id=chat.pad_id)
        sampling = Sampling(max_new_tokens=12)
        form = next(f for f in forms(policy, sampling, chat) if f.name == name)
        sampler = LocalSampler(policy, chat, sampling, choice=FormChoice("tiny", form, {}), watched=False)
        with pretend.watched() as log:
            if place == "device":
                pretend.on_device(policy)
            drawn[place] = sampler.generate(PROMPTS, group_size=group_size, seed=0)
        assert not log.mixed
    assert [r.response_ids for r in drawn["device"]] == [r.response_ids for r in drawn["cpu"]]
    assert sampler.sampler == name  # no compiled kernels off the CPU
    if name in ("fused", "rows"):
        num_steps = max(len(r.response_ids) for r in drawn["device"])
        # One for each step, and two when the copy of the weights is compared with the model.
        assert log.num_waits == num_steps + (2 if name == "fused" else 0)


@pytest.mark.parametrize("name", ["fused", "rows", "padded", "lockstep"])
def test_sampling_has_its_own_precision(tmp_path, name, monkeypatch):
    monkeypatch.setattr(kernels, "PACK_FROM", 1)  # as for matrices of real sizes, which are packed in float32
    chat = Chat(load_tokenizer(tiny.write_model_directory(tmp_path / "model")))
    policy = Policy(load_causal(tmp_path / "model"), pad_id=chat.pad_id)
    differences = {}
    for precision in ("float32", "bfloat16"):
        sampling = Sampling(max_new_tokens=12, precision=precision)
        form = next(f for f in forms(policy, sampling, chat) if f.name == name)
        sampler = LocalSampler(policy, chat, sampling, choice=FormChoice("tiny", form, {}))
        sampler.generate(PROMPTS, group_size=2, seed=0)
        differences[precision] = sampler.difference
        assert ("bfloat16" in sampler.sampler) == (precision == "bfloat16")
    assert differences["float32"] < 1e-5 < 1e-3 < differences["bfloat16"] < 0.1


def test_a_device_that_is_not_there_is_named_with_what_to_do():
    assert EngineSettings().find_device() == torch.device("cpu")
    with pytest.raises(ValueError, match="cuda:1"):
        EngineSettings(device="gpu")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: the refusal needs one without")
    with pytest.raises(EngineError, match="sees no GPU") as refused:
        EngineSettings(device="cuda:1").find_device()
    assert "engine.device = 'cpu'" in refused.value.fix
