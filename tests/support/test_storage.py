"""The run folder: files survive a crash, damage is never loaded, one training at a time."""

import errno
import os
import random
import resource
import signal
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import tiny
from helpers import child, files, same
from hypothesis import given, settings
from hypothesis import strategies as st

from support import storage
from support.config import UserError
from support.storage import CorruptFile, load_latest, read, save_checkpoint, write


def contents(step=1, size=300):
    return {
        "kind": "model",
        "step": step,
        "text": "word",
        "net": {"w": torch.full((size,), float(step)), "n": torch.arange(7)},
    }


# ------------------------------------------------------------------------------ whole or not at all


def test_what_is_written_is_read_and_nothing_is_left_beside_it(tmp_path):
    write(contents(), tmp_path / "a.pt")
    assert same(read(tmp_path / "a.pt", "model", ("net",)), contents()) and list(
        files(tmp_path)
    ) == ["a.pt"]


def test_a_kill_at_any_instant_of_a_write_leaves_a_whole_file(tmp_path):
    file, draw, inside = tmp_path / "a.pt", random.Random(0), 0
    write(contents(0, 200_000), file)

    def work(say):
        step = 0
        while True:
            step += 1
            say(), write(contents(step, 200_000), file)

    for _ in range(25):
        with child(work) as (pid, out):
            os.read(out, 1)
            time.sleep(draw.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
        inside += Path(f"{file}.tmp").exists()
        stored = read(file, "model")
        assert same(stored, contents(stored["step"], 200_000))
    assert inside >= 5  # kills that fell into a write


def test_at_every_line_of_saving_the_last_checkpoints_are_whole(tmp_path):
    count, seen = 2, []

    def look(frame, event, _):
        if Path(frame.f_code.co_filename).name not in ("storage.py", "config.py"):
            return None
        if step > 1:
            assert read(tmp_path / "latest.pt", "model")["step"] in (step - 1, step)
            there = sorted(read(p, "model")["step"] for p in tmp_path.glob("step_*.pt"))
            assert there[-1] in (step - 1, step) and len(there) >= min(count, step - 1)
            seen.append(frame.f_lineno)
        return look

    for step in range(1, 5):
        sys.settrace(look)
        try:
            save_checkpoint(contents(step), tmp_path, "", count)
        finally:
            sys.settrace(None)
    assert len(set(seen)) > 15
    assert set(files(tmp_path)) == {"latest.pt", "step_00000003.pt", "step_00000004.pt"}


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_the_last_checkpoints_stay_and_latest_is_the_newest(tmp_path, monkeypatch, links, count):
    def refuse(*_):
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "latest.pt.tmp").write_text("left by a crash")
    save_checkpoint(contents(5), tmp_path, "tokenizer_", count)
    for step in (90, 100, 110, 120):
        save_checkpoint(contents(step), tmp_path, "", count)
    expected = {f"step_{step:08d}.pt" for step in (90, 100, 110, 120)[-count:]}
    assert set(files(tmp_path)) == expected | {
        "latest.pt",
        "tokenizer_latest.pt",
        "tokenizer_step_00000005.pt",
    }
    assert files(tmp_path)["latest.pt"] == files(tmp_path)["step_00000120.pt"]


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("how", ["fsync", "file size"])
def test_a_full_disk_is_a_sentence_and_leaves_what_was_there(tmp_path, monkeypatch, how):
    save_checkpoint(contents(1), tmp_path, "", 2)
    before, limits = files(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    if how == "fsync":
        monkeypatch.setattr(os, "fsync", no_space)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*; what was saved before is whole"):
            save_checkpoint(contents(2, 100_000), tmp_path, "", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path) == before


def test_a_bug_while_writing_keeps_its_traceback(tmp_path):
    with pytest.raises(Exception) as caught:
        write({"kind": "model", "f": lambda: 0}, tmp_path / "a.pt")
    assert not isinstance(caught.value, (UserError, OSError))


# ------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    file = tmp_path_factory.mktemp("whole") / "a.pt"
    write(contents(size=20), file)
    return file.read_bytes()


def loaded(file, data):
    """What a file of these bytes is read as, None if it is refused in words."""
    file.write_bytes(data)
    try:
        return read(file, "model", ("step", "net"))
    except UserError as error:
        assert isinstance(error, CorruptFile) or "is not a model checkpoint" in str(error)
        return None


def test_no_flipped_bit_loads_as_other_values(tmp_path, whole):
    """A bit of each byte, and all bits of the zip's directory, which torch and zipfile read."""
    directory, refused = whole.index(b"PK\x01\x02"), 0
    for i in range(len(whole)):
        for bit in range(8) if i >= directory else [i % 8]:
            data = whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :]
            stored = loaded(tmp_path / "a.pt", data)
            assert stored is None or same(stored, contents(size=20))
            refused += stored is None
    assert refused > len(whole) / 4


