"""Both estimators have the gradient they claim, by hand, enumerated and through the model; teachers that do not fit."""

import functools
import itertools
import json
import math

import pytest
import torch
from conftest import read_metrics, run_main
from safetensors.torch import load_file
from torch.autograd import gradcheck
from transformers import AutoTokenizer

import common
import onpolicy_distill
from envs import UserError
from onpolicy_distill import reverse_kl_loss, sampled_kl_loss

F64 = torch.float64
CPU = torch.device("cpu")


def tensor(*values):
    return torch.tensor(values, dtype=F64)


# ---- Values and gradients by hand


def test_reverse_kl_value_and_gradient_by_hand():
    """pi = (3/4, 1/4), q = (1/2, 1/2): KL = 3/4 log(3/2) + 1/4 log(1/2), its slope pi_v (log pi_v/q_v - KL)."""
    student = tensor(math.log(3), 0.0).requires_grad_()
    loss, sums = reverse_kl_loss(student, tensor(5.0, 5.0), torch.tensor(1), denominator=4)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert loss.item() == pytest.approx(kl / 4)
    assert sums["loss/reverse_kl"].item() == pytest.approx(kl)
    assert sums["teacher/entropy"].item() == pytest.approx(math.log(2))
    loss.backward()
    expected = tensor(0.75 * (math.log(1.5) - kl), 0.25 * (math.log(0.5) - kl)) / 4
    torch.testing.assert_close(student.grad, expected)


def test_sampled_value_and_gradient_by_hand():
    """The value is the mean log-ratio; the gradient in log pi is the log-ratio itself, not 1."""
    logprobs = tensor([0.0, -1.0, -2.0]).requires_grad_()
    teacher, mask = tensor([0.0, -1.5, -0.5]).requires_grad_(), torch.tensor([[0, 1, 1]])
    loss, sums = sampled_kl_loss(logprobs, teacher[None], mask, denominator=2)
    assert loss.item() == pytest.approx((0.5 - 1.5) / 2)
    assert sums["loss/reverse_kl"].item() == pytest.approx(0.5 - 1.5)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, tensor([0.0, 0.5, -1.5]) / 2)
    assert teacher.grad is None


def random_case(rows=3, width=4, vocab=5):
    torch.manual_seed(0)
    student, teacher = torch.randn(rows, width, vocab, dtype=F64), torch.randn(rows, width, vocab, dtype=F64)
    return student, teacher, torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1]])


def test_reverse_kl_is_the_naive_sum_and_passes_finite_differences():
    student, teacher, mask = random_case()
    total = 0.0
    for b, t in itertools.product(range(3), range(4)):
        if mask[b, t]:
            p, q = student[b, t].softmax(-1).tolist(), teacher[b, t].softmax(-1).tolist()
            total += sum(x * (math.log(x) - math.log(y)) for x, y in zip(p, q, strict=True))
    loss, _ = reverse_kl_loss(student, teacher, mask, denominator=6)
    assert loss.item() == pytest.approx(total / 6, rel=1e-12)
    student.requires_grad_()
    assert gradcheck(lambda s: reverse_kl_loss(s, teacher, mask, denominator=6)[0], (student,))


def test_what_is_masked_never_counts_and_nothing_trained_stays_finite():
    student, teacher, mask = random_case()
    broken = student.masked_fill(~mask[..., None].bool(), math.nan)
    one, other = (reverse_kl_loss(logits, teacher, mask, denominator=6)[0] for logits in (student, broken))
    assert torch.equal(one, other)
    nothing = torch.zeros_like(mask)
    for loss, sums in (
        reverse_kl_loss(student.requires_grad_(), teacher, nothing, denominator=6),
        reverse_kl_loss(student[:0, 0], teacher[:0, 0], nothing[:0, 0], denominator=6),
        sampled_kl_loss(student[..., 0], teacher[..., 0], nothing, denominator=6),
    ):
        (gradient,) = torch.autograd.grad(loss, student)
        assert (loss.item(), gradient.abs().max().item()) == (0.0, 0.0)
        assert not any(sums.values())


# ---- Whose gradient it is: all completions of a tiny language, enumerated

VOCAB, END, LONGEST = 3, 2, 3


def prefixes():
    """Every sequence of tokens that has not ended, in which a token is still to come."""
    return [p for n in range(LONGEST) for p in itertools.product(range(VOCAB), repeat=n) if END not in p]


def completions():
    whole = itertools.product(range(VOCAB), repeat=LONGEST)
    return {c[: c.index(END) + 1] if END in c else c for c in whole}


