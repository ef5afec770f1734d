"""Tokenizers fit their models; log-probs, packing, batches, generation and the optimizer step are exact."""

import json
import math
import re
import shutil
import types
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformers
from capture import in_float64
from conftest import ROOT, read_rows
from transformers import GenerationConfig

import chat
import common
import packing
from common import ChunkedLM, HFEngine, UserError, encode_prompt, token_logprobs

CPU, F64 = torch.device("cpu"), torch.float64


def rewrite(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("case", read_rows(ROOT / "tests" / "start_up.jsonl"))
def test_start_up_says_what_begins_and_ends_a_sequence_or_does_not_fit(tmp_path, case):
    """Of `tiny` with other stop tokens (null: nowhere), more tokens, and a template around its own, {}."""
    folder = shutil.copytree(ROOT / "models" / "tiny", tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        rewrite(folder / name, eos_token_id=case["eos_token_id"])
    tokenizer = chat.load_tokenizer(str(folder))
    tokenizer.add_tokens(case.get("tokens", []))
    tokenizer.add_special_tokens(case.get("special", {}))
    tokenizer.chat_template = case.get("template", "{}").replace("{}", tokenizer.chat_template)
    if case["eos_token_id"] is None:
        tokenizer.eos_token = None
        (folder / "generation_config.json").unlink()
    config = chat.load_config(str(folder))
    generation = chat.load_generation_config(str(folder), config)
    if "error" in case:
        with pytest.raises(UserError, match=re.escape(case["error"])):
            chat.check_tokenizer(tokenizer, config, generation)
    else:
        told = "\n".join(chat.check_tokenizer(tokenizer, config, generation))
        assert case["says"] in told
        assert told.count("warning") == case.get("warnings", 0)


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


@pytest.mark.parametrize(("side", "chunk"), [("right", 1), ("right", 3), ("right", 256), ("left", 3), ("left", 256)])
def test_logprobs_equal_naive_ones_in_value_and_gradient(monkeypatch, side, chunk):
    """Padded on the right they are packed, on the left not; with gradient checkpointing and without."""
    model = in_float64(common.load_model("tiny", CPU))
    monkeypatch.setattr(common, "HEAD_LOGITS", chunk * model.config.vocab_size)
    if chunk == 3:
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


def test_full_logits_of_a_batch_never_exist(monkeypatch):
    sizes, function, model = [], common.logprob_of, common.load_model("tiny", CPU)

    def recorded(logits, *args, **options):
        sizes.append(tuple(logits.shape))
        return function(logits, *args, **options)

    monkeypatch.setattr(common, "logprob_of", recorded)
    monkeypatch.setattr(common, "HEAD_LOGITS", 4 * 299 + 7)
    token_logprobs(model, *padded(*BATCH)).sum().backward()
    assert sorted(sizes) == [(3, 299)] * 2 + [(4, 299)] * 4  # 11 trained tokens of 66; backward computes them again


# ---- Packed sequences


def test_the_kernel_gets_the_lengths_and_keys_of_the_picture():
    """ "abcde", "abcxy" and "mn" as packing.py draws them, each here with the token that its last predicts."""
    ids = [[10, 11, 12, 13, 14, 9], [10, 11, 12, 20, 21, 9], [30, 31, 9]]
    input_ids, _, loss_mask = padded(ids, [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1], [0, 1, 1]])
    inputs, (source, (cu_q, cu_k, *longest)), where = packing.pack(input_ids, loss_mask)
    assert inputs["input_ids"].tolist() == [[10, 11, 12, 13, 14, 20, 21, 30, 31]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4, 0, 1]]
    assert source.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8]
    assert (cu_q.tolist(), cu_k.tolist(), longest) == ([0, 5, 7, 9], [0, 5, 10, 12], [5, 5])
    assert cu_q.dtype == cu_k.dtype == torch.int32
    found = [row[:n] for row, n in zip(where.tolist(), (5, 5, 2), strict=True)]
    assert found == [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6], [7, 8]]


def test_a_kernel_that_fails_gives_way_to_the_loop_and_that_to_padded_batches(monkeypatch):
    def fails(*args, **options):
        raise TypeError("unexpected keyword argument")

    monkeypatch.setattr(packing, "pick_kernel", lambda *args: (fails, "fast"))
    assert ChunkedLM(common.load_model("tiny", CPU)).batches == "packed batches, sdpa attention"
    monkeypatch.setattr(packing, "loop_of_sdpa", fails)
    lm = ChunkedLM(common.load_model("tiny", CPU))
    assert (lm.kernel, lm.model.config._attn_implementation) == (None, "sdpa")


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
    """The rows of each pass. Its columns are those of the longest of them."""
    input_ids, attention_mask, _ = common.collate([(ids, ids) for ids in sequences], CPU)
    run = types.SimpleNamespace(lm=lm, micro_batch_tokens=tokens)
    passes = common.micro_batches(run, input_ids, attention_mask, rows)
    assert all(columns == slice(max(len(sequences[row]) for row in rows)) for rows, columns in passes)
    return [tuple(rows.tolist()) for rows, _ in passes]


