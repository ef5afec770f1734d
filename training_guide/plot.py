"""Draw the metrics of any runs: runs that differ in their seed only become one line, their mean, in a band from the
smallest to the largest of them.

    python training_guide/plot.py runs/* --metrics eval/accuracy reward/mean --x samples --output curves.png

Needs matplotlib: pip install -e ".[plot]". What differs between the lines, the legend tells.
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

# Of args.json, what makes no line of its own.
NO_FLAGS = {"resumed_from", "git_revision", "versions", "device", "dropped", "engine_version", "correction"}
NO_MATTER = {"seed", "output_dir", "resume", "saving_steps", "logging_steps"}
NO_MATTER |= {"enable_wandb", "wandb_project", "wandb_run_name"} | NO_FLAGS


@dataclass
class Args:
    runs: tyro.conf.Positional[list[Path]]
    """run folders; what has no args.json and metrics.jsonl, such as an evaluation, is left out"""
    metrics: list[str] = field(default_factory=lambda: ["eval/accuracy"])
    """what to draw, a panel each; a run without a metric is left out of its panel"""
    x: Literal["step", "samples"] = "step"
    """the horizontal axis: steps, or completions (SFT: conversations) seen over all processes"""
    smooth: int = 1
    """draw the mean of so many logged steps in a row; eval/* is drawn as it is"""
    output: Path = Path("curves.png")
    """the picture; .svg and .pdf work too"""


@dataclass
class Run:
    flags: dict[str, Any]  # and what was chosen at start-up
    lines: list[dict[str, float]]  # of metrics.jsonl


def load(folder: Path) -> Run:
    """A run, also one that is still writing: its last line may be half there."""
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    return Run(json.loads((folder / "args.json").read_text()), [json.loads(n) for n in lines if n.endswith("\n")])


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
        labels[" ".join(words) + f" ({len(members)} seeds)" * (len(members) > 1)] = members
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
    groups = group([load(folder) for folder in chosen])
    figure, axes = plt.subplots(1, len(args.metrics), figsize=(6 * len(args.metrics), 3.6), squeeze=False)
    for axis, metric in zip(axes[0], args.metrics, strict=True):
        for label, runs in groups.items():
            at, mean, smallest, largest = curve(runs, metric, args.x, args.smooth)
            if len(at):
                axis.plot(at, mean, label=label, marker="o" if len(at) < 30 else "", markersize=3)
                axis.fill_between(at, smallest, largest, alpha=0.2, linewidth=0)
        if not axis.lines:
            return fail(f"no run has {metric}")
        axis.set(xlabel=args.x, ylabel=metric)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(args.output, dpi=120)
    print(f"saved {args.output}: {len(chosen)} of {len(args.runs)} folders, {len(groups)} lines")


if __name__ == "__main__":
    main(tyro.cli(Args))
