"""Which classes of a model a data set's category stands for: each rule, their order, and ImageNet's own names."""

import json

import pytest

import tsgb
from tsgb.categories import classes_of
from tsgb.data import Category, open_dataset
from tsgb.data.voc import VOC_CLASSES
from tsgb.data.wnids import imagenet_wnids

UNNAMED = [f"class {index}" for index in range(1000)]
PLAIN = ["tench", *UNNAMED[1:]]  # taken for ImageNet's model by its first name


@pytest.fixture(scope="module")
def groups():
    return {name: classes_of(Category(name), index, None, 1000) for name, index in VOC_CLASSES.items()}


def test_groups_of_voc_are_distinct_classes_and_none_a_person(groups):
    numbers = [number for group in groups.values() for number in group]
    assert len(numbers) == len(set(numbers))
    assert all(0 <= number < 1000 for number in numbers)
    assert groups.pop("person") == ()
    assert all(group == tuple(sorted(group)) != () for group in groups.values())


def test_groups_of_voc_are_the_protocols_where_it_names_them(groups):
    assert groups["dog"] == tuple(range(151, 269))
    assert groups["cat"] == tuple(range(281, 286))
    assert groups["bird"] == (*range(7, 25), *range(80, 101), *range(127, 147))
    assert groups["aeroplane"] == (404, 895)


NAMED = {  # what each group must hold by its names; birds and dogs have names of their own
    "aeroplane": "airliner warplane",
    "bicycle": "bicycle-built-for-two mountain_bike",
    "boat": "aircraft_carrier canoe catamaran container_ship fireboat gondola lifeboat liner pirate schooner speedboat "
    "trimaran yawl",
    "bottle": "beer_bottle pill_bottle pop_bottle water_bottle wine_bottle",
    "bus": "minibus school_bus trolleybus",
    "car": "ambulance beach_wagon cab convertible jeep limousine minivan Model_T pickup racer sports_car",
    "cat": "tabby tiger_cat Persian_cat Siamese_cat Egyptian_cat",
    "chair": "barber_chair folding_chair rocking_chair throne",
    "cow": "ox",
    "diningtable": "dining_table",
    "horse": "sorrel",
    "motorbike": "moped motor_scooter",
    "pottedplant": "pot",
    "sheep": "ram bighorn",
    "sofa": "studio_couch",
    "train": "bullet_train electric_locomotive freight_car passenger_car steam_locomotive",
    "tvmonitor": "monitor screen television",
}


def test_groups_of_voc_by_name(shared, groups):
    index = json.loads((shared / "data" / "imagenet_class_index.json").read_text())
    for name, members in NAMED.items():
        assert [index[str(number)][1] for number in groups[name]] == members.split(), name


def test_wnids_are_those_of_the_class_index(shared):
    index = json.loads((shared / "data" / "imagenet_class_index.json").read_text())
    assert imagenet_wnids() == {wnid: int(number) for number, (wnid, _) in index.items()}


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ("motorcycle", "motorbike"),
        ("airplane", "aeroplane"),
        ("couch", "sofa"),
        ("potted plant", "pottedplant"),
        ("tv", "tvmonitor"),
        ("dining_table", "diningtable"),
        ("Dining-Table", "diningtable"),
    ],
)
def test_cocos_spelling_means_the_same(groups, other, name):
    assert classes_of(Category(other), 62, PLAIN, 1000) == groups[name]
    assert classes_of(Category(other), 5, ["person", name], 2) == (1,)
    assert classes_of(Category(name), 5, ["person", other], 2) == (1,)


def test_a_group_is_for_imagenets_model_and_for_categories_without_wnid():
    assert classes_of(Category("horse"), 13, None, 1000) == (339,)
    assert classes_of(Category("horse"), 13, PLAIN, 1000) == (339,)
    assert classes_of(Category("horse"), 13, UNNAMED, 1000) == ()
    assert classes_of(Category("horse"), 13, None, 999) == (13,)
    assert classes_of(Category("person"), 15, None, 1000) == ()
    assert classes_of(Category("dog", "n01440764"), 15, None, 1000) == (0,)


