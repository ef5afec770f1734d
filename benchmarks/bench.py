"""RLFusion, TRL and another revision at the same work, in turn: seconds a step, tokens a second, memory, the floor.

    pip install trl  # for this benchmark only; or in another environment: --trl-python PATH
    python benchmarks/bench.py --model SmolLM2-135M-Instruct --output bench
    python benchmarks/bench.py --model SmolLM2-135M-Instruct --output bench-quick --quick
    git worktree add ../old REVISION; python benchmarks/bench.py --model tiny --output bench-old --rivals --old ../old

The work, in float32 on a CPU and under bf16 autocast on a GPU, TRL's gradient checkpointing off but for `tuned`'s try:

    sft       16 conversations of 40 to 315 tokens (SmolLM2's), the answers train
    grpo      4 prompts x 8 completions of exactly 128 tokens, rewards 0 and 1 in turn: no group is without a gradient
    natural   likewise, but completions end where the model ends them (at most 256), and the rewards are real
    distill   16 completions of exactly 128 tokens, --teacher the teacher
    lora      2 prompts x 8 completions of exactly 48 tokens, adapters of rank 8 (TRL: by peft, likewise)
    startup   until --help has ended, until the first step of `tiny` begins (TRL: of trl_step.py) and until its rollout
              ends (TRL: of its command line, `trl grpo`)

Every measurement is a process of its own, which takes --steps steps: the last one counts (of `natural`, whose steps
differ, the mean), and the peak of the whole process. Ours runs with default flags, and so does `old`, the checkout that
--old names, with --old-python. TRL runs with its defaults (`default`: the batch at once) and as fast as we could make
it (`tuned`: before the rounds, each of TUNED runs once; the fastest competes). Ratios are ours to theirs within a
round.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
import tyro

import chat
import common
import envs

HERE = Path(__file__).resolve().parent
GROUPED = {"train_sampling_strategy": "group_by_length"}
TUNED = {  # settings of TRL that are tried: examples a pass and passes a step, and others
    "sft": [(2, 8, {}), (4, 4, {}), (2, 8, GROUPED), (8, 2, {"gradient_checkpointing": True})],
    "grpo": [(4, 8, {}), (8, 4, {}), (2, 16, {})],
    "natural": [(4, 8, {}), (8, 4, {})],
    "distill": [(4, 4, {}), (2, 8, {}), (8, 2, {})],
    "lora": [(4, 4, {}), (8, 2, {}), (2, 8, {})],
}
DEFAULT = {"sft": (16, 1, {}), "grpo": (32, 1, {}), "natural": (32, 1, {}), "distill": (16, 1, {}), "lora": (16, 1, {})}
FORCED = {"grpo": 128, "distill": 128, "lora": 48}  # tokens of each completion
RATIOS = {"step": "time/step", "rollout": "time/rollout", "train": "time/train", "memory": "perf/peak_memory_gb"}
KEPT = ("time", "perf", "completion/len", "policy/computed")  # of our metrics
ENVIRONMENT = """import itertools, json, pathlib, envs
turn = itertools.count()
class Alternating(envs.EnvBase):
    def get_reward(self, completion):
        return float(next(turn) % 2)
def dataset():
    return [Alternating(json.loads(line)["prompt"]) for line in pathlib.Path(PATH).read_text().splitlines()]
"""
FIRST_REWARD = """def reward(completions, **_):
    print("rewarding", flush=True)
    return [float(i % 2) for i in range(len(completions))]
"""


@dataclass
class Args:
    model: str
    """folder of the model, or a bundled one: tiny, tiny-teacher"""
    output: str
    """folder for raw.json and what the processes wrote; must be new"""
    teacher: str | None = None
    """of `distill`; None: the model itself"""
    tasks: tuple[str, ...] = ("sft", "grpo", "natural", "distill", "startup")
    rivals: tuple[str, ...] = ("default", "tuned")
    """of TRL; none: only --old is"""
    old: str | None = None
    """a checkout of another revision, whose scripts run in turn as the rival `old`"""
    old_python: str = sys.executable
    old_own_products: bool = False
    """`old` leaves products to PyTorch, where that revision would have oneDNN compute them"""
    rounds: int = 3
    steps: int = 2
    """of each process; the optimizer's moments exist from the end of the first one on"""
    trl_python: str = sys.executable
    """of an environment with TRL"""
    quick: bool = False
    """one round of sft and grpo against tuned TRL, and startup: about 10 minutes on two cores"""


