"""Checks on a GPU what the tests can check on a CPU only: gradients, windows, draws, the engine, determinism.

    python benchmarks/gpu/correct.py OUT

One line a check: PASS, FAIL, or info where there is no threshold; all of them go to OUT/correct.json. README.md in this
folder says what each line means. Without a GPU it is a dry run: small shapes, and what needs CUDA is left out.
"""

import copy
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, GenerationConfig, MistralConfig, Qwen2Config

import chat
import common
import packing

DRY = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if DRY else "cuda")
BF16, F32 = torch.bfloat16, torch.float32
TOKENS = 2000 if DRY else 151_665  # that Qwen2.5's tokenizer has; the head has more rows
FAST, FAST_NAME = packing.pick_kernel("auto", DEVICE, BF16)  # what a run takes; on a CPU the loop
KERNELS = {"padded": None, "loop": packing.loop_of_sdpa} | ({} if DRY else {FAST_NAME: FAST})
RESULTS: list[dict[str, Any]] = []
STARTED = time.perf_counter()


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()


def check(name: str, good: bool | Tensor | None, value: Any, wanted: str = "") -> None:
    """Prints and keeps one line; `good` None: nothing is wanted."""
    RESULTS.append({"check": name, "pass": None if good is None else bool(good), "value": value, "wanted": wanted})
    word = "info" if good is None else "PASS" if good else "FAIL"
    seconds = time.perf_counter() - STARTED
    print(
        f"[{seconds:5.1f}s] {word} {name}: {value}{f'   (wanted {wanted})' if wanted and word != 'info' else ''}",
        flush=True,
    )


@contextmanager
def switched(cudnn: bool = False, head: int = 25) -> Generator[None]:
    """With cuDNN's attention allowed, as it is without this project, or another size of the head's chunks, 2**head."""
    before = common.HEAD_LOGITS
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    common.HEAD_LOGITS = 2**head
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)
        common.HEAD_LOGITS = before


def rounded(*values: float) -> list[float]:
    return [float(f"{value:.2g}") for value in values]


