"""Seconds, tokens a second, MFU and peak memory of the scripts' own steps, on random weights of a real model's shape.

    python benchmarks/gpu/figures.py 0.5B 190 OUT

The shape (of Qwen2.5: 0.5B or 1.5B), the seconds after which no further line is begun, and the folder that gets
figures-0.5B.json. README.md in this folder says what each line means. Without a GPU it is a dry run on small shapes.
"""

import functools
import gc
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from correct import BF16, DEVICE, DRY, F32, FAST, FAST_NAME, TOKENS, qwen, switched, synchronize
from torch.optim import AdamW

import chat
import common
import grpo
import onpolicy_distill
import packing
import sft

SHAPES = {
    "0.5B": {"layers": 24, "hidden": 896, "inner": 4864, "heads": 14},
    "1.5B": {"layers": 28, "hidden": 1536, "inner": 8960, "heads": 12},
}
DTYPE = F32 if DRY else BF16
SCALE = 32 if DRY else 1  # lengths and passes are that many times shorter
FEW = 2 if DRY else None  # lines of each kind


def product_rate() -> float:
    """FLOP/s of a large product in the computing dtype: what MFU is a share of."""
    size = 8192 // SCALE
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=DTYPE)
    for repeats in (3, 10):
        synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            a @ b
        synchronize()
        seconds = (time.perf_counter() - started) / repeats
    return 2 * size**3 / seconds


