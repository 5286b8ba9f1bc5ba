"""Device and precision, the processes that torchrun starts, and the signals that end them."""

import atexit
import contextlib
import ctypes
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Callable

import torch
import torch.distributed as dist
from torch.utils._triton import has_triton
from torch.utils.data import DataLoader

from support.config import Config, UserError

ENDING = {getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)}


@dataclass
class Machine:
    """One of the processes that train together, and what they exchange beside gradients."""

    device: torch.device
    rank: int
    ranks: int
    group: dist.ProcessGroup | None = None  # over the CPU
    slow_group: dist.ProcessGroup | None = None  # for work of hours: reading a tree of videos
    busy: bool = False  # in the training loop, which ends its step and saves before it stops
    stopped: int = 0  # the signal that asked us to stop
    asked: float = 0.0  # and when, in seconds

    def on_rank0(self, work: Callable):
        """Run work() on rank 0 while the others wait; return its result on all of them.

        If it fails, rank 0 raises and the others end.
        """
        result = failure = None
        if self.rank == 0:
            try:
                result = work()
            except Exception as error:
                failure = error
        if self.ranks > 1:
            told = [result, failure is not None]
            dist.broadcast_object_list(told, group=self.slow_group)
            if told[1] and self.rank > 0:
                sys.exit(2)
            result = told[0]
        if failure:
            raise failure
        return result

    def all_reduce_max(self, number: int) -> int:
        """Return the largest of the processes' numbers."""
        if self.ranks > 1:
            numbers = torch.tensor(number)
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self.group)
            number = int(numbers)
        return number


def start(cfg: Config) -> Machine:
    """Choose the device, join the processes of torchrun, handle the signals that end a process."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(cfg.device)
    if device.type == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= count:
            raise UserError(f"process {local} has no GPU, there are {count}: start fewer processes")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    machine = Machine(device, rank, ranks)
    if ranks > 1:
        _join(machine)
    _handle_signals(machine)
    return machine


def _join(machine: Machine) -> None:
    """Form the process groups. Raises UserError for a device that is for one process."""
    kind, rank, ranks = machine.device.type, machine.rank, machine.ranks
    if kind == "mps":
        raise UserError("an Apple GPU is for one process: use `python train.py`, or set device=cpu")
    backend = "nccl" if kind == "cuda" else "gloo"
    store, hour = rendezvous(rank, ranks), timedelta(hours=1)  # rank 0 draws and saves meanwhile
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=hour)
    machine.group = dist.new_group(backend="gloo", timeout=hour)
    machine.slow_group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))


def _handle_signals(machine: Machine) -> None:
    """End at once on SIGINT, SIGTERM, SIGHUP; in the training loop, after the step.

    A second signal within two seconds is the same one: torchrun passes on a ctrl-c.
    """

    def tell(text):
        if machine.rank == 0:
            with contextlib.suppress(OSError):
                os.write(2, f"\n{text}\n".encode())  # print may be what was interrupted

    def stop(number, _frame):
        first, now = not machine.stopped, time.monotonic()
        if first:
            machine.stopped, machine.asked = number, now
        if now > machine.asked + 2 or (first and not machine.busy):
            tell("stopped at once; the same command goes on from what was saved")
            sys.exit(128 + number)
        if first:
            tell("stopping after this step; once more stops at once")

    for each in ENDING:
        if each.name != "SIGHUP" or signal.getsignal(each) != signal.SIG_IGN:  # as under nohup
            signal.signal(each, stop)


def load_batches(dataset, workers: int, **options):
    """Return an iterator over a DataLoader. Only its `next` raises UserError for a dead process.

    Torch's own handler of SIGCHLD would raise anywhere, also while it is said what went wrong.
    """
    if not workers:
        return iter(DataLoader(dataset, **options))
    batches = _load_batches(dataset, workers, options)
    next(batches)  # the processes are started at once
    return batches


def _load_batches(dataset, workers, options):
    atexit.register(_end_workers)
    try:
        with contextlib.ExitStack() as stack:
            if hasattr(signal, "pthread_sigmask"):  # not on Windows; ctrl-c is for the main process
                before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
                stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
                stack.callback(signal.signal, signal.SIGCHLD, signal.SIG_DFL)
            loaded = iter(DataLoader(dataset, num_workers=workers, **options))
        yield
        yield from loaded
    except (RuntimeError, OSError, EOFError) as error:
        _end_workers()
        text = " ".join(str(error).split())
        if "in DataLoader worker process" in text and "</torch_" not in text:  # but shared memory
            raise  # a bug
        why = text.rpartition("Error: ")[2][:150] or type(error).__name__
        what = f"a process that prepares data died ({why}); if memory or /dev/shm was short"
        raise UserError(f"{what}, data.workers=0 helps; the same command goes on") from None


def _end_workers():
    """Also at exit, as an error may still hold them: Python would wait for its SIGTERM to do."""
    for process in multiprocessing.active_children():
        process.kill()


def rendezvous(rank: int, ranks: int) -> dist.Store:
    """Return a store that only the processes of this attempt write to.

    torchrun keeps one store for all restarts, with the addresses of dead processes (PyTorch issue
    135712), so each process says hello under a new name. Rank 0 cannot tell old names from new
    ones: it answers all until each process has thanked it.
    """
    store, name = next(dist.rendezvous("env://"))[0], uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello {rank}", name)
        name = store.get(f"welcome {name}").decode()
        store.set(f"thanks {name} {rank}", "")
    while rank == 0 and not store.check([f"thanks {name} {r}" for r in range(1, ranks)]):
        for r in range(1, ranks):
            store.set(f"welcome {store.get(f'hello {r}').decode()}", name)
        time.sleep(0.05)
    return dist.PrefixStore(name, store)


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks, which each training step asks for again.

    A step of config.yaml takes 439 instead of 477 ms of CPU time (medians of 8, 2 cores).
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        # M_MMAP_THRESHOLD, of which 2**25 is the documented limit, and M_TRIM_THRESHOLD
        if libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25):
            libc.mallopt(-1, 2**31 - 1)


def pick_device(name: str) -> torch.device:
    """auto | cuda | mps | cpu -> a device, set up to be fast. Raises UserError if there is none."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind in there if there[kind]), "cpu")
    if not there.get(name, True):
        raise UserError(f"device={name}, but this machine has none; set device=auto or device=cpu")
    if name == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    elif name == "cpu":
        keep_freed_memory()
    return torch.device(name)


