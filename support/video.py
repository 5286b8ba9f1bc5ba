"""Video files and folders of images: find them, index the times of their frames, read any frames.

    index = read_index(Path("videos"), "index.json")                # {name: times of its frames}
    read_frames(Path("videos/a.mp4"), index["a.mp4"], range(40, 56), 64)  # uint8 (16, 64, 64, 3)

What is read equals what decoding from the start gives. The fast way, to index a file by its packets
and to seek, is for files whose packets can be trusted. Any other file is decoded once when it is
indexed; if its frames can be found by seeking, their times are kept, else only their number, and it
is read from its start.
"""

import bisect
import contextlib
import functools
import itertools
import json
import os
import re
import warnings
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch

from support.config import UserError, progress_bar, require, warn, write_text
from support.machine import load_batches

VERSION = 2  # of the index file; one of another version is made anew
MAX_WARNINGS = 20  # that name a file; the index file names all
SUFFIXES = "mp4 m4v mov mkv webm avi gif mpg mpeg ts mts m2ts flv wmv ogv 3gp vob y4m"
VIDEO_FILES = tuple(f".{suffix}" for suffix in SUFFIXES.split())
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
DAMAGED_END = 32  # frames that may be passed over at the end of a damaged video
DEFAULT, ATTACHED = 0x1, 0x400  # FFmpeg's dispositions of streams: the default one, a cover picture
PROGRESSIVE = 1  # FFmpeg's order of fields where a frame has none
EARLIER = (0, 10)  # seconds; a seek may lead past its goal, or to a frame that needs earlier ones
AVI_FRAMES, CHECKS = 40, 16  # frames and seeks that are compared in a check


class Unreadable(Exception):
    """A video that cannot be used; the text says why."""


# ---------------------------------------------------------------------------------------- the index


class Untimed(int):
    """The number of frames of a video in which times do not find them."""

    __len__ = int.__int__


@functools.lru_cache(maxsize=None)
def read_index(root: Path, cache=None) -> dict:
    """Return {name below `root`: presentation times of its frames} of every usable video.

    Times are a range where the frame rate is constant, else an array, or Untimed. They come from
    the file `cache` where size and date of a video are unchanged. Unusable files are named in
    warnings, and in `cache` with the reason. Raises UserError if no video is usable.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder")
    stamps = find_videos(root)
    index = _load(cache, root, stamps)
    new = [name for name in stamps if name not in index]
    for count, (name, entry) in enumerate(zip(new, _probe_all([root / n for n in new])), start=1):
        index[name] = {"stamp": stamps[name]} | entry
        if cache and (count % 20_000 == 0 or count == len(new)):  # a large tree takes long
            _save(index, root, cache)
    for name in [name for name in new if "skip" in index[name]][:MAX_WARNINGS]:
        warn(f"{root / name} is left out: {index[name]['skip']}")
    usable = {name: frame_times(e) for name, e in sorted(index.items()) if "skip" not in e}
    if skipped := len(index) - len(usable):
        warn(f"{skipped} of {len(index)} files in {root} cannot be read as video and are left out")
    if not usable:
        raise UserError(f"{root} holds no usable video ({len(index)} files looked at)")
    return usable


def _save(index, root: Path, cache):
    """Write the index file, atomically; several processes may do so at once."""
    content = {"version": VERSION, "root": os.fspath(root.resolve()), "videos": index}
    own = f"{cache}.{os.getpid()}"
    try:
        write_text(own, json.dumps(content))
        os.replace(own, cache)
    except OSError as error:
        warn(f"the index cannot be kept in {cache}: {error.strerror}")


def _load(cache, root: Path, stamps) -> dict:
    """Return the entries of the index file that still hold; {} of a damaged file, another root."""
    if not cache or not Path(cache).exists():
        return {}
    try:
        stored = json.loads(Path(cache).read_text(encoding="utf-8"))
        if stored.get("version") != VERSION or stored["root"] != os.fspath(root.resolve()):
            return {}
        for entry in stored["videos"].values():
            if "skip" not in entry:
                len(frame_times(entry))
        return {n: e for n, e in stored["videos"].items() if e["stamp"] == stamps.get(n)}
    except Exception:  # whatever a file of any content leads to
        warn(f"{cache} is damaged and made anew")
        return {}


def frame_times(entry: dict):
    """Return the times of an entry of the index: range, array or Untimed (see `read_index`)."""
    if "range" in entry:
        return range(*entry["range"])
    return np.fromiter(entry["times"], np.int64) if "times" in entry else Untimed(entry["count"])


def _probe_all(paths: list[Path]):
    """Return the index entries of videos, in their order, found on all cores if there are many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = cores if len(paths) > 500 else 0
    entries, count = load_batches(paths, workers, batch_size=None, collate_fn=probe), len(paths)
    return progress_bar(entries, "indexing", count, unit="video", disable=count < 100)