@pytest.fixture
def language():
    """Logits of each prefix, of a student and a teacher."""
    torch.manual_seed(3)
    index = {prefix: i for i, prefix in enumerate(prefixes())}
    student = torch.randn(len(index), VOCAB, dtype=F64, requires_grad=True)
    return index, student, torch.randn(len(index), VOCAB, dtype=F64)


def positions(index, completion):
    return torch.tensor([index[completion[:t]] for t in range(len(completion))])


def expected_gradient(language, loss_of_completion):
    """Sum over all completions of their probability, not differentiated, times the gradient of their loss."""
    index, student, _ = language
    total = torch.zeros_like(student)
    for completion in completions():
        rows, tokens = positions(index, completion), torch.tensor(completion)
        logprobs = student.log_softmax(-1)[rows, tokens]  # (T,)
        (gradient,) = torch.autograd.grad(loss_of_completion(rows, tokens, logprobs), student)
        total += logprobs.sum().exp().detach() * gradient
    return total


def estimators(language, denominator):
    """The two losses and the wrong one, of a completion."""
    _, student, teacher = language

    def full(rows, tokens, logprobs):
        return reverse_kl_loss(student[rows], teacher[rows], torch.ones(len(rows)), denominator=denominator)[0]

    def sampled(rows, tokens, logprobs):
        scores = teacher.log_softmax(-1)[rows, tokens]
        ones = torch.ones(1, len(rows))
        return sampled_kl_loss(logprobs[None], scores[None], ones, denominator=denominator)[0]

    def log_ratio(rows, tokens, logprobs):
        return (logprobs - teacher.log_softmax(-1)[rows, tokens]).sum() / denominator

    return full, sampled, log_ratio


