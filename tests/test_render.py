import math
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from tsgb import render
from tsgb.render import COLORMAPS, colours, full_scale, overlay, save, save_map, save_text, sheet, smooth


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(height, width)).astype(np.float32)


def sparse(height: int, width: int) -> np.ndarray:
    chance = np.random.default_rng(0)
    return np.where(chance.random((height, width)) < 0.01, chance.random((height, width)), 0).astype(np.float32)


def scene(width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8))


def literal_colour(value: float, colormap: str, scale: float) -> list[int]:
    """One value's colour, from the anchors, by hand."""
    value = 0 if math.isnan(value) else max(-1 if colormap == "bwr" else 0, min(1, value / scale))
    place = (value + 1) / 2 if colormap == "bwr" else value
    place = round(place * 254) / 254 * (len(COLORMAPS[colormap]) - 1)
    low = min(int(place), len(COLORMAPS[colormap]) - 2)
    first, second = (bytes.fromhex(colour) for colour in COLORMAPS[colormap][low : low + 2])
    return [a + (b - a) * (place - low) for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize("colormap", list(COLORMAPS))
def test_colours_are_the_literal_ones(colormap):
    values = noise(9, 13)
    values[0, :4] = [np.nan, np.inf, -np.inf, 0]
    got = colours(values, colormap, scale=1.7)
    assert got.dtype == np.uint8
    assert got.shape == (9, 13, 3)
    expected = [[literal_colour(float(value), colormap, 1.7) for value in row] for row in values]
    assert abs(got - np.array(expected)).max() <= 0.51


@pytest.mark.parametrize(
    ("colormap", "nothing", "most"),
    [
        ("jet", (0, 0, 127), (127, 0, 0)),
        ("viridis", (68, 1, 84), (253, 231, 37)),
        ("bwr", (255, 255, 255), (255, 0, 0)),
    ],
)
def test_ends_of_the_colormaps(colormap, nothing, most):
    got = colours([[0.0, np.nan, 1.0, 7.0]], colormap, scale=1)
    assert got.tolist() == [[list(nothing), list(nothing), list(most), list(most)]]
    assert (colours(np.zeros((2, 3)), colormap) == nothing).all()
    assert (colours(np.full((2, 3), np.nan), colormap) == nothing).all()
    if colormap == "bwr":
        assert colours([[-9.0]], "bwr", 1).tolist() == [[[0, 0, 255]]]
    else:
        assert (colours([[-1.0, -9.0]], colormap) == nothing).all()


def test_jet_and_viridis_are_the_known_ones():
    cm = pytest.importorskip("matplotlib.cm", reason="matplotlib holds the tables to compare with")
    ramp = np.linspace(0, 1, 101)
    for name, tolerance in (("jet", 36), ("viridis", 18)):  # what lies between the anchors
        known = cm.ScalarMappable(cmap=name).cmap(ramp)[:, :3] * 255
        assert abs(colours(ramp[None], name, 1)[0] - known).max() <= tolerance


def test_viridis_gets_brighter_all_the_way():
    brightness = colours(np.linspace(0, 1, 255)[None], "viridis", 1)[0] @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(brightness) > -0.8).all()
    assert brightness[-1] - brightness[0] > 180


def test_full_scale_is_the_percentile_of_what_is_positive():
    values = noise(50, 40)
    positive = sorted(float(value) for value in values.ravel() if value > 0)
    place = 0.99 * (len(positive) - 1)
    expected = positive[int(place)] + (place % 1) * (positive[int(place) + 1] - positive[int(place)])
    assert full_scale(values) == pytest.approx(expected, rel=1e-5)
    assert full_scale(values, "bwr") == pytest.approx(np.percentile(abs(values), 99))
    with_gaps = np.concatenate([values.ravel(), [np.nan, np.inf, -np.inf, 0, 0]])
    assert full_scale(with_gaps) == pytest.approx(full_scale(values))
    assert full_scale([[-1.0, 0.0, np.nan, np.inf]]) == 0
    assert full_scale([[-1.0, 0.0]], "bwr") == 1


def test_one_pixel_cannot_darken_the_map():
    values = np.abs(noise(60, 60))
    spiked = values.copy()
    spiked[3, 4] = 1e6
    assert abs(colours(values).astype(int) - colours(spiked))[5:].max() < 12


