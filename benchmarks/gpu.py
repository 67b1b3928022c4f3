"""Proves trimtab on one GPU and measures it there, in at most eight minutes: `docs/evidence/data/gpu.json`.

    python benchmarks/gpu.py                # on a machine with a GPU
    python benchmarks/gpu.py --dry          # everything with tiny sizes on the CPU, in half a minute

Each part stands alone: one that fails is noted with its error, and the next begins. No model is downloaded; weights are
random, with a fixed seed. Parts:

- attention: trees in 16 bits by the flash kernel beside the masked definition in float32, forward and backward;
- bits: whether the same update gives the same bits twice, and after saving and loading;
- sft, rl: training steps at the shapes of published single-GPU figures (Qwen3 0.6B; 8,192 and 16,384 tokens): tokens a
  second, model FLOP utilisation, memory; replies alone beside the same replies in groups of 8 that share a prompt;
- resume: a run of PPO by the command line, killed with SIGKILL and run again, beside one that was left alone;
- peer: TRL's SFT steps of the same shape, if it is installed;
- agree: updates, scores and every form of sampling on the GPU beside the CPU, in float32 and in bfloat16;
- sampling: replies a second in slots, in float32 and bfloat16.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen3Config

from trimtab.batches.rollouts import PolicyBatch
from trimtab.batches.trees import TokenTrees, TreeBatch, response_tree, sequence_tree
from trimtab.core import config, seeds
from trimtab.engines.check import NoChat
from trimtab.engines.local.form_choice import choose_form, forms
from trimtab.engines.local.learner import AdamW, LocalLearner
from trimtab.engines.local.replies import ReplyBuffer, Sampling
from trimtab.engines.local.scorer import LocalScorer
from trimtab.math.losses.policy import PPO, EntropyBonus
from trimtab.math.losses.sft import SFTLoss
from trimtab.models.roles import Policy
from trimtab.models.tree_attention import masked_attention, takes_packed, tree_attention

OUT = Path(__file__).parents[1] / "docs" / "evidence" / "data" / "gpu.json"
PEAK_FLOPS = 989e12
"""Of an H100 (SXM) in bfloat16 without sparsity, of which utilisation is a share."""
TOKEN_BUDGET = 18 * 1024
"""Tokens of a forward pass."""
PUBLISHED = {
    "sft_8192": {"tokens_per_second": 26005, "gib": 31.7, "mfu": 0.168, "step_seconds": 0.62},
    "rl_16384": {"tokens_per_second": 11896, "gib": 12.5, "mfu": 0.111, "step_seconds": 1.99},
}
"""prime-rl, January 2026, one H100, trainer steps on made-up data (FlashAttention 3, compiled, recomputing)."""


@dataclass(frozen=True)
class Place:
    """The device, and how large the work is there."""

    device: torch.device
    dry: bool

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def measured(self, found: dict[str, Any]) -> Iterator[None]:
        """Notes seconds, and the GiB that tensors took at most and that were reserved."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        self.wait()
        began = time.perf_counter()
        yield
        self.wait()
        found["seconds"] = round(time.perf_counter() - began, 4)
        if cuda:
            found["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            found["gib_reserved"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)


def tiny(family: str) -> Any:
    """A small model with weights large enough that its replies differ."""
    shape: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    no_ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    config = {
        "llama": lambda: LlamaConfig(**shape, **heads),
        "qwen3": lambda: Qwen3Config(**shape, **heads, head_dim=16),
        "qwen3, 512 wide": lambda: Qwen3Config(**(shape | {"hidden_size": 512}), **heads, head_dim=64),
        "gpt2": lambda: GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=512, **no_ids),
        "mistral, windowed": lambda: MistralConfig(**shape, **heads, sliding_window=8),
    }[family]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.mul_(4.0)
    return model.eval()


