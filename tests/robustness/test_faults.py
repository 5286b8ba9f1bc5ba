"""Numbers, disks and files that fail: one line, nothing bad is saved, the same command goes on."""

import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal

import pytest
import torch
from helpers import assert_same_run, at_step, files_below, same

from support import storage

# ------------------------------------------------------------------------ numbers and machines


def assert_all_finite(run):
    for file in run.glob("*.pt"):
        tensors = torch.utils._pytree.tree_leaves(torch.load(file, weights_only=True))
        assert all(torch.isfinite(x).all() for x in tensors if torch.is_tensor(x)), file
    for line in storage.read_metrics(run):
        assert all(math.isfinite(v) for v in line.values() if isinstance(v, (int, float))), line


STOPPED = {}  # {options: the folder of a run with them}


@pytest.fixture
def stopped(stop_at, tmp_path, tmp_path_factory):
    """stopped(step, *options) -> a folder of its own with a run that was stopped at this step"""

    def run(step, *options):
        if (step, *options) not in STOPPED:
            STOPPED[step, *options] = tmp_path_factory.mktemp("stopped") / "run"
            stop_at(STOPPED[step, *options], step, *options)
        return shutil.copytree(STOPPED[step, *options], tmp_path / "run")

    return run


@pytest.mark.parametrize(
    "options", [[], ["train.save_every=1"], ["train.preview_every=1"], ["train.steps=5"]]
)
@pytest.mark.parametrize("lr", ["1e30", "1e39"])
def test_what_is_not_finite_stops_the_run_and_is_never_saved(
    train_here, stopped, named, options, lr
):
    """Also where the overflowing step is the last, or saved or looked at before the next one."""
    common = [named, "train.steps=8", "train.warmup=0"]
    run, options = stopped(4, *common), [*common, *options]
    status, err = train_here(run, *options, f"train.lr={lr}", "train.clip=0")
    last = err.strip().splitlines()[-1]
    what = r"not finite at step [567] of [58]; .*last good checkpoint is .*step_00000004.pt\. Try a"
    assert status == 2 and re.search(what + " smaller train.lr", last), last
    assert_all_finite(run)
    assert train_here(run, *options, "train.lr=1e-3")[0] == 0
    assert_all_finite(run)


def test_a_tokenizer_that_diverges_stops_and_goes_on(tmp_path, train_here, stop_at):
    run = tmp_path / "run"
    options = ["tokenizer.steps=8", "train.clip=0", "train.save_every=3", "train.preview_every=3"]
    stop_at(run, 4, *options)
    status, err = train_here(run, *options, "tokenizer.lr=1e30")
    what = "not finite at step 6 of 8; the last good checkpoint is .*tokenizer_step_00000004.pt. "
    assert status == 2 and re.search(what + "Try a smaller tokenizer.lr", err)
    assert_all_finite(run)
    assert train_here(run, *options)[0] == 0
    assert_all_finite(run)


