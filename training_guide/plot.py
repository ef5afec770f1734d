"""Draw the metrics of any runs: runs that differ in their seed only become one line, their mean, in a band from the
smallest to the largest of them.

    python training_guide/plot.py runs/*
    python training_guide/plot.py runs/* --metrics eval/accuracy reward/mean --x samples --output curves.png

It reads args.json and metrics.jsonl, which every run has, with wandb or without. What differs between the lines, the
legend tells. Needs matplotlib: pip install -e ".[plot]".
"""

import json
import sys
import textwrap
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

# Of args.json, what makes no line of its own.
NO_FLAGS = {"resumed_from", "git_revision", "versions", "device", "dropped", "engine_version", "correction"}
NO_FLAGS |= {"attention"}  # --attn says what was asked for
NO_MATTER = {"seed", "output_dir", "resume", "saving_steps", "logging_steps"}
NO_MATTER |= {"enable_wandb", "wandb_project", "wandb_run_name"} | NO_FLAGS

# Drawn without --metrics, where a run has them: but not the loss of GRPO, which is near 0 and tells nothing.
PANELS = ["reward/mean", "eval/accuracy", "reward/zero_std_frac", "completion/length_mean", "policy/entropy"]
PANELS += ["policy/logprob_gap", "loss/reverse_kl", "loss/total", "eval/ce_loss"]
UNITS = {"eval/accuracy": "share", "time/rollout": "seconds", "time/train": "seconds", "time/step": "seconds"}
UNITS |= dict.fromkeys(("loss/total", "loss/reverse_kl", "loss/kl", "eval/ce_loss"), "nats a token")
UNITS |= dict.fromkeys(("policy/entropy", "policy/logprob_gap", "teacher/entropy"), "nats a token")
UNITS |= {"completion/length_mean": "tokens", "perf/peak_memory_gb": "GB", "policy/logprob_gap_max": "nats"}


@dataclass
class Args:
    runs: tyro.conf.Positional[list[Path]]
    """run folders; what has no args.json and metrics.jsonl, such as an evaluation, is left out"""
    metrics: list[str] = field(default_factory=list)
    """what to draw, a panel each, such as eval/accuracy; a run without a metric is left out of its panel. None: those
    that some run has of reward, accuracy, zero-std, length, entropy, gap, reverse KL, loss, held-out cross-entropy"""
    x: Literal["step", "samples"] = "step"
    """the horizontal axis: steps, or completions (SFT: conversations) seen over all processes"""
    smooth: int = 1
    """draw the mean of so many logged steps in a row; eval/* is drawn as it is"""
    output: Path = Path("curves.png")
    """the picture; .svg and .pdf work too"""


@dataclass
class Run:
    name: str  # of its folder
    flags: dict[str, Any]  # and what was chosen at start-up
    lines: list[dict[str, float]]  # of metrics.jsonl

    def draws(self, metric: str, asked: bool) -> bool:
        has = any(metric in line for line in self.lines)
        return has and (asked or (self.flags["script"], metric) != ("grpo", "loss/total"))


def load(folder: Path) -> Run:
    """A run, also one that is still writing: its last line may be half there."""
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    flags = json.loads((folder / "args.json").read_text())
    digest, parts = flags.pop("data", None), flags["dataset"].split(",")
    if digest and not any(part.startswith(("math", "reasoning_gym:")) for part in parts):  # those the seed draws
        flags["data"] = digest[:8]
    return Run(folder.resolve().name, flags, [json.loads(line) for line in lines if line.endswith("\n")])


