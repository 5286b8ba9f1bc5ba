"""Video files and folders of frames: which there are, when their frames are shown, and any frames of them, quickly.

    index = read_index(Path("videos"), "index.json")                 # {name: times of its frames}
    read_frames(Path("videos/a.mp4"), index["a.mp4"], range(40, 56), size=64)   # uint8 (16, 64, 64, 3)

PyAV decodes video, Pillow images. Headers are not trusted: frames are counted by their packets and
found by their presentation times, so that what a seek gives equals what decoding from the start
gives. Where packets cannot be trusted with that, frames are counted by decoding and read from the
start.
"""

import bisect
import contextlib
import functools
import itertools
import json
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from support.config import UserError, require, warn

VERSION = 2  # of the index file: one of another version is made anew
NAMED = 20  # warnings that name a file, a run; the index file names all
VIDEO_FILES = (
    ".mp4",
    ".m4v",
    ".mov",
    ".mkv",
    ".webm",
    ".avi",
    ".gif",
    ".mpg",
    ".mpeg",
    ".ts",
    ".mts",
    ".m2ts",
    ".flv",
    ".wmv",
    ".ogv",
    ".3gp",
    ".vob",
    ".y4m",
)
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
ENDING = 32  # frames
DEFAULT, ATTACHED = 0x1, 0x400  # FFmpeg's dispositions of streams: the default one, a cover picture
PROGRESSIVE = 1  # FFmpeg's order of fields where a frame has none
I_SLICE = bytes([0x88, *range(0xB0, 0xC0)])  # H.264: macroblock 0, slice type 7 or 2, Exp-Golomb


class Unreadable(Exception):
    """A video that cannot be used; the text says why."""


# ----------------------------------------------------------------------------------------------------------- the index

# The index is {name below the root: the presentation times of its frames}. They are a range where the frames come at one
# rate, an array where they do not, and an Untimed where times do not find them, so that the file is
# only read from its start.


class Untimed(int):
    """A number of frames that no times find."""

    __len__ = int.__int__


@functools.lru_cache(maxsize=None)
def read_index(root: Path, cache=None) -> dict:
    """Every usable video below `root` and the times of its frames, from the file `cache` as far as that is up to date.

    A file's size and date tell whether it has changed. What is not usable is named in a warning, and in `cache` with the
    reason. Raises UserError for a folder that is none or holds nothing usable.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder")
    stamps, old = find_videos(root), _stored(cache, root)
    index = {
        name: old[name]
        for name, stamp in stamps.items()
        if name in old and old[name].get("stamp") == stamp
    }
    new = [name for name in stamps if name not in index]
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    batches = torch.utils.data.DataLoader(
        _Probes(root, new), 32, num_workers=cores if len(new) > 500 else 0, collate_fn=list
    )
    with tqdm(desc="indexing", total=len(new), unit="video", disable=len(new) < 100) as bar:
        for number, (name, entry) in enumerate(pair for batch in batches for pair in batch):
            index[name] = {"stamp": stamps[name]} | entry
            bar.update()
            if number % 20_000 == 19_999:  # a large tree takes long; what has been found is kept
                _keep(index, root, cache)
    for name in [name for name in new if "skip" in index[name]][:NAMED]:
        warn(f"{root / name} is left out: {index[name]['skip']}")
    if new or len(old) != len(index):
        _keep(index, root, cache)
    usable = {
        name: frame_times(entry) for name, entry in sorted(index.items()) if "skip" not in entry
    }
    if len(usable) < len(index):
        warn(
            f"{len(index) - len(usable)} of {len(index)} files in {root} cannot be read as video and are left out"
        )
    if not usable:
        raise UserError(f"{root} holds no usable video ({len(index)} files looked at)")
    return usable


def _keep(index, root: Path, cache):
    if not cache:
        return
    temporary = f"{cache}.{os.getpid()}.tmp"
    try:
        content = {"version": VERSION, "root": os.fspath(root.resolve()), "videos": index}
        Path(temporary).write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, cache)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        warn(f"the index cannot be kept in {cache}: {error.strerror}")


def _stored(cache, root: Path) -> dict:
    """What the index file holds, if it is of this version and root and whole; else nothing."""
    if not cache or not Path(cache).exists():
        return {}
    try:
        stored = json.loads(Path(cache).read_text(encoding="utf-8"))
        if stored.get("version") != VERSION or stored["root"] != os.fspath(root.resolve()):
            return {}
        for entry in stored["videos"].values():
            entry["skip"] if "skip" in entry else len(frame_times(entry))
        return stored["videos"]
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ):
        warn(f"{cache} is damaged and made anew")
        return {}


def frame_times(entry: dict):
    """The times that an entry of the index stands for (see above)."""
    return (
        range(*entry["range"])
        if "range" in entry
        else np.fromiter(entry["times"], np.int64)
        if "times" in entry
        else Untimed(entry["count"])
    )


@dataclass
class _Probes(torch.utils.data.Dataset):
    """`probe` as a data set, so that torch's loader runs it in parallel."""

    root: Path
    names: list[str]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, number):
        return self.names[number], probe(self.root / self.names[number])


