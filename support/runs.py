"""What belongs to a run: its model and tokenizer in files, its folder, going on with it."""

import contextlib
import re
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from canvas import CanvasMAR
from extensions.choice import ChoosingCanvasMAR
from support import config, data, storage
from support.config import Config, UserError, log, warn
from support.fast import to_precision
from support.machine import pick_precision
from support.options import SAMPLING, sampling_keys
from tokenizer import Tokenizer


def build_model(cfg: Config) -> CanvasMAR:
    """Return a new model: the paper's, or the extension's where the configuration asks for it."""
    return ChoosingCanvasMAR(cfg) if cfg.choice.latent else CanvasMAR(cfg)


# ------------------------------------------------------------------------------ to sample from


def run_folder(path) -> Path:
    """Return the run folder of a --ckpt: that folder itself, or the one that holds the .pt file."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def load_run(path, device, args=None) -> tuple[Config, CanvasMAR, Tokenizer]:
    """Load a run folder or a checkpoint file: (configuration, averaged model, its tokenizer).

    Of a folder it is the newest checkpoint that is not damaged. Where the videos are and what to
    sample is read from the run's config.yaml beside it, and from sample.py's options in `args`.
    Call the networks under `autocast(device, cfg.train.precision)`: bf16 weights are rounded here.
    Raises UserError if a file is missing, damaged or of another kind, or the options do not fit.
    """
    file, keys = Path(path), ("config", "vae", "ema")
    if file.is_dir():
        file, stored = storage.load_latest(file, "", "model", keys)
    else:
        stored = storage.read(file, "model", keys)
    if file is None:
        raise UserError(f"{Path(path)} holds no latest.pt; is the training still at the tokenizer?")
    tree = config.to_dict(config.from_dict(stored["config"], where=str(file)))
    beside = file.parent / "config.yaml"
    if "net" in stored and beside.exists():  # it may have been edited since; not of an export
        now = config.to_dict(config.load(beside))
        tree["data"] |= {key: now["data"][key] for key in ("path", "test_list", "workers")}
        tree["choice"] |= {key: now["choice"][key] for key in SAMPLING}
        tree["sample"] = now["sample"]
    for section, f, name in sampling_keys():
        if getattr(args, name, None) is not None:
            tree[section][f.name] = getattr(args, name)
    cfg = config.from_dict(tree, where="options")
    model = build_model(cfg)
    storage.load_state(model, stored["ema"], file)
    model = model.to(device).eval().requires_grad_(False)
    tokenizer = unpack_tokenizer(stored["vae"], file, device)
    to_precision(cfg.train.precision, model, tokenizer)
    return cfg, model, tokenizer


# ------------------------------------------------------------------------------ tokenizer files


def save_tokenizer(tokenizer: Tokenizer, path) -> None:
    """Write weights, statistics and settings; `load_tokenizer` reads them."""
    storage.write(pack_tokenizer(tokenizer), path)


def load_tokenizer(path, device="cpu", expect: config.Tokenizer | None = None) -> Tokenizer:
    """Read a tokenizer.pt, frozen.

    Raises UserError if it is missing, damaged, something else, or not of the expected sizes.
    """
    stored = storage.read(path, "tokenizer", ("config", "state"))
    tokenizer = unpack_tokenizer(stored, path, device)
    for key in ("stride", "channels", "width") if expect else ():
        there, wanted = getattr(tokenizer.cfg, key), getattr(expect, key)
        if there != wanted:
            raise UserError(f"{path} has tokenizer.{key}={there}, the configuration says {wanted}")
    return tokenizer


def pack_tokenizer(tokenizer: Tokenizer) -> dict:
    """Return it as tensors and plain values, as in a tokenizer.pt and in a model's checkpoint."""
    settings, state = config.to_dict(tokenizer.cfg), tokenizer.state_dict()
    return {"kind": "tokenizer", "config": settings, "state": state}


def unpack_tokenizer(stored: dict, path, device="cpu") -> Tokenizer:
    """Return the tokenizer of what `pack_tokenizer` gave, frozen; `path` is named in errors."""
    try:
        settings, state = stored["config"], stored["state"]
    except (TypeError, LookupError):
        raise UserError(f"{path} holds no whole tokenizer") from None
    tokenizer = Tokenizer(config.build(config.Tokenizer, settings, "tokenizer.", str(path)))
    storage.load_state(tokenizer, state, path)
    return tokenizer.to(device).eval().requires_grad_(False)


