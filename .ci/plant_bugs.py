"""Plants bugs into a copy of the project, one at a time, and reports which test catches each.

python .ci/plant_bugs.py            all of them, minutes each at worst; exit code 1 if one is missed or misplaced
python .ci/plant_bugs.py KL gap     those whose name has one of these words in it

A line of the table is a name, a pattern for what must stand in the file once, and what replaces it, as `re.sub` takes
them: rewording around a pattern does no harm.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAST = "grpo sft onpolicy_distill templates tools envs rows grading lora runs common scripts checkpoint reference page"
SLOW = "architectures invariance processes durability sharing"  # for what the first do not catch

BUGS = r"""
grpo.py
    advantage: population deviation ~ (rewards\.std\(dim=1, keepdim=True)\) ~ \1, correction=0)
    advantage: mean of the whole batch ~ rewards\.mean\(dim=1, keepdim=True\) ~ rewards.mean()
    loss: mean of each sequence for dapo ~ if loss_type == "grpo": ~ if loss_type != "dr_grpo":
    loss: padding counts ~ torch\.where\(mask, per_token, 0\)\.sum\(\) ~ per_token.sum()
    loss: clipped where that helps ~ -torch\.minimum\( ~ -torch.maximum(
    loss: old log-probs of every update ~ if ppo_step == 0:\n(\s+old_logprobs) ~ if True:\n\1
    KL: sign ~ per_token \+ kl_penalty ~ per_token - kl_penalty
    KL: detached ratio ~ = ratio \* \(d\.exp\(\) ~ = ratio.detach() * (d.exp()
    correction: turned round ~ \(old_logprobs\[mb\] - engine_logprobs\[mb\]\) ~ (engine_logprobs[mb] - old_logprobs[mb])
    correction: no cap ~ \.clamp\(max=cap\) ~
    denominator of this process, grpo ~ run\.sum\((loss_mask\.sum\(\))\) ~ float(\1)
training_guide/completions.py
    page: a completion ends the data ~ \.replace\("<", .*\)\n ~ \n
evaluate.py
    interval: of the normal distribution ~ / n \+ z\*\*2 / \(4 \* n\*\*2\)\) ~ / n)
sft.py
    denominator of this process, sft ~ (        tokens = )run\.sum\((loss_mask\.sum\(\))\)\n ~ \1float(\2)\n
onpolicy_distill.py
    distill: forward KL ~ student\.exp\(\) \* \(student - teacher\) ~ teacher.exp() * (teacher - student)
    distill: log-ratio differentiated ~ \(teacher_logprobs - logprobs\)\.detach\(\) ~ (teacher_logprobs - logprobs)
    distill: teacher without temperature ~ teacher\.head\(teacher_states, [\w.]+\) ~ teacher.head(teacher_states)
    denominator of this process, distill ~ run\.sum\((loss_mask\.sum\(\))\) ~ float(\1)
chat.py
    tools: a tool's result trains ~  and text\[differs:at\] in upto ~
    tools: a call that the template drops passes ~ enumerate\(message\.get\("tool_calls", \[\]\)\) ~ enumerate([])
    tools: a call begins with the header ~ starts \+= find_prompt\(.*\)\n ~ starts += [0]\n
    mask: stop token does not train ~ end \+ ends\.find\(.*\)\n ~ end\n
    mask: turn found wherever it stands ~ if text\.startswith\("".join\(way\), position\) ~ if "".join(way) in text
    mask: weight 0 trains ~ message\.get\("weight", 1\) for message ~ 1 for message
    mask: the next header's token closes a turn ~  and match\[1\] not in but ~
    context: a message that is dropped passes ~ if lost := left_out\(.*\): ~ if lost := []:
    engine: a turn's end does not stop ~ convert_tokens_to_ids\(\[stop\] if stop else \[\]\) ~ convert_tokens_to_ids([])
    mask: header trains where it swallows a line end ~ start \+ len\(.*rstrip\(\)\) if token in special else end ~ end
engines.py
    mask: prompt trains ~ before = \[0\] \* len\(prompt\) ~ before = [1] * len(prompt)
    engine: a group's prompt for other rows ~ cache\.reorder_cache\(rows\) ~ cache.reorder_cache(rows.flip(0))
    engine: rows that go on mixed up ~ cache\.reorder_cache\(index\) ~ cache.reorder_cache(index.flip(0))
    engine: draws of other rows ~ uniforms\[going, t, None\] ~ uniforms[: len(going), t, None]
    engine: decoding that differs passes ~ if not np\.mean\(gaps\) < .*: ~ if False:
packing.py
    pack: one token less of the prefix ~ \.tril\(shared\) ~ .tril(shared - 1)
    pack: window one token too long ~ \.triu\(shared - window\) ~ .triu(shared - window - 1)
    pack: positions begin at 0 ~ positions \+= range\(shared, end\) ~ positions += range(end - shared)
    pack: keys of another sequence ~ keys = \[\*keys\[:shared\], ~ keys = [*range(shared),
grading.py
    thinking: a box in it counts ~ \.partition\("<think>"\)\[0\] ~
    units: two that differ are left out ~ if right in \(mine, ~ if squeezed(answer, unit=False) in (mine,
    worker: a late verdict answers the next question ~ with process:.*\n +process\.kill\(\) ~ self.process = process
envs.py
    rows: the prompt's answers train ~ \[\{"weight": 0\} \| message if message ~ [{"weight": 1} | message if message
tables.py
    rows: a row that is left out stays ~ if self\.can_use\(row\):\n ~ if True:\n
    rows: an edit goes unseen ~ sha\.update\(hashlib.* ~ pass
    rows: the thread runs far ahead ~ if before is not None: ~ if False:
sharing.py
    hub: a new repo is public ~ token=True, private=True ~ token=True, private=False
    hub: an upload that fails ends the run ~ except Exception as error:  # of whatever ~ except KeyError as error:  # of
math_worker.py
    worker: strings are evaluated ~ LITERAL\.fullmatch\(code\)\[0\] ~ code
    worker: letters of a word in any order ~ not words and ~
    worker: decimals are rounded ~ float_rounding=10 ~ float_rounding=5
weights.py
    lora: merged without its scale or sign ~ \+ adapted_layer\.get_delta ~ - adapted_layer.get_delta
    shard: a resumed run forgets its moments ~ value\.to\(parameter\.device\) ~ value.to(parameter.device) * 0
common.py
    lora: the reference has the adapter on ~ with run\.adapter\.disable_adapter\(\): ~ with suppress():
    frozen: what no token reaches waits ~ requires_grad_\(False\)(?=\n +run\.model\.zero) ~ requires_grad_(True)
    reward: a failing one costs the steps ~ (self\.step = step\n\s+)save_checkpoint\(self\) ~ \1pass
    logits: a cap on small ones passes ~ head\(states \* 1e3\)(.*\n.*)inputs\[0\] \* 1e3 ~ head(states)\1inputs[0]
    gradients averaged over processes ~ \(loss \* run\.processes\)\.backward\(\) ~ loss.backward()
    passes: a process has fewer ~ max\(gather_object\(\[len\(passes\)\]\)\) ~ len(passes)
    shift: log-probs of the token itself ~ where\[:, :-1\] ~ where[:, 1:]
    temperature missing ~ logits if temperature == 1 else logits / temperature ~ logits
    head: rows of padding ~ \[:, : self\.vocab_size\] ~
    seeds: same on every process ~ first = self\.accelerator\.process_index \* count ~ first = 0
    rows: same on every process ~ \(\(step - 1\) \* self\.processes \+ self\.accelerator\.process_index\) ~ (step - 1)
    gap: NaN passes ~ if not gap <= run\.args\.max_logprob_gap ~ if gap > run.args.max_logprob_gap
    gap: largest of this process ~ max\(gather_object\(\[(log_ratio.*)\]\)\) ~ \1
    NaN: the update comes first ~ if not math\.isfinite\(grad_norm\): ~ if False:
    publish: renamed while unwritten ~ write\(temporary\)\n ~ os.rename(temporary, target); write(temporary := target)\n
    checkpoint: optimizer forgotten ~ run\.optimizer\.load_state_dict\(.*\) ~ pass
"""


def table() -> dict[str, tuple[str, str, str]]:
    """Name -> file, pattern, replacement."""
    bugs, file = {}, ""
    for line in BUGS.strip().splitlines():
        if line.startswith(" "):
            name, pattern, replacement = (part.strip(" ") for part in f"{line} ".split(" ~ "))
            bugs[name] = file, pattern, replacement
        else:
            file = line
    return bugs


def first_failure(file: str, pattern: str, replacement: str) -> str:
    """The first test that fails with the bug in place, or what went wrong."""
    text, count = re.subn(pattern, replacement, (ROOT / file).read_text())
    if count != 1:
        return f"MISPLACED: {count} places in {file}"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        skipped = (".git", ".venv", "runs", "results", "__pycache__", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*skipped))
        (copy / file).write_text(text)
        for rooms in (FAST, SLOW):
            suites = [f"tests/test_{room}.py" for room in rooms.split()]
            command = [sys.executable, "-m", "pytest", "-x", "-n0", "-q", "-p", "no:cacheprovider", *suites]
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
            if failed := re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE):
                return failed[1]
            if done.returncode != 0:
                return f"BROKEN: {done.stdout[-300:]}"
    return "MISSED: no test fails"


def main() -> int:
    words = sys.argv[1:] or [""]
    bugs = {name: bug for name, bug in table().items() if any(word.lower() in name.lower() for word in words)}
    caught = 0
    for name, bug in bugs.items():
        failure = first_failure(*bug)
        caught += failure.startswith("test_")
        print(f"{name:50} {failure}", flush=True)
    print(f"{caught} of {len(bugs)} are caught")
    return int(caught < len(bugs))


if __name__ == "__main__":
    sys.exit(main())