@pytest.mark.parametrize("limit", [0, 200, 3000, 300_000])
def test_a_disk_that_is_full_ends_in_words_and_the_same_command_goes_on(
    tmp_path, train_here, stopped, named, limit
):
    options = [named, "train.steps=8", "train.preview_every=2"]
    run, limits = stopped(3, *options), resource.getrlimit(resource.RLIMIT_FSIZE)
    if "whole" not in STOPPED:
        STOPPED["whole"] = tmp_path.parent / "whole"
        assert train_here(STOPPED["whole"], *options)[0] == 0
    before = {p.name: p.read_bytes() for p in run.glob("*.pt")}
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        status, err = train_here(run, *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    last = err.strip().splitlines()[-1]
    assert status == 2 and "Traceback" not in err, err[-1000:]
    assert "error: " in last and "whole" in last, last
    assert {p.name: p.read_bytes() for p in run.glob("*.pt")} == before
    assert not list(run.glob("*.pt.tmp"))
    assert train_here(run, *options)[0] == 0
    assert_same_run(STOPPED["whole"], run)
    assert not list(run.glob("*.tmp"))


def test_a_data_process_that_is_killed_is_a_sentence(tmp_path, train_here, monkeypatch, named):
    """Said where the next batch is asked for, whatever the process was doing when it died."""

    def kill_one():
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    at_step(monkeypatch, 3, kill_one)
    status, err = train_here(tmp_path / "run", named, "data.workers=2", "train.steps=30")
    assert status == 2 and "Traceback" not in err
    what = r"error: a process that prepares data died \(.*data.workers=0 helps; .*command goes on$"
    assert re.search(what, err.strip().splitlines()[-1])


# --------------------------------------------------------------------- checkpoints of all kinds

DROP = object()
META = {"kind", "step", "config", "data", "clips_per_step", "tokenizer", "net", "ema", "optimizer"}
NO_STEP = ["4", "many", -1, 0, 4.0, 4.5, math.nan, math.inf, 9, 2**70, True, None, [], [4], {}]
NO_STATE = [None, 3, "x", [], {}, [1], torch.ones(3), {"a": torch.ones(1)}]
NO_WEIGHT = [DROP, None, 3, "x", [], torch.ones(1), torch.ones(0), torch.ones(3, 5, 7)]
NO_WIDTH = [DROP, None, -1, 10**9, 2**70, "x", [], {}, math.nan, torch.ones(2)]
NO_GROUPS = [DROP, None, 3, [], {}, [{}], [{}, {}], [None, None]]


def odd_values(weight):
    """Pairs of a path into a checkpoint and the values that are wrong there."""
    yield ["kind"], ("tokenizer", "Model", 3, None, [], {}, torch.ones(2))
    yield ["step"], (*NO_STEP, torch.tensor(4))
    yield ["clips_per_step"], (0, -2, "2", None, [], 2.5)
    yield ["tokenizer"], ("", None, 3, "0" * 16, [], {})
    yield ["config"], (None, 3, "x", [], {}, [1], {"a": 1}, torch.ones(1))
    yield ["config", "model"], (DROP, None, [], {}, 3)
    yield ["config", "other"], (1,)
    yield ["config", 3], (3,)
    yield ["config", "model", "width"], (32, *NO_WIDTH)
    yield ["config", "run"], ("",)
    for part in ("net", "ema"):
        yield [part], NO_STATE
        yield [part, weight], NO_WEIGHT
        yield [part, "other"], (torch.ones(1),)
        yield [part, 3], (torch.ones(1),)
    yield ["optimizer"], (*NO_STATE[:-1], {"a": 1})
    yield ["optimizer", "state"], (DROP, None, 3, "x", [], {}, {0: {}}, {0: None})
    yield ["optimizer", "state", 0], (DROP, None, 3, [], {}, {"exp_avg": torch.ones(1)})
    for name in ("exp_avg", "exp_avg_sq"):
        yield (
            ["optimizer", "state", 0, name],
            (DROP, None, 3, "x", torch.ones(1), torch.ones(3, 5, 7)),
        )
    yield ["optimizer", "state", 0, "step"], (DROP, None, "x", [], {})
    yield ["optimizer", "param_groups"], NO_GROUPS
    yield ["optimizer", "param_groups", 0, "params"], (DROP, None, [], [0], 3)


def change(tree, path, value):
    """The nested dicts with one value replaced, or dropped."""
    head, *rest = path
    tree = list(tree) if isinstance(tree, list) else dict(tree)
    if rest:
        value = change(tree[head], rest, value)
    if value is DROP:
        del tree[head]
    else:
        tree[head] = value
    return tree


def odd_checkpoints(stored):
    """{name: what is whole as a file and wrong inside}."""
    changes = [([key], DROP) for key in META]
    for path, values in odd_values(next(iter(stored["net"]))):
        changes += [(path, value) for value in values]
    return {
        f"{'.'.join(map(str, path))}: {'dropped' if value is DROP else repr(value):.40}": change(
            stored, path, value
        )
        for path, value in changes
    }


def odd_bytes(whole, draw, rounds):
    """Files that are cut short, changed, or something else."""
    for _ in range(rounds):
        at, length = draw.randrange(len(whole)), draw.choice([1, 16, 512, 4096, 100_000])
        flipped = bytes([whole[at] ^ 1 << draw.randrange(8)])
        zeros = bytes(min(length, len(whole) - at))
        yield f"cut at {at}", whole[:at]
        yield f"zeros at {at}", whole[:at] + zeros + whole[at + length :]
        yield f"bit at {at}", whole[:at] + flipped + whole[at + 1 :]
        yield f"removed at {at}", whole[:at] + whole[at + length :]
        yield f"doubled at {at}", whole[:at] + whole[at : at + length] + whole[at:]
    yield "empty", b""
    yield "text", b"hello\n"
    yield "zeros", bytes(9999)
    yield "ones", b"\xff" * 9999
    yield "pickle", b"\x80\x02}q\x00."
    yield "gzip", b"\x1f\x8b" + bytes(99)
    yield "another zip", b"PK\x05\x06" + bytes(18)


def refuses(train_here, run, *options):
    """True if the run is refused in a line, False if it ends well, text for anything else."""
    before = files_below(run)
    try:
        status, err = train_here(run, *options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    if status == 0:
        return False
    refused = status == 2 and re.fullmatch(r"error: \S.*\n", err) and files_below(run) == before
    return True if refused else f"{status}: {err[-200:]}"


def test_odd_contents_of_a_checkpoint_are_refused_in_one_line(train_here, copies):
    run, file = copies()
    found, cases = {}, odd_checkpoints(torch.load(file, weights_only=True))
    for name, stored in cases.items():
        run, file = copies()
        torch.save(stored, file)
        outcome = refuses(train_here, run, "train.steps=5")
        if outcome is not True and name != "data: dropped":
            found[name] = outcome
    assert not found, "\n".join(f"{name}: {outcome}" for name, outcome in found.items())
    assert len(cases) > 120


@pytest.mark.parametrize("name, rounds", [("latest.pt", 15), ("tokenizer.pt", 4)])
def test_a_damaged_checkpoint_is_refused_in_one_line_or_means_the_same(
    train_here, copies, name, rounds
):
    whole, found, refused = copies(name)[1].read_bytes(), {}, 0
    run, _ = copies()
    assert train_here(run, "train.steps=5")[0] == 0
    end = storage.read(run / "latest.pt", "model")
    for case, data in odd_bytes(whole, random.Random(0), rounds):
        run, file = copies(name)
        file.write_bytes(data)
        outcome = refuses(train_here, run, "train.steps=5")
        refused += outcome is True
        if outcome is False:  # spared: the run must end as from the whole file
            spared = same(storage.read(run / "latest.pt", "model"), end)
            outcome = True if spared else "other values"
        if outcome is not True:
            found[case] = outcome
    assert not found, "\n".join(f"{case}: {outcome}" for case, outcome in found.items())
    # A damaged tokenizer is written again from the checkpoint.
    assert (refused > 4 * rounds) == (name == "latest.pt")


def test_what_is_no_file_in_the_place_of_a_checkpoint_is_refused_and_the_run_goes_on_without_it(
    train_here, copies
):
    for name in ("latest.pt", "tokenizer.pt"):
        run, file = copies(name)
        whole = file.read_bytes()
        file.unlink()
        file.mkdir()
        status, err = train_here(run, "train.steps=5")
        last = err.splitlines()[-1]
        assert status == 2 and last.startswith(f"error: cannot read {file}: Is a directory")
        file.rmdir()
        file.write_bytes(whole)
        assert train_here(run, "train.steps=5")[0] == 0


class Hostile:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["latest.pt", "tokenizer.pt", "named.pt"])
def test_a_hostile_checkpoint_runs_nothing(tmp_path, train_here, copies, name):
    hostile, (run, file) = Hostile(tmp_path / "ran"), copies(name)
    options = [f"tokenizer.checkpoint={file}"] if name == "named.pt" else []
    tokenizer = {"kind": "tokenizer", "config": hostile}
    for save in (
        lambda: file.write_bytes(pickle.dumps(hostile)),
        lambda: torch.save({"kind": "model", "net": hostile}, file),
        lambda: torch.save(tokenizer, file, _use_new_zipfile_serialization=False),
    ):
        save()
        status, err = train_here(run, "train.steps=5", *options)
        damaged = f"{file} is damaged or no checkpoint"
        if name == "tokenizer.pt":
            assert status == 0 and damaged in err and "written again" in err
        else:
            assert status == 2 and err.splitlines()[-1].startswith(f"error: {damaged}")
        assert not (tmp_path / "ran").exists()
