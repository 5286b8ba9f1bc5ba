"""The configuration: what is read is what was written, and every mistake is a sentence."""

import dataclasses
import os
import random
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, script, tiny
from hypothesis import example, given
from hypothesis import strategies as st

from support import config
from support import data
from support.config import UserError

DEFAULT = ROOT / "config.yaml"


FREE = [
    o
    for o in TINY
    if not o.startswith(
        ("tokenizer.stride", "model.width", "model.heads", "sample.frames", "data.frames")
    )
]


@given(st.lists(st.sampled_from(FREE), unique=True))
def test_what_is_saved_is_what_is_loaded(tmp_path_factory, overrides):
    file = tmp_path_factory.mktemp("config") / "c.yaml"
    cfg = config.load(DEFAULT, overrides)
    config.save(cfg, file)
    assert config.load(file) == cfg == config.from_dict(config.to_dict(cfg))
    assert [p.name for p in file.parent.iterdir()] == ["c.yaml"]


def test_every_key_has_a_comment():
    keys = [
        line
        for file in (DEFAULT, ROOT / "configs" / "choice.yaml")
        for line in file.read_text().splitlines()
        if line.strip()
        and not line.strip().startswith(("#", "base:"))
        and not line.split("#")[0].strip().endswith(":")
    ]
    keys.remove("run: runs/choice")
    assert len(keys) == len(config.flat(config.load(DEFAULT)))
    assert [line for line in keys if len(line.partition("#")[2].strip()) < 10] == []


@given(st.floats(1e-8, 1e3))
def test_numbers_are_read_however_they_are_written(value):
    assert config.load(DEFAULT, [f"train.lr={value!r}"]).train.lr == value
    assert config.load(DEFAULT, [f"train.lr={value:.3e}"]).train.lr == pytest.approx(
        value, rel=1e-3
    )
    assert config.load(DEFAULT, ["train.lr=1e-4"]).train.lr == 1e-4  # PyYAML reads this as text
    assert config.load(DEFAULT, ["train.steps=1.0e3"]).train.steps == 1000


def test_a_base_file_supplies_what_is_not_stated(tmp_path):
    (tmp_path / "a.yaml").write_text(f"base: {DEFAULT}\nmodel:\n  width: 48\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\ntrain: {lr: 1e-5}\n")
    cfg = config.load(tmp_path / "b.yaml", ["model.heads=2"])
    assert (cfg.model.width, cfg.model.heads, cfg.train.lr) == (48, 2, 1e-5)
    assert cfg.data == config.load(DEFAULT).data


BAD = {
    "unknown key 'train.learning'; did you mean 'train.": "train.learning=1",
    "unknown key 'modle'; did you mean 'model'": "modle.width=3",
    "train.steps must be int, such as 10, got 'many'": "train.steps=many",
    "train.steps must be int, such as 10, got '1.5'": "train.steps=1.5",
    "seed must be int, such as 10, got '010'": "seed=010",  # YAML: 8
    "seed must be int, such as 10, got '1:30'": "seed=1:30",  # YAML: 90
    "seed must be int, such as 10, got '0x10'": "seed=0x10",
    "seed must be int, such as 10, got '1_000'": "seed=1_000",
    "train.lr must be float, such as 0.1 or 1e-3, got '00.1'": "train.lr=00.1",
    "data.frames=2 must lie between 3": "data.frames=2",
    "model.canvas must be bool, got 'maybe'": "model.canvas=maybe",
    "train.lr must be float, such as 0.1 or 1e-3, got '[1, 2]'": "train.lr=[1, 2]",
    "train.lr must be float, such as 0.1 or 1e-3, got '.nan'": "train.lr=.nan",
    "train.lr=inf must lie between 0": "train.lr=1e400",
    "model.drop_canvas=1.5 must lie between 0 and 1": "model.drop_canvas=1.5",
    "train.batch=0 must lie between 1": "train.batch=0",
    "device must be one of auto, cuda, mps, cpu": "device=tpu",
    "'model' must be a section": "model=3",
    "run must be text, got {'sub': '3'}": "run.sub=3",
    "not of the form key.sub=value": "train.lr",
    "data.size=34 is not divisible by tokenizer.stride=4": "data.size=34",
    "tokenizer.stride=6 is not a power of two": "tokenizer.stride=6",
    "model.width=96 does not give model.heads=5": "model.heads=5",
    "sample.context=10 leaves nothing to predict of sample.frames=10": "sample.context=10",
    "sample.steps=65 is more than the 64 tokens": "sample.steps=65",
    "model.window=7 is more than the data.frames=6": "model.window=7",
    "run is empty": "run=",
    "data.size=48: the pushing world": "data.size=48",
    "needs data.path": "data.name=folder",
}


