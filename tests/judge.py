"""A --dataset whose rewards fail, or never come, where the environment says so. Not a test itself."""

import itertools
import os
import time
from pathlib import Path

from envs import EnvBase, UserError

CALLS = itertools.count(1)


class Judge(EnvBase):
    def get_reward(self, completion: str) -> float:
        at = os.environ.get("FAILS_AT") if os.environ.get("RANK", "1") == "1" else None  # of two processes the second
        if at and next(CALLS) >= int(at):
            raise KeyError("the judge is ill")
        if sign := os.environ.get("SLEEPS_AFTER"):
            Path(sign).touch()
            time.sleep(600)
        return float(len(completion) % 2)


def make() -> list[Judge]:
    return [Judge([{"role": "user", "content": f"What is {a} + 1?"}], a + 1) for a in range(20)]


def missing() -> list[Judge]:
    if os.environ["RANK"] == "1":
        raise UserError("the disk of rank 1 is not mounted")
    return make()


def different() -> list[Judge]:
    return make()[int(os.environ["RANK"]) :]
