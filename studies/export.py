"""A trained run as one small file: averaged weights and tokenizer, half precision, nothing else.

    python -m studies.export runs/pushing pretrained/pushing.pt
    python sample.py --ckpt pretrained/pushing.pt

Such a file can be sampled from and scored, but not trained further.
"""

import os

from support import config  # before torch: it says how threads wait
import torch

from support import runs, storage
from support.config import UserError


def half(values):
    """Return nested dicts with their floating point tensors in half precision."""
    if isinstance(values, dict):
        return {key: half(value) for key, value in values.items()}
    return values.half() if torch.is_tensor(values) and values.is_floating_point() else values


def main():
    """The command line. Raises UserError."""
    parser = config.Parser(__doc__)
    parser.add_argument("run", help="a run folder, or one of its .pt files")
    parser.add_argument("file", help="to write")
    args = parser.parse_args()
    if os.path.exists(args.file):
        raise UserError(f"{args.file} is there already; delete it, or choose another name")
    cfg, model, tokenizer = runs.load_run(args.run, "cpu")
    stored = {"kind": "model", "config": config.to_dict(cfg), "ema": model.state_dict()}
    stored["vae"] = runs.pack_tokenizer(tokenizer)
    storage.write(half(stored), storage.make_file(args.file))
    print(f"wrote {args.file}")


if __name__ == "__main__":
    config.run_main(main)
