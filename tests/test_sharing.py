"""What leaves a run arrives whole, and costs no run when it can't: trackers, the model card, the hub."""

import base64
import http.server
import json
import os
import re
import sqlite3
import sys
import threading

import pytest
from conftest import FAST, fine, mistake, read_metrics, read_rows, record_of, run_main, run_script
from huggingface_hub import ModelCard

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


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's API, as far as uploads use it. `told` has what came by path; `files` what was committed, by name."""

    protocol_version = "HTTP/1.1"

    def do(self):
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.told.setdefault(self.path, []).append(body)
        answer, code = {}, 200
        if self.headers.get("Authorization") != "Bearer right" and self.command != "PUT":
            answer, code = {"error": "Invalid username or password."}, 401
        elif self.path == "/api/repos/create":
            answer = {"url": f"{hub.url}/me/model"}
        elif "/preupload/" in self.path:
            modes = [("lfs" if f["path"].endswith(".safetensors") else "regular", f) for f in json.loads(body)["files"]]
            answer = {"files": [{"path": f["path"], "uploadMode": mode, "shouldIgnore": False} for mode, f in modes]}
        elif self.path.endswith("/info/lfs/objects/batch"):
            sent = json.loads(body)["objects"]
            actions = [o | {"actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}} for o in sent]
            answer = {"transfer": "basic", "objects": actions}
        elif "/commit/" in self.path and not hub.fails:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    hub.files[line["value"]["path"]] = hub.told[f"/lfs/{line['value']['oid']}"][0]
            answer = {"commitUrl": f"{hub.url}/me/model/commit/1", "commitOid": "1"}
        elif "/commit/" in self.path:
            answer, code = {"error": "the disk is full"}, 500
        text = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = do

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.told, server.files, server.fails = f"http://127.0.0.1:{server.server_port}", {}, {}, False
    threading.Thread(target=server.serve_forever).start()
    yield server
    server.shutdown()
    server.server_close()


def push(hub, folder, *flags, token="right", **options):
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return run_script("sft.py", *FAST[:6], *flags, "--push-to-hub", "model", "--output-dir", folder, env=env, **options)


def test_final_arrives_whole_in_a_private_repo_and_no_process_waits(hub, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = fine(push(hub, tmp_path / "run", "--lora-rank", 2, launcher=launcher))
    assert done.stdout.splitlines()[-1] == f"pushed     {hub.url}/me/model"
    for asked in map(json.loads, hub.told["/api/repos/create"]):
        assert asked["name"] == "model"
        assert asked.get("visibility") == "private" or asked["private"]
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
