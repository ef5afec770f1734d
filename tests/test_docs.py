"""What the documents say is true: commands, flags, defaults, functions, links, figures; and everything stays small."""

import ast
import dataclasses
import difflib
import importlib
import inspect
import json
import operator
import re

import pytest
from conftest import ROOT, record_of

SCRIPTS = {name: importlib.import_module(name) for name in ("sft", "grpo", "onpolicy_distill", "evaluate")}
DEFAULTS = {
    name: {field.name.replace("_", "-"): str(field.default) for field in dataclasses.fields(script.Args)}
    for name, script in SCRIPTS.items()
}
GUIDES = {"sft": "sft", "grpo": "grpo", "onpolicy_distill": "onpolicy_distillation"}
CEILINGS = {"sft.py": 280, "grpo.py": 360, "onpolicy_distill.py": 310, "evaluate.py": 240, "sharing.py": 120}
CEILINGS |= {"common.py": 1130, "chat.py": 610, "engines.py": 250, "packing.py": 170, "tables.py": 220}
CEILINGS |= {"weights.py": 150, "envs.py": 460, "grading.py": 150, "math_worker.py": 45, "README.md": 140}
RESULTS = ROOT / "training_guide" / "results"
DOCS = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "models" / "README.md", RESULTS / "README.md"]
DOCS += sorted((ROOT / "training_guide").glob("*.md"))
SOURCES = [ROOT / name for name in CEILINGS if name.endswith(".py")]


def lines(path):
    return path.read_text().splitlines()


def test_files_tests_and_results_stay_small():
    assert [name for name in CEILINGS if len(lines(ROOT / name)) > CEILINGS[name]] == []
    assert sum(len(lines(path)) for path in (ROOT / "tests").rglob("*.py")) <= 4000
    assert sum(path.stat().st_size for path in RESULTS.rglob("*") if path.is_file()) <= 600_000


def test_two_scripts_differ_in_their_algorithms_only():
    def code(name):
        docstrings = re.compile(r'^ *""".*?"""$', re.MULTILINE | re.DOTALL)
        tree = ast.parse(docstrings.sub("", (ROOT / name).read_text()))
        return ast.unparse(tree).splitlines()  # without comments

    assert sum(line[0] in "+-" for line in difflib.ndiff(code("grpo.py"), code("onpolicy_distill.py"))) < 200


def test_arrows_point_one_way():
    """Scripts use what is shared, common the other rooms; no script uses another."""
    below = {"chat.py": set(), "grading.py": set(), "math_worker.py": set(), "envs.py": {"chat", "grading", "tables"}}
    below |= {"engines.py": {"chat", "weights"}, "weights.py": {"chat"}, "packing.py": {"chat"}, "tables.py": {"chat"}}
    below |= {"common.py": {"chat", "engines", "packing", "envs", "sharing", "tables", "weights"}}
    below |= {"sharing.py": {"chat"}}
    for path in SOURCES:
        imported = set(re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
        allowed = below.get(path.name, {"common", "chat", "envs", "sharing", "tables"})
        assert imported & {p.stem for p in SOURCES} <= allowed


OUR_PROCESS = """
        worker, env = Path(__file__).with_name("math_worker.py"), {k: v for k, v in os.environ.items() if "PATH" in k}
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        process: Any = subprocess.Popen([sys.executable, str(worker)], 0, env=env, start_new_session=True, **pipes)
"""


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_no_code_of_a_model_or_dataset_is_ever_run(path):
    """Names that execute or unpickle. (`runpy` runs a file of the user's, named as --dataset.) One process is started:
    of a file of ours, with these very lines."""
    banned = {"eval", "exec", "compile", "__import__", "pickle", "dill", "sympify", "parse_expr", "popen", "Popen"}
    assert path.read_text().count(OUR_PROCESS) == (path.name == "grading.py")
    for node in ast.walk(ast.parse(path.read_text().replace(OUR_PROCESS, "\n"))):
        if isinstance(node, ast.Call):
            assert not (isinstance(node.func, ast.Name) and node.func.id in banned)
            assert not any(k.arg in ("shell", "trust_remote_code") for k in node.keywords)
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"system", "popen", "Popen"}
            assert ast.unparse(node) != "torch.load"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert not {alias.name for alias in node.names} & banned


def commands():
    for doc in [*DOCS, *(ROOT / f"{name}.py" for name in SCRIPTS)]:
        text = doc.read_text() if doc.suffix == ".md" else ast.get_docstring(ast.parse(doc.read_text()))
        for match in re.finditer(r"(?:python|accelerate launch|torchrun)[^\n`#]*?\b(\w+)\.py\b([^\n`#]*)", text):
            yield doc.name, match[1], match[2]


def test_commands_name_scripts_and_flags_that_exist():
    seen = list(commands())
    assert len(seen) > 10
    for doc, script, rest in seen:
        script = "grpo" if script in ("mine", "rloo", "stale", "pad") else script  # pages have their code
        assert script in SCRIPTS or list(ROOT.glob(f"*/{script}.py")), f"{doc}: {script}.py"
        for flag in re.findall(r"--([a-z-]+)", rest) if script in SCRIPTS else []:
            assert flag in DEFAULTS[script] or flag == "help", f"{doc}: {script}.py has no --{flag}"