def find_videos(root: Path) -> dict[str, list[int]]:
    """Return {path below root: [size, date]} of every video file and every folder of images.

    Hidden files and __MACOSX are passed over; whatever else is left out is named in a warning.
    """
    found, visited, left_out, closed = {}, set(), {}, "files and folders that may not be opened"
    walk = os.walk(root, followlinks=True, onerror=lambda e: left_out.update({e.filename: closed}))
    for folder, folders, files in walk:
        real = os.path.realpath(folder)
        if real in visited:  # a link that leads back
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(filter(_visible, folders))
        paths = {os.path.join(folder, name) for name in filter(_visible, files)}
        videos = {p for p in paths if p.lower().endswith(VIDEO_FILES) and os.path.isfile(p)}
        images = _find_images(folder)
        for path in videos or [folder] * bool(images):
            status = os.stat(path)
            found[Path(path).relative_to(root).as_posix()] = [status.st_size, status.st_mtime_ns]
        if videos:
            left_out |= dict.fromkeys(images, "images beside video files")
        for path in paths.difference(videos, images):
            if not os.path.exists(path):
                left_out[path] = "links that lead nowhere" if os.path.islink(path) else closed
    for kind in sorted(set(left_out.values())):
        paths = sorted(path for path in left_out if left_out[path] == kind)
        shown = ", ".join(paths[:3] + ["..."] * (len(paths) > 3))
        warn(f"{len(paths)} {kind} are left out: {shown}")
    return found


def _visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _find_images(folder) -> list[str]:
    """Return the paths of the images in a folder, frame2 before frame10."""

    def natural(path):
        parts = re.split(r"(\d+)", os.path.basename(path))
        return [int(part) if part.isdecimal() else part for part in parts], path

    with os.scandir(folder) as entries:
        images = [e for e in entries if _visible(e.name) and e.name.lower().endswith(IMAGE_FILES)]
    # without a system call for each file that is no link
    paths = [e.path for e in images if e.is_file(follow_symlinks=False) or os.path.isfile(e.path)]
    return sorted(paths, key=natural)


# ------------------------------------------------------------ can the packets of a file be trusted?


# pts, dts: when its frame is shown and decoded; key: decoding can begin here; shown: not cut off by
# an edit list; plain: one whole frame and, where `key`, nothing that follows looks back behind it
Packet = namedtuple("Packet", "pts dts key shown plain")


def probe(path: Path) -> dict:
    """Return the index entry of a video, see `frame_times`, or {"skip": why it cannot be used}."""
    if path.is_dir():
        return {"range": [0, len(_find_images(path)), 1]}
    try:
        with _open(path) as (container, stream):
            packets = _read_packets(container, stream)
            trusted = _trusted(packets, bool(stream.codec_context.has_b_frames))
            avi = container.format.name == "avi"
        times = sorted(p.pts for p in packets if p.shown) if trusted else []
        if trusted and avi:  # it holds no times; those that FFmpeg makes up can be wrong
            shown = [frame.pts for frame, _ in itertools.islice(_play(path), AVI_FRAMES)]
            trusted = shown == times[: len(shown)]
        if not trusted:
            times = _decode_times(path, [p.pts for p in packets if p.key and p.pts is not None])
    except (require("av", "av").FFmpegError, OSError, ValueError, IndexError, Unreadable) as error:
        return {"skip": getattr(error, "strerror", None) or str(error)}
    if not times or isinstance(times, int):
        return {"count": times} if times else {"skip": "no frames"}
    steps = {b - a for a, b in itertools.pairwise(times)} or {1}
    return {"range": [times[0], times[-1] + 1, *steps]} if len(steps) == 1 else {"times": times}


