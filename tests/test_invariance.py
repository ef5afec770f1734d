"""The gradient of a step does not depend on how the step is cut: micro-batches, padding, processes, chunks, skipping.

Gradients are captured from the real scripts by tests/capture.py, in float64 with the rollouts frozen.
"""

import itertools
import json
import shutil
import sys

import pytest
from capture import capture
from conftest import fine, read_metrics, record_of, run_script
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
SMALL = ["--num-steps", "1", "--max-grad-norm", "inf", "--learning-rate", "1e-3", "--warmup-steps", "0"]
GRPO = [*SMALL, "--group-size", "4", "--max-new-tokens", "12"]
LORA = ("grpo-dapo-kl", "sft", "distill-full")  # also by adapters
SPLIT = (*LORA, "distill-sampled", "lora-grpo-dapo-kl", "lora-distill-full")  # also by two processes that share a model
OBJECTIVES = {
    f"grpo-{loss}{'-kl' * kl}": ("grpo", [*GRPO, "--loss-type", loss, "--kl-penalty", f"{0.1 * kl}"])
    for loss in ("dapo", "grpo", "dr_grpo")
    for kl in (0, 1)
} | {"sft": ("sft", SMALL)}
DISTILL = [*SMALL, "--max-new-tokens", "12", "--temperature", "0.7"]
OBJECTIVES |= {f"distill-{loss}": ("onpolicy_distill", [*DISTILL, "--loss", loss]) for loss in ("full", "sampled")}
OBJECTIVES |= {f"lora-{o}": (s, [*flags, "--lora-rank", "4"]) for o, (s, flags) in OBJECTIVES.items() if o in LORA}
WHOLE = "100000"  # --micro-batch-tokens: one micro-batch
CUTS = {
    "one by one": {"tokens": "1"},
    "by some": {"tokens": "150"},
    "padded on the left": {"tokens": "400", "padding": "left"},
    "with checkpointing": {"tokens": WHOLE, "flags": ["--gradient-checkpointing"]},
    "small chunks of the head": {"tokens": WHOLE, "head_logits": 7 * 299},
    "nothing skipped": {"tokens": WHOLE, "no_skip": True},
}
FLAT = [2, 3]  # of the 4 prompts of a step these have equal rewards: with two processes, all that the second one has


def case(name, objective, prompts, *, tokens, flags=(), **options):
    script, own = OBJECTIVES[objective]
    size = prompts if script == "grpo" else 2 * prompts
    flags = [*own, "--batch-size", str(size), "--micro-batch-tokens", tokens, *flags]
    return {"name": name, "script": script, "flags": flags, "frozen": True, "float64": True, "flat": FLAT} | options


def launch(cases, folder, *, processes):
    if processes == 1:
        for each in cases:
            capture(each, folder)
    else:
        (folder / "cases.json").write_text(json.dumps(cases))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        fine(run_script("tests/capture.py", folder / "cases.json", folder, launcher=launcher, cwd=folder))
    for each in cases:
        assert record_of(folder / each["name"])["num_processes"] == processes


def result(folder, name, rank=0):
    gradients = {k: t for k, t in load_file(folder / f"{name}-{rank}.safetensors").items() if k[0].isdigit()}
    (line,) = read_metrics(folder / name)
    return gradients, {k: v for k, v in line.items() if not k.startswith(("time/", "perf/"))}


