"""The control of a GRPO run: the same flags, but each step's rewards are shuffled over its whole batch.

What a run with these rewards gains is not learned from them.

    python benchmarks/shuffled_rewards.py
"""

import sys
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import grpo

group_advantages = grpo.group_advantages
generator = torch.Generator().manual_seed(0)


def of_shuffled_rewards(rewards: torch.Tensor, scale: str) -> torch.Tensor:
    """(P, G) -> (P, G), like grpo.group_advantages. The batch: that of this process."""
    shuffled = rewards.flatten()[torch.randperm(rewards.numel(), generator=generator)]
    return group_advantages(shuffled.view_as(rewards), scale)


if __name__ == "__main__":
    grpo.group_advantages = of_shuffled_rewards
    common.run(grpo.main, tyro.cli(grpo.Args))
