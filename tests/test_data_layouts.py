"""The layouts voc, imagenet, labels, folders and scenes, on tiny data sets written on the spot; and which is which."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from tsgb import images, networks, scenes
from tsgb.bench.samples import prepare_sample
from tsgb.data import Category, DataError, open_dataset
from tsgb.data.files import inside, read_xml
from tsgb.models import Network
from tsgb.preprocessing import Preprocessing

BOMB = '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><annotation>&c;</annotation>'


def image(path, size=(6, 5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "blue").save(path)


def item(name, *box, difficult=None, edges=("xmin", "ymin", "xmax", "ymax")):
    marks = "".join(f"<{edge}>{value}</{edge}>" for edge, value in zip(edges, box, strict=False))
    hard = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    return f"<object>{part}<name>{name}</name>{hard}<bndbox>{marks}</bndbox></object>"


def xml(path, *items, size="<size><width>6</width><height>5</height></size>"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation>{size}{''.join(items)}</annotation>")


def problem_of(call):
    with pytest.raises(ValueError, match=r".") as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def voc(tmp_path):
    """Three images, the third one without annotation."""
    root = tmp_path / "VOC2012"
    for name in "abc":
        image(root / "JPEGImages" / f"{name}.jpg")
    xml(root / "Annotations" / "a.xml", item("dog", 1, 1, 6, 5), item("bird", 2, 3, 4, 4), item("dog", 3, 3, 3, 3))
    xml(root / "Annotations" / "b.xml", item("cat", 1, 1, 2, 2, difficult=1), item("sofa", 1, 1, 2, 2, difficult=0))
    return root


def test_voc_boxes_are_pixels_from_1_with_both_ends(voc):
    data = open_dataset(voc)
    assert (data.name, data.layout, data.problems) == ("VOC2012", "voc", ())
    assert len(data.categories) == 20
    assert (data.categories[1], data.categories[20]) == (Category("aeroplane"), Category("tvmonitor"))
    assert [sample.name for sample in data.samples] == ["a.jpg", "b.jpg", "c.jpg"]
    assert [sample.categories for sample in data.samples] == [(3, 12), (18,), ()]
    assert [sample.size for sample in data.samples] == [(6, 5), (6, 5), None]
    bird, dog = data.samples[0].regions()
    # Pixels 2..4 of the columns and 3..4 of the rows, the first being 1: edges 1..4 and 2..4.
    assert bird.boxes.tolist() == [[1, 2, 4, 4]]
    assert dog.boxes.tolist() == [[0, 0, 6, 5], [2, 2, 3, 3]]
    assert dog.boxes.dtype == np.float64
    assert (bird.category, dog.category, bird.mask, dog.mask) == (3, 12, None, None)
    assert data.samples[2].regions() == ()
    assert data.samples[0].read().size == (6, 5)


def test_voc_leaves_difficult_objects_out(voc):
    (sofa,) = open_dataset(voc).samples[1].regions()
    assert sofa.category == 18


def paint(voc, name, numbers, mode="P"):
    image = Image.fromarray(np.array(numbers, dtype=np.uint8))
    (voc / "SegmentationClass").mkdir(exist_ok=True)
    if mode == "P":
        image.putpalette(range(256))  # as VOC's, where a number is an entry of a palette
    image.convert(mode).save(voc / "SegmentationClass" / f"{name}.png")


def test_voc_masks_are_the_pixels_of_the_class_without_the_void(voc):
    numbers = np.zeros((5, 6))
    numbers[1, 2:5], numbers[2, 2], numbers[3:, 3] = 3, 255, 15
    paint(voc, "a", numbers)
    bird, dog = open_dataset(voc).samples[0].regions()
    assert bird.mask.dtype == bool
    assert np.argwhere(bird.mask).tolist() == [[1, 2], [1, 3], [1, 4]]
    assert dog.mask is None  # its class is not painted


@pytest.mark.parametrize(
    ("shape", "mode", "told"), [((4, 6), "P", "size"), ((5, 6), "RGB", "mode RGB")], ids=["size", "mode"]
)
def test_voc_masks_that_do_not_fit_are_refused(voc, shape, mode, told):
    paint(voc, "a", np.zeros(shape), mode)
    told_there = problem_of(open_dataset(voc).samples[0].regions)
    assert told_there.startswith(str(voc / "SegmentationClass" / "a.png"))
    assert told in told_there


def test_voc_masks_that_are_broken_are_refused(voc):
    (voc / "SegmentationClass").mkdir()
    (voc / "SegmentationClass" / "a.png").write_bytes(b"no image")
    assert problem_of(open_dataset(voc).samples[0].regions).startswith(str(voc / "SegmentationClass" / "a.png"))


def test_voc_takes_the_first_list_of_val_test_trainval_and_train(voc):
    lists = voc / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for name, text in [("train", "a"), ("trainval", "b\n\na\n"), ("test", "c"), ("val", "c  1\nb -1\nc\nd\n")]:
        (lists / f"{name}.txt").write_text(text)
        data = open_dataset(voc)
        assert [s.name for s in data.samples] == {
            "train": ["a.jpg"],
            "trainval": ["b.jpg", "a.jpg"],
            "test": ["c.jpg"],
            "val": ["c.jpg", "b.jpg"],
        }[name]
    assert data.problems == ("JPEGImages: no image for 'd'",)


def test_voc_with_a_list_that_is_no_text_is_an_error(voc):
    (voc / "ImageSets" / "Main").mkdir(parents=True)
    (voc / "ImageSets" / "Main" / "val.txt").write_bytes(b"\xff\xfe\x00a")
    assert problem_of(lambda: open_dataset(voc)).startswith(str(voc / "ImageSets" / "Main" / "val.txt"))


def test_voc_lists_what_is_broken_and_goes_on(voc):
    xml(
        voc / "Annotations" / "a.xml",
        item("dog", 1, 1, "6.0", 5),
        item("", 1, 1, 2, 2),
        item("dog", 1, 1, 2),
        item("dog", 1, 1, 2, "two"),
        item("dog", 1, 1, 2, "nan"),
        item("dog", 1, 1, "inf", 2),
        item("dog", 7, 1, 9, 2),
        "<object><name>dog</name></object>",
        "<object/>",
    )
    xml(voc / "Annotations" / "gone.xml", item("dog", 1, 1, 2, 2))
    data = open_dataset(voc)
    assert data.samples[0].regions()[0].boxes.tolist() == [[0, 0, 6, 5]]
    assert [problem.split(":")[0] for problem in data.problems] == ["a.xml"] * 8 + ["JPEGImages"]
    assert "unknown class ''" in data.problems[0]
    assert all("expected a bndbox with the numbers" in data.problems[place] for place in (1, 2, 3, 4, 6))
    assert "nothing of the box" in data.problems[5]
    assert "no image for 'gone'" in data.problems[-1]


@pytest.mark.parametrize("size", ["", "<size/>", "<size><width>x</width><height>5</height></size>"])
def test_voc_without_a_size_has_boxes_all_the_same(voc, size):
    xml(voc / "Annotations" / "a.xml", item("dog", 0, 1, 60, 5), size=size)
    sample = open_dataset(voc).samples[0]
    assert sample.size is None
    assert sample.regions()[0].boxes.tolist() == [[0, 0, 60, 5]]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no element found"),
        (b"<annotation>", "no element found"),
        (BOMB.encode(), "document type"),
        (f'<?xml version="1.0" encoding="utf-16"?>{BOMB}'.encode("utf-16"), "document type"),
        (b'<?xml version="1.0" encoding="klingon"?><annotation/>', "klingon"),
        (b"<annotation>" + b" " * 2_000_000 + b"</annotation>", "larger than"),
    ],
    ids=["empty", "cut", "bomb", "bomb in utf-16", "encoding", "large"],
)
def test_voc_xml_that_is_broken_or_dangerous_is_named_and_has_no_regions(voc, data, why):
    (voc / "Annotations" / "a.xml").write_bytes(data)
    opened = open_dataset(voc)
    assert opened.samples[0].categories == ()
    told = problem_of(opened.samples[0].regions)
    assert told.startswith(str(voc / "Annotations" / "a.xml"))
    assert why in told
    assert opened.problems == ()  # told by the image, once
    assert opened.samples[1].categories == (18,)


def test_voc_xml_that_is_broken_and_belongs_to_no_sample_is_listed(voc):
    xml(voc / "Annotations" / "a.xml", item("dog", 1, 1, 2, 2))
    (voc / "Annotations" / "b.xml").write_text("no XML")
    (voc / "Annotations" / "gone.xml").write_text(BOMB)
    (voc / "Annotations" / "._a.xml").write_bytes(b"a Mac's")
    (voc / "Annotations" / "notes.txt").write_bytes(b"no annotation")
    missing, bomb = open_dataset(voc).problems
    assert missing == "JPEGImages: no image for 'gone'"
    assert bomb.startswith(str(voc / "Annotations" / "gone.xml"))
    lists = voc / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("a")
    unlisted, bomb_again = open_dataset(voc).problems
    assert unlisted.startswith(str(voc / "Annotations" / "b.xml"))
    assert bomb_again == bomb


def test_voc_of_own_names_numbers_them_from_0_as_text_and_has_no_masks(voc):
    xml(voc / "Annotations" / "a.xml", item(" red\n flower ", 1, 1, 6, 5), item("dog", 2, 3, 4, 4))
    xml(voc / "Annotations" / "b.xml", item("9", 1, 1, 2, 2, difficult=1), item("10", 1, 1, 2, 2), item("", 1, 1, 2, 2))
    (voc / "ImageSets" / "Main").mkdir(parents=True)
    (voc / "ImageSets" / "Main" / "val.txt").write_text("b\na")
    xml(voc / "Annotations" / "unlisted.xml", item("Ant", 1, 1, 2, 2))
    paint(voc, "a", np.full((5, 6), 4))
    data = open_dataset(voc)
    assert {index: category.name for index, category in data.categories.items()} == {
        0: "10",
        1: "9",
        2: "Ant",
        3: "dog",
        4: "red flower",
    }
    assert [sample.categories for sample in data.samples] == [(0,), (3, 4)]
    dog, flower = data.samples[1].regions()
    assert (dog.boxes.tolist(), dog.mask) == ([[1, 2, 4, 4]], None)
    assert (flower.boxes.tolist(), flower.mask) == ([[0, 0, 6, 5]], None)
    assert data.problems == ("b.xml: object[2]: unknown class ''",)


def test_voc_of_one_name_that_it_has_keeps_its_numbers(voc):
    (voc / "Annotations" / "b.xml").unlink()
    xml(voc / "Annotations" / "a.xml", item("tvmonitor", 1, 1, 6, 5))
    data = open_dataset(voc)
    assert [sample.categories for sample in data.samples] == [(20,), (), ()]
    assert len(data.categories) == 20


def test_voc_reads_each_annotation_once(voc, monkeypatch):
    read = []
    monkeypatch.setattr("tsgb.data.objects.read_xml", lambda file: read.append(file.name) or read_xml(file))
    for sample in open_dataset(voc).samples:
        sample.regions()
    assert read == ["a.xml", "b.xml"]


@pytest.mark.parametrize(
    ("items", "why"),
    [
        ([item("dog", 1, 1, 2, 2, difficult=1)] * 2, "2 marked as difficult"),
        ([item("", 1, 1, 2, 2)], "object[0]: unknown class ''"),
        (
            [item("dog", 1, 1, 2, 2, difficult=1), item("dog", 9, 9, 9, 9), item("dog"), item("dog")],
            "1 marked as difficult, object[1]: nothing of the box [8.0, 8.0, 9.0, 9.0] lies in the image, "
            "2 more faults",
        ),
    ],
    ids=["difficult", "unknown", "both"],
)
def test_voc_images_of_which_no_object_is_left_say_why(voc, items, why):
    xml(voc / "Annotations" / "a.xml", *items)
    data = open_dataset(voc)
    assert (data.samples[0].categories, data.problems) == ((), ())
    assert problem_of(data.samples[0].regions) == f"{voc / 'Annotations' / 'a.xml'}: no object can be used: {why}"


def test_the_bench_tells_what_is_broken_in_an_image_once_and_no_annotation_only_where_none_is(voc):
    (voc / "Annotations" / "a.xml").write_text("no XML")
    xml(voc / "Annotations" / "b.xml", item("dog", 1, 1, 2, 2, difficult=1))
    image(voc / "JPEGImages" / "d.jpg")
    xml(voc / "Annotations" / "d.xml")
    data, preprocessing = open_dataset(voc), Preprocessing(size=(4, 4))
    network = Network(torch.nn.Identity(), preprocessing, None, "spec", "weights", "0")
    told = list(data.problems)
    for index, sample in enumerate(data.samples):
        shown = sample.read()
        found = prepare_sample(sample, index, shown, preprocessing.tensor(shown), torch.zeros(3), data, network)
        assert found.cases == ()
        told.extend(found.problems)
    broken, difficult, *bare = told
    assert broken.startswith(f"{voc / 'Annotations' / 'a.xml'}: not an XML annotation")
    assert difficult == f"{voc / 'Annotations' / 'b.xml'}: no object can be used: 1 marked as difficult"
    assert bare == ["c.jpg: no annotation", "d.jpg: no annotation"]


@pytest.fixture(params=["ilsvrc", "beside", "subfolders"])
def imagenet(request, tmp_path):
    """Images 1 and 2 are annotated, 3 is not; the folders of ILSVRC, or all in one, or in one for each class."""
    roots = {
        "ilsvrc": (tmp_path / "Annotations" / "CLS-LOC" / "val", tmp_path / "Data" / "CLS-LOC" / "val"),
        "beside": (tmp_path, tmp_path),
        "subfolders": (tmp_path / "n01", tmp_path / "n01"),
    }
    annotations, data = roots[request.param]
    for name in "123":
        image(data / f"{name}.JPEG")
    if request.param == "ilsvrc":
        image(tmp_path / "Data" / "CLS-LOC" / "train" / "n01" / "4.JPEG")
        xml(tmp_path / "Annotations" / "CLS-LOC" / "train" / "4.xml", item("n01440764", 0, 0, 2, 2))
    xml(annotations / "1.xml", item("n01443537", 2, 1, 6, 9), item("n01440764", 0, 0, 2, 2))
    xml(annotations / "2.xml", item("n15075141", 1, 1, 2, 2), item("n00000001", 1, 1, 2, 2))
    return tmp_path


def test_imagenet_classes_are_numbered_by_wnid_and_edges_are_as_they_stand(imagenet):
    data = open_dataset(imagenet)
    prefix = "n01/" if (imagenet / "n01").is_dir() else ""
    assert (data.name, data.layout) == (imagenet.name, "imagenet")
    assert [sample.name for sample in data.samples] == [f"{prefix}{name}.JPEG" for name in "123"]
    assert [sample.categories for sample in data.samples] == [(0, 1), (999,), ()]
    assert data.categories[999] == Category("n15075141", "n15075141")
    assert len(data.categories) == 1000
    tench, goldfish = data.samples[0].regions()
    assert tench.boxes.tolist() == [[0, 0, 2, 2]]
    assert goldfish.boxes.tolist() == [[2, 1, 6, 5]]
    assert goldfish.mask is None
    assert data.samples[0].size == data.samples[0].read().size == (6, 5)
    (problem,) = data.problems
    assert problem == "2.xml: object[1]: unknown class 'n00000001'"


def test_imagenet_lists_what_has_no_partner_or_is_broken(tmp_path):
    for name in ("a/1.jpg", "b/1.jpg", "b/2.jpg", ".3.jpg"):
        image(tmp_path / name)
    xml(tmp_path / "Annotations" / "1.xml", item("n01440764", 0, 0, 2, 2))
    xml(tmp_path / "Annotations" / "3.xml", item("n01440764", 0, 0, 2, 2))
    (tmp_path / "Annotations" / "2.xml").write_text(BOMB)
    data = open_dataset(tmp_path)
    assert [(sample.name, sample.categories) for sample in data.samples] == [("a/1.jpg", (0,)), ("b/2.jpg", ())]
    assert "document type" in problem_of(data.samples[1].regions)
    assert sorted(problem.split(": ")[-1] for problem in data.problems) == [
        "another file has this stem already",
        "no image for it",
    ]


def test_xml_files_without_a_class_of_imagenet_are_no_data_set(tmp_path):
    image(tmp_path / "1.jpg")
    xml(tmp_path / "1.xml", item("dog", 0, 0, 2, 2))
    told = problem_of(lambda: open_dataset(tmp_path))
    assert "no XML file names a class of ImageNet" in told
    assert "1.xml: no object can be used: object[0]: unknown class 'dog'" in told


def test_labels_give_each_image_its_class(tmp_path):
    image(tmp_path / "images" / "b.png")
    image(tmp_path / "images" / "x" / "a.png")
    (tmp_path / "labels.json").write_text(json.dumps({"b.png": 7, "./x/a.png": 3, "gone.png": 7}))
    data = open_dataset(tmp_path)
    assert (data.name, data.layout, data.problems) == (tmp_path.name, "labels", ())
    assert [(sample.name, sample.categories) for sample in data.samples] == [
        ("b.png", (7,)),
        ("x/a.png", (3,)),
        ("gone.png", (7,)),
    ]
    assert data.categories == {3: Category("3"), 7: Category("7")}
    (region,) = data.samples[1].regions()
    assert (region.category, region.boxes.shape, region.mask) == (3, (0, 4), None)
    assert data.samples[1].read().size == (6, 5)
    with pytest.raises(images.ImageError, match=r"gone\.png: no such file"):
        data.samples[2].read()


def test_labels_that_are_broken_are_listed(tmp_path):
    image(tmp_path / "a.png")
    broken = {"../a.png": 0, "./a.png": 1, "b": -1, "c": "1", "d": 1.0, "e": True, "f": None, "": 3}
    (tmp_path / "labels.json").write_text(json.dumps({"a.png": 0, **broken}))
    data = open_dataset(tmp_path)
    assert [sample.name for sample in data.samples] == ["a.png"]
    assert data.samples[0].read().size == (6, 5)  # without images/, beside the file
    assert [problem.split("'")[1] for problem in data.problems] == list(broken)


def test_folders_are_classes_by_name(tmp_path):
    for name in ("zebra/2.png", "zebra/1.JPG", "ant/1.png", "ant/.2.png", "ant/deep/3.png", ".cache/1.png"):
        image(tmp_path / name)
    (tmp_path / "moth").mkdir()
    (tmp_path / "zebra" / "notes.txt").write_text("no image")
    data = open_dataset(tmp_path)
    assert (data.name, data.layout) == (tmp_path.name, "folders")
    assert data.categories == {0: Category("ant"), 1: Category("moth"), 2: Category("zebra")}
    assert [(sample.name, sample.categories) for sample in data.samples] == [
        ("ant/1.png", (0,)),
        ("zebra/1.JPG", (2,)),
        ("zebra/2.png", (2,)),
    ]
    assert data.problems == (f"{tmp_path / 'moth'}: holds no image files",)
    assert data.samples[2].regions()[0].boxes.shape == (0, 4)
    assert data.samples[2].read().size == (6, 5)


def test_folders_are_sorted_as_text(tmp_path):
    for name in ("2", "10", "b", "B"):
        image(tmp_path / name / "1.png")
    categories = open_dataset(tmp_path).categories
    assert [categories[index].name for index in range(4)] == ["10", "2", "B", "b"]


def test_folders_of_wnids_have_the_numbers_of_imagenet(tmp_path):
    for name in ("n15075141", "n01443537"):
        image(tmp_path / name / "1.png")
    data = open_dataset(tmp_path)
    assert data.categories == {1: Category("n01443537", "n01443537"), 999: Category("n15075141", "n15075141")}
    assert [sample.categories for sample in data.samples] == [(1,), (999,)]
    image(tmp_path / "other" / "1.png")
    assert [sample.categories for sample in open_dataset(tmp_path).samples] == [(0,), (1,), (2,)]


def test_the_bundled_scenes_are_those_of_render():
    data = open_dataset()
    assert (data.name, data.layout, len(data.samples), data.problems) == ("scenes", "scenes", 1000, ())
    assert [category.name for category in data.categories.values()] == list(scenes.CLASSES)
    for index in (0, 1, 998, 999):
        scene, sample = scenes.render(2_000_000_000 + index, count=1 + index % 2, size=128), data.samples[index]
        assert sample.name == f"scene-{index:06}"
        assert sample.categories == tuple(sorted(scene.classes))
        assert sample.size == (128, 128)
        assert np.array_equal(np.asarray(sample.read()), scene.image)
        regions = sample.regions()
        assert tuple(region.category for region in regions) == sample.categories
        for region in regions:
            place = scene.classes.index(region.category)
            assert np.array_equal(region.mask, scene.masks[place])
            assert region.boxes.tolist() == [scene.boxes[place].tolist()]
            assert region.boxes.dtype == np.float64


def test_the_bundled_scenes_are_a_sequence_and_travel():
    samples = open_dataset().samples
    assert [sample.name for sample in samples[10:14:2]] == ["scene-000010", "scene-000012"]
    assert samples[-1].name == "scene-000999"
    with pytest.raises(IndexError):
        samples[1000]
    again = pickle.loads(pickle.dumps(samples[3]))
    assert np.array_equal(np.asarray(again.read()), np.asarray(samples[3].read()))


def test_no_bundled_scene_was_seen_in_training():
    used = range(2_000_000_000, 2_000_001_000)
    assert networks.TRAINING_SEEDS.stop <= used.start


def test_changing_a_mask_leaves_the_next_one_whole():
    sample = open_dataset().samples[0]
    sample.regions()[0].mask[:] = False
    assert sample.regions()[0].mask.any()


def test_annotations_come_before_labels_and_labels_before_folders(tmp_path):
    image(tmp_path / "images" / "a.png")
    assert open_dataset(tmp_path).layout == "folders"
    (tmp_path / "labels.json").write_text('{"a.png": 1}')
    assert open_dataset(str(tmp_path)).layout == "labels"
    (tmp_path / "annotations.json").write_text('{"images": []}')
    assert open_dataset(tmp_path).layout == "coco"


def test_where_nothing_known_is_the_layouts_are_named(tmp_path):
    flat = tmp_path / "flat"
    image(flat / "a.png")
    bare = tmp_path / "bare"
    (bare / "below").mkdir(parents=True)
    for path in (flat, bare, flat / "a.png"):
        told = problem_of(lambda path=path: open_dataset(path))
        assert told.startswith(f"{path}: ")
        for known in ("annotations.json", "labels.json", "JPEGImages", "wnid", "subfolder"):
            assert known in told
    with pytest.raises(DataError, match="no such file or folder"):
        open_dataset(tmp_path / "gone")
    with pytest.raises(TypeError):
        open_dataset(3)


@pytest.mark.parametrize(
    "name", ["../a", "a/../../b", "/a", "C:\\a", "\\\\host\\a", "..\\a", "a\0b", "", ".", None, 3, ["a"]], ids=repr
)
def test_names_that_lead_out_of_the_folder_are_refused(name):
    assert inside(name) is None


def test_the_shared_single_images_are_counted_as_they_are(shared):
    data = open_dataset(shared / "data" / "imagenet_single400")
    assert (data.layout, len(data.samples), data.problems) == ("labels", 400, ())
    assert len({sample.categories for sample in data.samples}) == 400
    assert data.samples[0].read().mode == "RGB"