def test_names_are_compared_without_spelling():
    for name in ("jack o'lantern", "Jack-O_Lantern", "JACKO’LANTERN", "a thing, jack-o'-lantern"):
        assert classes_of(Category("jack-o'-lantern"), 1, ["x", name], 2) == (1,)
        assert classes_of(Category("jack-o'-lantern"), 0, ["x", name], 2) == (1,)
    assert classes_of(Category("jack"), 1, ["x", "jack o'lantern"], 2) == ()


def test_the_own_index_goes_before_others_of_that_name():
    names = ["crane", "owl", "crane"]
    assert classes_of(Category("crane"), 2, names, 3) == (2,)
    assert classes_of(Category("crane"), 0, names, 3) == (0,)
    assert classes_of(Category("crane"), 1, names, 3) == (0, 2)
    assert classes_of(Category("crane"), 90, names, 3) == (0, 2)
    assert classes_of(Category("crane"), -1, names, 3) == (0, 2)
    assert classes_of(Category("heron"), 1, names, 3) == ()


def test_a_wnid_goes_before_other_indices_of_the_name():
    names = [*PLAIN[:999], "crane"]
    assert classes_of(Category("crane", "n02012849"), 3, names, 1000) == (134,)
    assert classes_of(Category("crane", "n02012849"), 999, names, 1000) == (999,)
    assert classes_of(Category("crane", "n00000000"), 3, names, 1000) == (999,)
    assert classes_of(Category("crane", "n02012849"), 3, ["crane"], 1) == (0,)
    assert classes_of(Category("crane", "n02012849"), 3, None, 1000) == (134,)
    assert classes_of(Category("crane", "n02012849"), 3, [*UNNAMED[:999], "crane"], 1000) == (999,)


def test_an_unnamed_model_is_taken_by_index():
    assert classes_of(Category("gear"), 3, None, 4) == (3,)
    assert classes_of(Category("gear"), 4, None, 4) == ()
    assert classes_of(Category("gear"), -1, None, 4) == ()


def test_an_unnamed_category_is_taken_by_index():
    assert classes_of(Category("3"), 3, PLAIN, 1000) == (3,)
    assert classes_of(Category("3"), 3, ["a", "b"], 2) == ()
    assert classes_of(Category("4"), 3, ["a", "b", "c", "d"], 4) == ()


def test_cocos_kite_is_no_bird():
    names = [*PLAIN[:21], "kite", *PLAIN[22:]]
    assert classes_of(Category("kite"), 38, names, 1000) == ()
    assert classes_of(Category("kite"), 21, names, 1000) == (21,)
    assert classes_of(Category("kite"), 38, ["kite"], 1) == (0,)


def test_names_must_be_as_many_as_the_logits():
    with pytest.raises(ValueError, match="names must be of the model's 3 classes, got 1"):
        classes_of(Category("cat"), 0, ["cat"], 3)


def test_the_bundled_scenes_are_of_the_bundled_networks_classes():
    names = tsgb.load("bundled").names
    for index, category in open_dataset().categories.items():
        assert classes_of(category, index, names, len(names)) == (index,)


def test_each_category_of_imagenet_is_its_own_class_of_torchvisions(shared):
    weights = shared / "weights" / "mobilenet_v2_qat_dequant.pth"
    names = tsgb.load("mobilenet_v2", weights=weights).names
    for index, category in open_dataset(shared / "data" / "imagenet_val400").categories.items():
        assert classes_of(category, index, names, 1000) == (index,)
        assert classes_of(Category(category.wnid, category.wnid), index, names, 1000) == (index,)
    for index, category in open_dataset(shared / "data" / "imagenet_single400").categories.items():
        assert classes_of(category, index, names, 1000) == (index,)
    for index, category in open_dataset(shared / "data" / "coco_voc").categories.items():
        assert classes_of(category, index, names, 1000) == classes_of(category, index, None, 1000)
