from types import SimpleNamespace

import pytest

from psf.data.class_map import ClassMap

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