@pytest.mark.parametrize("message", BAD)
def test_mistakes_are_told_with_what_would_be_right(message):
    with pytest.raises(UserError) as caught:
        config.load(DEFAULT, [BAD[message]])
    assert message in str(caught.value)


TYPED = [
    "runs/try #2",
    " a ",
    "[2024] trip",
    "{a}",
    "@x",
    "a: b",
    "- a",
    "007",
    "null",
    "yes",
    "'q'",
    "!x",
    "*a",
    "&a b",
    "%",
    "caf\u00e9",
    "\udcff\udce9",
    "#",
    "1e3",
    "a=b",
]


@given(
    st.one_of(
        st.sampled_from(TYPED),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0~"), min_size=1),
    )
)
@example("runs/try #2")
def test_text_is_taken_as_typed_and_survives_being_saved(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "typed.yaml"
    keys = ["run", "data.path", "tokenizer.checkpoint"]
    cfg = config.load(DEFAULT, [f"{key}={text}" for key in keys])
    assert [config.flat(cfg)[key] for key in keys] == [text] * 3
    config.save(cfg, file)
    assert config.load(file) == cfg


@pytest.mark.parametrize("text", ["runs/a", "2001-01-01", "007", "1:2:3", "1.5", "on"])
def test_text_in_a_file_is_what_stands_there(tmp_path, text):
    (tmp_path / "any.yaml").write_text(
        f"base: {DEFAULT}\nrun: {text}  # a comment\ndata:\n  path: '{text} #2'\n"
    )
    cfg = config.load(tmp_path / "any.yaml")
    assert (cfg.run, cfg.data.path) == (text, f"{text} #2")


@pytest.mark.parametrize("nothing", ["", "~", "null"])
def test_nothing_in_a_file_is_empty_text_and_never_the_home_folder(tmp_path, nothing):
    (tmp_path / "any.yaml").write_text(
        f"base: {DEFAULT}\ndata:\n  test_list: {nothing}\ntokenizer: {{checkpoint: {nothing}}}\n"
    )
    cfg = config.load(tmp_path / "any.yaml")
    assert (cfg.data.test_list, cfg.tokenizer.checkpoint) == ("", "")
    config.save(cfg, tmp_path / "whole.yaml")
    (tmp_path / "whole.yaml").write_text(
        f"base: {nothing}\n" + (tmp_path / "whole.yaml").read_text()
    )
    assert config.load(tmp_path / "whole.yaml") == cfg
    (tmp_path / "any.yaml").write_text(f"base: {DEFAULT}\nrun: {nothing}\n")
    with pytest.raises(UserError, match="run is empty"):
        config.load(tmp_path / "any.yaml")


def test_a_closed_console_ends_no_program():
    process = subprocess.run(
        [sys.executable, ROOT / "sample.py", "--ckpt", "none"],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: os.close(1),
    )
    assert process.returncode == 2 and process.stderr.startswith(b"error: ")


def test_a_bar_that_nobody_sees_move_is_a_line_every_half_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with config.progress_bar(total=30, desc="model") as bar:
        for _ in range(30):
            now[0] += 7
            bar.set_postfix({"loss": 1}, refresh=False)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines[:3]] == [f"model: {n} of 30" for n in (0, 5, 10)]
    assert lines[-1] == "model: 30 of 30, 03:30, 00:00 left, loss=1"


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_a_reader_that_leaves_early_is_no_error_to_speak_of(script):
    here, there = os.pipe()
    os.close(here)
    command = [sys.executable, ROOT / script, "--help"]
    process = subprocess.run(command, stdout=there, stderr=subprocess.PIPE)
    os.close(there)
    assert (process.returncode, process.stderr) == (1, b"")


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ["run", "data.path", "data.test_list", "tokenizer.checkpoint"]
    cfg = config.load(DEFAULT, ["data.name=folder", *(f"{key}=~/x" for key in keys)])
    assert [config.flat(cfg)[key] for key in keys] == [f"{tmp_path}/x"] * 4
    assert config.load(DEFAULT, ["run=a~/b"]).run == "a~/b"


