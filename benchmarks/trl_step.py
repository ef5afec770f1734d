"""One rival process of bench.py: a few steps of a TRL trainer, one JSON line each. Needs `pip install trl`.

python benchmarks/trl_step.py '{"task": "sft", "model": "SmolLM2-135M-Instruct", "data": "sft.jsonl", "steps": 2}'
"""

import itertools
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from datasets import Dataset
from transformers import TrainerCallback

import envs


class Timer(TrainerCallback):
    """Prints what each step took, the rollout apart, and the process's peak memory."""

    def __init__(self) -> None:
        self.rollout = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.rollout, self.begun = 0.0, time.perf_counter()
        self.begun_at = time.time()

    def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            memory = torch.cuda.max_memory_allocated() / 1e9
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        self.line = {"step": state.global_step, "time/step": time.perf_counter() - self.begun}
        self.line |= {"time/rollout": self.rollout, "perf/peak_memory_gb": memory, "begun_at": self.begun_at}

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:  # not the line of the end
            kept = {"loss": "loss", "completions/mean_length": "length", "reward": "reward"}
            print(json.dumps(self.line | {new: float(logs[old]) for old, new in kept.items() if old in logs}))

    def around(self, function: Any) -> Any:
        """`function`, its time added to the step's rollout."""

        def timed(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **options)
            self.rollout += time.perf_counter() - started
            return result

        return timed


def finish(trainer: Any, save: str) -> None:
    trainer.train()
    if save:
        trainer.save_model(save)


def main(
    task: str,
    model: str,
    data: str,
    steps: int,
    teacher: str = "",
    forced: int = 0,
    lora: int = 0,
    save: str = "",
    **options: Any,
) -> None:
    """`forced`: every completion has that many tokens; 0: they end where the model ends them. `lora`: a rank.

    `save`: a folder for the trained model; "": it is not kept. `options` go to TRL's configuration.
    """
    on_gpu = torch.cuda.is_available()
    common: dict[str, Any] = {"output_dir": "/tmp/trl", "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    common |= {"max_steps": steps, "bf16": on_gpu, "use_cpu": not on_gpu, "learning_rate": 1e-6, "disable_tqdm": True}
    common |= {"gradient_checkpointing": False, "model_init_kwargs": {"dtype": "float32"}, "seed": 1}
    timer = Timer()
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    if task == "sft":
        from trl import SFTConfig, SFTTrainer

        pairs = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in rows]
        config: Any = SFTConfig(**common | options)
        trainer: Any = SFTTrainer(model, args=config, train_dataset=Dataset.from_list(pairs), callbacks=[timer])
        return finish(trainer, save)
    prompts = Dataset.from_list([{"prompt": row["prompt"], "solution": row["answer"]} for row in rows])
    common |= {"max_completion_length": forced or 256}
    if forced:
        common["generation_kwargs"] = {"min_new_tokens": forced}
    if task == "distill":
        from trl import DistillationConfig, DistillationTrainer

        common |= {"teacher_model_init_kwargs": {"dtype": "bfloat16" if on_gpu else "float32"}}
        config = DistillationConfig(**common | options)
        trainer = DistillationTrainer(model, teacher, args=config, train_dataset=prompts, callbacks=[timer])
    else:
        from trl import GRPOConfig, GRPOTrainer

        def real(completions: list, solution: list, **_: Any) -> list[float]:
            pairs = zip(completions, solution, strict=True)
            return [envs.MathEnv([], answer).get_reward(messages[-1]["content"]) for messages, answer in pairs]

        def alternating(completions: list, **_: Any) -> list[float]:
            return list(itertools.islice(itertools.cycle([0.0, 1.0]), len(completions)))

        config = GRPOConfig(**common | options)
        reward = alternating if forced else real
        adapters: dict[str, Any] = {}
        if lora:
            from peft import LoraConfig

            adapters["peft_config"] = LoraConfig(r=lora, lora_alpha=32, target_modules="all-linear")
        trainer = GRPOTrainer(model, reward, args=config, train_dataset=prompts, callbacks=[timer], **adapters)
    trainer._generate = timer.around(trainer._generate)
    finish(trainer, save)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
