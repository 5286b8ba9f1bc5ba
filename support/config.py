"""Configuration: a YAML file and `key.sub=value` overrides -> frozen dataclasses, checked.

`config.yaml` says what each key means; the dataclasses below hold the type and range of each. A
file may begin with `base: other.yaml` and state only what differs from it.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import importlib
import os
import re
import reprlib
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml

# OpenMP threads that wait actively are slow as soon as anything else runs on the machine. torch
# reads these when it is loaded, so scripts import this module first; a user's own choice is kept.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
if not os.environ.keys() & {*WAITING}:  # turns of GNU's OpenMP, milliseconds of LLVM's
    os.environ.update(GOMP_SPINCOUNT="1000", KMP_BLOCKTIME="0")


# ---------------------------------------------------------------------- errors and the command line


class UserError(Exception):
    """Something the user can put right: shown as one line, exit status 2 (see `run_main`)."""


def run_main(main, end=True):
    """Run `main()` and end the process: errors of the user or the machine are one line on stderr.

    The exit status is then 2, and 130 after ctrl-c. A bug keeps its traceback. With end=False the
    process goes on where nothing ended it.
    """
    status = None
    if end and signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # either may be closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
    sys.stdout.reconfigure(errors="replace")  # of a console that cannot show all characters
    try:
        try:
            main()
        except SystemExit as stop:  # after --help, too
            status = stop.code or 0
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        sys.stdout = open(os.devnull, "w")
        status = 1
    except KeyboardInterrupt:
        log("interrupted")
        status = 130
    except Exception as error:
        text = user_message(error)
        if text is None:
            raise
        log("error: " + text)
        status = 2
    if status is None and not end:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not under nohup
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of an import
        return
    sys.stdout.flush()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(status or 0)  # gloo's threads now and then abort a process that ends as usual
    sys.exit(status)


def user_message(error: Exception) -> str | None:
    """Return what to tell the user of an error of theirs or of their machine; None for a bug."""
    text = str(error)
    if isinstance(error, UserError):  # from a data process, torch wraps it in a traceback
        return text.rsplit("UserError: ", 1)[-1] if "Original Traceback" in text else text
    disk = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    if isinstance(error, OSError) and (error.filename or error.errno in disk):
        return f"{error.filename or 'writing'}: {error.strerror}; what was saved before is whole"
    lacking = re.search("out of memory|can't allocate memory", text)  # on a device, on the CPU
    if lacking or isinstance(error, MemoryError):
        return f"out of memory ({text[:150]}); try a smaller train.batch, or --batch when sampling"
    return None


def log(text: str) -> None:
    """Print a line on stderr, if anybody still reads it: the terminal may have been closed."""
    with contextlib.suppress(OSError):
        print(" ".join(text.split()), file=sys.stderr, flush=True)


def warn(text: str, everywhere: bool = False) -> None:
    """Print a warning on stderr, of rank 0 alone or `everywhere`."""
    if everywhere or os.environ.get("RANK", "0") == "0":
        log("warning: " + text)


class Lines:
    """Where a bar is written that nobody sees move: each state of it becomes a line on stderr."""

    def write(self, text):
        if text.strip():
            log(text)


def progress_bar(*args, **options):
    """Return tqdm's bar; where stderr is no terminal, it is a line every half minute."""
    from tqdm import tqdm

    if not sys.stderr.isatty():
        form = "{desc}: {n_fmt} of {total_fmt}, {elapsed}, {remaining} left{postfix}"
        options |= dict(file=Lines(), mininterval=30, maxinterval=30, miniters=1, bar_format=form)
    return tqdm(*args, **options)