def autocast(device: torch.device, precision: str):
    """Return the context of a forward pass: bf16 autocast, or none for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def compiles(cfg: Config, device: torch.device) -> bool:
    """Resolve train.compile=auto: on a GPU that has triton and the C compiler it needs.

    On a CPU compiling gains a few percent, less than a short run pays for it.
    """
    if cfg.train.compile != "auto":
        return cfg.train.compile == "true"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return device.type == "cuda" and has_triton() and bool(compiler)


@contextlib.contextmanager
def explain_compiler(remedy: str):
    """Turn torch.compile's errors of a missing compiler into a UserError."""
    missing = r"working (C\+\+ compiler|triton)|triton not|TritonMissing|find C compiler|too old to"
    try:
        yield
    except RuntimeError as error:
        if not re.search(missing, str(error), re.I):
            raise
        what = "torch.compile lacks a C or C++ compiler, or triton, or a GPU new enough for it"
        raise UserError(f"{what}: {remedy}") from None


def check_memory(parameters: int, device: torch.device) -> None:
    """Refuse a model whose training state alone exceeds the memory. Raises UserError.

    Weights, gradients, average and two moments are 20 bytes a parameter.
    """
    needed, there = 20 * parameters, math.inf
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):  # not on Windows
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        what = f"a model of {parameters / 1e6:,.0f} M parameters needs {needed / 2**30:,.0f} GiB"
        remedy = "lower model.width, head_width or the depths"
        raise UserError(f"{what} to be trained, and there are {there / 2**30:,.0f} GiB: {remedy}")


def pick_precision(cfg: Config, device: torch.device, old: Config | None = None) -> str:
    """Resolve train.precision=auto: that of the run, else bf16 on CUDA devices that have it."""
    if cfg.train.precision != "auto":
        return cfg.train.precision
    if old:
        return old.train.precision
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"
