"""How long the first step of `sft.py` waits for a million conversations, and what memory they take.

    python benchmarks/million_rows.py --model SmolLM2-135M-Instruct --output rows

Writes .jsonl files of a thousand and of --rows conversations of about 300 tokens, and trains two steps on each, in a
process of its own. The files are converted to Arrow once before, which is timed apart.
"""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

import chat
import envs
import sft

WORDS = [
    "the",
    "a",
    "of",
    "to",
    "and",
    "in",
    "is",
    "it",
    "you",
    "that",
    "he",
    "was",
    "for",
    "on",
    "are",
    "with",
    "as",
    "his",
]


@dataclass
class Args:
    model: str = "tiny"
    """whose tokenizer and template the conversations go through, and which trains"""
    output: str = "million-rows"
    """a folder for the file and the runs"""
    rows: int = 1_000_000
    """conversations"""
    batch_size: int = 8
    """of the steps"""


def write_rows(path: Path, count: int) -> None:
    """Two questions and answers each, of 55 to 80 words."""
    rng = random.Random(0)
    with open(path, "w") as file:
        for _ in range(count):
            texts = [" ".join(rng.choices(WORDS, k=rng.randint(55, 80))) for _ in range(4)]
            messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
            file.write(json.dumps({"messages": messages}) + "\n")


def train(args: Args, path: Path, rows: int) -> dict[str, float]:
    """Seconds from the start of the process to the end of the first step, of that step, and the peak of memory."""
    folder = Path(args.output) / f"run-{rows}"
    flags = ["--model", args.model, "--dataset", str(path), "--output-dir", str(folder)]
    flags += ["--batch-size", str(args.batch_size), "--num-steps", "2", "--eval-steps", "0", "--logging-steps", "1"]
    script = Path(__file__).resolve().parent.parent / "sft.py"
    started = time.time()
    subprocess.run([sys.executable, str(script), *flags], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = (folder / "args.json").stat().st_mtime - started  # written when all is ready
    steps = [line["time/step"] for line in lines]
    return {"until the first step, s": first, "first step, s": steps[0], "second step, s": steps[1]} | {
        "peak memory, GB": lines[-1]["perf/peak_memory_gb"]
    }


def main(args: Args) -> None:
    for rows in (1000, args.rows):
        path = Path(args.output) / f"{rows}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_rows(path, rows)
        started = time.perf_counter()
        dataset = envs.load_dataset(str(path))
        numbers = {"size, GB": path.stat().st_size / 1e9, "to Arrow, s": time.perf_counter() - started}
        tokenizer, started = chat.load_tokenizer(args.model), time.perf_counter()
        for row in range(500):
            sft.encode(dataset[row], tokenizer, 10**9)
        seconds = (time.perf_counter() - started) / 500 * args.batch_size
        numbers |= {"encoding of a step's conversations, s": seconds} | train(args, path, rows)
        for name, value in numbers.items():
            print(f"{rows:,} rows: {name}: {value:.3f}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
