"""A run's folder: one training at a time, checkpoints that survive any instant, metrics that say each step once.

    with lock("runs/mine"): ...               # a second training in the folder is refused
    save_checkpoint(stored, "runs/mine", "", 2)          # step_00000450.pt, and latest.pt, the same file
    file, stored = load_latest("runs/mine", "", "model", keys)   # latest.pt, or the one before it where that is damaged

A folder holds config.yaml, tokenizer.pt, latest.pt and step_*.pt (tokenizer_latest.pt, ... while that is trained),
metrics.jsonl, curves.png, samples/, for a folder of videos their index.json, and .lock. latest.pt is the newest step_*.pt
under a second name. What was set aside is called *.damaged or *.ahead; *.tmp is what a crash left half written.
"""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import tempfile
import warnings
import zipfile
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from support import config
from support.config import Config, UserError, user_message, warn, write_text

PATIENCE = 10  # seconds that a lock is waited for: a training that was just killed may still be on its way out


def make_folder(path) -> Path:
    """The folder, made if need be. Raises UserError where it cannot be, or takes no files."""
    done = "make"
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        done = "write to"
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", error)
        raise UserError(f"cannot {done} the folder {os.fspath(path)!r}: {why}") from None
    return Path(path)


def make_file(path) -> Path:
    """The path of a file to be written later, its folder made if need be. Raises UserError."""
    path = Path(os.path.realpath(path))  # of a link, what it leads to is written
    make_folder(path.parent)
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: that is a folder or a device")
    return path