def test_both_estimators_have_the_gradient_of_the_kl_with_prefixes_held_fixed(language):
    """Sum over t of E[KL_t], the probability of each prefix a constant: no credit to later tokens."""
    index, student, teacher = language
    objective = 0.0
    for prefix, row in index.items():
        reach = math.exp(sum(student.log_softmax(-1)[index[prefix[:t]], prefix[t]].item() for t in range(len(prefix))))
        objective = objective + reach * reverse_kl_loss(student[row], teacher[row], torch.tensor(1), denominator=7)[0]
    (exact,) = torch.autograd.grad(objective, student)
    full, sampled, log_ratio = estimators(language, 7)
    torch.testing.assert_close(expected_gradient(language, full), exact, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(expected_gradient(language, sampled), exact, rtol=1e-12, atol=1e-14)
    assert exact.abs().max() > 1e-3
    assert expected_gradient(language, log_ratio).abs().max() < 1e-15  # the well-known wrong one has none


# ---- Through the model


def two_models():
    return (common.ChunkedLM(common.load_model(name, CPU)) for name in ("tiny", "tiny-teacher"))


@pytest.mark.parametrize("loss", ["full", "sampled"])
def test_chunked_loss_of_the_model_is_that_of_its_whole_logits(monkeypatch, loss):
    """Seven positions a chunk, at a temperature; the log-probs that come with it are those of the sampled tokens."""
    monkeypatch.setattr(common, "HEAD_LOGITS", 7 * 299)
    student, teacher = two_models()
    torch.manual_seed(0)
    ids, ones = torch.randint(3, 250, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask = ones.clone()
    mask[:, :4], mask[1, 9:] = 0, 0
    args = onpolicy_distill.Args(loss=loss, temperature=0.7)
    chunk_fn = functools.partial(onpolicy_distill.loss_of_chunk, teacher=teacher, args=args, denominator=21.0)
    with torch.no_grad():
        states = teacher.states(ids, ones, mask)
    value, kl, teacher_entropy, logprobs_of_chunks = student(ids, ones, mask, 0.7, chunk_fn, states)
    student_logits, teacher_logits = (lm.model(ids).logits[:, :-1] / 0.7 for lm in (student, teacher))
    whole, sums = reverse_kl_loss(student_logits, teacher_logits, mask[:, 1:], denominator=21.0)
    logprobs, scores = (
        t.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] for t in (student_logits, teacher_logits)
    )
    assert teacher_entropy.item() == pytest.approx(sums["teacher/entropy"].item(), rel=1e-4)
    if loss == "sampled":
        whole, sums = sampled_kl_loss(logprobs, scores, mask[:, 1:], denominator=21.0)
    weight = student.model.get_input_embeddings().weight
    (one,), (other,) = (torch.autograd.grad(scalar, weight) for scalar in (value, whole))
    assert (one - other).abs().max() < 1e-5 * other.abs().max()
    assert kl.item() == pytest.approx(sums["loss/reverse_kl"].item(), rel=1e-4)
    torch.testing.assert_close(logprobs_of_chunks, logprobs[mask[:, 1:].bool()], rtol=1e-4, atol=1e-5)


def widened(name, rows):
    """The same model with more rows in its head than there are tokens, all of them likelier than any token."""
    model = common.load_model(name, CPU)
    known = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(known + rows, mean_resizing=False)
    head = torch.nn.Linear(model.config.hidden_size, known + rows)
    with torch.no_grad():
        head.weight.copy_(model.get_input_embeddings().weight)
        head.weight[known:], head.bias[:known], head.bias[known:] = 0, 0, 50.0
    model.lm_head = head
    return common.ChunkedLM(model, vocab_size=known)


def test_padded_vocabulary_rows_are_neither_sampled_nor_in_the_loss(tokenizer):
    prompts = [common.encode_prompt(tokenizer, [{"role": "user", "content": f"What is {i} + 7?"}]) for i in range(4)]
    drawn, results = [], []
    for student, teacher in (two_models(), (widened("tiny", 21), widened("tiny-teacher", 5))):
        engine = common.HFEngine(student, tokenizer, 4000)
        drawn.append(engine.generate(prompts, [1, 2, 3, 4], max_new_tokens=12, temperature=1.0))
        ids, attention_mask, mask, engine_logprobs = common.collate([drawn[-1][0].after(prompts[0])], CPU)
        args = onpolicy_distill.Args()
        chunk_fn = functools.partial(onpolicy_distill.loss_of_chunk, teacher=teacher, args=args, denominator=1.0)
        with torch.no_grad():
            states = teacher.states(ids, attention_mask, mask)
            loss, _, _, logprobs = student(ids, attention_mask, mask, 1.0, chunk_fn, states)
        results.append((loss.item(), logprobs.sum().item()))
        assert logprobs.sum().item() == pytest.approx(engine_logprobs.sum().item(), rel=1e-3)
    assert [c.token_ids for c in drawn[0]] == [c.token_ids for c in drawn[1]]
    assert results[0] == pytest.approx(results[1], rel=1e-4)


# ---- The script


def test_other_tokenizers_are_refused_by_their_first_token(tmp_path, tokenizer):
    other = AutoTokenizer.from_pretrained(common.BUNDLED["tiny"])
    other.add_tokens(["<one more>"])
    with pytest.raises(UserError, match=r"token 299 is None in the student's and '<one more>'"):
        onpolicy_distill.check_tokenizers(tokenizer, other)
    onpolicy_distill.check_tokenizers(tokenizer, common.load_tokenizer("tiny-teacher"))
    other.save_pretrained(tmp_path)  # a tokenizer alone: it is refused before any model is loaded
    flags = ["--num-steps", 1, "--eval-steps", 0, "--output-dir", tmp_path / "run", "--teacher-model", tmp_path]
    done = run_main("onpolicy_distill.py", *flags)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr
    assert "different tokenizers: token 299" in done.stderr


SMALL = ["--num-steps", 2, "--batch-size", 4, "--max-new-tokens", 24, "--output-dir"]


@pytest.mark.parametrize("loss", ["full", "sampled"])
def test_the_script_writes_its_folder_and_never_the_teacher(tmp_path, loss):
    done = run_main("onpolicy_distill.py", *SMALL, tmp_path / "run", "--eval-samples", 4, "--loss", loss)
    assert done.returncode == 0, done.stderr
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert "eval/accuracy" in lines[0]
    assert "eval/accuracy" in lines[2]
    assert {"loss/reverse_kl", "teacher/entropy", "policy/entropy", "reward/mean", "optim/grad_norm"} <= set(lines[1])
    assert lines[1]["policy/logprob_gap"] < 1e-4
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    assert (record["teacher_model"], record["loss"], record["learning_rate"]) == ("tiny-teacher", loss, 3e-4)
    names = load_file(tmp_path / "run" / "step_2" / "model.safetensors").keys()
    assert names | {"lm_head.weight"} == load_file(f"{common.BUNDLED['tiny']}/model.safetensors").keys()  # tied
    moments = load_file(tmp_path / "run" / "step_2" / "optimizer.safetensors")
    assert len({name.split(".")[0] for name in moments}) == len(names)
    records = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1] * 4 + [2] * 4
    assert set(records[0]) == {"step", "prompt", "completion", "finish_reason", "reward"}


def test_prompts_need_no_answer_and_no_reward(tmp_path):
    lines = [json.dumps({"prompt": f"What is {i} + 3?"}) for i in range(9)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    done = run_main("onpolicy_distill.py", *SMALL, tmp_path / "run", "--dataset", tmp_path / "prompts.jsonl")
    assert done.returncode == 0, done.stderr
    assert "no evaluation" in done.stdout
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert not any(name.startswith(("reward/", "eval/")) for name in lines[0])
    assert "loss/reverse_kl" in lines[0]
