"""Runs the real scripts, several times in one process, and records what each optimizer step saw. Not a test itself.

    python tests/capture.py CASES.json OUT          or the same under torchrun: then every process records

A case is a JSON object: `name`, `script`, `flags`, and what differs from a plain run:
    float64: weights and loss in float64                     padding: "left" pads the training batches on the left
    frozen: completions are a function of their seed         no_skip: groups of equal rewards are computed as well
    head_logits: logits that exist at a time                 flat: positions of step 1 whose prompts have equal rewards
Each process writes OUT/<name>-<rank>.safetensors: the gradient of each parameter at each step, `<step>.<n>`, in the
optimizer's order; each completion, `completion.<seed>`; how many passes reduce gradients over processes, `reductions`.
"""

import json
import random
import sys
import types
import zlib
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

import common
import grpo
import onpolicy_distill
import sft
import weights
from envs import EnvBase

SCRIPTS = {"grpo": grpo, "onpolicy_distill": onpolicy_distill, "sft": sft}


@dataclass
class Puzzle(EnvBase):
    """A reward that depends on the text alone, or on nothing."""

    flat: bool = False

    def get_reward(self, completion: str) -> float:
        return 0.1 if self.flat else (0.0, 0.1, 1.0)[zlib.crc32(completion.encode()) % 3]


def puzzles(flat: list[int], seed: int = 1) -> list[Puzzle]:
    """16 problems of unequal length; `flat` names positions in the order in which the script takes them."""
    flat_rows = set(common.data_order(16, seed, 0, 16)[i] for i in flat)
    texts = [f"{'why ' * (i % 5)}{i * 37} + {i}?" for i in range(16)]
    return [Puzzle([{"role": "user", "content": t}], "yes " * (i % 7), i in flat_rows) for i, t in enumerate(texts)]


def frozen_completion(seed: int, max_new_tokens: int) -> common.Completion:
    rng = random.Random(seed)
    length = rng.randint(1, max_new_tokens)
    ids = [rng.randint(3, 250) for _ in range(length)]
    if stopped := rng.random() < 0.7:
        ids[-1] = 2  # <|im_end|>
    return common.Completion(ids, [-rng.random() for _ in ids], "stop" if stopped else "length")


def in_float64(model):
    """Also what the library computes in float32 whatever the dtype: the norms, and the cosines of the positions."""

    def norm(self, x):
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    def cosines(self, x, position_ids):
        angles = (position_ids[..., None] * inverse_frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()

    model, rotary = model.double(), model.base_model.rotary_emb
    size = model.config.hidden_size // model.config.num_attention_heads
    theta = model.config.rope_parameters["rope_theta"]
    inverse_frequencies = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    assert torch.allclose(inverse_frequencies, rotary.inv_freq.double())
    rotary.forward = types.MethodType(cosines, rotary)
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = types.MethodType(norm, module)
    return model


def with_random_adapter(adapter):
    """In float64, and as if it had been trained: at first the gradient of one of its matrices is 0."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02, generator=generator)
    return adapter.double()


def capture(case: dict, out: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    steps, reductions = 0, 0
    load_model, generate, micro_batches = common.load_model, common.HFEngine.generate, common.micro_batches
    add_adapter = weights.add_adapter
    states, adamw_step, forward = common.ChunkedLM.states, torch.optim.AdamW.step, DistributedDataParallel.forward

    def load_and_cast(*args, **kwargs):
        if not case.get("float64"):
            return load_model(*args, **kwargs)
        return in_float64(load_model(*args[:3], torch.float64, **kwargs))

    def add_and_cast(run):
        adapter = add_adapter(run)
        return with_random_adapter(adapter) if run.checkpoint is None else adapter.double()

    def generate_and_record(self, prompts, seeds, *, max_new_tokens, temperature, pause=None):
        if case.get("frozen"):
            completions = [frozen_completion(seed, max_new_tokens) for seed in seeds]
        else:
            completions = generate(self, prompts, seeds, max_new_tokens=max_new_tokens, temperature=temperature)
        tensors.update({f"completion.{s}": torch.tensor(c.token_ids) for s, c in zip(seeds, completions, strict=True)})
        return completions

    def cut(run, input_ids, attention_mask, rows=None):
        return micro_batches(run, input_ids, attention_mask, None if case.get("no_skip") else rows)

    def states_of_left_padded(self, *tensors):  # the order of the trained tokens stays
        lengths, width = tensors[1].sum(1).tolist(), tensors[1].shape[1]
        moved = [[row.roll(width - n) for row, n in zip(t, lengths, strict=True)] for t in tensors]
        return states(self, *map(torch.stack, moved))

    def record_and_step(self, *args, **kwargs):
        nonlocal steps
        steps += 1
        grads = [weights.whole(p.grad) for group in self.param_groups for p in group["params"]]
        tensors.update({f"{steps}.{i}": grad.clone() for i, grad in enumerate(grads)})
        return adamw_step(self, *args, **kwargs)

    def forward_and_count(self, *args):
        nonlocal reductions
        reductions += torch.is_grad_enabled() and self.require_backward_grad_sync
        return forward(self, *args)

    script = SCRIPTS[case["script"]]
    flags = [*case["flags"], "--output-dir", str(out / case["name"]), "--eval-steps", "0"]
    if case.get("frozen") and case["script"] != "sft":
        flags += ["--max-logprob-gap", "1e9"]  # no model drew these
    args = tyro.cli(script.Args, args=flags)
    with (
        mock.patch.object(common, "load_model", load_and_cast),
        mock.patch.object(weights, "add_adapter", add_and_cast),
        mock.patch.object(common.HFEngine, "generate", generate_and_record),
        mock.patch.object(common, "micro_batches", cut),
        mock.patch.object(common.ChunkedLM, "states", states_of_left_padded if case.get("padding") else states),
        mock.patch.object(common, "HEAD_LOGITS", case.get("head_logits", common.HEAD_LOGITS)),
        mock.patch.object(torch.optim.AdamW, "step", record_and_step),
        mock.patch.object(DistributedDataParallel, "forward", forward_and_count),
    ):
        script.main(args, puzzles(case.get("flat", [])))
    tensors["reductions"] = torch.tensor(reductions)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    save_file(tensors, out / f"{case['name']}-{rank}.safetensors")


if __name__ == "__main__":
    for each in json.loads(Path(sys.argv[1]).read_text()):
        capture(each, Path(sys.argv[2]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
