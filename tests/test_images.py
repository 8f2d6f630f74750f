import contextlib
import hashlib
import io
import logging
import os
import random
import re
import struct
import sys
import threading
import unicodedata
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from tsgb import images
from tsgb.images import ImageError, collect, labels, read, sha256

Y, X = np.mgrid[:12, :20]
GREY = (X * 12 + Y).astype(np.uint8)
COLOUR = np.stack([X * 12, Y * 20, (X * Y) % 256], -1).astype(np.uint8)
ALPHA = (X * 13).astype(np.uint8)


def reread(image: Image.Image, path: Path, **options) -> np.ndarray:
    image.save(path, **options)
    found = read(path)
    assert found.mode == "RGB"
    assert found.info == {}
    return np.asarray(found)


def three(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey] * 3, -1)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    opacity = alpha[..., None] / 255
    return colour * opacity + 255 * (1 - opacity)


def png(bits: int, kind: int, rows: list[bytes], width: int, extra: bytes = b"") -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), bits, kind, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + extra + body + chunk(b"IEND", b"")


def transparent(values: tuple[int, ...]) -> bytes:
    data = struct.pack(f">{len(values)}H", *values)
    return struct.pack(">I", len(data)) + b"tRNS" + data + struct.pack(">I", zlib.crc32(b"tRNS" + data))


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "tga", "webp", "qoi", "jp2"])
def test_colour_images_are_read_exactly(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    assert (reread(Image.fromarray(COLOUR), tmp_path / f"a.{suffix}", **options) == COLOUR).all()


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "pgm"])
def test_grey_and_black_and_white(tmp_path, suffix):
    assert (reread(Image.fromarray(GREY), tmp_path / f"grey.{suffix}") == three(GREY)).all()
    if suffix != "pgm":
        assert (reread(Image.fromarray(GREY > 99), tmp_path / f"1.{suffix}") == three((GREY > 99) * 255)).all()


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_alpha_is_laid_over_white(tmp_path, suffix):
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    rgba = Image.fromarray(np.dstack([COLOUR, ALPHA]))
    assert abs(reread(rgba, tmp_path / f"rgba.{suffix}", **options) - over_white(COLOUR, ALPHA)).max() <= 0.51
    la = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
    assert abs(reread(la, tmp_path / f"la.{suffix}", **options) - over_white(three(GREY), ALPHA)).max() <= 0.51


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.fromarray(COLOUR).quantize(16)
    colours = np.array(image.getpalette()).reshape(-1, 3)
    index = np.asarray(image)
    assert (reread(image, tmp_path / "p.png") == colours[index]).all()
    assert (reread(image, tmp_path / "p.gif") == colours[index]).all()
    expected = np.where((index == 3)[..., None], 255, colours[index])
    assert (reread(image, tmp_path / "one.png", transparency=3) == expected).all()
    assert (reread(image, tmp_path / "one.gif", transparency=3) == expected).all()
    alphas = np.arange(16, dtype=np.uint8) * 17
    many = reread(image, tmp_path / "many.png", transparency=alphas.tobytes())
    assert abs(many - over_white(colours[index], alphas[index])).max() <= 0.51


def test_one_transparent_colour_becomes_white(tmp_path):
    colour = COLOUR.copy()
    colour[2, 3] = (1, 2, 3)
    expected = colour.copy()
    expected[2, 3] = 255
    assert (reread(Image.fromarray(colour), tmp_path / "rgb.png", transparency=(1, 2, 3)) == expected).all()
    expected = three(np.where(GREY == 50, 255, GREY))
    assert (reread(Image.fromarray(GREY), tmp_path / "l.png", transparency=50) == expected).all()