def qwen(
    layers: int = 24,
    hidden: int = 896,
    inner: int = 4864,
    heads: int = 14,
    kv_heads: int = 2,
    dtype: torch.dtype = F32,
    device: torch.device = DEVICE,
    tied: bool = True,
) -> Any:
    """Random weights in Qwen2.5's shape, the 0.5B model's unless told otherwise; in a dry run a small one."""
    rows = 151_936
    if DRY:
        layers, hidden, inner, heads, rows = 2, 112, 128, 14, 2048
    config = Qwen2Config(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    model.source_generation_config = GenerationConfig()
    return model


def random_batch(tokens: int, groups: int = 4, size: int = 4, prompt: int = 64, longest: int = 129) -> list[Tensor]:
    """Token ids, attention mask and loss mask, (B, T) each: groups of completions of 8 tokens and more of a prompt."""
    rng, sequences = np.random.default_rng(0), []
    for _ in range(2 if DRY else groups):
        shared = rng.integers(3, tokens, prompt).tolist()
        for _ in range(size):
            completion = rng.integers(3, tokens, rng.integers(8, longest)).tolist()
            sequences.append((shared + completion, [0] * prompt + [1] * len(completion)))
    return common.collate(sequences, torch.device("cpu"))


def gradients(lm: common.ChunkedLM, inputs: list[Tensor], kernel: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs at temperature 0.7, and the gradients of a sum of them with other weights for each, on the CPU."""
    lm.kernel = kernel
    lm.zero_grad(set_to_none=True)
    logprobs = common.token_logprobs(lm, *(t.to(lm.model.device) for t in inputs), 0.7)
    weights = torch.linspace(-1, 1, logprobs.numel(), dtype=torch.float64).view(logprobs.shape).to(logprobs)
    (logprobs * weights).sum().backward()
    return logprobs.detach().double().cpu(), {name: p.grad.double().cpu() for name, p in lm.model.named_parameters()}


def relative_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of the whole gradient; infinite or NaN when some of it is."""
    squares = [(float((got[n] - e).square().sum()), float(e.square().sum())) for n, e in expected.items()]
    differences, sizes = zip(*squares, strict=True)
    return math.sqrt(sum(differences) / sum(sizes))


# ---- The checks, in their order --------------------------------------------------------------------------------------


def environment() -> None:
    card = "no GPU: a dry run" if DRY else torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "cuda": torch.version.cuda}
    cudnn = None if DRY else torch.backends.cudnn.version()
    check("versions", None, versions | {"cudnn": cudnn, "device": card, "packed batches": FAST_NAME})
    precision = torch.get_float32_matmul_precision()
    check("float32 products are float32", precision == "highest", precision, "highest")


def which_kernel() -> None:
    """What SDPA picks, and what a length costs that it has not seen, which packing and decoding bring all the time."""
    if DRY:
        return
    names, pick = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}, getattr(torch, "_fused_sdp_choice", None)
    q, k = torch.randn(2, 1, 14, 192, 64, device=DEVICE, dtype=BF16)
    mask = torch.ones(1, 1, 192, 192, device=DEVICE, dtype=torch.bool).tril()
    calls = [(q, k, k, None, 0.0, True), (q, k, k, mask, 0.0, False), (q[:, :, :1], k, k, mask[:, :, :1], 0.0, False)]
    for cudnn in (True, False):
        words = f"cuDNN {'as by default' if cudnn else 'off'}"
        with switched(cudnn=cudnn):
            if pick is not None:
                check(f"SDPA kernel (causal, masked, decoding), {words}", None, [names.get(pick(*c)) for c in calls])
            times: dict[int, list[float]] = {0: [], 1: []}
            for n in range(12):
                length = 200 + 3 * n + cudnn
                x = torch.randn(1, 14, length, 64, device=DEVICE, dtype=BF16, requires_grad=True)
                for repeat in times:
                    synchronize()
                    started = time.perf_counter()
                    scaled_dot_product_attention(x, x, x, is_causal=True).sum().backward()
                    synchronize()
                    times[repeat].append(1e3 * (time.perf_counter() - started))
        first, again = (float(np.median(values[1:])) for values in times.values())
        good = None if cudnn else first < 3 * again + 1
        check(f"ms for a new length, for a known one, {words}", good, rounded(first, again), "first < 3 x again + 1")


def nan_of_cudnn() -> None:
    """The case of pytorch#196678: a mask, a length that is 64 more than a multiple of 128, a tiny log-sum-exp."""
    if DRY:
        return
    for cudnn in (True, False):
        torch.manual_seed(0)
        q, k = 0.1 * torch.randn(2, 1, 1, 704, 64, device=DEVICE, dtype=BF16)
        v = torch.randn(1, 1, 704, 64, device=DEVICE, dtype=BF16)
        q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(64)
        q.requires_grad_()
        mask = torch.ones(1, 1, 704, 704, dtype=torch.bool, device=DEVICE).tril()
        with switched(cudnn=cudnn):
            scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()
        bad = int((~torch.isfinite(q.grad)).sum())
        words = f"cuDNN {'as by default' if cudnn else 'off'}"
        check(f"non-finite gradients, {words}", None if cudnn else bad == 0, bad, "0 with cuDNN off")


