"""How long a large file takes before the first step, cold and warm, and how much memory.

    python benchmarks/size.py --num 20000 300000 --out /tmp/size
    python benchmarks/size.py --num 3000000 --out /tmp/size --stop              # 2.4 GB of pairs, until the first step
    python benchmarks/size.py --num 20000 --out /tmp/size --peer PEER/bin/python  # TRL's start on the same file
    python benchmarks/size.py --out /tmp/size --data docs/evidence/data/size_avx512.json  # on another processor

Writes pairs of realistic lengths (prompt, chosen, rejected; about 800 bytes a row), then runs two steps of `trimtab
reward` and of `trimtab preference` on a tiny model, each with nothing kept and again, and `trimtab data show --rows 1`.
Seconds are from the start of the command to the end of the first step; memory is the largest of the process and of all
its children together, without what files are mapped. With `--stop` a run is killed when its first step is done: what
comes after it, mostly the tenth of the pairs that is held out, takes longer than the start. `--hh FILE` adds a file of
hh-rlhf, repeated to 170,000 rows.
Results of several calls are merged in `docs/evidence/data/size.json`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from speed import machine

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "docs" / "evidence" / "data" / "size.json"
HH_ROWS = 170_000
STEPS = "max_steps=2"
PARTS = ["reward", "preference", "show"]
PEER_CODE = """
import sys, time
began = time.perf_counter()
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from transformers import TrainerCallback
class FirstStep(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 1:
            print("FIRST STEP", flush=True)
model, data, out = sys.argv[1:]
rows = load_dataset("json", data_files=data, split="train")
config = DPOConfig(output_dir=out, max_steps=2, per_device_train_batch_size=8, gradient_accumulation_steps=4,
                   report_to=[], use_cpu=True, save_strategy="no", logging_strategy="no", max_length=1024)
DPOTrainer(AutoModelForCausalLM.from_pretrained(model), args=config, train_dataset=rows,
           processing_class=AutoTokenizer.from_pretrained(model), callbacks=[FirstStep()]).train()
"""


def write_pairs(path: Path, num: int, seed: int = 0) -> None:
    """Pairs in sentences of made-up words, frequent ones as frequent as in language; every prompt is another."""
    random = np.random.default_rng(seed)
    syllables = [c + v for c in "bcdfghklmnprstvw" for v in ("a", "e", "i", "o", "u", "ai", "er", "on")]
    words = ["".join(random.choice(syllables, random.integers(1, 4))) for _ in range(8000)]
    weights = 1 / np.arange(1, len(words) + 1)
    drawn = random.choice(len(words), 400_000, p=weights / weights.sum())
    sentences: list[str] = []
    at = 0
    while len(sentences) < 30_000:
        size = int(random.integers(5, 15))
        sentence = " ".join(words[i] for i in drawn[at : at + size])
        sentences.append(sentence.capitalize() + str(random.choice([".", "!", "?", "."])))
        at = (at + size) % (len(drawn) - 20)
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, num, 10_000):
            block = min(10_000, num - start)
            lengths = random.integers(2, 8, (block, 3))
            picks = random.integers(0, len(sentences), (block, 3, 8))
            for i in range(block):
                texts = [" ".join(sentences[j] for j in picks[i, k, : lengths[i, k]]) for k in range(3)]
                row = {"prompt": f"{start + i}. {texts[0]}", "chosen": texts[1], "rejected": texts[2]}
                file.write(json.dumps(row) + "\n")


def write_hh(path: Path, source: Path) -> None:
    """The rows of a file of hh-rlhf over and over, each with a number so that no prompt comes twice."""
    with gzip.open(source, "rt", encoding="utf-8") as packed:
        rows = [json.loads(line) for line in packed]
    with path.open("w", encoding="utf-8") as file:
        for i, row in enumerate(islice(cycle(rows), HH_ROWS)):
            begin = f"\n\nHuman: ({i})"
            file.write(
                json.dumps({k: begin + row[k].removeprefix("\n\nHuman:") for k in ("chosen", "rejected")}) + "\n"
            )


def make_model(directory: Path, data: Path) -> None:
    """A tiny Llama with a tokenizer of 8,192 tokens, trained on the first rows."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from trimtab.models.save import save_model
    from trimtab.stages.pretrain import train_tokenizer

    with data.open(encoding="utf-8") as file:
        texts = [text for line in islice(file, 2000) for text in json.loads(line).values()]
    tokenizer = train_tokenizer(texts, 8192)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    save_model(AutoModelForCausalLM.from_config(config), tokenizer, directory)


# ---- measuring ------------------------------------------------------------------------------------------------------


def descendants(pid: int) -> Iterator[int]:
    """The process and all that came of it."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from descendants(int(child))


def own_memory(pid: int) -> int:
    """Bytes of the process that are its own: neither shared with its parent nor pages of mapped files."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:] if line.endswith("kB")}
    return 1024 * sizes.get("Pss_Anon", sizes.get("Pss", 0))


class Watch(threading.Thread):
    """Notes the largest memory of a process with its children, and when a line or a file says that a step is done."""

    def __init__(self, process: subprocess.Popen[str], done: Path | None, stop: bool) -> None:
        super().__init__(daemon=True)
        self.process, self.done, self.stop = process, done, stop
        self.peak = 0
        self.began = time.perf_counter()
        self.first_step = 0.0

    def run(self) -> None:
        """Looks ten times a second until the process ends, and less often where a look at much memory takes long."""
        while Path(f"/proc/{self.process.pid}").exists():
            began = time.perf_counter()
            self.peak = max(self.peak, sum(map(own_memory, descendants(self.process.pid))))
            if self.done is not None and not self.first_step and self.done.exists() and self.done.stat().st_size:
                self.first_step = time.perf_counter() - self.began
            if self.stop and self.first_step:
                self.process.kill()
            time.sleep(max(0.1, 20 * (time.perf_counter() - began)))


def measured(
    command: list[str], cache: Path, *, done: Path | None = None, line: str = "", stop: bool = False
) -> dict[str, float]:
    """Seconds to the end of the first step (`done` is then written, or `line` printed), seconds in all, CPU, memory."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    before = os.times()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watch = Watch(process, done, stop)
    watch.start()
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True)
    reader.start()
    for printed in process.stdout or ():
        if line and line in printed:
            watch.first_step = time.perf_counter() - watch.began
    code = process.wait()
    seconds = time.perf_counter() - watch.began
    reader.join()
    if code and not (stop and watch.first_step):
        sys.exit(f"{' '.join(command)} ended with {code}:\n{''.join(errors[-20:])}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    first = {"first_step_seconds": round(watch.first_step, 1)} if done is not None or line else {}
    return first | {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "peak_gb": round(watch.peak / 1e9, 2)}


def stage(name: str, model: Path, data: Path, out: Path, cache: Path, *, stop: bool) -> dict[str, float]:
    """Two steps of a stage."""
    run = out / f"run-{name}"
    shutil.rmtree(run, ignore_errors=True)
    settings = out / f"{name}.toml"
    # hh-rlhf has empty replies.
    settings.write_text(f'model = "{model}"\ndata = "{data}"\nbatch_size = 32\non_bad_row = "drop"\n', encoding="utf-8")
    command = [sys.executable, "-m", "trimtab", name, str(settings), STEPS, "--out", str(run)]
    return measured(command, cache, done=run / "metrics.jsonl", stop=stop)


def measure(data: Path, model: Path, out: Path, parts: list[str], peer: str | None, *, stop: bool) -> dict[str, object]:
    """Everything asked for of one file."""
    with data.open("rb") as file:
        num_rows = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 22), b""))
    result: dict[str, object] = {"rows": num_rows, "file_gb": round(data.stat().st_size / 1e9, 3)}
    cache = out / "cache"
    for name in (part for part in parts if part != "show"):
        shutil.rmtree(cache, ignore_errors=True)
        result[f"{name}_cold"] = stage(name, model, data, out, cache, stop=stop)
        result[f"{name}_warm"] = stage(name, model, data, out, cache, stop=stop)
        kept = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        result["kept_gb"] = round(kept / 1e9, 3)
    shutil.rmtree(cache, ignore_errors=True)
    if "show" in parts:
        show = [sys.executable, "-m", "trimtab", "data", "show", str(data), "--model", str(model), "--rows", "1"]
        result["data_show"] = measured(show, cache)
    if peer is not None:
        code = out / "peer.py"
        code.write_text(PEER_CODE, encoding="utf-8")
        command = [peer, str(code), str(model), str(data), str(out / "peer")]
        os.environ["HF_HOME"] = str(out / "peer-cache")
        shutil.rmtree(out / "peer-cache", ignore_errors=True)
        result["trl_cold"] = measured(command, cache, line="FIRST STEP", stop=stop)
        result["trl_warm"] = measured(command, cache, line="FIRST STEP", stop=stop)
    print(data.name, json.dumps(result, indent=1), flush=True)
    return result


def table(files: dict[str, dict[str, Any]]) -> str:
    """The figures of each file in Markdown."""
    lines = [
        "| pairs | what | cold: first step | warm: first step | peak memory, cold and warm | `data show --rows 1` |",
        "|---|---|---|---|---|---|",
    ]
    for found in files.values():
        size = found["file_gb"]
        file = f"{found['rows']:,} ({f'{size:.1f} GB' if size >= 1 else f'{1000 * size:.0f} MB'})"
        show = f"{found['data_show']['seconds']:.1f} s" if "data_show" in found else ""
        for key, name in {"reward": "reward", "preference": "preference", "trl": "TRL's DPO"}.items():
            if (cold := found.get(f"{key}_cold")) and (warm := found.get(f"{key}_warm")):
                seconds = [f"{run['first_step_seconds']:.1f} s" for run in (cold, warm)]
                memory = ", ".join(f"{run['peak_gb']:.2f} GB" for run in (cold, warm))
                lines.append(f"| {' | '.join([file, name, *seconds, memory, show])} |")
                show = ""
    return "\n".join(lines)


def main() -> None:
    """Generates, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, nargs="*", default=[20_000, 300_000], help="pairs of each generated file")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the files, the model and the runs")
    parser.add_argument("--hh", type=Path, help="a file of hh-rlhf (jsonl.gz)")
    parser.add_argument("--peer", help="the Python of an environment with TRL")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="which commands (all of them)")
    parser.add_argument("--stop", action="store_true", help="end each run with its first step")
    parser.add_argument(
        "--data", type=Path, default=RESULT, help="where to write; another processor has a file of its own"
    )
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    files = [(out / f"pairs-{num}.jsonl", num) for num in options.num]
    for path, num in files:
        if not path.exists():
            write_pairs(path, num)
    if options.hh is not None:
        files.append((out / "hh.jsonl", HH_ROWS))
        write_hh(files[-1][0], options.hh)
    model = out / "model"
    if not (model / "config.json").exists():
        make_model(model, files[0][0])
    before = json.loads(options.data.read_text(encoding="utf-8")) if options.data.exists() else {"files": {}}
    found = before["files"]
    for path, _ in files:  # each is written when it is known: the largest take an hour
        load = round(os.getloadavg()[0], 1)
        measures = measure(path, model, out, options.parts, options.peer, stop=options.stop)
        found[path.stem] = {**found.get(path.stem, {}), **measures, "load_before": load, "machine": machine()}
        result = {"command": "python benchmarks/size.py", "files": found}
        options.data.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
