"""Compares answers in LaTeX as mathematics, with Math-Verify: the process that `grading` starts, and may kill.

It reads lines of JSON, [reference, answer], and writes true or false for each, after one of "ready". Ctrl-C spares it.
"""

import contextlib
import functools
import json
import re
import resource
import signal
import sys

import sympy.parsing.sympy_parser
from math_verify import LatexExtractionConfig, parse, verify

LATEX = [LatexExtractionConfig(boxed_match_priority=0)]  # alone: by default Math-Verify evaluates Python as well
WORDS = re.compile(r"[^\d\\^=<>+*/|]*[^\W\d_]{3}[^\d\\^=<>+*/|]*")  # to Math-Verify a product of letters, in any order
LITERAL = re.compile(r"(Integer|Float|Symbol) \('?[\w.]+'? \)|E ")
strings, evaluate = sympy.parsing.sympy_parser, sympy.parsing.sympy_parser.eval_expr  # digits are read by Python's eval
strings.eval_expr = lambda code, *rest: evaluate(LITERAL.fullmatch(code)[0], *rest)  # ty: ignore # and nothing else is


@functools.lru_cache(maxsize=4096)  # references come again with every completion
def read(text: str) -> list:
    found = parse(f"\\boxed{{{text}}}", LATEX, fallback_mode="no_fallback", parsing_timeout=0)
    return [each.xreplace({s: sympy.I for s in each.free_symbols if s.name == "i"}) for each in found]


@functools.lru_cache(maxsize=4096)  # and answers often
def same(reference: str, answer: str) -> bool:
    words = WORDS.fullmatch(reference.replace(r"\text", ""))
    return not words and bool(verify(read(reference), read(answer), float_rounding=10, timeout_seconds=0))


with contextlib.suppress(ValueError, OSError):  # of a system without such a limit
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
verdicts, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no verdict
print("ready", file=verdicts, flush=True)
for line in sys.stdin:
    signal.setitimer(signal.ITIMER_VIRTUAL, 5)  # of computing: the end, where no parent is left that would kill it
    verdict = False
    with contextlib.suppress(Exception):  # what it can't read is wrong
        verdict = same(*json.loads(line))
    print(json.dumps(verdict), file=verdicts, flush=True)
