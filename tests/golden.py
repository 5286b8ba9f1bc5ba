"""What the model computes, in numbers: losses, gradients, samples, a short training (CPU).

    python tests/golden.py                   # prints them as JSON
    python tests/golden.py OTHER_CHECKOUT    # exit status 1 where that computes other bits

Each entry is a hash of all bytes and a sum of absolute values, which other processors reach up to
rounding.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

TINY = (
    "device=cpu train.precision=fp32 train.compile=false train.steps=4 train.batch=2 "
    "data.frames=4 data.train_clips=50 tokenizer.stride=8 tokenizer.channels=2 tokenizer.width=4 "
    "tokenizer.steps=3 tokenizer.batch=2 model.width=16 model.heads=2 model.temporal_depth=2 "
    "model.canvas_depth=1 model.mar_depth=2 model.head_width=16 model.head_depth=1 model.window=2 "
    "sample.frames=5 sample.clips=2 sample.solver_steps=2"
).split()
ARMS = {
    "default": [],
    "noise in sampling": ["sample.frame_noise=0.3", "sample.canvas_noise=0.2"],
    "uniform": ["model.canvas=false"],
    "three branches, motion": ["sample.cfg_canvas=2", "sample.order=motion"],
    "recompute": ["train.recompute=true", "model.diffusion_repeat=3", "sample.solver=euler"],
    "bf16": ["train.precision=bf16"],
    "choice": ["choice.latent=4"],
    "choice, guided": ["choice.latent=4", "choice.cfg=1.5", "choice.temperature=1.3"],
}


def entry(*tensors) -> list:
    """[hash, sum of absolute values] of tensors."""
    arrays = [t.detach().float().contiguous().numpy() for t in tensors]
    digest = hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()[:16]
    return [digest, float(sum(abs(a.astype("float64")).sum() for a in arrays))]


def by_name(state: dict) -> list:
    """The tensors of a state dict, or gradients, in the order of their names."""
    return [state[name] for name in sorted(state)]


def measure_arm(model, cfg, name) -> dict:
    """{name: entry} of a model with random weights."""
    import torch
    from canvas import clip_generator
    from sample import generate

    for key, p in model.named_parameters():  # what starts at zero would hide mistakes
        g = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        p.data = 0.3 * torch.randn(p.shape, generator=g)
    shape = (2, cfg.data.frames, model.tokens, model.channels)
    f = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    low = cfg.train.precision == "bf16"
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        loss, _ = model(f, model.draw([clip_generator(0, i) for i in range(2)], cfg.data.frames))
        loss.backward()
        frames = list(generate(model.eval(), f[:, : cfg.sample.context], cfg.sample, 0, [0, 1]))
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    found = {
        "loss": entry(loss),
        "gradients": entry(*by_name(gradients)),
        "samples": entry(*[frame.latent for frame in frames]),
        "steps": entry(*[step for frame in frames for step in frame.steps]),
    }
    if cfg.model.canvas:
        canvases = [frame.f_hat for frame in frames]
        found["canvases"] = entry(*canvases)
    return {f"{name}: {what}": value for what, value in found.items()}


def measure() -> dict:
    """{name: entry} of the code in the working directory, on one thread."""
    sys.path.insert(0, str(Path.cwd()))
    from support import config, runs
    import torch

    torch.set_num_threads(1)
    found = {}
    for arm, changes in ARMS.items():
        cfg = config.load("config.yaml", [*TINY, *changes])
        found |= measure_arm(runs.build_model(cfg), cfg, arm)
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, "train.py", "config.yaml", *TINY, f"run={folder}/run"]
        subprocess.run(run, check=True, capture_output=True)
        _, model, tokenizer = runs.load_run(f"{folder}/run", torch.device("cpu"))
        state = torch.load(f"{folder}/run/latest.pt", weights_only=True)
    found["training: weights"] = entry(*by_name(state["net"]))
    found["training: average"] = entry(*by_name(state["ema"]))
    found["training: tokenizer"] = entry(*by_name(tokenizer.state_dict()))
    return found


def main():
    mine = measure()
    if len(sys.argv) < 2:
        print(json.dumps(mine, indent=1))
        return
    command = [sys.executable, Path(__file__).resolve()]
    out = subprocess.run(command, cwd=sys.argv[1], check=True, capture_output=True).stdout
    other = json.loads(out)
    differ = [name for name in mine if mine[name] != other.get(name)]
    print(f"{len(mine) - len(differ)} of {len(mine)} equal")
    for name in differ:
        print(f"{name}: {mine[name]} here, {other.get(name)} there")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
