"""Where it runs: device and precision, the processes that torchrun starts, and the signals that end them."""

import contextlib
import ctypes
import math
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

from support.config import Config, UserError


@dataclass
class Machine:
    """One of the processes that train together, and what they tell each other beside gradients."""

    device: torch.device
    rank: int
    ranks: int
    group: dist.ProcessGroup | None = None  # over the CPU
    slow_group: dist.ProcessGroup | None = (
        None  # the same for work that may take hours, as reading a large tree of videos
    )
    busy: bool = False  # in the training loop, which ends its step and saves before it stops
    stopped: int = 0  # the signal that asked us to stop
    asked: float = 0.0  # and when

    def on_rank0(self, work: Callable):
        """work() on rank 0 while the others wait. Its result on all of them; if it fails, rank 0 says why and all end."""
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
        """The largest of the processes' numbers."""
        if self.ranks > 1:
            numbers = torch.tensor(number)
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self.group)
            number = int(numbers)
        return number


def start(cfg: Config) -> Machine:
    """Choose the device, join the other processes if torchrun started several, listen for the signals that end a process."""
    rank, ranks, local = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = pick_device(cfg.device)
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} has no GPU of its own: there are {torch.cuda.device_count()}; start fewer processes"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    machine = Machine(device, rank, ranks)
    if ranks > 1 and device.type == "mps":
        raise UserError(
            "an Apple GPU is for one process; start it by `python train.py`, or set device=cpu"
        )
    if ranks > 1:
        backend, hour = (
            "nccl" if device.type == "cuda" else "gloo",
            timedelta(hours=1),
        )  # rank 0 draws previews, saves, and the others wait
        dist.init_process_group(
            backend, store=rendezvous(rank, ranks), rank=rank, world_size=ranks, timeout=hour
        )
        machine.group, machine.slow_group = (
            dist.new_group(backend="gloo", timeout=hour),
            dist.new_group(backend="gloo", timeout=timedelta(hours=12)),
        )

    def stop(number, _frame):
        again = (
            machine.stopped and time.monotonic() > machine.asked + 2
        )  # torchrun passes a ctrl-c on a second time
        if not machine.busy or again:
            sys.exit(128 + number)
        if not machine.stopped:
            machine.stopped, machine.asked = number, time.monotonic()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if (
        hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    ):  # ignored under nohup
        signal.signal(signal.SIGHUP, stop)
    return machine


def rendezvous(rank: int, ranks: int) -> dist.Store:
    """A store that only the processes of this attempt write to.

    torchrun keeps one store for all its restarts, and in it the addresses of processes that are gone are taken for those of
    the new ones (PyTorch issue 135712). So everyone says hello under a new name until rank 0, which cannot tell old names
    from new ones and answers all, has everyone's thanks for the answer.
    """
    store, name = next(dist.rendezvous("env://"))[0], uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello {rank}", name)
    while rank == 0 and not store.check([f"thanks {name} {r}" for r in range(1, ranks)]):
        for r in range(1, ranks):
            store.set(f"welcome {store.get(f'hello {r}').decode()}", name)
        time.sleep(0.05)
    if rank > 0:
        name = store.get(f"welcome {name}").decode()
        store.set(f"thanks {name} {rank}", "")
    return dist.PrefixStore(name, store)


def keep_freed_memory():
    """Tell glibc to keep large freed blocks: a training step frees and asks for the same ones again, and getting fresh
    pages from the kernel each time is slow: a step of config.yaml takes 439 for 477 ms of CPU time (medians of 8 processes
    each, in turns, 2 cores). Does nothing elsewhere."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        if libc.mallopt(-3, 2**30) or libc.mallopt(
            -3, 2**25
        ):  # M_MMAP_THRESHOLD; its documented limit is the second
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def pick_device(name: str) -> torch.device:
    """auto | cuda | mps | cpu -> a device, set up to be fast. Raises UserError if what is asked for is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, has in there.items() if has)
    if not there[name]:
        raise UserError(
            f"device={name}, but this machine has none that torch can use; set device=auto or device=cpu"
        )
    if name == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    elif name == "cpu":
        keep_freed_memory()
    return torch.device(name)


def autocast(device: torch.device, precision: str):
    """bf16 where the precision says so; everything else stays as it is."""
    return (
        torch.autocast(device.type, torch.bfloat16)
        if precision == "bf16"
        else contextlib.nullcontext()
    )


def compiles(cfg: Config, device: torch.device) -> bool:
    """Resolve train.compile=auto: on a GPU that has triton and the C compiler it needs. On a CPU it gains a few percent, less than a short run pays for it."""
    return cfg.train.compile == "true" or (
        cfg.train.compile == "auto" and device.type == "cuda" and has_triton() and has_c()
    )


def has_c() -> bool:
    """Is there a compiler where triton looks for one?"""
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


@contextlib.contextmanager
def explain_compiler(remedy: str):
    """torch.compile without a compiler becomes a UserError."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(
            r"working (C\+\+ compiler|triton)|triton not|TritonMissing|find C compiler|GPUTooOld|too old to be supported by the triton",
            str(error),
            re.I,
        ):
            raise
        raise UserError(
            f"torch.compile lacks a C or C++ compiler, or triton, or a GPU new enough for it: {remedy}"
        ) from None


def check_memory(parameters: int, device: torch.device) -> None:
    """Refuse a model whose weights, gradients, average and two moments alone exceed the memory. Raises UserError."""
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        known = {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(getattr(os, "sysconf_names", ()))
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known else math.inf
    if 20 * parameters > there:
        raise UserError(
            f"a model of {parameters / 1e6:,.0f} M parameters needs {20 * parameters / 2**30:,.0f} GiB to be trained, and there are "
            f"{there / 2**30:,.0f} GiB: lower model.width, head_width or the depths"
        )


def pick_precision(cfg: Config, device: torch.device, old: Config | None = None) -> str:
    """Resolve train.precision=auto: as the run has decided already, else bf16 on CUDA devices that have it, else fp32."""
    if cfg.train.precision != "auto":
        return cfg.train.precision
    if old:
        return old.train.precision
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"
