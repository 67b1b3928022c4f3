"""The plain way from a file to trees: every record read, rendered, tokenised and fitted alone.

What `prepare` and `pairs` give is compared with it.
"""

from __future__ import annotations

from trimtab.batches.pairs import Compared
from trimtab.batches.trees import response_tree, sequence_tree
from trimtab.core.types import Message
from trimtab.data.chat import fit
from trimtab.data.layouts import load
from trimtab.data.split import split_by_prompt


def split(kind, source, *, held_out, **options):
    """Training and held-out records, and the counts of what was read."""
    loaded = load(kind, source, **options)
    return (*split_by_prompt(loaded.records, held_out=held_out), dict(loaded.counts))


def fitted_tree(chat, prompt, responses, num_records, *, max_tokens, on_too_long, counts):
    encoded = [chat.encode_response(r) for r in responses]
    fitted = fit(
        chat.encode_prompt(prompt.messages),
        max(encoded, key=len),
        max_length=max_tokens,
        on_too_long=on_too_long,
        bos_id=chat.tokenizer.bos_token_id,
    )
    if fitted.outcome != "kept":
        name = f"{fitted.outcome}_too_long"
        counts[name] = counts.get(name, 0) + num_records
    return None if fitted.outcome == "dropped" else response_tree(fitted.prompt_ids, encoded)


def together(records):
    grouped = {}
    for record in records:
        grouped.setdefault(record.prompt.id, []).append(record)
    return grouped.values()


def pairs(records, chat, **options):
    """Trees, what is compared in each, and the pairs that fit."""
    trees, compared, kept = [], [], []
    for group in together(records):
        replies = {r: i for i, r in enumerate(dict.fromkeys(r for p in group for r in (p.chosen, p.rejected)))}
        tree = fitted_tree(chat, group[0].prompt, list(replies), len(group), **options)
        if tree is not None:
            trees.append(tree)
            kept.extend(group)
            found = (Compared(replies[p.chosen], replies[p.rejected], p.margin or 0.0, p.label) for p in group)
            compared.append(tuple(found))
    return trees, compared, kept


def judgements(records, chat, **options):
    """Trees, and of the replies of each how often they are called good and bad."""
    trees, good, bad = [], [], []
    for group in together(records):
        texts = list(dict.fromkeys(reply.response for reply in group))
        tree = fitted_tree(chat, group[0].prompt, texts, len(group), **options)
        if tree is not None:
            judged = [[r.label for r in group if r.response == text] for text in texts]
            trees.append(tree)
            good.append(tuple(float(sum(labels)) for labels in judged))
            bad.append(tuple(float(len(labels) - sum(labels)) for labels in judged))
    return trees, good, bad


def demonstrations(records, chat, *, train_on, max_tokens, on_too_long, counts):
    """A tree for each demonstration that fits."""
    options = {"max_tokens": max_tokens, "on_too_long": on_too_long, "counts": counts}
    trees = []
    for d in records:
        if train_on == "last":
            tree = fitted_tree(chat, d.prompt, [d.response], 1, **options)
        else:
            ids, mask = chat.encode_conversation((*d.prompt.messages, Message("assistant", d.response)))
            tree = sequence_tree(ids, mask) if len(ids) <= max_tokens else None
            if tree is None:
                counts["dropped_too_long"] = counts.get("dropped_too_long", 0) + 1
        if tree is not None:
            trees.append(tree)
    return trees
