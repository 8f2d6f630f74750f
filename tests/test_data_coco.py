"""Layout coco: tiny files written on the spot, broken ones too, and masks against a slow point-in-polygon."""

import json
import pickle
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tsgb import images
from tsgb.data import Category, DataError, open_dataset
from tsgb.data.segmentation import union_mask

api = pytest.importorskip("pycocotools.mask", reason="needs pycocotools, of the extra bench")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SQUARE = [[1, 1, 3, 1, 3, 3, 1, 3]]


def image(key=1, name="a.png", width=4, height=4, **more):
    return {"id": key, "file_name": name, "width": width, "height": height, **more}


def annotation(box, image_id=1, category_id=0, **more):
    return {"image_id": image_id, "category_id": category_id, "bbox": box, **more}


def written(folder, annotations, images=None, categories=None, file="annotations.json", below="images"):
    images = [image()] if images is None else images
    categories = (
        [{"id": 0, "name": "cat"}, {"id": 7, "name": "dog", "wnid": "n1"}] if categories is None else categories
    )
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    record = {"images": images, "annotations": annotations, "categories": categories}
    (folder / file).write_text(json.dumps(record))
    for entry in images:
        if isinstance(entry, dict) and isinstance(entry.get("file_name"), str) and ".." not in entry["file_name"]:
            path = folder / below / entry["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), "red").save(path)
    return folder


def only(folder):
    (sample,) = open_dataset(folder).samples
    return sample


def test_a_small_file_comes_out_as_it_went_in(tmp_path):
    folder = written(
        tmp_path / "pets",
        [
            annotation([0, 0, 2, 3], category_id=7),
            annotation([1, 1, 2, 2], image_id="b", segmentation=SQUARE),
            annotation([2.5, 0, 1, 1], category_id=7),
        ],
        [image("b", "x/b.png"), image(1, "a.png"), image(3, "c.png")],
    )
    data = open_dataset(folder)
    assert (data.name, data.layout, data.problems) == ("pets", "coco", ())
    assert data.categories == {0: Category("cat"), 7: Category("dog", "n1")}
    assert [sample.name for sample in data.samples] == ["x/b.png", "a.png", "c.png"]  # the order of the file
    assert [sample.categories for sample in data.samples] == [(0,), (7,), ()]
    assert all(sample.size == (4, 4) for sample in data.samples)
    (cat,), (dog,), nothing = (sample.regions() for sample in data.samples)
    assert nothing == ()
    assert cat.boxes.tolist() == [[1, 1, 3, 3]]
    assert cat.boxes.dtype == np.float64
    # [1, 3] x [1, 3] in pixel edges: the four pixels 1 and 2 of the rows and columns 1 and 2.
    assert cat.mask.astype(int).tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert cat.mask.dtype == bool
    assert dog.boxes.tolist() == [[0, 0, 2, 3], [2.5, 0, 3.5, 1]]
    assert dog.mask is None
    assert data.samples[0].read().getpixel((0, 0)) == (255, 0, 0)


def test_regions_follow_the_categories_in_ascending_order(tmp_path):
    sample = only(written(tmp_path, [annotation([0, 0, 1, 1], category_id=c) for c in (7, 0, 7)]))
    assert sample.categories == (0, 7)
    assert [(region.category, len(region.boxes)) for region in sample.regions()] == [(0, 1), (7, 2)]


def test_a_sample_travels_to_another_process(tmp_path):
    sample = pickle.loads(pickle.dumps(only(written(tmp_path, [annotation([0, 0, 1, 1])]))))
    assert sample.read().size == (4, 4)
    assert len(sample.regions()) == 1


def test_boxes_are_clipped_and_what_lies_outside_is_named(tmp_path):
    folder = written(
        tmp_path,
        [annotation([-1, 2, 3, 9]), annotation([4, 0, 2, 2]), annotation([1, 1, 0, 2]), annotation([2, 2, -1, 1])],
    )
    data = open_dataset(folder)
    assert data.samples[0].regions()[0].boxes.tolist() == [[0, 2, 2, 4]]
    assert [problem.split(":")[1].strip() for problem in data.problems] == [f"annotations[{n}]" for n in (1, 2, 3)]


def test_crowds_are_left_out_of_boxes_masks_and_categories(tmp_path):
    folder = written(
        tmp_path,
        [
            annotation([1, 1, 2, 2], segmentation=SQUARE),
            annotation([0, 0, 4, 4], iscrowd=1, segmentation={"size": [4, 4], "counts": [0, 16]}),
            annotation([0, 0, 4, 4], iscrowd=1, category_id=7),
        ],
    )
    sample = only(folder)
    assert sample.categories == (0,)
    (cat,) = sample.regions()
    assert cat.boxes.tolist() == [[1, 1, 3, 3]]
    assert cat.mask.sum() == 4


def test_a_mask_is_the_union_and_needs_all_of_the_class(tmp_path):
    ring = {"size": [4, 4], "counts": [0, 1, 15]}
    parts = [annotation([1, 1, 2, 2], segmentation=SQUARE), annotation([0, 0, 1, 1], segmentation=ring)]
    (cat,) = only(written(tmp_path / "all", parts)).regions()
    assert cat.mask.astype(int).tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    for name, empty in (("none", {}), ("empty", {"segmentation": []}), ("null", {"segmentation": None})):
        (cat,) = only(written(tmp_path / name, [*parts, annotation([0, 0, 1, 1], **empty)])).regions()
        assert cat.mask is None
        assert len(cat.boxes) == 3


def test_run_lengths_go_down_the_columns_compressed_or_not():
    # Columns of height 2, zeros first: 1 zero, 2 ones, 3 zeros = (0 1) (1 0) (0 0) -> rows 010, 100.
    counts = [1, 2, 3]
    compressed = api.frPyObjects({"size": [2, 3], "counts": counts}, 2, 3)["counts"].decode()
    for form in (counts, compressed):
        mask = union_mask([{"size": [2, 3], "counts": form}], (3, 2))
        assert mask.astype(int).tolist() == [[0, 1, 0], [1, 0, 0]]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0.01, 0.9))