def literal_smooth(values: np.ndarray, sigma: float) -> np.ndarray:
    reach = math.ceil(3 * sigma)
    weights = {d: math.exp(-0.5 * (d / sigma) ** 2) for d in range(-reach, reach + 1)}
    total = sum(weights.values())
    result = np.zeros(values.shape)
    for y, x in np.argwhere(values):
        for dy in range(max(-reach, -y), min(reach, len(values) - 1 - y) + 1):
            for dx in range(max(-reach, -x), min(reach, values.shape[1] - 1 - x) + 1):
                result[y + dy, x + dx] += values[y, x] * weights[dy] * weights[dx] / total**2
    return result


@pytest.mark.parametrize(
    ("sigma", "tolerance"), [(0.4, 1e-6), (1, 1e-6), (3.7, 1e-6), (11.9, 1e-6), (12, 0.04), (19.3, 0.04)]
)
def test_smooth_is_the_literal_gaussian(sigma, tolerance):
    values = sparse(61, 94)
    got, expected = smooth(values, sigma), literal_smooth(values, sigma)
    assert got.dtype == np.float32
    assert got.shape == values.shape
    assert abs(got - expected).max() <= tolerance * expected.max()


@pytest.mark.parametrize("sigma", [5, 13, 24.5])
def test_smooth_keeps_mass_place_and_variance_of_a_dot(sigma):
    values = np.zeros((301, 260))
    values[150, 120] = 2
    got = smooth(values, sigma)
    y, x = np.mgrid[:301, :260]
    assert got.sum() == pytest.approx(2, rel=1e-3)
    assert (got * y).sum() / got.sum() == pytest.approx(150, abs=2)
    assert (got * x).sum() / got.sum() == pytest.approx(120, abs=2)
    centre = (got * x).sum() / got.sum()
    assert (got * (x - centre) ** 2).sum() / got.sum() == pytest.approx(sigma**2, rel=0.06)
    assert (got >= 0).all()
    assert (got[: 150 - int(3.5 * sigma)] == 0).all()  # not even rounding noise, which full_scale would count


def test_smooth_of_nothing_of_gaps_and_by_nothing():
    values = noise(9, 7)
    assert (smooth(values, 0) == values).all()
    assert (smooth(np.zeros((20, 30)), 4) == 0).all()
    gaps = values.copy()
    gaps[2, 2], gaps[3, 3], gaps[4, 4] = np.nan, np.inf, -np.inf
    filled = np.where(np.isfinite(gaps), gaps, 0)
    assert (smooth(gaps, 1) == smooth(filled, 1)).all()
    assert (smooth(np.ones((100, 500))) == smooth(np.ones((100, 500)), 3)).all()


def test_overlay_of_nothing_is_the_image_paler_and_darker():
    image = scene()
    for nothing in (np.zeros((40, 60)), np.full((40, 60), np.nan), np.full((40, 60), -1.0)):
        got = overlay(image, nothing)
        assert got.mode == "RGB"
        assert got.size == image.size
        pixels = np.asarray(image, float)
        grey = np.rint(pixels @ [0.299, 0.587, 0.114])[..., None]
        assert abs(np.asarray(got) - 0.85 * (0.4 * pixels + 0.6 * grey)).max() <= 2.5


@pytest.mark.parametrize("colormap", list(COLORMAPS))
@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_overlay_is_the_literal_mixture(colormap, alpha):
    image, values = scene(), noise(40, 60)
    below = np.asarray(overlay(image, np.zeros((40, 60))), float)
    got = np.asarray(overlay(image, values, colormap=colormap, alpha=alpha, scale=0.6, sigma=1.5))
    blurred = literal_smooth(values if colormap == "bwr" else np.maximum(values, 0), 1.5)
    for y, x in [(0, 0), (5, 7), (20, 31), (39, 59), (12, 40)]:
        colour = np.array(literal_colour(blurred[y, x], colormap, 0.6))
        opacity = alpha * math.sqrt(min(1, abs(blurred[y, x]) / 0.6))
        assert abs(got[y, x] - (opacity * colour + (1 - opacity) * below[y, x])).max() <= 3


def test_overlay_shows_evidence_where_it_is_and_nothing_outside_of_the_crop():
    image = Image.new("RGB", (300, 200), (120, 120, 120))
    values = np.full((200, 300), np.nan, np.float32)
    values[:, 50:250] = 0
    values[60:64, 50:60] = 1
    got = np.asarray(overlay(image, values)).astype(int)
    changed = abs(got - got[0, 0]).max(-1) > 2
    assert changed[60:64, 50:60].all()
    assert not changed[:, :50].any()
    assert not changed[80:].any()
    assert got[62, 52, 0] > got[62, 52, 2] + 60  # strong evidence is red