class Bench:
    """One size's model as a script's `run` has it, its data, and the lines measured so far."""

    def __init__(self, size: str, budget: float, out: Path):
        self.size, self.budget, self.out, self.started = size, budget, out, time.perf_counter()
        self.rows: list[dict[str, Any]] = []
        self.rate, rng = product_rate(), np.random.default_rng(0)
        print(f"{size}: a product reaches {self.rate / 1e12:.3g} TFLOP/s; packed batches by {FAST_NAME}", flush=True)
        model = qwen(**SHAPES[size])
        self.lm = common.ChunkedLM(model, DTYPE, TOKENS, "auto")
        optimizer = AdamW([p for p in self.lm.parameters() if p.requires_grad], lr=0.0, fused=True)
        self.run: Any = SimpleNamespace(
            model=model,
            lm=self.lm,
            policy=self.lm,
            optimizer=optimizer,
            processes=1,
            device=DEVICE,
            args=SimpleNamespace(max_grad_norm=1.0),
        )

        def tokens(count: int) -> list[int]:
            return rng.integers(3, TOKENS, max(count // SCALE, 2)).tolist()

        # SFT: conversations of 500 tokens in the mean, of which the first fifth does not train
        lengths = [int(n) for n in rng.integers(300, 701, 4 * 64)]
        untrained = [count // SCALE // 5 for count in lengths]
        conversations = [
            (tokens(count), [0] * head + [1] * (count // SCALE - head))
            for count, head in zip(lengths, untrained, strict=True)
        ]
        self.sft_batches = [common.collate(conversations[n : n + 64], DEVICE) for n in range(0, 4 * 64, 64)]
        self.sft_calls = 0
        # GRPO: 32 prompts of 100 tokens with 8 completions of 128 to 256
        self.groups = [(tokens(100), [tokens(int(n)) for n in rng.integers(128, 257, 8)]) for _ in range(32)]
        sequences = [(p + c, [0] * len(p) + [1] * len(c)) for p, completions in self.groups for c in completions]
        self.grpo_batch = common.collate(sequences, DEVICE)

    def work(self, model: Any, tokens: float, trained: float, passes: int = 3) -> float:
        """FLOPs with nothing computed twice: 2 a weight and token forward, 4 backward; attention is left out."""
        head = model.get_output_embeddings().weight.numel()
        names = [(name, p.numel()) for name, p in model.named_parameters()]
        trunk = sum(count for name, count in names if "embed" not in name and "lm_head" not in name)
        return 2 * passes * (trunk * tokens + head * trained)

    def measure(self, name: str, step: Callable[[], Any], tokens: float, work: float, repeats: int = 3) -> None:
        """The first call, and the median of some more. An error is a line as well, such as one out of memory."""
        if time.perf_counter() - self.started > self.budget:
            print(f"left out for time: {self.size} {name}", flush=True)
            return
        gc.collect()
        if not DRY:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        row: dict[str, Any] = {"size": self.size, "name": name}
        try:
            times: list[float] = []
            while not times or len(times) < (2 if DRY or times[0] > 8 else 1 + repeats):
                synchronize()
                started = time.perf_counter()
                step()
                synchronize()
                times.append(time.perf_counter() - started)
            seconds = float(np.median(times[1:]))
            row |= {"first_s": round(times[0], 2), "s": round(seconds, 3), "tokens_s": round(tokens / seconds)}
            peak = 0 if DRY else torch.cuda.max_memory_allocated() / 1e9
            row |= {"mfu": round(work / seconds / self.rate, 3), "peak_gb": round(peak, 1)}
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            self.run.optimizer.zero_grad(set_to_none=True)
        self.rows.append(row)
        words = ", ".join(f"{key} {value}" for key, value in row.items() if key not in ("size", "name"))
        print(f"[{time.perf_counter() - self.started:5.0f}s] {name}: {words}", flush=True)
        (self.out / f"figures-{self.size}.json").write_text(json.dumps(self.rows, indent=1) + "\n")

    def passes(self, batch: list, kernel: Any, tokens: int) -> list:
        """The micro-batches of a step, as a script cuts them."""
        self.lm.kernel, self.run.micro_batch_tokens = kernel, tokens // SCALE
        return common.micro_batches(self.run, batch[0], batch[1])

    def update(self) -> None:
        common.optimizer_step(self.run, 1, 1e-6, 0.0)

    def sft_step(self, kernel: Any, micro_batch_tokens: int, rows: int = 64) -> None:
        batch = [t[:rows] for t in self.sft_batches[self.sft_calls % 4]]  # other lengths at each step
        self.sft_calls += 1
        input_ids, attention_mask, loss_mask = batch
        total = float(loss_mask.sum())
        for mb in self.passes(batch, kernel, micro_batch_tokens):
            logprobs = common.token_logprobs(self.lm, input_ids[mb], attention_mask[mb], loss_mask[mb])
            common.backward(self.run, sft.sft_loss(logprobs, loss_mask[mb], total)[0])
        self.update()

    def grpo_step(self, kernel: Any, micro_batch_tokens: int) -> None:
        input_ids, attention_mask, loss_mask = self.grpo_batch
        advantages = torch.linspace(-1, 1, len(input_ids), device=DEVICE)
        options = {"clip_eps": 0.2, "clip_eps_high": 0.28, "loss_type": "dapo"}
        denominator = float(loss_mask.sum())
        for mb in self.passes(self.grpo_batch, kernel, micro_batch_tokens):
            logprobs = common.token_logprobs(self.lm, input_ids[mb], attention_mask[mb], loss_mask[mb])
            old = logprobs.detach().double()
            loss, _ = grpo.grpo_loss(
                logprobs, old, advantages[mb[0]], loss_mask[mb], denominator=denominator, **options
            )
            common.backward(self.run, loss)
            loss.item()
        self.update()

    def distill_step(self, teacher: common.ChunkedLM, kernel: Any, micro_batch_tokens: int) -> None:
        batch = [t[:32] for t in self.grpo_batch]
        input_ids, attention_mask, loss_mask = batch
        options = {"teacher": teacher, "args": onpolicy_distill.Args(), "denominator": float(loss_mask.sum())}
        objective = functools.partial(onpolicy_distill.loss_of_chunk, **options)
        teacher.kernel = kernel
        for mb in self.passes(batch, kernel, micro_batch_tokens):
            inputs = (input_ids[mb], attention_mask[mb], loss_mask[mb])
            with torch.no_grad():
                states = teacher.states(*inputs)
            loss, *_ = self.lm(*inputs, 1.0, objective, states)
            common.backward(self.run, loss)
            loss.item()
        self.update()

    def rollout(self, new_tokens: int) -> None:
        tokenizer = chat.load_tokenizer("tiny")  # for its stop tokens, which are not used
        engine = common.HFEngine(self.lm, tokenizer, 4096)
        engine.stop_ids = []  # every completion is as long as can be
        prompts = [prompt for prompt, completions in self.groups for _ in completions][: 256 // SCALE]
        engine.generate(prompts, list(range(len(prompts))), max_new_tokens=new_tokens, temperature=1.0)


def main(size: str, budget: float, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    common.join_processes()
    bench = Bench(size, budget, out)
    model, small = bench.run.model, size == "0.5B"
    kernels = {"padded": None, "loop": packing.loop_of_sdpa, FAST_NAME: FAST}

    # SFT: kernels, the head's chunks, larger passes
    tokens, trained = (float(np.mean([b[i].sum().item() for b in bench.sft_batches])) for i in (1, 2))
    work = bench.work(model, tokens, trained)
    if small:  # 8 conversations: where cuDNN attends, each new length may cost half a second, forward and backward
        for cudnn in (True, False):
            step = functools.partial(bench.sft_step, packing.loop_of_sdpa, 4096, 8)
            with switched(cudnn=cudnn):
                name = f"sft of 8, loop, cuDNN {'as by default' if cudnn else 'off'}"
                bench.measure(name, step, tokens / 8, work / 8, repeats=1)
    largest = 32768 if small else 8192
    plan = [("padded", 25, 4096), ("loop", 25, 4096), (FAST_NAME, 25, 4096), (FAST_NAME, 23, 4096)]
    plan += [(FAST_NAME, 27, 4096), (FAST_NAME, 25, largest // 2), (FAST_NAME, 27, largest // 2)]
    plan += [(FAST_NAME, 27, largest)]
    if not small:
        plan = [plan[i] for i in (1, 2, 4, 7)]
    for kernel, head, micro in plan[:FEW]:
        with switched(head=head):
            name = f"sft of 64, {kernel}, head 2^{head}, {micro} tokens a pass"
            bench.measure(name, functools.partial(bench.sft_step, kernels[kernel], micro), tokens, work)

    # GRPO: the training pass, then the rollout
    trained = bench.grpo_batch[2].sum().item()
    tokens = trained + sum(len(prompt) for prompt, _ in bench.groups)  # a prompt once
    work = bench.work(model, tokens, trained)
    for kernel, head, micro in [("loop", 25, 4096), (FAST_NAME, 25, 4096), (FAST_NAME, 27, largest // 2)][:FEW]:
        with switched(head=head):
            name = f"grpo, training of 256, {kernel}, head 2^{head}, {micro} tokens a pass"
            bench.measure(name, functools.partial(bench.grpo_step, kernels[kernel], micro), tokens, work)
    count = 256 // SCALE
    rollouts = [(True, 16), (False, 16), (False, 64)] if small else [(False, 64)]
    for cudnn, new in rollouts[:FEW]:
        with switched(cudnn=cudnn):
            name = f"rollout of {count} x {new}, cuDNN {'as by default' if cudnn else 'off'}"
            step, decoded = functools.partial(bench.rollout, new), count * new
            bench.measure(name, step, decoded, bench.work(model, decoded, decoded, passes=1), repeats=1)

    # Distillation: the training pass for 32 completions, from a teacher of 1.5B's shape
    bench.run.optimizer.state.clear()
    teacher = common.ChunkedLM(qwen(**SHAPES["1.5B"], dtype=DTYPE), DTYPE, TOKENS, "auto").requires_grad_(False)
    trained = bench.grpo_batch[2][:32].sum().item()
    tokens = trained + sum(len(prompt) for prompt, _ in bench.groups[:4])
    work = bench.work(model, tokens, trained) + bench.work(teacher.model, tokens, trained, passes=1)
    for kernel, head in [("loop", 25), (FAST_NAME, 25), (FAST_NAME, 27)][:FEW]:
        with switched(head=head):
            name = f"distillation, training of 32, {kernel}, head 2^{head}"
            bench.measure(name, functools.partial(bench.distill_step, teacher, kernels[kernel], 4096), tokens, work)

    if small and not DRY:  # an experiment, and the last for its minute of compilation: no script compiles anything
        del teacher, step
        for layer in model.model.layers:
            layer.compile(dynamic=True)
        tokens, trained = (float(np.mean([b[i].sum().item() for b in bench.sft_batches])) for i in (1, 2))
        with switched(head=27):
            name = f"sft of 64, {FAST_NAME}, head 2^27, {largest // 2} tokens a pass, layers compiled"
            step = functools.partial(bench.sft_step, FAST, largest // 2)
            bench.measure(name, step, tokens, bench.work(model, tokens, trained))
    failed = sum("error" in row for row in bench.rows)
    print(f"figures: {len(bench.rows) - failed} lines measured, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in SHAPES or not math.isfinite(float(sys.argv[2])):
        sys.exit(__doc__)
    main(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]))
