"""Adapters that other people trained with peft: every part is kept, or refused by name."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, TaskType, TrainableTokensConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.models.test_forward import some_trees
from tests.tiny import write_model_directory
from trimtab.core.errors import ConfigError, EngineError
from trimtab.models.adapters import LoRA, add_adapter, load_adapter, refuse_other_shape, using, weight_of
from trimtab.models.forward import token_logprobs_of
from trimtab.models.load import load_causal, load_scalar, load_tokenizer
from trimtab.models.roles import Policy, ScalarModel
from trimtab.models.save import save_model, save_role

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated", "ignore:Model has `tie_word"
)
IDS = torch.tensor([[3, 10, 40, 50, 7, 9]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model_directory(tmp_path_factory.mktemp("foreign") / "base", seed=3)


def write(base, path, config, *, head=False):
    """An adapter of peft with loud weights, and peft's own model of it."""
    kind = AutoModelForSequenceClassification if head else AutoModelForCausalLM
    options = {"num_labels": 1, "pad_token_id": 0} if head else {}
    draw = torch.Generator().manual_seed(5)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = get_peft_model(kind.from_pretrained(base, **options), config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
        model.save_pretrained(path)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def logprobs(policy):
    return token_logprobs_of(policy, some_trees(), 10**9)


def lora(**options):
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": TaskType.CAUSAL_LM} | options)


PARTS = {
    "dropout": lambda: lora(lora_dropout=0.5),
    "head saved whole": lambda: lora(modules_to_save=["lm_head"]),
    "embedding saved whole": lambda: lora(modules_to_save=["embed_tokens"]),
    "norms saved whole": lambda: lora(modules_to_save=["input_layernorm", "norm"]),
    "lora on a tied head": lambda: lora(target_modules=["q_proj", "lm_head"]),
    "lora on the embedding": lambda: lora(target_modules=["q_proj", "embed_tokens"]),
    "magnitudes": lambda: lora(use_dora=True),
    "magnitudes of the head": lambda: lora(target_modules=["q_proj", "lm_head"], use_dora=True),
    "single tokens": lambda: lora(trainable_token_indices={"embed_tokens": [3, 10]}),
    "stabilised ranks": lambda: lora(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
    "biases": lambda: lora(bias="all"),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type=TaskType.CAUSAL_LM
    ),
}
ACTIVE = ("dropout", "lora on a tied head", "magnitudes", "magnitudes of the head", "stabilised ranks")
"""Those that are low-rank changes of linear layers, which a base that others share can take."""


@pytest.mark.parametrize("part", PARTS)
def test_a_merged_adapter_is_what_peft_computes(base, tmp_path, part):
    theirs = logits(write(base, tmp_path / "adapter", PARTS[part]()))
    torch.testing.assert_close(logits(load_causal(tmp_path / "adapter")), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["embedding saved whole", "lora on a tied head", "single tokens"])
def test_what_is_merged_comes_back_from_its_directory(base, tmp_path, part):
    theirs = logits(write(base, tmp_path / "adapter", PARTS[part]()))
    save_model(load_causal(tmp_path / "adapter"), load_tokenizer(tmp_path / "adapter"), tmp_path / "merged")
    torch.testing.assert_close(logits(load_causal(tmp_path / "merged")), theirs, rtol=1e-4, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", PARTS)
def test_on_a_shared_base_an_adapter_is_what_peft_computes_or_is_refused_by_name(base, tmp_path, part):
    theirs = logits(write(base, tmp_path / "adapter", PARTS[part]()))
    model = load_causal(base)
    before = logits(model)
    if part not in ACTIVE:
        with pytest.raises(EngineError, match=r"(?s)brings more than low-rank changes.*trimtab export") as refused:
            load_adapter(model, "policy", tmp_path / "adapter")
        assert any(name in str(refused.value) for name in ("lm_head", "embed", "norm", "tok", "IA3", "bias = 'all'"))
        return
    load_adapter(model, "policy", tmp_path / "adapter")
    model.train()  # as recomputing activations has it
    with using(model, "policy"):
        torch.testing.assert_close(logits(model), theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits(model), theirs, rtol=1e-4, atol=1e-4)  # no dropout: the same again
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("part", ["lora on a tied head", "magnitudes of the head"])
def test_scores_follow_an_adapter_on_the_output_head_and_it_learns(base, tmp_path, part):
    write(base, tmp_path / "adapter", PARTS[part]())
    model = load_causal(base)
    load_adapter(model, "policy", tmp_path / "adapter")
    policy, merged = Policy(model, pad_id=0, adapter="policy"), Policy(load_causal(tmp_path / "adapter"), pad_id=0)
    torch.testing.assert_close(
        token_logprobs_of(policy, some_trees(), 10**9),
        token_logprobs_of(merged, some_trees(), 10**9),
        rtol=0,
        atol=1e-4,
    )
    policy.trained_parameters()
    policy(some_trees()).logprobs.sum().backward()
    head = model.get_output_embeddings()
    assert float(head.lora_B["policy"].weight.grad.abs().max()) > 0
    assert float(head.lora_A["policy"].weight.grad.abs().max()) > 0
    if part == "magnitudes of the head":
        assert float(head.lora_magnitude_vector["policy"].weight.grad.abs().max()) > 0
    base_alone = Policy(model, pad_id=0)
    alone = Policy(load_causal(base), pad_id=0)
    torch.testing.assert_close(
        token_logprobs_of(base_alone, some_trees(), 10**9), token_logprobs_of(alone, some_trees(), 10**9)
    )


def test_a_new_adapter_on_the_output_head_alone_learns(base):
    model = load_causal(base)
    add_adapter(model, "policy", LoRA(rank=4, modules=("lm_head",)), seed=0)
    policy = Policy(model, pad_id=0, adapter="policy")
    assert policy.trained_parameters()
    policy(some_trees()).logprobs.sum().backward()
    assert float(model.lm_head.lora_B["policy"].weight.grad.abs().max()) > 0


def test_tied_embeddings_stay_tied_unless_the_adapter_changes_one_of_them(base, tmp_path):
    tied = AutoModelForCausalLM.from_pretrained(base)
    tied.config.tie_word_embeddings = True
    tied.lm_head.weight = tied.model.embed_tokens.weight
    save_model(tied, load_tokenizer(base), tmp_path / "tied")
    for target, stays in (("q_proj", True), ("lm_head", False)):
        write(tmp_path / "tied", tmp_path / target, lora(target_modules=[target]))
        merged = load_causal(tmp_path / target)
        assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == stays
        assert merged.config.tie_word_embeddings == stays


def test_an_adapter_that_names_itself_as_its_base_is_refused(base, tmp_path):
    write(base, tmp_path / "a", lora())
    write(base, tmp_path / "b", lora())
    for name, names, says in (("a", "a", "itself"), ("a", "b", "a circle of adapters"), ("b", "a", "a circle")):
        file = tmp_path / name / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / names)}))
        if (name, names) != ("a", "b"):
            with pytest.raises(EngineError, match=f"names {says}"):
                load_tokenizer(tmp_path / name)