def test_a_lone_pixel_can_be_seen_on_a_photograph():
    values = np.zeros((600, 800))
    values[300, 400] = 1
    image = Image.new("RGB", (800, 600), "grey")
    got = np.asarray(overlay(image, values)).astype(int)
    assert (abs(got - got[0, 0]).max(-1) > 30).sum() > 100
    sharp = np.asarray(overlay(image, values, sigma=0)).astype(int)
    assert (abs(sharp - sharp[0, 0]).max(-1) > 30).sum() == 1


def test_a_shared_scale_keeps_a_weak_map_weak():
    image, values = Image.new("RGB", (60, 40), "grey"), np.abs(noise(40, 60))
    scale = full_scale(smooth(values))
    assert overlay(image, values, scale=scale) == overlay(image, values)
    below = np.asarray(overlay(image, np.zeros((40, 60)))).astype(int)
    strong = abs(np.asarray(overlay(image, values, scale=scale)) - below).mean()
    weak = abs(np.asarray(overlay(image, values / 50, scale=scale)) - below).mean()
    assert weak < strong / 4


def test_wrong_arguments_are_named():
    image, values = scene(), np.zeros((40, 60))
    for message, call in [
        (r"map must be of shape \(H, W\), got \(2, 3, 4\)", lambda: colours(np.zeros((2, 3, 4)))),
        (r"map must be of shape \(H, W\), got \(0, 4\)", lambda: smooth(np.zeros((0, 4)))),
        (r"colormap must be one of jet, viridis, bwr, got 'hot'", lambda: colours(values, "hot")),
        (r"scale must be a positive number, got 0", lambda: colours(values, scale=0)),
        (r"scale must be a positive number, got nan", lambda: colours(values, scale=math.nan)),
        (r"sigma must be 0 or more, got -1", lambda: smooth(values, -1)),
        (r"map must be of the image's shape \(40, 60\), got \(60, 40\)", lambda: overlay(image, values.T)),
        (r"image must be of mode RGB, got L", lambda: overlay(image.convert("L"), values)),
        (r"alpha must be from 0 to 1, got 1.5", lambda: overlay(image, values, alpha=1.5)),
        (
            r"overlay 'a' must be of the image's size \(60, 40\), got \(40, 60\)",
            lambda: sheet(image, [("a", scene(40, 60))]),
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


TILES = {
    (32, 32): (256, 256),
    (100, 60): (200, 120),
    (224, 224): (224, 224),
    (512, 300): (512, 300),
    (4000, 3000): (512, 384),
    (1, 2000): (1, 512),
    (2000, 1): (512, 1),
    (1, 1): (256, 256),
    (300, 513): (299, 512),
}


@pytest.mark.parametrize(("size", "tile"), TILES.items())
def test_sheet_fits_any_image(size, tile):
    image, other = Image.new("RGB", size, (255, 0, 0)), Image.new("RGB", size, (0, 0, 255))
    pixels = np.asarray(sheet(image, [("one", other), ("two", other)]))
    cell = max(256, tile[0])
    assert pixels.shape == (12 + tile[1] + 6 + 20 + 12, 12 + 3 * (cell + 12), 3)
    assert (pixels == (255, 0, 0)).all(-1).sum() == tile[0] * tile[1]
    assert (pixels == (0, 0, 255)).all(-1).sum() == 2 * tile[0] * tile[1]
    middle = 12 + (cell - tile[0]) // 2
    assert (pixels[12 : 12 + tile[1], middle : middle + tile[0]] == (255, 0, 0)).all()
    below = pixels[12 + tile[1] + 1 :]
    for column in range(3):
        assert below[:, 12 + column * (cell + 12) :][:, :cell].min() < 60  # black letters


def test_small_images_are_enlarged_pixel_by_pixel():
    image = scene(32, 20)
    pixels = np.asarray(sheet(image, []))
    assert (pixels[12 : 12 + 160, 12 : 12 + 256] == np.asarray(image).repeat(8, 0).repeat(8, 1)).all()


@pytest.mark.parametrize(("count", "across", "down"), [(0, 1, 1), (3, 4, 1), (4, 4, 2), (7, 4, 2), (8, 4, 3)])
def test_sheet_wraps_after_four(count, across, down):
    assert sheet(scene(), [("a", scene())] * count).size == (12 + across * 268, 12 + down * (160 + 6 + 20 + 12))


def drawn(monkeypatch) -> list[tuple[str, float, float]]:
    texts, text = [], ImageDraw.ImageDraw.text

    def listen(draw, place, line, fill, font, **options):
        left, _, right, _ = draw.textbbox(place, line, font, **options)
        texts.append((line, left, right))
        text(draw, place, line, fill, font, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", listen)
    return texts


def test_captions_are_shortened_and_may_have_lines(monkeypatch):
    texts = drawn(monkeypatch)
    captions = [
        "tabby\n0.93",
        "an Egyptian cat lying on the carpet of a rather long name",
        "M" * 5000,
        "",
        "a\tb  c",
        "i" * 5000,
    ]
    size = sheet(scene(32, 32), [(caption, scene(32, 32)) for caption in captions]).size
    lines = [line for line, _, _ in texts]
    assert lines[:3] == ["image", "tabby", "0.93"]
    assert lines[3].startswith("an Egyptian cat lying on the ")
    assert lines[4].startswith("MMMMMMMMMM")
    assert all(lines[index].endswith("…") for index in (3, 4, 7))
    assert lines[5:7] == ["", "a b c"]
    assert size[1] == 12 + 2 * (256 + 6 + 2 * 20 + 12)
    for index, (_, left, right) in enumerate(texts):
        cell = 12 + max(0, index - (index > 1)) % 4 * 268
        assert cell - 1 <= left <= right <= cell + 257


@given(st.text(max_size=80))
def test_any_caption_can_be_drawn(caption):
    assert sheet(Image.new("RGB", (8, 8)), [(caption, Image.new("RGB", (8, 8)))]).width == 12 + 2 * 268


def test_saved_files_hold_what_was_given(tmp_path):
    image, values = scene(), noise(5, 6).astype(np.float64)
    folder = tmp_path / "new" / "deeper"
    save(image, folder / "a.PNG")
    save(image, str(folder / "a.jpg"))
    save_map(values, folder / "a.npy")
    save_text("Bär\n\udcff", folder / "a.txt")
    with Image.open(folder / "a.PNG") as saved:
        assert saved.format == "PNG"
        assert (np.asarray(saved) == np.asarray(image)).all()
    with Image.open(folder / "a.jpg") as saved:
        assert saved.format == "JPEG"
    loaded = np.load(folder / "a.npy", allow_pickle=False)
    assert loaded.dtype == np.float32
    assert (loaded == values.astype(np.float32)).all()
    assert (folder / "a.txt").read_bytes() == "Bär\n\\udcff".encode()
    assert sorted(os.listdir(folder)) == ["a.PNG", "a.jpg", "a.npy", "a.txt"]
    save_text("other", folder / "a.txt")
    assert (folder / "a.txt").read_text() == "other"


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX's")
def test_saved_files_have_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    save_text("", tmp_path / "ours")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


WRITERS = [
    lambda path: save(scene(), path.with_suffix(".png")),
    lambda path: save_map(np.zeros((2, 2)), path.with_suffix(".png")),
    lambda path: save_text("new", path.with_suffix(".png")),
]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_stays_whole_when_writing_fails(tmp_path, monkeypatch, writer):
    (tmp_path / "a.png").write_text("old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=r"cannot write .*a\.png: No space left on device"):
        writer(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a.png"]
    assert (tmp_path / "a.png").read_text() == "old"


def test_nothing_is_left_of_an_image_that_fails_half_way(tmp_path, monkeypatch):
    def half(image, file, format):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(KeyboardInterrupt):
        save(scene(), tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("writer", WRITERS)
def test_the_folder_is_a_file(tmp_path, writer):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a", tmp_path / "file" / "deeper" / "a"):
        with pytest.raises(NotADirectoryError, match=r"cannot write .*a\.png: .* is not a folder"):
            writer(path)


@pytest.mark.parametrize("writer", WRITERS)
def test_the_folder_is_not_writable_or_the_file_a_folder(tmp_path, monkeypatch, writer):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError, match=r"cannot write .*a\.png: "):
        writer(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a.png"]

    def refuse(*args, **kwargs):  # permission bits would not stop the superuser, who may be running the tests
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError, match=r"cannot write .*b\.png: Permission denied"):
        writer(tmp_path / "b")


def test_an_extension_of_no_image_format_is_refused(tmp_path):
    for name in ("a", "a.txt", "a.npy"):
        with pytest.raises(ValueError, match=r"cannot write .*: '.*' is not the extension of an image format"):
            save(scene(), tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_maps_are_left_as_they_were():
    values = noise(40, 60)
    before = values.copy()
    render.overlay(scene(), values, sigma=0)
    render.colours(values)
    assert (values == before).all()
