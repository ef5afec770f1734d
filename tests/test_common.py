"""Tokenizers fit their models; log-probs, packing, batches, generation and the optimizer step are exact."""

import json
import math
import shutil
import types
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformers
from capture import in_float64
from conftest import ROOT
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig

import chat
import common
import grpo
import packing
from common import ChunkedLM, HFEngine, UserError, completion_seed, encode_prompt, token_logprobs

CPU, F64 = torch.device("cpu"), torch.float64


# ---- Tokenizers against their models


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A folder with all that is known of a model before its weights are loaded."""
    for name in ("config.json", "generation_config.json"):
        shutil.copy(ROOT / "models" / "tiny" / name, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def rewrite(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


HEADERS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
PROMPTED = HEADERS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
IMAGE, BOS = {"additional_special_tokens": ["<image>"]}, {"bos_token": "<|endoftext|>"}
START_UP = [  # eos_token_id (None: nowhere), more tokens, a template around the model's own -> said, or refused
    (2, {}, "{}", "tokens     no BOS, stop <|im_end|>, context 512"),
    ([0, 2], {}, "{}", "stop <|endoftext|>, <|im_end|>,"),  # united with the tokenizer's and the template's
    (None, {}, "{}", "stop <|im_end|>,"),
    (None, {}, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "error: stop tokens []"),
    ([2, 50256], {}, "{}", "error: stop tokens [2, 50256]: correct eos_token_id"),
    (2, ["<more>"], "{}", "error: tokens beyond the model's 299 rows"),  # the tokenizer of another model
    (2, IMAGE, "{}", "no BOS"),  # nothing writes it
    (2, IMAGE, "<image>{}", "error: tokens beyond the model's 299 rows"),
    (2, BOS, "{}", "no BOS"),
    (2, BOS, "{{ bos_token }}{}", "BOS <|endoftext|>, stop"),
    (2, BOS, "{{ bos_token }}{{ bos_token }}{}", "error: writes <|endoftext|> twice"),
    (2, {}, PROMPTED, "warning    the chat template closes a turn with no special token: it trains without"),
    (2, {}, HEADERS, "warning    generation begins after '<|im_start|>user\\na', trained turns after"),
]


def check_tokenizer(tokenizer, folder):
    config = chat.load_config(str(folder))
    return chat.check_tokenizer(tokenizer, config, chat.load_generation_config(str(folder), config))


@pytest.mark.parametrize(("eos", "more", "template", "said"), START_UP)
def test_start_up_says_what_begins_and_ends_a_sequence_or_does_not_fit(folder, eos, more, template, said):
    rewrite(folder / "config.json", eos_token_id=eos)
    rewrite(folder / "generation_config.json", eos_token_id=eos)
    tokenizer = chat.load_tokenizer(str(folder))
    (tokenizer.add_tokens if isinstance(more, list) else tokenizer.add_special_tokens)(more)
    tokenizer.chat_template = template.replace("{}", tokenizer.chat_template)
    if eos is None:
        tokenizer.eos_token = None
        (folder / "generation_config.json").unlink()
    try:
        told = "\n".join(check_tokenizer(tokenizer, folder))
    except UserError as error:
        told = f"error: {error}"
    assert said.removeprefix("error: ") in told
    assert told.startswith("error: ") == said.startswith("error: ")
    assert told.count("warning") == {PROMPTED: 1, HEADERS: 2}.get(template, 0)


def test_a_bos_that_the_tokenizer_writes_and_the_template_does_not_is_told(folder):
    tokenizer = chat.load_tokenizer(str(folder))
    tokenizer.bos_token = "<|endoftext|>"
    options = {"single": "<|endoftext|> $A", "pair": "$A $B", "special_tokens": [("<|endoftext|>", 0)]}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(**options)
    assert "the chat template writes no <|endoftext|>" in check_tokenizer(tokenizer, folder)[1]


def test_a_stop_token_that_is_not_special_is_no_text_of_the_completion(folder):
    rewrite(folder / "tokenizer_config.json", eos_token=None, extra_special_tokens=[])
    tokens = json.loads((folder / "tokenizer.json").read_text())
    for token in tokens["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    tokenizer = chat.load_tokenizer(str(folder))
    assert tokenizer.decode([65, 2], skip_special_tokens=True).endswith("<|im_end|>")  # it lies
    assert chat.stop_token_ids(GenerationConfig(), tokenizer) == [2]
    assert common.Completion([65, 2], [0.0, 0.0], "stop").text(tokenizer) == tokenizer.decode([65])
    assert common.Completion([65, 66], [0.0, 0.0], "length").text(tokenizer) == tokenizer.decode([65, 66])


# ---- Log-probs


BATCH = (  # with a prefix of the sequence before, all of it, none of it, and beyond its end; masks with holes
    [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 12], [5, 6, 7, 8, 12], [5, 6, 7, 8, 12, 13, 14], [9], [9, 6, 7]],
    [[0, 0, 0, 1, 0, 1, 0], [0, 0, 0, 1, 1], [0, 0, 1, 0, 1], [0, 1, 1, 0, 1, 0, 1], [0], [0, 0, 1]],
)


def padded(ids, masks, side="right", width=11):
    def pad(row, value):
        more = [value] * (width - len(row))
        return row + more if side == "right" else more + row

    rows = [[pad(row, 7) for row in ids], [pad([1] * len(row), 0) for row in ids], [pad(row, 0) for row in masks]]
    return [torch.tensor(column) for column in rows]


def naive_logprobs(model, ids, mask, temperature=1.0):
    """One sequence at a time, the whole logits, one token at a time."""
    logits = model(input_ids=torch.tensor([ids])).logits[0] / temperature
    rows = [logits[t - 1].log_softmax(-1) for t in range(1, len(ids))]
    values = [row[ids[t]] * mask[t] for t, row in enumerate(rows, start=1)]
    entropies = [-(row.exp() * row).sum().item() * keep for row, keep in zip(rows, mask[1:], strict=True)]
    return torch.stack([torch.zeros((), dtype=logits.dtype), *values]), torch.tensor([0.0, *entropies])


@pytest.mark.parametrize(
    ("side", "chunk", "checkpointing"),
    [("right", 1, False), ("right", 3, True), ("right", 256, False), ("left", 3, False), ("left", 256, True)],
)
def test_logprobs_equal_naive_ones_in_value_and_gradient(monkeypatch, side, chunk, checkpointing):
    """Padded on the right they are packed, on the left not."""
    model = in_float64(common.load_model("tiny", CPU))
    monkeypatch.setattr(common, "HEAD_LOGITS", chunk * model.config.vocab_size)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    lm, weights = ChunkedLM(model), torch.linspace(-1, 1, 11, dtype=F64)
    assert lm.kernel is not None
    logprobs, entropy = token_logprobs(lm, *padded(*BATCH, side), 0.7, entropy=True)
    assert logprobs.shape == entropy.shape == (6, 11)
    assert logprobs.dtype == F64
    assert not entropy.requires_grad
    (logprobs * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = 0.0
    for b, (row, mask) in enumerate(zip(*BATCH, strict=True)):
        expected, expected_entropy = naive_logprobs(model, row, mask, 0.7)
        place = slice(0, len(row)) if side == "right" else slice(11 - len(row), 11)
        torch.testing.assert_close(logprobs[b, place], expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(entropy[b, place].float(), expected_entropy, rtol=1e-5, atol=1e-5)
        total = total + (expected * weights[place]).sum()
    total.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-9, atol=1e-9)


def test_nothing_predicts_the_first_token_and_no_token_may_train():
    model, ids = common.load_model("tiny", CPU), torch.tensor([[5, 6, 7]])
    ones, nothing = torch.ones_like(ids), torch.zeros_like(ids)
    assert token_logprobs(model, ids, ones, torch.tensor([[1, 0, 0]])).tolist() == [[0, 0, 0]]
    token_logprobs(model, ids, ones, nothing).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())  # it takes part, and adds 0


def test_full_logits_of_a_batch_never_exist(monkeypatch):
    sizes, function, model = [], common.logprob_of, common.load_model("tiny", CPU)

    def recorded(logits, *args, **options):
        sizes.append(tuple(logits.shape))
        return function(logits, *args, **options)

    monkeypatch.setattr(common, "logprob_of", recorded)
    monkeypatch.setattr(common, "HEAD_LOGITS", 4 * 299 + 7)
    token_logprobs(model, *padded(*BATCH)).sum().backward()
    assert sorted(sizes) == [(3, 299)] * 2 + [(4, 299)] * 4  # 11 trained tokens of 66; backward computes them again


def test_bf16_autocast_keeps_float32_weights_and_logprobs(tiny):
    lms = (ChunkedLM(tiny, dtype) for dtype in (torch.float32, torch.bfloat16))
    exact, rounded = (token_logprobs(lm, *padded(*BATCH)) for lm in lms)
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.5
    assert next(tiny.parameters()).dtype == torch.float32


# ---- Packed sequences

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 64, "head_dim": 8}


def small_model(folder, config_class, attn="sdpa", vocab_size=32, **options):
    torch.manual_seed(0)
    config = config_class(vocab_size=vocab_size, bos_token_id=0, eos_token_id=1, pad_token_id=2, **options)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return common.load_model(str(folder), CPU, attn)


def endless_engine(lm, tokenizer):
    engine = HFEngine(lm, tokenizer, 512)
    engine.stop_ids = []
    return engine


def test_the_kernel_gets_the_lengths_and_keys_of_the_picture():
    """ "abcde", "abcxy" and "mn" as common.py draws them: each is followed here by the token that its last predicts."""
    calls = []

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):  # as varlen_attn's
        calls.append((q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size))
        return packing.loop_of_sdpa(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size)

    ids = [[10, 11, 12, 13, 14, 9], [10, 11, 12, 20, 21, 9], [30, 31, 9]]
    batch = padded(ids, [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1], [0, 1, 1]])
    inputs, (source, _), where = packing.pack(batch[0], batch[2])
    assert inputs["input_ids"].tolist() == [[10, 11, 12, 13, 14, 20, 21, 30, 31]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4, 0, 1]]
    assert source.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8]
    found = [row[:n] for row, n in zip(where.tolist(), (5, 5, 2), strict=True)]
    assert found == [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6], [7, 8]]
    lm = ChunkedLM(common.load_model("tiny", CPU))
    lm.kernel = kernel
    token_logprobs(lm, *batch)
    heads, layers = lm.model.config.num_attention_heads, lm.model.config.num_hidden_layers
    size = lm.model.config.hidden_size // heads
    assert len(calls) == layers
    for q, k, v, cu_q, cu_k, *others in calls:
        assert (cu_q.tolist(), cu_k.tolist()) == ([0, 5, 7, 9], [0, 5, 10, 12])
        assert (q.shape, len(k), len(v), cu_q.dtype, cu_k.dtype) == ((9, heads, size), 12, 12, torch.int32, torch.int32)
        assert torch.equal(k[5:8], k[:3])
        assert torch.equal(v[5:8], v[:3])
        assert others == [5, 5, pytest.approx(size**-0.5), (-1, 0)]


def test_a_kernel_that_fails_gives_way_to_the_loop_and_that_to_padded_batches(monkeypatch):
    def fails(*args, **options):
        raise TypeError("unexpected keyword argument")

    monkeypatch.setattr(packing, "pick_kernel", lambda *args: (fails, "fast"))
    assert ChunkedLM(common.load_model("tiny", CPU)).batches == "packed batches, sdpa attention"
    monkeypatch.setattr(packing, "loop_of_sdpa", fails)
    lm = ChunkedLM(common.load_model("tiny", CPU))
    assert (lm.kernel, lm.model.config._attn_implementation) == (None, "sdpa")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whether_sequences_can_be_packed_is_judged_relative_to_the_states_and_their_rounding(dtype):
    model = common.load_model("tiny", CPU, dtype=dtype)
    for scale in (1, 1000):
        model.base_model.norm.weight.data.mul_(scale)
        assert ChunkedLM(model, torch.bfloat16).kernel is not None


def test_the_gradient_of_a_shared_prefix_is_the_same_bit_for_bit_on_two_threads():
    torch.manual_seed(0)
    start = torch.randint(4, 250, (1, 150)).expand(8, -1)
    ids = torch.cat([start, torch.randint(4, 250, (8, 30))], dim=1)
    mask, threads = torch.zeros_like(ids), torch.get_num_threads()
    mask[:, 150:] = 1
    lm, gradients = ChunkedLM(common.load_model("tiny", CPU)), []
    torch.set_num_threads(2)
    for _ in range(4):
        loss = token_logprobs(lm, ids, torch.ones_like(ids), mask).sum()
        gradients.append(torch.autograd.grad(loss, [*lm.parameters()]))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other, strict=True))


# ---- Batches


def cut(lm, tokens, sequences, rows=None):
    """The rows of each pass, and its tensors."""
    input_ids, attention_mask, loss_mask, values = common.collate(sequences, CPU)
    run = types.SimpleNamespace(lm=lm, micro_batch_tokens=tokens)
    passes = common.micro_batches(run, input_ids, attention_mask, rows)
    return {tuple(mb[0].tolist()): [t[mb] for t in (input_ids, attention_mask, loss_mask, values)] for mb in passes}


def sequences_of(*rows):
    return [(ids, [1] * len(ids), [float(i) for i in ids]) for ids in rows]


def test_batches_keep_ids_masks_and_values_in_place(tiny):
    sequences = [([5, 6, 7], [0, 1, 1], [0.0, 0.5, 0.25]), ([8, 9], [1, 0], [0.0, 0.0])]
    sequences += [([1, 2, 3, 4], [0, 0, 0, 1], [0.0, 0.0, 0.0, 0.125])]
    for lm in (ChunkedLM(tiny), ChunkedLM(tiny, attn="eager")):
        passes = cut(lm, 8, sequences)
        assert sorted(row for rows in passes for row in rows) == [0, 1, 2]
        for rows, tensors in passes.items():
            width = max(len(sequences[row][0]) for row in rows)
            for n, row in enumerate(rows):
                ids, mask, values = (column + [0] * (width - len(column)) for column in sequences[row])
                attention = [1] * len(sequences[row][0]) + [0] * (width - len(sequences[row][0]))
                mask[0] = 0  # nothing predicts the first token
                assert [tensor[n].tolist() for tensor in tensors] == [ids, attention, mask, values]
        assert [sorted(rows) for rows in cut(lm, 100, sequences, rows=[2, 0])] == [[0, 2]]
        assert list(cut(lm, 100, sequences, rows=[])) == []


def test_packed_passes_count_a_shared_prefix_once_and_padded_ones_their_padding(tiny):
    packed, plain = ChunkedLM(tiny), ChunkedLM(tiny, attn="eager")
    rows = [[1, 2, 3, 4], [7], [1, 2, 3, 5], [1, 2, 3, 4, 6], [7, 8], [1] * 30]
    assert list(cut(packed, 7, sequences_of(*rows))) == [(5,), (0, 3, 2, 1), (4,)]  # 30 alone; 4 + 1 + 1 + 1; 2
    lengths = [5, 9, 1, 7, 7, 3, 30, 2]
    passes = cut(plain, 16, sequences_of(*([n] * n for n in lengths)))
    assert sorted(row for rows in passes for row in rows) == list(range(8))
    assert all(len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= 16 for rows in passes)
    assert (3, 4) in passes


def test_schedules():
    def lr(step, schedule):
        return common.scheduled_lr(step, 2.0, 4, 14, schedule)

    assert [lr(s, "constant") for s in (1, 2, 4, 5, 14)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    assert lr(5, "linear") == lr(5, "cosine") == 2.0
    assert lr(10, "linear") == pytest.approx(1.0)
    assert lr(10, "cosine") == pytest.approx(1.0)
    assert 0 < lr(14, "cosine") < lr(14, "linear") < 0.21


# ---- The optimizer step


@pytest.fixture
def run(tmp_path):
    """A real one, with its policy and optimizer."""
    args = grpo.Args(output_dir=str(tmp_path / "run"), eval_steps=0, num_samples=4, weight_decay=0.1)
    run = common.Run(args, "grpo.py", None, None, bundled_lr=1.0, real_lr=1.0)
    common.load_policy(run)
    return run


def test_an_optimizer_step_clips_reports_the_norm_before_and_moves_by_the_learning_rate(run):
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.args.max_grad_norm = 0.5
    common.backward(run, 3 * run.model.base_model.norm.weight.sum())
    size = run.model.config.hidden_size
    assert common.optimizer_step(run, 1, 0.01, 0.0) == pytest.approx(3 * size**0.5, rel=1e-6)
    moments = run.optimizer.state[run.model.base_model.norm.weight]["exp_avg"]
    torch.testing.assert_close(moments, torch.full((size,), 0.1 * 0.5 / size**0.5))  # of the clipped gradient
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"model.norm.weight"}
    torch.testing.assert_close(run.model.base_model.norm.weight, before["model.norm.weight"] - 0.01)  # Adam's first
    assert all(p.grad is None for p in run.model.parameters())
    groups = run.optimizer.param_groups  # only matrices decay
    assert [(g["weight_decay"], {p.ndim for p in g["params"]}) for g in groups] == [(0.1, {2}), (0.0, {1})]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_stops_before_any_weight_changes(run, bad):
    before = [p.detach().clone() for p in run.model.parameters()]
    for p in run.model.parameters():
        p.grad = torch.ones_like(p)
    run.model.base_model.norm.weight.grad[0] = bad
    run.args.max_grad_norm = math.inf
    with pytest.raises(FloatingPointError, match=r"step 7: gradient norm (nan|inf): the loss is finite"):
        common.optimizer_step(run, 7, 0.1, 0.0)
    with pytest.raises(FloatingPointError, match=r"the loss is nan on process 0"):
        common.optimizer_step(run, 7, 0.1, math.nan)
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), before, strict=True))


def test_a_gap_of_nan_is_none_to_go_on_with_and_a_process_may_have_nothing_to_compare(run):
    nothing, nan = torch.zeros(0, 5, dtype=F64), torch.full((1, 5), math.nan)
    gap = common.check_gap(run, nothing, nothing, nothing)
    assert (gap["policy/logprob_gap"], gap["policy/logprob_gap_max"]) == (0, 0)
    with pytest.raises(UserError, match="differ by nan"):
        common.check_gap(run, nan, torch.zeros_like(nan), torch.ones_like(nan))


# ---- Generation


@pytest.fixture(scope="module")
def engine(tiny, tokenizer):
    return HFEngine(ChunkedLM(tiny), tokenizer, 100_000)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    texts = ["What is 3 + 4? Put the final answer in \\boxed{}.", "12 + 5?", "Say something long, please."]
    return [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in texts]


@pytest.fixture
def sizes(tiny, monkeypatch):
    """The shape of what the model is asked for, call by call."""
    shapes, forward = [], tiny.base_model.forward

    def recorded(*args, **inputs):
        shapes.append(tuple(inputs["input_ids"].shape))
        return forward(*args, **inputs)

    monkeypatch.setattr(tiny.base_model, "forward", recorded)
    return shapes


def test_draws_follow_the_distribution(tmp_path, tokenizer):
    """Chi-square of 8,000 draws over 12 outcomes, temperature included."""
    model = small_model(tmp_path, transformers.Qwen2Config, vocab_size=12, **SIZES)
    model.lm_head.weight.data.mul_(15)
    engine, count = endless_engine(ChunkedLM(model), tokenizer), 8000
    drawn = engine.generate([[3, 4]] * count, [*range(count)], max_new_tokens=1, temperature=1.5)
    p = (model(input_ids=torch.tensor([[3, 4]])).logits[0, -1].detach() / 1.5).softmax(-1)
    assert p.max() > 3 * p.min()
    observed = torch.bincount(torch.tensor([c.token_ids[0] for c in drawn]), minlength=12)
    assert ((observed - count * p) ** 2 / (count * p)).sum() < 31.3  # 0.1% point of 11 degrees of freedom
    torch.testing.assert_close(torch.tensor([c.logprobs[0] for c in drawn]), p.log()[[c.token_ids[0] for c in drawn]])


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_smallest_and_largest_uniforms_pick_tokens_that_have_a_probability(tmp_path, tokenizer, uniform):
    model = small_model(tmp_path, transformers.Qwen2Config, **SIZES)
    model.lm_head.weight.data.mul_(1e4)  # nearly all probabilities are exactly 0
    generator = types.SimpleNamespace(random=lambda count: np.full(count, uniform))
    with patch.object(np.random, "default_rng", lambda seed: generator):
        (drawn,) = endless_engine(ChunkedLM(model), tokenizer).generate([[3]], [1], max_new_tokens=9, temperature=1.0)
    assert all(token < 32 and logprob > -60 for token, logprob in zip(drawn.token_ids, drawn.logprobs, strict=True))


def test_a_groups_prompt_is_computed_once_and_a_completion_depends_on_its_seed_alone(engine, prompts, sizes):
    """Not on the others of its batch, which leave it when they stop."""
    options = {"max_new_tokens": 48, "temperature": 2.5}
    drawn = engine.generate(prompts * 4, [*range(12)], **options)
    assert sizes[0] == (3, max(map(len, prompts)))
    alive = [sum(len(c.token_ids) > t for c in drawn) for t in range(1, 48)]
    assert sizes[1:] == [(rows, 1) for rows in alive]
    assert 0 < alive[-1] < alive[20] < 12  # one of them runs to the end
    assert len({tuple(c.token_ids) for c in drawn[::3]}) == 4
    for prompt, seed, completion in zip(prompts * 4, range(12), drawn, strict=True):
        (alone,) = engine.generate([prompt], [seed], **options)
        assert (alone.token_ids, alone.finish_reason) == (completion.token_ids, completion.finish_reason)
        torch.testing.assert_close(alone.logprobs, completion.logprobs, rtol=1e-4, atol=1e-5)
    assert engine.generate([], [], **options) == []


def test_batches_keep_to_the_budget_and_pause_comes_before_each(tiny, tokenizer, prompts, engine, sizes):
    small, pauses = HFEngine(engine.lm, tokenizer, 1), []  # 128 tokens
    sizes.clear()
    tiny.train()
    jobs, options = (prompts * 2, [0] * 6), {"max_new_tokens": 20, "temperature": 0.0}
    one = small.generate(*jobs, **options, pause=lambda: pauses.append(len(sizes)))
    assert tiny.training
    tiny.eval()
    assert len([width for _, width in sizes if width > 1]) == len(pauses) > 1
    assert pauses[0] == 0
    assert [c.token_ids for c in one] == [c.token_ids for c in engine.generate(*jobs, **options)]


def test_seeds_differ_by_run_step_and_index_and_fit_63_bits():
    seeds = {completion_seed(s, t, i) for s in range(4) for t in range(4) for i in range(64)}
    assert len(seeds) == 4 * 4 * 64
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_rows_of_the_head_without_a_token_are_neither_sampled_nor_in_the_logprobs(tiny, tokenizer, prompts):
    """Of which these prompts want one: here all but 15 have none."""
    lm, prompt = ChunkedLM(tiny, vocab_size=15), prompts[0]
    assert tiny(input_ids=torch.tensor([prompt])).logits[0, -1].argmax() >= 15
    options = {"max_new_tokens": 9, "temperature": 1.0}
    for completion in endless_engine(lm, tokenizer).generate([prompt] * 8, [*range(8)], **options):
        (ids, mask, _), drawn = completion.after(prompt), torch.tensor([completion.token_ids])
        assert drawn.max() < 15
        every = tiny(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1, :15].log_softmax(-1)
        expected = every.gather(1, drawn.T)[:, 0]
        ours = token_logprobs(lm, *padded([ids], [mask], width=len(ids)))[0, len(prompt) :]
        for logprobs in (ours, torch.tensor(completion.logprobs)):
            torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-4)


def test_completions_hold_their_stop_token_and_say_why_they_ended(engine, prompts, tokenizer):
    (stopped,) = engine.generate(prompts[:1], [0], max_new_tokens=60, temperature=0.0)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids.index(tokenizer.eos_token_id) == len(stopped.token_ids) - 1 == len(stopped.logprobs) - 1
    assert stopped.text(tokenizer).endswith("}")
    ids, mask, logprobs = stopped.after(prompts[0])
    assert (ids, sum(mask)) == (prompts[0] + stopped.token_ids, len(stopped.token_ids))
    assert mask[len(prompts[0]) - 1 : len(prompts[0]) + 1] == [0, 1]
    assert logprobs[len(prompts[0]) :] == stopped.logprobs
    (cut,) = engine.generate(prompts[:1], [0], max_new_tokens=3, temperature=0.0)
    assert (cut.finish_reason, cut.token_ids) == ("length", stopped.token_ids[:3])


def test_greedy_equals_the_library_and_its_settings_cannot_sneak_in(tiny, tokenizer, engine, prompts, tmp_path):
    shutil.copytree(ROOT / "models" / "tiny", tmp_path / "sneaky")
    settings = {"do_sample": True, "top_k": 1, "temperature": 0.01, "repetition_penalty": 5.0, "min_new_tokens": 15}
    rewrite(tmp_path / "sneaky" / "generation_config.json", **settings)
    sneaky = HFEngine(ChunkedLM(common.load_model(str(tmp_path / "sneaky"), CPU)), tokenizer, 10_000)
    config = GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    outputs = [tiny.generate(torch.tensor([prompt]), generation_config=config)[0].tolist() for prompt in prompts]
    for temperature in (0.0, 1.0):
        options = {"max_new_tokens": 20, "temperature": temperature}
        one, two = ([c.token_ids for c in e.generate(prompts, [1, 2, 3], **options)] for e in (sneaky, engine))
        assert one == two
        assert temperature > 0 or outputs == [prompt + ids for prompt, ids in zip(prompts, one, strict=True)]


# ---- Models and flags


def test_compute_and_kernel_are_what_the_device_has_and_never_cudnns(monkeypatch):
    torch.backends.cuda.enable_cudnn_sdp(True)
    common.join_processes()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    args, cuda, float32, bf16, asked = grpo.Args(), torch.device("cuda"), torch.float32, torch.bfloat16, []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: asked.append(options) or len(asked) == 1)
    assert common.pick_compute(args, CPU) == (float32, 512)
    assert common.pick_compute(args, cuda) == (bf16, 4096)
    assert common.pick_compute(args, cuda) == (float32, 4096)  # an older one
    assert asked == [{"including_emulation": False}] * 2
    assert common.pick_compute(grpo.Args(dtype="bf16", micro_batch_tokens=77), CPU) == (bf16, 77)
    flash = types.SimpleNamespace(varlen_attn=max, flash_attn_varlen_func=max)
    monkeypatch.setattr(packing.importlib, "import_module", lambda name: flash)
    for installed, name in ((None, "varlen_attn"), (flash, "flash-attn")):
        monkeypatch.setattr(packing.importlib.util, "find_spec", lambda name, installed=installed: installed)
        assert packing.pick_kernel("auto", cuda, bf16)[1] == name
        assert packing.pick_kernel("sdpa", cuda, bf16)[1] == packing.pick_kernel("auto", cuda, float32)[1] == "sdpa"


IMPOSSIBLE = {
    **{"group_size": [1], "temperature": [0.0, math.nan], "num_steps": [-1, 0], "learning_rate": [math.nan, -1e-5]},
    **{"clip_eps": [1.0], "kl_penalty": [-0.1], "max_grad_norm": [0.0, math.nan], "is_cap": [0.0], "ppo_steps": [0]},
    **{"eval_steps": [-1], "saving_steps": [0], "max_new_tokens": [0], "seed": [-1], "micro_batch_tokens": [0]},
    **{"chat_template_args": ["[1]", "{"], "vllm_args": ["[1]"], "max_logprob_gap": [math.nan], "max_val": [math.nan]},
}


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag, values in IMPOSSIBLE.items() for value in values])
def test_impossible_flags_are_refused_by_name(flag, value):
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} "):
        common.check_args(types.SimpleNamespace(**{flag: value}))
    common.check_args(types.SimpleNamespace(learning_rate=None, eval_steps=0, max_grad_norm=math.inf, min_val=-5))


def test_dropout_is_off_and_the_context_known_where_the_settings_are_nested(tmp_path):
    nested = {"attention_dropout": 0.1, "max_position_embeddings": 77}
    transformers.Gemma3Config(text_config=nested).save_pretrained(tmp_path / "gemma")
    transformers.BioGptConfig(hidden_dropout_prob=0.2, layerdrop=0.1).save_pretrained(tmp_path / "biogpt")
    config = chat.load_config(str(tmp_path / "gemma"))
    assert (config.text_config.attention_dropout, chat.context_length(config)) == (0.0, 77)
    config = chat.load_config(str(tmp_path / "biogpt"))
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.layerdrop) == (0.0, 0.0, 0.0)
