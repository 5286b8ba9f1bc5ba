"""Options of the scripts, without torch, so that --help and a wrong word are answered at once."""

import argparse
from dataclasses import fields

from support import config
from support.config import Config

# Keys of `choice` that training does not read.
SAMPLING = ("cfg", "temperature", "solver_steps")


def train(doc: str) -> tuple[str, list[str]]:
    """Return the file of the configuration and the `key.sub=value` words of train.py."""
    parser = config.Parser(doc)
    parser.add_argument("config", metavar="CONFIG.yaml", help="as config.yaml or one of configs/")
    parser.add_argument("keys", metavar="key.sub=value", nargs="*", help="of the configuration")
    args = parser.parse_args()
    return args.config, args.keys


def sample(doc: str) -> argparse.Namespace:
    """Return the options of sample.py."""
    parser = config.Parser(doc)
    add = parser.add_argument
    add("--ckpt", required=True, help="a run folder, or one of its .pt files")
    add("--out", help="folder for the results (default: samples/ in the run folder)")
    add("--video", help="continue the end of this video, of one scene, not clips of the test split")
    add_device(parser)
    add_sampling(parser)
    add_compile(parser)
    return parser.parse_args()


def add_device(parser):
    parser.add_argument("--batch", type=int, default=64, help="clips at once; does not change them")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])


def add_compile(parser):
    about = "torch.compile, on a GPU with CUDA graphs: once for each spatial step and batch size"
    parser.add_argument("--compile", action="store_true", help=about)


def add_sampling(parser, skip=()):
    """Add --seed and the keys of the `sample` section, and those of `choice` about sampling."""
    parser.add_argument("--seed", type=int, help="other seed, other futures (default: the run's)")
    for section, f, name in sampling_keys():
        if name not in skip:
            of = " | ".join(map(str, f.metadata.get("choices", ())))
            about = f"{of} (default: {section}.{f.name} of the run)".strip()
            parser.add_argument(f"--{name.replace('_', '-')}", type=f.type, help=about)


def sampling_keys():
    """Yield (section, field, name of its option) for each key that only sampling reads."""
    for f in fields(config.Sample):
        yield "sample", f, f.name
    for f in fields(config.Choice):
        if f.name in SAMPLING:
            yield "choice", f, f"choice_{f.name}"


def sampling_seed(cfg: Config, args) -> int:
    """Return --seed, or the run's seed. Raises UserError if it is out of range."""
    seed = cfg.seed if args.seed is None else args.seed
    return config.from_dict(config.to_dict(cfg) | {"seed": seed}, where="options").seed