def test_torch_alone_loads_flipped_bits(tmp_path, whole):
    at = whole.index(contents(size=20)["net"]["w"].numpy().tobytes())
    (tmp_path / "a.pt").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert not same(torch.load(tmp_path / "a.pt", weights_only=True), contents(size=20))
    with pytest.raises(CorruptFile, match="checksum"):
        read(tmp_path / "a.pt", "model")


@settings(max_examples=150)
@given(st.data())
def test_damage_of_any_kind_never_loads_as_other_values(tmp_path_factory, whole, data):
    file, at = (
        tmp_path_factory.getbasetemp() / "damaged.pt",
        data.draw(st.integers(0, len(whole) - 1)),
    )
    length = data.draw(st.integers(1, len(whole)))
    how = data.draw(
        st.sampled_from(["cut", "zero", "noise", "insert", "remove", "repeat", "append"])
    )
    noise = data.draw(st.binary(min_size=1, max_size=64))
    stored = loaded(
        file,
        {
            "cut": whole[:at],
            "zero": whole[:at] + bytes(min(length, len(whole) - at)) + whole[at + length :],
            "noise": (whole[:at] + noise + whole[at + len(noise) :])[: len(whole)],
            "insert": whole[:at] + noise + whole[at:],
            "remove": whole[:at] + whole[at + length :],
            "repeat": whole[:at] + whole[at : at + length] + whole[at:],
            "append": whole + noise,
        }[how],
    )
    assert stored is None or same(stored, contents(size=20))


def other_files(tmp_path):
    """What may lie where a checkpoint is expected."""
    for name, data in {
        "empty": b"",
        "text": b"hello",
        "yaml": b"kind: model\n",
        "zeros": bytes(5000),
        "pickle": b"\x80\x02}q\x00.",
    }.items():
        (tmp_path / name).write_bytes(data)
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    for name, stored in {
        "list": [1],
        "tensor": torch.ones(3),
        "other kind": contents() | {"kind": "tokenizer"},
        "no kind": {"net": {}},
        "kind of tensor": contents() | {"kind": torch.ones(2)},
        "no net": {"kind": "model"},
    }.items():
        torch.save(stored, tmp_path / name)
    torch.save(contents(), tmp_path / "old format", _use_new_zipfile_serialization=False)
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    return sorted(tmp_path.iterdir())


def test_whatever_else_lies_there_is_a_sentence(tmp_path, recwarn):
    for file in other_files(tmp_path):
        with pytest.raises(UserError) as caught:
            read(file, "model", ("net",))
        assert str(file) in str(caught.value) and "\n" not in str(caught.value), file
    assert not recwarn.list


# ------------------------------------------------------------------------------------------- newest


NAMES = {"latest.pt": 30, "step_00000030.pt": 30, "step_00000020.pt": 20, "step_00000010.pt": 10}


@given(st.lists(st.sampled_from(["whole", "damaged", "missing"]), min_size=4, max_size=4))
def test_the_newest_whole_checkpoint_is_taken_and_the_damaged_before_it_are_set_aside(
    tmp_path_factory, states
):
    folder = tmp_path_factory.mktemp("run")
    for (name, step), state in zip(NAMES.items(), states):
        if state != "missing":
            write(contents(step), folder / name)
        if state == "damaged":
            (folder / name).write_bytes((folder / name).read_bytes()[:-50])
    before, expected = files(folder), next((n for n, s in zip(NAMES, states) if s == "whole"), None)
    if expected is None and "damaged" in states:
        with pytest.raises(UserError, match="no whole checkpoint is left"):
            load_latest(folder, "", "model")
    else:
        file, stored = load_latest(folder, "", "model")
        assert (file, stored and stored["step"]) == (
            (folder / expected, NAMES[expected]) if expected else (None, None)
        )
    assert files(folder) == before
    if expected:
        storage.clean_up(folder, "", file, stored["step"])
        passed = {
            n for n, s in list(zip(NAMES, states))[: list(NAMES).index(expected)] if s == "damaged"
        }
        assert set(files(folder)) == {f"{n}.damaged" if n in passed else n for n in before}
        assert sorted(files(folder).values()) == sorted(before.values())