def require(module: str, package: str):
    """Import an optional module. Raises UserError that says which package to install."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"this needs a package that is missing: pip install {package}") from None


class Parser(argparse.ArgumentParser):
    """Options of a script whose docstring says in two paragraphs what it does and how to use it."""

    def __init__(self, doc: str):
        about, uses = doc.split("\n\n")[:2]
        raw, uses = argparse.RawDescriptionHelpFormatter, f"examples:\n{uses}"
        super().__init__(None, None, about, uses, formatter_class=raw, allow_abbrev=False)

    def print_help(self, file=None):  # argparse's own passes over a write that fails
        print(self.format_help(), end="", file=file)

    def error(self, message):
        example = self.epilog.splitlines()[1].partition("#")[0].strip()
        raise UserError(f"{message}; for example `{example}`, and --help shows more")


# --------------------------------------------------------------------------------- the sections


MANY = 10**9  # more than anybody means: a typing error should not begin to fill the memory


def bounded(low, high=sys.float_info.max, default=dataclasses.MISSING):
    return field(default=default, metadata={"low": low, "high": high})


def choices(*names):
    return field(metadata={"choices": names})


@dataclass(frozen=True)
class Data:
    name: str = choices("pushing", "folder", "bair")
    path: str
    test_list: str
    size: int = bounded(8, 4096)
    frames: int = bounded(3, 4096)  # with 2, no frame is ever trained with few masked tokens
    stride: int = bounded(1, 4096)
    train_clips: int = bounded(1, MANY)
    objects: int = bounded(2, 4)
    texture: float = bounded(0, 0.3)
    workers: int = bounded(0, 1024)


@dataclass(frozen=True)
class Tokenizer:
    checkpoint: str
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
    frame_noise_min: float = bounded(0, 1)
    frame_noise_max: float = bounded(0, 1)
    canvas_noise_max: float = bounded(0, 1)
    canvas_weight: float = bounded(0)
    drop_temporal: float = bounded(0, 1)
    drop_canvas: float = bounded(0, 1)
    drop_nested: bool
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
    cfg_temporal: float = bounded(-100, 100)
    cfg_canvas: float = bounded(-100, 100)
    order: str = choices("random", "motion")
    frame_noise: float = bounded(0, 1)
    canvas_noise: float = bounded(0, 1)


@dataclass(frozen=True)
class Choice:
    """Of extensions/choice.py; the only section with defaults. See configs/choice.yaml."""

    latent: int = bounded(0, 4096, default=0)
    noise: float = bounded(1e-3, default=0.2)
    weight: float = bounded(0, default=0.01)
    drop: float = bounded(0, 1, default=0.3)
    cfg: float = bounded(-100, 100, default=1.0)
    temperature: float = bounded(0, default=1.0)
    solver_steps: int = bounded(1, 65536, default=5)


@dataclass(frozen=True)
class Config:
    run: str
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
        """Tokens along one side of a frame, which has grid * grid of them."""
        return self.data.size // self.tokenizer.stride


# --------------------------------------------------------------------------------- load and save


def load(path, overrides=()) -> Config:
    """Read a YAML file and its `base` files, apply `key.sub=value` overrides, check everything.

    Raises UserError for the first mistake.
    """
    tree = _read(Path(path), seen=())
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"override '{override}' is not of the form key.sub=value")
        for key in reversed(name.split(".")):
            value = {key: value}
        tree = _merge(tree, value)
    return from_dict(tree, where=str(path))


def from_dict(tree: dict, where="config") -> Config:
    """Build and check a Config from nested dicts, as stored in files and checkpoints."""
    cfg = build(Config, tree, "", where)
    for problem in _problems(cfg):
        raise UserError(problem)
    return cfg


to_dict = dataclasses.asdict


def save(cfg: Config, path) -> None:
    """Write the resolved configuration; `load(path)` gives back an equal one."""
    write_text(path, yaml.safe_dump(to_dict(cfg), sort_keys=False, allow_unicode=True))


def write_text(path, text: str) -> None:
    """Write a text file in UTF-8, as a whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def replacing(path):
    """Open a temporary binary file, which is flushed and renamed to `path` at the end.

    A crash leaves either the old or the new file, a failure the old one alone.
    """
    aside = Path(f"{path}.tmp")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def flat(cfg: Config) -> dict:
    """{'data.size': 32, ...}: every value under its dotted name."""
    values = to_dict(cfg)
    for name in [name for name, value in values.items() if isinstance(value, dict)]:
        values |= {f"{name}.{key}": value for key, value in values.pop(name).items()}
    return values


class Loader(yaml.BaseLoader):
    """Keep every scalar as text, parsed later by the type of its field; refuse repeated keys."""

    def construct_scalar(self, node):
        nothing = node.style is None and node.value in ("~", "null", "Null", "NULL")
        return "" if nothing else super().construct_scalar(node)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.YAMLError(f"the key '{key.value}' stands there twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read(path: Path, seen: tuple) -> dict:
    try:
        if os.path.realpath(path) in seen:
            raise UserError(f"{path}: `base` leads back to the same file")
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("base", ""), str):
        raise UserError(f"{path} holds no keys, or a `base` that is not the path of a file")
    base = tree.pop("base", "")
    if base:
        tree = _merge(_read(path.parent / base, (*seen, os.path.realpath(path))), tree)
    return tree


def _merge(base, over):
    """Return nested dicts with the values of `over`, or of `base` where it has none."""
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    return base | {key: _merge(base.get(key), value) for key, value in over.items()}


# ---------------------------------------------------------------------------------------- checks