def test_cmyk_also_as_adobe_writes_it(tmp_path):
    cmyk = np.dstack([COLOUR, (ALPHA // 4)])
    expected = (255 - COLOUR.astype(float)) * (1 - (ALPHA // 4)[..., None] / 255)
    image = Image.fromarray(cmyk, mode="CMYK")
    assert abs(reread(image, tmp_path / "a.tif") - expected).max() <= 1
    flat = Image.new("CMYK", (16, 16), (200, 30, 90, 40))
    got = reread(flat, tmp_path / "a.jpg", quality=100)
    assert b"Adobe" in (tmp_path / "a.jpg").read_bytes()
    assert abs(got - (255 - np.array([200, 30, 90])) * (1 - 40 / 255)).max() <= 3


def test_ycbcr_and_lab(tmp_path):
    image = Image.new("RGB", (16, 16), (200, 80, 30))
    assert abs(reread(image.convert("YCbCr"), tmp_path / "a.tif").astype(int) - (200, 80, 30)).max() <= 2
    assert abs(reread(image.convert("YCbCr"), tmp_path / "a.jpg", quality=100).astype(int) - (200, 80, 30)).max() <= 3
    assert abs(reread(image.convert("LAB"), tmp_path / "b.tif").astype(int) - (200, 80, 30)).max() <= 3


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big.tif", "a.pgm"])
def test_16_bit_grey_is_scaled(tmp_path, name):
    values = np.array([[0, 128, 129, 257, 385, 386], [1000, 25700, 32768, 65406, 65407, 65535]], np.uint16)
    expected = [[int(v / 257 + 0.5) for v in row] for row in values.tolist()]
    if name == "big.tif":
        image = Image.frombytes("I;16B", (6, 2), values.astype(">u2").tobytes())
    else:
        image = Image.fromarray(values)
    assert (reread(image, tmp_path / name) == three(np.array(expected))).all()


def test_16_bit_grey_with_a_transparent_value(tmp_path):
    (tmp_path / "a.png").write_bytes(png(16, 0, [struct.pack(">3H", 300, 301, 65535)], 3, transparent((301,))))
    assert np.asarray(read(tmp_path / "a.png"))[0, :, 0].tolist() == [1, 255, 255]


def test_16_bit_colour(tmp_path):
    row = struct.pack(">6H", 0, 257, 65535, 25700, 51400, 12850)
    (tmp_path / "a.png").write_bytes(png(16, 2, [row], 2))
    assert np.asarray(read(tmp_path / "a.png")).tolist() == [[[0, 1, 255], [100, 200, 50]]]


def test_32_bit_grey_is_refused_outside_of_16_bits(tmp_path):
    values = np.array([[0, 257, 65535]], np.int32)
    assert (reread(Image.fromarray(values), tmp_path / "a.tif") == three(np.array([[0, 1, 255]]))).all()
    for wrong in (65536, -1):
        Image.fromarray(np.array([[0, wrong]], np.int32)).save(tmp_path / "b.tif")
        with pytest.raises(ImageError, match=rf"b.tif: .*{wrong}.*, expected 0 to 65535"):
            read(tmp_path / "b.tif")


def test_floats_are_read_from_0_to_1_and_refused_outside(tmp_path):
    values = np.array([[0, 0.25, 0.5019608, 1]], np.float32)
    assert (reread(Image.fromarray(values), tmp_path / "a.tif") == three(np.array([[0, 64, 128, 255]]))).all()
    for wrong in (1.5, -0.25, np.nan):
        Image.fromarray(np.array([[0, wrong]], np.float32)).save(tmp_path / "b.tif")
        with pytest.raises(ImageError, match=r"b.tif: .*grey values from .*, expected 0 to 1"):
            read(tmp_path / "b.tif")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", range(9))
def test_exif_orientation(tmp_path, suffix, orientation):
    blocks = np.zeros((16, 32, 3), np.uint8)
    blocks[:8, :16] = (250, 10, 10)
    blocks[8:, 16:] = (10, 10, 250)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(blocks)
    got = reread(image, tmp_path / f"a.{suffix}", exif=exif, quality=100).astype(int)
    turns = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a.swapaxes(0, 1)[:, ::-1],
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: a.swapaxes(0, 1)[::-1],
    }
    expected = turns.get(orientation, lambda a: a)(blocks)
    assert got.shape == expected.shape
    # Chroma is stored at half the size in some of the formats, so look inside of the blocks only.
    assert abs(got - expected)[3::8, 3::8].max() <= 12
    with Image.open(tmp_path / f"a.{suffix}") as image:
        assert (np.asarray(ImageOps.exif_transpose(image).convert("RGB")) == got).all()


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    first, second = Image.new("RGB", (9, 7), (255, 0, 0)), Image.new("RGB", (9, 7), (0, 0, 255))
    got = reread(first, tmp_path / f"a.{suffix}", save_all=True, append_images=[second])
    assert abs(got.astype(int) - (255, 0, 0)).max() <= 3


def test_broken_exif_does_not_cost_the_image(tmp_path):
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0\xff\xff\xff\xff"
    assert abs(reread(Image.fromarray(GREY), tmp_path / "a.jpg", exif=exif, quality=100)[..., 0] - GREY * 1.0).max() < 9


def test_missing_folder_and_empty(tmp_path):
    (tmp_path / "empty.png").touch()
    for path, reason in [
        (tmp_path / "none.png", "no such file"),
        (tmp_path / "empty.png" / "below.png", "Not a directory"),
        (tmp_path, "is a folder"),
        (tmp_path / "empty.png", "is empty"),
        (tmp_path / ("x" * 300), "too long"),
        ("a\0b", "null"),
    ]:
        with pytest.raises(ImageError, match=reason) as caught:
            read(path)
        assert str(caught.value).startswith("'a\\x00b': " if path == "a\0b" else f"{path}: ")
        assert "\n" not in str(caught.value)


def test_a_message_stays_one_line_whatever_the_name():
    with pytest.raises(ImageError) as caught:
        read("two\nlines.png")
    assert str(caught.value) == "'two\\nlines.png': no such file"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match=r"pipe\.png: is not a regular file"):
        read(tmp_path / "pipe.png")


def test_no_permission(tmp_path, monkeypatch):
    Image.fromarray(GREY).save(tmp_path / "a.png")

    def refuse(*args, **kwargs):  # chmod would not stop the superuser, who may be running the tests
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    for function in (read, sha256):
        with pytest.raises(ImageError, match=r"a\.png: no permission to read it"):
            function(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"not an image at all\n" * 9, b"\0", b"\x89PNG\r\n", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.jpg: not an image in a format that can be read"):
        read(tmp_path / "a.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tif", "bmp", "avif"])
def test_truncated(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / f"whole.{suffix}")
    data = (tmp_path / f"whole.{suffix}").read_bytes()
    (tmp_path / f"half.{suffix}").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=rf"half\.{suffix}: "):
        read(tmp_path / f"half.{suffix}")


@pytest.mark.parametrize("side", [9_500, 10_001, 14_000, 100_000])
def test_images_too_large_are_refused_by_their_header(tmp_path, side, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(8, 0, [b""], side).replace(struct.pack(">II", side, 1), struct.pack(">II", side, side)))
    data = bytearray(path.read_bytes())
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image.size) or image._fail)
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=r"cannot be decoded" if side == 9_500 else r"bomb\.png: too large"):
            read(path)
    assert decoded == ([(side, side)] if side == 9_500 else [])  # 90 million pixels: Pillow would warn
    assert limit == Image.MAX_IMAGE_PIXELS


