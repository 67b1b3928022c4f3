"""Attention over token trees and what lies between products, compiled and as torch has them, in turns.

    python benchmarks/tree_attention.py

Prints milliseconds of a forward and a backward pass of one layer, medians over turns, and how many times faster the
compiled ones are.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

from trimtab.batches.trees import TokenTrees, Tree, response_tree, sequence_tree
from trimtab.core.compiled import SWITCH
from trimtab.models import compiled_layers
from trimtab.models.compiled_attention import takes_compiled
from trimtab.models.tree_attention import tree_attention

TURNS = 15
HEADS, SIZE, WIDTH, INNER = 6, 64, 384, 1024
"""Those of a model of 30 million weights."""


def groups(num: int, prompt: int, replies: int, low: int, high: int) -> list[Tree]:
    """Trees of a prompt with replies of `low` to `high` tokens."""
    draw = random.Random(0)
    return [response_tree(range(prompt), [range(draw.randint(low, high)) for _ in range(replies)]) for _ in range(num)]


SHAPES = {
    "8 rankings: 55 tokens, 4 replies of 15 to 60": groups(8, 55, 4, 15, 60),
    "4 pairs: 200 tokens, 2 replies of 60 to 250": groups(4, 200, 2, 60, 250),
    "2 groups: 128 tokens, 8 replies of 60 to 128": groups(2, 128, 8, 60, 128),
    "16 documents of 30 to 110": groups(16, 0, 1, 30, 110),
    "2 rows of 1,024": [sequence_tree(range(1024))] * 2,
    "1 row of 4,096": [sequence_tree(range(4096))],
}


def passes(run: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[float, float]:
    """Milliseconds of a forward and of a backward pass."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    began = time.perf_counter()
    output = run(*inputs)
    between = time.perf_counter()
    torch.autograd.grad(output, inputs, torch.ones_like(output))
    return 1e3 * (between - began), 1e3 * (time.perf_counter() - between)


def compare(name: str, ways: dict[str, Callable[..., Tensor]], inputs: Sequence[Tensor]) -> None:
    """Times the ways `torch` and `compiled` in turns and prints a row."""
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(TURNS):
        for way, run in ways.items():
            os.environ[SWITCH] = way
            found[way].append(passes(run, inputs))
    medians = {way: [statistics.median(column) for column in zip(*times, strict=True)] for way, times in found.items()}
    ratios = [sum(a) / sum(b) for a, b in zip(found["torch"], found["compiled"], strict=True)]
    cells = [f"{forward:.2f} + {backward:.2f}" for forward, backward in medians.values()]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"| {name} | {' | '.join(cells)} | **{statistics.median(ratios):.2f}** ({spread}) |")


def normed(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers writes it."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers writes it, for x [1, N, H, D]."""
    first, second = x[..., : SIZE // 2], x[..., SIZE // 2 :]
    return x * cos[:, :, None] + torch.cat((-second, first), -1) * sin[:, :, None]


def main() -> None:
    """Measures every shape."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not takes_compiled(torch.zeros(1)):
        raise SystemExit(f"no compiled kernels: this needs a C compiler with OpenMP, and {SWITCH} not to be 'torch'")
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, {HEADS} heads of {SIZE}\n")
    print("| | torch, ms | compiled, ms | times faster |\n|---|---|---|---|")
    for name, trees in SHAPES.items():
        row = TokenTrees.build(trees)
        states = [torch.randn(row.num_tokens, HEADS, SIZE) for _ in range(3)]
        attend = tree_attention(row)

        def run(*states: Tensor, attend: Callable[..., Tensor] = attend) -> Tensor:
            return attend(0, *states, SIZE**-0.5, None)

        compare(name, {"torch": run, "compiled": run}, states)
    n = 1400
    angles = 6 * torch.rand(1, n, SIZE)
    turn = (angles.cos(), angles.sin())
    x, heads, halves = torch.randn(1, n, WIDTH), torch.randn(1, n, HEADS, SIZE), torch.randn(2, 1, n, INNER)
    compare(
        f"a norm of {n} x {WIDTH}",
        {"torch": normed, "compiled": lambda x, w: compiled_layers.normed(x, w, 1e-6)},
        [x, torch.ones(WIDTH)],
    )
    compare(
        f"a rotation of {n} x {HEADS} x {SIZE}",
        {"torch": lambda x: rotated(x, *turn), "compiled": lambda x: compiled_layers.rotated(x, *turn)},
        [heads],
    )
    compare(
        f"a gate of {n} x {INNER}",
        {"torch": lambda gate, up: silu(gate) * up, "compiled": compiled_layers.gated},
        list(halves),
    )


if __name__ == "__main__":
    main()
