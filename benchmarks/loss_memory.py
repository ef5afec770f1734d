"""Peak memory of a loss and its gradient against the number of trained tokens, at the vocabulary of Qwen2.5.

    pip install matplotlib  # for the plot
    python benchmarks/loss_memory.py --plot loss_memory.png

What is measured: the head, the log-probs and their gradient with regard to the hidden states and the head's weight, as
in `sft.py` and `grpo.py`, in chunks (`common.ChunkedLM`) and with the logits of all tokens at once, each in a process
of its own: its peak less what it held before.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro
from torch import nn

import common


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
    one: str | None = None
    """used by the benchmark itself: measure `chunked` or `full` for the first of --tokens"""


class HeadOnly(nn.Module):
    """A model whose trunk gives the hidden states that it was given."""

    def __init__(self, states: torch.Tensor, vocabulary: int):
        super().__init__()
        self.states = nn.Parameter(states)
        self.head = nn.Linear(states.shape[-1], vocabulary, bias=False, device=states.device)

    def base_model(self, **_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.states)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def measure(args: Args) -> dict[str, float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        common.tune_cpu()
    torch.manual_seed(0)
    count = args.tokens[0]
    model = HeadOnly(torch.randn(1, count + 1, args.hidden, device=device), args.vocabulary)
    ids = torch.randint(args.vocabulary, (1, count + 1), device=device)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = common.peak_memory_gb(device)
    started = time.perf_counter()
    if args.one == "chunked":
        ones = torch.ones_like(ids)
        logprobs, _ = common.token_logprobs(common.ChunkedLM(model), ids, ones, ones, entropy=False)
    else:
        logprobs = model.head(model.states[0, :-1]).log_softmax(-1).gather(-1, ids[0, 1:, None])
    (-logprobs.sum() / count).backward()
    seconds = time.perf_counter() - started
    return {
        "peak_gb": common.peak_memory_gb(device) - before,
        "seconds": seconds,
        "loss": -logprobs.sum().item() / count,
    }


def main(args: Args) -> None:
    if args.one:
        return print(json.dumps(measure(args)))
    rows = []
    for tokens in args.tokens:
        for kind in ("chunked", "full"):
            flags = ["--one", kind, "--tokens", tokens, "--vocabulary", args.vocabulary, "--hidden", args.hidden]
            done = subprocess.run(
                [sys.executable, __file__, *map(str, flags)], stdout=subprocess.PIPE, text=True, check=True
            )
            rows.append({"tokens": tokens, "kind": kind, **json.loads(done.stdout)})
            r = rows[-1]
            print(f"{tokens:6} tokens, {kind:8} {r['peak_gb']:6.2f} GB {r['seconds']:6.1f} s  loss {r['loss']:.4f}")
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
    common.run(main, tyro.cli(Args))