def test_compressed_run_lengths_are_those_of_the_mask(width, height, seed, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    text = api.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode()
    found = union_mask([{"size": [height, width], "counts": text}], (width, height))
    assert np.array_equal(found, mask) if mask.any() else found is None


def test_long_runs_take_several_letters():
    mask = np.zeros((900, 1100), dtype=bool)
    mask[100:850, 3:1000] = True
    text = api.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode()
    assert np.array_equal(union_mask([{"size": [900, 1100], "counts": text}], (1100, 900)), mask)


def point_in_polygon(x, y, corners):
    """Even-odd: how many edges a ray to the right crosses."""
    inside = False
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) / (y1 - y0) * (x1 - x0):
            inside = not inside
    return inside


def distance_to_border(x, y, corners):
    distances = []
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        length = (x1 - x0) ** 2 + (y1 - y0) ** 2
        t = min(1, max(0, ((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / length)) if length else 0
        distances.append(((x - x0 - t * (x1 - x0)) ** 2 + (y - y0 - t * (y1 - y0)) ** 2) ** 0.5)
    return min(distances)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 15), st.floats(0, 11)), min_size=3, max_size=6))
def test_polygons_cover_the_pixels_whose_centres_they_hold(corners):
    mask = union_mask([[[value for corner in corners for value in corner]]], (15, 11))
    mask = np.zeros((11, 15), dtype=bool) if mask is None else mask
    assert mask.shape == (11, 15)
    for row in range(11):
        for column in range(15):
            x, y = column + 0.5, row + 0.5
            if distance_to_border(x, y, corners) > 0.8:  # nearer, COCO's rounding decides
                assert mask[row, column] == point_in_polygon(x, y, corners)


