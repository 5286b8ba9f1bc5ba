"""What the model computes, in numbers: losses, gradients, samples, and both stages of a short training (fp32, CPU).

    python tests/golden.py                   # prints them as JSON
    python tests/golden.py OTHER_CHECKOUT    # exit status 1 where that computes anything else, to the last bit

Each entry is a hash of all bytes and a sum of absolute values, which other processors reach up to rounding.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

TINY = (
    "device=cpu train.precision=fp32 train.compile=false data.frames=4 data.train_clips=50 tokenizer.stride=8 "
    "tokenizer.channels=2 tokenizer.width=4 tokenizer.steps=3 tokenizer.batch=2 model.width=16 model.heads=2 "
    "model.temporal_depth=2 model.canvas_depth=1 model.mar_depth=2 model.head_width=16 model.head_depth=1 model.window=2 "
    "train.steps=4 train.batch=2 sample.frames=5 sample.clips=2 sample.solver_steps=2"
).split()
ARMS = {
    "default": [],
    "paper": ["model.past_noise=0", "model.canvas_change=false"],
    "uniform": ["model.canvas=false"],
    "three branches, motion": ["sample.cfg_canvas=2", "sample.order=motion"],
    "latent": ["model.canvas_latent=4"],
}


def entry(*tensors) -> list:
    """[hash, sum of absolute values] of tensors."""
    arrays = [t.detach().float().contiguous().numpy() for t in tensors]
    digest = hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()[:16]
    return [digest, float(sum(abs(a.astype("float64")).sum() for a in arrays))]


def measure() -> dict:
    """{name: entry} of the code in the working directory, on one thread."""
    sys.path.insert(0, str(Path.cwd()))
    from support import config
    import torch
    from canvas import CanvasMAR, clip_generator
    from sample import generate, load_run

    torch.set_num_threads(1)
    found = {}
    for arm, changes in ARMS.items():
        cfg = config.load("config.yaml", [*TINY, *changes])
        torch.manual_seed(0)
        model = CanvasMAR(cfg)
        for p in model.parameters():  # what starts at zero would hide mistakes
            p.data = 0.3 * torch.randn(p.shape)
        f = torch.randn(2, cfg.data.frames, model.tokens, model.channels)
        loss, _ = model(f, model.draw([clip_generator(0, i) for i in range(2)], cfg.data.frames))
        loss.backward()
        frames = list(generate(model.eval(), f[:, : cfg.sample.context], cfg.sample, 0, [0, 1]))
        found[f"{arm}: loss"] = entry(loss)
        found[f"{arm}: gradients"] = entry(
            *[p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None]
        )
        found[f"{arm}: samples"] = entry(*[frame.latent for frame in frames])
        found[f"{arm}: steps"] = entry(*[step for frame in frames for step in frame.steps])
        if cfg.model.canvas:
            found[f"{arm}: canvases"] = entry(*[frame.canvas for frame in frames])
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, "train.py", "config.yaml", *TINY, f"run={folder}/run"]
        subprocess.run(run, check=True, capture_output=True)
        _, model, tokenizer = load_run(f"{folder}/run", torch.device("cpu"))
        state = torch.load(f"{folder}/run/latest.pt", weights_only=True)
    for name, tensors in (
        ("weights", state["net"]),
        ("average", state["ema"]),
        ("tokenizer", tokenizer.state_dict()),
    ):
        found[f"training: {name}"] = entry(*[tensors[key] for key in sorted(tensors)])
    return found


def main():
    mine = measure()
    if len(sys.argv) < 2:
        return print(json.dumps(mine, indent=1))
    out = subprocess.run(
        [sys.executable, Path(__file__).resolve()], cwd=sys.argv[1], check=True, capture_output=True
    ).stdout
    other = json.loads(out)
    differ = [name for name in mine if mine[name] != other.get(name)]
    print(
        f"{len(mine) - len(differ)} of {len(mine)} equal"
        + "".join(f"\n{n}: {mine[n]} here, {other.get(n)} there" for n in differ)
    )
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
