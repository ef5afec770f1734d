"""`OMP_NUM_THREADS=1 python benchmarks/grading.py`: gradings of answers in LaTeX in a minute, and how many are right.
The table is the tests'; the start of the worker is not timed. By default Math-Verify has a timeout of 5 seconds."""

import json
import os
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from math_verify import parse, verify

import grading

TABLE = Path(grading.__file__).parent / "tests" / "grading.jsonl"
CASES = [tuple(json.loads(line).values()) for line in TABLE.read_text().splitlines()]  # kind, reference, answer, right


def in_a_thread(timeout: int | None) -> list[bool | str]:
    verdicts: list[bool | str] = []

    def ask() -> None:
        for _, *texts, _ in CASES:
            try:
                sides = [parse(f"${text}$", parsing_timeout=timeout) for text in texts]
                verdicts.append(verify(*sides, timeout_seconds=timeout))
            except Exception as error:
                verdicts.append(type(error).__name__)

    (thread := threading.Thread(target=ask)).start()
    thread.join()
    return verdicts


def main() -> None:
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?: ?")
    versions = [f"{n} {version(n)}" for n in ("math-verify", "sympy", "antlr4-python3-runtime")]
    print(f"python benchmarks/grading.py on {os.cpu_count()} cores,{cpu.split(':')[1]}; {', '.join(versions)}\n")
    columns: dict[str, list] = {}
    grading.MATH_WORKER.ask("x", "x")
    for name, space in (("first pass", ""), ("known references, new answers", " "), ("all seen before", "")):
        started = time.perf_counter()
        columns["ours"] = [grading.same_answer(answer + space, reference) for _, reference, answer, _ in CASES]
        print(f"{name}: {60 * len(CASES) / (time.perf_counter() - started):,.0f} gradings a minute")
    grading.MATH_WORKER.works = False
    columns["as text"] = [grading.same_answer(case[2], case[1]) for case in CASES]
    columns |= {"thread": in_a_thread(5), "thread, no timeout": in_a_thread(None)}
    for name, given in columns.items():
        wrong = [verdict for verdict, case in zip(given, CASES, strict=True) if verdict != case[3]]
        print(f"{name}: {len(CASES) - len(wrong)} of {len(CASES)} right, {wrong.count(True)} wrong answers accepted")
    print(f"\n| kind | reference | answer | right | {' | '.join(columns)} |\n|{'---|' * (4 + len(columns))}")
    for case, *row in zip(CASES, *columns.values(), strict=True):
        print(f"| {' | '.join(map(str, (*case, *row)))} |")


if __name__ == "__main__":
    main()