def test_a_relative_data_path_that_is_not_there_is_said_with_where_it_was_looked_for(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "bair"):
        for path, told in (
            ("videos", f"data.path=videos in {tmp_path}, where"),
            (str(tmp_path / "videos"), "/videos$"),
        ):
            with pytest.raises(UserError, match=told):
                data.open_source(tiny(f"data.name={name}", f"data.path={path}").data, 0, "train", 3)


def test_motion_order_needs_a_canvas():
    with pytest.raises(UserError, match="needs the canvas"):
        tiny("model.canvas=false", "sample.order=motion")


@given(st.text(max_size=60))
def test_any_text_is_a_configuration_or_a_user_error(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(text, encoding="utf-8", errors="replace")
    with pytest.raises(UserError):
        config.load(file)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- 1\n- 2\n",
        "a: [",
        "\tx: 1",
        "base: any.yaml",
        "base: 3",
        "run: x\n",
        "base: none.yaml",
    ],
)
def test_broken_files_are_user_errors(tmp_path, text):
    (tmp_path / "any.yaml").write_text(text)
    with pytest.raises(UserError):
        config.load(tmp_path / "any.yaml")


def test_the_script_says_it_in_one_line_with_status_two(tmp_path, here):
    run = f"run={tmp_path / 'run'}"
    shutil.copy(DEFAULT, tmp_path)
    for command in (
        [],
        ["none.yaml"],
        ["config.yaml", "run=."],  # the folder of the file itself
        [DEFAULT, "device=cuda", run],
        [DEFAULT, "data.name=folder", f"data.path={tmp_path}", "device=cpu", run],
    ):
        status, err = here(*command)
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
    _, err = script("train.py", "config.yaml", "train.stepz=1", run, expect=2)
    assert err.startswith("error: ") and err.count("\n") == 1


# ------------------------------------------------------------------ nothing odd gets past, or hangs

PREFIX = "base: ../whole.yaml\n"
ALIASES = "l0: &l0 [x]\n" + "".join(f"l{i}: &l{i} [*l{i - 1}, *l{i - 1}]\n" for i in range(1, 31))
MERGES = "l0: &l0 {x: 1}\n" + "".join(
    f"l{i}: &l{i} {{<<: [*l{i - 1}, *l{i - 1}]}}\n" for i in range(1, 31)
)

