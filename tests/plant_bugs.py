"""Plants known bugs into a copy of the project, one at a time, and reports which test catches each.

python tests/plant_bugs.py            all of them; exit code 1 if one is missed or a harmless change fails a test
python tests/plant_bugs.py KL         those whose name has "KL" in it
"""

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = "grpo sft common templates onpolicy_distill reference invariance scripts processes terminal"
SUITES = [f"test_{room}.py" for room in ROOMS.split()]

BUGS = {  # name -> file, what stands there once, what is planted
    "denominator of this process alone": (
        "grpo.py",
        "trained_tokens = common.global_sum(accelerator, sum(trained))",
        "trained_tokens = float(sum(trained))",
    ),
    "denominator of this process alone, sft": (
        "sft.py",
        "tokens = common.global_sum(accelerator, sum(sum(loss_mask) for _, loss_mask in sequences))",
        "tokens = float(sum(sum(loss_mask) for _, loss_mask in sequences))",
    ),
    "mean of each sequence for dapo": ("grpo.py", 'if loss_type == "grpo":', 'if loss_type != "dr_grpo":'),
    "log-probs shifted by one": ("common.py", "[where[:, :-1][predicts]]", "[where[:, 1:][predicts]]"),
    "a packed sequence sees one token less of its prefix": ("common.py", ".tril(shared)", ".tril(shared - 1)"),
    "a packed sequence has the positions of the whole": (
        "common.py",
        '"position_ids": time.expand_as(own)[own][None]',
        '"position_ids": torch.arange(int(own.sum()))[None]',
    ),
    "a prefix is taken from where it is not shared": (
        "common.py",
        "where[row, : shared[row]] = where[row - 1, : shared[row]]",
        "where[row, : shared[row]] = where[0, : shared[row]]",
    ),
    "padding shared as a prefix": ("common.py", ".minimum(ends[:-1]).minimum(ends[1:] - 1)", ".minimum(ends[1:] - 1)"),
    "a sliding window one token too long": ("common.py", "shared - window + 1", "shared - window"),
    "temperature missing from the loss": (
        "common.py",
        "every = scaled(logits, temperature).log_softmax(-1)",
        "every = logits.log_softmax(-1)",
    ),
    "a warning at every bad step": ("common.py", "if self.streaks[words] >= 5 and", "if self.streaks[words] >= 1 and"),
    "the next command evaluates other problems": ("common.py", '"seed": args.seed}', '"seed": 1}'),
    "population standard deviation": (
        "grpo.py",
        "rewards.std(dim=1, keepdim=True)",
        "rewards.std(dim=1, keepdim=True, correction=0)",
    ),
    "baseline of the whole batch": ("grpo.py", "rewards.mean(dim=1, keepdim=True)", "rewards.mean()"),
    "padding in the loss": (
        "grpo.py",
        "loss = torch.where(mask, per_token, 0).sum() / denominator",
        "loss = per_token.sum() / denominator",
    ),
    "prompt in the loss": ("grpo.py", "[0] * len(prompts[i])", "[1] * len(prompts[i])"),
    "token at a chunk's edge counted twice": (
        "common.py",
        "outputs = tuple(torch.cat(p) if",
        "outputs = tuple(torch.cat([torch.cat([q[:-1], 2 * q[-1:]]) for q in p]) if",
    ),
    "log-probs of the engine as the old ones": (
        "grpo.py",
        "old_logprobs.append(logprobs.detach())",
        "old_logprobs.append(engine_logprobs[n].to(logprobs.dtype))",
    ),
    "old log-probs of every update": (
        "grpo.py",
        "                    old_logprobs[n],\n",
        "                    logprobs.detach(),\n",
    ),
    "sign of the KL": ("grpo.py", "per_token + kl_penalty", "per_token - kl_penalty"),
    "KL with a detached ratio": ("grpo.py", "ratio * (d.exp() - d - 1)", "ratio.detach() * (d.exp() - d - 1)"),
    "gradients not summed over processes": (
        "common.py",
        "return nullcontext() if last else accelerator.no_sync(model)",
        "return accelerator.no_sync(model)",
    ),
    "every micro-batch synchronised": (
        "common.py",
        "return nullcontext() if last else accelerator.no_sync(model)",
        "return nullcontext()",
    ),
    "gradients averaged over processes": (
        "common.py",
        "accelerator.backward(loss * accelerator.num_processes)",
        "accelerator.backward(loss)",
    ),
    "metrics of the last micro-batch": ("grpo.py", "sums.update(metrics_of_batch)", "sums = Counter(metrics_of_batch)"),
    "stop token not trained": ("common.py", "+ len(end_of_turn) * text.startswith(end_of_turn, position)", ""),
    "stop token of the last turn alone": (
        "common.py",
        "len(end_of_turn) * text.startswith(end_of_turn, position)",
        "len(end_of_turn) * (n + 1 == len(turns))",
    ),
    "header of the next message for a stop token": (
        "common.py",
        "text.startswith(end_of_turn, position)",
        "bool(text[position:])",
    ),
    "header trained where it swallows a line end": (
        "common.py",
        "start + len(text[start:end].rstrip()) if token in special else end",
        "end",
    ),
    "thinking not trained": ("common.py", "start = max(len(prompt), text.find(", "max(len(prompt), text.find("),
    "header of the thinking trained": (
        "common.py",
        'max(len(prompt), text.find("<think>", len(prompt), start))',
        "len(prompt)",
    ),
    "turn found by its text, wherever that stands": (
        "common.py",
        "if text.startswith(w := literals[n] + t + literals[n + 1], position)",
        "if (w := literals[n] + t + literals[n + 1])",
    ),
    "completions that depend on the process": (
        "grpo.py",
        "offset = accelerator.process_index * local_size",
        "offset = 0",
    ),
    "same prompts on every process": (
        "grpo.py",
        "+ accelerator.process_index) * args.batch_size",
        ") * args.batch_size",
    ),
}
BUGS |= {  # of distillation
    "forward KL": (
        "onpolicy_distill.py",
        "(student.exp() * (student - teacher))",
        "(teacher.exp() * (teacher - student))",
    ),
    "log-ratio differentiated": (
        "onpolicy_distill.py",
        "mask, -ratio * advantages, 0",
        "mask, logprobs - teacher_logprobs, 0",
    ),
    "sign of the sampled log-ratio": (
        "onpolicy_distill.py",
        "(teacher_logprobs - logprobs).detach()",
        "(logprobs - teacher_logprobs).detach()",
    ),
    "teacher without the temperature": (
        "onpolicy_distill.py",
        "common.scaled(teacher.head(teacher_states), temperature)",
        "teacher.head(teacher_states)",
    ),
    "sampled: teacher without the temperature": (
        "onpolicy_distill.py",
        "common.token_logprobs(teacher, *inputs, args.temperature)",
        "common.token_logprobs(teacher, *inputs)",
    ),
    "distillation: denominator of this process alone": (
        "onpolicy_distill.py",
        "common.global_sum(accelerator, sum(len(c.token_ids) for c in completions))",
        "float(sum(len(c.token_ids) for c in completions))",
    ),
    "distillation: prompt in the loss": ("onpolicy_distill.py", "[0] * len(prompts[i])", "[1] * len(prompts[i])"),
    "distillation: metrics of the last micro-batch": (
        "onpolicy_distill.py",
        "            inputs = batch.inputs\n",
        "            inputs, sums = batch.inputs, Counter()\n",
    ),
    "distillation: masked positions in the value": (
        "onpolicy_distill.py",
        "(student - teacher)).sum(-1), 0).sum()",
        "(student - teacher)).sum(-1), 1e-3).sum()",
    ),
    "padded vocabulary rows in the loss": (
        "common.py",
        "return weight[:vocab_size].to(dtype)",
        "return weight.to(dtype)",
    ),
    "padded vocabulary rows in the sampler": ("common.py", "scores[:, : self.vocab_size]", "scores"),
}
BUGS |= {
    "a group's prompt handed to other rows": (
        "common.py",
        "cache.reorder_cache(rows)",
        "cache.reorder_cache(rows.flip(0))",
    ),
    "a cache's room of before its rows were reordered": (
        "common.py",
        "        self.rooms = self.keys, self.values\n",
        "",
    ),
    "a draw not reduced by the blocks before": ("common.py", "(target - before) / (after - before)", "target / after"),
    "a head's gradient of its first rows alone": (
        "common.py",
        "d_logits.T.split(HEAD_ROWS), strict=True",
        "d_logits.T.split(HEAD_ROWS)[:1], strict=False",
    ),
    "correction turned round": (
        "grpo.py",
        "old_logprobs[n] - engine_logprobs[n]",
        "engine_logprobs[n] - old_logprobs[n]",
    ),
    "correction without its cap": ("grpo.py", "log_ratio.exp().clamp(max=cap)", "log_ratio.exp()"),
    "correction left out": ("grpo.py", "weights[n] if weights else None", "None"),
    "gap of this process alone": (
        "common.py",
        'return metrics | {"policy/logprob_gap_max": max(gather_object([largest]))}',
        'return metrics | {"policy/logprob_gap_max": largest}',
    ),
}
VLLM = {  # caught by test_vllm.py, where vLLM is installed
    "vLLM: cache of the old weights": ("common.py", "        self.llm.reset_prefix_cache()\n", ""),
    "vLLM: log-probs before the temperature": ("common.py", '"processed_logprobs"', '"raw_logprobs"'),
    "vLLM: the tokenizer's stop token alone": (
        "common.py",
        '{"stop_token_ids": self.stop_ids, ',
        '{"stop_token_ids": self.stop_ids[:1], ',
    ),
    "vLLM: rows without a token drawn": ("common.py", '"logit_bias": self.never or None', '"logit_bias": None'),
    "vLLM: one seed for all": (
        "common.py",
        "SamplingParams(seed=seed, **options)",
        "SamplingParams(seed=seeds[0], **options)",
    ),
    "vLLM: weights from disk in a trainer": ("common.py", '{"load_format": "dummy"} if trains', "{} if trains"),
    "vLLM: no sync before a rollout": (
        "grpo.py",
        "        engine.sync(model)\n        completions",
        "        completions",
    ),
}
HARMLESS = {
    "maximum for minus minimum": (
        "grpo.py",
        "-torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])",
        "torch.maximum(-ratio * advantages[:, None], -clipped * advantages[:, None])",
    ),
    "shortest sequences first": ("common.py", "key=lambda i: -lengths[i])", "key=lambda i: (-lengths[i], -i))"),
    "sum of products for the dot": ("common.py", "-(every.exp() * every).sum(-1)", "-(every * every.exp()).sum(-1)"),
}

