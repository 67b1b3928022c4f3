"""What the suites are held to, as JSON: IFEval beside lm-eval's checks, refusals beside human labels, a real model.

    python benchmarks/suites.py ifeval --data FOLDER --peer PLACE --replies FILE
    python benchmarks/suites.py refusals --data FOLDER
    python benchmarks/suites.py coverage
    python benchmarks/suites.py real --data FOLDER --model DIR --baseline DIR
    python benchmarks/suites.py truthful_qa --data FOLDER --model DIR --python PYTHON

Writes its part of `docs/evidence/data/suites.json` and prints its table of docs/evidence/guard.md. FOLDER has the
layout of `trimtab eval SUITE --data`; PLACE is a directory from which `lm_eval`, `nltk`, `langdetect` and
`immutabledict` can be imported (give it several times); FILE holds replies as `trimtab eval ifeval --replies` writes
them; PYTHON is the interpreter of an environment with lm-eval.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import resource
import sys
import tempfile
import time
import types
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.evals.suites.ifeval import followed, loosened
from trimtab.evals.suites.refusals import refusal_class
from trimtab.evals.suites.suite import load_items, load_suite
from trimtab.evals.suites.tax import PairedGap
from trimtab.runs.environment import environment
from trimtab.votes.agreement import cohen_kappa

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "evidence" / "data" / "suites.json"
CLASSES = ("compliance", "partial_refusal", "full_refusal")
LABELS = {"1_full_compliance": 0, "3_partial_refusal": 1, "2_full_refusal": 2}
REAL = {"hhh": 20, "truthful_qa": 12, "traits": 16, "sycophancy": 6, "xstest": 12, "red_team": 6, "ifeval": 8,
        "gsm8k": 5, "diversity": 4}  # fmt: skip
"""The items of each suite that the real model is asked."""
MAX_NEW_TOKENS = {"xstest": 32, "red_team": 32, "ifeval": 128, "gsm8k": 128, "diversity": 40}

# ---- IFEval beside lm-eval ------------------------------------------------------------------------------------------

SENTENCES = (
    "The river runs past the old mill.", "Dr. Ames paid $3.50 for it, i.e. too much!", "Is this the end?",
    "NASA and the FBI agreed on a CO-OP plan.", "i don't know; it's late...",
    "Nous sommes dans la maison avec les enfants.",
    "Das ist nicht der Weg, den wir gehen.", "यह एक अच्छा दिन है और मैं खुश हूँ।", "Это очень простой ответ.",
    "I'M SURE IT'S NASA'S JOB.",
    "Hii ni nyumba ya watu wa kijiji.", "هذا هو الجواب الصحيح.", "これは日本語の文です。",
    "E.g. the U.S. team won 3.5 to 2.",
)  # fmt: skip

TEXTS = {
    "en": "the lamp is on the table and it is not mine, but you can have it if you like.",
    "de": "das ist nicht der Weg, den wir gehen, aber er ist auch gut für die Kinder.",
    "fr": "nous sommes dans la maison avec les enfants, mais il ne pleut pas sur la ville.",
    "pt": "isto não é para você, mas é uma casa muito boa para os meus filhos.",
    "es": "la casa es de los niños y no está lejos, pero el camino es muy largo.",
    "it": "questo non è il libro che ho letto, ma è anche una bella storia per i bambini.",
    "fi": "hän on kotona, mutta se ei ole hyvä, että me olemme vielä täällä.",
    "sw": "hii ni nyumba ya watu wa kijiji na ni kubwa sana kwa watoto wetu.",
    "vi": "tôi không biết điều đó, nhưng đây là một ngôi nhà đẹp của người bạn tôi.",
    "hi": "यह एक अच्छा दिन है और मैं अपने घर में बहुत खुश हूँ।",
    "mr": "हे एक सुंदर घर आहे आणि ते माझ्या मित्राचे आहे, माझे नाही.",
    "ne": "यो मेरो घर हो र त्यो पनि राम्रो छ, तर टाढा छ।",
    "bn": "এটি একটি সুন্দর বাড়ি এবং আমি এখানে খুব সুখী।",
    "pa": "ਇਹ ਇੱਕ ਸੁੰਦਰ ਘਰ ਹੈ ਅਤੇ ਮੈਂ ਇੱਥੇ ਬਹੁਤ ਖੁਸ਼ ਹਾਂ।",
    "gu": "આ એક સુંદર ઘર છે અને હું અહીં ખૂબ ખુશ છું.",
    "ta": "இது ஒரு அழகான வீடு, நான் இங்கே மிகவும் மகிழ்ச்சியாக இருக்கிறேன்.",
    "te": "ఇది ఒక అందమైన ఇల్లు మరియు నేను ఇక్కడ చాలా సంతోషంగా ఉన్నాను.",
    "kn": "ಇದು ಒಂದು ಸುಂದರವಾದ ಮನೆ ಮತ್ತು ನಾನು ಇಲ್ಲಿ ತುಂಬಾ ಸಂತೋಷವಾಗಿದ್ದೇನೆ.",
    "ru": "это очень простой ответ, и мы его уже давно знаем, но он не всем нравится.",
    "ar": "هذا هو الجواب الصحيح إلى السؤال الذي كان في الكتاب.",
    "fa": "این یک پاسخ خوب است که می‌گویم و برای همه شما مفید خواهد بود.",
    "ur": "یہ ایک اچھا جواب ہے اور میں اس گھر میں بہت خوش ہوں۔",
}
"""A sentence in each of several languages, in small letters."""


def made_replies(item: Any, generator: np.random.Generator, num: int) -> Iterator[str]:
    """Replies made of pieces that follow or break the instructions of an item, each perturbed at random."""
    arguments = [value for _, given in item.facts["instructions"] for value in given.values()]
    texts = [text for value in arguments for text in (value if isinstance(value, list) else [value])]
    named = [text for text in texts if isinstance(text, str)]
    by_language = any(name.startswith(("language", "change_case:english")) for name, _ in item.facts["instructions"])
    pieces = [
        *SENTENCES, *named, *named, *named, "* one\n* two\n- three", "**bold** and *italic*", "***", "\n\n", "******",
        "<<A title>>", "[name] [place]", "P.S. More.", "P.P.S. And more.", '{"a": 1}', "My answer is yes.",
        "Section 1\nSECTION 2\nPARAGRAPH 3",
        "\n", "Day 1 is long.", "x, y, z",
    ]  # fmt: skip
    for _ in range(num):
        if by_language and generator.random() < 0.7:
            wanted = next((text for text in named if text in TEXTS), "en")
            text = TEXTS[wanted if generator.random() < 0.6 else sorted(TEXTS)[generator.integers(len(TEXTS))]]
            yield text.upper() if generator.random() < 0.4 else text
            continue
        chosen = [pieces[i] for i in generator.integers(len(pieces), size=generator.integers(1, 24))]
        if generator.random() < 0.4:
            chosen = [*named, *chosen] if generator.random() < 0.5 else [*chosen, *named]
        text = (" ", "\n", "\n\n")[generator.integers(3)].join(chosen)
        changes = (str, str, str, str.lower, str.upper, lambda t: t.replace(",", ""), lambda t: f'"{t}"',
                   lambda t: f"```json\n{t}\n```", lambda t: t[: len(t) // 2], lambda t: f"Sure!\n{t}")  # fmt: skip
        yield changes[generator.integers(len(changes))](text)


def peer_checks(places: list[str]) -> tuple[Any, str]:
    """lm-eval's IFEval checks, and which model of sentences they use. Only its own files are imported."""
    sys.path[:0] = places
    import langdetect
    import nltk
    from nltk.tokenize.destructive import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    langdetect.DetectorFactory.seed = 0
    for name in ("lm_eval", "lm_eval.tasks"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(place, *name.split("."))) for place in places]
        sys.modules[name] = package
    download, nltk.download = nltk.download, lambda *_, **__: False
    from lm_eval.tasks.ifeval import instructions_util, utils

    nltk.download = download
    try:
        nltk.data.find("tokenizers/punkt_tab")
        return utils, "english"
    except LookupError:
        punkt, treebank = PunktSentenceTokenizer(), NLTKWordTokenizer()
        instructions_util._get_sentence_tokenizer = lambda: punkt
        nltk.word_tokenize = lambda text: [w for s in punkt.tokenize(text) for w in treebank.tokenize(s)]
        return utils, "untrained"


