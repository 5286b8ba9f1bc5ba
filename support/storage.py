"""A run's folder: one training at a time, checkpoints that survive a crash, metrics.

A folder holds config.yaml, tokenizer.pt, latest.pt and step_*.pt (tokenizer_latest.pt, ... while
that is trained), metrics.jsonl, curves.png, samples/, for a folder of videos their index.json, and
.lock. latest.pt is the newest step_*.pt under a second name. Files called *.damaged or *.ahead were
set aside; *.tmp is what a crash left half written.
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
from support.config import Config, UserError, replacing, user_message, warn, write_text
from support.options import SAMPLING

PATIENCE = 10  # seconds to wait for a lock: a training that was just killed may still be ending


def make_folder(path) -> Path:
    """Make a folder if need be. Raises UserError if that fails or nothing can be written to it."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", error)
        raise UserError(f"cannot write to the folder {os.fspath(path)!r}: {why}") from None
    return Path(path)


def make_file(path) -> Path:
    """Return the path of a file to be written later, its folder made. Raises UserError."""
    path = Path(os.path.realpath(path))  # of a link, its target is written
    make_folder(path.parent)
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: that is a folder or a device")
    return path


def plain(values):
    """Return nested dicts and lists with None for numbers that are not finite: JSON has none."""
    if isinstance(values, dict):
        return {key: plain(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [plain(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def write_json(values: dict, path) -> None:
    """Write values as JSON; a crash leaves the file before whole."""
    write_text(path, json.dumps(plain(values), indent=1, allow_nan=False))


@contextlib.contextmanager
def lock(folder):
    """Hold the folder, made if need be, until the block or the process ends, however it ends.

    A block that has written nothing leaves no folder. Raises UserError if another process holds it.
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
        remedy = f"stop it, or set run= to another folder (if there is none, delete {file})"
        raise UserError(f"another process is training in {folder}; {remedy}") from None
    except PermissionError as error:
        raise UserError(f"cannot lock {file}: {error.strerror}") from None
    except (OSError, NotImplementedError) as error:  # file systems without locks
        warn(f"{folder} cannot be locked ({error}); see to it that nothing else trains there")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if os.listdir(folder) == [file.name]:
                file.unlink()
                file.parent.rmdir()
        held.release()


# --------------------------------------------------------------------- what may change in a run

# Keys that may change when a run goes on, which is then logged: what was learned stays valid.
FREE = (
    *("run", "device", "data.path", "data.test_list", "data.workers"),
    *("tokenizer.checkpoint", "tokenizer.lr", "tokenizer.batch"),
    *("train.steps", "train.lr", "train.clip", "train.batch", "train.accumulate"),
    *("train.precision", "train.compile", "train.recompute"),
    *("train.save_every", "train.preview_every", "train.keep"),
)
# Keys that a tokenizer depends on; as long as there is no model, the others may change too.
FIRST_STAGE = ("seed", "data.", "tokenizer.", "train.ema", "train.warmup", "train.weight_decay")


def compare(old: Config, cfg: Config, where, bound=(), free=FREE) -> str:
    """Return in words what differs between the configuration of a run and the one now.

    Raises UserError if a key differs that is not `free`; with `bound`, only keys that begin with
    one of its names are compared so strictly.
    """
    then, now = config.flat(old), config.flat(cfg)
    latent = old.choice.latent or cfg.choice.latent
    ignored = ("run", "sample.", *(f"choice.{key}" for key in (SAMPLING if latent else [""])))
    differ = [k for k in now if now[k] != then[k] and not k.startswith(ignored)]
    refused = [k for k in differ if k not in free and (not bound or k.startswith(bound))]
    if refused:
        what = ", ".join(f"{k} ({then[k]} there, {now[k]} now)" for k in refused)
        other = f"{where} was made with another configuration"
        raise UserError(f"{other}: {what}; set run= to another folder")
    return ", ".join(f"{k}={now[k]} ({then[k]} before)" for k in differ)


# ---------------------------------------------------------------------------------- checkpoints


class CorruptFile(UserError):
    """A file that is no whole checkpoint: cut short, changed, or of another format."""


def write(stored: dict, path) -> None:
    """Write tensors and plain values whole or not at all. Raises UserError, as of a full disk."""
    try:
        with replacing(path) as file:
            torch.save(stored, file)
    except (OSError, RuntimeError) as error:
        cause = error
        while cause and not isinstance(cause, OSError):  # torch raises a RuntimeError on top of it
            cause = cause.__context__
        if cause is None:
            raise
        kept = "what was saved before is whole, the same command goes on from it"
        raise UserError(f"cannot write {path}: {cause.strerror}; {kept}") from None
    flush(Path(path).parent)


def flush(path) -> None:
    """Flush a file or a folder to the disk, where the file system can."""
    with contextlib.suppress(OSError):
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def read(path, kind: str, keys=()) -> dict:
    """Load a .pt file of this project as tensors and plain values; no code in it is run.

    Raises CorruptFile, and UserError for a file that is missing, of another `kind` or without
    one of `keys`.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):  # no end
        raise UserError(f"cannot read {path}: it is a device, no file")
    try:
        with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
            warnings.simplefilter("ignore")  # torch warns of odd pickles before it refuses them
            # torch compares no checksums, and skips files that are marked as folders.
            if archive.testzip() or any(entry.external_attr for entry in archive.infolist()):
                raise zipfile.BadZipFile("a checksum or the list of contents does not match")
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch raise many types for damaged files
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # an impossible position
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        if user_message(error):
            raise  # the machine's fault, not the file's: short of memory
        damaged = "is damaged or no checkpoint of this project"
        raise CorruptFile(f"{path} {damaged} ({error!r:.150})") from None
    held = stored if isinstance(stored, dict) else {}
    if held.get("kind") != kind or any(key not in held for key in keys):
        exported = " to train on, but exported to sample from" * ("vae" in held)
        raise UserError(f"{path} is not a {kind} checkpoint of this project{exported}")
    return stored


def load_state(module, state, path) -> None:
    """module.load_state_dict(state). Raises UserError that names the file which does not fit."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        why = " ".join(str(error).split())[:250]
        raise UserError(f"{path} does not fit this configuration ({why})") from None


def save_checkpoint(stored: dict, folder, prefix: str, count: int) -> None:
    """Write {prefix}step_N.pt, N = stored["step"], and {prefix}latest.pt; keep the last `count`."""
    file = Path(folder) / f"{prefix}step_{stored['step']:08d}.pt"
    latest = Path(folder) / f"{prefix}latest.pt"
    aside = Path(f"{latest}.tmp")
    flush(Path(folder) / "metrics.jsonl")  # what led to it is on the disk before it is
    write(stored, file)
    aside.unlink(missing_ok=True)
    try:
        os.link(file, aside)  # the same bytes under a second name
    except OSError:  # a file system without hard links
        shutil.copyfile(file, aside)
        flush(aside)
    os.replace(aside, latest)
    flush(folder)
    for old in steps(folder, prefix)[count:]:
        old.unlink()


def steps(folder, prefix: str) -> list[Path]:
    """List the numbered checkpoints, the newest first."""
    name = re.compile(rf"{prefix}step_(\d+)\.pt")
    found = [f for f in Path(folder).glob(f"{prefix}step_*.pt") if name.fullmatch(f.name)]
    return sorted(found, key=_step, reverse=True)


def _step(file: Path) -> int:
    return int(file.stem.rpartition("_")[2])


def list_checkpoints(folder, prefix: str) -> list[Path]:
    """List {prefix}latest.pt and the numbered ones, the newest first, as far as they exist."""
    latest = Path(folder) / f"{prefix}latest.pt"
    return [file for file in (latest, *steps(folder, prefix)) if file.exists()]


def load_latest(folder, prefix: str, kind: str, keys=()):
    """Return (file, contents) of the newest checkpoint that is not damaged, or (None, None).

    Damaged ones are said on stderr. Raises UserError if there are checkpoints and none is whole.
    """
    damaged = ""
    for file in list_checkpoints(folder, prefix):
        try:
            stored = read(file, kind, keys)
        except CorruptFile as error:
            damaged += f"{error}; "
            continue
        if damaged:
            warn(f"{damaged}{file.name} of step {stored.get('step')} is used")
        return file, stored
    if damaged:
        raise UserError(f"{damaged}no whole checkpoint is left; move them away to begin again")
    return None, None


def clean_up(folder, prefix: str, chosen: Path, step: int) -> None:
    """Set aside what does not belong to a run that goes on from `chosen`, of that step.

    Damaged checkpoints and those ahead of it are renamed; what is half written is deleted.
    """
    for file in list_checkpoints(folder, prefix):
        if file == chosen:
            break
        file.rename(f"{file}.damaged")
    for file in steps(folder, prefix):
        if _step(file) > step:
            warn(f"{file.name} lies ahead of {chosen.name} and is kept as {file.name}.ahead")
            file.rename(f"{file}.ahead")
    for file in Path(folder).glob(f"{prefix}*.pt.tmp"):
        file.unlink()


# -------------------------------------------------------------------------------------- metrics


def append_metrics(folder, stage: str, step: int, values: dict) -> None:
    """Add a line to metrics.jsonl."""
    with open(Path(folder) / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")


def read_metrics(folder) -> list[dict]:
    """Return the lines of metrics.jsonl, without those that are damaged or cut short."""
    file, lines = Path(folder) / "metrics.jsonl", []
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError, TypeError, LookupError):
            entry = json.loads(line)
            if isinstance(entry["stage"], str) and isinstance(entry["step"], int):
                lines.append(entry)
    return lines


def forget_metrics(folder, stage: str, step: int) -> None:
    """Drop the lines of this stage after `step`: these steps are about to be done again."""
    file = Path(folder) / "metrics.jsonl"
    if file.exists():
        entries = read_metrics(folder)
        kept = [e for e in entries if e["stage"] != stage or e["step"] <= step]
        write_text(file, "".join(json.dumps(entry) + "\n" for entry in kept))
