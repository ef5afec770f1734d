"""The control of a GRPO run: the same flags, but each step's rewards are shuffled over its whole batch.

What a run with these rewards gains is not learned from them. Needs `pip install -e .`:

    python benchmarks/shuffled_rewards.py
"""

import torch
import tyro

import common
import grpo

group_advantages = grpo.group_advantages
generator = torch.Generator().manual_seed(0)


def of_shuffled_rewards(rewards: torch.Tensor, scale: str) -> torch.Tensor:
    """(P, G) -> (P, G), like grpo.group_advantages."""
    shuffled = rewards.flatten()[torch.randperm(rewards.numel(), generator=generator)]
    return group_advantages(shuffled.view_as(rewards), scale)


if __name__ == "__main__":
    grpo.group_advantages = of_shuffled_rewards
    common.run(grpo.main, tyro.cli(grpo.Args))