CHANGES = BUGS | VLLM | HARMLESS


def first_failure(name: str) -> str | None:
    """The first test that fails with the change in place; None when all pass."""
    file, old, new = CHANGES[name]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        skipped = (".git", ".venv", "runs", "results", "__pycache__", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*skipped))
        text = (copy / file).read_text()
        assert text.count(old) == 1, f"{file} has {text.count(old)} times: {old}"
        (copy / file).write_text(text.replace(old, new))
        tests = ["-m", "vllm", "tests/test_vllm.py"] if name in VLLM else [f"tests/{s}" for s in SUITES]
        command = [sys.executable, "-m", "pytest", "-x", "-n0", "-q", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return None
        failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)
        return failed[1] if failed else f"pytest ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}"


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    changes = [name for name in CHANGES if wanted in name]
    if importlib.util.find_spec("vllm") is None:
        changes = [name for name in changes if name not in VLLM]
        print(f"left out {len(VLLM)} of vLLM, which is not installed")
    wrong = 0
    with ThreadPoolExecutor(2) as pool:
        for name, caught in zip(changes, pool.map(first_failure, changes), strict=True):
            good = (caught is None) == (name in HARMLESS) and not (caught or "").startswith("pytest ended")
            wrong += not good
            kind = "harmless" if name in HARMLESS else "bug"
            print(f"{'ok    ' if good else 'WRONG '} {kind:8} {name:42} {caught or 'no test fails'}", flush=True)
    print(f"{len(changes) - wrong} of {len(changes)} as they should be")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
