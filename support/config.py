"""Configuration: YAML file + `key.sub=value` overrides -> frozen dataclasses, checked before anything is built.

`config.yaml` holds every value and says what each key means; the dataclasses below hold the type and the legal range
of each. A file may begin with `base: other.yaml` and state only what differs from it.

    cfg = load("config.yaml", ["model.width=192", "train.lr=1e-3"])
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import importlib
import math
import os
import re
import reprlib
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import yaml

# Threads that wait actively get in each other's way as soon as anything else runs. Read when torch is loaded, so the scripts
# import this module before it; whoever starts them may have chosen otherwise.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
if not os.environ.keys() & {*WAITING}:
    os.environ.update(
        GOMP_SPINCOUNT="1000", KMP_BLOCKTIME="0"
    )  # turns of GNU's OpenMP, milliseconds of LLVM's


class UserError(Exception):
    """Something the user can put right: one line on stderr and exit status 2, without a traceback (see `run_main`)."""


def run_main(main):
    """Run `main()` and end the process: a UserError, a full disk and the like are one line on stderr and exit status 2."""
    status = 0
    if sys.stdout:  # not closed
        sys.stdout.reconfigure(errors="replace")  # of a console that cannot show all characters
    try:
        main()
    except SystemExit as stop:
        status = stop.code
    except KeyboardInterrupt:
        log("interrupted")
        status = 130
    except Exception as error:
        text = user_message(error)
        if text is None:
            raise
        log("error: " + text)
        status = 2
    if sys.stdout:
        sys.stdout.flush()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(
            status or 0
        )  # gloo's threads now and then abort a process that ends in the usual way
    sys.exit(status)


def user_message(error: Exception) -> str | None:
    """What to tell the user of an error that is theirs or their machine's; None for a bug, which keeps its traceback."""
    text = str(error)
    if isinstance(error, UserError):  # from a data process, torch wraps it in a traceback
        return text.rsplit("UserError: ", 1)[-1] if "Original Traceback" in text else text
    if isinstance(error, OSError) and (
        error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    ):
        return f"{error.filename or 'writing'}: {error.strerror}; what was saved before is whole"
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in text
    ):
        return f"out of memory ({text[:150]}); smaller models, clips and batches need less: train.batch, or --batch when sampling"
    return None


def log(text: str) -> None:
    """A line on stderr. Nobody may be there to read it any more: the terminal was closed, or ctrl-c ended `tee` as well."""
    with contextlib.suppress(OSError):
        print(" ".join(text.split()), file=sys.stderr, flush=True)


def warn(text, everywhere=False):
    """A warning on stderr; what all processes find, the first of them says."""
    if everywhere or os.environ.get("RANK", "0") == "0":
        log("warning: " + text)