def group(runs: list[Run]) -> dict[str, list[Run]]:
    """Label -> runs that differ in their seed only. The label names the script and the flags whose values differ."""
    groups = defaultdict(list)
    for run in runs:
        kept = {name: value for name, value in run.flags.items() if name not in NO_MATTER}
        groups[json.dumps(kept, sort_keys=True)].append(run)
    values = defaultdict(set)  # (script, flag) -> values
    for run in runs:
        for name in run.flags.keys() - NO_MATTER:
            values[run.flags["script"], name].add(str(run.flags[name]))
    labels = {}
    for members in groups.values():
        flags = members[0].flags
        differ = sorted(name for script, name in values if script == flags["script"] and len(values[script, name]) > 1)
        words = [flags["script"], *(f"{name.replace('_', '-')} {flags[name]}" for name in differ)]
        label = " ".join(words)
        if len(members) > 1:
            label += f" ({len(members)} seeds)"
        labels[label if label not in labels else f"{label}, {members[0].name}"] = (
            members  # of versions with other flags
        )
    return labels


def curve(runs: list[Run], metric: str, x: str, smooth: int) -> tuple[np.ndarray, ...]:
    """Where every run has the metric, and the mean, the smallest and the largest of the runs there, (points,) each."""
    series = []
    for run in runs:
        per_step = 1
        if x == "samples":
            per_step = run.flags["batch_size"] * run.flags.get("group_size", 1) * run.flags["num_processes"]
        points = [(line["step"] * per_step, line[metric]) for line in run.lines if metric in line]
        values = [value for _, value in points]
        width = 1 if metric.startswith("eval/") else smooth
        means = [np.mean(values[max(i + 1 - width, 0) : i + 1]) for i in range(len(values))]
        series.append(dict(zip((at for at, _ in points), means, strict=True)))
    common = sorted(set.intersection(*(set(s) for s in series)))
    values = np.array([[s[at] for at in common] for s in series])  # (runs, points)
    return np.array(common), values.mean(0), values.min(0), values.max(0)


def fail(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


def main(args: Args) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return fail('matplotlib is not installed: pip install -e ".[plot]"')
    chosen = [folder for folder in args.runs if (folder / "args.json").exists() and (folder / "metrics.jsonl").exists()]
    if not chosen:
        return fail(f"none of {', '.join(map(str, args.runs))} is the folder of a run")
    try:
        runs, asked = [load(folder) for folder in chosen], bool(args.metrics)
    except (ValueError, KeyError) as error:
        return fail(f"args.json or metrics.jsonl of a run is broken: {error!r}")
    metrics = args.metrics or [metric for metric in PANELS if any(run.draws(metric, asked) for run in runs)]
    if not metrics:
        return fail(f"{', '.join(map(str, chosen))}: nothing is logged yet")
    groups, columns, rows = group(runs), min(len(metrics), 3), -(-len(metrics) // 3)
    in_a_row = max(95 * columns // (max(map(len, groups)) + 8), 1)  # labels of the legend
    texts = {label: textwrap.fill(label, 105 * columns) for label in groups}
    height = 3.6 * rows + 0.17 * sum(text.count("\n") + 1 for text in texts.values()) / in_a_row
    figure, axes = plt.subplots(rows, columns, figsize=(6 * columns, height), squeeze=False, layout="constrained")
    handles = {}  # by their labels
    for axis, metric in zip(axes.flat, metrics, strict=False):
        for i, (label, members) in enumerate(groups.items()):
            drawn = [run for run in members if run.draws(metric, asked)]
            at, mean, smallest, largest = curve(drawn, metric, args.x, args.smooth) if drawn else [()] * 4
            if len(at):
                few, color = len(at) < 30, f"C{i}"  # a label has one color in all panels
                (handles[label],) = axis.plot(at, mean, color, marker="o" if few else "", markersize=3)
                axis.fill_between(at, smallest, largest, color=color, alpha=0.2, linewidth=0)
        if not axis.lines:
            return fail(f"no run has {metric}")
        axis.set(xlabel=args.x, ylabel=f"{metric} ({UNITS[metric]})" if metric in UNITS else metric)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(metrics) :]:
        axis.remove()
    places = {"loc": "outside lower center", "ncols": in_a_row}
    figure.legend(handles.values(), [texts[label] for label in handles], frameon=False, fontsize=8, **places)
    figure.savefig(args.output, dpi=120)
    print(f"saved {args.output}: {len(chosen)} of {len(args.runs)} folders, {len(groups)} lines")


if __name__ == "__main__":
    main(tyro.cli(Args))
