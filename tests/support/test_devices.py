"""Devices that are not at hand here: Apple GPUs have fewer operators than CPUs, and no float64."""

from importlib.resources import files

import torch
import yaml
from conftest import tiny
from torch.utils._python_dispatch import TorchDispatchMode

import sample
import train
from canvas import clip_generator, validate
from support import runs
from tokenizer import Tokenizer

PACKAGED = files("torchgen") / "packaged/ATen/native/native_functions.yaml"
OURS = {
    entry["func"].split("(")[0]: entry
    for entry in yaml.load(PACKAGED.read_text(), yaml.CSafeLoader)
}


def runs_on_mps(name: str) -> bool:
    """Whether torch has a kernel for Apple GPUs, or one made of others, as its `out` form."""
    entry = OURS[OURS[name].get("structured_delegate", name)]
    keys = {
        key.strip() for keys in entry.get("dispatch", {"Composite": ""}) for key in keys.split(",")
    }
    out = f"{name.split('.')[0]}.out"
    made = any(key.startswith("Composite") for key in keys) and (
        out == name or out not in OURS or runs_on_mps(out)
    )
    return "MPS" in keys or made


class Operators(TorchDispatchMode):
    """The names of all operators that run, and of those that give float64."""

    def __init__(self):
        super().__init__()
        self.names, self.doubles = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **kwargs or {}), func._schema.name
        if name.startswith("aten::"):
            self.names.add(f"{name[6:]}.{func._overloadname}".removesuffix(".default"))
        if any(
            torch.is_tensor(t) and t.dtype == torch.float64
            for t in torch.utils._pytree.tree_leaves(out)
        ):
            self.doubles.add(name)
        return out


def test_training_and_sampling_use_no_operator_that_apple_gpus_lack():
    seen = Operators()
    for latent, order in ((0, "random"), (4, "motion")):
        cfg = tiny(f"choice.latent={latent}", f"sample.order={order}")
        tokenizer, model = Tokenizer(cfg.tokenizer), runs.build_model(cfg)
        x, noise = torch.rand(2, 3, 3, 32, 32), torch.randn(6, cfg.tokenizer.channels, 4, 4)
        with seen:
            f = tokenizer.encode(x).detach()
            draws = model.draw([clip_generator(0, i) for i in range(2)], 3)
            for net, args in ((tokenizer, (x.flatten(0, 1), noise)), (model, (f, draws))):
                optimizer = train.make_optimizer(net, 1e-3, 0.1, torch.device("mps"))
                net(*args)[0].backward()
                train.update(net, net, optimizer, 1.0, 0.9)
            validate(model, f, 0, cfg.sample)
            sample.continue_clips(model, tokenizer, x[:, :2], cfg.sample, 0, [0, 1])
    lacking = {name for name in seen.names if not runs_on_mps(name)}
    assert lacking <= {
        name for name in seen.names if name.endswith(("_for_cpu", "_for_cpu_backward"))
    }, lacking
    assert (
        not seen.doubles
        and len(seen.names) > 80
        and not runs_on_mps("logspace")
        and runs_on_mps("linspace")
    )