@pytest.mark.parametrize(
    ("segmentation", "told"),
    [
        ([[1, 1, 3, 1]], "three pairs"),
        ([[1, 1, 3, 1, 3, 3, 1]], "three pairs"),
        ([[1, 1, 3, "1", 3, 3]], "three pairs"),
        ([[1, 1, 3, float("nan"), 3, 3]], "three pairs"),
        ([[1, 1, 3, 1, 3, 5000]], "far out"),
        ("polygon", "list of polygons"),
        ([1, 1, 3, 1, 3, 3], "list of polygons"),
        ({"size": [4, 4]}, "counts must be a list"),
        ({"counts": [16]}, "must be of size"),
        ({"size": [3, 4], "counts": [12]}, "must be of size"),
        ({"size": [4, 4], "counts": [8, 9]}, "sum to"),
        ({"size": [4, 4], "counts": [8, 7]}, "sum to"),
        ({"size": [4, 4], "counts": [20, -4]}, "integers from 0"),
        ({"size": [4, 4], "counts": [8, 8.0]}, "integers from 0"),
        ({"size": [4, 4], "counts": "0 "}, "is not a text"),
        ({"size": [4, 4], "counts": "0o"}, "cut off"),
        ({"size": [4, 4], "counts": "o" * 90}, "is not a text"),
        ({"size": [4, 4], "counts": "8888"}, "sum to"),
    ],
    ids=str,
)
def test_a_broken_segmentation_is_an_error_of_one_line_that_names_the_file(tmp_path, segmentation, told):
    sample = only(written(tmp_path, [annotation([1, 1, 2, 2], segmentation=segmentation)]))
    assert sample.categories == (0,)
    with pytest.raises(ValueError, match=told) as caught:
        sample.regions()
    assert str(caught.value).startswith(f"{tmp_path / 'annotations.json'}: 'a.png': ")
    assert "\n" not in str(caught.value)


def test_an_empty_mask_is_none(tmp_path):
    hair = [[1, 1, 1, 1, 1, 1]]
    (cat,) = only(written(tmp_path, [annotation([1, 1, 2, 2], segmentation=hair)])).regions()
    assert cat.mask is None


BROKEN = [
    (annotation([0, 0, 1, 1], image_id=9), "no image has the id 9"),
    (annotation([0, 0, 1, 1], image_id=[1]), "no image has the id [1]"),
    (annotation([0, 0, 1, 1], image_id=True), "no image has the id True"),
    (annotation([0, 0, 1, 1], category_id=3), "no category has the id 3"),
    (annotation([0, 0, 1, 1], category_id={}), "no category has the id {}"),
    (annotation([0, 0, 1, 1], category_id=False), "no category has the id False"),
    (annotation([0, 0, 1]), "four numbers"),
    (annotation([0, 0, 1, "1"]), "four numbers"),
    (annotation([0, 0, 1, None]), "four numbers"),
    (annotation([0, 0, 1, float("nan")]), "four numbers"),
    (annotation([0, 0, 1, float("inf")]), "four numbers"),
    (annotation([0, 0, 1, 10**300]), "four numbers"),
    (annotation(None), "four numbers"),
    ({"image_id": 1, "category_id": 0}, "has no 'bbox'"),
    ({"bbox": [0, 0, 1, 1]}, "has no 'image_id', 'category_id'"),
    (7, "must be an object"),
]


def test_broken_annotations_are_listed_and_the_rest_goes_on(tmp_path):
    data = open_dataset(written(tmp_path, [annotation([0, 0, 1, 1]), *(entry for entry, _ in BROKEN)]))
    assert len(data.samples[0].regions()[0].boxes) == 1
    assert len(data.problems) == len(BROKEN)
    for place, (problem, (_, told)) in enumerate(zip(data.problems, BROKEN, strict=True), start=1):
        assert problem.startswith(f"annotations.json: annotations[{place}]")
        assert told in problem
        assert "\n" not in problem