def adopt_tokenizer(cfg: Config) -> bool:
    """Say whether the run has a tokenizer.pt; take that of tokenizer.checkpoint if it has none."""
    t, file = cfg.tokenizer, Path(cfg.run) / "tokenizer.pt"
    _restore_tokenizer(cfg.run)
    if t.checkpoint and (not file.exists() or Path(t.checkpoint).exists()):
        named = load_tokenizer(t.checkpoint, expect=t)
        if not file.exists():
            config.save(cfg, Path(cfg.run) / "config.yaml")
            save_tokenizer(named, file)
        elif named.fingerprint() != load_tokenizer(file).fingerprint():
            what = f"{file} is another tokenizer than tokenizer.checkpoint={t.checkpoint}"
            raise UserError(f"{what}; set run= to another folder")
    if file.exists():
        for finished in storage.list_checkpoints(cfg.run, "tokenizer_"):
            finished.unlink()
    return file.exists()


def _restore_tokenizer(folder) -> None:
    """Write a damaged or lost tokenizer.pt again from the newest checkpoint of the model."""
    file = Path(folder) / "tokenizer.pt"
    try:
        why = None if file.exists() and storage.read(file, "tokenizer") else f"{file} is gone"
    except storage.CorruptFile as error:
        why = error
    keys = ("vae", "net")  # the latter lacks in an exported file, which refuses to go on anyway
    source, stored = storage.load_latest(folder, "", "model", keys) if why else (None, None)
    if source:
        tokenizer = unpack_tokenizer(stored["vae"], source)
        if file.exists():
            file.rename(f"{file}.damaged")
        save_tokenizer(tokenizer, file)
        warn(f"{why}; it is written again from {source.name}")


# ------------------------------------------------------------------------------- a run's folder


def open_run(cfg: Config, source: str, machine, stack) -> Config:
    """Lock the run's folder and return cfg with its precision decided.

    Raises UserError if something was trained there with another configuration. `source` is the
    file of the configuration, `stack` what releases the lock at the end.
    """
    folder, file = Path(cfg.run), Path(cfg.run) / "config.yaml"
    if file.resolve() == Path(source).resolve() and not any(folder.glob("*.pt")):
        what = f"run={cfg.run} is the folder of {source} itself, which would be overwritten"
        raise UserError(f"{what}; choose another")
    stack.enter_context(storage.lock(folder))
    bound = () if storage.list_checkpoints(folder, "") else storage.FIRST_STAGE
    try:
        old = config.load(file) if file.exists() and any(folder.glob("*.pt")) else None
    except UserError as error:
        hint = "if it was edited, delete it: the checkpoints hold the same"
        raise UserError(f"{error}; {hint}") from None
    precision = pick_precision(cfg, machine.device, old)
    cfg = replace(cfg, train=replace(cfg.train, precision=precision))
    changed = storage.compare(old, cfg, folder, bound) if old else ""
    if changed:
        log(f"{folder} goes on with {changed}")
    return cfg


def picture_path(cfg: Config, name: str) -> Path:
    """Return the path of a picture in the run's samples/, which is made."""
    return storage.make_folder(Path(cfg.run) / "samples") / name


def save(cfg, stage, ema, optimizer, step) -> None:
    """Write the stage's checkpoint: tensors and plain values only."""
    parts = {"net": stage.net, "ema": ema, "optimizer": optimizer}
    states = {name: part.state_dict() for name, part in parts.items()}
    stored = {"kind": stage.kind, "step": step, **stage.extra, **states}
    storage.save_checkpoint(stored, cfg.run, stage.prefix, cfg.train.keep)