def gradients_of_tiny() -> None:
    """Float32 and bf16 on the GPU against float64 on the CPU, padded."""
    vocab = chat.vocab_size(chat.load_tokenizer("tiny"))
    inputs = random_batch(vocab)
    exact = common.ChunkedLM(common.load_model("tiny", torch.device("cpu")).double(), F32, vocab, "eager")
    expected_logprobs, expected = gradients(exact, inputs, None)
    model = common.load_model("tiny", DEVICE)
    cases = [(F32, name, False, 1e-4) for name in ("padded", "loop")]
    cases += [(BF16, name, False, 0.03) for name in KERNELS]
    cases += [] if DRY else [(BF16, name, True, None) for name in ("padded", "loop")]
    for dtype, name, cudnn, limit in cases:
        lm = common.ChunkedLM(model, dtype, vocab, "sdpa")
        with switched(cudnn=cudnn):
            logprobs, got = gradients(lm, inputs, KERNELS[name])
        error = relative_error(got, expected)
        gap = float((logprobs - expected_logprobs).abs().max())
        what = f"tiny, {str(dtype)[6:]}, {name}{', cuDNN as by default' if cudnn else ''}"
        good, wanted = (None, "") if limit is None else (error < limit, f"the first below {limit}")
        check(f"{what}: gradient's relative error, largest log-prob gap", good, rounded(error, gap), wanted)


def windows() -> None:
    """A model with a sliding window, longer sequences than it, packed: windows are another argument of the kernel."""
    config = MistralConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=16,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=F32, attn_implementation="sdpa").eval()
    inputs = random_batch(2000)
    expected = gradients(common.ChunkedLM(model, F32, 2000, "sdpa"), inputs, None)[1]
    for dtype, name, limit in [(F32, "loop", 1e-4), *((BF16, name, 0.03) for name in KERNELS)]:
        lm = common.ChunkedLM(model, dtype, 2000, "sdpa")
        error = relative_error(gradients(lm, inputs, KERNELS[name])[1], expected)
        check(f"a window, {str(dtype)[6:]}, {name}: gradient's error", error < limit, *rounded(error), f"below {limit}")


def equal_share(a: list[common.Completion], b: list[common.Completion]) -> float:
    """Of the tokens at equal places, the share that is equal."""
    pairs = [(x, y) for c, d in zip(a, b, strict=True) for x, y in zip(c.token_ids, d.token_ids, strict=False)]
    return sum(x == y for x, y in pairs) / len(pairs)


def draws() -> None:
    """One token for each of 64 prompts, of a vocabulary of Qwen's size and logits with a deviation near 3."""
    model = qwen(layers=1, hidden=128, inner=256, heads=2, device=torch.device("cpu"), tied=False)
    model.lm_head.weight.data *= 15
    tokenizer, lms = chat.load_tokenizer("tiny"), {}
    for device in ("cpu", str(DEVICE)):
        lms[device] = common.ChunkedLM(copy.deepcopy(model).to(device), F32, TOKENS, "sdpa")
    prompts = [np.random.default_rng(i).integers(3, TOKENS, 12).tolist() for i in range(64)]
    seeds = [common.completion_seed(1, 1, i) for i in range(64)]
    options = {"max_new_tokens": 1, "temperature": 1.0}
    drawn = [common.HFEngine(lm, tokenizer, 4096).generate(prompts, seeds, **options) for lm in lms.values()]
    share = equal_share(drawn[0], drawn[-1])
    check("draws from a large vocabulary equal to the CPU's", share >= 0.98, round(share, 4), ">= 0.98")


