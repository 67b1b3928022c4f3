"""The table of architectures: a tiny random model of every causal family of transformers, scored, differentiated and
sampled here and by plain transformers on single unpadded rows.

python benchmarks/architectures.py [--only llama gpt_oss] [--seconds 60]

Writes docs/evidence/data/architectures.json and the page docs/architectures.md made of it. Each family runs in a
process of its own, so that one that hangs or eats memory costs a row and not the table.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import transformers  # noqa: E402

from tests.architectures import families  # noqa: E402
from trimtab.batches.trees import TokenTrees, response_tree  # noqa: E402
from trimtab.core.errors import TrimtabError  # noqa: E402
from trimtab.engines.local.sampler import LocalSampler, Sampling  # noqa: E402
from trimtab.models.forward import sequence_scores_of  # noqa: E402
from trimtab.models.load import load_causal, load_scalar  # noqa: E402
from trimtab.models.roles import Policy, ScalarModel  # noqa: E402

DATA = ROOT / "docs" / "evidence" / "data" / "architectures.json"
PAGE = ROOT / "docs" / "architectures.md"
MEMORY = 6 << 30
NUM_NEW = 8
NOTICEABLE = 1e-5
"""Nats; a larger difference is told from rounding by the same model in float64."""
PROMPT_LENGTHS = (14, 3, 8)

Row = dict[str, Any]


def main() -> None:
    """Makes the rows, and the page of all rows made so far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=None, help="families; all of them without")
    parser.add_argument("--seconds", type=int, default=60, help="a family that takes longer is left out")
    options = parser.parse_args()
    done = json.loads(DATA.read_text(encoding="utf-8"))["families"] if DATA.exists() else {}
    rows = done if options.only is not None else {}
    for name in options.only if options.only is not None else families.every_family():
        rows[name] = in_a_process(name, options.seconds)
        print(name, rows[name], flush=True)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        text = json.dumps({"versions": versions, "families": dict(sorted(rows.items()))}, indent=1) + "\n"
        DATA.write_text(text, encoding="utf-8")
        PAGE.write_text(page(dict(sorted(rows.items())), versions), encoding="utf-8")


def in_a_process(name: str, seconds: int) -> Row:
    """The row of a family, made in a child of this process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        try:
            found = row(name)
        except BaseException as error:
            found = {"not_tested": said(error)}
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"not_tested": f"took more than {seconds} s or {MEMORY >> 30} GB"}


def row(name: str) -> Row:
    """What a family gives here, beside plain transformers; differences are the largest, in nats."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    some = families.trees()
    try:
        plain = families.causal(name)
        expected = families.plain_logprobs(plain, some)
        expected.sum().backward()
    except Exception as error:
        return {"not_tested": f"plain transformers: {said(error)}"}
    with tempfile.TemporaryDirectory() as directory:
        families.write(plain, Path(directory))
        try:
            policy = Policy(load_causal(directory), pad_id=families.PAD)
        except TrimtabError as error:
            return {"refused": said(error)} | reward_model(name)
    logprobs = policy(TokenTrees.build(some)).logprobs
    logprobs.sum().backward()
    shape = policy.shaped
    found: Row = {"form": policy.form, "logprobs": float((logprobs - expected).abs().max())}
    found["gradient"] = gradient_difference(policy, plain)
    if found["logprobs"] > NOTICEABLE:
        with torch.no_grad():
            exact = families.plain_logprobs(plain.double(), some)
        plain.float()
        found |= {"rounding": float((expected - exact).abs().max()), "error": float((logprobs - exact).abs().max())}
    found |= {k: v for k, v in (("scale", shape.scale), ("cap", shape.cap)) if v not in (1.0, None)}
    return found | reward_model(name) | sampler(policy, plain)


def gradient_difference(policy: Policy, plain: torch.nn.Module) -> float:
    """The largest relative difference of a parameter's gradient; 1 for one that is missing."""
    ours, theirs = families.gradients(policy), families.gradients(plain)
    felt = {n: g for n, g in theirs.items() if g.norm() > 1e-4}
    return max(float((ours[n] - g).norm() / g.norm()) if n in ours else 1.0 for n, g in felt.items())


def reward_model(name: str) -> Row:
    """The scores of a reward model of the family, and whether it can be a critic."""
    some = families.trees()
    try:
        plain = families.scalar(name)
        expected = families.plain_scores(plain, some)
    except Exception:
        return {}  # transformers has no such class
    with tempfile.TemporaryDirectory() as directory:
        families.write(plain, Path(directory))
        try:
            model = ScalarModel(load_scalar(directory), pad_id=families.PAD)
        except TrimtabError as error:
            return {"scores_refused": said(error)}
    scores = sequence_scores_of(model, TokenTrees.build(some), 10**9)
    return {"scores": float((scores - expected).abs().max()), "critic": model.is_decoder}