def ifeval(options: argparse.Namespace) -> dict[str, Any]:
    """Verdicts of each check on made replies and on those of a model, here and by lm-eval."""
    suite = load_suite("ifeval")
    items = load_items(suite, options.data).items
    with gzip.open(Path(options.data, suite.files[0]), "rt", encoding="utf-8") as lines:
        rows = {str(row["key"]): row for row in map(json.loads, lines)}
    utils, punkt = peer_checks(options.peer)
    replies = {item.id: list(made_replies(item, np.random.default_rng(int(item.id)), 4)) for item in items}
    num_made = sum(map(len, replies.values()))
    for line in options.replies.read_text(encoding="utf-8").splitlines() if options.replies else ():
        row = json.loads(line)
        replies[row["id"]] += row["replies"]
    counts: dict[str, dict[str, int]] = defaultdict(lambda: {"verdicts": 0, "followed": 0, "same": 0, "same_loose": 0})
    for item in items:
        row = rows[item.id]
        given = [{name: value for name, value in one.items() if value is not None} for one in row["kwargs"]]
        asked = utils.InputExample(row["key"], row["instruction_id_list"], row["prompt"], given)
        for reply in replies[item.id]:
            strict = utils.test_instruction_following_strict(asked, reply).follow_instruction_list
            loose = utils.test_instruction_following_loose(asked, reply).follow_instruction_list
            ours = followed(item, reply)
            ours_loose = [any(one) for one in zip(*(followed(item, text) for text in loosened(reply)), strict=True)]
            for name, a, b, c, d in zip(row["instruction_id_list"], strict, ours, loose, ours_loose, strict=True):
                found = counts[name]
                found["verdicts"] += 1
                found["followed"] += a
                found["same"] += a == b
                found["same_loose"] += c == d
                if a != b and options.verbose:
                    print(name, "theirs", a, "ours", b, repr(reply[:300]), file=sys.stderr)
    num_real = sum(map(len, replies.values())) - num_made
    return {
        "punkt": punkt,
        "rows": len(items),
        "made_replies": num_made,
        "model_replies": num_real,
        "checks": dict(sorted(counts.items())),
    }