def resume(cfg, machine, source, stage, ema, optimizer) -> int:
    """Load the stage's newest whole checkpoint into net, average and optimizer.

    Returns its step, 0 without one. From here on the folder belongs to this configuration.
    """
    clips = machine.ranks * stage.batch * stage.accumulate
    stage.extra |= {"config": config.to_dict(cfg), "clips_per_step": clips}
    stage.extra["data"] = agreed_fingerprint(machine, source)
    keys = ("step", "config", "data", "clips_per_step", "net", "ema", "optimizer")

    found = {}  # what rank 0 has read already

    def find():
        file, stored = storage.load_latest(cfg.run, stage.prefix, stage.kind, keys)
        if file:
            check_stored(cfg, stage, file, stored)
            found.update(stored)
        return file

    def begin():
        if file:
            storage.clean_up(cfg.run, stage.prefix, file, stored["step"])
        storage.forget_metrics(cfg.run, stage.kind, stored["step"])
        config.save(cfg, Path(cfg.run) / "config.yaml")  # what may change may have changed
        return stored["step"]

    file, stored = machine.on_rank0(find), {"step": 0}
    if file:
        stored = found or storage.read(file, stage.kind, keys)
        for part, state in ((stage.net, "net"), (ema, "ema"), (optimizer, "optimizer")):
            storage.load_state(part, stored[state], file)
        _check_moments(stage.net, optimizer, file)
    return machine.on_rank0(begin)


def _check_moments(net, optimizer, file) -> None:
    """Refuse an optimizer's state of other shapes, which torch does not compare."""
    for p in net.parameters():
        state = optimizer.state[p] if isinstance(optimizer.state[p], dict) else {}
        shapes = [getattr(state.get(name), "shape", None) for name in ("exp_avg", "exp_avg_sq")]
        if shapes != [p.shape, p.shape]:
            raise UserError(f"{file} has the optimizer's state of another configuration")


def check_stored(cfg, stage, file, stored) -> None:
    """Raise UserError if a checkpoint is not of this run; other data may have grown on purpose."""
    bound = () if stage.kind == "model" else storage.FIRST_STAGE
    storage.compare(config.from_dict(stored["config"], where=str(file)), cfg, file, bound)
    if stored.get("tokenizer") != stage.extra.get("tokenizer"):
        raise UserError(f"{file} was trained with another tokenizer than {cfg.run}/tokenizer.pt")
    then, now = stored["clips_per_step"], stage.extra["clips_per_step"]
    if then != now:
        keys = "train.batch x train.accumulate" if stage.kind == "model" else "tokenizer.batch"
        what = f"{file} was trained with {then} clips a step, now it would be {now}"
        raise UserError(f"{what}; choose {keys} so that the product with the processes stays")
    step = stored["step"]
    if type(step) is not int or not 0 < step <= stage.steps:
        raise UserError(f"{file} is at step {step} already, and this run is to have {stage.steps}")
    if stored["data"] != stage.extra["data"]:
        changed = f"{stored['data']} then, {stage.extra['data']} now"
        warn(f"the training data have changed since {file} ({changed}): the clips are others")


# ---------------------------------------------------------------------- what can befall a run


def agreed_fingerprint(machine, source) -> str:
    """Return data.fingerprint. Raises UserError if some processes see other data than rank 0."""
    mine = data.fingerprint(source)
    theirs = machine.on_rank0(lambda: mine)
    if machine.all_reduce_max(int(mine != theirs)):
        what = f"process {machine.rank} has {mine}, process 0 {theirs}"
        raise UserError(f"{what}: the processes do not see the same training data")
    return mine


@contextlib.contextmanager
def explain_errors(machine):
    """Turn what can befall a training from outside into a UserError."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        lost = re.search("connection (closed|reset)|broken pipe|read error|gloo", text, re.I)
        if machine.ranks == 1 or not (lost or isinstance(error, dist.DistError)):
            raise
        why = f"process {machine.rank} lost another one, or cannot reach it ({text[:300]})"
        raise UserError(f"{why}; the same command goes on from the last checkpoint") from None


def refuse_not_finite(cfg, machine, stage, step, bad) -> None:
    """Raise UserError where a loss, a gradient or a weight is not finite.

    `bad` is the first step whose loss or gradient was not, 0 for none. Nothing is saved after it.
    """
    weights = torch.stack(torch._foreach_norm(list(stage.net.parameters()))).sum()
    bad = torch.where((bad == 0) & ~torch.isfinite(weights), step, bad)
    first = machine.all_reduce_max(int(bad))
    if not first:
        return
    lr = "train.lr" if stage.kind == "model" else "tokenizer.lr"
    saved = next(iter(storage.steps(cfg.run, stage.prefix)), "none of this stage yet")
    raise UserError(
        f"the loss, its gradient or a weight is not finite at step {first} of {stage.steps}; the "
        f"last good checkpoint is {saved}. Try a smaller {lr} or train.clip, or "
        "train.precision=fp32: these may change when a run goes on"
    )
