"""Any frames of any video file, faults of files, and the index."""

import contextlib
import json
import os
import resource
import shutil
import struct
import time
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support import video
from support.config import UserError
from support.video import (
    Unreadable,
    find_videos,
    probe,
    read_ending,
    read_frames,
    to_tensor,
    to_uint8,
)

av = pytest.importorskip("av")
FILES = Path(__file__).parent / "files"  # what PyAV cannot write


def picture(t, size):
    """Frame number t: its six bits are dark and light sixths of the centre square, under noise.

    Beside the square is white.
    """
    side, rng = min(size), np.random.default_rng(t)
    bits = np.array([50 + 150 * (t >> k & 1) for k in range(6)]).reshape(2, 3)
    square = bits[
        np.arange(side)[:, None] * 2 // side, np.arange(side) * 3 // side, None
    ] + rng.integers(-20, 20, (side, side, 3))
    pad = [((n - side) // 2, n - side - (n - side) // 2) for n in size[::-1]]
    return np.pad(square, [*pad, (0, 0)], constant_values=255).astype(np.uint8)


def number(frame):
    """Which frame this is: uint8 (size, size, 3)."""
    s, total = len(frame), 0
    for k in range(6):
        y, x = (2 * (k // 3) + 1) * s // 4, (2 * (k % 3) + 1) * s // 6
        total += int(frame[y - 2 : y + 3, x - 2 : x + 3].mean() > 125) << k
    return total


def numbers(frames):
    return [
        number(frame) for frame in (frames if isinstance(frames, np.ndarray) else to_uint8(frames))
    ]


def write_video(
    path,
    frames=20,
    size=(64, 48),
    codec="mpeg4",
    pixels="yuv420p",
    times=None,
    container={},
    **options,
):
    """Frames `picture(0)`, `picture(1)`, ..., 25 a second or at `times` in milliseconds."""
    with av.open(os.fspath(path), "w", options=container) as file:
        stream = file.add_stream(
            codec,
            rate=25,
            options={"g": "5"} | {name.replace("_", "-"): str(v) for name, v in options.items()},
        )
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for t in range(len(times) if times else frames):
            frame = av.VideoFrame.from_ndarray(picture(t, size), format="rgb24")
            if times:
                frame.pts, frame.time_base = times[t], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def write_images(folder, count, name="frame{}.png", size=lambda t: (64, 48)):
    folder.mkdir(parents=True)
    for t in range(count):
        Image.fromarray(picture(t, size(t))).save(folder / name.format(t), quality=95)
    return folder


def read(path, wanted):
    """The frames `wanted` of a file as the index and the reader see it, at 32 pixels."""
    return read_frames(path, video.frame_times(probe(path)), wanted, 32)


def index(root, cache=None):
    """A fresh `read_index`, as in another process."""
    video.read_index.cache_clear()
    return video.read_index(root, cache)


# ------------------------------------------------------------------- the frames that were asked for

FORMATS = {
    "x264.mp4": {"codec": "libx264"},
    "x264.mkv": {"codec": "libx264"},
    "x264.mov": {"codec": "libx264"},
    "x264.ts": {"codec": "libx264"},
    "x264.flv": {"codec": "libx264"},
    "x264.avi": {"codec": "libx264", "g": 40, "x264_params": "scenecut=0:bframes=3:b-adapt=0"},
    "faststart.mp4": {"codec": "libx264", "container": {"movflags": "faststart"}},
    "fragments.mp4": {"codec": "libx264", "container": {"movflags": "frag_keyframe+empty_moov"}},
    "ten_bits.mkv": {"codec": "libx264", "pixels": "yuv420p10le"},
    "open_gop.mkv": {"codec": "libx264", "x264_params": "open-gop=1:keyint=10"},
    "refresh.mkv": {"codec": "libx264", "x264_params": "intra-refresh=1:keyint=10"},
    "pyramid.mp4": {
        "codec": "libx264",
        "x264_params": "b-pyramid=normal:bframes=6:b-adapt=0:keyint=30",
    },
    "x265.mp4": {"codec": "libx265", "x265_params": "log-level=none"},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "no_duration.webm": {"codec": "libvpx", "container": {"live": "1"}},
    "mpeg4.avi": {},
    "b_frames.avi": {"bf": 2},
    "mpeg2.mpg": {"codec": "mpeg2video", "bf": 2},
    "mjpeg.avi": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "rgb8.gif": {"codec": "gif", "pixels": "rgb8"},
    "wmv2.wmv": {"codec": "wmv2"},
}


@pytest.fixture(scope="module", params=FORMATS)
def whole(request, tmp_path_factory):
    """A video of 40 frames, its index entry, and those frames decoded in order."""
    path = write_video(
        tmp_path_factory.mktemp("format") / request.param, 40, **FORMATS[request.param]
    )
    return path, video.frame_times(probe(path)), decoded(path)


spans = st.builds(
    lambda a, b, stride: range(min(a, b), max(a, b) + 1, stride),
    st.integers(0, 39),
    st.integers(0, 39),
    st.integers(1, 7),
)


@given(spans)
@example(range(40))
def test_any_frames_are_those_asked_for_and_those_of_decoding_from_the_start(whole, wanted):
    path, times, frames = whole
    got = read_frames(path, times, wanted, 32)
    assert len(times) == 40 and numbers(got) == list(wanted)
    assert (got == frames[wanted.start : wanted.stop : wanted.step]).all()


class Counted:
    """A container that counts the packets taken from it."""

    taken = 0

    def __init__(self, *args, open=av.open):
        self.container = open(*args)

    def __getattr__(self, name):
        return getattr(self.container, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.container.close()

    def demux(self, stream):
        for packet in self.container.demux(stream):
            Counted.taken += 1
            yield packet


@pytest.mark.parametrize("name", ["x264.mp4", "x264.mkv", "open_gop.mkv", "vp8.webm", "mpeg4.avi"])
def test_a_seek_spares_what_comes_before(tmp_path, monkeypatch, name):
    path = write_video(tmp_path / name, 60, **FORMATS[name])
    times = video.frame_times(probe(path))
    monkeypatch.setattr(av, "open", Counted), monkeypatch.setattr(Counted, "taken", 0)
    assert numbers(read_frames(path, times, range(44, 55, 3), 32)) == [44, 47, 50, 53]
    assert (
        10 <= Counted.taken <= 10 + 20
    )  # up to a group of 10 before, and what the decoder holds back


@settings(max_examples=12)
@given(
    st.lists(st.integers(1, 3000), min_size=2, max_size=30),
    st.sampled_from(["v.mp4", "v.mkv", "v.webm"]),
    st.data(),
)
def test_frames_that_come_at_any_times_are_numbered_in_their_order(
    tmp_path_factory, gaps, name, data
):
    times = np.cumsum([0, *gaps]).tolist()
    path = write_video(
        tmp_path_factory.mktemp("times") / name,
        codec="libvpx" if "webm" in name else "libx264",
        times=times,
    )
    first = data.draw(st.integers(0, len(gaps)))
    assert len(video.frame_times(probe(path))) == len(times) and numbers(
        read(path, range(first, len(times)))
    ) == list(range(first, len(times)))


def test_a_long_pause_costs_nothing(tmp_path):
    path = write_video(tmp_path / "pause.mkv", codec="libx264", times=[0, 1, 2, 300_000])
    tracemalloc.start()
    assert len(video.frame_times(probe(path))) == 4
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6


STORED = {  # how an image that is to be shown as `x` is stored, by EXIF orientation
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}
MATRICES = {  # and the matrix (a, b, c, d) that shows it: x' = ax + cy, y' = bx + dy
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


@pytest.mark.parametrize("orientation", STORED)
def test_a_video_is_turned_and_mirrored_as_its_matrix_says(tmp_path, orientation):
    path = write_video(tmp_path / "v.mp4", 3, size=(48, 48))
    plain, raw = read(path, range(3)), bytearray(path.read_bytes())
    a, b, c, d = (65536 * v for v in MATRICES[orientation])
    struct.pack_into(">5i", raw, raw.index(b"tkhd") + 44, a, b, 0, c, d)
    path.write_bytes(raw)
    for shown, stored in zip(read(path, range(3)), plain):
        assert (STORED[orientation](shown) == stored).all()


@pytest.mark.parametrize("name", ["0.jpg", "0.png", "0.webp", "0.tif"])
def test_exif_orientations_are_honoured_in_every_format(tmp_path, name):
    exif, shown = Image.Exif(), picture(5, (32, 32))
    for orientation, stored in STORED.items():
        exif[0x0112] = orientation
        folder = tmp_path / str(orientation)
        folder.mkdir()
        image = Image.fromarray(np.ascontiguousarray(stored(shown)))
        image.save(folder / name, exif=exif, quality=100, lossless=True)
        difference = np.abs(read(folder, range(1))[0].astype(int) - shown)
        assert difference.mean() < (9 if name == "0.jpg" else 0.01), orientation


def test_images_of_every_mode_keep_their_brightness(tmp_path):
    grey = np.linspace(20, 230, 32 * 32).reshape(32, 32).astype(np.uint8)
    images = {
        "grey.png": Image.fromarray(grey),
        "grey16.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "grey16.tif": Image.fromarray(grey.astype(np.uint16) * 257),
        "alpha.png": Image.fromarray(np.dstack([grey, grey, grey, 255 - grey])),
        "grey_alpha.png": Image.fromarray(np.dstack([grey, 255 - grey])),
        "palette.png": Image.fromarray(grey).quantize(256),
        "cmyk.jpg": Image.fromarray(grey).convert("CMYK"),
    }
    for name, image in images.items():
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        image.save(folder / name, **({"quality": 100} if "jpg" in name else {}))
        got = read(folder, range(1))[0].astype(int)
        assert np.abs(got - grey[..., None]).max() <= 4, name


def test_grey_of_16_bits_is_turned_too_and_other_depths_are_named(tmp_path, capfd):
    x = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 60
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    for name, picture in (
        ("deep", x),
        ("float", x.astype(np.float32)),
        ("int", x.astype(np.int32)),
    ):
        (tmp_path / name).mkdir()
        Image.fromarray(picture).save(
            tmp_path / name / ("0.png" if name == "deep" else "0.tiff"), exif=exif
        )
    shown = read(tmp_path / "deep", range(1))[0, :, :, 0]
    assert np.abs(shown.astype(int) - np.rot90(x // 256, -1)).max() <= 1
    for name in ("float", "int"):
        with pytest.raises(Unreadable, match="8 or 16 bits"):
            read(tmp_path / name, range(1))
    (tmp_path / "palette").mkdir()
    image = Image.fromarray((x // 256).astype(np.uint8)).convert("P")
    image.save(tmp_path / "palette" / "0.png", transparency=bytes(range(256)))
    read(tmp_path / "palette", range(1))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["square.mp4", "dvd_16_9.mp4", "hdv_1440.mp4", "sar_half.mkv"])
def test_pixels_are_made_square(name):
    path = FILES / "sar" / name
    (frame,) = read_frames(path, video.frame_times(probe(path)), range(1), 64)
    disc = np.abs(frame.astype(int) - frame[0, 0]).sum(-1) > 100
    height, width = (np.ptp(np.nonzero(disc)[axis]) + 1 for axis in (0, 1))
    assert abs(height - width) <= 2 and height > 20


@given(
    st.integers(16, 100),
    st.integers(16, 100),
    st.sampled_from([("v.mp4", "libx264", "yuv444p"), ("v.gif", "gif", "rgb8")]),
)
@example(63, 47, ("v.mp4", "libx264", "yuv444p"))
@example(16, 100, ("v.mp4", "libx264", "yuv444p"))
@settings(max_examples=12)
def test_the_short_side_is_scaled_and_the_centre_cut_out(tmp_path_factory, width, height, kind):
    name, codec, pixels = kind
    frames = read(
        write_video(tmp_path_factory.mktemp("size") / name, 3, (width, height), codec, pixels),
        range(3),
    )
    assert (
        frames.shape == (3, 32, 32, 3) and frames.dtype == np.uint8 and numbers(frames) == [0, 1, 2]
    )
    assert frames[0, 8:24].mean() < 90  # frame 0 is dark, what is beside the square is white


@pytest.mark.parametrize("claimed", [0, 5, 100_000])
def test_a_wrong_frame_count_in_the_header_is_not_believed(tmp_path, claimed):
    raw = bytearray(write_video(tmp_path / "v.avi").read_bytes())
    for at in (raw.index(b"avih") + 24, raw.index(b"strh") + 40):
        assert struct.unpack_from("<I", raw, at) == (20,)
        struct.pack_into("<I", raw, at, claimed)
    (tmp_path / "v.avi").write_bytes(raw)
    assert len(video.frame_times(probe(tmp_path / "v.avi"))) == 20 and numbers(
        read(tmp_path / "v.avi", range(11, 20))
    ) == list(range(11, 20))


def test_the_ending_of_a_video(tmp_path):
    path = write_video(tmp_path / "v.mp4")
    assert numbers(read_ending(path, 32, 3, 4)) == [11, 15, 19] and read_ending(
        path, 32, 0, 1
    ).shape == (0, 3, 32, 32)
    assert numbers(read_ending(write_images(tmp_path / "images", 12), 32, 3, 1)) == [9, 10, 11]
    with pytest.raises(UserError, match="20 frames; 31 are needed"):
        read_ending(path, 32, 4, 10)
    with pytest.raises(UserError, match="none.mp4 cannot be read"):
        read_ending(tmp_path / "none.mp4", 32, 3, 4)


@pytest.mark.parametrize("name", ["faststart.mp4", "x264.flv", "x264.ts"])
def test_the_ending_of_a_cut_video_leaves_out_damaged_frames(tmp_path, name):
    raw = write_video(tmp_path / name, 40, **FORMATS[name]).read_bytes()
    for share in (0.5, 0.55, 0.6, 0.7, 0.8):
        (tmp_path / name).write_bytes(raw[: int(share * len(raw))])
        first, *_, last = got = numbers(read_ending(tmp_path / name, 32, 3, 2))
        assert got == list(range(first, last + 1, 2)) and last > 4


@given(st.integers(0, 2**31))
def test_pixels_come_back_from_the_model_range(seed):
    frames = np.random.default_rng(seed).integers(0, 256, (2, 4, 5, 3), np.uint8)
    assert (to_uint8(to_tensor(frames)) == frames).all() and to_tensor(frames).abs().max() <= 1


# ------------------------------------------------------------ files whose packets cannot be trusted


def decoded(path, size=32):
    """Every frame that decoding from the start gives: uint8 (frames, size, size, 3)."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1
        return np.stack([video._crop(frame, size) for frame in container.decode(video=0)])


def check_all(path, size=32):
    """Check that the index counts the frames that decode and any can be read; return them."""
    frames, times = decoded(path, size), video.frame_times(probe(path))
    assert len(times) == len(frames)
    clips = [range(t, t + 1) for t in range(len(frames))]
    clips += [range(len(frames)), range(5, len(frames), 3), range(len(frames) - 2, len(frames))]
    for wanted in clips:
        got = read_frames(path, times, wanted, size)
        assert (got == frames[wanted.start : wanted.stop : wanted.step]).all(), wanted
    return frames


COUNTS = {
    "remux_order/a_copy.mp4": 75,  # times of decoding as times of showing
    "remux_order/h_copy.mp4": 75,
    "remux_order/x_copy.mkv": 74,
    "cut_open_gop/h264_opengop_mp4.mkv": 52,  # the first packets never decode
    "cut_open_gop/hevc_default_mp4.mkv": 70,
    "cut_open_gop/hevc_opengop_mp4.ts": 52,
    "cut_open_gop/mpeg2_bf_ts.ts": 40,
    "paff/paff_remux.mkv": 40,  # a packet is a field
    "paff/paff_remux.ts": 40,
}


@pytest.mark.parametrize("name", COUNTS)
def test_frames_and_counts_are_those_of_decoding_from_the_start(name):
    frames = check_all(FILES / name)
    assert len(frames) == COUNTS[name]
    if "remux_order" in name:  # a grey ramp
        assert (np.diff(frames.mean((1, 2, 3))) > -0.5).all()
    assert read_ending(FILES / name, 32, 3, 2).shape == (3, 3, 32, 32)


BEGINS = [(0, 0), (0, 90), (90, 0), (0, 410), (410, 0), (0, 100_000), (100_000, 0)]


@pytest.mark.parametrize("begin", BEGINS)
def test_transport_streams_put_end_to_end(tmp_path, begin):
    parts = []
    for offset in begin:
        times = [offset + 40 * t for t in range(20)]
        part = write_video(tmp_path / "v.ts", codec="libx264", times=times, x264_params="b-adapt=0")
        parts.append(part.read_bytes())
    (tmp_path / "v.ts").write_bytes(b"".join(parts))
    assert numbers(check_all(tmp_path / "v.ts")) == [*range(20)] * 2


def write_moving(path, frames=100, **options):
    """A texture that moves, two frames a second."""
    texture = np.random.default_rng(0).integers(0, 256, (frames + 64, frames + 64, 3), np.uint8)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=2, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for t in range(frames):
            image = np.ascontiguousarray(texture[t // 2 : t // 2 + 64, t : t + 64])
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())
    return path


def test_clips_after_the_recovery_points_of_a_gradual_refresh(tmp_path):
    refresh = {"x264-params": "intra-refresh=1:keyint=10:scenecut=0"}
    check_all(write_moving(tmp_path / "v.mp4", **refresh), size=64)


def repack(source, target, change):
    """Write the packets of a video with the bytes that change(number, bytes) gives."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = (packet for packet in old.demux(video=0) if packet.size)
        for number, packet in enumerate(packets):
            changed = av.Packet(change(number, bytes(packet)))
            changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
            changed.duration, changed.is_keyframe = packet.duration, packet.is_keyframe
            changed.stream = stream
            new.mux(changed)
    return target


def test_vp8_frames_that_are_never_shown_do_not_count(tmp_path):
    source = write_video(tmp_path / "v.webm", codec="libvpx", g=10)
    hide = lambda number, data: bytes([data[0] & ~16]) + data[1:] if number in (3, 12) else data
    path = repack(source, tmp_path / "hidden.webm", hide)
    assert numbers(check_all(path)) == [t for t in range(20) if t not in (3, 12)]
    assert not isinstance(video.frame_times(probe(path)), video.Untimed)


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.avi"])
def test_mpeg4_frames_that_are_not_coded_do_not_count(tmp_path, name):
    source = write_video(tmp_path / "source.mp4", 50, g=50)
    skip = lambda number, data: b"\0\0\1\xb6\x50\x47" if number == 45 else data
    assert len(check_all(repack(source, tmp_path / name, skip))) == 49


def test_a_video_that_does_not_begin_with_a_key_frame(tmp_path):
    raw = write_video(tmp_path / "v.ts", 30, codec="libx264", g=10).read_bytes()
    with av.open(str(tmp_path / "v.ts")) as container:
        begins = [packet.pos for packet in container.demux(video=0) if packet.size]
    (tmp_path / "v.ts").write_bytes(raw[: begins[0]] + raw[begins[4] :])
    assert numbers(check_all(tmp_path / "v.ts"))[-5:] == list(range(25, 30))


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_the_default_stream_is_read(tmp_path, name):
    with av.open(str(tmp_path / name), "w") as file:
        streams = [file.add_stream("libx264", rate=25) for _ in range(2)]
        for stream, default in zip(streams, (0, 1)):
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            stream.disposition = default
        for t in range(6):
            for stream, number in zip(streams, (60, t)):
                frame = av.VideoFrame.from_ndarray(picture(number, (64, 48)), format="rgb24")
                file.mux(stream.encode(frame))
        for stream in streams:
            file.mux(stream.encode())
    assert numbers(read(tmp_path / name, range(1, 6))) == [1, 2, 3, 4, 5]


def test_a_cover_picture_is_no_video(tmp_path):
    with av.open(str(tmp_path / "song.mp4"), "w") as file:
        sound = file.add_stream("aac", rate=8000, layout="mono")
        cover = file.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt, cover.disposition = 64, 48, "rgb24", 0x400
        silence = np.zeros((1, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.rate = 8000
        file.mux(cover.encode(av.VideoFrame.from_ndarray(picture(0, (64, 48)), format="rgb24")))
        for stream, last in ((sound, frame), (sound, None), (cover, None)):
            file.mux(stream.encode(last))
    assert probe(tmp_path / "song.mp4") == {"skip": "no video stream"}


# -------------------------------------------------------------------------------- files with faults


def write_sound(path):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 800), np.int16), format="s16", layout="mono"
        )
        frame.rate = 8000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())


def test_every_unusable_file_is_named_with_its_reason_and_counted(tmp_path, capsys):
    raw = write_video(tmp_path / "good.mp4", codec="libx264").read_bytes()
    faulty = {"empty.mp4": b"", "text.mkv": b"not a video\n" * 50, "half.mp4": raw[: len(raw) // 2]}
    faulty["codec.mp4"] = raw.replace(b"avc1", b"zzzz")
    for name, content in faulty.items():
        (tmp_path / name).write_bytes(content)
    write_sound(tmp_path / "sound.mkv")
    assert list(index(tmp_path, tmp_path / "index.json")) == ["good.mp4"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 6 and "5 of 6 files" in said[-1]
    for name in [*faulty, "sound.mkv"]:
        (line,) = [line for line in said if f"/{name} is left out: " in line]
        assert len(line.split("left out: ")[1]) > 5
    index(tmp_path, tmp_path / "index.json")
    assert "5 of 6 files" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["faststart.mp4", "x264.mkv", "no_duration.webm", "x264.ts", "rgb8.gif"]
)
def test_of_a_cut_file_the_frames_before_the_cut_remain(tmp_path, name):
    raw = write_video(tmp_path / name, 40, **FORMATS[name]).read_bytes()
    for share in (0.4, 0.55, 0.8):
        (tmp_path / name).write_bytes(raw[: int(share * len(raw))])
        count = len(video.frame_times(probe(tmp_path / name)))
        assert 5 < count < 40 and numbers(read(tmp_path / name, range(count - 1))) == list(
            range(count - 1)
        )


@pytest.mark.parametrize("name", ["v.mp4", "v.avi"])
def test_what_a_damaged_packet_spoils_is_never_given_out(tmp_path, name):
    raw, frames = write_video(tmp_path / name).read_bytes(), read(tmp_path / name, range(20))
    with av.open(str(tmp_path / name)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for damaged in range(20):
        at, size = places[damaged]
        (tmp_path / name).write_bytes(raw[:at] + bytes(size) + raw[at + size :])
        found = probe(tmp_path / name)
        for t in range(20) if damaged in (7, 13) else ():
            try:
                assert (
                    read_frames(tmp_path / name, video.frame_times(found), range(t, t + 1), 32)
                    == frames[t]
                ).all()
            except Unreadable:
                assert damaged <= t < damaged + 5 - damaged % 5  # up to the next key frame


NAMES = [
    "-x",
    "a b",
    "%03d",
    "a%3d",
    "#",
    "a:b",
    "pipe:",
    "http:x",
    "q*[0-9]?",
    "~",
    "\n",
    "'\"|",
    "é日本",
    os.fsdecode(b"\xff"),
    "UPPER",
]


@pytest.mark.parametrize(
    "suffix, codec, pixels", [(".mp4", "mpeg4", "yuv420p"), (".GIF", "gif", "rgb8")]
)
def test_names_mean_nothing(tmp_path, suffix, codec, pixels):
    raw = write_video(tmp_path / f"v{suffix.lower()}", 4, codec=codec, pixels=pixels).read_bytes()
    for i, name in enumerate(NAMES):
        (tmp_path / (name + suffix)).write_bytes(raw)
        (
            write_images(tmp_path / name, 3),
            write_images(tmp_path / f"images{i}", 3, name=name + "{}.png"),
        )
    pattern = write_images(tmp_path / "pattern", 3, "{}.png")
    shutil.copy(pattern / "2.png", pattern / "%d.png")  # to FFmpeg this names all of them
    assert numbers(read(pattern, range(4))) == [0, 1, 2, 2]
    found = index(tmp_path, tmp_path / "index.json")
    assert found == index(tmp_path, tmp_path / "index.json") and len(found) == 3 * len(NAMES) + 2
    assert all(
        numbers(read_frames(tmp_path / name, times, range(1, 3), 32)) == [1, 2]
        for name, times in found.items()
    )


@pytest.mark.parametrize("name", ["frame{}.png", "{}.JPG", "a1b{}.jpeg"])
def test_a_folder_of_images_is_a_video_in_natural_order(tmp_path, name):
    write_images(
        tmp_path / "deep" / "er", 13, name, size=lambda t: (64 + t, 48) if t % 2 else (33, 90)
    )
    (tmp_path / "deep" / "er" / "notes.txt").touch()
    write_images(tmp_path / "clip", 1, "thumbnail{}.jpg")
    write_video(tmp_path / "clip" / "v.mp4")
    assert {name: len(times) for name, times in index(tmp_path).items()} == {
        "clip/v.mp4": 20,
        "deep/er": 13,
    }
    assert numbers(read(tmp_path / "deep" / "er", range(1, 13, 2))) == [1, 3, 5, 7, 9, 11]


def test_a_damaged_image_spoils_only_the_clips_that_hold_it(tmp_path):
    images = write_images(tmp_path / "images", 6)
    for damage in (b"", b"no image", (images / "frame4.png").read_bytes()[:60]):
        (images / "frame3.png").write_bytes(damage)
        assert numbers(read(images, range(0, 6, 2))) == [0, 2, 4]
        with pytest.raises(Unreadable):
            read(images, range(2, 5))
    (images / "frame3.png").unlink()
    with pytest.raises(Unreadable, match="only 1 of 2 frames"):
        read_frames(images, range(6), range(4, 6), 32)


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_video(tmp_path / "elsewhere.mp4", 3)
    (tmp_path / "root" / "a").mkdir(parents=True), (tmp_path / "other").mkdir()
    write_video(tmp_path / "other" / "x.mp4", 3)
    links = {
        "a/back": "root",
        "b": "other",
        "file.mp4": "elsewhere.mp4",
        "nowhere.mp4": "none",
        "c.png": "none",
    }
    for link, target in links.items():
        (tmp_path / "root" / link).symlink_to(tmp_path / target)
    assert set(find_videos(tmp_path / "root")) == {"b/x.mp4", "file.mp4"}


def test_hidden_files_and_folders_are_passed_over(tmp_path, capsys):
    frames = write_images(tmp_path / "frames", 5)
    write_video(tmp_path / "v.mp4", 3)
    for place in (".Trashes", "__MACOSX", "deep/.hidden"):
        write_images(tmp_path / place, 2), write_video(tmp_path / place / "v.mp4", 2)
    for name in ("frames/._frame3.png", "._v.mp4", "deep/._0.png"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7" + bytes(60))
    found = index(tmp_path)
    assert {name: len(times) for name, times in found.items()} == {"frames": 5, "v.mp4": 3}
    assert numbers(read(frames, range(5))) == list(range(5)) and capsys.readouterr().err == ""


def test_what_is_passed_over_is_named_once(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "both", 4), write_video(tmp_path / "both" / "v.mp4", 3)
    (tmp_path / "closed").mkdir()
    for link in ("gone.mp4", "gone.png", "folder"):
        (tmp_path / link).symlink_to(tmp_path / "nowhere" / link)
    real = os.scandir

    def scandir(path):
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert list(index(tmp_path)) == ["both/v.mp4"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    for words, names in {
        "1 files and folders that may not be opened": ["closed"],
        "3 links that lead nowhere": ["folder", "gone.mp4", "gone.png"],
        "4 images beside video files": ["both/frame0.png", "both/frame1.png", "both/frame2.png"],
    }.items():
        (line,) = [line for line in said if words in line]
        assert ", ".join(str(tmp_path / name) for name in names) in line


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    names = ("x264.mp4", "x264.mkv", "vp8.webm", "rgb8.gif", "x264.ts", "mpeg4.avi")
    return {name: write_video(folder / name, 12, **FORMATS[name]) for name in names}


wounds = st.tuples(
    st.sampled_from(["flip", "cut", "zero", "insert", "ones"]),
    st.floats(0, 1),
    st.integers(1, 64),
    st.booleans(),
)


def wound(raw, kind, place, length, early):
    at = int(place * min(len(raw), 1000 if early else len(raw)))
    piece = raw[at : at + length]
    new = {
        "flip": bytes(b ^ 1 << length % 8 for b in piece[:2]) + piece[2:],
        "cut": b"",
        "zero": bytes(len(piece)),
        "ones": b"\xff" * len(piece),
        "insert": piece + piece[::-1],
    }[kind]
    return raw[:at] + new + raw[at + length :]


@settings(max_examples=100)
@given(st.data(), st.lists(wounds, min_size=1, max_size=4))
def test_damage_gives_frames_or_a_reason_soon(sources, data, wounds):
    source = sources[data.draw(st.sampled_from(sorted(sources)))]
    raw = source.read_bytes()
    for each in wounds:
        raw = wound(raw, *each)
    path = source.with_stem("damaged")
    path.write_bytes(raw)
    begin, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = probe(path)
    assert "skip" in found and found["skip"] or len(video.frame_times(found)) > 0
    if "skip" not in found:
        times = video.frame_times(found)
        first = data.draw(st.integers(0, len(times) - 1))
        wanted = range(first, min(first + 4, len(times)))
        try:
            assert read_frames(path, times, wanted, 32).shape == (len(wanted), 32, 32, 3)
        except Unreadable as error:
            assert str(error)
    assert (
        time.monotonic() - begin < 5
        and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500_000
    )


# ---------------------------------------------------------------------------------------- the index


def no_probe(path):
    raise AssertionError(f"{path} is probed again")


def test_what_has_not_changed_is_not_probed_again(tmp_path, monkeypatch):
    root, cache = tmp_path / "videos", tmp_path / "index.json"
    write_images(root / "images", 5)
    for name, count in {"a.mp4": 9, "b.mp4": 9, "c.mp4": 9}.items():
        write_video(root / name, count)
    write_video(root / "times.mkv", times=[0, 1, 5, 9], codec="libx264"), (root / "bad.mp4").touch()
    first, real = index(root, cache), probe
    monkeypatch.setattr(video, "probe", no_probe)
    again = index(root, cache)
    assert [(k, list(map(int, v))) for k, v in again.items()] == [
        (k, list(map(int, v))) for k, v in first.items()
    ] and len(first) == 5
    probed = []
    monkeypatch.setattr(video, "probe", lambda path: probed.append(path.name) or real(path))
    (
        write_video(root / "a.mp4", 7),
        (root / "b.mp4").unlink(),
        write_video(root / "d.mp4", 5),
        (root / "images" / "frame0.png").unlink(),
    )
    os.utime(root / "c.mp4")
    changed = index(root, cache)
    assert sorted(probed) == ["a.mp4", "c.mp4", "d.mp4", "images"]
    assert {k: len(v) for k, v in changed.items()} == {
        "a.mp4": 7,
        "c.mp4": 9,
        "d.mp4": 5,
        "images": 4,
        "times.mkv": 4,
    }
    assert set(json.loads(cache.read_text())["videos"]) == {*changed, "bad.mp4"}
    other = shutil.copytree(root, tmp_path / "copy")
    assert (
        index(other, cache).keys() == changed.keys() and len(probed) == 4 + 6
    )  # an index of another folder is not believed


def test_an_index_of_another_version_is_made_anew(tmp_path, capsys):
    root, cache = tmp_path / "videos", tmp_path / "index.json"
    root.mkdir()
    write_video(root / "v.mp4", 9)
    first, stored = index(root, cache), json.loads(cache.read_text())
    stored["videos"]["v.mp4"]["range"] = [0, 5, 1]
    for version in (None, 1, 1000):
        old = {key: value for key, value in stored.items() if key != "version"}
        cache.write_text(json.dumps(old | ({"version": version} if version else {})))
        assert index(root, cache) == first and capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder of one video, its index file, and what that holds."""
    folder = tmp_path_factory.mktemp("kept")
    (folder / "videos").mkdir()
    write_video(folder / "videos" / "v.mp4")
    index(folder / "videos", folder / "index.json")
    return folder / "videos", folder / "index.json", json.loads((folder / "index.json").read_text())


@given(st.binary(max_size=40) | st.text('{}[]",:019', max_size=12).map(str.encode))
@example(b"[" * 100_000)
@example(b"\xff\xfe")
def test_a_damaged_index_file_is_made_anew(kept, content):
    root, cache, held = kept
    cache.write_bytes(content)
    assert index(root, cache) == {"v.mp4": range(0, 10240 - 511, 512)}
    assert json.loads(cache.read_text()) == held


def test_a_damaged_index_file_is_named(kept, capsys):
    root, cache, _ = kept
    cache.write_bytes(b"{")
    index(root, cache)
    assert capsys.readouterr().err == f"warning: {cache} is damaged and made anew\n"


keys = st.sampled_from(["range", "times", "count", "skip", "stamp"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=100)
@given(
    st.sampled_from(
        ["tree", "root", "videos", "entry", "stamp", "range", "times", "count", "skip"]
    ),
    values,
)
@example("range", [0, 10**30])
@example("count", float("inf"))
@example("times", [None])
@example("times", [[1, 2], [3, 4]])
@example("times", {"a": 1})
def test_wrong_types_in_the_index_file_give_no_traceback(kept, where, value):
    root, cache, held = kept
    entry = {"stamp": held["videos"]["v.mp4"]["stamp"], "range": [0, 20, 1]}
    if where in ("range", "times", "count", "skip"):
        del entry["range"]
    entry = value if where == "entry" else entry | {where: value}
    tree = held | {"videos": {"v.mp4": entry}} | ({where: value} if where in held else {})
    cache.write_text(json.dumps(value if where == "tree" else tree))
    with contextlib.suppress(Unreadable, UserError):
        found = index(root, cache)
        wanted = range(min(len(found["v.mp4"]), 3))
        assert len(read_frames(root / "v.mp4", found["v.mp4"], wanted, 32)) == len(wanted)


def test_an_index_file_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    write_video(tmp_path / "v.mp4")
    assert (
        list(index(tmp_path, tmp_path / "v.mp4" / "index.json")) == ["v.mp4"]
        and "index.json" in capsys.readouterr().err
    )


def test_a_folder_without_video_is_an_error_in_words(tmp_path):
    for root in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=f"{root} "):
            index(root)
    (tmp_path / "bad.mp4").touch()
    with pytest.raises(UserError, match="no usable video .1 files"):
        index(tmp_path)


def test_many_files_are_probed_by_other_processes_alike(tmp_path, monkeypatch, capsys):
    root, cache = tmp_path / "videos", tmp_path / "index.json"
    root.mkdir()
    write_video(tmp_path / "v.mp4", 3), (root / "bad.mp4").touch()
    for i in range(501):
        os.link(tmp_path / "v.mp4", root / f"{i}.mp4")
    monkeypatch.setattr(video, "probe", lambda path: probe(path) | {"process": os.getpid()})
    found = index(root, cache)
    assert found == {f"{i}.mp4": range(0, 1025, 512) for i in range(501)} and list(found) == sorted(
        found
    )
    entries = json.loads(cache.read_text())["videos"]
    assert (
        os.getpid() not in {entry["process"] for entry in entries.values()}
        and entries["bad.mp4"]["skip"] == probe(root / "bad.mp4")["skip"]
    )
    assert "bad.mp4 is left out" in capsys.readouterr().err