def build(kind, tree, prefix: str, where: str):
    """Build one section from a dict. Raises UserError for wrong or missing keys and values."""
    if not isinstance(tree, dict):
        name, shown = prefix.rstrip("."), reprlib.repr(tree)
        raise UserError(f"{where}: '{name}' must be a section with keys, got {shown}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in map(str, tree):
        name = f"{prefix}{key[:100]}"
        if key not in fields:
            of = " Another version of the code made it." * where.endswith(".pt")
            near = difflib.get_close_matches(key[:100], fields, n=1, cutoff=0.0)[0]
            raise UserError(f"{where}: unknown key '{name}'; did you mean '{prefix}{near}'?{of}")
    values = {}
    for name, f in fields.items():
        if name in tree and dataclasses.is_dataclass(f.type):
            values[name] = build(f.type, tree[name], f"{name}.", where)
        elif name in tree:
            values[name] = _value(f, tree[name], f"{where}: {prefix}{name}")
    required = [name for name, f in fields.items() if f.default is dataclasses.MISSING]
    if missing := ", ".join(prefix + name for name in required if name not in tree):
        hint = "`base: config.yaml` as first line supplies the defaults"
        raise UserError(f"{where}: missing {missing}; {hint}")
    return kind(**values)


# No 010, 1:30, 0x10, 1_000: YAML reads them in its own way.
NUMBER = re.compile(r"[-+]?(0|[1-9]\d*)?(\.\d*)?([eE][-+]?\d+)?", re.ASCII)
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
EXPECTED = {int: "int, such as 10", float: "float, such as 0.1 or 1e-3", bool: "bool", str: "text"}


def _value(f: dataclasses.Field, value, name: str):
    """Parse one value and check it against its field. Raises UserError that begins with `name`."""
    shown = reprlib.repr(value)
    try:
        value = _parse(f.type, value)
    except (ValueError, OverflowError):
        raise UserError(f"{name} must be {EXPECTED[f.type]}, got {shown}") from None
    allowed, low, high = (f.metadata.get(key) for key in ("choices", "low", "high"))
    if allowed and value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}, got {shown}")
    if low is not None and not low <= value <= high:
        raise UserError(f"{name}={value} must lie between {low} and {high}")
    return os.path.expanduser(value) if f.type is str else value


def _parse(kind: type, value):
    """Return the value as `kind`, from text too. Raises ValueError where it is not plainly one."""
    if kind is bool and isinstance(value, str):
        value = WORDS.get(value.lower(), value)
    elif kind in (int, float) and type(value) in (str, int, float):
        if isinstance(value, str) and not NUMBER.fullmatch(value):
            raise ValueError
        value = float(value)
        if kind is int and value.is_integer():
            value = int(value)
    if type(value) is not kind or (kind is str and b"\0" in os.fsencode(value)):
        raise ValueError  # text may be the name of a file
    return value


def _problems(cfg: Config):
    """Yield a line for all that does not fit together, with both of the sizes."""
    d, t, m, s, c = cfg.data, cfg.tokenizer, cfg.model, cfg.sample, cfg.choice
    size, stride = f"data.size={d.size}", f"tokenizer.stride={t.stride}"
    if not cfg.run:
        yield "run is empty; it names the folder that everything is written to"
    if t.stride & (t.stride - 1):
        yield f"{stride} is not a power of two"
    if d.size % t.stride:
        yield f"{size} is not divisible by {stride}"
    if m.width % m.heads or (m.width // m.heads) % 2:
        yield f"model.width={m.width} does not give model.heads={m.heads} heads of one even size"
    if m.frame_noise_min > m.frame_noise_max:
        low, high = m.frame_noise_min, m.frame_noise_max
        yield f"model.frame_noise_min={low} is more than model.frame_noise_max={high}"
    if m.window > d.frames:
        yield f"model.window={m.window} is more than the data.frames={d.frames} of a training clip"
    if s.context >= s.frames:
        yield f"sample.context={s.context} leaves nothing to predict of sample.frames={s.frames}"
    if s.steps > cfg.grid**2:
        yield f"sample.steps={s.steps} is more than the {cfg.grid**2} tokens of {size}, {stride}"
    if c.latent and not m.canvas:
        yield f"choice.latent={c.latent} needs the canvas (model.canvas=true), which it conditions"
    if not c.latent and (c.cfg, c.temperature) != (1, 1):
        yield "choice.cfg and choice.temperature are of the latent; choice.latent=0 has none"
    if s.order == "motion" and not m.canvas:
        yield "sample.order=motion needs the canvas (model.canvas=true) to tell what will move"
    if d.name != "pushing" and not d.path:
        yield f"data.name={d.name} needs data.path, the folder that holds the data"
    if d.test_list and d.name != "folder":
        yield f"data.test_list is for data.name=folder; {d.name} has a test split of its own"
    if d.name == "pushing" and d.size not in (32, 64):
        yield f"{size}: the pushing world is drawn at 32 or 64 pixels"
