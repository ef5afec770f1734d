"""The fork that training_guide/fork.md shows: the page's diff applies, and trains."""

import difflib
import json
import re
import shutil
import subprocess

from conftest import FAST, ROOT, fine, run_main


def test_the_pages_commands_make_a_fork_that_trains_under_its_own_name(tmp_path, monkeypatch):
    shutil.copy(ROOT / "grpo.py", tmp_path)
    (tmp_path / "training_guide").mkdir()
    shutil.copy(ROOT / "training_guide" / "fork.md", tmp_path / "training_guide")
    page = (ROOT / "training_guide" / "fork.md").read_text()
    commands = re.search(r"```bash\n(   cp grpo.py rloo.py\n.*?)   ```", page, re.DOTALL)
    subprocess.run(["bash", "-ec", commands[1]], cwd=tmp_path, check=True)
    changes = difflib.ndiff(*((tmp_path / name).read_text().splitlines() for name in ("grpo.py", "rloo.py")))
    assert [line[0] for line in changes if line[0] in "-+"].count("+") == 5  # as the page says
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    fine(run_main("rloo.py", *FAST))
    (record,) = (tmp_path / "runs").glob("rloo-tiny-*/args.json")
    assert json.loads(record.read_text())["loss_type"] == "rloo"
    assert (record.parent / "final" / "model.safetensors").exists()