def distance(one, other):
    """Largest difference of two gradients, over the largest entry."""
    assert one.keys() == other.keys()
    assert len(one) > 40
    scale = max(t.abs().max() for t in one.values())
    assert scale > 1e-4
    return max((one[k] - other[k]).abs().max() for k in one) / scale


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every objective cut in every way by one process; each again by two, one by one."""
    alone, pair = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("pair")
    cases = [case(o, o, 4, tokens=WHOLE) for o in OBJECTIVES]
    cases += [case(f"{o} {cut}", o, 4, **options) for o in OBJECTIVES for cut, options in CUTS.items()]
    launch(cases, alone, processes=1)
    cases = [case(o, o, 2, tokens="60") for o in OBJECTIVES]
    options = {"flags": ["--shard", "--gradient-checkpointing"], "head_logits": 7 * 299}
    cases += [case(f"split {o}", o, 2, tokens="60", **options) for o in SPLIT]
    launch(cases, pair, processes=2)
    return alone, pair


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_process_cut_in_any_way(runs, objective, cut):
    gradients, metrics = result(runs[0], objective)
    other_gradients, other_metrics = result(runs[0], f"{objective} {cut}")
    assert distance(gradients, other_gradients) < 1e-9
    if cut == "nothing skipped":  # its loss/* and policy/* cover more tokens
        metrics, other_metrics = ({k: m[k] for k in m if k == "loss/total"} for m in (metrics, other_metrics))
    assert other_metrics == pytest.approx(metrics, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", [*OBJECTIVES, *(f"split {o}" for o in SPLIT)])
def test_two_processes_equal_one_with_twice_the_batch(runs, name):
    """And where each has the whole model they talk once, in the last micro-batch, although each has several."""
    alone, pair = runs
    gradients, metrics = result(alone, name.removeprefix("split "))
    for rank in (0, 1):
        other_gradients, other_metrics = result(pair, name, rank)
        assert distance(gradients, other_gradients) < 1e-9
        assert load_file(pair / f"{name}-{rank}.safetensors")["reductions"] == (not name.startswith("split"))
    assert other_metrics == pytest.approx(metrics, rel=1e-9, abs=1e-12)


def test_a_run_goes_on_with_more_or_fewer_processes(tmp_path):
    """From two that share the model to one that has it, and from one to two: five steps are five steps."""
    objectives = [*LORA, "lora-grpo-dapo-kl"]

    def go_on(name, processes, steps):
        flags = ["--num-steps", steps, "--lr-schedule", "constant", "--saving-steps", "3", "--resume"]
        flags += ["--shard"] if processes == 2 else []
        cases = [case(o, o, 4 // processes, tokens="60", flags=flags) for o in objectives]
        launch(cases, tmp_path / name, processes=processes)
        finals = [sorted((tmp_path / name / o / "final").rglob("*model.safetensors"))[0] for o in objectives]
        return [load_file(path) for path in finals]  # with LoRA the adapter, in float64

    tmp_path.joinpath("one").mkdir()
    straight = go_on("one", 1, "5")
    for objective in objectives:
        shutil.copytree(tmp_path / "one" / objective, tmp_path / "more" / objective)
        shutil.rmtree(tmp_path / "more" / objective / "step_5")
    tmp_path.joinpath("fewer").mkdir()
    three = go_on("fewer", 2, "3")
    for others in go_on("fewer", 1, "5"), go_on("more", 2, "5"):
        for objective, one, other, before in zip(objectives, straight, others, three, strict=True):
            assert distance(one, other) < (1e-6 if objective.startswith("lora") else 1e-9)  # peft loads float32
            assert distance(one, before) > 1e-4


def test_settings_of_the_launcher_change_nothing(runs, tmp_path, monkeypatch):
    """Accelerate reads them from the environment: autocast, and gradients of several steps added up. In float32."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    launch([case(o, o, 2, tokens="60", float64=False) for o in ("grpo-dapo", "sft")], tmp_path, processes=2)
    for objective in ("grpo-dapo", "sft"):
        assert distance(result(tmp_path, objective)[0], result(runs[0], objective)[0]) < 1e-4  # float32's precision
        one, other = (record_of(f / objective) for f in (tmp_path, runs[1]))
        one["output_dir"] = other["output_dir"]
        assert one == other


def test_the_frozen_step_is_worth_comparing(runs):
    """Unequal lengths, groups with and without a gradient, both ends of a completion, a process without any work."""
    _, metrics = result(runs[0], "grpo-dapo")
    assert metrics["reward/zero_std_frac"] == 0.5
    assert 0.2 < metrics["policy/computed_frac"] < 0.8
    assert 0 < metrics["completion/truncated_frac"] < 1
    assert 2 < metrics["completion/length_mean"] < 12
    assert result(runs[0], "grpo-dapo-kl")[1]["policy/computed_frac"] == 1
    objectives = [result(runs[0], f"grpo-{loss}")[0] for loss in ("dapo", "grpo", "dr_grpo")]
    objectives += [result(runs[0], f"distill-{loss}")[0] for loss in ("full", "sampled")]
    assert all(distance(a, b) > 0.01 for a, b in itertools.pairwise(objectives))