def test_packed_passes_count_a_shared_prefix_once_and_padded_ones_their_padding(tiny):
    packed, plain = ChunkedLM(tiny), ChunkedLM(tiny, attn="eager")
    rows = [[1, 2, 3, 4], [7], [1, 2, 3, 5], [1, 2, 3, 4, 6], [7, 8], [1] * 30]
    assert cut(packed, 7, rows) == [(5,), (0, 3, 2, 1), (4,)]  # 30 alone; 4 + 1 + 1 + 1; 2
    assert cut(plain, 16, [[n] * n for n in (5, 9, 1, 7, 7, 3, 30, 2)]) == [(6,), (1,), (3, 4), (0, 5, 7), (2,)]
    for lm in (packed, plain):
        assert [sorted(rows) for rows in cut(lm, 100, rows, [2, 0])] == [[0, 2]]
        assert cut(lm, 100, rows, []) == []


def test_schedules():
    def lr(step, schedule):
        return common.scheduled_lr(step, 2.0, 4, 14, schedule)

    assert [lr(s, "constant") for s in (1, 2, 4, 5, 14)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    for schedule in ("linear", "cosine"):
        assert [lr(s, schedule) for s in (5, 10)] == pytest.approx([2.0, 1.0])
    assert 0 < lr(14, "cosine") < lr(14, "linear") < 0.21


# ---- The optimizer step


@pytest.fixture
def run(make_run):
    """With its policy and optimizer."""
    run = make_run(weight_decay=0.1)
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
    with pytest.raises(UserError, match=r"step 7: gradient norm (nan|inf): the loss is finite"):
        common.optimizer_step(run, 7, 0.1, 0.0)
    with pytest.raises(UserError, match=r"the loss is nan on process 0"):
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


def endless_engine(lm, tokenizer):
    engine = HFEngine(lm, tokenizer, 512)
    engine.stop_ids = []
    return engine


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


def test_draws_follow_the_distribution(tiny, tokenizer):
    """Chi-square of 8,000 draws over 12 outcomes, temperature included."""
    engine, count = endless_engine(ChunkedLM(tiny, vocab_size=12), tokenizer), 8000
    drawn = engine.generate([[3, 4]] * count, [*range(count)], max_new_tokens=1, temperature=0.7)
    p = (tiny(input_ids=torch.tensor([[3, 4]])).logits[0, -1, :12].detach() / 0.7).softmax(-1)
    assert p.max() > 3 * p.min()
    observed = torch.bincount(torch.tensor([c.token_ids[0] for c in drawn]), minlength=12)
    assert ((observed - count * p) ** 2 / (count * p)).sum() < 31.3  # 0.1% point of 11 degrees of freedom
    torch.testing.assert_close(torch.tensor([c.logprobs[0] for c in drawn]), p.log()[[c.token_ids[0] for c in drawn]])


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_smallest_and_largest_uniforms_pick_tokens_that_have_a_probability(tiny, tokenizer, uniform):
    """At this temperature nearly all probabilities are exactly 0."""
    engine, options = endless_engine(ChunkedLM(tiny), tokenizer), {"max_new_tokens": 9, "temperature": 1e-6}
    generator = types.SimpleNamespace(random=lambda count: np.full(count, uniform))
    with patch.object(np.random, "default_rng", lambda seed: generator):
        (drawn,) = engine.generate([[3]], [1], **options)
    assert all(token < 299 and logprob > -60 for token, logprob in zip(drawn.token_ids, drawn.logprobs, strict=True))


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
    ends = {end: common.Completion([65, 66], [0.0, 0.0], end).text(tokenizer) for end in ("stop", "length")}
    assert ends == {"stop": tokenizer.decode([65]), "length": tokenizer.decode([65, 66])}  # special or not
    ids, mask, logprobs = stopped.after(prompts[0])
    assert (ids, sum(mask)) == (prompts[0] + stopped.token_ids, len(stopped.token_ids))
    assert mask[len(prompts[0]) - 1 : len(prompts[0]) + 1] == [0, 1]
    assert logprobs[len(prompts[0]) :] == stopped.logprobs
    (cut,) = engine.generate(prompts[:1], [0], max_new_tokens=3, temperature=0.0)
    assert (cut.finish_reason, cut.token_ids) == ("length", stopped.token_ids[:3])


def test_greedy_equals_the_library_and_its_settings_cannot_sneak_in(tiny, tokenizer, prompts, tmp_path):
    shutil.copytree(ROOT / "models" / "tiny", tmp_path / "sneaky")
    settings = {"do_sample": True, "top_k": 1, "temperature": 0.01, "repetition_penalty": 5.0, "min_new_tokens": 15}
    rewrite(tmp_path / "sneaky" / "generation_config.json", **settings)
    sneaky = HFEngine(ChunkedLM(common.load_model(str(tmp_path / "sneaky"), CPU)), tokenizer, 10_000)
    config = GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    outputs = [tiny.generate(torch.tensor([prompt]), generation_config=config)[0].tolist() for prompt in prompts]
    drawn = sneaky.generate(prompts, [1, 2, 3], max_new_tokens=20, temperature=0.0)
    assert [prompt + c.token_ids for prompt, c in zip(prompts, drawn, strict=True)] == outputs


def test_dropout_is_off_and_the_context_known_where_the_settings_are_nested(tmp_path):
    nested = {"attention_dropout": 0.1, "max_position_embeddings": 77}
    transformers.Gemma3Config(text_config=nested).save_pretrained(tmp_path / "gemma")
    transformers.BioGptConfig(hidden_dropout_prob=0.2, layerdrop=0.1).save_pretrained(tmp_path / "biogpt")
    config = chat.load_config(str(tmp_path / "gemma"))
    assert (config.text_config.attention_dropout, chat.context_length(config)) == (0.0, 77)
    config = chat.load_config(str(tmp_path / "biogpt"))
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.layerdrop) == (0.0, 0.0, 0.0)
