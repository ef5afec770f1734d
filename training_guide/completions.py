"""Write an HTML page of the completions of any runs, step by step, into each run's folder: one file, which a browser
opens from the disk, without a network. Once more when a run has gone on.

    python training_guide/completions.py runs/*
"""

import json
import secrets
import sys
from pathlib import Path
from typing import Any

import tyro


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file, if it is there. Of a run that is still writing, the last line may be half there."""
    whole = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line, parse_constant=str) for line in whole]  # a browser's JSON has no NaN and no Infinity


def load(folder: Path) -> dict[str, Any]:
    """What a run has logged, as it is in its files. Raises a ValueError where that is no completion."""
    args = json.loads((folder / "args.json").read_text(encoding="utf-8"), parse_constant=str)
    metrics, records = (read_rows(folder / name) for name in ("metrics.jsonl", "completions.jsonl"))
    if not records:
        sft = "; sft.py logs the rewards of those it is evaluated by, in metrics.jsonl, but not their text"
        raise ValueError("no completions are logged" + sft * (args.get("script") == "sft"))
    return {"name": folder.resolve().name, "args": args, "metrics": metrics, "records": records}


def page(run: dict[str, Any]) -> str:
    """What a model wrote can't end the data, for there is no `<` in them; and only what has the nonce can run."""
    template = Path(__file__).with_name("completions_template.html").read_text(encoding="utf-8")
    data = json.dumps(run, allow_nan=False).replace("<", "\\u003c")
    return template.replace("NONCE", secrets.token_hex(16)).replace("DATA", data)


def main(runs: tyro.conf.Positional[list[Path]]) -> None:
    """Writes completions.html into each of these run folders."""
    written = 0
    for folder in runs:
        try:
            run = load(folder)
            (folder / "completions.html").write_text(page(run), encoding="utf-8")
            print(f"saved {folder / 'completions.html'}: {len(run['records'])} completions")
            written += 1
        except (ValueError, OSError) as error:  # JSON that is broken is a ValueError
            print(f"error: no page of {folder}: {error}", file=sys.stderr)
    if not written:
        sys.exit(2)


if __name__ == "__main__":
    tyro.cli(main)
