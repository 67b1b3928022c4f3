"""The peer's side of `speed.py`: one stage by TRL's own trainer on a fixed workload; prints one JSON line.

    python benchmarks/speed_peer.py STAGE MODEL ROWS [--steps N --batch B --micro M --gen L --group G --precision P]

Run it with an interpreter that has TRL 1.16, or 1.12 for `ppo` (the last release with that trainer). The trainers are
used as their documentation says; two things are set so that the work is the same: rows come in the order of the file,
and losses are printed with all their digits. `generate` times `model.generate` instead.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import tempfile
import time
from pathlib import Path

OPTIONS = {"steps": 4, "batch": 16, "micro": 8, "gen": 64, "group": 8, "maxlen": 512, "promptlen": 256, "num": 32,
           "stops": 0, "repeats": 2}  # fmt: skip


def in_order() -> None:
    """Makes the Trainer read its rows in their order and print each loss as it is."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer

    Trainer._get_train_sampler = lambda self, dataset=None: SequentialSampler(dataset or self.train_dataset)
    log = Trainer.log

    def log_and_print(self, logs, *args, **kwargs):
        if "loss" in logs:
            print(json.dumps({"loss": logs["loss"]}), flush=True)
        return log(self, logs, *args, **kwargs)

    Trainer.log = log_and_print


def in_bfloat16() -> None:
    """Makes every Trainer run under autocast to bfloat16."""
    from transformers import TrainingArguments

    check = TrainingArguments.__post_init__

    def check_with_bfloat16(self):
        self.bf16 = True
        check(self)

    TrainingArguments.__post_init__ = check_with_bfloat16


def generate(model_dir: str, rows: str, options: dict[str, int]) -> None:
    """Prints tokens per second of `model.generate` over batches of prompts, and peak memory."""
    import torch
    from speed_ours import prompts_and_stops
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    prompts, stops, pad = prompts_and_stops(model_dir, rows, options)
    torch.manual_seed(0)
    rates = []
    for _ in range(options["repeats"] + 1):
        started, drawn = time.perf_counter(), 0
        for start in range(0, len(prompts), options["batch"]):
            part = prompts[start : start + options["batch"]]
            width = max(map(len, part))
            ids = torch.tensor([[pad] * (width - len(p)) + p for p in part])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=options["gen"],
                do_sample=True,
                top_k=0,
                eos_token_id=stops or None,
                pad_token_id=pad,
            )
            for row in out[:, width:].tolist():
                ends = [i for i, token in enumerate(row) if token in set(stops)]
                drawn += ends[0] + 1 if ends else len(row)
        rates.append(drawn / (time.perf_counter() - started))
    print(json.dumps({"tokens_per_second": rates[1:], "tokens": drawn, "rss_gb": peak_rss_gb()}))


def peak_rss_gb() -> float:
    """The most memory this program has held; `ru_maxrss` would begin at that of its launcher."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20, 3)


def pairs_of(rows: str) -> list[dict[str, list[dict[str, str]]]]:
    """The rows as TRL's conversational preference data."""
    from speed import split

    found = []
    with gzip.open(rows, "rt", encoding="utf-8") as file:
        for line in file:
            chosen, rejected = (split(json.loads(line)[side]) for side in ("chosen", "rejected"))
            found.append({"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]})
    return found


def trainer_of(o: argparse.Namespace, scratch: str, callbacks: list):
    """TRL's trainer of the stage, as its documentation says."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer, pairs = AutoTokenizer.from_pretrained(o.model), pairs_of(o.rows)
    shared = {
        "output_dir": scratch,
        "per_device_train_batch_size": o.micro,
        "gradient_accumulation_steps": o.batch // o.micro,
        "learning_rate": 1e-5,
        "seed": 0,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    steps, both = {"max_steps": o.steps}, {"processing_class": tokenizer, "callbacks": callbacks}

    def policy():
        return AutoModelForCausalLM.from_pretrained(o.model, dtype=torch.float32)

    def scores():
        return AutoModelForSequenceClassification.from_pretrained(o.model, num_labels=1, dtype=torch.float32)

    if o.stage == "sft":
        from trl import SFTConfig, SFTTrainer

        data = Dataset.from_list([{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs])
        return SFTTrainer(policy(), SFTConfig(max_length=o.maxlen, **steps, **shared), train_dataset=data, **both)
    if o.stage == "reward":
        from trl import RewardConfig, RewardTrainer

        settings = RewardConfig(max_length=o.maxlen, **steps, **shared)
        return RewardTrainer(scores(), settings, train_dataset=Dataset.from_list(pairs), **both)
    if o.stage == "dpo":
        from trl import DPOConfig, DPOTrainer

        settings = DPOConfig(max_length=o.maxlen, **steps, **shared)
        return DPOTrainer(policy(), policy(), args=settings, train_dataset=Dataset.from_list(pairs), **both)
    if o.stage == "grpo":
        from trl import GRPOConfig, GRPOTrainer

        settings = GRPOConfig(num_generations=o.group, max_completion_length=o.gen, beta=0.04, **steps, **shared)
        data = Dataset.from_list([{"prompt": p["prompt"]} for p in pairs])
        return GRPOTrainer(policy(), length_reward, settings, train_dataset=data, **both)
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer.padding_side = "left"
    encoded = [tokenizer.apply_chat_template(p["prompt"], add_generation_prompt=True)["input_ids"] for p in pairs]
    data = Dataset.from_dict({"input_ids": encoded})
    settings = PPOConfig(
        total_episodes=o.steps * o.batch, num_ppo_epochs=4, num_mini_batches=1, response_length=o.gen,
        local_rollout_forward_batch_size=o.micro, num_sample_generations=0, stop_token="eos", **shared,
    )  # fmt: skip
    models = {"model": policy(), "ref_model": policy(), "reward_model": scores(), "value_model": scores()}
    eval_data = data.select(range(min(8, len(data))))
    return PPOTrainer(settings, train_dataset=data, eval_dataset=eval_data, **models, **both)


def length_reward(completions, **columns):
    """What GRPO is rewarded by on both sides: characters of the reply, in hundreds."""
    return [len(c[0]["content"]) / 100 for c in completions]


def train(o: argparse.Namespace) -> None:
    """Prints seconds of each step, of all, and peak memory."""
    import torch
    from transformers import TrainerCallback

    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            marks.append(time.perf_counter())

        def on_train_end(self, *args, **kwargs):
            marks.append(time.perf_counter())

    in_order()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trainer_of(o, scratch, [Clock()])
        began = time.perf_counter()
        trainer.train()
        total = time.perf_counter() - began
    steps = [end - begin for begin, end in itertools.pairwise(marks)]
    print(json.dumps({"steps_s": steps, "total_s": total, "rss_gb": peak_rss_gb()}))


def main() -> None:
    """Runs one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["sft", "reward", "dpo", "grpo", "ppo", "generate"])
    parser.add_argument("model", type=lambda path: str(Path(path)))
    parser.add_argument("rows")
    parser.add_argument("--precision", default="", help="a float32 matmul precision, or bfloat16")
    for name, value in OPTIONS.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    if options.precision == "bfloat16":
        in_bfloat16()
    elif options.precision:
        import torch

        torch.set_float32_matmul_precision(options.precision)
    if options.stage == "generate":
        generate(options.model, options.rows, vars(options))
    else:
        train(options)


if __name__ == "__main__":
    main()