ODD_FILES = {
    **{
        f"text {t!r:.30}": t
        for t in (
            "",
            " ",
            "---",
            "...",
            "null",
            "3",
            "word",
            "- a",
            "a: [",
            "\tx: 1",
            "a: b: c",
            "}",
            "%YAML 9.9\n---\na: 1",
            "---\na: 1\n---\nb: 2",
            "&a a",
            "*a",
            "!!str x",
            "? [a]\n: 1",
            "{{}: 1}",
            "a: |",
            "'",
            '"\\x"',
            "@",
            "`",
            "a: !",
            "<<: 3",
            "<<: [1]",
            "=: 1",
        )
    },
    **{
        f"key {t}": PREFIX + f"{t}: 1\n"
        for t in (
            "modle",
            "1",
            "1.5",
            "true",
            "null",
            "2001-01-01",
            "~",
            "''",
            "data.size",
            "'a b'",
            "k" * 100_000,
            "\u00e9",
            "<<",
        )
    },
    **{
        f"section {t}": PREFIX + f"data: {t}\n"
        for t in (
            "3",
            "[]",
            "null",
            "word",
            "[[1]]",
            "2001-01-01",
            "{size: {}}",
            "{size: [1]}",
            "{3: 4}",
            "{null: 1}",
            "!!set {a}",
        )
    },
    **{
        f"run {t:.40}": PREFIX + f"run: {t}\n"
        for t in (
            "[1]",
            "{}",
            '"a\\0b"',
            "9" * 5000,
            "''",
            "!!set {a}",
            "!!omap [a]",
            "!!python/object/apply:os.system [exit 3]",
            "!!python/tuple [1]",
            '"\\ud800"',
        )
    },
    **{
        f"size {t:.40}": PREFIX + f"data: {{size: {t}}}\n"
        for t in (
            "9" * 5000,
            "0x" + "f" * 5000,
            "-0x" + "f" * 5000,
            "1e400",
            ".inf",
            "'32px'",
            "32 px",
            "[32, 32]",
            "0o40x",
            '!!int "+"',
            "-1",
            "1_0.5",
            "!!bool maybe",
        )
    },
    **{
        f"lr {t:.40}": PREFIX + f"train: {{lr: {t}}}\n"
        for t in (
            "9" * 5000,
            "0x" + "f" * 5000,
            "1" + "0" * 400,
            ".inf",
            "-.inf",
            ".nan",
            "1e",
            "true",
            "-1e-9",
            "2001-01-01 00:00:00",
            "{a: 1}",
        )
    },
    "twice": PREFIX + "seed: 1\nseed: 2\n",
    "twice in a section": PREFIX + "data: {size: 32, size: 64}\n",
    "twice, quoted": PREFIX + "seed: 1\n'seed': 2\n",
    "twice, base": PREFIX + PREFIX,
    "aliases": PREFIX + ALIASES + "run: *l30\n",
    "aliases in a section": PREFIX + ALIASES + "data: {size: *l30}\n",
    "aliases as section": PREFIX + ALIASES + "data: *l30\n",
    "aliases as base": ALIASES + "base: *l30\n",
    "aliases alone": ALIASES,
    "aliases as key": PREFIX + ALIASES + "? *l30\n: 1\n",
    "merges": PREFIX + MERGES,
    "recursive list": PREFIX + "run: &a [*a]\n",
    "recursive map": PREFIX + "data: &a {size: *a}\n",
    "recursive root": "&a\nrun: *a\ndata: *a\nbase: " + str(DEFAULT),
    "deep list": PREFIX + "run: " + "[" * 5000 + "]" * 5000,
    "deep map": PREFIX + "data: " + "{a: " * 3000 + "1" + "}" * 3000,
    "deep open": "[" * 100_000,
    "deep dashes": "- " * 20_000,
    "many keys": PREFIX + "".join(f"k{i}: 1\n" for i in range(10_000)),
    "long line": PREFIX + "seed: " + "x" * 1_000_000,
    "base number": "base: 3\n",
    "base list": "base: [a]\n",
    "base empty": "base: ''\n",
    "base folder": "base: .\n",
    "base missing": "base: none.yaml\n",
    "base itself": "base: any.yaml\n",
    "base null character": 'base: "a\\0b"\n',
    "base long": "base: " + "x" * 5000,
    "base device": "base: /dev/null\n",
    "base up": f"base: {'../' * 50}\n",
    "not UTF-8": b"run: \xff\xfe\n",
    "UTF-16": ("run: x\n").encode("utf-16"),
    "NUL": b"run: a\x00b\n",
    "control": b"run: \x1b[31m\n",
    "zeros": bytes(1000),
    "zip": b"PK\x03\x04" + bytes(range(256)),
    "BOM inside": PREFIX + "seed: \ufeff1\n",
    "lone surrogate": b"run: \xed\xa0\x80\n",
    "latin-1": "run: \u00e4\n".encode("latin-1"),
}