def plain(values):
    """Nested dicts and lists with None for numbers that are not finite: JSON has none."""
    if isinstance(values, dict):
        return {key: plain(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [plain(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def write_json(values: dict, path) -> None:
    """Write aside, then rename: what was there before stays whole. Raises UserError."""
    try:
        write_text(path, json.dumps(plain(values), indent=1, allow_nan=False))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


@contextlib.contextmanager
def lock(folder):
    """Hold the folder, made if need be, for this process; the lock goes when the process does, however that ends.

    What ends without having written anything leaves no folder behind. Raises UserError if another process holds it.
    """
    file = make_folder(folder) / ".lock"
    held = FileLock(file)
    try:
        try:
            held.acquire(timeout=0)
        except Timeout:
            warn(f"{folder} is in use; waiting {PATIENCE} seconds for it")
            held.acquire(timeout=PATIENCE)
    except Timeout:
        raise UserError(
            f"another process is training in {folder}; stop it, or set run= to another folder (if there is none, delete {file})"
        ) from None
    except PermissionError as error:
        raise UserError(f"cannot lock {file}: {error.strerror}") from None
    except (OSError, NotImplementedError) as error:
        warn(f"{folder} cannot be locked ({error}); see to it that nothing else trains there")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if os.listdir(folder) == [file.name]:
                file.unlink()
                file.parent.rmdir()
        held.release()


# What may change when a run goes on (and is then said): it does not touch what has been learned so far.
FREE = (
    "run",
    "device",
    "data.path",
    "data.test_list",
    "data.workers",
    "tokenizer.checkpoint",
    "tokenizer.lr",
    "tokenizer.batch",
    "train.steps",
    "train.lr",
    "train.clip",
    "train.batch",
    "train.accumulate",
    "train.precision",
    "train.compile",
    "train.recompute",
    "train.save_every",
    "train.preview_every",
    "train.keep",
)
# What only samples depend on, and is not compared.
SAMPLING = ("sample.", "choice.cfg", "choice.temperature", "choice.solver_steps")
# What a tokenizer depends on; while there is no model yet, the rest may change too.
FIRST_STAGE = ("seed", "data.", "tokenizer.", "train.ema", "train.warmup", "train.weight_decay")


def compare(old: Config, cfg: Config, where, bound=(), free=FREE) -> str:
    """What differs between the configuration something was learned with and the one now, in words. Raises UserError if that
    is more than `free` says may change; where `bound` is given, only keys that begin with one of its names are held to it."""
    there, now = config.flat(old), config.flat(cfg)
    idle = (
        () if old.choice.latent or cfg.choice.latent else ("choice.",)
    )  # keys of what neither has
    differ = [
        k for k in now if now[k] != there[k] and k != "run" and not k.startswith((*SAMPLING, *idle))
    ]
    refused = [k for k in differ if k not in free and (not bound or k.startswith(bound))]
    if refused:
        what = ", ".join(f"{k} ({there[k]} there, {now[k]} now)" for k in refused)
        raise UserError(
            f"{where} was made with another configuration: {what}; set run= to another folder"
        )
    return ", ".join(f"{k}={now[k]} ({there[k]} before)" for k in differ)


# --------------------------------------------------------------------------------------------------------- checkpoints


class CorruptFile(UserError):
    """A file that is no whole checkpoint: cut short, changed, or something else altogether."""


def write(stored: dict, path) -> None:
    """Write tensors and plain values aside, flush them to the disk, then rename: a crash leaves the file before whole.

    Raises UserError for a full disk and whatever else the machine refuses.
    """
    aside = Path(f"{path}.tmp")
    try:
        with open(aside, "wb") as file:
            torch.save(stored, file)
            file.flush()
            os.fsync(file.fileno())
        rename(aside, path)
    except (OSError, RuntimeError) as error:
        cause = error
        while cause and not isinstance(cause, OSError):  # torch raises a RuntimeError on top of it
            cause = cause.__context__
        with contextlib.suppress(OSError):
            aside.unlink()
        if cause is None:
            raise
        raise UserError(
            f"cannot write {path}: {cause.strerror}; what was saved before is whole, the same command goes on from it"
        ) from None


def rename(aside, path) -> None:
    """Put `aside` in the place of `path`, and have the folder's new entry on the disk too."""
    os.replace(aside, path)
    flush(Path(path).parent)


def flush(path) -> None:
    """Have a file, or the names in a folder, on the disk. Some file systems, and Windows, flush no folders."""
    with contextlib.suppress(OSError):
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def read(path, kind: str, keys=()) -> dict:
    """Load a .pt file of this project as tensors and plain values (no code is run), its checksums compared: torch does
    not compare them. Raises CorruptFile, and UserError for a file that is missing or of another kind."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of odd pickles before it refuses them
            with zipfile.ZipFile(path) as archive:
                wrong = archive.testzip()
                folders = any(
                    entry.external_attr for entry in archive.infolist()
                )  # torch reads nothing for what is marked as one
            if wrong or folders:
                raise zipfile.BadZipFile(
                    f"the checksum of {wrong} does not match"
                    if wrong
                    else "its list of contents has changed"
                )
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        raise CorruptFile(
            f"{path} is damaged or no checkpoint of this project ({error.strerror})"
        ) from None
    except Exception as error:  # zipfile and torch raise many types for damaged files
        if user_message(error):
            raise  # the machine's fault, not the file's: short of memory
        why = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise CorruptFile(f"{path} is damaged or no checkpoint of this project ({why})") from None
    if (
        not isinstance(stored, dict)
        or stored.get("kind") != kind
        or any(key not in stored for key in keys)
    ):
        raise UserError(f"{path} is not a {kind} checkpoint of this project")
    return stored


def load_state(module, state, path) -> None:
    """module.load_state_dict(state) that says which file does not fit. Raises UserError."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[-1].strip()[:150]
        raise UserError(f"{path} does not fit this configuration ({why})") from None


def save_checkpoint(stored: dict, folder, prefix: str, count: int) -> None:
    """Write {prefix}step_N.pt for N = stored["step"], make {prefix}latest.pt the same file, drop all but the last `count`."""
    file, latest = (
        Path(folder) / f"{prefix}{name}.pt" for name in (f"step_{stored['step']:08d}", "latest")
    )
    flush(Path(folder) / "metrics.jsonl")  # what led to it is on the disk before it is
    write(stored, file)
    aside = Path(f"{latest}.tmp")
    aside.unlink(missing_ok=True)
    try:
        os.link(file, aside)  # the same bytes under a second name
    except OSError:  # a file system without hard links
        shutil.copyfile(file, aside)
        flush(aside)
    rename(aside, latest)
    for old in steps(folder, prefix)[count:]:
        old.unlink(missing_ok=True)


def steps(folder, prefix: str) -> list[Path]:
    """The numbered checkpoints, the newest first."""
    name = re.compile(rf"{prefix}step_(\d+)\.pt")
    found = [
        (int(match[1]), file)
        for file in Path(folder).glob(f"{prefix}step_*.pt")
        if (match := name.fullmatch(file.name))
    ]
    return [file for _, file in sorted(found, reverse=True)]


def list_checkpoints(folder, prefix: str) -> list[Path]:
    """{prefix}latest.pt, then the numbered ones, as far as they are there."""
    return [
        file
        for file in (Path(folder) / f"{prefix}latest.pt", *steps(folder, prefix))
        if file.exists()
    ]


def load_latest(folder, prefix: str, kind: str, keys=()):
    """(file, contents) of {prefix}latest.pt, or where that is damaged of the last whole step before it, which is said on
    stderr; (None, None) where there is none. Raises UserError if none of several is whole."""
    damaged = []
    for file in list_checkpoints(folder, prefix):
        try:
            stored = read(file, kind, keys)
        except CorruptFile as error:
            damaged.append(str(error))
            continue
        if damaged:
            warn(f"{'; '.join(damaged)}: {file.name} of step {stored.get('step')} is used")
        return file, stored
    if damaged:
        raise UserError(
            f"{'; '.join(damaged)}: no whole checkpoint is left in {folder}; move them away to begin again"
        )
    return None, None


def clean_up(folder, prefix: str, chosen: Path, step: int) -> None:
    """Before training goes on from `chosen`, of that step: set aside what was damaged and what lies ahead of it, so that the
    last steps are always this run's, and remove what a crash left half written."""
    for file in list_checkpoints(folder, prefix):
        if file == chosen:
            break
        file.rename(f"{file}.damaged")
    for file in steps(folder, prefix):
        if int(file.stem.rpartition("_")[2]) > step:
            warn(
                f"{file.name} lies ahead of {chosen.name}, from which training goes on; it is kept as {file.name}.ahead"
            )
            file.rename(f"{file}.ahead")
    for file in Path(folder).glob(f"{prefix}*.pt.tmp"):
        file.unlink()


# ------------------------------------------------------------------------------------------------------------- metrics


def append_metrics(folder, stage: str, step: int, values: dict) -> None:
    """Add a line to metrics.jsonl."""
    with open(Path(folder) / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")


def read_metrics(folder) -> list[dict]:
    """The lines of metrics.jsonl; one that a crash cut short or something else damaged is left out."""
    file, lines = Path(folder) / "metrics.jsonl", []
    for line in (
        file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    ):
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if (
                isinstance(entry, dict)
                and isinstance(entry.get("stage"), str)
                and isinstance(entry.get("step"), int)
            ):
                lines.append(entry)
    return lines


def forget_metrics(folder, stage: str, step: int) -> None:
    """Drop what metrics.jsonl says of this stage after `step`: it is about to be done again."""
    file = Path(folder) / "metrics.jsonl"
    if file.exists():
        lines = [
            line for line in read_metrics(folder) if line["stage"] != stage or line["step"] <= step
        ]
        write_text(file, "".join(json.dumps(line) + "\n" for line in lines))


def draw_curves(folder) -> None:
    """curves.png: the numbers of metrics.jsonl against the step, one row a stage."""
    from matplotlib.figure import Figure

    lines = read_metrics(folder)
    panels = {
        "tokenizer-training": [("psnr", "held_out_psnr"), ("kl",), ("lr",)],
        "model": [("diffusion", "canvas", "copy"), ("diffusion@",), ("grad_norm",)],
    }
    stages = [stage for stage in panels if any(line["stage"] == stage for line in lines)]
    fig = Figure(figsize=(12, 3.2 * len(stages)), layout="constrained")
    for row, stage in zip(fig.subplots(len(stages), 3, squeeze=False), stages):
        for ax, names in zip(row, panels[stage]):
            keys = dict.fromkeys(k for line in lines if line["stage"] == stage for k in line)
            for key in (
                k
                for k in keys
                if any(k == n or (n.endswith("@") and k.startswith(n)) for n in names)
            ):
                points = [
                    (line["step"], line[key])
                    for line in lines
                    if line["stage"] == stage and key in line
                ]
                ax.plot(
                    *zip(*points), label=key, linewidth=1, marker="." if len(points) < 30 else None
                )
            ax.set_xlabel(f"{stage.split('-')[0]} step"), ax.legend(fontsize=7), ax.grid(alpha=0.3)
    fig.savefig(Path(folder) / "curves.png", dpi=90)
