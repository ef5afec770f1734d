"""Records ten steps of each script on `tiny`, in float64 with frozen rollouts, as tests/golden/<script>.json.

    python tests/record_golden.py            refuses on a dirty tree: what is recorded must be a commit's

tests/test_golden.py compares every later version with them. Record again only when an algorithm is meant to change.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_invariance import launch

METRICS = ("loss/total", "loss/reverse_kl", "optim/grad_norm", "reward/mean")
FLAGS = "--num-steps 10 --logging-steps 1 --saving-steps 100 --learning-rate 1e-4 "
CASES = {
    "grpo": "--batch-size 4 --group-size 4 --max-new-tokens 12 --ppo-steps 2 --kl-penalty 0.1",
    "onpolicy_distill": "--batch-size 8 --max-new-tokens 12 --temperature 0.7",
    "sft": "--batch-size 8",
}


def run_case(script: str, folder: Path, name: str) -> dict:
    """Metrics of each step, and the completions they were made of."""
    case = {"name": name, "script": script, "flags": (FLAGS + CASES[script]).split(), "flat": [2]}
    case |= {"frozen": True, "float64": True}
    launch([case], folder, processes=1)
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    steps = [{m: line[m] for m in METRICS if m in line} for line in lines]
    tensors = load_file(folder / f"{name}-0.safetensors")
    completions = {k: t.tolist() for k, t in sorted(tensors.items()) if k.startswith("completion")}
    return {"flags": case["flags"], "steps": steps, "completions": completions}


def main() -> None:
    git = ["git", "-C", str(ROOT)]
    if subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout.strip():
        sys.exit("error: the tree has uncommitted changes: commit first, then record what the commit does")
    revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    for script in CASES:
        with tempfile.TemporaryDirectory() as folder:
            golden = {"git_revision": revision} | run_case(script, Path(folder), "run")
        path = ROOT / "tests" / "golden" / f"{script}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(golden) + "\n")
        print(f"recorded {path}")


if __name__ == "__main__":
    main()
