"""The house: what lies where, who may import whom, and how large it may grow."""

import ast
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

METHOD = ("tokenizer", "diffloss", "mar", "canvas")
SCRIPTS = ("sample", "train", "fvd")
TOP = {f"{name}.py" for name in METHOD + SCRIPTS} | {
    "config.yaml",
    "requirements.txt",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    ".gitignore",
}
FOLDERS = {
    *(
        ".ci",
        "configs",
        "docs",
        "extensions",
        "pretrained",
        "results",
        "studies",
        "support",
        "tests",
    ),
}
BUDGET = {"seven": 1500, "support": 3370, "extensions and studies": 2150}  # lines, formatted
COLUMNS, FUNCTION = 100, 40
README_LINES, README_WORDS = 180, 1500


def tracked(*patterns):
    """The files of the repository, or, where there is no git, all Python files."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    try:
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def modules(folder):
    return sorted((ROOT / folder).glob("*.py"))


def imports(path) -> set:
    """Names of modules that a file imports, anywhere in it: 'support.video', 'canvas', ..."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def tops(path) -> set:
    return {name.split(".")[0] for name in imports(path)}


def lines(paths) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def seven():
    return [ROOT / f"{name}.py" for name in METHOD + SCRIPTS]


def test_the_top_level_is_the_card():
    there = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert there - TOP - FOLDERS == set()
    assert TOP | FOLDERS - {".ci"} <= there | {".gitignore"}


@pytest.mark.parametrize("name", METHOD)
def test_a_file_of_the_method_can_be_copied_into_another_project(name):
    standard = {"math", "hashlib", "dataclasses", "functools"}
    assert tops(ROOT / f"{name}.py") <= {"torch", "numpy", "einops", *standard, *METHOD}


def test_imports_run_one_way():
    ours = {*METHOD, *SCRIPTS, "support", "extensions", "studies"}
    for name in SCRIPTS:
        allowed = {*METHOD, *SCRIPTS, "support"}
        assert tops(ROOT / f"{name}.py") & ours <= allowed, name
    outside = set()
    for path in modules("support"):
        outside |= {(path.stem, n) for n in tops(path) & {*SCRIPTS, "extensions", "studies"}}
    assert outside == {("runs", "extensions")}  # the one line that picks the model's class
    assert (ROOT / "support/runs.py").read_text().count("extensions.") == 1
    for path in modules("extensions"):
        assert not tops(path) & {"studies"}, path


def test_the_parts_keep_to_their_budgets():
    extra = modules("extensions") + modules("studies")
    sizes = {"seven": seven(), "support": modules("support"), "extensions and studies": extra}
    assert {k: n for k, paths in sizes.items() if (n := lines(paths)) > BUDGET[k]} == {}


def test_no_line_is_too_long():
    long = [
        f"{path.relative_to(ROOT)}:{i}"
        for path in tracked("*.py", "*.yaml")
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > COLUMNS or "fmt: skip" in line
    ]
    long = [name for name in long if not name.startswith("tests/method/test_house.py")]
    assert long == []


def test_no_function_is_too_long():
    long = {}
    for path in [*seven(), *modules("support"), *modules("extensions"), *modules("studies")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                size = node.end_lineno - node.lineno + 1
                if size > FUNCTION:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = size
    assert long == {}


def test_the_readme_is_short_shows_a_moving_picture_first_and_links_to_what_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    head = "\n".join(text.splitlines()[:10])
    assert "results/samples.gif" in head
    assert len(text.splitlines()) <= README_LINES and len(text.split()) <= README_WORDS
    for path in tracked("*.md"):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), f"{path.relative_to(ROOT)} links to {link}"


def test_the_four_files_of_the_method_stand_alone(tmp_path):
    for name in METHOD:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    (tmp_path / "mine.py").write_text("""
from types import SimpleNamespace as Section
import torch
from canvas import CanvasMAR, clip_generator
from tokenizer import Tokenizer

model = Section(
    width=16, heads=2, temporal_depth=1, canvas_depth=1, mar_depth=1, head_width=16, head_depth=1,
    window=2, canvas=True, frame_noise_min=0.2, frame_noise_max=0.6, canvas_noise_max=0.3,
    canvas_weight=0.1, drop_temporal=0.05, drop_canvas=0.05, diffusion_repeat=2,
)
vae = Section(stride=8, channels=2, width=4, kl_weight=1e-4)
cfg = Section(model=model, grid=4, tokenizer=vae, train=Section(recompute=False))
f = Tokenizer(vae).encode(torch.rand(2, 3, 3, 32, 32))
net = CanvasMAR(cfg)
loss, _ = net(f, net.draw([clip_generator(0, i) for i in range(2)], 3))
loss.backward()
print(all(p.grad is not None for p in net.parameters()), loss.item() > 0)
""")
    command = [sys.executable, "mine.py"]
    said = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert said.stdout == "True True\n"


@pytest.mark.parametrize("name", ["bench", "doom", "evidence", "gpu", "sanity", "sweep"])
def test_each_study_starts(name):
    command = [sys.executable, "-m", f"studies.{name}", "--help"]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "usage" in said.stdout