def find_videos(root: Path) -> dict[str, list[int]]:
    """{path below root: [size, date]} of every video file, and every folder of images without one.

    Names that begin with a dot, and __MACOSX, are passed over. What else is left out is named in a
    warning.
    """
    found, seen, closed, dangling, beside = {}, set(), [], [], []
    walk = os.walk(root, followlinks=True, onerror=lambda error: closed.append(error.filename))
    for folder, folders, files in walk:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(filter(_visible, folders))
        place = functools.partial(os.path.join, folder)
        names = set(filter(_visible, files))
        videos = {n for n in names if _ends(n, VIDEO_FILES) and os.path.isfile(place(n))}
        images = _image_names(folder) if any(_ends(n, IMAGE_FILES) for n in names) else set()
        below = Path(folder).relative_to(root)
        for name in videos:
            of_file = os.stat(place(name))
            found[(below / name).as_posix()] = [of_file.st_size, of_file.st_mtime_ns]
        if images and not videos:
            found[below.as_posix()] = [len(images), status.st_mtime_ns]
        lost = [path for path in map(place, names - videos - images) if not os.path.exists(path)]
        dangling += filter(os.path.islink, lost)
        closed += itertools.filterfalse(os.path.islink, lost)
        beside += map(place, images if videos else ())
    _left_out("files and folders that may not be opened", closed)
    _left_out("links that lead nowhere", dangling)
    _left_out("images beside video files", beside)
    return found


def _left_out(kind: str, paths):
    if paths:
        shown = sorted(paths)[:3] + ["..."] * (len(paths) > 3)
        warn(f"{len(paths)} {kind} are left out: {', '.join(shown)}")


def _visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _ends(name: str, suffixes) -> bool:
    return name.lower().endswith(suffixes)


def _image_names(folder) -> set[str]:
    with os.scandir(folder) as entries:
        images = [e for e in entries if _visible(e.name) and _ends(e.name, IMAGE_FILES)]
    return {e.name for e in images if e.is_file(follow_symlinks=False) or os.path.isfile(e.path)}


def _images(folder: Path) -> list[Path]:
    """The images of a folder, frame2 before frame10."""

    def natural(path):
        parts = re.split(r"(\d+)", path.name)
        key = [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]
        return key, path.name

    return sorted(map(folder.joinpath, _image_names(folder)), key=natural)


# ------------------------------------------------------------ can the packets of a file be trusted?

# The fast way, to index a file by its packets and to seek, is right if each packet is one frame,
# its time is when that is shown, and decoding can begin at each key frame. Packets show where that
# is in doubt: such a file is decoded once, when it is indexed, and if its frames are not those of
# its packets, it is always read from its start.


@dataclass
class Packet:
    """What tells whether it can be trusted."""

    pts: int | None  # when its frame is shown
    dts: int | None  # when it is decoded
    key: str  # kind of key frame: IDR, or of H.264 also I or P; "" for none
    shown: bool  # not cut off by an edit list
    whole: bool