def test_broken_images_and_categories_are_listed_and_the_rest_goes_on(tmp_path):
    images = [
        image(),
        image(1, "twice.png"),
        image(2, "a.png"),
        image(3, "./a.png"),
        image(4, "../a.png"),
        image(5, "/a.png"),
        image(6, 7),
        {"id": 8},
        image([9], "list.png"),
        image(10, "big.png", width=10**6, height=10**6),
        image(11, "none.png", width=None),
        "a.png",
    ]
    categories = [{"id": 0, "name": "cat"}, {"id": 0, "name": "dog"}, {"id": "1", "name": "owl"}, {"id": 2}, None]
    data = open_dataset(written(tmp_path, [annotation([-1, 0, 9, 1], 11, segmentation=SQUARE)], images, categories))
    assert [sample.name for sample in data.samples] == ["a.png", "big.png", "none.png"]
    assert [sample.size for sample in data.samples] == [(4, 4), None, None]
    (region,) = data.samples[2].regions()
    assert region.boxes.tolist() == [[0, 0, 8, 1]]
    assert region.mask is None
    assert data.categories == {0: Category("cat")}
    where = [problem.split()[1].rstrip(":") for problem in data.problems]
    assert sorted(where) == sorted([f"categories[{n}]" for n in (1, 2, 3, 4)] + [f"images[{n}]" for n in range(1, 12)])


def test_lists_that_are_none_are_listed(tmp_path):
    (tmp_path / "annotations.json").write_text('{"images": [], "annotations": 3}')
    data = open_dataset(tmp_path)
    assert len(data.samples) == 0
    assert data.problems == ("annotations.json: 'annotations' must be a list, got 3",)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 1}', '{"images": 3}', "[" * 100_000, '"\ud800'])
def test_a_file_that_is_not_coco_is_an_error_of_one_line(tmp_path, text):
    file = tmp_path / "things.json"
    file.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(DataError) as caught:
        open_dataset(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "below"),
    [
        ("annotations.json", "images"),
        ("annotations.json", "."),
        ("things.json", "images"),
        ("marks/things.json", "images"),
        ("annotations/instances_val2017.json", "val2017"),
    ],
)
def test_images_are_found_where_they_usually_lie(tmp_path, file, below):
    written(tmp_path, [annotation([0, 0, 1, 1])], [image(1, "gone.png"), image(2)], file=file, below=below)
    (tmp_path / below / "gone.png").unlink()
    data = open_dataset(tmp_path if file == "annotations.json" else tmp_path / file)
    assert data.samples[1].read().size == (4, 4)
    with pytest.raises(images.ImageError, match=r"gone\.png: no such file"):
        data.samples[0].read()
    assert data.name == (tmp_path.name if file == "annotations.json" else file.rpartition("/")[2][:-5])


def test_boxes_need_no_pycocotools_and_masks_say_how_to_get_it(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("pycocotools")]:
        monkeypatch.setitem(sys.modules, name, None)
    assert len(only(written(tmp_path / "boxes", [annotation([0, 0, 1, 1])])).regions()) == 1
    sample = only(written(tmp_path / "masks", [annotation([0, 0, 1, 1], segmentation=SQUARE)]))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'tsgb\[bench\]'"):
        sample.regions()


@pytest.mark.parametrize(
    ("name", "images_in_all", "boxes", "pairs", "masks"),
    [("imagenet_val400", 400, 589, 400, 0), ("coco_voc", 78, 411, 126, 126)],
)
def test_the_shared_photographs_are_counted_as_they_are(shared, name, images_in_all, boxes, pairs, masks):
    data = open_dataset(shared / "data" / name)
    regions = [region for sample in data.samples for region in sample.regions()]
    assert (data.name, data.layout, data.problems) == (name, "coco", ())
    assert len(data.samples) == images_in_all
    assert sum(len(region.boxes) for region in regions) == boxes
    assert sum(len(sample.categories) for sample in data.samples) == len(regions) == pairs
    assert sum(region.mask is not None for region in regions) == masks
    assert data.samples[0].read().size == data.samples[0].size