def large(place: Place) -> Any:
    """Qwen3 of 0.6 billion weights, made on the device; when dry, a very small one."""
    size = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 1000}
    full = {"hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072, "vocab_size": 151936}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 16 if place.dry else 128}
    torch.manual_seed(0)
    shape = size if place.dry else full
    with place.device:
        return AutoModelForCausalLM.from_config(
            Qwen3Config(**shape, **heads, max_position_embeddings=40960, tie_word_embeddings=True)
        ).eval()


def on(device: torch.device, model: Any, **options: Any) -> Policy:
    """A policy on the device."""
    return Policy(torch.nn.Module.to(model, device), pad_id=0, **options)


def ids(draw: torch.Generator, num: int, vocabulary: int) -> list[int]:
    """Random tokens."""
    found: list[int] = torch.randint(2, vocabulary, (num,), generator=draw).tolist()
    return found


def policy_batch(trees: TokenTrees, draw: torch.Generator) -> PolicyBatch:
    """Made-up advantages and log-probabilities for these trees."""
    old, ref, advantages = torch.randn(3, trees.num_trained, generator=draw).unbind()
    zeros = torch.zeros_like(old)
    return PolicyBatch(
        trees=trees,
        old_logprobs=-6 + 0.1 * old,
        correction=torch.ones_like(old),
        ref_logprobs=-6 + 0.1 * ref,
        old_values=zeros,
        advantages=advantages,
        returns=zeros,
    )


def small_batch(seed: int = 0) -> PolicyBatch:
    """Twelve prompts of different lengths with up to four replies each."""
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 40, (12, 5), generator=draw).tolist()
    trees = []
    for i, (prompt, *lengths) in enumerate(sizes):
        replies = [ids(draw, n, 512) for n in lengths[: 1 + i % 4]]
        trees.append(response_tree(ids(draw, prompt, 512), replies))
    return policy_batch(TokenTrees.build(trees), draw)


def learner(policy: Policy, **options: Any) -> LocalLearner:
    """A learner of the policy."""
    settings = {"token_budget": 512, "num_updates": 100, "name": "policy"} | options
    return LocalLearner(policy, AdamW(learning_rate=1e-4), **settings)


def agree(place: Place) -> dict[str, Any]:
    """How far the device is from the CPU."""
    found: dict[str, Any] = {}
    for family in ("llama", "qwen3", "gpt2", "mistral, windowed", "qwen3, 512 wide"):
        found[family] = row = {}
        cpu, gpu = (on(device, tiny(family)) for device in (torch.device("cpu"), place.device))
        batch = small_batch()
        logprobs = [LocalScorer(policy, token_budget=512).logprobs(batch.trees) for policy in (cpu, gpu)]
        row["logprobs"] = float((logprobs[0] - logprobs[1]).abs().max())
        made = [learner(policy) for policy in (cpu, gpu)]
        metrics = [m.update([(batch, [PPO(), EntropyBonus(coef=0.01)])]) for m in made]
        values = [(a.value, b.value) for a, b in zip(metrics[0].values(), metrics[1].values(), strict=True)]
        row["metrics, relative"] = max(abs(a - b) / max(abs(a), 1e-3) for a, b in values)
        pairs = zip(made[0].parameters.values(), made[1].parameters.values(), strict=True)
        row["gradients, relative"] = max(
            float((p.grad - q.grad.cpu()).abs().max() / p.grad.abs().max()) for p, q in pairs if p.grad is not None
        )
        gpu.precision = "bfloat16"
        half = LocalScorer(gpu, token_budget=512).logprobs(batch.trees)
        again = LocalScorer(gpu, token_budget=512).logprobs(batch.trees)
        row["logprobs, bfloat16"] = float((half - made[0].logprobs(batch.trees)).abs().max())
        row["same twice, bfloat16"] = bool(torch.equal(half, again))
        row["replies"] = replies_agree(family, place)
    return found


