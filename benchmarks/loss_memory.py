"""Peak memory of a loss and its gradient against the number of trained tokens, at the vocabulary of Qwen2.5.

    pip install matplotlib  # for the plot
    python benchmarks/loss_memory.py --plot loss_memory.png

What is measured is what head_chunks.py measures, in chunks as in the scripts and with the logits of all tokens at once.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import head_chunks
import tyro


@dataclass
class Args:
    tokens: tuple[int, ...] = (1024, 2048, 4096, 8192)
    """trained tokens; 8192: 8 sequences of 1,024"""
    vocabulary: int = 151_936
    hidden: int = 896
    output: str | None = None
    """a file for the raw numbers, JSON"""
    plot: str | None = None
    """a file for the picture"""


def main(args: Args) -> None:
    rows = []
    for tokens in args.tokens:
        for kind in ("chunked", "full"):
            flags = ["--one", kind, "--tokens", tokens, "--shapes", args.vocabulary, args.hidden, "--exponents", 25]
            r = head_chunks.in_a_process(head_chunks.__file__, *flags)
            rows.append({"tokens": tokens, "kind": kind, **r})
            words = f"{r['peak_gb']:6.2f} GB {r['seconds']:6.1f} s  loss {r['loss']:.4f}"
            print(f"{tokens:6} tokens, {kind:8} {words}", flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps({"args": vars(args), "rows": rows}, indent=2) + "\n")
    if args.plot:
        import matplotlib.pyplot as plt

        _, axes = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
        for axis, key, label in zip(axes, ("peak_gb", "seconds"), ("peak memory, GB", "seconds"), strict=True):
            for kind in ("full", "chunked"):
                chosen = [r for r in rows if r["kind"] == kind]
                axis.plot([r["tokens"] for r in chosen], [r[key] for r in chosen], "o-", label=kind)
            axis.set(xlabel="trained tokens", ylabel=label, xlim=0, ylim=0)
        axes[0].legend()
        plt.savefig(args.plot, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Args))
