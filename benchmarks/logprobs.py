"""Log-probabilities of a large vocabulary: tiles beside rows of all entries, in turns, and both beside float64.

python benchmarks/logprobs.py [--rows 1024] [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from trimtab.math.logprobs import TILE, token_logprobs

SHAPES = {"vocabulary of 151,936, width 256": (151_936, 256), "vocabulary of 8,192, width 512": (8_192, 512)}


def main() -> None:
    """Prints seconds of a forward and backward pass, their ratio and the largest error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    o = parser.parse_args()
    for name, (vocabulary, width) in SHAPES.items():
        torch.manual_seed(0)
        hidden, weight = torch.randn(o.rows, width), torch.randn(vocabulary, width) * 0.05
        targets = torch.randint(0, vocabulary, (o.rows,))
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        tiles = {"tiles": TILE, "256 rows of all entries": (256, vocabulary)}
        seconds: dict[str, list[float]] = {kind: [] for kind in tiles}
        for _ in range(o.repeats + 1):
            for kind, tile in tiles.items():
                began = time.perf_counter()
                torch.autograd.grad(token_logprobs(hidden, weight, targets, tile=tile)[0].sum(), leaves)
                seconds[kind].append(time.perf_counter() - began)
        ratios = [b / a for a, b in zip(*(s[1:] for s in seconds.values()), strict=True)]
        with torch.no_grad():
            exact = token_logprobs(hidden.double(), weight.double(), targets)[0]
            ours = token_logprobs(hidden, weight, targets)[0]
            plain = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        errors = [float((x - exact).abs().max()) for x in (ours, plain)]
        medians = ", ".join(f"{kind} {statistics.median(s[1:]):.2f} s" for kind, s in seconds.items())
        print(
            f"{name}: {medians}; {statistics.median(ratios):.2f} times faster ({min(ratios):.2f} to {max(ratios):.2f})"
        )
        print(f"  largest error {errors[0]:.1e} nats, of torch's log_softmax {errors[1]:.1e}", flush=True)


if __name__ == "__main__":
    main()
