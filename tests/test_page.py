"""The page of a run's completions: what is in it, and what a browser makes of texts that want to break it."""

import json
import re
import shutil

import pytest
from conftest import FAST, fine, read_metrics, read_rows, record_of, run_main, run_script, write_rows

HOSTILE = ["</script><script>document.title = 0</script><img src=x onerror='document.title = 0'>", "<!--<script>"]
HOSTILE += ["\x00\x1b[31m\ud800\u202egnorw", "a\n  b\t<b>c</b>", "DATA NONCE" + 999 * " long"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "run"
    flags = ["--max-new-tokens", 12, "--group-size", 4, "--mask-truncated", "--temperature", 1.5]
    fine(run_main("grpo.py", *FAST, *flags, "--output-dir", folder))
    rows = read_rows(folder / "completions.jsonl")
    for row, text in zip(rows, HOSTILE, strict=False):
        row["completion"] = text
    write_rows(folder / "completions.jsonl", *rows)
    fine(run_script("training_guide/completions.py", folder))
    return folder


def test_the_page_has_what_the_files_have_and_the_reason_for_no_gradient_is_right(run):
    rows = read_rows(run / "completions.jsonl")
    (data,) = re.findall('id="data">(.*?)</script>', (run / "completions.html").read_text())
    assert json.loads(data) == {"name": "run", "args": record_of(run), "metrics": read_metrics(run), "records": rows}
    for i, row in enumerate(rows):
        reason = "equal rewards in its group" if len({r["reward"] for r in rows[i // 4 * 4 :][:4]}) == 1 else None
        assert row["no_gradient"] == ("cut, and --mask-truncated is on" if row["finish_reason"] == "length" else reason)


def test_a_browser_shows_every_text_and_runs_none_and_arrows_change_the_step(run):
    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
        if not (chromium := shutil.which("chromium") or shutil.which(playwright.chromium.executable_path)):
            pytest.skip("no Chromium")
        page = playwright.chromium.launch(executable_path=chromium).new_page()
        page.goto((run / "completions.html").as_uri())
        seen = page.locator("article pre").all_inner_texts()[:5]
        assert seen == [*HOSTILE[:2], "[U+0000][U+001B][31m[U+D800][U+202E]gnorw", *HOSTILE[3:]]
        assert page.locator("#count").inner_text() == "Step 1: 8 shown of 8 logged of 8 sampled."
        page.keyboard.press("ArrowRight")
        assert (page.locator("#at").inner_text(), page.locator("article").count()) == ("step 2 of 2", 8)
        page.fill("#search", "<B>c")
        page.click("#back")
        assert page.locator("article mark").all_inner_texts() == ["<b>c"]
        assert (page.title(), page.locator("img, article script").count()) == ("run: completions", 0)
