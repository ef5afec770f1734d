"""What leaves a run: its log for wandb and Trackio, the model card, and `final/` for the Hugging Face hub.

What can be known is told before a model loads; what fails later costs a warning, never the run.
"""

import dataclasses
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub as hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

import chat

TRACKERS = ("wandb", "trackio")  # packages with the same functions
PAPERS = {"grpo": " (https://arxiv.org/abs/2402.03300)", "onpolicy_distill": " (https://arxiv.org/abs/2306.13649)"}


def start_tracker(name: str, args: Any, script: str, folder: Path, record: dict[str, Any]) -> Any:
    """A page, the same one for a resumed run. Raises a UserError if it can't be had."""
    if importlib.util.find_spec(name) is None:
        raise chat.UserError(f"--enable-{name} needs {name}: pip install {name}")
    page = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    own = {"resume": "allow" if args.resume else "never"}  # Trackio knows a page by its name
    if name == "wandb":  # which by default gives a second run of one process, as in a sweep, the page of the first
        own = {"id": page, "resume": "allow", "dir": str(folder), "reinit": "finish_previous"}
    project = args.wandb_project or os.environ.get("WANDB_PROJECT") or script
    with chat.loading(name):
        init = importlib.import_module(name).init
        return init(project=project, name=args.wandb_run_name or folder.name, config=record, **own)


def describe(name: str, page: Any, record: dict[str, Any]) -> None:
    """Adds what was chosen since it was opened."""
    page.config.update(record, **({"allow_val_change": True} if name == "wandb" else {}))


def log(name: str, page: Any, step: int, metrics: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
    """Metrics as they are, completions as a table with the columns of completions.jsonl."""
    if rows := [{"step": step} | record for record in records]:
        table = {"columns": [*rows[0]], "data": [[*row.values()] for row in rows], "allow_mixed_types": True}
        metrics = metrics | {"completions": importlib.import_module(name).Table(**table)}
    page.log(metrics, step=step)


def reserve(repo: str) -> str:
    """What to say of a hub repo before a run. Raises a UserError if token, name or the right to write is refused."""
    try:
        address = hub.create_repo(repo, token=True, private=True, exist_ok=True)  # name and token are checked first
        hub.auth_check(address.repo_id, write=True)
        return f"hub        {address}"
    except Exception as error:  # each way of not reaching it has a type of its own
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code in (400, 401, 403, 404)
        if refused or isinstance(error, (HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled)):
            why = getattr(error, "server_message", None) or str(error)
            raise chat.UserError(f"--push-to-hub {repo}: {chat.shorten(why, 400)}") from error
        return f"warning    the hub does not answer, it is asked again at the end: {chat.shorten(repr(error))}"


def push(repo: str, folder: Path) -> str:
    """Uploads a model folder. What to say of it: the address, or what failed and the command that does it by hand."""
    try:
        address = hub.create_repo(repo, private=True, exist_ok=True)
        hub.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Trained by RLFusion")
        return f"pushed     {address}"
    except Exception as error:  # of whatever kind: the model is on the disk
        command = shlex.join(["hf", "upload", "--private", repo, str(folder), "."])
        return f"warning    not pushed: {chat.shorten(repr(error))}; by hand: {command}"


def git_revision() -> str | None:
    """Commit of the scripts, with `-dirty` if they were changed since; None without git, and of an installed copy."""
    options: Any = {"cwd": Path(__file__).resolve().parent, "capture_output": True, "text": True, "check": False}
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    own = shutil.which("git") and subprocess.run(["git", "ls-files", Path(__file__).name], **options).stdout
    return (subprocess.run(git, **options).stdout.strip() or None) if own else None  # not of a repository around it


def model_card(args: Any, record: dict[str, Any], results: dict[str, tuple[float, float]]) -> str:
    """README.md of a model. `results`: metrics, before and after."""
    script, model, processes = record["script"], args.model, record["num_processes"]
    data = hub.ModelCardData(library_name="transformers", pipeline_tag="text-generation")
    data.tags, base = ["rlfusion", script.replace("_", "-")], f"`{model}`"
    data.license = "mit" if model in chat.BUNDLED else "unknown"
    if model not in chat.BUNDLED and not Path(model).exists():
        data.base_model, base = model, f"[{model}](https://huggingface.co/{model})"
    names = ["openai/gsm8k" if name == "gsm8k" else name for name in re.split("[,:]", args.dataset)]
    data.datasets = [n for n in names if re.fullmatch(r"[\w.-]+/[\w.-]+", n) and not Path(n).exists()] or None
    command = ["python"] if processes == 1 else ["accelerate", "launch", "--num_processes", str(processes)]
    command.append(f"{script}.py")
    for field in dataclasses.fields(args):
        flag, value = f"--{field.name.replace('_', '-')}", getattr(args, field.name)
        if value != field.default:
            command += [flag] if value is True else [flag, str(value)]
    teacher = f" from the teacher `{record['teacher_model']}`" if "teacher_model" in record else ""
    table = "\n".join(f"| {name} | {before:.4f} | {after:.4f} |" for name, (before, after) in results.items())
    return f"""---
{data.to_yaml()}
---
# {Path(model).name}, after {script}
{base}, trained on `{args.dataset}` by {script}{PAPERS.get(script, "")}{teacher}, {args.num_steps} steps.

| held out | before | after |
|---|---|---|
{table}

```bash
{shlex.join(command)}
```

RLFusion at commit {record["git_revision"] or "unknown"}, with {", ".join(map(" ".join, record["versions"].items()))}.
"""