def test_settings_that_the_adapter_which_is_trained_on_does_not_have_are_refused(base, tmp_path):
    write(base, tmp_path / "a", lora(target_modules=["q_proj"], lora_alpha=8))
    for same in (LoRA(), LoRA(rank=4), LoRA(alpha=8.0, modules=("q_proj",))):
        refuse_other_shape(tmp_path / "a", same)
    for other, says in (
        (LoRA(rank=64), r"adapter\.rank = 64, and the adapter that is trained on has 4"),
        (LoRA(alpha=1.0), r"adapter\.alpha = 1\.0, and .* has 8"),
        (LoRA(modules=("v_proj",)), r"adapter\.modules = \['v_proj'\], and .* has \['q_proj'\]"),
    ):
        with pytest.raises(ConfigError, match=says):
            refuse_other_shape(tmp_path / "a", other)


def test_a_rank_that_no_layer_can_use_is_refused(base):
    with pytest.raises(ConfigError, match=r"rank = 1000 .* at most 32"):
        add_adapter(load_causal(base), "policy", LoRA(rank=1000), seed=0)


def test_what_peft_cannot_merge_is_refused(base, tmp_path):
    write(base, tmp_path / "adapter", lora(lora_bias=True))
    with pytest.raises(EngineError, match=r"cannot merge it: Impossible to merge LoRA with `lora_bias"):
        load_causal(tmp_path / "adapter")
    with pytest.raises(EngineError, match=r"linear layers: lora_bias = True"):
        load_adapter(load_causal(base), "policy", tmp_path / "adapter")