def write_data(model: str, folder: Path) -> dict[str, list]:
    """The files that both sides read; (tokens, trained tokens) of each conversation, and tokens of each prompt."""
    tokenizer = chat.load_tokenizer(model)
    dataset = envs.load_dataset("math", "train", num_samples=16)
    words = "the a of model answer to train why is this that number when we add two and three it because so not yes"
    rows, sizes, overhead = [], [], len(common.encode_prompt(tokenizer, [{"role": "user", "content": ""}]))
    for i in range(16):
        count = round(40 * 8.5 ** ((i + 0.5) / 16)) - overhead - 2  # words, about one token each, two thirds to train
        text = (words.split() * 20)[i : i + max(count, 3)]
        turns = zip(("user", "assistant"), (text[: len(text) // 3], text[len(text) // 3 :]), strict=True)
        rows.append({"messages": [{"role": role, "content": " ".join(part)} for role, part in turns]})
        ids, mask = common.encode_chat(tokenizer, rows[-1]["messages"])
        sizes.append((len(ids), sum(mask)))
    prompts = [{"prompt": dataset[i].prompt, "answer": dataset[i].answer} for i in range(16)]
    own = {"sft": rows, "distill": prompts, "grpo": prompts[:4], "natural": prompts[:4], "lora": prompts[:2]}
    for name, lines in own.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("grpo", "lora"):
        code = ENVIRONMENT.replace("PATH", repr(str(folder / f"{name}.jsonl")))
        (folder / f"alternating_{name}.py").write_text(code)
    return {"sft": sizes, "prompts": [len(common.encode_prompt(tokenizer, row["prompt"])) for row in prompts]}


def run(command: list[str], log: Path, **variables: str) -> list[tuple[float, str]]:
    """The lines a process printed, each with the seconds since its launch. Raises when it fails."""
    started, lines = time.time(), []
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"} | variables
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        for line in process.stdout or []:
            lines.append((time.time() - started, line))
    log.write_text("".join(line for _, line in lines))
    if process.returncode:
        raise chat.UserError(f"{' '.join(command)} failed, see {log}: {lines[-1][1].strip() if lines else ''}")
    return [(time.time() - started, ""), *lines]


def ours(task: str, args: Args, folder: Path, name: str, old: bool = False) -> dict[str, float]:
    """A run of our script, or with `old` of that revision's."""
    flags: list[Any] = ["--model", args.model, "--num-steps", args.steps, "--eval-steps", 0, "--learning-rate", 1e-6]
    flags += ["--output-dir", folder / name, "--logging-steps", 1, "--saving-steps", 1000]
    data, forced = folder / f"{task}.jsonl", FORCED.get(task, 0)
    if task == "sft":
        script: list[Any] = ["sft", "--dataset", data, "--batch-size", 16]
    elif task == "natural":
        script = ["grpo", "--dataset", data, "--batch-size", 4]
    elif task in ("grpo", "lora"):
        size = ["--batch-size", 4] if task == "grpo" else ["--batch-size", 2, "--lora-rank", 8]
        script = ["grpo", "--dataset", f"{folder / f'alternating_{task}.py'}:dataset", *size]
    else:
        script = ["onpolicy_distill", "--dataset", data, "--batch-size", 16]
        script += ["--teacher-model", args.teacher or args.model]
    script += ["--max-new-tokens", forced] if forced else []
    variables = {"BENCH_ROOT": str(Path(args.old).resolve()) if old and args.old else ""}
    variables |= {
        "BENCH_NATURAL": "" if forced else "1",
        "BENCH_OWN_PRODUCTS": "1" if old and args.old_own_products else "",
    }
    command = [args.old_python if old else sys.executable, HERE / "forced_length.py", *script, *flags]
    run([*map(str, command)], folder / f"{name}.log", **variables)
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    kept = {"time/rollout": 0.0} | {k: v for k, v in lines[-1].items() if k.startswith(KEPT)}
    return mean_of_steps(lines, kept) if task == "natural" else kept


def mean_of_steps(lines: list[dict[str, float]], last: dict[str, float]) -> dict[str, float]:
    return {k: v if k.startswith("perf/peak") else statistics.mean(line[k] for line in lines) for k, v in last.items()}


def theirs(task: str, args: Args, folder: Path, name: str, setting: tuple[int, int, dict]) -> dict[str, float]:
    size, passes, options = setting
    config = {"task": task, "model": args.model, "data": str(folder / f"{task}.jsonl"), "steps": args.steps}
    config |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": passes, **options}
    if task == "distill":
        config["teacher"] = args.teacher or args.model
    if task in FORCED:
        config["forced"] = FORCED[task]
    if task == "lora":
        config |= {"task": "grpo", "lora": 8}
    printed = run([args.trl_python, str(HERE / "trl_step.py"), json.dumps(config)], folder / f"{name}.log")
    steps = [json.loads(line) for _, line in printed if line.startswith('{"step"')]
    result = mean_of_steps(steps, steps[-1]) if task == "natural" else steps[-1]
    return result | {"time/train": result["time/step"] - result["time/rollout"]}


def machine() -> dict[str, float]:
    """FLOP/s of a 2048-cubed product in the computing dtype, and bytes a second of reading 256 MB."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = common.pick_compute(SimpleNamespace(dtype="auto", micro_batch_tokens=None), device)[0]
    a, b = torch.randn(2, 2048, 2048, device=device, dtype=dtype)
    x = torch.randn(2**26, device=device)

    def seconds(function: Any, repeats: int) -> float:
        for count in (1, repeats):
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(count):
                function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / repeats

    return {"flops": 2 * 2048**3 / seconds(lambda: a @ b, 20), "bytes": 2**28 / seconds(x.sum, 10)}


def needed(task: str, args: Args, sizes: dict[str, list], speed: dict[str, float]) -> dict[str, float]:
    """The floor in seconds: FLOPs, without padding and recomputation, over the measured rate.

    A decoding step takes its FLOPs or the reading of the weights, whichever is longer. `once`: a prefix that sequences
    share is counted once (of SFT's conversations: what the template writes before each; of completions: their prompt).
    """
    config = chat.load_config(args.model)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    trunk = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)

    def forward(sequences: list[tuple[int, int]], shared: int) -> float:
        attention = sum(2 * tokens**2 * width * config.num_hidden_layers for tokens, _ in sequences)  # causal
        computed = sum(tokens for tokens, _ in sequences) - shared
        return 2 * trunk * computed + 2 * head.weight.numel() * sum(trained for _, trained in sequences) + attention

    if task == "sft":
        template = len(common.encode_prompt(chat.load_tokenizer(args.model), [{"role": "user", "content": ""}]))
        sequences, shared, passes = sizes["sft"], 15 * (template - 5), 3  # a backward pass is two forward ones
        decoding = 0.0
    else:
        own = sizes["prompts"][: {"grpo": 4, "lora": 2}.get(task)]
        prompts = own if task == "distill" else own * 8
        shared, length = 0 if task == "distill" else 7 * sum(own), FORCED[task]
        sequences = [(tokens + length, length) for tokens in prompts]
        passes = {"distill": 4, "grpo": 3, "lora": 2}[task]  # a frozen weight has no gradient
        weights = trunk + head.weight.numel()
        step = max(2 * weights * len(prompts) / speed["flops"], 4 * weights / speed["bytes"])
        decoding = length * step + 2 * trunk * (sum(prompts) - shared) / speed["flops"]
    result = {"rollout": decoding, "train": passes * forward(sequences, 0) / speed["flops"]}
    return result | {"train, shared prefixes once": passes * forward(sequences, shared) / speed["flops"]}


def spread(values: list[float], form: str = "{:.2f}") -> str:
    return " ".join(form.format(v) for v in (statistics.median(values), min(values), max(values)))


def first_step(args: Args, folder: Path, name: str, old: bool = False) -> dict[str, float]:
    """Seconds from the launch of grpo.py on `tiny` until its first step begins, and until its first rollout ends."""
    python, root = (args.old_python, Path(args.old)) if old and args.old else (sys.executable, HERE.parent)
    flags = ["--num-steps", "1", "--eval-steps", "0", "--batch-size", "4", "--max-new-tokens", "32"]
    flags += ["--output-dir", str(folder / name)]
    launched = time.time()
    run([python, str(root.resolve() / "grpo.py"), *flags], folder / f"{name}.log")
    logged = (folder / name / "metrics.jsonl").stat().st_mtime - launched  # its one line, at the end of the step
    metrics = json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[0])
    return {"first step begins": logged - metrics["time/step"], "first rollout ends": logged - metrics["time/train"]}


def startup(args: Args, folder: Path, n: int) -> dict[str, float]:
    """Seconds from launch: of --help, and until the first step of GRPO on `tiny` begins, ours and the rivals'."""
    result, name = {}, f"startup-{n}"
    for script in ("sft", "grpo", "onpolicy_distill", "evaluate"):
        command = [sys.executable, str(HERE.parent / f"{script}.py"), "--help"]
        result[f"{script} --help"] = run(command, folder / "help.log")[0][0]
    result |= {f"ours: {words}": seconds for words, seconds in first_step(args, folder, name).items()}
    if args.old:
        old = first_step(args, folder, f"{name}-old", old=True)
        result |= {f"old: {words}": seconds for words, seconds in old.items()}
    if not args.rivals:
        return result
    config = {"task": "grpo", "model": common.BUNDLED["tiny"], "data": str(folder / "grpo.jsonl"), "steps": 1}
    config |= {"per_device_train_batch_size": 32, "forced": 32}
    launched = time.time()
    printed = run([args.trl_python, str(HERE / "trl_step.py"), json.dumps(config)], folder / f"{name}-trl.log")
    begun = next(json.loads(line) for _, line in printed if line.startswith('{"step"'))["begun_at"]
    result["trl: first step begins"] = begun - launched
    (folder / "prompts").mkdir(exist_ok=True)
    (folder / "prompts" / "train.jsonl").write_text((folder / "grpo.jsonl").read_text())
    (folder / "first_reward.py").write_text(FIRST_REWARD)
    flags = ["--model_name_or_path", common.BUNDLED["tiny"], "--dataset_name", str(folder / "prompts")]
    flags += ["--reward_funcs", "first_reward.reward", "--per_device_train_batch_size", "32", "--max_steps", "1"]
    flags += ["--max_completion_length", "32", "--save_strategy", "no", "--output_dir", str(folder / f"{name}-cli")]
    flags += ["--report_to", "none"] + ["--use_cpu"] * (not torch.cuda.is_available())
    trl = str(Path(args.trl_python).parent / "trl")
    lines = run([trl, "grpo", *flags], folder / f"{name}-cli.log", PYTHONPATH=str(folder))
    return result | {"trl grpo: first rollout ends": next(t for t, line in lines if "rewarding" in line)}


def try_settings(task: str, args: Args, folder: Path, raw: dict[str, Any]) -> tuple[int, int, dict]:
    """The fastest of TRL's settings for the task, each tried once."""
    tried = []
    for n, setting in enumerate(TUNED[task][: 1 if args.quick else None]):
        result = theirs(task, args, folder, f"{task}-try{n}", setting)
        tried.append((result["time/step"], setting))
        raw["tried"].append({"task": task, "setting": setting, **result})
        words = f"{result['time/step']:.1f} s, {result['perf/peak_memory_gb']:.1f} GB"
        print(f"{task:9} trying {setting}: {words}", flush=True)
    return min(tried, key=lambda pair: pair[0])[1]


def one_round(task: str, args: Args, folder: Path, n: int, settings: dict, sizes: dict[str, list]) -> dict[str, dict]:
    """Everybody in turn, each printed as a line."""
    results: dict[str, dict[str, float]] = {"machine": machine()}
    for who in ("ours", *["old"] * (args.old is not None), *settings):
        name = f"{task}-{n}-{who}"
        if who in settings:
            r = theirs(task, args, folder, name, settings[who])
        else:
            r = ours(task, args, folder, name, old=who == "old")
        length = r.get("completion/length_mean", r.get("length", FORCED.get(task)))
        completions = 16 if task in ("distill", "lora") else 32
        tokens = sum(count for count, _ in sizes["sft"]) if task == "sft" else completions * length
        results[who] = r | {"perf/tokens_per_second": tokens / r["time/step"]}
        parts = f"{r['time/step']:6.1f} s = rollout {r['time/rollout']:.1f} + train {r['time/train']:.1f}"
        more = f"{tokens / r['time/step']:.0f} tokens/s, {r['perf/peak_memory_gb']:.1f} GB"
        print(f"{task:9} round {n} {who:8} {parts}, {more}", flush=True)
    return results


def main(args: Args) -> None:
    folder = Path(args.output).resolve()
    if folder.exists():
        raise chat.UserError(f"--output {folder} exists: choose another")
    folder.mkdir(parents=True)
    args.model = str(Path(common.BUNDLED.get(args.model, args.model)).resolve())
    if args.quick:
        args.tasks, args.rivals, args.rounds = ("sft", "grpo", "startup"), ("tuned",), 1
    sizes = write_data(args.model, folder)
    raw: dict[str, Any] = {"args": vars(args), "threads": torch.get_num_threads(), "rounds": [], "tried": []}
    print(f"{Path(args.model).name}, {raw['threads']} threads, torch {torch.__version__}")
    for task in args.tasks:
        if task == "startup":
            raw["startup"] = [startup(args, folder, n) for n in range(args.rounds)]
            for name in raw["startup"][0]:
                print(f"startup   {name:28} {spread([r[name] for r in raw['startup']])} s", flush=True)
            continue
        settings = {rival: DEFAULT[task] for rival in args.rivals}
        if "tuned" in settings:
            settings["tuned"] = try_settings(task, args, folder, raw)
        rounds = []
        for n in range(args.rounds):
            rounds.append(one_round(task, args, folder, n, settings, sizes))
            raw["rounds"].append({"task": task, "round": n, **rounds[-1]})
            (folder / "raw.json").write_text(json.dumps(raw, indent=2) + "\n")
        for rival in rounds[0].keys() - {"machine", "ours"}:
            for name, key in RATIOS.items():
                ratios = [r["ours"][key] / r[rival][key] for r in rounds if r[rival][key]]
                if ratios:
                    print(f"{task:9} {name} to {rival}: {spread(ratios)}  (median, min, max)", flush=True)
        if task != "natural":
            speed = {key: statistics.median([r["machine"][key] for r in rounds]) for key in rounds[0]["machine"]}
            floor = needed(task, args, sizes, speed)
            print(f"{task:9} machine: {speed['flops'] / 1e9:.0f} GFLOP/s, {speed['bytes'] / 1e9:.0f} GB/s")
            for name, seconds in floor.items():
                took = statistics.median([r["ours"][f"time/{name.split(',')[0]}"] for r in rounds])
                if seconds:
                    print(f"{task:9} floor of {name}: {seconds:.1f} s, {seconds / took:.0%} of ours", flush=True)
            raw[f"floor of {task}"] = floor | speed
    (folder / "raw.json").write_text(json.dumps(raw, indent=2) + "\n")


if __name__ == "__main__":
    common.run(main, tyro.cli(Args))
