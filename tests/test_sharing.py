"""What leaves a run arrives whole, and costs no run when it can't: trackers, the model card, the hub."""

import base64
import http.server
import json
import os
import re
import sqlite3
import threading

import pytest
from conftest import FAST, ROOT, fine, mistake, read_metrics, read_rows, record_of, run_main, run_script
from huggingface_hub import ModelCard
from test_processes import TORCHRUN

import grpo
import sharing

SHORT = ["--num-steps", 2, "--batch-size", 2, "--max-new-tokens", 24, "--eval-samples", 4]


@pytest.mark.slow
def test_wandb_and_trackio_get_the_log_and_a_resumed_run_goes_on_in_its_page(tmp_path):
    pytest.importorskip("wandb")
    pytest.importorskip("trackio")
    env = os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}
    flags = ["--enable-wandb", "--enable-trackio", "--wandb-project", "mine", "--output-dir", tmp_path / "run"]
    for steps in (1, 2):
        fine(run_script("grpo.py", *SHORT, *flags, "--num-steps", steps, "--resume", env=env))
    pages = sqlite3.connect(tmp_path / "trackio" / "mine.db")
    assert pages.execute("select distinct run_name from metrics").fetchall() == [("run",)]
    assert len(pages.execute("select distinct run_id from metrics").fetchall()) == 1
    (config,) = pages.execute("select config from configs").fetchone()
    assert json.loads(config)["attention"].startswith("packed")
    logged = {step: json.loads(line) for step, line in pages.execute("select step, metrics from metrics")}
    lines, completions = read_metrics(tmp_path / "run"), read_rows(tmp_path / "run" / "completions.jsonl")
    assert all(logged[line.pop("step")].items() >= line.items() for line in lines)
    assert logged[2]["completions"]["_value"] == [row for row in completions if row["step"] == 2]
    tables = sorted(tmp_path.glob("run/wandb/offline*/files/media/table/*.json"), key=os.path.getmtime)
    assert [json.loads(path.read_text())["columns"] for path in tables] == [[*completions[0]]] * 2
    assert len({path.name.rpartition("-")[2] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")}) == 1
    flags = "num_steps=1, batch_size=2, max_new_tokens=8, eval_steps=0, enable_wandb=True"
    (tmp_path / "sweep.py").write_text(f"import grpo\nfor name in 'ab': grpo.main(grpo.Args({flags}, output_dir=name))")
    fine(run_script(tmp_path / "sweep.py", env=env | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path))
    assert len([*tmp_path.glob("[ab]/wandb/offline-run-*")]) == 2


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's API, as far as uploads use it. `created`: what was asked of new repos; `files`: what was committed."""

    def do_GET(self):
        hub = self.server
        sent = [json.loads(line) for line in self.rfile.read(int(self.headers["Content-Length"] or 0)).splitlines()]
        code, answer = 200, {"url": hub.repo, "commitUrl": f"{hub.repo}/commit/1", "commitOid": "1"}
        if self.headers["Authorization"] != "Bearer right":
            code, answer = 401, {"error": "Invalid username or password."}
        elif self.path == "/api/repos/create":
            hub.created += sent
        elif "/preupload/" in self.path:
            answer = {"files": [file | {"uploadMode": "regular", "shouldIgnore": False} for file in sent[0]["files"]]}
        elif "/commit/" in self.path and hub.fails:
            code, answer = 500, {"error": "the disk is full"}
        elif "/commit/" in self.path:
            files = [line["value"] for line in sent if line["key"] == "file"]
            hub.files |= {file["path"]: base64.b64decode(file["content"]) for file in files}
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.url, server.created, server.files, server.fails = f"http://127.0.0.1:{server.server_port}", [], {}, False
        server.repo = f"{server.url}/me/model"
        threading.Thread(target=server.serve_forever).start()
        yield server
        server.shutdown()


def push(hub, folder, *flags, token="right", **options):
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return run_script("sft.py", *FAST[:6], *flags, "--push-to-hub", "model", "--output-dir", folder, env=env, **options)


def test_final_arrives_whole_in_a_private_repo_and_no_process_waits(hub, tmp_path):
    done = fine(push(hub, tmp_path / "run", "--lora-rank", 2, launcher=TORCHRUN))
    assert done.stdout.splitlines()[-1] == f"pushed     {hub.repo}"
    asked = [(repo["name"], repo.get("visibility") == "private" or repo["private"]) for repo in hub.created]
    assert set(asked) == {("model", True)}
    final = tmp_path / "run" / "final"
    here = {str(path.relative_to(final)): path.read_bytes() for path in final.rglob("*") if path.is_file()}
    assert hub.files == here
    assert here.keys() > {"README.md", "model.safetensors", "adapter/adapter_model.safetensors"}
    assert "accelerate launch --num_processes 2 sft.py" in here["README.md"].decode()


def test_a_hub_that_fails_or_is_away_costs_a_warning_and_a_refusal_is_told_first(hub, tmp_path):
    told = mistake(push(hub, tmp_path / "refused", token="wrong"))
    assert told == "error: --push-to-hub model: Invalid username or password."
    assert [*(tmp_path / "refused").iterdir()] == []
    hub.fails = True
    failed = fine(push(hub, tmp_path / "failed"))
    hub.fails = False  # and the same command again uploads what is done
    assert fine(push(hub, tmp_path / "failed", "--resume")).stdout.splitlines()[-1] == f"pushed     {hub.repo}"
    hub.server_close()
    away = fine(push(hub, tmp_path / "away"))
    assert [done.stdout.count("warning") for done in (failed, away)] == [1, 2]
    for done, folder in ((failed, tmp_path / "failed"), (away, tmp_path / "away")):
        assert done.stdout.splitlines()[-1].endswith(f"by hand: hf upload --private model {folder}/final .")
        assert (folder / "final" / "model.safetensors").exists()


def test_the_card_says_what_a_model_was_made_from_and_how(tmp_path):
    fine(run_main("grpo.py", *SHORT, "--kl-penalty", 0.1, "--output-dir", tmp_path / "run"))
    card = ModelCard.load(tmp_path / "run" / "final" / "README.md")
    assert (card.data.library_name, card.data.tags) == ("transformers", ["rlfusion", "grpo"])
    before, after = (line["eval/accuracy"] for line in read_metrics(tmp_path / "run") if "eval/accuracy" in line)
    assert f"| eval/accuracy | {before:.4f} | {after:.4f} |" in card.text
    (command,) = re.findall("^python grpo.py (.*)", card.text, re.MULTILINE)
    assert "--kl-penalty 0.1 --num-steps 2" in command
    args = grpo.Args(model="org/base", dataset=f"org/rows:main:0.7,{tmp_path}/mine.jsonl:0.3")
    data = ModelCard(sharing.model_card(args, record_of(tmp_path / "run"), {})).data
    assert (data.base_model, data.datasets, data.license) == ("org/base", ["org/rows"], "unknown")