def test_the_weight_of_a_layer_with_magnitudes_is_the_one_applied(base, tmp_path):
    write(base, tmp_path / "adapter", PARTS["magnitudes"]())
    model = load_causal(base)
    load_adapter(model, "policy", tmp_path / "adapter")
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    with using(model, "policy"), torch.no_grad():
        torch.testing.assert_close(x @ weight_of(layer).T, layer(x), rtol=1e-4, atol=1e-5)


def test_a_name_that_no_layer_has_is_answered_with_the_names_there_are(base):
    with pytest.raises(ConfigError, match=r"'qproj'.*\n.*adapter\.modules\n.*did you mean 'q_proj'.*down_proj"):
        add_adapter(load_causal(base), "policy", LoRA(modules=("k_proj", "qproj")), seed=0)


# --- reward models ---


def test_a_reward_adapter_of_peft_scores_as_it_does_there(base, tmp_path):
    config = lora(task_type=TaskType.SEQ_CLS, lora_dropout=0.5)
    theirs = logits(write(base, tmp_path / "adapter", config, head=True))
    torch.testing.assert_close(logits(load_scalar(tmp_path / "adapter")), theirs, rtol=1e-4, atol=1e-4)
    model = load_causal(base)
    head = load_adapter(model, "reward", tmp_path / "adapter", with_head=True)
    assert set(head) == {"score.weight"}
    model.train()
    with using(model, "reward"), torch.no_grad():
        last = model.base_model(input_ids=IDS).last_hidden_state[:, -1]
    torch.testing.assert_close(last @ head["score.weight"].T, theirs, rtol=1e-4, atol=1e-4)


def test_a_policy_adapter_is_no_reward_model_and_a_reward_adapter_no_policy(base, tmp_path):
    write(base, tmp_path / "policy", lora())
    write(base, tmp_path / "reward", lora(task_type=TaskType.SEQ_CLS), head=True)
    with pytest.raises(EngineError, match="no trained score head"):
        load_scalar(tmp_path / "policy")
    for read in (load_causal, lambda path: load_adapter(load_causal(base), "policy", path)):
        with pytest.raises(EngineError, match="the adapter of a reward model, which writes no text"):
            read(tmp_path / "reward")