ODD_OVERRIDES = [
    "",
    "=",
    "=1",
    ".=1",
    "..=1",
    "run",
    "data=",
    "data.=1",
    ".data=1",
    "data..size=1",
    "data.size.x=1",
    "run.x=1",
    "data={}",
    "data=[]",
    "data=null",
    "data={size: 32}",
    "base=x",
    "data.size",
    "data.size=",
    "data.size==32",
    "data.size=32=32",
    "data.size= ",
    "data.size=[",
    "data.size='",
    "data.size=*a",
    "data.size=&a [*a]",
    "data.size=!!int",
    'data.size=!!int ""',
    "data.size=!!bool x",
    "data.size=!!timestamp x",
    "data.size=!!python/object:os.system x",
    "data.size=2001-99-99",
    "data.size=" + "9" * 5000,
    "data.size=0x" + "f" * 5000,
    "data.size=" + "[" * 20_000,
    "data.size=1:60",
    "k" * 100_000 + "=1",
    "data." + "k" * 100_000 + "=1",
    "a." * 5000 + "a=1",
    "run=/dev/null",
    "run=/dev/null/x",
    "run=/proc/nowhere",
    "run=whole.yaml",
    "run=whole.yaml/x",
    "run=" + "x/" * 5000,
    "run=" + "x" * 5000,
    "tokenizer.checkpoint=none.pt",
    "tokenizer.checkpoint=.",
    "tokenizer.checkpoint=whole.yaml",
    "tokenizer.checkpoint=/dev/null",
    "tokenizer.checkpoint=" + "x" * 5000,
    "device=tpu",
    "seed=-1",
    "seed=4294967296",
    "data.name=bair",
    "data.name=folder data.path=none",
    "data.name=folder data.path=/dev/null",
    "data.name=folder data.path=whole.yaml",
    "data.name=bair data.path=none",
    "data.test_list=none",
    "train.lr=1 train.lr",
    "data=3 data.size=3",
    "data.size=4 data=3",
    "data.name=folder data.path=. data.test_list=none",
    "sample.context=4",
    "sample.frames=2",
    "sample.steps=17",
    "model.window=4",
    "tokenizer.stride=3",
    "tokenizer.stride=64",
    "data.size=33",
]


COUNTS = [
    f"{section.name}.{f.name}"
    for section in dataclasses.fields(config.Config)
    if dataclasses.is_dataclass(section.type)
    for f in dataclasses.fields(section.type)
    if f.type is int
]


@pytest.mark.parametrize("value", ["-1", "1000000000000", "1e30"])
def test_counts_beyond_all_that_is_meant_are_refused_before_anything_is_built(value):
    for key in COUNTS:
        with pytest.raises(UserError, match=f"{key}=-?[0-9]+ must lie between"):
            config.load(DEFAULT, [f"{key}={value}"])
    assert len(COUNTS) > 30


@pytest.fixture
def refuse_all(here, tmp_path):
    """refuse_all({name: command}): each is refused within seconds, in a line, without a folder."""

    def find(commands):
        found = {}
        for name, command in commands.items():
            try:
                status, err = here(*command, seconds=20)
                ok = (
                    status == 2
                    and err.startswith("error: ")
                    and err.count("\n") == 1
                    and err.endswith("\n")
                    and len(err) < 20_000
                )
                outcome = None if ok else f"status {status}: {err[:100]} ... {err[-100:]}"
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                outcome = f"{type(error).__name__}: {error}"[:200]
            if (tmp_path / "run").exists():
                outcome = f"left a run folder; {outcome}"
                shutil.rmtree(tmp_path / "run")
            if outcome:
                found[name] = outcome
        assert not found, "\n".join(f"{name}: {outcome}" for name, outcome in found.items())

    config.save(tiny(f"run={tmp_path / 'run'}"), tmp_path / "whole.yaml")
    return find