def probe(path: Path) -> dict:
    """What the index keeps of a video: {"range"} or {"times"} or {"count"} (see `frame_times`), or
    {"skip": the reason}.

    The packets are counted, as a rule without decoding them: headers are often wrong, and a
    truncated file has fewer.
    """
    av = require("av", "av")

    if path.is_dir():
        return {"range": [0, len(_images(path)), 1]}
    try:
        with av.open(os.fspath(path.resolve())) as container:
            stream = _video_stream(container)
            if stream.codec_context is None or stream.codec_context.width < 1:
                return {"skip": "no decoder for its video, or no frame size"}
            packets, doubt = _read_packets(container, stream)
            trust = _trust(packets, bool(stream.codec_context.has_b_frames), doubt)
            avi = container.format.name == "avi"  # has no times; what FFmpeg makes up can be wrong
        times = sorted(p.pts for p in packets if p.shown and p.pts is not None)
        if trust == "yes" and avi and not _compare(path, times, packets, 40)[1]:
            trust = "no"
        if trust != "yes":
            count, agree = _compare(path, times, packets)
            if not count:
                return {"skip": "no frames"}
            if not agree or trust == "no":
                return {"count": count}
    except (av.FFmpegError, OSError, ValueError, IndexError, Unreadable) as error:
        return {"skip": getattr(error, "strerror", None) or str(error)}
    step = times[1] - times[0] if len(times) > 1 else 1
    regular = range(times[0], times[-1] + 1, step)
    if len(regular) == len(times) and list(regular) == times:
        return {"range": [regular.start, regular.stop, step]}
    return {"times": times}


def _video_stream(container):
    """The default video stream, else the first, that is no cover picture. Raises Unreadable."""
    streams = [stream for stream in container.streams.video if not stream.disposition & ATTACHED]
    if not streams:
        raise Unreadable("no video stream")
    return max(streams, key=lambda stream: stream.disposition & DEFAULT)  # of equals the first


def _read_packets(container, stream) -> tuple[list[Packet], bool]:
    """The packets that show a frame, in the order of decoding, without a damaged end, and whether
    it is in doubt that each is one frame: of MPEG-4, one of a few bytes is none; of interlaced
    video, one may be a field.
    """
    context, packets = stream.codec_context, []
    context.thread_count = 1
    doubt = getattr(context, "field_order", 0) != PROGRESSIVE  # PyAV 17 does not tell
    for packet in container.demux(stream):
        if not packet.size or (context.name == "vp8" and not memoryview(packet)[0] & 16):
            continue  # nothing, or a frame that only others refer to
        if doubt and not packets:
            doubt = not _is_progressive(packet, context)
        doubt = doubt or (context.name == "mpeg4" and packet.size < 8)
        key = _key_frame(bytes(packet), context) if packet.is_keyframe else ""
        shown, whole = not packet.is_discard, not packet.is_corrupt
        packets.append(Packet(packet.pts, packet.dts, key, shown, whole))
    while packets and not packets[-1].whole:
        end = packets.pop().pts
        packets = [p for p in packets if None in (p.pts, end) or p.pts < end]
    return packets, doubt


def _is_progressive(packet, context) -> bool:
    """Whether a packet gives one frame by itself that is not interlaced."""
    av = require("av", "av")

    try:
        frames = packet.decode() + context.decode(None)
    except av.FFmpegError:
        return False
    return len(frames) == 1 and not frames[0].interlaced_frame


def _key_frame(data: bytes, context) -> str:
    """IDR where nothing that follows needs what comes before; of H.264 also I, a picture of its own
    that others with such needs may follow, and P, where a gradual refresh begins.
    """
    if context.name != "h264":
        return "IDR"
    for unit in _nal_units(data, context.extradata or b""):
        if unit[0] & 31 == 5:
            return "IDR"
        if unit[0] & 31 == 1:  # another slice
            return "I" if unit[1:] in I_SLICE else "P"
    return "P"


def _nal_units(data: bytes, extradata: bytes):
    """The first two bytes of each NAL unit of H.264."""
    if len(extradata) < 5 or extradata[0] != 1:  # Annex B: after start codes
        yield from (match[1] for match in re.finditer(rb"\x00\x00\x01(..)", data, re.DOTALL))
        return
    at, width = 0, (extradata[4] & 3) + 1  # avcC: after their lengths, of this many bytes
    while at + width < len(data):
        yield data[at + width : at + width + 2]
        at += width + int.from_bytes(data[at : at + width], "big")