def test_a_reward_model_may_start_from_a_policy_adapter_whatever_it_did_to_the_output_head(base, tmp_path):
    config = lora(target_modules=["q_proj", "lm_head"], modules_to_save=["input_layernorm"])
    theirs = write(base, tmp_path / "adapter", config)
    with torch.no_grad():
        expected = theirs.base_model.model.model(input_ids=IDS).last_hidden_state
        ours = load_scalar(tmp_path / "adapter", head_seed=1).base_model(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


# --- directories ---


def saved(base, path, name):
    model = load_causal(base)
    add_adapter(model, "policy", LoRA(rank=4), seed=0)
    save_role(Policy(model, pad_id=0, adapter="policy"), load_tokenizer(base), path, base=name)


def test_an_adapter_that_broke_down_in_training_is_refused_on_a_shared_base_too(base, tmp_path):
    saved(base, tmp_path / "adapter", str(base))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    weights[sorted(weights)[0]][0, 0] = torch.nan
    save_file(weights, file)
    for load in (load_causal, lambda path: load_adapter(load_causal(base), "policy", path)):
        with pytest.raises(EngineError, match=r"1 of its weights hold nan or infinity, such as .*lora_A"):
            load(tmp_path / "adapter")


def test_the_base_is_found_from_everywhere_and_after_a_move(tmp_path, monkeypatch):
    write_model_directory(tmp_path / "there" / "runs" / "base")
    monkeypatch.chdir(tmp_path / "there")
    saved("runs/base", tmp_path / "there" / "runs" / "sft" / "model", "runs/base")
    monkeypatch.chdir(tmp_path)
    load_causal("there/runs/sft/model")
    (tmp_path / "there").rename(tmp_path / "moved")
    load_causal("moved/runs/sft/model")
    (tmp_path / "moved" / "runs" / "base").rename(tmp_path / "gone")
    with pytest.raises(EngineError, match="base of the adapter is not found"):
        load_causal("moved/runs/sft/model")


def test_a_relative_base_that_others_wrote_is_looked_for_beside_the_adapter(base, tmp_path, monkeypatch):
    model = write_model_directory(tmp_path / "project" / "models" / "base")
    write(model, tmp_path / "project" / "out" / "adapter", lora())
    expected = load_causal(tmp_path / "project" / "out" / "adapter").state_dict()
    file = tmp_path / "project" / "out" / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace(str(model), "models/base"))
    monkeypatch.chdir(tmp_path)
    found = load_causal("project/out/adapter").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_an_adapter_that_does_not_fit_its_base_is_refused(base, tmp_path):
    write(write_model_directory(tmp_path / "wide", hidden_size=64), tmp_path / "adapter", lora())
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace(str(tmp_path / "wide"), str(base)))
    with pytest.raises(EngineError, match="size mismatch for"):
        load_causal(tmp_path / "adapter")
    with pytest.raises(EngineError, match="size mismatch for"):
        load_adapter(load_causal(base), "policy", tmp_path / "adapter")


def write_with_tokens(base, path, **options):
    """An adapter that was trained with three more tokens than its base has, and peft's own model of it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    rows = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(rows + 3, mean_resizing=False)
    if options.get("trainable_token_indices"):
        options["trainable_token_indices"] = [rows, rows + 1, rows + 2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, lora(init_lora_weights=False, **options)).eval()
        adapted.save_pretrained(path)
    return adapted


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"trainable_token_indices": True},
    ],
)
def test_tokens_added_for_an_adapter_have_their_rows(base, tmp_path, options):
    adapted = write_with_tokens(base, tmp_path / "adapter", **options)
    merged = load_causal(tmp_path / "adapter")
    assert merged.get_input_embeddings().num_embeddings == adapted.get_input_embeddings().weight.shape[0]
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)


def test_added_tokens_of_which_one_embedding_lacks_the_rows_are_refused(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "untied")
    load_tokenizer(base).save_pretrained(tmp_path / "untied")
    write_with_tokens(tmp_path / "untied", tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(EngineError, match="holds the new rows of only one of input and output embedding"):
        load_causal(tmp_path / "adapter")


def test_a_scalar_role_keeps_its_head_when_it_is_trained_on(base, tmp_path):
    model = load_scalar(base, head_seed=1)
    add_adapter(model, "reward", LoRA(rank=4), seed=0)
    save_role(ScalarModel(model, pad_id=0, adapter="reward"), load_tokenizer(base), tmp_path / "first", base=str(base))
    again = load_scalar(base, head_seed=2)
    head = load_adapter(again, "reward", tmp_path / "first", with_head=True)
    again.load_state_dict(head, strict=False)
    torch.testing.assert_close(again.score.weight, model.score.weight, rtol=0, atol=0)


KINDS = {
    "tokens": lambda: TrainableTokensConfig(token_indices=[3, 10], target_modules=["embed_tokens"]),
    "vera": lambda: VeraConfig(r=8, target_modules=["q_proj", "v_proj"]),
    "adalora": lambda: AdaLoraConfig(total_step=10, target_modules=["q_proj", "v_proj"], task_type=TaskType.CAUSAL_LM),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_whose_files_are_odd_are_merged_as_peft_reads_them(base, tmp_path, kind):
    """Two rows of trained tokens were taken for a whole embedding, and what peft shares or never writes for lacking."""
    theirs = write(base, tmp_path / "adapter", KINDS[kind]())
    torch.testing.assert_close(logits(load_causal(tmp_path / "adapter")), logits(theirs), rtol=1e-4, atol=1e-4)