def test_an_image_that_turns_out_larger_than_its_header_says(tmp_path, monkeypatch):
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    load = ImageFile.ImageFile.load

    def grow(image):  # as icons do in some versions of Pillow
        load(image)
        image.im, image._size = image.im.resize((48, 48)), (48, 48)

    monkeypatch.setattr(ImageFile.ImageFile, "load", grow)
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"too large: 48 x 48 pixels, more than 1000 in all"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize(
    "error",
    [
        OSError("a\nb"),
        SyntaxError("broken PNG file"),
        ValueError(),
        struct.error("unpack"),
        EOFError(),
        IndexError("x"),
        TypeError("x"),
        KeyError("x"),
        OverflowError("x"),
        zlib.error("x"),
        MemoryError(),
        RecursionError("x"),
        AssertionError(),
    ],
)
def test_whatever_a_decoder_raises_becomes_one_line(tmp_path, monkeypatch, error):
    Image.fromarray(GREY).save(tmp_path / "a.png")

    def fail(image):
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ImageError, match=r"a\.png: cannot be decoded: .+") as caught:
        read(tmp_path / "a.png")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def seeds() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    result = []
    for suffix in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "ICO", "TGA", "PPM", "SGI", "PCX", "JPEG2000", "AVIF"):
        for mode in ("RGB", "L", "P", "1", "RGBA", "CMYK", "I;16"):
            file = io.BytesIO()
            with contextlib.suppress(OSError, ValueError, KeyError):
                Image.fromarray(COLOUR).convert("L" if mode == "I;16" else mode).convert(mode).save(
                    file, suffix, exif=exif
                )
                result.append(file.getvalue())
    for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits"):
        file = io.BytesIO()
        Image.fromarray(COLOUR).save(file, "TIFF", compression=compression, exif=exif)
        result.append(file.getvalue())
    return result


