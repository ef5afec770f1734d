"""Time and memory of the chunked head alone, forward and backward, against the logits of a chunk (`HEAD_LOGITS`).

    python benchmarks/head_chunks.py
    python benchmarks/head_chunks.py --old ../old  # a checkout of another revision as well

What is measured: the head, the log-probs of the targets, and their gradients with regard to the hidden states and the
head's weight, added to gradients that are there already; in float32 on a CPU, under bf16 autocast on a GPU. The peak is
a process's, less what it held before; each line is a process of its own.
"""

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, os.environ.get("BENCH_ROOT") or str(Path(__file__).resolve().parent.parent))

import torch
import tyro
from torch import nn

import common


@dataclass
class Args:
    shapes: tuple[tuple[int, int], ...] = ((49_152, 576), (151_936, 896))
    """vocabulary and hidden size of each head: SmolLM2-135M's and Qwen2.5-0.5B's"""
    tokens: tuple[int, ...] = (512, 4096)
    """trained tokens of a pass"""
    exponents: tuple[int, ...] = (23, 24, 25, 26, 27)
    """of 2: the sizes of a chunk"""
    old: str | None = None
    """a checkout of another revision, measured in turn"""
    output: str | None = None
    """a file for the raw numbers, JSON"""
    one: str | None = None
    """used by the benchmark itself: measure `chunked` or `full` for the first of --shapes, --tokens and --exponents"""


class HeadOnly(nn.Module):
    """A model whose trunk gives the hidden states that it was given. Gradients of its parameters are there, all 0."""

    def __init__(self, tokens: int, vocabulary: int, hidden: int):
        super().__init__()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.states = nn.Parameter(torch.randn(1, tokens + 1, hidden, device=self.device))
        self.head = nn.Linear(hidden, vocabulary, bias=False, device=self.device)
        self.config = SimpleNamespace(_attn_implementation="none")
        for parameter in self.parameters():
            parameter.grad = torch.full_like(parameter, 0.0)  # written: memory that is only reserved is not resident

    def base_model(self, **_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.states)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def peak_gb() -> float:
    """Most memory so far: allocated on the GPU, or resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def measure(kind: str, tokens: int, vocabulary: int, hidden: int, exponent: int) -> dict[str, float]:
    """One line, in this process. `chunked`: as the scripts compute it; `full`: the logits of all tokens at once."""
    common.HEAD_LOGITS = 2**exponent
    common.HEAD_ROWS = 2**exponent // 2048  # of version 0.1.0
    torch.manual_seed(0)
    model = HeadOnly(tokens, vocabulary, hidden)
    options = {"attn": "eager"} if hasattr(common, "pick_kernel") else {}  # nothing to pack
    dtype = torch.bfloat16 if model.device.type == "cuda" else torch.float32
    lm = common.ChunkedLM(model, dtype, vocabulary, **options)
    ids = torch.randint(vocabulary, (1, tokens + 1), device=model.device)

    def loss_of(count: int) -> Any:
        ones = torch.ones_like(ids)
        ones[:, count + 1 :] = 0
        if kind == "chunked":
            logprobs = common.token_logprobs(lm, ids, torch.ones_like(ids), ones, entropy=False)
            logprobs = logprobs[0] if isinstance(logprobs, tuple) else logprobs  # version 0.1.0
        else:
            with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
                logits = model.head(model.states[0, :count])
            logprobs = logits.float().log_softmax(-1).gather(-1, ids[0, 1 : count + 1, None])
        loss = -logprobs.sum() / count
        loss.backward()
        return loss.item()

    loss_of(8)  # the libraries' own buffers
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before, started = peak_gb(), time.perf_counter()
    loss = loss_of(tokens)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - started, "peak_gb": peak_gb() - before, "loss": loss}


def in_a_process(script: str, *flags: Any, root: str | None = None) -> dict[str, float]:
    """What `--one` of a script prints, with this checkout's `common` or that of `root`."""
    environment = os.environ | {"BENCH_ROOT": str(Path(root).resolve()) if root else ""}
    command = [sys.executable, script, *map(str, flags)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main(args: Args) -> None:
    if args.one:
        return print(json.dumps(measure(args.one, args.tokens[0], *args.shapes[0], args.exponents[0])))
    rows = []
    revisions = {"": None} | ({"old ": args.old} if args.old else {})
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| V, H | tokens | logits | rows |" + "".join(f" {name}seconds | {name}peak, GB |" for name in revisions))
    print("|---|---|---|---|" + "---|---|" * len(revisions))
    for (vocabulary, hidden), tokens in [(shape, n) for shape in args.shapes for n in args.tokens]:
        for exponent in args.exponents:
            flags = ["--one", "chunked", "--tokens", tokens, "--shapes", vocabulary, hidden, "--exponents", exponent]
            results = {name: in_a_process(__file__, *flags, root=root) for name, root in revisions.items()}
            numbers = "".join(f" {r['seconds']:.2f} | {r['peak_gb']:.2f} |" for r in results.values())
            size = f"2^{exponent} | {2**exponent // vocabulary}"
            print(f"| {vocabulary:,}, {hidden} | {tokens} | {size} |{numbers}", flush=True)
            where = {"vocabulary": vocabulary, "hidden": hidden, "tokens": tokens, "exponent": exponent}
            rows += [where | {"revision": name.strip() or "this"} | r for name, r in results.items()]
    if args.output:
        Path(args.output).write_text(json.dumps({"args": vars(args), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
