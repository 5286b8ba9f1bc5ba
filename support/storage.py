"""A run's folder: one training at a time, checkpoints that survive a crash, metrics.

    with lock("runs/mine"): ...                                 # a second training is refused
    save_checkpoint(stored, "runs/mine", "", 2)                 # step_00000450.pt and latest.pt
    file, stored = load_latest("runs/mine", "", "model", keys)  # the newest that is not damaged

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
from support.config import Config, UserError, user_message, warn, write_text

PATIENCE = 10  # seconds to wait for a lock: a training that was just killed may still be ending


def make_folder(path) -> Path:
    """Make a folder if need be. Raises UserError if that fails or nothing can be written to it."""
    what = "make"
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        what = "write to"
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", error)
        raise UserError(f"cannot {what} the folder {os.fspath(path)!r}: {why}") from None
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
    """Write values as JSON; a crash leaves the file before whole. Raises UserError."""
    try:
        write_text(path, json.dumps(plain(values), indent=1, allow_nan=False))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


@contextlib.contextmanager
def lock(folder):
    """Hold the folder, made if need be, until the block or the process ends, however it ends.

    A block that has written nothing leaves no folder behind. Raises UserError if another process
    holds it.
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
            f"another process is training in {folder}; stop it, or set run= to another folder "
            f"(if there is none, delete {file})"
        ) from None
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
# Keys of sampling alone, which are not compared.
SAMPLING = ("sample.", "choice.cfg", "choice.temperature", "choice.solver_steps")
# Keys that a tokenizer depends on; as long as there is no model, the others may change too.
FIRST_STAGE = ("seed", "data.", "tokenizer.", "train.ema", "train.warmup", "train.weight_decay")


def compare(old: Config, cfg: Config, where, bound=(), free=FREE) -> str:
    """Return in words what differs between the configuration of a run and the one now.

    Raises UserError if a key differs that is not `free`; with `bound`, only keys that begin with
    one of its names are compared so strictly.
    """
    then, now = config.flat(old), config.flat(cfg)
    ignored = SAMPLING if old.choice.latent or cfg.choice.latent else (*SAMPLING, "choice.")
    differ = [k for k in now if now[k] != then[k] and k != "run" and not k.startswith(ignored)]
    refused = [k for k in differ if k not in free and (not bound or k.startswith(bound))]
    if refused:
        what = ", ".join(f"{k} ({then[k]} there, {now[k]} now)" for k in refused)
        raise UserError(
            f"{where} was made with another configuration: {what}; set run= to another folder"
        )
    return ", ".join(f"{k}={now[k]} ({then[k]} before)" for k in differ)


# ---------------------------------------------------------------------------------- checkpoints


class CorruptFile(UserError):
    """A file that is no whole checkpoint: cut short, changed, or of another format."""


def write(stored: dict, path) -> None:
    """Write tensors and plain values to a temporary name, flush, rename.

    A crash leaves the file before whole. Raises UserError for a full disk and the like.
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
            f"cannot write {path}: {cause.strerror}; what was saved before is whole, "
            "the same command goes on from it"
        ) from None


def rename(aside, path) -> None:
    """Put `aside` in the place of `path` and flush the folder's entry."""
    os.replace(aside, path)
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
    damaged = f"{path} is damaged or no checkpoint of this project"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of odd pickles before it refuses them
            _check_zip(path)
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # a damaged file leads to impossible positions
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        raise CorruptFile(f"{damaged} ({error.strerror})") from None
    except Exception as error:  # zipfile and torch raise many types for damaged files
        if user_message(error):
            raise  # the machine's fault, not the file's: short of memory
        why = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise CorruptFile(f"{damaged} ({why})") from None
    whole = isinstance(stored, dict) and stored.get("kind") == kind
    if not whole or any(key not in stored for key in keys):
        raise UserError(f"{path} is not a {kind} checkpoint of this project")
    return stored


def _check_zip(path) -> None:
    """Compare the checksums of a .pt file, which torch does not. Raises BadZipFile."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"the checksum of {damaged} does not match")
        if any(entry.external_attr for entry in archive.infolist()):
            raise zipfile.BadZipFile("its list of contents has changed")  # torch skips folders


def load_state(module, state, path) -> None:
    """module.load_state_dict(state). Raises UserError that names the file which does not fit."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[-1].strip()[:150]
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
    rename(aside, latest)
    for old in steps(folder, prefix)[count:]:
        old.unlink(missing_ok=True)


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
            f"{'; '.join(damaged)}: no whole checkpoint is left in {folder}; "
            "move them away to begin again"
        )
    return None, None


def clean_up(folder, prefix: str, chosen: Path, step: int) -> None:
    """Set aside the files that do not belong to a run that goes on from `chosen`, of that step.

    These are damaged checkpoints, those ahead of it, and what a crash left half written.
    """
    for file in list_checkpoints(folder, prefix):
        if file == chosen:
            break
        file.rename(f"{file}.damaged")
    for file in steps(folder, prefix):
        if _step(file) > step:
            warn(
                f"{file.name} lies ahead of {chosen.name}, from which training goes on; "
                f"it is kept as {file.name}.ahead"
            )
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