def test_what_lies_ahead_of_the_checkpoint_is_kept_aside_and_half_written_files_go(
    tmp_path, capsys
):
    for step in (10, 20, 30, 100_000_000):
        save_checkpoint(contents(step), tmp_path, "", 9)
    write(contents(20), tmp_path / "latest.pt")
    for name in (
        "step_00000040.pt.tmp",
        "latest.pt.tmp",
        "step_x.pt",
        "tokenizer_step_00000099.pt",
    ):
        (tmp_path / name).write_text("x")
    storage.clean_up(
        tmp_path, "", *[(f, s["step"]) for f, s in [load_latest(tmp_path, "", "model")]][0]
    )
    assert set(files(tmp_path)) == {
        "latest.pt",
        "step_00000010.pt",
        "step_00000020.pt",
        "step_00000030.pt.ahead",
        "step_100000000.pt.ahead",
        "step_x.pt",
        "tokenizer_step_00000099.pt",
    }
    assert "step_00000030.pt lies ahead" in capsys.readouterr().err


def test_a_checkpoint_of_another_kind_is_not_passed_over_as_damaged(tmp_path):
    save_checkpoint(contents(1), tmp_path, "", 2)
    write(contents(2) | {"kind": "tokenizer"}, tmp_path / "latest.pt")
    with pytest.raises(UserError, match="not a model checkpoint") as caught:
        load_latest(tmp_path, "", "model")
    assert not isinstance(caught.value, CorruptFile)


# --------------------------------------------------------------------------------------------- lock


def test_a_folder_is_held_by_one_process_and_free_when_that_is_killed(tmp_path, monkeypatch):
    def hold(say):
        with storage.lock(tmp_path / "run"):
            (tmp_path / "run" / "config.yaml").touch()
            say(), time.sleep(60)

    monkeypatch.setattr(storage, "PATIENCE", 0.2)
    with child(hold) as (pid, out):
        os.read(out, 1)
        with pytest.raises(
            UserError,
            match="another process is training in .*; stop it, or set run= to another folder",
        ):
            with storage.lock(tmp_path / "run"):
                pass
        with storage.lock(tmp_path / "other"):
            (tmp_path / "other" / "config.yaml").touch()
    with storage.lock(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / "config.yaml").exists()


def test_a_lock_is_waited_for(tmp_path, monkeypatch, capsys):
    def hold(say):
        with storage.lock(tmp_path):
            (tmp_path / "config.yaml").touch()
            say(), time.sleep(0.5)

    monkeypatch.setattr(storage, "PATIENCE", 30)
    with child(hold) as (_, out):
        os.read(out, 1)
        with storage.lock(tmp_path):
            pass
    assert "is in use; waiting" in capsys.readouterr().err


def test_what_has_written_nothing_leaves_no_folder(tmp_path):
    with pytest.raises(KeyError), storage.lock(tmp_path / "a" / "run"):
        raise KeyError
    assert not (tmp_path / "a" / "run").exists()
    with pytest.raises(KeyError), storage.lock(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").touch()
        raise KeyError
    assert (tmp_path / "run" / "config.yaml").exists()


# ------------------------------------------------------------------------------------------ compare


def test_options_of_sampling_and_of_a_latent_that_neither_has_are_not_compared():
    old, both = tiny(), tiny("choice.latent=4")
    assert storage.compare(old, tiny("choice.noise=0.5", "choice.drop=0"), "here") == ""
    free = ("choice.cfg=2", "choice.temperature=1.5", "choice.solver_steps=9", "sample.steps=1")
    assert storage.compare(both, tiny("choice.latent=4", *free), "here") == ""
    for option in ("choice.noise=0.5", "choice.weight=1", "choice.drop=0", "choice.latent=8"):
        with pytest.raises(UserError, match=f"here was made with another.*{option.split('=')[0]}"):
            storage.compare(both, tiny("choice.latent=4", option), "here")
    with pytest.raises(UserError, match=r"choice.latent \(0 there, 4 now\)"):
        storage.compare(old, both, "here")


# ------------------------------------------------------------------------------------------ metrics

entries = st.tuples(
    st.sampled_from(["model", "tokenizer-training"]),
    st.integers(1, 50),
    st.floats(allow_nan=False, allow_infinity=False),
)


@given(st.lists(entries, max_size=12), st.binary(max_size=30), st.integers(0, 50))
def test_metrics_of_a_stage_end_at_the_step_gone_on_from_and_damage_costs_only_its_own_line(
    tmp_path_factory, said, garbage, step
):
    folder = tmp_path_factory.mktemp("run")
    for stage, at, loss in said:
        storage.append_metrics(folder, stage, at, {"loss": loss})
    expected = [{"stage": stage, "step": at, "loss": loss} for stage, at, loss in said]
    assert storage.read_metrics(folder) == expected
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(garbage.replace(b"\r", b" ").replace(b"\n", b" "))
    storage.forget_metrics(folder, "model", step)
    storage.append_metrics(folder, "model", step + 1, {"loss": 1.0})
    kept = [e for e in expected if e["stage"] != "model" or e["step"] <= step]
    assert storage.read_metrics(folder) == [
        *kept,
        {"stage": "model", "step": step + 1, "loss": 1.0},
    ]