@pytest.mark.parametrize("doc", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_paths_and_functions_exist(doc):
    text = doc.read_text()
    for path, anchor in re.findall(r"\]\(((?!http)[^)#]*)#?([^)]*)\)", text):
        assert (doc.parent / path).exists(), path
        if anchor:
            page = (doc.parent / path if path else doc).read_text()
            headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-") for words in headings]
            assert anchor in slugs, f"{path}#{anchor}"
    for path in re.findall(r"`((?:models|tests|training_guide|benchmarks|\.ci)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    modules = {path.stem: importlib.import_module(path.stem) for path in SOURCES if path.stem != "math_worker"}
    for module, name in re.findall(rf"`({'|'.join(modules)})\.(\w+)`", text if doc.name != "CHANGELOG.md" else ""):
        assert name == "py" or hasattr(modules[module], name), f"{module}.{name}"


@pytest.mark.parametrize("script", GUIDES)
def test_guides_name_flags_metrics_and_functions(script):
    """Rows of a table of flags read: | `--flag` | `default` | words |. Each detail names the function that holds it."""
    text = (ROOT / "training_guide" / f"{GUIDES[script]}.md").read_text()
    source = (ROOT / f"{script}.py").read_text()
    rows = re.findall(r"^\| `--([a-z-]+)` \| `([^`]*)` \|", text, re.MULTILINE)
    assert len(rows) > 5
    assert {flag: DEFAULTS[script][flag] for flag, _ in rows} == dict(rows)
    used = set(re.findall(r'"((?:loss|reward|policy|teacher|completion|optim|time|perf|eval)/\w+)"', source))
    used |= {"eval/accuracy", "eval/reward_mean", "eval/reward_std", "perf/peak_memory_gb"}
    if script != "sft":
        used |= {"policy/logprob_gap", "policy/logprob_gap_max", "policy/engine_ratio"}  # of common.check_gap
    assert {metric for metric in used if f"`{metric}`" not in text} == set()
    details = re.split(r"^\d+\. ", text.split("## Details that matter\n")[1].split("\n## ")[0], flags=re.MULTILINE)[1:]
    assert [d for d in details if not re.search(r"`\w+\.\w+`|\(grpo\.md", d)] == []


def test_flags_and_defaults_beside_those_of_trl_exist():
    """A heading names the scripts whose flags stand under it; a default in code beside a flag is that of all."""
    for section in (ROOT / "training_guide" / "from_trl.md").read_text().split("\n## ")[1:]:
        for script in re.findall(r"`(\w+)\.py`", section.splitlines()[0]):
            for flag, default in re.findall(r"`--([a-z-]+)`(?: \| `([^`]*)` \|)?", section):
                assert default in (DEFAULTS[script][flag], ""), f"{script}.py --{flag}"


def test_the_path_through_the_code_has_the_lines_it_says():
    path = (ROOT / "training_guide" / "development.md").read_text().split("## Read it\n")[1].split("\n## ")[0]
    for count, cell in re.findall(r"^\|[^|]*\| (\d+) \| (.*) \|$", path, re.MULTILINE):
        names = re.findall(r"`(\w+)\.(.*?)`", cell)
        parts = [operator.attrgetter(name)(importlib.import_module(module)) for module, name in names]
        assert abs(sum(len(inspect.getsource(part).splitlines()) for part in parts) - int(count)) <= 9, cell


def test_the_readme_and_the_wheel_have_the_files_there_are():
    readme = (ROOT / "README.md").read_text()
    told = dict(re.findall(r"^(\w+\.py) +(\d+) lines ", readme, re.MULTILINE))
    assert told.keys() == {path.name for path in SOURCES}
    wheel = re.search(r"^only-include = (\[.*\])", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(ast.literal_eval(wheel[1])) == told.keys() | {"models"}
    assert [path.name for path in SOURCES if abs(int(told[path.name]) - len(lines(path))) > 9] == []


# | `command` | links to run folders | commit | before | after | ...
RUNS = [row for row in lines(RESULTS / "README.md") if re.match(r"\|.*\) \| [0-9a-f]{7} \|", row)]


@pytest.mark.parametrize("row", RUNS, ids=lambda row: row.split("`")[1][:60])
def test_figures_of_the_results_are_those_of_their_files(row):
    def shown(values):
        spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
        return f"{sum(values) / len(values):.3f}{spread}"

    _, _, runs, commit, before, after, *_ = (cell.strip() for cell in row.split("|"))
    folders = [RESULTS / name for name in re.findall(r"\]\(([\w.-]+)\)", runs)]
    logged = [[json.loads(line) for line in lines(folder / "metrics.jsonl")] for folder in folders]
    evaluated = [[line["eval/accuracy"] for line in run if "eval/accuracy" in line] for run in logged]
    assert (before, after) == (shown([values[0] for values in evaluated]), shown([values[-1] for values in evaluated]))
    assert all(record_of(f)["git_revision"].startswith(commit) for f in folders)