def require(module: str, package: str):
    """Import a module that only some uses need. Raises UserError that says which package to install."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"this needs the package {package}, which is not installed: pip install {package}"
        ) from None


class Parser(argparse.ArgumentParser):
    """Command line options; a wrong one is a UserError."""

    def error(self, message):
        raise UserError(f"{message} (--help lists the options)")


def choices(*names):
    return field(metadata={"choices": names})


def a_path():
    return field(metadata={"path": True})


MANY = 10**9  # beyond all that is meant; a slip of the finger should not begin to fill the memory


def bounded(low, high=math.inf, default=dataclasses.MISSING):
    return field(default=default, metadata={"low": low, "high": high})


# ------------------------------------------------------------------------------------------------------ the sections


@dataclass(frozen=True)
class Data:
    name: str = choices("pushing", "folder", "bair")
    path: str = a_path()
    test_list: str = a_path()
    size: int = bounded(8, 4096)
    frames: int = bounded(
        3, 4096
    )  # of 2 none would ever be trained with few masked tokens (mar.choose_masked)
    stride: int = bounded(1, 4096)
    train_clips: int = bounded(1, MANY)
    objects: int = bounded(2, 4)
    texture: float = bounded(0, 0.3)
    workers: int = bounded(0, 1024)


@dataclass(frozen=True)
class Tokenizer:
    checkpoint: str = a_path()
    stride: int = bounded(2, 256)
    channels: int = bounded(1, 4096)
    width: int = bounded(4, 8192)
    kl_weight: float = bounded(0)
    steps: int = bounded(1, MANY)
    batch: int = bounded(1, 65536)
    lr: float = bounded(0)


@dataclass(frozen=True)
class Model:
    width: int = bounded(4, 65536)
    heads: int = bounded(1, 1024)
    temporal_depth: int = bounded(1, 1024)
    canvas_depth: int = bounded(1, 1024)
    mar_depth: int = bounded(1, 1024)
    head_width: int = bounded(4, 65536)
    head_depth: int = bounded(1, 1024)
    window: int = bounded(1, 4096)
    canvas: bool
    canvas_noise: float = bounded(0)
    past_noise: float = bounded(0)
    canvas_weight: float = bounded(0)
    canvas_change: bool
    drop_temporal: float = bounded(0, 1)
    drop_canvas: float = bounded(0, 1)
    diffusion_repeat: int = bounded(1, 1024)


@dataclass(frozen=True)
class Train:
    steps: int = bounded(1, MANY)
    batch: int = bounded(1, 65536)
    accumulate: int = bounded(1, 65536)
    lr: float = bounded(0)
    warmup: int = bounded(0, MANY)
    weight_decay: float = bounded(0)
    clip: float = bounded(0)
    ema: float = bounded(0, 1)
    precision: str = choices("auto", "fp32", "bf16")
    compile: str = choices("auto", "true", "false")
    recompute: bool
    save_every: int = bounded(1, MANY)
    preview_every: int = bounded(1, MANY)
    keep: int = bounded(1, MANY)


@dataclass(frozen=True)
class Sample:
    context: int = bounded(0, 4096)
    frames: int = bounded(1, 65536)
    clips: int = bounded(1, MANY)
    steps: int = bounded(1, 65536)
    solver: str = choices("midpoint", "euler")
    solver_steps: int = bounded(1, 65536)
    cfg_temporal: float
    cfg_canvas: float
    order: str = choices("random", "motion")


@dataclass(frozen=True)
class Choice:
    """Of extensions/choice.py, the only section that a file may leave out; configs/choice.yaml says what the keys mean."""

    latent: int = bounded(0, 4096, default=0)
    noise: float = bounded(1e-3, default=0.2)
    weight: float = bounded(0, default=0.01)
    drop: float = bounded(0, 1, default=0.3)
    cfg: float = 1.0
    temperature: float = bounded(0, default=1.0)
    solver_steps: int = bounded(1, 65536, default=5)


@dataclass(frozen=True)
class Config:
    run: str = a_path()
    seed: int = bounded(0, 2**32 - 1)
    device: str = choices("auto", "cuda", "mps", "cpu")
    data: Data
    tokenizer: Tokenizer
    model: Model
    train: Train
    sample: Sample
    choice: Choice = Choice()

    @property
    def grid(self) -> int:
        """Tokens along one side of a frame; a frame has grid * grid of them."""
        return self.data.size // self.tokenizer.stride


# --------------------------------------------------------------------------------------------------- load, save, check


def load(path, overrides=()) -> Config:
    """Read a YAML file (and its `base` files), apply `key.sub=value` overrides, check everything.

    Raises UserError for an unreadable file, an unknown or missing key (naming the nearest valid one), a value of the
    wrong type or out of range, and sizes that do not fit together.
    """
    tree = _read(Path(path), seen=())
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals or not name:
            raise UserError(f"override '{override}' is not of the form key.sub=value")
        node = tree
        *parents, last = name.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"override '{override}': '{parent}' is a value, not a section")
        node[last] = value
    return from_dict(tree, where=str(path))


def from_dict(tree: dict, where="config") -> Config:
    """Build and check a Config from nested dicts, as stored in files and checkpoints."""
    cfg = build(Config, tree, "", where)
    check(cfg)
    return cfg


def to_dict(cfg: Config) -> dict:
    return dataclasses.asdict(cfg)


def save(cfg: Config, path) -> None:
    """Write the resolved configuration; `load(path)` gives back an equal one."""
    write_text(path, yaml.safe_dump(to_dict(cfg), sort_keys=False, allow_unicode=True))


def write_text(path, text: str) -> None:
    """Write a file aside, flush it to the disk, rename it: a crash leaves either the old file or the new one, whole."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def flat(cfg: Config) -> dict:
    """{'data.size': 32, ...}: every value under its dotted name."""
    tree = to_dict(cfg)
    sections = {k: v for k, v in tree.items() if isinstance(v, dict)}
    values = {k: v for k, v in tree.items() if not isinstance(v, dict)}
    return values | {f"{s}.{k}": v for s, section in sections.items() for k, v in section.items()}


