from types import SimpleNamespace

import pytest
from detectron2.data import Metadata

from psf.data import panoptic_metadata
from psf.data.class_map import ClassMap, ClassNames, align_names, model_classes, shared_classes

# Cityscapes-like: things and stuff interleave in the contiguous ids.
INTERLEAVED = SimpleNamespace(
    name="interleaved",
    thing_dataset_id_to_contiguous_id={26: 13, 24: 11},
    stuff_dataset_id_to_contiguous_id={7: 0, 11: 2, 23: 12},
)


def test_no_classes():
    metadata = SimpleNamespace(
        name="empty", thing_dataset_id_to_contiguous_id={}, stuff_dataset_id_to_contiguous_id={}
    )
    assert ClassMap.from_metadata(metadata) == ClassMap(thing_ids=(), stuff_ids=())


def test_things_come_first_each_by_contiguous_id():
    class_map = ClassMap.from_metadata(INTERLEAVED)
    assert class_map == ClassMap(thing_ids=(11, 13), stuff_ids=(0, 2, 12))
    assert [class_map.to_contiguous(i) for i in range(5)] == [
        (11, True),
        (13, True),
        (0, False),
        (2, False),
        (12, False),
    ]


def test_to_model_inverts_to_contiguous():
    class_map = ClassMap.from_metadata(INTERLEAVED)
    for model_class in range(5):
        contiguous_id, is_thing = class_map.to_contiguous(model_class)
        assert class_map.to_model(contiguous_id, is_thing=is_thing) == model_class


def test_a_class_listed_as_thing_and_stuff_is_a_thing():
    metadata = SimpleNamespace(
        name="mask2former",
        thing_dataset_id_to_contiguous_id={2: 1},
        stuff_dataset_id_to_contiguous_id={1: 0, 2: 1},
    )
    assert ClassMap.from_metadata(metadata) == ClassMap(thing_ids=(1,), stuff_ids=(0,))


def test_things_and_stuff_may_share_contiguous_ids():
    """Detectron2's "separated" COCO numbers both from 0."""
    class_map = ClassMap(thing_ids=(0, 1), stuff_ids=(0, 1))
    assert class_map.to_model(1, is_thing=True) == 1
    assert class_map.to_model(1, is_thing=False) == 3


def test_an_unregistered_data_set_is_named():
    with pytest.raises(ValueError, match="'nowhere' has no 'thing_dataset_id_to_contiguous_id'"):
        ClassMap.from_metadata(SimpleNamespace(name="nowhere"))


def data_set(name, *classes, things_first=True):
    """Metadata of classes (id, name, isthing)."""
    categories = [dict(zip(("id", "name", "isthing"), c, strict=True)) for c in classes]
    return Metadata(name=name, **panoptic_metadata(categories, things_first=things_first))


REFERENCE = data_set("reference", (1, "cat", 1), (2, "dog", 1), (3, "sky", 0), (4, "sea", 0))


@pytest.mark.parametrize("things_first", [True, False])
def test_the_same_classes_in_another_order(things_first, caplog):
    """Matched by name, whatever the ids, the case and the numbering."""
    caplog.set_level("INFO", logger="psf")
    classes = ((7, "sea", 0), (1, "Dog", 1), (3, "sky ", 0), (2, "cat", 1))
    name = f"other_{things_first}"  # the line is logged once for each
    other = data_set(name, *classes, things_first=things_first)
    expected = ClassMap((1, 0), (3, 2)) if things_first else ClassMap((3, 1), (2, 0))
    assert model_classes(other, REFERENCE) == expected
    assert f"'{name}' stand in another order than those of 'reference'" in caplog.text
    assert model_classes(REFERENCE, REFERENCE) == ClassMap((0, 1), (2, 3))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([(1, "cat", 1), (2, "cow", 1), (3, "sky", 0), (4, "sea", 0)],
         "thing classes missing: dog; thing classes only there: cow"),
        ([(1, "cat", 1), (2, "dog", 1), (3, "sky", 0)], "stuff classes missing: sea"),
        ([(1, "cat", 1), (2, "dog", 0), (3, "sky", 0), (4, "sea", 0)],
         "thing classes missing: dog; stuff classes only there: dog"),
    ],
)  # fmt: skip
def test_other_classes_are_refused(classes, message):
    with pytest.raises(ValueError, match=f"data set 'other' are not those of 'ref.*{message}"):
        model_classes(data_set("other", *classes), REFERENCE)


def named(things, names):
    maps = {"thing_dataset_id_to_contiguous_id": things, "stuff_dataset_id_to_contiguous_id": {}}
    return Metadata(name="m", **maps, **(names and {"thing_classes": names, "stuff_classes": []}))


def test_ids_decide_where_classes_share_a_name_and_positions_where_there_are_none():
    twins = [named(ids, ["ring", "ring"]) for ids in ({1: 0, 2: 1}, {2: 0, 1: 1})]
    assert model_classes(twins[1], twins[0]).thing_ids == (1, 0)
    nameless = [named(ids, {}) for ids in ({1: 0}, {1: 0}, {1: 0, 2: 1})]
    assert model_classes(nameless[1], nameless[0]).thing_ids == (0,)
    with pytest.raises(ValueError, match="cannot be matched without names"):
        model_classes(nameless[2], nameless[0])
    with pytest.raises(ValueError, match="repeated: a"):
        align_names(
            *(ClassNames(names, []) for names in (["a", "b", "a"], ["b", "a"])),
            **{"theirs_of": "x", "ours_of": "y", "mend": "z"},
        )


@pytest.mark.parametrize(
    ("classes", "expected", "lacking"),
    [
        ([(8, "sea", 0), (9, "Dog", 1)], ((1,), (3,)), "lacks 2: cat, sky"),
        ([(8, "sea", 0), (9, "sky", 0)], ((), (2, 3)), "lacks 2: cat, dog"),
        ([(1, "dog", 1)], ((1,), ()), "lacks 3: cat, sky, sea"),
    ],
)
def test_a_data_set_that_lacks_classes(classes, expected, lacking, caplog):
    """As a validation set in which some do not occur; but training refuses it."""
    other = data_set("other", *classes)
    shared, theirs = shared_classes(other, REFERENCE)
    assert shared == expected
    names = [REFERENCE.stuff_classes[i] for kind in shared for i in kind]
    assert [other.stuff_classes[i].lower() for kind in theirs for i in kind] == names
    assert lacking in caplog.text
    with pytest.raises(ValueError, match=r"missing: .*List the same categories"):
        model_classes(other, REFERENCE)