def _trust(packets: list[Packet], reorders: bool, doubt: bool) -> str:
    """Whether each packet is one frame at its time and each key frame a true starting point: yes,
    no, or unclear.

    reorders: the decoder may put frames into another order. doubt: see `_read_packets`.
    """
    pts, dts = [p.pts for p in packets], [p.dts for p in packets if p.dts is not None]
    kinds = {p.key for p in packets}
    if not packets or None in pts or len(set(pts)) < len(pts) or "P" in kinds:
        return "no"
    latest = itertools.accumulate(pts, max)
    signs = (
        doubt,
        "I" in kinds,
        not packets[0].key or min(pts) < pts[0],  # cut: the first frames need what is not there
        reorders and pts == sorted(pts),  # perhaps times of decoding
        any(a >= b for a, b in zip(dts, dts[1:])),  # files put end to end, each with its own clock
        any(p.key and p.pts < before for p, before in zip(packets[1:], latest)),
    )
    return "unclear" if any(signs) else "yes"


def _compare(path: Path, times: list[int], packets: list[Packet], most=None) -> tuple[int, bool]:
    """Decode from the start: the number of frames up to the last whole one, and whether they have
    these `times` and seeks to the frames before some of the key frames, and to the last, give the
    same pixels.

    most: compare only the times, and only of so many frames.
    """
    av = require("av", "av")

    keys = [p.pts for p in packets[1:] if p.key and p.pts is not None]
    ends = [bisect.bisect_left(times, pts) - 1 for pts in keys] + [len(times) - 1]
    ends, shown, pixels, count = ends[:: -max(1, len(ends) // 8)], [], {}, 0
    with av.open(os.fspath(path.resolve())) as container:
        stream = _video_stream(container)
        for frame in itertools.islice(_play(container, stream), most):
            if len(shown) in ends and not frame.is_corrupt and most is None:
                pixels[len(shown)] = _crop(frame, 64, stream.sample_aspect_ratio)
            shown.append(frame.pts)
            count = count if frame.is_corrupt else len(shown)
    agree = shown == times[: len(shown) if most else None]
    for n, pixel in pixels.items() if agree else ():
        try:
            agree = agree and (read_frames(path, times, range(n, n + 1), 64) == pixel).all()
        except Unreadable:
            agree = False
    return count, agree


# ---------------------------------------------------------------------------------- reading frames


def read_frames(path: Path, times, wanted: range, size: int) -> np.ndarray:
    """The frames number `wanted` of a video: uint8 (len(wanted), size, size, 3). times: as in the index.

    The short side is scaled to `size` and the centre cut out. Raises Unreadable.
    """
    av = require("av", "av")

    numbered, taken = isinstance(times, Untimed), []
    try:
        if path.is_dir():
            images = _images(path)
            return np.stack([_read_image(images[i], size) for i in wanted])
        needed = list(wanted) if numbered else [int(times[i]) for i in wanted]
        if wanted[0] and not numbered:
            for earlier in (
                0,
                10,
            ):  # a seek may lead past the first frame, or to one that needs those before it
                with contextlib.suppress(av.FFmpegError):
                    taken = (
                        taken if len(taken) == len(needed) else decode(path, size, needed, earlier)
                    )
        if len(taken) < len(needed):
            taken = decode(path, size, needed, numbered=numbered)
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise Unreadable(getattr(error, "strerror", None) or str(error)) from None
    if len(taken) < len(needed):
        raise Unreadable(f"only {len(taken)} of {len(needed)} frames of a clip can be decoded")
    return np.stack(taken)


def decode(path, size, needed, earlier=None, numbered=False) -> list[np.ndarray]:
    """Those of the `needed` frames that can be decoded, given by presentation times or, `numbered`, counted from 0.

    earlier: begin at the key frame before the first of them, looked for that many seconds earlier; None: begin at the start.
    """
    av = require("av", "av")

    remaining, taken = set(needed), {}
    with av.open(os.fspath(path.resolve())) as container:
        stream = _video_stream(container)
        if earlier is not None:
            container.seek(needed[0] - int(earlier / stream.time_base), stream=stream)
        for number, frame in enumerate(_play(container, stream, None if numbered else remaining)):
            key = number if numbered else frame.pts
            if key in remaining and not frame.is_corrupt:
                remaining.discard(key)
                taken[key] = _crop(frame, size, stream.sample_aspect_ratio)
            if not remaining or (key is not None and key > needed[-1]):
                break
    return [taken[key] for key in needed if key in taken]


def _play(container, stream, needed=None):
    """Decode from where the container stands up to a damaged packet: what comes after may lack it.

    needed: times; what these do not need, not even by way of other frames, goes undecoded.
    On one thread: more would decode ahead of the last one, and data processes are parallel already.
    """
    av = require("av", "av")

    context, damaged = stream.codec_context, False
    context.thread_count = 1
    for packet in container.demux(stream):
        if needed is not None and context.name in ("h264", "hevc"):
            wanted = packet.pts is None or packet.pts in needed
            context.skip_frame = "DEFAULT" if wanted else "NONREF"
        try:
            frames = packet.decode()
        except av.FFmpegError:
            frames, damaged = context.decode(None), True
        yield from frames
        if damaged:
            return


def _read_image(path: Path, size: int) -> np.ndarray:
    """An image uint8 (size, size, 3), turned as its EXIF says. Raises Unreadable."""
    av, pillow = require("av", "av"), require("PIL.Image", "pillow")
    exif_transpose = require("PIL.ImageOps", "pillow").exif_transpose

    try:
        with warnings.catch_warnings(), pillow.open(path) as image:
            warnings.simplefilter("ignore")
            image = exif_transpose(image)
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
                image = pillow.fromarray((np.asarray(image) // 256).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise Unreadable(f"the pixels of {path.name} have neither 8 nor 16 bits")
            pixels = np.asarray(image.convert("RGB"))
    except Unreadable:
        raise
    except Exception:  # Pillow raises errors of many kinds for damaged files
        raise Unreadable(f"{path.name} is not a whole image") from None
    return _crop(av.VideoFrame.from_ndarray(pixels, format="rgb24"), size)


def _crop(frame, size, aspect=None):
    """Scale to square pixels and the short side to `size` by averaging areas, cut the centre out,
    turn and mirror it as the file's metadata says.

    aspect: width of a pixel over its height; None: unknown, as beyond a factor of 10.
    """
    aspect = float(aspect or 1)
    shape = np.array([frame.width * (aspect if 0.1 < aspect < 10 else 1), frame.height])
    width, height = np.maximum(size, np.round(shape * size / shape.min())).astype(int).tolist()
    # one thread: PyAV keeps a thread's scaler, and a forked worker would wait for helpers that were not forked with it
    image = frame.reformat(
        width=width, height=height, format="rgb24", interpolation="AREA", threads=1
    ).to_ndarray()
    top, left = (height - size) // 2, (width - size) // 2
    image = image[top : top + size, left : left + size]
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return image if matrix is None else _turn(image, *np.frombuffer(matrix, np.int32)[:5].tolist())


def _turn(image, a, b, _, c, d):
    """Turn and mirror (H, W, 3) by right angles, as x' = ax + cy, y' = bx + dy says."""
    if abs(b) > abs(a):
        image, a, d = image.swapaxes(0, 1), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def read_ending(path, size: int, frames: int, stride: int) -> torch.Tensor:
    """The last `frames` frames of a video, `stride` apart: (frames, 3, size, size) in [-1, 1].

    Of a damaged ending, as of a truncated file, up to ENDING frames are passed over.
    Raises UserError.
    """
    path, need = Path(path), (frames - 1) * stride + 1
    if not frames:
        return torch.zeros(0, 3, size, size)
    entry = probe(path)
    if "skip" in entry:
        raise UserError(f"{path} cannot be read as video: {entry['skip']}")
    times = frame_times(entry)
    if len(times) < need:
        raise UserError(
            f"{path} has {len(times)} frames; {need} are needed for {frames} frames of context at stride {stride}"
        )
    for end in range(len(times), max(need, len(times) - ENDING) - 1, -1):
        try:
            return to_tensor(read_frames(path, times, range(end - need, end, stride), size))
        except Unreadable as error:
            reason = error
    raise UserError(f"{path}: {reason}")


# -------------------------------------------------------------------------------------------------------------- pixels


def to_tensor(frames: np.ndarray) -> torch.Tensor:
    """uint8 (..., H, W, 3) -> float32 (..., 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.moveaxis(frames, -1, -3).astype(np.float32) / 127.5 - 1)


def to_uint8(video: torch.Tensor) -> np.ndarray:
    """float (..., 3, H, W) in [-1, 1], clamped -> uint8 (..., H, W, 3); undoes `to_tensor`."""
    return (
        video.float()
        .clamp(-1, 1)
        .add(1)
        .mul(127.5)
        .round()
        .to(torch.uint8)
        .movedim(-3, -1)
        .cpu()
        .numpy()
    )