def test_mutated_files_are_read_or_refused_in_silence(tmp_path, capfd):
    whole, chance, path = seeds(), random.Random(0), tmp_path / "a.bin"
    filters, outcomes = list(warnings.filters), {"read": 0, "refused": 0}
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for turn in range(600):
            data = bytearray(whole[turn % len(whole)])
            if turn % 3 == 0:
                del data[chance.randrange(len(data)) :]
            for _ in range(turn % 3 * 2):
                data[chance.randrange(len(data) if turn % 2 else min(len(data), 100))] = chance.randrange(256)
            path.write_bytes(data)
            message = None
            try:
                assert read(path).mode == "RGB"
            except ImageError as error:
                message = str(error)
            outcomes["refused" if message else "read"] += 1
            assert message is None or (message.startswith(f"{path}: ") and "\n" not in message)
    assert [str(warning.message) for warning in heard] == []
    assert capfd.readouterr() == ("", "")
    assert warnings.filters == filters
    assert min(outcomes.values()) > 100


def test_pillows_logger_is_kept_off_the_terminal_but_not_from_listeners(capfd, caplog):
    with caplog.at_level(logging.ERROR):
        logging.getLogger("PIL.TiffImagePlugin").error("More samples per pixel than can be decoded")
    assert len(caplog.records) == 1
    root, saved = logging.getLogger(), logging.getLogger().handlers[:]
    try:
        root.handlers[:] = []
        logging.getLogger("PIL.TiffImagePlugin").error("More samples per pixel than can be decoded")
    finally:
        root.handlers[:] = saved
    assert capfd.readouterr().err == ""


def test_threads_read_at_the_same_time(tmp_path):
    for index in range(8):
        reread(Image.new("RGB", (300, 200), (index, 0, 0)), tmp_path / f"{index}.tif", compression="tiff_lzw")
    filters, wrong = list(warnings.filters), []

    def work(index):
        for turn in range(20):
            number = (index + turn) % 8
            if read(tmp_path / f"{number}.tif").getpixel((5, 5)) != (number, 0, 0):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert warnings.filters == filters


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system does not list open files")
def test_files_are_closed(tmp_path):
    for name in ("a.png", "a.tif", "a.gif", "a.webp"):
        Image.fromarray(COLOUR).save(tmp_path / name)
    (tmp_path / "bad.png").write_bytes((tmp_path / "a.png").read_bytes()[:90])
    before = os.listdir("/proc/self/fd")
    kept = []
    for name in ("a.png", "a.tif", "a.gif", "a.webp", "bad.png"):
        try:
            kept.append(read(tmp_path / name))
        except ImageError as error:
            kept.append(error)
    sha256(tmp_path / "a.png")
    assert os.listdir("/proc/self/fd") == before


def test_sha256(tmp_path):
    data = os.urandom(3_000_001)
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(b"")
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()
    assert sha256(str(tmp_path / "b")) == hashlib.sha256().hexdigest()
    with pytest.raises(ImageError, match="no such file"):
        sha256(tmp_path / "c")


