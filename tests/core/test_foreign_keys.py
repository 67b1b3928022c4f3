"""What users of other libraries type is answered with ours, and every key named in an answer exists."""

from __future__ import annotations

import re

import pytest

from trimtab.core import registry, settings_check
from trimtab.core.foreign_keys import OURS
from trimtab.core.settings_help import settings_help

REQUIRED = {
    "sft": {"model": "m", "data": "d.jsonl"},
    "reward": {"model": "m", "data": "d.jsonl"},
    "preference": {"model": "m", "data": "d.jsonl"},
    "online": {"model": "m", "prompts": "p.jsonl", "rewards": [{"name": "gold", "world": "arithmetic"}]},
    "evaluate": {"model": "m", "baseline": "b", "prompts": "p.jsonl", "world": "arithmetic"},
    "select": {"model": "m", "prompts": "p.jsonl", "rewards": [{"name": "gold", "world": "arithmetic"}]},
}


def answer(stage: str, key: str) -> str:
    values = REQUIRED[stage] | {key: 1}
    (problem,) = settings_check.mistakes(registry.modules("stage")[stage], values, "")
    assert problem.startswith(f"{key}: unknown key; ")
    return problem


@pytest.mark.parametrize(
    ("stage", "key", "ours"),
    [
        ("sft", "lr", "optimizer.learning_rate"),
        ("sft", "learning_rate", "optimizer.learning_rate"),
        ("online", "learning_rate", "optimizer.learning_rate"),
        ("online", "critic_learning_rate", "critic.optimizer.learning_rate"),
        ("preference", "beta", "loss.beta"),
        ("online", "beta", "kl.coef"),
        ("sft", "lora_rank", "adapter.rank"),
        ("sft", "lora_r", "adapter.rank"),
        ("sft", "lora_alpha", "adapter.alpha"),
        ("online", "num_generations", "group_size"),
        ("select", "num_generations", "replies_per_prompt"),
        ("sft", "bf16", "precision"),
        ("sft", "gradient_accumulation_steps", "token_budget"),
        ("sft", "per_device_train_batch_size", "batch_size"),
        ("online", "per_device_train_batch_size", "prompts_per_step"),
        ("sft", "save_steps", "checkpoint_every"),
        ("online", "save_steps", "checkpoint_every"),
        ("sft", "wandb", "trackers"),
        ("sft", "report_to", "trackers"),
        ("sft", "num_train_epochs", "num_epochs"),
        ("online", "max_steps", "num_steps"),
        ("sft", "max_seq_length", "max_tokens"),
        ("sft", "sequence_len", "max_tokens"),
        ("online", "max_completion_length", "sampling.max_new_tokens"),
        ("sft", "base_model", "model"),
        ("online", "pretrain", "model"),
        ("sft", "warmup_ratio", "optimizer.warmup_fraction"),
        ("online", "epsilon", "loss.clip_low"),
        ("online", "reward_funcs", "rewards"),
        ("sft", "gradient_checkpointing", "checkpoint_activations"),
        ("sft", "load_in_4bit", "adapter.base_bits"),
        ("sft", "val_set_size", "held_out"),
        ("preference", "dpo_beta", "loss.beta"),
        ("preference", "max_prompt_length", "max_tokens"),
        ("preference", "truncation_mode", "on_too_long"),
        ("online", "max_prompt_length", "sampling.max_prompt_tokens"),
        ("online", "delta", "loss.dual_clip"),
        ("online", "stop_token", "sampling.stop"),
        ("online", "generation_batch_size", "prompts_per_step"),
        ("online", "micro_rollout_batch_size", "sampling.batch_size"),
        ("online", "normalize_reward", "shaping.normalize"),
        ("online", "use_kl_in_reward", "kl_in"),
        ("online", "use_kl_loss", "kl_in"),
        ("online", "kl_penalty", "kl_estimator"),
        ("online", "use_vllm", "engine.sampler.name"),
        ("online", "vllm_gpu_memory_utilization", "engine.sampler.gpu_memory"),
        ("online", "steps_per_generation", "num_minibatches"),
        ("online", "local_rollout_forward_batch_size", "token_budget"),
        ("online", "total_epochs", "num_epochs"),
        ("online", "max_response_length", "sampling.max_new_tokens"),
        ("online", "clip_ratio_low", "loss.clip_low"),
        ("online", "clip_ratio_c", "loss.dual_clip"),
        ("online", "loss_agg_mode", "loss.aggregation"),
        ("online", "entropy_coeff", "entropy_coef"),
        ("online", "critic_warmup", "critic.warmup_steps"),
        ("online", "reward_clip_range", "shaping.clip"),
        ("online", "dynamic_filtering", "dynamic_sampling"),
        ("online", "use_tis", "correction"),
        ("online", "sft_model_path", "model"),
        ("online", "train_files", "prompts"),
        ("online", "log_completions", "sample_every"),
        ("preference", "rl_beta", "loss.beta"),
        ("preference", "dpo_label_smoothing", "loss.label_smoothing"),
        ("preference", "f_divergence_type", "loss.divergence"),
        ("preference", "precompute_ref_batch_size", "token_budget"),
        ("sft", "test_freq", "validate_every"),
        ("sft", "max_ckpt_num", "keep_checkpoints"),
        ("sft", "enable_gradient_checkpointing", "checkpoint_activations"),
        ("sft", "roles_to_train", "train_on"),
        ("sft", "data_seed", "seed"),
        ("sft", "shuffle_merged_datasets", "shuffle"),
        ("sft", "peft_layers_to_transform", "adapter.last_blocks"),
        ("sft", "lora_model_dir", "model"),
        ("online", "stop_token_id", "sampling.stop"),
        ("online", "whiten_advantages", "advantage.whiten"),
        ("online", "use_kl_estimator_k3", "kl_estimator"),
        ("online", "eps_clip_low_high", "loss.clip_low"),
        ("online", "async_queue_size", "engine.max_staleness"),
        ("online", "actor_num_nodes", "engine.workers"),
        ("online", "custom_reward_function.path", "rewards"),
        ("online", "reward_model.model.path", "rewards"),
        ("online", "critic.model.path", "critic.path"),
        ("online", "algorithm.filter_groups.enable", "dynamic_sampling"),
        ("online", "algorithm.rollout_is_threshold", "correction"),
    ],
)
def test_a_key_of_another_library_is_answered_with_ours(stage: str, key: str, ours: str):
    assert f"did you mean {ours}?" in answer(stage, key)


