"""Products of few rows: compiled, by oneDNN with reordered weights, and as torch has them, in turns.

    python benchmarks/kernel_rates.py

The weights of each shape are so many that they come from memory, as in a decoding step. Prints 10⁹ operations a second.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch

from trimtab.core.compiled import SWITCH
from trimtab.engines.local.kernels import Kernels, find

SHAPES = [(512, 1024), (512, 3072), (1536, 512), (512, 8192)]
"""Ins and outs of a model of 30 million weights: queries, keys and values; gate and up; down; the head."""
BYTES = 120_000_000
TURNS = 7


def rate(multiply: Callable[[], object], operations: float) -> float:
    """10⁹ operations a second of one call."""
    began = time.perf_counter()
    multiply()
    return operations / (time.perf_counter() - began) / 1e9


def main() -> None:
    """Measures every shape at several numbers of rows."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not find(torch.zeros(1)).compiled:
        raise SystemExit(f"no compiled kernels: this needs a C compiler with OpenMP, and {SWITCH} not to be 'torch'")
    x = torch.randn(2048, 2048)
    whole = statistics.median(rate(lambda: x @ x, 2 * 2048**3) for _ in range(TURNS))
    print(f"{os.cpu_count()} cores, a 2048 x 2048 product: {whole:.0f}")
    print(f"{'ins x outs':>12} {'rows':>5} {'compiled':>9} {'oneDNN':>7} {'torch':>6}")
    for ins, outs in SHAPES:
        weights = [torch.randn(outs, ins) for _ in range(BYTES // (4 * ins * outs))]
        for num_rows in (1, 8, 16, 24, 32, 128):
            rows = torch.randn(num_rows, ins)
            ways = {
                "compiled": [find(w).matrices([w], [None], num_rows) for w in weights],
                "oneDNN": [Kernels().matrices([w], [None], num_rows) for w in weights],
            }
            calls: dict[str, Callable[[], object]] = {
                "compiled": lambda ways=ways, rows=rows: [m(rows) for m in ways["compiled"]],
                "oneDNN": lambda ways=ways, rows=rows: [m(rows) for m in ways["oneDNN"]],
                "torch": lambda weights=weights, rows=rows: [rows @ w.T for w in weights],
            }
            operations = 2.0 * num_rows * ins * outs * len(weights)
            rates: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(TURNS):
                for name, call in calls.items():
                    rates[name].append(rate(call, operations))
            ours, onednn, torchs = (statistics.median(rates[name]) for name in calls)
            print(f"{f'{ins} x {outs}':>12} {num_rows:>5} {ours:>9.0f} {onednn:>7.0f} {torchs:>6.0f}", flush=True)


if __name__ == "__main__":
    main()
