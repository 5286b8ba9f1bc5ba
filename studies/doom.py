"""A world that nobody here made: clips of Doom, rendered by ViZDoom, as a folder of videos.

    pip install vizdoom
    python -m studies.doom data/doom        # data/doom/{train,test}/SCENARIO/NUMBER.mp4
    torchrun train.py configs/doom.yaml

Two of its scenarios (`take_cover` is that of World Models), played at random: buttons are held for
a geometric number of frames. (seed, split, number) alone decides a clip.
"""

import contextlib
import hashlib
import math
import os
import queue
import tempfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

from support import config, storage
from support.config import UserError, progress_bar
from support.data import SPLITS
from support.pictures import write_mp4

SCENARIOS = ("health_gathering", "take_cover")
TICS = 2  # of the game, 35 a second, per frame
CROP = 128  # pixels, the centre of a screen of 256x192: 53 degrees of the view
HOLD = 0.9  # probability that a frame's buttons are those of the frame before
LATEST = 150  # a clip begins after fewer frames than this of its episode
LONGEST = 128  # frames of a clip; random play does not live much longer
HELD_OUT = 10  # one test clip for so many training clips


def start_game(vizdoom, scenario: str):
    """Start a game without a window, status bar, weapon or cross hair: a context that closes it."""
    game = vizdoom.DoomGame()
    game.load_config(os.path.join(vizdoom.scenarios_path, f"{scenario}.cfg"))
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_256X192)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_window_visible(False)
    game.set_render_hud(False)
    game.set_render_weapon(False)
    game.set_render_crosshair(False)
    game.init()
    return contextlib.closing(game)


def play(game, rng, frames: int):
    """Play an episode; return its screens from a random frame on, [uint8 (192, 256, 3)].

    Fewer than `frames` if it ends before.
    """
    game.set_seed(int(rng.integers(2**31)))
    game.new_episode()
    first, buttons, screens = int(rng.integers(LATEST)), game.get_available_buttons_size(), []
    for t in range(first + frames):
        if game.is_episode_finished():
            break
        if t >= first:
            screens.append(game.get_state().screen_buffer)
        if t == 0 or rng.random() > HOLD:
            pressed = int(rng.integers(1, 2**buttons))  # any of the buttons, at least one
            game.set_action([pressed >> k & 1 for k in range(buttons)])
        game.advance_action(TICS, t + 1 >= first)  # what is not shown is not drawn
    return screens


def render(game, key, frames: int, size: int) -> np.ndarray:
    """Return the clip that `key`, a list of integers, decides: uint8 (frames, size, size, 3)."""
    rng, screens = np.random.default_rng(key), []
    while len(screens) < frames:  # an episode that ends early gives no clip
        screens = play(game, rng, frames)
    height, width = screens[0].shape[:2]
    top, left, k = (height - CROP) // 2, (width - CROP) // 2, CROP // size
    centre = np.stack(screens)[:, top : top + CROP, left : left + CROP].astype(np.uint32)
    blocks = [centre[:, i::k, j::k] for i in range(k) for j in range(k)]
    return ((sum(blocks) + k * k // 2) // (k * k)).astype(np.uint8)  # rounded means of k x k pixels


def write_clips(vizdoom, out: Path, clips: int, frames: int, size: int, seed: int) -> str:
    """Write all clips below `out`; return the SHA-256 of their frames, before they are encoded.

    Raises UserError if there is no encoder.
    """
    counts = {"train": clips, "test": math.ceil(clips / HELD_OUT)}
    jobs = [(split, number) for split in SPLITS for number in range(counts[split])]
    idle, digest, threads = queue.SimpleQueue(), hashlib.sha256(), min(os.cpu_count() or 1, 16)

    def work(job):
        split, number = job
        which, games = number % len(SCENARIOS), idle.get()
        try:
            clip = render(games[which], [seed, SPLITS.index(split), number], frames, size)
        finally:
            idle.put(games)
        file = storage.make_file(out / split / SCENARIOS[which] / f"{number:05}.mp4")
        if not write_mp4(clip[None], file, fps=35 / TICS, scale=1):
            raise UserError("clips need PyAV and its encoder libx264: pip install av")
        return clip

    with contextlib.ExitStack() as stack:
        for _ in range(threads):
            idle.put([stack.enter_context(start_game(vizdoom, name)) for name in SCENARIOS])
        pool = ThreadPool(threads)
        stack.callback(pool.join)  # before the games are closed
        stack.enter_context(pool)
        for clip in progress_bar(pool.imap(work, jobs), "rendering", len(jobs), unit="clip"):
            digest.update(clip.tobytes())
    return digest.hexdigest()


def main():
    """The command line. Raises UserError."""
    parser = config.Parser(__doc__)
    parser.add_argument("out", help="folder to write, empty or not there yet")
    parser.add_argument("--clips", type=int, default=4000, help="of training; a tenth more of test")
    parser.add_argument("--size", type=int, default=64, help=f"pixels, a divisor of {CROP}")
    parser.add_argument("--frames", type=int, default=32, help="of a clip")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if CROP % max(args.size, 1) or args.size < 8:
        raise UserError(f"--size {args.size} is no divisor of {CROP}, or below 8")
    if not (0 < args.clips <= 10**6 and 0 < args.frames <= LONGEST and args.seed >= 0):
        raise UserError(f"--clips from 1 to a million, --frames from 1 to {LONGEST}, --seed from 0")
    if os.path.isdir(args.out) and os.listdir(args.out):
        raise UserError(f"the folder {args.out} is not empty; delete it or name another")
    vizdoom = config.require("vizdoom", "vizdoom")
    out = storage.make_folder(args.out).resolve()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.callback(os.chdir, os.getcwd())
        os.chdir(folder)  # where the game leaves its settings
        digest = write_clips(vizdoom, out, args.clips, args.frames, args.size, args.seed)
    print(f"ViZDoom {vizdoom.__version__}, SHA-256 of all frames before encoding: {digest}")


if __name__ == "__main__":
    config.run_main(main)