def test_odd_files_are_refused_in_one_line(refuse_all, tmp_path):
    commands = {}
    for i, (name, content) in enumerate(ODD_FILES.items()):
        file = tmp_path / str(i) / "any.yaml"
        file.parent.mkdir()
        file.write_bytes(
            content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        )
        commands[name] = [file]
    (tmp_path / "loop").symlink_to(tmp_path / "loop2")
    (tmp_path / "loop2").symlink_to(tmp_path / "loop")
    for a, b in ("ab", "ba"):
        (tmp_path / f"{a}.yaml").write_text(f"base: {b}.yaml\n")
    paths = [
        tmp_path,
        "none.yaml",
        "/dev/null",
        "",
        "x" * 5000,
        "whole.yaml/x",
        "loop",
        "a.yaml",
        ROOT / "train.py",
        ROOT / "README.md",
        ROOT / "tests",
    ]
    commands |= {f"path {str(path):.40}": [path] for path in paths}
    refuse_all(commands)
    assert len(commands) > 105


def test_odd_overrides_are_refused_in_one_line(refuse_all):
    commands = {
        f"{i}: {override:.60}": [
            "whole.yaml",
            *(override.split(" ") if "name=" in override or " data" in override else [override]),
        ]
        for i, override in enumerate(ODD_OVERRIDES)
    }
    refuse_all(commands)
    assert len(commands) > 70


def test_a_damaged_file_is_refused_in_one_line_or_still_a_configuration(refuse_all, tmp_path):
    text, draw, commands = (tmp_path / "whole.yaml").read_bytes(), random.Random(0), {}
    for i in range(150):
        data = bytearray(text)
        for _ in range(draw.randint(1, 4)):
            at, length = draw.randrange(len(data)), draw.randint(1, 40)
            act = draw.choice(["flip", "cut", "remove", "repeat", "noise"])
            if act == "flip":
                data[at] ^= 1 << draw.randrange(8)
            elif act == "cut" and draw.random() < 0.3:
                del data[max(at, 1) :]
            elif act == "remove":
                del data[at : at + length]
            elif act == "repeat":
                data[at:at] = data[draw.randrange(len(data)) :][:length]
            else:
                data[at:at] = (
                    draw.randbytes(2)
                    if draw.random() < 0.5
                    else draw.choice(
                        [
                            b":",
                            b"-",
                            b" ",
                            b"\n",
                            b"[",
                            b"{",
                            b"&a",
                            b"*a",
                            b"#",
                            b"'",
                            b"!!int ",
                            b"0x",
                            b"e9",
                        ]
                    )
                )
        file = tmp_path / f"{i}.yaml"
        file.write_bytes(data)
        try:
            config.load(file)
        except UserError:
            commands[f"{i}"] = [file]
    refuse_all(commands)
    assert len(commands) > 50


def test_a_package_that_is_not_there_is_named():
    assert config.require("math", "math").pi > 3
    with pytest.raises(UserError, match="pip install no-such-package"):
        config.require("no_such_package", "no-such-package")


def test_every_key_must_be_there_but_those_of_the_choice():
    tree = config.to_dict(tiny())
    whole = config.from_dict(tree)
    del tree["choice"]
    assert config.from_dict(tree) == whole and whole.choice.latent == 0
    tree["choice"] = {"latent": 4}
    assert config.from_dict(tree).choice == config.Choice(latent=4)
    for section, name in (("sample", "order"), ("train", "recompute"), ("model", "canvas")):
        less = tree | {section: {k: v for k, v in tree[section].items() if k != name}}
        with pytest.raises(UserError, match=f"missing {section}.{name}"):
            config.from_dict(less)


def test_a_choosing_canvas_needs_a_canvas_and_its_options_a_latent():
    with pytest.raises(UserError, match="choice.latent=4 needs the canvas"):
        tiny("model.canvas=false", "choice.latent=4")
    for option in ("choice.cfg=1.5", "choice.temperature=0.5"):
        with pytest.raises(UserError, match="choice.latent=0 has none"):
            tiny(option)
        assert tiny(option, "choice.latent=4").choice.latent == 4


def test_the_recipe_of_the_choosing_canvas_differs_in_the_latent_alone():
    cfg = config.load(ROOT / "configs" / "choice.yaml")
    same = dataclasses.replace(cfg, run="", choice=dataclasses.replace(cfg.choice, latent=0))
    assert cfg.choice.latent == 16 and same == dataclasses.replace(config.load(DEFAULT), run="")