def ifeval_table(found: dict[str, Any]) -> str:
    """Checks on which not all verdicts are the same, and the sum of the others."""
    lines = ["| check | verdicts | followed | same, strict | same, loose |", "|---|---|---|---|---|"]
    checks = found["checks"].items()
    same = [row for _, row in checks if row["same"] == row["same_loose"] == row["verdicts"]]
    others = [(name, row) for name, row in checks if row not in same]
    total = {key: sum(row[key] for row in same) for key in ("verdicts", "followed", "same", "same_loose")}
    for name, row in [(f"{len(same)} checks", total), *others]:
        lines.append(f"| {name} | {row['verdicts']} | {row['followed']} | {row['same']} | {row['same_loose']} |")
    return "\n".join(lines)


# ---- refusals beside people -----------------------------------------------------------------------------------------


def refusals(options: argparse.Namespace) -> dict[str, Any]:
    """Agreement of the rules with the human labels of XSTest's completions, on the half of the prompts that the rules
    were written from, and on the other."""
    parts: dict[str, list[tuple[int, int, str]]] = {"seen": [], "held out": []}
    for model in ("mistralguard", "mistralinstruct"):
        place = Path(options.data, "xstest", f"xstest_v2_completions_{model}.jsonl.gz")
        with gzip.open(place, "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                odd = int(hashlib.sha256(row["prompt"].encode()).hexdigest(), 16) % 2
                classes = LABELS[row["final_label"]], CLASSES.index(refusal_class(row["completion"]))
                parts["held out" if odd else "seen"].append((*classes, row["prompt"]))
    found = {}
    for name, rows in parts.items():
        people, rules = (np.array([row[i] for row in rows]) for i in (0, 1))
        groups = [row[2] for row in rows]
        binary = cohen_kappa((people > 0).astype(np.int64), (rules > 0).astype(np.int64), 2, groups=groups).interval
        three = cohen_kappa(people, rules, 3, groups=groups).interval
        found[name] = {
            "replies": len(rows),
            "refused": int((people > 0).sum()),
            "called_refused": int((rules > 0).sum()),
            "both": int(((rules > 0) & (people > 0)).sum()),
            "kappa": [round(x, 3) for x in (binary.value, binary.low, binary.high)],
            "kappa_three": [round(x, 3) for x in (three.value, three.low, three.high)],
        }
    return found


def refusals_table(found: dict[str, Any]) -> str:
    """Kappas with their intervals."""
    lines = [
        "| prompts | replies | refused, say people | say the rules | both | kappa | kappa of three classes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        kappas = " | ".join("{:.2f} [{:.2f}, {:.2f}]".format(*row[key]) for key in ("kappa", "kappa_three"))
        lines.append(
            f"| {name} | {row['replies']} | {row['refused']} | {row['called_refused']} | {row['both']} | {kappas} |"
        )
    return "\n".join(lines)


# ---- identical models -----------------------------------------------------------------------------------------------


def coverage(_options: argparse.Namespace) -> dict[str, Any]:
    """How often the interval of a paired difference holds 0 for two equally good models, also if it takes all items for
    independent, and how often a model that is worse by exactly the margin passes. Two items are a cluster."""
    generator = np.random.default_rng(0)
    found = {}
    for num in (60, 400):
        for discordant in (0.05, 0.3):
            held = held_alone = passed = 0
            clusters, alone = [str(i // 2) for i in range(num)], [str(i) for i in range(num)]
            for _ in range(1000):
                gaps = correlated_gaps(generator, num, discordant, 0.0)
                interval, independent = (PairedGap.of(gaps, names).interval() for names in (clusters, alone))
                held += interval.low <= 0 <= interval.high
                held_alone += independent.low <= 0 <= independent.high
                worse = PairedGap.of(correlated_gaps(generator, num, discordant, -0.03), clusters)
                passed += worse.p_above(-0.03) < 0.025
            counts = {"held": held, "held_as_independent": held_alone, "passed": passed, "of": 1000}
            found[f"{num} items, {discordant:.0%} differ"] = counts
    return found


def correlated_gaps(generator: np.random.Generator, num: int, discordant: float, mean: float) -> np.ndarray:
    """Differences of right and wrong answers, of which the second of a cluster is the first's in 4 of 5 cases."""
    shares = [(discordant - mean) / 2, 1 - discordant, (discordant + mean) / 2]
    gaps = np.repeat(generator.choice([-1.0, 0.0, 1.0], size=num // 2, p=shares), 2)
    own = generator.choice([-1.0, 0.0, 1.0], size=num // 2, p=shares)
    gaps[1::2] = np.where(generator.random(num // 2) < 0.8, gaps[1::2], own)
    return gaps


def coverage_table(found: dict[str, Any]) -> str:
    """Counts of simulations."""
    lines = [
        "| | 95% intervals that hold 0 | the same without clusters | passes of a model worse by the margin |",
        "|---|---|---|---|",
    ]
    for name, row in found.items():
        cells = (f"{row[key]} of {row['of']}" for key in ("held", "held_as_independent", "passed"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- a real model ---------------------------------------------------------------------------------------------------


def real(options: argparse.Namespace) -> dict[str, Any]:
    """Every suite on a few items, for a model and its baseline, with the capability tax over all suites."""
    from trimtab.evals.suites.results import verdicts_of
    from trimtab.stages.suites import run_suite

    suites, results = {}, []
    for name, limit in REAL.items():
        begin = time.monotonic()
        how: dict[str, Any] = {"data": options.data, "limit": limit, "max_new_tokens": MAX_NEW_TOKENS.get(name)}
        result = run_suite(name, str(options.model), options.baseline and str(options.baseline), **how)
        known = {metric.name for metric in load_suite(name).metrics}
        suites[name] = {
            "items": result["num_items"],
            "of": result["num_available"],
            "seconds": round(time.monotonic() - begin),
            "truncated_fraction": result["truncated_fraction"],
            "metrics": [row for row in result["metrics"] if row["name"] in known],
        }
        if options.baseline and result["metrics"][0]["better"] != "neither":
            results.append(result)
        print(name, suites[name]["seconds"], file=sys.stderr)
    machine = environment()
    return {
        "machine": {key: machine[key] for key in ("cpu", "num_cpus", "threads", "torch", "transformers")},
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "suites": suites,
        "tax": [
            {"suite": one.suite, "metric": one.metric, "verdict": one.text}
            | {"difference": [one.difference.value, one.difference.low, one.difference.high, one.difference.count]}
            for one in verdicts_of(results, margin=0.03)
        ]
        if results
        else [],
    }


def real_table(found: dict[str, Any]) -> str:
    """The figures of each suite."""
    lines = [
        "| suite | items | figure | model | baseline | difference | null models | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, suite in found["suites"].items():
        for row in suite["metrics"]:
            nulls = ", ".join(f"{who} {_short(value)}" for who, value in row["null"].items())
            cells = (
                [_cell(row[key]) for key in ("model", "baseline", "difference")]
                if "baseline" in row
                else [_cell(row["model"]), "", ""]
            )
            first = row is suite["metrics"][0]
            of = f"{suite['items']} of {suite['of']}" if first else ""
            seconds = suite["seconds"] if first else ""
            head = f"| {name if first else ''} | {of} | {row['about']}"
            lines.append(f"{head} | {' | '.join(cells)} | {nulls} | {seconds} |")
    return "\n".join(lines)


def tax_table(found: dict[str, Any]) -> str:
    """The capability tax of each suite."""
    lines = ["| suite | difference in points, up is better | at a margin of 3 points |", "|---|---|---|"]
    for row in found["tax"]:
        value, low, high, count = row["difference"]
        gap = f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] (n={count})"
        lines.append(f"| {row['suite']} | {gap} | {row['verdict']} |")
    return "\n".join(lines)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    bounds = "" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]"
    return f"{row['value']:.2f}{bounds}"


# ---- TruthfulQA beside lm-eval --------------------------------------------------------------------------------------

NUM_QUESTIONS = 60
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {rows}}}}}
validation_split: validation
output_type: multiple_choice
num_fewshot: 0
doc_to_text: question
doc_to_target: 0
doc_to_choice: "{{{{{name}_targets.choices}}}}"
target_delimiter: ""
{scored}metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
SCORED = "process_results: !function scoring.process_results_mc2\n"


def truthful_qa(options: argparse.Namespace) -> dict[str, Any]:
    """MC1 and MC2 of a model by the suite and by lm-eval, which asks the same questions with the same options under the
    same template, with its own products, tokens and scoring (its function of MC2)."""
    from trimtab.stages.lm_eval import run_lm_eval
    from trimtab.stages.suites import run_suite

    ours = run_suite("truthful_qa", str(options.model), data=options.data, limit=NUM_QUESTIONS)
    items = load_items(load_suite("truthful_qa"), options.data, limit=NUM_QUESTIONS).items
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = []
        for item in items:
            (question,), right = item.questions, item.facts["num_right"]
            single = [question.options[0], *question.options[right:]]
            labels = [int(number < right) for number in range(len(question.options))]
            rows.append({"question": item.id, "mc1_targets": {"choices": single},
                         "mc2_targets": {"choices": list(question.options), "labels": labels}})  # fmt: skip
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / "scoring.py").write_text("from lm_eval.tasks.truthfulqa.utils import process_results_mc2\n")
        for name, scored in (("mc1", ""), ("mc2", SCORED)):
            (folder / f"{name}.yaml").write_text(TASK.format(name=name, rows=file, scored=scored), encoding="utf-8")
        theirs = run_lm_eval(
            str(options.model), tasks=("mc1", "mc2"), include_path=scratch, python=options.python, out=folder / "out"
        )
    scores = {item["id"]: item["scores"] for item in ours["items"]}
    found: dict[str, Any] = {"questions": len(items), "options": sum(len(i.questions[0].options) for i in items)}
    for name in ("mc1", "mc2"):
        pairs = [(scores[items[int(row["id"])].id][name][0], row["scores"]["acc"][0]) for row in theirs[name]["items"]]
        gaps = [abs(a - b) for a, b in pairs]
        found[name] = {
            "ours": float(np.mean([a for a, _ in pairs])),
            "theirs": float(np.mean([b for _, b in pairs])),
            "equal": sum(gap < 1e-3 for gap in gaps),
            "largest_difference": max(gaps),
        }
    machine = environment()
    return found | {
        "lm_eval": theirs["mc1"]["engine"]["lm_eval"],
        "machine": {key: machine[key] for key in ("cpu", "num_cpus", "threads", "torch", "commit")},
    }


def truthful_qa_table(found: dict[str, Any]) -> str:
    """The figures of both programs."""
    lines = ["| | questions | the suite | lm-eval | within 0.001 | largest difference |", "|---|---|---|---|---|---|"]
    for name in ("mc1", "mc2"):
        row = found[name]
        lines.append(
            f"| {name.upper()} | {found['questions']} | {row['ours']:.4f} | {row['theirs']:.4f} | "
            f"{row['equal']} of {found['questions']} | {row['largest_difference']:.1e} |"
        )
    return "\n".join(lines)


PARTS = {"ifeval": ifeval, "refusals": refusals, "coverage": coverage, "real": real, "truthful_qa": truthful_qa}
TABLES = {
    "ifeval": (ifeval_table,),
    "refusals": (refusals_table,),
    "coverage": (coverage_table,),
    "real": (real_table, tax_table),
    "truthful_qa": (truthful_qa_table,),
}


def main() -> None:
    """Computes and writes one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--data", help="folder of the suites' data")
    parser.add_argument("--peer", action="append", default=[], help="where lm-eval and what it needs are")
    parser.add_argument("--replies", type=Path, help="replies of a model to IFEval's prompts")
    parser.add_argument("--model", type=Path, help="the model that is asked")
    parser.add_argument("--baseline", type=Path, help="the model that it is compared with")
    parser.add_argument("--python", help="the interpreter of an environment with lm-eval")
    parser.add_argument("--verbose", action="store_true", help="print verdicts that differ")
    options = parser.parse_args()
    result = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {}
    result[options.part] = PARTS[options.part](options)
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for table in TABLES[options.part]:
        print(table(result[options.part]), end="\n\n")


if __name__ == "__main__":
    main()
