"""The configuration: what is read is what was written, and every mistake is a sentence."""

import pytest
from conftest import ROOT, TINY, script, tiny
from hypothesis import given
from hypothesis import strategies as st

import config
from config import UserError

DEFAULT = ROOT / "config.yaml"


FREE = [o for o in TINY if not o.startswith(("tokenizer.stride", "model.width", "model.heads", "sample.frames", "data.frames"))]


@given(st.lists(st.sampled_from(FREE), unique=True))
def test_what_is_saved_is_what_is_loaded(tmp_path_factory, overrides):
    file = tmp_path_factory.mktemp("config") / "c.yaml"
    cfg = config.load(DEFAULT, overrides)
    config.save(cfg, file)
    assert config.load(file) == cfg == config.from_dict(config.to_dict(cfg))
    assert [p.name for p in file.parent.iterdir()] == ["c.yaml"]


def test_every_key_has_a_comment():
    keys = [line for line in DEFAULT.read_text().splitlines() if line.strip() and not line.startswith("#") and not line.split("#")[0].strip().endswith(":")]
    assert len(keys) == len(config.flat(config.load(DEFAULT)))
    assert [line for line in keys if len(line.partition("#")[2].strip()) < 10] == []


@given(st.floats(1e-8, 1e3))
def test_numbers_are_read_however_they_are_written(value):
    assert config.load(DEFAULT, [f"train.lr={value!r}"]).train.lr == value
    assert config.load(DEFAULT, [f"train.lr={value:.3e}"]).train.lr == pytest.approx(value, rel=1e-3)
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
    "train.steps must be int, got 'many'": "train.steps=many",
    "train.steps must be int, got 1.5": "train.steps=1.5",
    "model.canvas must be bool, got 'maybe'": "model.canvas=maybe",
    "train.lr must be float, got [1, 2]": "train.lr=[1, 2]",
    "train.lr must be finite": "train.lr=.nan",
    "model.drop_canvas=1.5 must lie between 0 and 1": "model.drop_canvas=1.5",
    "train.batch=0 must lie between 1": "train.batch=0",
    "device must be one of auto, cuda, mps, cpu": "device=tpu",
    "'model' must be a section": "model=3",
    "'run' is a value, not a section": "run.sub=3",
    "not of the form key.sub=value": "train.lr",
    "not valid YAML": "train.lr=[",
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


def test_motion_order_needs_a_canvas():
    with pytest.raises(UserError, match="needs the canvas"):
        tiny("model.canvas=false", "sample.order=motion")


@given(st.text(max_size=60))
def test_any_text_is_a_configuration_or_a_user_error(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(text, encoding="utf-8", errors="replace")
    with pytest.raises(UserError):
        config.load(file)


@pytest.mark.parametrize("text", ["", "- 1\n- 2\n", "a: [", "\tx: 1", "base: any.yaml", "base: 3", "run: x\n", "base: none.yaml"])
def test_broken_files_are_user_errors(tmp_path, text):
    (tmp_path / "any.yaml").write_text(text)
    with pytest.raises(UserError):
        config.load(tmp_path / "any.yaml")


def test_the_script_says_it_in_one_line_with_status_two(tmp_path):
    run = f"run={tmp_path / 'run'}"
    for command in ([], ["none.yaml"], ["config.yaml", "run=."], ["config.yaml", "train.stepz=1", run], ["config.yaml", "device=cuda", run],
                    ["config.yaml", "data.name=folder", f"data.path={tmp_path}", "device=cpu", run]):  # fmt: skip
        _, err = script("train.py", *command, expect=2)
        assert err.startswith("error: ") and len(err.strip().splitlines()) == 1


def test_a_package_that_is_not_there_is_named():
    assert config.require("math", "math").pi > 3
    with pytest.raises(UserError, match="pip install no-such-package"):
        config.require("no_such_package", "no-such-package")