def test_collect(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deeper.png").mkdir(parents=True)
    for name in (
        "b.PNG",
        "a.jpg",
        "c.webp",
        "notes.txt",
        "data.h5",
        "page.eps",
        "paper.pdf",
        "._a.jpg",
        "deeper.png/d.png",
    ):
        (folder / name).touch()
    single = tmp_path / "single.xyz"
    got = collect([str(single), folder, folder / "a.jpg", tmp_path / "folder" / ".." / "single.xyz", "missing.png"])
    assert got == [single, folder / "a.jpg", folder / "b.PNG", folder / "c.webp", Path("missing.png")]
    assert collect([]) == []


def test_collect_refuses_a_folder_without_images(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ImageError, match="holds no image files"):
        collect([tmp_path])

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ImageError, match="cannot be listed: Permission denied"):
        collect([tmp_path])


def test_long_names_are_cut():
    long = labels([Path("ä" * 120 + "-1.png"), Path("ä" * 120 + "-2.png"), Path("b" * 160 + ".png")])
    assert long == ["ä" * 74 + "-1", "ä" * 74 + "-2", "b" * 150]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a/cat.png", "b/dog.png"], ["cat", "dog"]),
        (["a/cat.png", "b/cat.png"], ["a-cat", "b-cat"]),
        (["cat.png", "cat.jpg"], ["cat-png", "cat-jpg"]),
        (["a/cat.png", "a/cat.jpg", "b/cat.png"], ["a-cat-png", "a-cat-jpg", "b-cat"]),
        (["/x/a/cat.png", "/y/a/cat.png"], ["x-a-cat", "y-a-cat"]),
        (["/cat.png", "/a/cat.png"], ["cat", "a-cat"]),
        (["a/cat.png", "b/cat.png", "a-cat.png"], ["a-cat-2", "b-cat", "a-cat"]),
        (["a/Cat.png", "b/cat.png"], ["a-Cat", "b-cat"]),
        (["a/cat.png", "a/cat.png"], ["cat-png", "cat-png-2"]),
        (["con.png", "a:b.png", ".png", "x.tar.gz", "line\nfeed.png"], ["_con", "a_b", "png", "x.tar", "line_feed"]),
        ([], []),
    ],
)
def test_labels(paths, expected):
    assert labels([Path(path) for path in paths]) == expected


NAMES = st.one_of(
    st.sampled_from(
        ["cat", "CAT", "a-cat", "b-cat", "a-cat-2", "cat-2", "cat-png", "a", "b", "con", "ß", "ss", "é", "e\u0301"]
    ),
    st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=200),
)
PATHS = st.builds(
    lambda folders, stem, suffix: Path(*folders, stem + suffix),
    st.lists(NAMES, max_size=3),
    NAMES,
    st.sampled_from(["", ".png", ".PNG", ".jpg", "."]),
)


@given(st.lists(PATHS, max_size=12))
def test_labels_are_unique_valid_and_repeatable(paths):
    result = labels(paths)
    assert len(result) == len(paths)
    assert len({unicodedata.normalize("NFD", label.lower()) for label in result}) == len(paths)
    assert len({label.casefold() for label in result}) == len(paths)
    assert result == labels(paths)
    for label in result:
        assert label.isprintable()
        assert not set(label) & set('<>:"/\\|?*')
        assert label.strip(" .") == label != ""
        assert len(label.encode()) <= 155
    stems = [path.stem.strip(" .").casefold() for path in paths]
    for path, label in zip(paths, result, strict=True):
        is_device = re.fullmatch(r"con|prn|aux|nul|(com|lpt)\d", path.stem.lower())
        plain = path.stem.isascii() and path.stem.isalnum() and len(path.stem) < 150 and not is_device
        if plain and stems.count(path.stem.casefold()) == 1:
            assert label == path.stem


def test_the_terminal_is_given_back(tmp_path, capfd):
    Image.fromarray(GREY > 99).save(tmp_path / "a.tif", compression="group4")
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[10:30] = bytes(range(20))
    (tmp_path / "a.tif").write_bytes(data)
    with contextlib.suppress(ImageError):
        read(tmp_path / "a.tif")
    assert capfd.readouterr().err == ""
    os.write(2, b"heard again")
    assert capfd.readouterr().err == "heard again"
    assert sys.stderr is not None