def replies_agree(family: str, place: Place) -> dict[str, Any]:
    """Which form is chosen, and for each form how many of 96 replies are those of the CPU, token for token."""
    draw = torch.Generator().manual_seed(1)
    prompts = [ids(draw, n, 512) for n in (5, 17, 9, 30, 12, 3)]
    policies = [on(device, tiny(family)) for device in (torch.device("cpu"), place.device)]
    chat: Any = NoChat()
    found: dict[str, Any] = {}
    for precision in ("float32", "bfloat16"):
        sampling = Sampling(max_new_tokens=24, precision=precision)
        drawn: dict[str, list[Any]] = {}
        for policy in policies:
            if policy.device.type == place.device.type:
                found["chosen"] = choose_form(policy, sampling, chat).form.name
            for form in forms(policy, sampling, chat):
                if form.name == "uncached":
                    continue
                names = [seeds.generator(0, str(i)).random(24) for i in range(96)]
                uniforms = torch.tensor([list(map(float, row)) for row in names], dtype=torch.float64)
                replies = ReplyBuffer(uniforms, sampling, chat)
                with (
                    torch.no_grad(),
                    torch.autocast(policy.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"),
                ):
                    form.decode(prompts, 16, replies)
                drawn.setdefault(form.name, []).append(replies.finished())
        for name, both in drawn.items():
            same = sum(a[0] == b[0] for a, b in zip(both[0], both[-1], strict=True))
            found[f"{name}, {precision}"] = f"{same} of 96"
    return found


def attention(place: Place) -> dict[str, Any]:
    """The largest errors of output and gradients, relative to the largest entry, and whether they are the same twice;
    where there is no GPU, of whatever computes 16 bits there."""
    draw = torch.Generator().manual_seed(0)
    trees = TokenTrees.build([*small_batch().trees.trees, sequence_tree(ids(draw, 100, 512))]).to(place.device)
    found: dict[str, Any] = {}
    for heads, size in ((4, 4), 16), ((16, 8), 64), ((16, 8), 128), ((8, 1), 256):
        shapes = [(trees.num_tokens, n, size) for n in (heads[0], heads[1], heads[1], heads[0])]
        *states, weights = (torch.randn(shape, generator=draw).bfloat16().to(place.device) for shape in shapes)
        exact = [x.float().requires_grad_() for x in states]
        rounded = [x.requires_grad_() for x in states]
        visible = trees.visible()[:, None]
        defined = masked_attention(*exact, trees.strips, visible, size**-0.5)
        wanted = [defined.detach(), *torch.autograd.grad((defined * weights.float()).sum(), exact)]
        twice = []
        for _ in range(2):
            output = tree_attention(trees)(0, *rounded, size**-0.5, None)
            twice.append([output.detach(), *torch.autograd.grad(output, rounded, weights)])
        found[f"{heads[0]} and {heads[1]} heads of {size}"] = {
            "packed": takes_packed(states[0]),
            "errors": [
                float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(twice[0], wanted, strict=True)
            ],
            "same twice": all(map(torch.equal, *twice)),
        }
    return found


def bits(place: Place) -> dict[str, Any]:
    """Whether an update has the same bits twice, and whether one that is loaded goes on with the same bits."""
    return {
        f"{family}, {precision}": same_bits(place, family, precision)
        for family in ("qwen3", "mistral, windowed", "gpt2")
        for precision in ("float32", "bfloat16")
    }


def same_bits(place: Place, family: str, precision: Any) -> dict[str, bool]:
    """Two updates by a learner, by another, and by one that was loaded after the first."""
    ends = []
    with tempfile.TemporaryDirectory() as scratch:
        for way in ("once", "again", "loaded"):
            policy = on(place.device, tiny(family))
            policy.precision = precision
            made = learner(policy)
            if way == "loaded":
                made.load(Path(scratch))
            else:
                made.update([(small_batch(0), [PPO()])])
                made.save(Path(scratch))
            made.update([(small_batch(1), [PPO()])])
            ends.append([p.detach().cpu() for p in made.parameters.values()])
    return {
        "same twice": all(map(torch.equal, ends[0], ends[1])),
        "same after loading": all(map(torch.equal, ends[1], ends[2])),
    }


def flops(model: Any, trees: TokenTrees) -> float:
    """Six for each weight and token, and those of attention: pairs of tokens that see each other."""
    config = model.config
    weights = sum(p.numel() for p in model.parameters())
    width = config.num_attention_heads * config.head_dim
    pairs = sum(
        len(t.prompt) ** 2 / 2 + sum(len(b.ids) * len(t.prompt) + len(b.ids) ** 2 / 2 for b in t.branches)
        for t in trees.trees
    )
    return 6.0 * weights * trees.num_tokens + 12.0 * config.num_hidden_layers * width * pairs


def training(
    place: Place, batch: Any, losses: list[Any], *, precision: Any = "bfloat16", steps: int = 6
) -> dict[str, Any]:
    """Steps of training on this batch: the median is that of the steps after the first two."""
    policy = on(place.device, large(place))
    policy.precision = precision
    policy.checkpoint_activations()
    made = learner(policy, token_budget=TOKEN_BUDGET)
    seconds = []
    found: dict[str, Any] = {}
    for _ in range(steps):
        with place.measured(found):
            made.update([(batch, losses)])
        seconds.append(found["seconds"])
    trees = batch.trees
    tokens = sum(len(t.prompt) + len(b.ids) for t in trees.trees for b in t.branches)
    later = sorted(seconds[2:])
    median = later[len(later) // 2]
    return found | {
        "seconds": median,
        "slowest_seconds": later[-1],
        "first_seconds": seconds[0],
        "tokens": tokens,
        "tokens_computed": trees.num_tokens,
        "tokens_per_second": round(tokens / median),
        "mfu": round(flops(policy.model, trees) / median / PEAK_FLOPS, 4),
    }


def sft(place: Place) -> dict[str, Any]:
    """Two sequences of 8,192 tokens a step."""
    length, vocabulary = (128, 1000) if place.dry else (8192, 151936)
    draw = torch.Generator().manual_seed(0)
    batch = TreeBatch(trees=TokenTrees.build([sequence_tree(ids(draw, length, vocabulary)) for _ in range(2)]))
    return {"published": PUBLISHED["sft_8192"], "bfloat16": training(place, batch, [SFTLoss()])}


def rl(place: Place) -> dict[str, Any]:
    """Two sequences of 16,384 tokens a step, as published; and 16 replies of 1,024 tokens to two prompts of 1,024, each
    alone and in groups of 8."""
    prompt, reply, long, vocabulary = (32, 32, 64, 1000) if place.dry else (1024, 1024, 15 * 1024, 151936)
    draw = torch.Generator().manual_seed(0)
    prompts = [ids(draw, prompt, vocabulary) for _ in range(2)]
    replies = [[ids(draw, reply, vocabulary) for _ in range(8)] for _ in prompts]
    groups = [response_tree(p, r) for p, r in zip(prompts, replies, strict=True)]
    alone = [response_tree(p, [one]) for p, r in zip(prompts, replies, strict=True) for one in r]
    longest = [response_tree(p, [ids(draw, long, vocabulary)]) for p in prompts]
    found: dict[str, Any] = {"published": PUBLISHED["rl_16384"]}
    for name, trees in (("16,384 tokens", longest), ("replies alone", alone), ("groups of 8", groups)):
        found[name] = training(place, policy_batch(TokenTrees.build(trees), draw), [PPO()])
    return found


def resume(place: Place) -> dict[str, Any]:
    """Which files differ between a run that was killed and run again and one that was left alone."""
    shape = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "mlp_size": 96, "max_positions": 256}
    pretrain = {"data": "world:arithmetic", "num_documents": 64, "vocab_size": 280, "architecture": shape}
    online = {
        "prompts": "world:arithmetic?num=32",
        "rewards": [{"name": "regex", "pattern": "[a-f].*[a-f]", "match": "search"}],
        "critic": {"init": "policy"},
        "sampling": {"max_new_tokens": 24},
        "precision": "bfloat16",
        "prompts_per_step": 16,
        "num_steps": 8,
        "checkpoint_every": 1,
        "sample_every": 1,
        "num_samples": 100,
    }
    with tempfile.TemporaryDirectory() as scratch:
        at = Path(scratch)
        online["model"] = str(at / "base" / "model")
        for name, settings in (("base", pretrain), ("online", online)):
            (at / f"{name}.toml").write_text(config.to_toml(settings), encoding="utf-8")

        def begin(stage: str, run_file: str, out: str) -> subprocess.Popen[str]:
            words = [sys.executable, "-m", "trimtab", stage, str(at / run_file), "--out", str(at / out)]
            return subprocess.Popen([*words, "--device", place.device.type], stderr=subprocess.PIPE, text=True)

        def finish(process: subprocess.Popen[str]) -> None:
            said = process.communicate()[1]
            if process.returncode:
                raise RuntimeError(said[-2000:])

        finish(begin("pretrain", "base.toml", "base"))
        alone, killed = begin("online", "online.toml", "alone"), begin("online", "online.toml", "killed")
        steps = at / "killed" / "metrics.jsonl"
        while killed.poll() is None and (not steps.exists() or len(steps.read_text().splitlines()) < 3):
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        done = len(steps.read_text().splitlines())
        finish(alone)
        finish(begin("online", "online.toml", "killed"))
        names = ("model/model.safetensors", "samples.jsonl", "metrics.jsonl")
        content = [{name: without_times(at / out / name) for name in names} for out in ("alone", "killed")]
    return {"steps before the kill": done, "differ": [n for n in names if content[0][n] != content[1][n]]}


def without_times(path: Path) -> Any:
    """What must be equal in equal runs."""
    if path.suffix != ".jsonl":
        return path.read_bytes()
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def sampling(place: Place) -> dict[str, Any]:
    """Replies in slots, with the fused form: tokens a second."""
    found: dict[str, Any] = {}
    draw = torch.Generator().manual_seed(0)
    vocabulary = 1000 if place.dry else 151936
    chat: Any = NoChat()
    for precision in ("float32", "bfloat16"):
        policy = on(place.device, large(place))
        for num, length in ((4, 8),) if place.dry else ((64, 128), (256, 128)):
            prompts = [ids(draw, 8 if place.dry else 128, vocabulary) for _ in range(num)]
            settings = Sampling(max_new_tokens=length, batch_size=num, precision=precision, cache_gb=30)
            form = next(forms(policy, settings, chat))
            replies = ReplyBuffer(torch.rand(num, length, generator=draw, dtype=torch.float64), settings, chat)
            row: dict[str, Any] = {"form": form.name}
            with (
                torch.no_grad(),
                place.measured(row),
                torch.autocast(place.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"),
            ):
                form.decode(prompts, 1, replies)
            row["tokens_per_second"] = round(num * length / row["seconds"])
            found[f"{num} x {length}, {precision}"] = row
    return found


def peer(place: Place) -> dict[str, Any]:
    """TRL's SFT steps of the same shape, with and without its fused kernels (`gpu_peer.py`)."""
    found: dict[str, Any] = {}
    for name, options in (("TRL with Liger", ["--liger"]), ("TRL", [])):
        words = [sys.executable, str(Path(__file__).with_name("gpu_peer.py")), *options]
        ran = subprocess.run([*words, "--dry"] if place.dry else words, capture_output=True, text=True, check=False)
        found[name] = json.loads(ran.stdout.splitlines()[-1]) if ran.returncode == 0 else ran.stderr[-500:]
    return found


PARTS: dict[str, Callable[[Place], dict[str, Any]]] = {
    "attention": attention,
    "bits": bits,
    "sft": sft,
    "rl": rl,
    "resume": resume,
    "peer": peer,
    "agree": agree,
    "sampling": sampling,
}


def table(found: dict[str, Any]) -> str:
    """The rows of steps of training on the page."""
    steps = {"SFT, 2 x 8,192": found["sft"]["bfloat16"]}
    steps |= {f"PPO, {name}": row for name, row in found["rl"].items() if isinstance(row, dict) and "tokens" in row}
    lines = [
        f"| {name} | {row['tokens']:,} | {row['seconds']:.3f} s ({row['slowest_seconds']:.3f}) | "
        f"{row['tokens_per_second']:,} | {row['mfu']:.1%} | {row['gib']:.1f} |"
        for name, row in steps.items()
    ]
    for name, row in found["peer"].items():
        if isinstance(row, dict):
            lines.append(
                f"| {name}: SFT | | {row['seconds']:.3f} s | {row['tokens_per_second']:,} | | {row['gib']:.1f} |"
            )
    for name, row in PUBLISHED.items():
        cells = f"{row['step_seconds']:.2f} s | {row['tokens_per_second']:,.0f} | {row['mfu']:.1%} | {row['gib']:.1f}"
        lines.append(f"| published, one H100: {name} | | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the parts and writes what they found after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, and nothing written")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=OUT, help="where the figures go")
    options = parser.parse_args()
    device = torch.device("cpu") if options.dry else torch.device("cuda", 0)
    machine = "CPU, dry run" if options.dry else torch.cuda.get_device_name(device)
    found: dict[str, Any] = {"machine": machine, "torch": torch.__version__, "command": "python benchmarks/gpu.py"}
    for name in options.parts:
        began = time.perf_counter()
        try:
            found[name] = PARTS[name](Place(device, options.dry))
        except Exception as error:  # the other parts are still worth their minutes
            traceback.print_exc()
            found[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        found[name]["took_seconds"] = round(time.perf_counter() - began, 1)
        print(name, json.dumps(found[name], indent=1), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if not options.dry:
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