@contextlib.contextmanager
def _open(path: Path):
    """Open a video: its container and its default stream, else the first that is no cover.

    On one thread: more would decode ahead of the last frame, and data processes are parallel.
    """
    with require("av", "av").open(os.fspath(path.resolve())) as container:
        streams = [s for s in container.streams.video if not s.disposition & ATTACHED]
        if not streams:
            raise Unreadable("no video stream")
        stream = max(streams, key=lambda s: s.disposition & DEFAULT)  # of equals the first
        if stream.codec_context is None or stream.codec_context.width < 1:
            raise Unreadable("no decoder for its video, or no frame size")
        stream.codec_context.thread_count = 1
        yield container, stream


def _read_packets(container, stream) -> list[Packet]:
    """Return the packets that show a frame, in the order of decoding."""
    context, packets = stream.codec_context, []
    for packet in container.demux(stream):
        if not packet.size or (context.name == "vp8" and not memoryview(packet)[0] & 16):
            continue  # nothing, or a frame that only others refer to
        if not packets:
            progressive = _is_progressive(packet, context)
        no_frame = context.name == "mpeg4" and packet.size < 8
        open_gop = context.name == "h264" and packet.is_keyframe and not _is_idr(packet, context)
        plain = progressive and not no_frame and not open_gop
        corrupt, shown = packet.is_corrupt, not packet.is_discard
        packets.append(Packet(packet.pts, packet.dts, packet.is_keyframe, shown, plain))
    if packets and corrupt:  # a truncated file
        packets[-1] = packets[-1]._replace(plain=False)
    return packets


def _is_progressive(packet, context) -> bool:
    """Whether a packet gives one frame by itself, not interlaced; else a packet may be a field."""
    if getattr(context, "field_order", 0) == PROGRESSIVE:  # PyAV 17 does not tell
        return True
    with contextlib.suppress(require("av", "av").FFmpegError):
        frames = packet.decode() + context.decode(None)
        return len(frames) == 1 and not frames[0].interlaced_frame
    return False


def _is_idr(packet, context) -> bool:
    """Whether an H.264 key frame begins neither an open GOP nor a gradual refresh."""
    data, config = memoryview(packet), context.extradata or b""
    if len(config) < 5 or config[0] != 1:  # Annex B: NAL units come after start codes
        return bool(re.search(rb"\x00\x00\x01[\x05\x25\x45\x65]", data))
    at, width = 0, (config[4] & 3) + 1  # avcC: they come after their lengths, of `width` bytes
    while at + width < len(data) and data[at + width] & 31 != 5:
        at += width + int.from_bytes(data[at : at + width], "big")
    return at + width < len(data)


def _trusted(packets: list[Packet], reorders: bool) -> bool:
    """Whether each packet is a frame shown at its time and decoding can begin at each key frame."""
    pts, dts = [p.pts for p in packets], [p.dts for p in packets if p.dts is not None]
    if not packets or None in pts or len(set(pts)) < len(pts):
        return False
    latest = itertools.accumulate(pts, max)
    doubts = (
        not all(p.plain for p in packets),
        not packets[0].key or min(pts) < pts[0],  # cut: the first frames need what is not there
        reorders and pts == sorted(pts),  # perhaps times of decoding
        any(a >= b for a, b in itertools.pairwise(dts)),  # files put end to end, each with a clock
        any(p.key and p.pts < before for p, before in zip(packets[1:], latest)),
    )
    return not any(doubts)


