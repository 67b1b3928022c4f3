"""Setting names of TRL, OpenRLHF, verl and axolotl, with this package's name for the same setting.

Only an unknown key is looked up here, so a name that a stage knows keeps its own meaning there.
"""

from __future__ import annotations

from collections.abc import Sequence

_BATCH = "the whole update; token_budget splits it into forward passes"
_ADAPTER = "low-rank adapters are the table [adapter]"
_DIRECTORY = 'the run directory is given on the command line, as "--out DIR"'
_TRACKERS = 'write trackers = ["wandb"] or ["tensorboard"]; metrics.jsonl is always written'
_PACKED = "nothing is ever padded: sequences are packed and share their prefixes always; remove the key"
_ATTENTION = "how attention and logits are computed is chosen and proved when a model is loaded; remove the key"
_TOKENIZER = (
    "the tokenizer in the model's directory is used as it is, with its tokens and chat template; change it there"
)
_COLUMNS = 'columns are recognised; another name is given in the source, as "FILE?columns=question:prompt"'
_KL = 'kl_in = "reward" or "loss", with its weight in kl.coef'
_REWARDS = "rewards are a list: [[rewards]] with a name, and path for a reward model or function for a callable"

OURS: dict[str, tuple[str, str]] = {
    # optimizers
    "lr learning_rate actor_learning_rate actor_lr policy_lr": ("optimizer.learning_rate", ""),
    "critic_learning_rate critic_lr value_lr": ("critic.optimizer.learning_rate", ""),
    "lr_scheduler_type lr_scheduler lr_schedule scheduler": ("optimizer.schedule", ""),
    "warmup_ratio lr_warmup_ratio lr_warmup_steps warmup_steps num_warmup_steps": (
        "optimizer.warmup_fraction",
        "a share of the run's updates",
    ),
    "weight_decay l2": ("optimizer.weight_decay", ""),
    "adam_beta1 adam_betas betas": ("optimizer.beta1", "and optimizer.beta2"),
    "adam_beta2": ("optimizer.beta2", ""),
    "adam_epsilon adam_eps": ("optimizer.eps", ""),
    "max_grad_norm grad_clip gradient_clipping max_norm clip_grad": ("optimizer.max_gradient_norm", ""),
    "adafactor optim_args optim_target_modules optim optimizer_name optimizer_type optimizer.name optimizer.type": (
        "",
        "AdamW is the only optimizer, and its settings are the table [optimizer]",
    ),
    # steps and batches
    "per_device_train_batch_size train_batch_size global_batch_size gradient_batch_size": (
        "batch_size prompts_per_step",
        _BATCH,
    ),
    "gradient_accumulation_steps micro_batch_size micro_train_batch_size per_device_eval_batch_size eval_batch_size"
    " local_rollout_forward_batch_size precompute_ref_batch_size ppo_micro_batch_size ppo_micro_batch_size_per_gpu"
    " log_prob_micro_batch_size log_prob_micro_batch_size_per_gpu ppo_max_token_len_per_gpu use_dynamic_bsz"
    " auto_find_batch_size": (
        "token_budget",
        "batch_size or prompts_per_step is the whole update, and token_budget splits it into forward passes",
    ),
    "rollout_batch_size num_prompts_per_step": ("prompts_per_step", ""),
    "generation_batch_size": ("prompts_per_step", "in prompts, each with group_size replies"),
    "micro_rollout_batch_size": ("sampling.batch_size", "memory and speed only"),
    "num_generations n_samples_per_prompt num_return_sequences n_samples num_samples_per_prompt rollout.n": (
        "group_size replies_per_prompt",
        "",
    ),
    "num_train_epochs max_epochs epochs n_epochs total_epochs": ("num_epochs", ""),
    "num_ppo_epochs ppo_epochs num_iterations": ("num_epochs", "passes over the rollouts of a step"),
    "max_train_steps total_steps total_training_steps total_episodes num_episodes max_steps": ("num_steps", ""),
    "num_mini_batches mini_batch_size ppo_mini_batch_size steps_per_generation": (
        "num_minibatches",
        "updates of one pass",
    ),
    "save_steps save_interval save_freq save_strategy saves_per_epoch": ("checkpoint_every", ""),
    "save_total_limit max_ckpt_num": ("keep_checkpoints", ""),
    "eval_steps eval_strategy evaluation_strategy evals_per_epoch test_freq": ("validate_every", ""),
    "log_completions num_completions_to_print num_sample_generations": ("sample_every", "and num_samples"),
    "load_best_model_at_end metric_for_best_model early_stopping_patience greater_is_better": (
        "",
        "a run goes to its end, and `trimtab choose RUN` finds its best checkpoint; remove the key",
    ),
    "logging_steps logging_strategy logging_first_step log_level": (
        "",
        "every step is logged in metrics.jsonl; remove the key",
    ),
    "output_dir save_path ckpt_path run_name logging_dir default_local_dir exp_name experiment_name": ("", _DIRECTORY),
    "auto_resume_from_checkpoints use_ds_universal_ckpt resume_from_checkpoint overwrite_output_dir"
    " resume_mode load_checkpoint": (
        "",
        'the same command goes on where it stopped, and "--fresh" begins again; remove the key',
    ),
    "push_to_hub hub_model_id": ("", "model/ of the run directory is an ordinary directory to upload"),
    "report_to wandb use_wandb wandb_project wandb_run_name wandb_entity project_name use_tensorboard logger": (
        "trackers",
        _TRACKERS,
    ),
    # precision, memory and engines
    "bf16 fp16 tf32 dtype torch_dtype mixed_precision param_dtype": (
        "precision",
        'precision = "bfloat16" or "float32"',
    ),
    "gradient_checkpointing activation_checkpointing enable_gradient_checkpointing gradient_checkpointing_kwargs": (
        "checkpoint_activations",
        "",
    ),
    "packing sample_packing packing_samples eval_packing eval_sample_packing packing_strategy pad_to_sequence_len"
    " pad_to_multiple_of group_by_length padding_free use_remove_padding": ("", _PACKED),
    "use_vllm vllm_mode vllm_model_impl vllm_num_engines vllm_server_base_url vllm_server_host vllm_enable_sleep_mode"
    " rollout.name": ("engine.sampler.name", '"vllm" draws replies in processes of its own'),
    "vllm_gpu_memory_utilization gpu_memory_utilization": ("engine.sampler.gpu_memory", ""),
    "vllm_tensor_parallel_size tensor_model_parallel_size tensor_parallel_size": (
        "engine.sampler.processes",
        "each has all the weights, and takes a share of the prompts",
    ),
    "xformers_attention sdp_attention s2_attention eager_attention flex_attention cut_cross_entropy liger_rope"
    " liger_rms_norm liger_fused_linear_cross_entropy flash_attn flash_attention attn_implementation"
    " use_liger_kernel use_liger_loss liger_kernel torch_compile": ("", _ATTENTION),
    "deepspeed zero_stage fsdp fsdp_config": ("engine.shard", "true or false, with engine.workers processes"),
    "num_processes nproc_per_node world_size": (
        "engine.workers",
        "the processes of this machine that compute together",
    ),
    "device device_map": ("engine.device", '"cpu", or "cuda" for one GPU'),
    "num_gpus n_gpus_per_node nnodes num_machines": (
        "",
        "one GPU (engine.device) or several processes on the CPU (engine.workers); several GPUs are not there yet",
    ),
    # adapters
    "lora_rank lora_r peft_lora_r r": ("adapter.rank", ""),
    "lora_alpha peft_lora_alpha": ("adapter.alpha", ""),
    "lora_target_modules target_modules lora_target_linear": ("adapter.modules", ""),
    "load_in_4bit load_in_8bit qlora bits": ("adapter.base_bits", ""),
    "peft_config use_peft use_lora lora": ("adapter", _ADAPTER),
    "use_rslora peft_use_rslora": (
        "adapter.alpha",
        "the change is scaled by alpha / rank; rsLoRA is alpha times the root of rank",
    ),
    "use_dora peft_use_dora": ("", "an adapter is a plain low-rank change; remove the key"),
    "adapter.bias lora_bias": ("", "an adapter changes the weights of linear layers and no biases; remove the key"),
    "dropout lora_dropout disable_dropout": ("", "nothing is trained with dropout; remove the key"),
    "neftune_noise_alpha": ("", "no noise is added to embeddings; remove the key"),
    "streaming dataset_shard_num skip_prepare_dataset dataloader_pin_memory dataloader_drop_last"
    " dataloader_prefetch_factor dataset_num_proc dataloader_num_workers preprocessing_num_workers"
    " dataset_prepared_path": (
        "",
        "data is read on every core, and its tokens are kept for the next run; remove the key",
    ),
    "param_offload optimizer_offload adam_offload activation_offloading offload_policy": (
        "",
        "nothing is moved to another memory; token_budget and checkpoint_activations bound what a pass takes",
    ),
    "rl": ("", "the stage is the command: `trimtab preference` for DPO and its kin, `trimtab online` for PPO and GRPO"),
    # models and data
    "model_name_or_path base_model pretrain model_path model_name model_id sft_model_path"
    " actor_rollout_ref.model.path": ("model", ""),
    "ref_model ref_pretrain ref_model_path reference_model": ("reference baseline", ""),
    "custom_reward_function.path custom_reward_function.name reward_manager reward_model.model.path"
    " reward_pretrain reward_model_path reward_funcs reward_function reward_model remote_rm_url": ("rewards", _REWARDS),
    "critic_pretrain value_model value_model_path critic.model.path": ("critic.path", ""),
    "trust_remote_code": ("", "code in a model's directory is never run; remove the key"),
    "hf_token use_auth_token hub_token": ("", "the hub is asked with the login of `hf auth login`, or HF_TOKEN"),
    "tokenizer tokenizer_name_or_path tokenizer_path chat_template chat_template_path apply_chat_template"
    " input_template": ("", _TOKENIZER),
    "special_tokens pad_token eos_token bos_token tokens added_tokens_overrides default_system_message": (
        "",
        _TOKENIZER,
    ),
    "dataset dataset_name datasets train_dataset dataset_path train_data train_file train_files": (
        "data prompts",
        "a file, a hub id or a world",
    ),
    "prompt_data prompt_dataset": ("prompts data", ""),
    "eval_dataset val_dataset validation_data test_file test_datasets val_files": ("held_out_data", ""),
    "val_set_size test_size eval_split_ratio": ("held_out", ""),
    "max_samples max_train_samples": ("limit num_prompts", ""),
    "max_length max_seq_length max_seq_len sequence_len cutoff_len max_len": ("max_tokens", ""),
    "max_prompt_length prompt_max_len": ("sampling.max_prompt_tokens max_tokens", ""),
    "truncation_mode": ("on_too_long", "a prompt is cut on its left"),
    "dataset_text_field input_key output_key prompt_key label_key chosen_key rejected_key": ("", _COLUMNS),
    "stop_token stop_token_id": ("sampling.stop", "further texts; the end token of the model always ends a reply"),
    "repetition_penalty presence_penalty frequency_penalty": (
        "",
        "a penalty would make the sampler another policy than the one that is trained; remove the key",
    ),
    "max_completion_length generate_max_len response_length max_response_length max_tokens": (
        "sampling.max_new_tokens",
        "",
    ),
    "train_on_inputs completion_only_loss assistant_only_loss train_on_input roles_to_train train_on_eos": (
        "train_on",
        "",
    ),
    "precompute_ref_log_probs": ("reference_cache", "the reference reads the data once and is kept on disk always"),
    # losses
    "loss_type rl_loss": ("loss", ""),
    "loss_agg_mode": ("loss.aggregation", ""),
    "beta kl_coef init_kl_coef kl_loss_coef kl_coeff init_kl_coeff": ("loss.beta kl.coef", ""),
    "use_kl_in_reward use_kl_loss": ("kl_in", _KL),
    "kl_penalty kl_loss_type": ("kl_estimator", ""),
    "dpo_beta rl_beta": ("loss.beta", ""),
    "dpo_label_smoothing": ("loss.label_smoothing", ""),
    "f_divergence_type": ("loss.divergence", "and loss.divergence_alpha"),
    "kto_desirable_weight": ("", 'did you mean loss.desirable_weight, with loss.name = "kto"?'),
    "kto_undesirable_weight": ("", 'did you mean loss.undesirable_weight, with loss.name = "kto"?'),
    "reference_free": ("", 'losses without a reference are loss.name = "simpo", "cpo" and "orpo"'),
    "sync_ref_model ref_model_sync_steps ref_model_mixup_alpha": (
        "",
        "the reference stays as it is for a whole run; begin a new run from the newer model",
    ),
    "kto_beta": ("", 'did you mean loss.beta, with loss.name = "kto"?'),
    "orpo_alpha": ("", 'did you mean loss.odds_coef, with loss.name = "orpo"?'),
    "cpo_alpha": ("", 'did you mean loss.nll_coef, with loss.name = "cpo"?'),
    "target_kl": ("stop_kl", "to end the passes of a step; kl.target is that of the adaptive coefficient"),
    "kl_target": ("", 'did you mean kl.target, with kl.name = "adaptive"?'),
    "eps_clip_low_high cliprange clip_range eps_clip clip_eps epsilon eps_clip_low clip_ratio clip_ratio_low": (
        "loss.clip_low",
        "and loss.clip_high",
    ),
    "epsilon_high eps_clip_high clip_ratio_high": ("loss.clip_high", ""),
    "delta clip_ratio_c": ("loss.dual_clip", "the bound on the ratio for negative advantages"),
    "importance_sampling_level": ("", 'did you mean loss.name = "gspo", whose ratios are of whole replies?'),
    "cliprange_value value_clip clip_range_value": ("critic.loss.clip", ""),
    "vf_coef value_loss_coef": ("critic.loss.coef", ""),
    "gae_lambda lambd lambda": ("advantage.lam", ""),
    "gamma": ("advantage.gamma loss.gamma", ""),
    "advantage_estimator adv_estimator": ("advantage", ""),
    "normalize_reward": ("shaping.normalize", ""),
    "reward_clip_range reward_clip": ("shaping.clip", "one number: rewards are held between it and its negative"),
    "reward_weights": ("", "each of [[rewards]] has its own weight"),
    "dynamic_filtering filter_groups filter_groups.enable dynamic_filtering_reward_range": (
        "dynamic_sampling",
        "a table",
    ),
    "vllm_importance_sampling_correction use_tis tis_imp_ratio_cap vllm_importance_sampling_mode rollout_is_threshold"
    " enable_vllm_is_correction vllm_is_truncated_threshold": ("correction", "a table"),
    "critic_warmup freezing_actor_steps": ("critic.warmup_steps", ""),
    "kl_ctrl.type": ("", 'did you mean kl.name, "fixed" or "adaptive"?'),
    "kl_horizon": ("", 'did you mean kl.horizon, with kl.name = "adaptive"?'),
    "scale_rewards norm_adv_by_std_in_grpo": ("advantage.scale advantage", 'of advantage.name = "grpo"'),
    "mask_truncated_completions overlong_filtering": ("skip_truncated", ""),
    "ent_coef entropy_coeff entropy_loss_coef": ("entropy_coef", ""),
    "rpo_alpha sft_loss_coef nll_loss_coef": ("loss.nll_coef", ""),
    "simpo_gamma": ("", 'did you mean loss.gamma, with loss.name = "simpo"?'),
    "center_rewards_coefficient": ("loss.centering_coef", ""),
    "ptx_coef pretrain_data": ("pretraining_mix", ""),
    # what has no counterpart, and would be answered with a name that only looks alike
    "do_train do_eval do_predict": ("", "a stage trains and then judges what it holds out; remove the key"),
    "data_seed": ("seed", ""),
    "num_labels": ("", "a reward model gives one score; remove the key"),
    "eval_steps eval_strategy test_freq eval_temperature eval_n_samples_per_prompt eval_max_new_tokens val_before_train"
    " val_only val_kwargs.n": (
        "",
        "a guard measures during a run (the table [guard], with its key every), and `trimtab evaluate` after it",
    ),
    "whiten_advantages normalize_advantages": ("advantage.whiten", ""),
    "no_advantage_std_norm": ("", 'did you mean advantage.scale = "none", with advantage.name = "grpo"?'),
    "use_kl_estimator_k3": ("kl_estimator", '"k3"'),
    "aux_loss_coef router_aux_loss_coef": ("", "the balance among experts has no loss of its own; remove the key"),
    "ring_attn_size ring_head_stride sequence_parallel_degree context_parallel_size ulysses_sequence_parallel_size"
    " ds_tensor_parallel_size": ("", "a sequence is computed by one process; token_budget bounds what a pass takes"),
    "model_type tokenizer_type tokenizer_use_fast is_llama_derived_model is_mistral_derived_model model_init_kwargs"
    " ref_model_init_kwargs": ("", "a model is loaded as the files of its directory say; remove the key"),
    "relora_steps lora_modules_to_save lora_fan_in_fan_out": (
        "",
        "an adapter is one low-rank change of linear layers for a whole run; remove the key",
    ),
    "lora_model_dir ref_adapter_name rl_adapter_ref_model": ("model", "an adapter's directory is named as the model"),
    "peft_layers_to_transform": ("adapter.last_blocks", ""),
    "freeze_vision unfrozen_parameters": ("", "all weights are trained, or those of an adapter; remove the key"),
    "pretraining_dataset": ("pretraining_mix", ""),
    "shuffle_dataset shuffle_merged_datasets": ("shuffle", ""),
    "prompt_data_probs prompt_split": (
        "",
        "name one source of prompts; a split is part of it, as hub:org/name?split=test",
    ),
    "unpaired_preference": ("", 'did you mean loss.name = "kto", in the preference stage?'),
    "async_train async_queue_size partial_rollout": ("engine.max_staleness", "the lag of rollouts in steps"),
    "colocate_all_models colocate_actor_ref actor_num_nodes actor_num_gpus_per_node ref_num_nodes critic_num_nodes"
    " reward_num_nodes": ("engine.workers", "all models compute in the same processes"),
    "enable_ema ema_beta": ("", "no running mean of weights is kept; `trimtab average` averages models"),
    "sapo_temperature use_bias_correction_kl multi_objective_aggregation": (
        "",
        "this variant is not there; see loss and advantage for those that are",
    ),
    "lr_groups embedding_lr_scale loraplus_lr_ratio": ("", "one learning rate holds for all weights; remove the key"),
}
"""Maps foreign names with one meaning to (our names, a remark); several names are the words of one text. The first of
our names that the stage has is suggested; with no such name, the remark is the whole answer. A foreign name may name
its table too, as "optimizer.name"."""


def ours_for(key: str, known: Sequence[str]) -> str:
    """What to write instead of another library's key path, or "". `known` holds the key paths of the run file's
    stage."""
    meant = f".{key.lower().replace('-', '_')}"
    for names, (candidates, said) in OURS.items():
        if not any(meant.endswith(f".{name}") for name in names.split()):
            continue
        found = [path for ours in candidates.split() for path in known if f".{path}".endswith(f".{ours}")]
        if found:
            nearest = min(found, key=lambda path: path.count("."))
            return f"did you mean {nearest}?{f' ({said})' if said else ''}"
        if not candidates:
            return said
    return ""