@pytest.mark.parametrize(
    ("stage", "key", "said"),
    [
        ("sft", "output_dir", "--out DIR"),
        ("sft", "sample_packing", "ever padded"),
        ("sft", "logging_steps", "metrics.jsonl"),
        ("sft", "num_gpus", "several GPUs are not there yet"),
        ("sft", "trust_remote_code", "is never run"),
        ("sft", "hf_token", "hf auth login"),
        ("sft", "use_dora", "plain low-rank change"),
        ("sft", "lora_dropout", "with dropout"),
        *(("sft", key, "used as it is") for key in ("tokenizer", "chat_template", "special_tokens", "pad_token")),
        *(("sft", key, "columns=question:prompt") for key in ("dataset_text_field", "input_key")),
        ("online", "eos_token", "used as it is"),
        ("online", "repetition_penalty", "another policy"),
        ("online", "importance_sampling_level", 'loss.name = "gspo"'),
        ("preference", "kto_beta", 'loss.beta, with loss.name = "kto"'),
        ("preference", "cpo_alpha", 'loss.nll_coef, with loss.name = "cpo"'),
        ("preference", "orpo_alpha", 'loss.odds_coef, with loss.name = "orpo"'),
        ("preference", "simpo_gamma", 'loss.gamma, with loss.name = "simpo"'),
        ("preference", "kto_desirable_weight", 'loss.desirable_weight, with loss.name = "kto"'),
        ("preference", "reference_free", 'loss.name = "simpo"'),
        ("preference", "sync_ref_model", "for a whole run"),
        ("online", "kl_target", 'kl.target, with kl.name = "adaptive"'),
        ("online", "kl_horizon", 'kl.horizon, with kl.name = "adaptive"'),
        ("online", "reward_weights", "has its own weight"),
        ("sft", "rl", "the stage is the command"),
        ("sft", "disable_dropout", "with dropout"),
        ("sft", "neftune_noise_alpha", "no noise"),
        ("sft", "dataset_num_proc", "every core"),
        ("sft", "activation_offloading", "another memory"),
        ("sft", "load_best_model_at_end", "trimtab choose RUN"),
        ("sft", "experiment_name", "--out DIR"),
        ("sft", "use_remove_padding", "ever padded"),
        ("sft", "torch_compile", "chosen and proved"),
        ("sft", "liger_rope", "chosen and proved"),
        ("sft", "liger_rms_norm", "chosen and proved"),
        ("sft", "chat_template_path", "used as it is"),
        *(
            ("sft", key, "remove the key")
            for key in ("do_train", "model_type", "relora_steps", "freeze_vision", "lr_groups")
        ),
        ("sft", "adafactor", "AdamW is the only optimizer"),
        ("sft", "auto_resume_from_checkpoints", "goes on where it stopped"),
        ("sft", "tokens", "used as it is"),
        ("sft", "eager_attention", "chosen and proved"),
        ("sft", "streaming", "every core"),
        ("sft", "sequence_parallel_degree", "by one process"),
        ("reward", "num_labels", "one score"),
        *(("online", key, "table [guard]") for key in ("eval_steps", "eval_temperature", "trainer.val_only")),
        ("online", "no_advantage_std_norm", 'advantage.scale = "none"'),
        ("online", "aux_loss_coef", "among experts"),
        ("online", "ring_attn_size", "by one process"),
        ("online", "enable_ema", "trimtab average"),
        ("online", "prompt_split", "?split=test"),
        ("online", "unpaired_preference", 'loss.name = "kto"'),
    ],
)
def test_a_key_without_a_counterpart_is_answered_with_why(stage: str, key: str, said: str):
    assert said in answer(stage, key)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("adapter.dropout", "with dropout"),
        ("adapter.bias", "no biases"),
        ("adapter.use_rslora", "did you mean adapter.alpha?"),
        ("optimizer.name", "AdamW is the only optimizer"),
        ("optimizer.type", "AdamW is the only optimizer"),
    ],
)
def test_a_foreign_key_of_a_table_is_answered_there(key: str, said: str):
    table, _, name = key.partition(".")
    (problem,) = settings_check.mistakes(registry.modules("stage")["sft"], REQUIRED["sft"] | {table: {name: 1}}, "")
    assert problem.startswith(f"{key}: unknown key; ")
    assert said in problem


