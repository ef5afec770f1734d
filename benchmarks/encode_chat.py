"""How fast conversations are encoded with their masks, against the plain chat template with tokenization.

    python benchmarks/encode_chat.py --model HuggingFaceTB/SmolLM2-135M-Instruct

10,000 conversations of three user and three assistant turns, 10 to 60 words each. Rounds alternate; what is printed is
the speed of `common.encode_chat`, which also proves the mask, as a share of `apply_chat_template(tokenize=True)`.
"""

import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

import chat
import common

WORDS = "the a of model answer to train why is this that number when we add two and three it because so not yes"


@dataclass
class Args:
    model: str = "tiny"
    conversations: int = 10_000
    rounds: int = 3


def main(args: Args) -> None:
    rng = random.Random(0)
    conversations = [
        [
            {
                "role": ("user", "assistant")[i % 2],
                "content": " ".join(rng.choices(WORDS.split(), k=rng.randint(10, 60))),
            }
            for i in range(6)
        ]
        for _ in range(args.conversations)
    ]
    tokenizer, shares = chat.load_tokenizer(args.model), []
    for number in range(args.rounds):
        started = time.perf_counter()
        plain = [tokenizer.apply_chat_template(c, tokenize=True, return_dict=False) for c in conversations]
        between = time.perf_counter()
        masked = [common.encode_chat(tokenizer, c) for c in conversations]
        ended = time.perf_counter()
        assert plain == [ids for ids, _ in masked]
        shares.append((between - started) / (ended - between))
        rates = [args.conversations / seconds for seconds in (between - started, ended - between)]
        print(
            f"round {number + 1}: {rates[0]:,.0f} plain, {rates[1]:,.0f} masked conversations/s, share {shares[-1]:.2f}"
        )
    tokens = sum(len(ids) for ids in plain) / len(plain)
    print(f"{args.model}, {tokens:.0f} tokens each: median share {statistics.median(shares):.2f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