def check(cfg: Config) -> None:
    """Sizes that must fit together; each message prints both numbers. Raises UserError."""
    d, t, m, s, c = cfg.data, cfg.tokenizer, cfg.model, cfg.sample, cfg.choice
    if not cfg.run:
        raise UserError("run is empty; it names the folder that everything is written to")
    for name, path in (
        ("run", cfg.run),
        ("data.path", d.path),
        ("data.test_list", d.test_list),
        ("tokenizer.checkpoint", t.checkpoint),
    ):
        try:
            possible = b"\0" not in os.fsencode(path)
        except UnicodeEncodeError:
            possible = False
        if not possible:
            raise UserError(f"{name}={path!r} cannot be the name of a file")
    if t.stride & (t.stride - 1):
        raise UserError(f"tokenizer.stride={t.stride} is not a power of two")
    if d.size % t.stride:
        raise UserError(f"data.size={d.size} is not divisible by tokenizer.stride={t.stride}")
    if m.width % m.heads or (m.width // m.heads) % 2:
        raise UserError(
            f"model.width={m.width} does not give model.heads={m.heads} heads of one even size"
        )
    if m.window > d.frames:
        raise UserError(
            f"model.window={m.window} is more than the data.frames={d.frames} of a training clip"
        )
    if s.context >= s.frames:
        raise UserError(
            f"sample.context={s.context} leaves nothing to predict of sample.frames={s.frames}; "
            "frames counts the context too"
        )
    if s.steps > cfg.grid**2:
        raise UserError(
            f"sample.steps={s.steps} is more than the {cfg.grid**2} tokens of a frame "
            f"(data.size={d.size}, tokenizer.stride={t.stride})"
        )
    if c.latent and not m.canvas:
        raise UserError(
            f"choice.latent={c.latent} needs the canvas (model.canvas=true), which it conditions"
        )
    if not c.latent and (c.cfg, c.temperature) != (1, 1):
        raise UserError(
            f"choice.cfg={c.cfg} and choice.temperature={c.temperature} are of the latent that the canvas is "
            "conditioned on; choice.latent=0 has none"
        )
    if s.order == "motion" and not m.canvas:
        raise UserError(
            "sample.order=motion needs the canvas (model.canvas=true) to tell what will move"
        )
    if d.name != "pushing" and not d.path:
        raise UserError(
            f"data.name={d.name} needs data.path, the folder that holds the {'videos' if d.name == 'folder' else 'TFRecords'}"
        )
    if d.test_list and d.name != "folder":
        raise UserError(
            f"data.test_list is for data.name=folder; data.name={d.name} has a test split of its own"
        )
    if d.name == "pushing" and d.size not in (32, 64):
        raise UserError(f"data.size={d.size}: the pushing world is drawn at 32 or 64 pixels")


BROKEN = (
    yaml.YAMLError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    RecursionError,
)  # PyYAML raises all of them


class Loader(yaml.BaseLoader):
    """Every scalar as the text that stands there, parsed later by the type of its field; no key twice: PyYAML takes the
    last one without a word."""

    def construct_scalar(self, node):
        nothing = node.style is None and node.value in ("~", "null", "Null", "NULL")
        return "" if nothing else super().construct_scalar(node)

    def construct_mapping(self, node, deep=False):
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        keys = [key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key, times in Counter(keys).items() if times > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key '{twice}' stands there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _read(path: Path, seen: tuple) -> dict:
    try:
        if os.path.realpath(path) in seen:
            raise UserError(f"{path}: `base` leads back to the same file")
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except BROKEN as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no keys")
    base = tree.pop("base", None)
    if not base:
        return tree
    if not isinstance(base, str):
        raise UserError(f"{path}: base must be the path of another YAML file")
    return _merge(_read(path.parent / base, (*seen, os.path.realpath(path))), tree)


def _merge(base: dict, over: dict) -> dict:
    both = {
        k: _merge(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v
        for k, v in over.items()
    }
    return base | both


REMOVED = {
    *(f"model.canvas_{key}" for key in ("as", "gradient", "latent", "under")),
    *(f"model.choice_{key}" for key in ("loss", "noise", "reads", "tells", "weight")),
    *("model.drop_choice", "sample.cfg_choice", "sample.choice_steps", "sample.choice_temperature"),
}


def build(kind, tree, prefix, where):
    """Build one section from a dict: every key known and of its type, none missing but those that have a default.

    Raises UserError.
    """
    if not isinstance(tree, dict):
        raise UserError(
            f"{where}: '{prefix.rstrip('.')}' must be a section with keys, got {reprlib.repr(tree)}"
        )
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in tree:
        if f"{prefix}{key}" in REMOVED:
            raise UserError(
                f"{where}: {prefix}{key} is a key of an earlier version of this project; go on with commit a867726, "
                "which has it, or train anew without it (keys of the choosing canvas: configs/choice.yaml)"
            )
        if key not in fields:
            near = difflib.get_close_matches(str(key)[:100], fields, n=1, cutoff=0.0)[0]
            raise UserError(
                f"{where}: unknown key '{prefix}{str(key)[:100]}'; did you mean '{prefix}{near}'?"
            )
    tree = {
        name: to_dict(f.default) if dataclasses.is_dataclass(f.type) else f.default
        for name, f in fields.items()
        if f.default is not dataclasses.MISSING
    } | tree
    missing = [prefix + name for name in fields if name not in tree]
    if missing:
        raise UserError(
            f"{where}: missing {', '.join(missing)}; `base: config.yaml` as first line supplies the defaults"
        )
    values = {}
    for name, f in fields.items():
        nested = dataclasses.is_dataclass(f.type)
        values[name] = (
            build(f.type, tree[name], f"{name}.", where)
            if nested
            else _value(f, tree[name], prefix + name, where)
        )
    return kind(**values)


NUMBER = re.compile(
    r"[-+]?(0|[1-9]\d*)?(\.\d*)?([eE][-+]?\d+)?", re.ASCII
)  # no 010, 1:30, 0x10, 1_000: YAML reads them in its own way
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _value(f, value, name, where):
    """One value, parsed by the type of its field where it is text; paths with the home folder in the place of `~`."""
    kind = {int: "int, such as 10", float: "float, such as 0.1 or 1e-3"}.get(
        f.type, f.type.__name__
    )
    wrong = UserError(f"{where}: {name} must be {kind}, got {reprlib.repr(value)}")
    if f.type is bool and isinstance(value, str):
        value = WORDS.get(value.lower(), value)
    elif f.type is str and f.metadata.get("path") and isinstance(value, str):
        value = os.path.expanduser(value)
    elif f.type in (int, float) and not isinstance(value, bool):
        try:
            if isinstance(value, str) and not NUMBER.fullmatch(value):
                raise ValueError
            number = float(value)
        except (ValueError, OverflowError, TypeError):
            raise wrong from None
        value = int(number) if f.type is int and number.is_integer() else number
    if type(value) is not f.type:
        raise wrong
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: {name} must be finite, got {value}")
    allowed = f.metadata.get("choices")
    if allowed and value not in allowed:
        raise UserError(
            f"{where}: {name} must be one of {', '.join(allowed)}, got {reprlib.repr(value)}"
        )
    if "low" in f.metadata and not f.metadata["low"] <= value <= f.metadata["high"]:
        raise UserError(
            f"{where}: {name}={value} must lie between {f.metadata['low']} and {f.metadata['high']}"
        )
    return value