def sampler(policy: Policy, plain: torch.nn.Module) -> Row:
    """How replies are decoded, and how far their log-probabilities are from plain transformers'."""
    chat: Any = SimpleNamespace(stop_ids=(), pad_id=families.PAD)
    draw = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, families.VOCAB, (n,), generator=draw).tolist() for n in PROMPT_LENGTHS]
    worst = 0.0
    try:
        generator = LocalSampler(policy, chat, Sampling(max_new_tokens=NUM_NEW))
        for group_size in (1, 3):
            uniforms = torch.rand(len(prompts) * group_size, NUM_NEW, generator=draw, dtype=torch.float64)
            drawn = generator.continue_ids(prompts, group_size=group_size, uniforms=uniforms)
            trees = [response_tree(prompts[i // group_size], [ids]) for i, (ids, _, _) in enumerate(drawn)]
            with torch.no_grad():
                own = families.plain_logprobs(plain, trees)  # type: ignore[arg-type]
            worst = max(worst, float((torch.tensor([x for _, logs, _ in drawn for x in logs]) - own).abs().max()))
    except TrimtabError as error:
        return {"sampler_refused": said(error)}
    return {"sampler": generator.method, "sampled": worst}


def said(error: BaseException) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]


def page(rows: dict[str, Row], versions: dict[str, str]) -> str:
    """The page: what is right and how it is computed, what is refused and why, and what could not be tried."""
    right = {n: r for n, r in rows.items() if "form" in r}
    refused = {n: r for n, r in rows.items() if "refused" in r}
    untested = {n: r for n, r in rows.items() if "not_tested" in r}
    lines = [
        "# Architectures",
        "",
        "A tiny random model of every causal family of transformers, its weights so large that a wrong mask moves a",
        "log-probability by tenths of a nat, on rows longer than its windows, beside plain transformers: eager",
        f"attention, one unpadded row at a time (torch {versions['torch']}, transformers {versions['transformers']}).",
        "Made by `python benchmarks/architectures.py`.",
        "",
        "Every model is compared with its own plain hidden states and logits when it is loaded, and computed in",
        "the first form that agrees. **tree**: sequences that share a prompt share its tokens. **padded**: every",
        "sequence is a row of its own, so a prompt is computed once for each reply. **alone**: every sequence is a",
        "batch of its own, the slowest. Replies are decoded in slots (**fused** or **rows**, the fast ways), in",
        "**padded** rows, in **lockstep** (rows of one length), or **uncached**. Nothing that differs is used; what no",
        "form gives rightly is refused, with a sentence that says why.",
        "",
        f"## Right: {len(right)} families",
        "",
        "Log-probabilities and samples: largest difference in nats. Gradient: largest relative difference of a",
        "parameter's. Where log-probabilities differ by more than 1e-5, how far plain transformers in float32 and what",
        "is computed here are from plain transformers in float64.",
        "",
        "| family | form | log-probabilities | gradient | scores of a reward model | critic | sampler | samples |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in right.items():
        scores = figure(r.get("scores")) if "scores" in r else "no class" if "scores_refused" not in r else "refused"
        critic = {True: "yes", False: "no", None: ""}[r.get("critic")]
        errors = f" (errors {figure(r['rounding'])} and {figure(r['error'])})" if "rounding" in r else ""
        cells = [name, r["form"], figure(r["logprobs"]) + errors, figure(r["gradient"]), scores, critic]
        cells += [r.get("sampler", "refused"), figure(r.get("sampled"))]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"## Refused as a policy, by name: {len(refused)}", "", "| family | why |", "|---|---|"]
    lines += [f"| {n} | {r['refused'].partition(': ')[2]} |".replace("\n", " ") for n, r in refused.items()]
    lines += [
        "",
        f"## Not tried: {len(untested)}",
        "",
        "The tiny model could not be made or run by transformers itself, or took too long. The check at load decides.",
        "",
        ", ".join(untested) + ".",
        "",
    ]
    if left := sorted(set(families.every_family()) - set(rows)):
        lines += [f"## Not in this table yet: {len(left)}", "", "`--only` adds them: " + ", ".join(left) + ".", ""]
    return "\n".join(lines)


def figure(x: float | None) -> str:
    """A difference in one digit."""
    return "" if x is None else f"{x:.0e}"


if __name__ == "__main__":
    main()
