import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.models.test_forward import relative_difference, some_trees
from tests.tiny import causal, scalar, write_model_directory
from trimtab.batches.trees import TreeBatch
from trimtab.core.errors import EngineError
from trimtab.data.chat import Chat
from trimtab.engines.local.learner import AdamW, LocalLearner
from trimtab.math.losses.sft import SFTLoss
from trimtab.models.adapters import LoRA, add_adapter, load_adapter, save_adapter, using
from trimtab.models.forward import sequence_scores_of, token_logprobs_of
from trimtab.models.load import load_causal, load_scalar, load_tokenizer
from trimtab.models.roles import Policy, ScalarModel, zero_head
from trimtab.models.save import save_role

LORA = LoRA(rank=4, alpha=8)


def loud(model, name):
    """Gives an adapter weights that change something."""
    draw = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if f"lora_B.{name}." in n:
                p.normal_(0, 0.3, generator=draw)


def logprobs(role):
    return token_logprobs_of(role, some_trees(), 10**9)


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_each_role_sees_its_own_adapter_and_the_base_none(architecture):
    alone = logprobs(Policy(causal(architecture), pad_id=0))
    model = causal(architecture)
    for name in ("policy", "other"):
        add_adapter(model, name, LORA, seed=1)
    roles = {name: Policy(model, pad_id=0, adapter=name) for name in ("policy", "other", None)}
    for role in roles.values():
        torch.testing.assert_close(logprobs(role), alone, rtol=0, atol=0)  # B starts at zero
    loud(model, "policy")
    loud(model, "other")
    policy, other, base = (logprobs(roles[name]) for name in ("policy", "other", None))
    torch.testing.assert_close(base, alone, rtol=0, atol=0)
    assert (policy - alone).abs().max() > 0.01
    assert (policy - other).abs().max() > 0.01
    torch.testing.assert_close(logprobs(roles["policy"]), policy, rtol=0, atol=0)


def test_only_the_adapter_and_the_heads_are_trained():
    model = causal("qwen3")
    add_adapter(model, "policy", LORA, seed=0)
    add_adapter(model, "critic", LORA, seed=1)
    policy = Policy(model, pad_id=0, adapter="policy", with_value_head=True)
    critic = ScalarModel(model, pad_id=0, adapter="critic", head=zero_head(model))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    learner = LocalLearner(policy, AdamW(learning_rate=0.1), token_budget=20, num_updates=2, name="policy")
    LocalLearner(critic, AdamW(), token_budget=20, num_updates=2, name="critic")
    assert set(learner.parameters) >= {"value_head.weight", "value_head.bias"}
    batch = TreeBatch(trees=some_trees())
    for _ in range(2):
        critic(some_trees())  # between updates other roles run
        learner.update([(batch, [SFTLoss()])])
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(".policy." in n for n in changed)


OLD_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture
def base_dir(tmp_path):
    return write_model_directory(tmp_path / "base", seed=3)


@OLD_PEFT
def test_a_saved_adapter_is_that_of_peft_and_comes_back(tmp_path, base_dir):
    model = load_causal(base_dir)
    add_adapter(model, "policy", LORA, seed=0)
    loud(model, "policy")
    policy = Policy(model, pad_id=0, adapter="policy")
    save_role(policy, load_tokenizer(base_dir), tmp_path / "adapter", base=str(base_dir))
    expected = logprobs(policy)

    torch.testing.assert_close(logprobs(Policy(load_causal(tmp_path / "adapter"), pad_id=0)), expected)
    shared = load_causal(base_dir)
    assert load_adapter(shared, "again", tmp_path / "adapter") == {}
    torch.testing.assert_close(logprobs(Policy(shared, pad_id=0, adapter="again")), expected, rtol=0, atol=0)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), tmp_path / "adapter")
    ids = torch.arange(3, 12)[None]
    with torch.no_grad(), using(model, "policy"):
        torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


@OLD_PEFT
def test_a_saved_reward_adapter_keeps_its_head(tmp_path, base_dir):
    model = load_scalar(base_dir, head_seed=1)
    add_adapter(model, "reward", LORA, seed=0)
    loud(model, "reward")
    model.config.update({"reward_shift": 0.25})
    role = ScalarModel(model, pad_id=0, adapter="reward")
    save_role(role, load_tokenizer(base_dir), tmp_path / "adapter", base=str(base_dir))
    expected = sequence_scores_of(role, some_trees(), 10**9)

    again = load_scalar(tmp_path / "adapter")
    assert again.config.reward_shift == 0.25
    torch.testing.assert_close(
        sequence_scores_of(ScalarModel(again, pad_id=0), some_trees(), 10**9), expected, atol=1e-5, rtol=1e-5
    )
    plain = AutoModelForSequenceClassification.from_pretrained(base_dir, num_labels=1, pad_token_id=0)
    plain = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    tree = some_trees().trees[0]
    with torch.no_grad():
        score = plain(input_ids=torch.tensor([tree.prompt + tree.branches[0].ids])).logits[0, 0]
    torch.testing.assert_close(score, expected[0], atol=1e-5, rtol=1e-5)


def test_an_adapter_that_cannot_be_read_safely_is_refused(tmp_path, base_dir):
    model = load_causal(base_dir)
    add_adapter(model, "policy", LORA, seed=0)
    save_adapter(model, "policy", tmp_path / "adapter", base=str(base_dir))
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(EngineError, match=r"without adapter_model\.safetensors"):
        load_causal(tmp_path / "adapter")


@pytest.mark.parametrize("make", [causal, scalar])
def test_checkpointed_activations_give_the_same_gradients(make):
    gradients = []
    for checkpointed in (False, True):
        role = (Policy if make is causal else ScalarModel)(make("qwen3"), pad_id=0)
        if checkpointed:
            role.checkpoint_activations()
        outputs = role(some_trees())
        (outputs.logprobs if make is causal else outputs.values).sum().backward()
        gradients.append(
            torch.cat([p.grad.flatten() for _, p in sorted(role.named_parameters()) if p.grad is not None])
        )
    assert relative_difference(*gradients) < 1e-6


def test_chat_of_an_adapter_is_that_of_its_directory(tmp_path, base_dir):
    model = load_causal(base_dir)
    add_adapter(model, "policy", LORA, seed=0)
    save_adapter(model, "policy", tmp_path / "adapter", base=str(base_dir))
    assert Chat(load_tokenizer(tmp_path / "adapter")).end_id == Chat(load_tokenizer(base_dir)).end_id
    tokenizer = load_tokenizer(base_dir)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.backend_tokenizer.save(str(tmp_path / "adapter" / "tokenizer.json"))  # some write no more than this file
    assert "<tool>" in load_tokenizer(tmp_path / "adapter").get_vocab()