def test_a_key_in_a_table_is_answered_with_one_of_that_table():
    values = REQUIRED["online"] | {"optimizer": {"lr": 1}, "critic": {"optimizer": {"lr": 1}}}
    found = settings_check.mistakes(registry.modules("stage")["online"], values, "")
    assert sorted(found) == [
        "critic.optimizer.lr: unknown key; did you mean critic.optimizer.learning_rate?",
        "optimizer.lr: unknown key; did you mean optimizer.learning_rate?",
    ]


def test_every_key_that_an_answer_names_exists():
    known = {
        re.match(r"[\w.]+", line)[0]
        for module in registry.modules("stage").values()
        for line, _ in settings_help(module)
    }
    for candidates, _ in OURS.values():
        for ours in candidates.split():
            assert any(f".{key}".endswith(f".{ours}") for key in known), ours


VERL = {
    "algorithm": {"adv_estimator": "grpo", "gamma": 1.0, "kl_ctrl": {"type": "fixed", "kl_coef": 0.001}},
    "actor_rollout_ref": {
        "model": {"path": "m"},
        "actor": {"optim": {"lr": 1e-6}, "ppo_mini_batch_size": 64, "strategy": "fsdp2"},
        "rollout": {"n": 8, "name": "vllm", "temperature": 0.7},
    },
}


def test_the_keys_within_a_table_of_another_library_are_answered_one_by_one():
    found = settings_check.mistakes(registry.modules("stage")["online"], REQUIRED["online"] | VERL, "")
    answers = dict(problem.split(": ", 1) for problem in found)
    meant = {
        "algorithm.adv_estimator": "advantage",
        "algorithm.gamma": "advantage.gamma",
        "algorithm.kl_ctrl.kl_coef": "kl.coef",
        "actor_rollout_ref.model.path": "model",
        "actor_rollout_ref.actor.optim.lr": "optimizer.learning_rate",
        "actor_rollout_ref.actor.ppo_mini_batch_size": "num_minibatches",
        "actor_rollout_ref.rollout.n": "group_size",
        "actor_rollout_ref.rollout.name": "engine.sampler.name",
        "actor_rollout_ref.rollout.temperature": "sampling.temperature",
    }
    for key, ours in meant.items():
        assert answers.pop(key).startswith(f"unknown key; did you mean {ours}?"), key
    assert answers.pop("algorithm.kl_ctrl.type").startswith("unknown key; did you mean kl.name")
    assert answers == {"actor_rollout_ref.actor.strategy": "unknown; remove what has no counterpart here"}


def test_a_table_within_one_of_ours_is_answered_with_a_key_of_that_one():
    values = REQUIRED["online"] | {"critic": {"optim": {"lr": 1e-5}}}
    (problem,) = settings_check.mistakes(registry.modules("stage")["online"], values, "")
    assert problem == "critic.optim.lr: unknown key; did you mean critic.optimizer.learning_rate?"


def test_a_table_that_means_nothing_here_is_one_mistake():
    values = REQUIRED["sft"] | {"weather": {"today": "fine", "tomorrow": {"morning": "fair"}}}
    (problem,) = settings_check.mistakes(registry.modules("stage")["sft"], values, "")
    assert problem.startswith("weather: unknown key; ")


def test_a_name_of_another_library_is_one_word():
    """Two names that run into each other, where a blank between two pieces of a long key is forgotten, mean nothing."""
    known = {name for names in OURS for name in names.split()}
    assert {"liger_rope", "liger_rms_norm", "dataloader_drop_last", "dataloader_prefetch_factor"} <= known
    joined = {a + b for a in known for b in known if len(a) > 4 < len(b)}
    assert not joined & known