def engine() -> None:
    """Greedy and seeded tokens against the CPU's, and the trainer's log-probs against those drawn with."""
    tokenizer, cpu = chat.load_tokenizer("tiny"), torch.device("cpu")
    vocab = chat.vocab_size(tokenizer)
    prompts = [np.random.default_rng(i).integers(3, vocab - 9, 10 + i % 7).tolist() for i in range(32)]
    seeds = [common.completion_seed(1, 1, i) for i in range(32)]
    on_cpu = common.ChunkedLM(common.load_model("tiny", cpu), F32, vocab, "auto")
    model = common.load_model("tiny", DEVICE)
    for temperature in (0.0, 1.0):
        drawn = []
        for lm in (on_cpu, common.ChunkedLM(model, F32, vocab, "auto")):
            options = {"max_new_tokens": 48, "temperature": temperature}
            drawn.append(common.HFEngine(lm, tokenizer, 512).generate(prompts, seeds, **options))
        share = equal_share(*drawn)
        check(f"tokens equal to the CPU's, float32, temperature {temperature:.0f}", share > 0.97, share, "> 0.97")
    for dtype, limit in ((F32, 1e-4), (BF16, 0.05)):
        lm = common.ChunkedLM(model, dtype, vocab, "auto")
        completions = common.HFEngine(lm, tokenizer, 512).generate(prompts, seeds, max_new_tokens=48, temperature=1.0)
        sequences = [c.after(prompt) for c, prompt in zip(completions, prompts, strict=True)]
        *inputs, engine_logprobs = common.collate(sequences, DEVICE)
        with torch.no_grad():
            differences = (common.token_logprobs(lm, *inputs) - engine_logprobs).abs() * inputs[-1]
        mean, largest = float(differences.sum() / inputs[-1].sum()), float(differences.max())
        what = f"gap of trainer and engine, {str(dtype)[6:]}, {lm.batches}: mean, largest"
        check(what, mean < limit, rounded(mean, largest), f"mean below {limit}")


def gradients_of_qwen_shape() -> None:
    """Heads and vocabulary of Qwen2.5-0.5B, 4 layers, bf16 against float32 on the same GPU, which tiny has checked."""
    model, inputs = qwen(layers=4), random_batch(TOKENS)
    expected = gradients(common.ChunkedLM(model, F32, TOKENS, "sdpa"), inputs, None)[1]
    lm = common.ChunkedLM(model, BF16, TOKENS, "sdpa")
    embedding = "model.embed_tokens.weight"  # and the head's
    cases = [(name, False, 25) for name in KERNELS]
    cases += [("loop" if DRY else FAST_NAME, False, head) for head in (23, 27)]
    cases += [] if DRY else [("loop", True, 25)]
    for name, cudnn, head in cases:
        with switched(cudnn, head):
            got = gradients(lm, inputs, KERNELS[name])[1]
        error = relative_error(got, expected)
        of_head = relative_error({embedding: got[embedding]}, {embedding: expected[embedding]})
        what = f"shape of 0.5B, bf16, {name}, head 2^{head}{', cuDNN as by default' if cudnn else ''}"
        good = None if cudnn else error < 0.03
        check(f"{what}: gradient's error, of the head", good, rounded(error, of_head), "the first below 0.03")
    for deterministic in (False,) if DRY else (False, True):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        for name, kernel in KERNELS.items():
            once, twice = (gradients(lm, inputs, kernel)[1] for _ in range(2))
            same = all(torch.equal(once[n], twice[n]) for n in once)
            words = ", torch's deterministic algorithms" if deterministic else ""
            check(f"the same pass twice is bit for bit the same, {name}{words}", None, same)
    torch.use_deterministic_algorithms(False)


def frozen_models_pack() -> None:
    """A reference or teacher has bf16 weights: the trial at its start must not take rounding for a wrong packing."""
    for layers in (4, 24):
        lm = common.ChunkedLM(qwen(layers=layers, dtype=BF16), BF16, TOKENS, "auto")
        check(f"a bf16 model of {layers} layers packs", lm.kernel is not None, lm.batches, "packed")


def stage(function: Callable[[], None]) -> None:
    """Runs some checks; an error is a failure of its own and ends only them."""
    try:
        function()
    except Exception as error:
        check(function.__name__, False, f"{type(error).__name__}: {str(error)[:300]}", "no error")
        traceback.print_exc(limit=6)


STAGES = [environment, which_kernel, nan_of_cudnn, gradients_of_tiny, windows, draws, engine]
STAGES += [gradients_of_qwen_shape, frozen_models_pack]


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    common.join_processes()
    for function in STAGES:
        stage(function)
    (out / "correct.json").write_text(json.dumps(RESULTS, indent=1) + "\n")
    failed = sum(result["pass"] is False for result in RESULTS)
    print(f"correct: {sum(result['pass'] is True for result in RESULTS)} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
