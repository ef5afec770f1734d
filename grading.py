"""Grading: whether two answers are the same. Texts are parsed, never evaluated, in time linear in their length.

Numbers are compared exactly; other answers as text, and where Math-Verify is installed as mathematics, in a process
that is killed after two seconds.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from decimal import Decimal
from fractions import Fraction
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

BRACES = re.compile(r"\\boxed\s*\{|\\.|\{|\}", re.DOTALL)
DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
NUMBER = re.compile(rf"([+-]?)\s*({DECIMAL})(?:[eE]([+-]?\d{{1,3}})|\s*/\s*({DECIMAL}))?\s*%?\.?", re.ASCII)
LATEX_FRACTION = re.compile(r"([+-]?)\s*\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}")
UNIT = re.compile(r"\\(?:text|mathrm|mathbf)\s*\{[^{}\d]*\}(\^\{?\d\}?)?")
DRESS = [("\u2212", "-"), (r"\%", "%"), ("{,}", ","), (r"\dfrac", r"\frac"), (r"\tfrac", r"\frac")]
DRESS += [(r"\$", ""), ("$", ""), (r"\!", ""), (r"\,", " "), (r"\ ", " ")]
DRESS += [(r"\left", ""), (r"\right", ""), (r"^{\circ}", "°"), (r"^\circ", "°"), (r"\;", " ")]
LAST_UNIT = re.compile(r"^([-\d./ ]+)(?:°|\^\{?\\circ\}?)$|(?<=[\d})i])\s*\\text\{\s*[A-Za-z]{2,}\s*\}(?:\^\d)?$")
MAX_ANSWER_CHARS = 200  # int() of a long digit string takes quadratic time; no real answer is longer


def as_text(answer: Any) -> str:
    """A float with all its digits, as people write it: 0.00001, which `str` makes 1e-05."""
    return format(Decimal(str(answer)), "f") if isinstance(answer, float) else str(answer)


def after_thinking(text: str) -> str:
    """What follows the last `</think>`, up to a `<think>` that was not closed."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def last_boxed(text: str) -> str | None:
    r"""Contents of the `\boxed{...}` that starts last and whose braces balance; None if there is none."""
    stack: list[tuple[bool, int]] = []  # (is a box, where its contents start) of the braces still open
    last = None
    for match in BRACES.finditer(text):
        token = match.group()
        if token == "}":
            if stack:
                is_box, start = stack.pop()
                if is_box and (last is None or start > last[0]):
                    last = (start, match.start())
        elif token[-1] == "{" and token != r"\{":
            stack.append((token != "{", match.end()))
    return None if last is None else text[last[0] : last[1]]


def plain(answer: str) -> str:
    r"""An answer without its LaTeX dress: `$`, `\$`, `\text{...}`, thin spaces, outer braces, the typographic minus."""
    answer = LATEX_TEXT.sub(r"\1", answer)
    for old, new in DRESS:
        answer = answer.replace(old, new)
    braces = re.fullmatch(r"\s*\{([^{}]*)\}\s*", answer)
    return (braces[1] if braces else answer).strip()


def parse_number(answer: str) -> Fraction | None:
    r"""Exact value of `72`, `72.`, `1,000`, `3/4`, `0.75`, `\frac{3}{4}`, `$72`; None if it is not one plain number."""
    if len(answer) > MAX_ANSWER_CHARS:
        return None
    answer = plain(UNIT.sub("", answer))
    if fraction := LATEX_FRACTION.fullmatch(answer):  # fullmatch: 1\frac{1}{2} must not become 11/2
        answer = f"{fraction[1]}{fraction[2].strip()}/{fraction[3].strip()}"
    if (match := NUMBER.fullmatch(answer)) is None:
        return None
    numerator, denominator = (Fraction(digits.replace(",", "")) for digits in (match[2], match[4] or "1"))
    if denominator == 0:
        return None
    return numerator / denominator * Fraction(10) ** int(match[3] or 0) * (-1 if match[1] == "-" else 1)


def same_answer(candidate: str, answer: str) -> bool:
    """Equal as exact numbers if the reference answer is a number; else as text, or as mathematics by Math-Verify."""
    if (number := parse_number(answer)) is not None:
        return parse_number(candidate) == number
    mine, right = squeezed(candidate), squeezed(answer)
    if right in (mine, squeezed(candidate, unit=False)) or mine == squeezed(answer, unit=False):  # cm is not km
        return True
    return len(candidate) <= 5 * MAX_ANSWER_CHARS and MATH_WORKER.ask(answer, candidate)  # a matrix may be longer


def squeezed(answer: str, unit: bool = True) -> str:
    answer = plain(answer if unit else LAST_UNIT.sub(r"\1", answer.strip()))
    return "".join(re.sub(r"(?<=\d)\s+(?=\d)", "\0", answer).split())  # no white space, but 1 2 is not 12


class MathWorker:
    """Math-Verify in a process of its own, `math_worker.py`: it hangs on some answers, and a process can be killed."""

    def __init__(self) -> None:
        self.lock, self.process, self.works = threading.Lock(), None, None  # works: None before the first start
        self.owner = os.getpid()

    def ask(self, answer: str, candidate: str) -> bool:
        """Whether they are the same. False without Math-Verify, after two seconds, or if the process dies."""
        if self.owner != os.getpid():  # forked: it starts its own
            self.__init__()
        with self.lock:
            if self.works is False:
                return False
            # Put back once its verdict is read: one that an interrupt leaves there would answer the next question.
            process, self.process = self.process or self.start(), None
            with contextlib.suppress(OSError):  # of a dead one
                process.stdin.write(json.dumps([answer, candidate]).encode() + b"\n")
                if wait([process.stdout], 2) and (verdict := process.stdout.readline()):
                    self.process = process if verdict in (b"true\n", b"false\n") else None
                    return verdict == b"true\n"
            with process:  # closes its pipes and waits for its end
                process.kill()
            return False

    def start(self) -> Any:
        worker, env = Path(__file__).with_name("math_worker.py"), {k: v for k, v in os.environ.items() if "PATH" in k}
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        process: Any = subprocess.Popen([sys.executable, str(worker)], 0, env=env, start_new_session=True, **pipes)
        self.works = bool(wait([process.stdout], 60) and process.stdout.readline()) or self.works is True
        return process


MATH_WORKER = MathWorker()