def _decode_times(path: Path, keys: list[int]) -> list[int] | int:
    """Return the times of the frames that decoding from the start gives, without a damaged end.

    Only their number if times do not find them: they do not rise, or seeks to some of the key
    frames, at the times `keys`, give other pixels.
    """
    frames = []  # (time, digest of the pixels, None of a damaged frame)
    for frame, aspect in _play(path):
        pixels = None if frame.is_corrupt else hash(_crop(frame, 64, aspect).tobytes())
        frames.append((frame.pts, pixels))
    while frames and frames[-1][1] is None:
        frames.pop()
    times = [pts for pts, _ in frames]
    if None in times or any(a >= b for a, b in itertools.pairwise(times)):
        return len(times)
    starts = sorted({bisect.bisect_left(times, pts) for pts in keys} - {0}) + [len(times)]
    parts = [frames[-1:]]
    for a, b in list(itertools.pairwise(starts))[:: len(starts) // CHECKS + 1]:
        parts += [frames[a - 1 : a], frames[a : min(b, a + 64)]]  # just before a key frame; from it
    return times if all(_seek_agrees(path, part) for part in parts if part) else len(times)


def _seek_agrees(path: Path, part) -> bool:
    """Whether seeks to the frames `part`, [(time, digest of the pixels)], give no other pixels."""
    needed, digests = map(list, zip(*part))
    for earlier in EARLIER:
        with contextlib.suppress(require("av", "av").FFmpegError):
            found = [hash(image.tobytes()) for image in decode(path, 64, needed, earlier)]
            if found != digests[len(digests) - len(found) :]:
                return False
            if len(found) == len(digests):
                break
    return True


# ---------------------------------------------------------------------------------- reading frames


def read_frames(path: Path, times, wanted: range, size: int) -> np.ndarray:
    """Return the frames number `wanted` of a video: uint8 (len(wanted), size, size, 3).

    times: of all its frames, as in the index. Raises Unreadable.
    """
    numbered = isinstance(times, Untimed)
    needed = list(wanted) if numbered else [int(times[i]) for i in wanted]
    for earlier in (None,) if numbered or not wanted.start else (*EARLIER, None):
        try:
            if path.is_dir():
                images = _find_images(path)[wanted.start : wanted.stop : wanted.step]
                taken = [_read_image(image, size) for image in images]
            else:
                taken = decode(path, size, needed, earlier, numbered)
            if len(taken) == len(needed):
                return np.stack(taken)
            reason = f"only {len(taken)} of {len(needed)} frames of a clip can be decoded"
        except (require("av", "av").FFmpegError, OSError, ValueError, IndexError) as error:
            reason = getattr(error, "strerror", None) or str(error)
    raise Unreadable(reason)


def decode(path, size, needed, earlier=None, numbered=False) -> list[np.ndarray]:
    """Return those of the `needed` frames that can be decoded: uint8 (size, size, 3) each.

    needed: rising times or, `numbered`, numbers from 0. earlier: begin at the key frame that many
    seconds before the first of them; None: begin at the start.
    """
    remaining, taken = set(needed), {}
    begin = None if earlier is None else (needed[0], earlier)
    for number, (frame, aspect) in enumerate(_play(path, begin, None if numbered else remaining)):
        key = number if numbered else frame.pts
        if key in remaining and not frame.is_corrupt:
            remaining.discard(key)
            taken[key] = _crop(frame, size, aspect)
        if not remaining or (key is not None and key > needed[-1]):
            break
    return [taken[key] for key in needed if key in taken]


def _play(path: Path, begin=None, needed=None):
    """Decode up to a damaged packet, as what follows may lack it: yield (frame, its pixel aspect).

    begin: (time, how many seconds earlier) to seek to; None: the start. needed: times; what these
    do not need, not even by way of other frames, goes undecoded.
    """
    with _open(path) as (container, stream):
        context = stream.codec_context
        if begin:
            container.seek(begin[0] - int(begin[1] / stream.time_base), stream=stream)
        for packet in container.demux(stream):
            if needed is not None and context.name in ("h264", "hevc"):
                wanted = packet.pts is None or packet.pts in needed
                context.skip_frame = "DEFAULT" if wanted else "NONREF"
            try:
                frames, damaged = packet.decode(), False
            except require("av", "av").FFmpegError:
                frames, damaged = context.decode(None), True
            for frame in frames:
                yield frame, stream.sample_aspect_ratio
            if damaged:
                return


def _read_image(path: str, size: int) -> np.ndarray:
    """Return an image, uint8 (size, size, 3), turned as its EXIF says. Raises Unreadable."""
    pillow, ops = require("PIL.Image", "pillow"), require("PIL.ImageOps", "pillow")
    try:
        with warnings.catch_warnings(), pillow.open(path) as image:
            warnings.simplefilter("ignore")
            image = ops.exif_transpose(image)
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
                image = pillow.fromarray((np.asarray(image) // 256).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError
            pixels = np.asarray(image.convert("RGB"))
    except Exception:  # Pillow raises errors of many kinds for damaged files
        reason = f"{os.path.basename(path)} is not a whole image of 8 or 16 bits"
        raise Unreadable(reason) from None
    return _crop(require("av", "av").VideoFrame.from_ndarray(pixels, format="rgb24"), size)


def _crop(frame, size, aspect=None):
    """Scale to square pixels and the short side to `size` by averaging areas, cut the centre out,
    turn and mirror it as the file's metadata says: uint8 (size, size, 3).
    aspect: width of a pixel over its height; None: unknown, as beyond a factor of 10.
    """
    aspect = float(aspect or 1)
    shape = np.array([frame.width * (aspect if 0.1 < aspect < 10 else 1), frame.height])
    width, height = np.maximum(size, np.round(shape * size / shape.min())).astype(int).tolist()
    # one thread: PyAV keeps the scaler, and a forked worker would wait for threads it does not have
    scaled = frame.reformat(width, height, "rgb24", interpolation="AREA", threads=1).to_ndarray()
    top, left = (height - size) // 2, (width - size) // 2
    image = scaled[top : top + size, left : left + size]
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return image if matrix is None else _turn(image, *np.frombuffer(matrix, np.int32)[:5].tolist())


def _turn(image, a, b, _, c, d):
    """Turn and mirror (H, W, 3) by right angles, as x' = ax + cy, y' = bx + dy says."""
    if abs(b) > abs(a):
        image, a, d = image.swapaxes(0, 1), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def read_ending(path, size: int, frames: int, stride: int) -> torch.Tensor:
    """Return the last `frames` frames, `stride` apart: (frames, 3, size, size) in [-1, 1].

    Up to DAMAGED_END frames of a damaged ending are passed over. Raises UserError.
    """
    if not frames:
        return torch.zeros(0, 3, size, size)
    path, need = Path(path), (frames - 1) * stride + 1
    entry = probe(path)
    if "skip" in entry:
        raise UserError(f"{path} cannot be read as video: {entry['skip']}")
    times = frame_times(entry)
    if len(times) < need:
        raise UserError(f"{path} has {len(times)} frames; {need} are needed at stride {stride}")
    for end in range(len(times), max(need, len(times) - DAMAGED_END) - 1, -1):
        with contextlib.suppress(Unreadable):
            return to_tensor(read_frames(path, times, range(end - need, end, stride), size))
    raise UserError(f"the last frames of {path} cannot be decoded")


# ------------------------------------------------------------------------------------------- pixels


def to_tensor(frames: np.ndarray) -> torch.Tensor:
    """uint8 (..., H, W, 3) -> float32 (..., 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.moveaxis(frames, -1, -3).astype(np.float32) / 127.5 - 1)


def to_uint8(video: torch.Tensor) -> np.ndarray:
    """float (..., 3, H, W) in [-1, 1], clamped -> uint8 (..., H, W, 3); undoes `to_tensor`."""
    scaled = (video.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).movedim(-3, -1).cpu().numpy()
