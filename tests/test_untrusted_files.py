"""Weights and configs from anywhere: nothing that they hold is run, and the good ones load."""

import functools
import io
import os
import pickle
import resource
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from psf import checkpoint_files
from psf.config import load_config
from psf.weights import Checkpointer


class Runs:
    """Unpickles to the call of a function that leaves a mark."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def payloads(mark):
    code = f"open({str(mark)!r}, 'w')"
    return {
        "system": Runs(os.system, f"touch {mark}"),
        "eval": Runs(eval, code),
        "open": Runs(open, str(mark), "w"),
        "numpy": Runs(np.savetxt, str(mark), [1.0]),
        "nested": np.array([Runs(eval, code)], dtype=object),
    }


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "executed"


@pytest.mark.parametrize("kind", sorted(payloads("")))
@pytest.mark.parametrize("suffix", ["pkl", "pyth", "pth"])
def test_weights_do_not_run(tiny_cfg, tmp_path, mark, kind, suffix):
    path = tmp_path / f"weights.{suffix}"
    content = {"model": {"a": payloads(mark)[kind]}, "__author__": "x"}
    path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=rf"weights\.{suffix}' is not .*it holds|of another kind"):
        Checkpointer(build_model(tiny_cfg)).load(str(path))
    assert not mark.exists()


@pytest.mark.parametrize(
    "tag", ["../evil.pkl", "evil.pkl", "/etc/passwd", "http://localhost/a.pth", "gone.pth", ".", ""]
)
def test_last_checkpoint_is_a_name_in_its_folder(tiny_cfg, tmp_path, mark, tag):
    folder = tmp_path / "output"
    folder.mkdir()
    for path in (tmp_path / "evil.pkl", folder / "evil.pkl"):
        path.write_bytes(pickle.dumps(payloads(mark)["system"]))
    (folder / "last_checkpoint").write_text(tag)
    with pytest.raises(ValueError, match=r"last_checkpoint' names '.*not a \.pth file in its"):
        Checkpointer(build_model(tiny_cfg), str(folder)).resume_or_load("", resume=True)
    assert not mark.exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "list", "no arrays", "none", "huge"])
def test_damaged_pickles_are_one_line(tiny_cfg, tmp_path, damage):
    whole = pickle.dumps({"model": {"a": np.zeros(9)}, "__author__": "x"})
    content = {
        "truncated": whole[:-9],
        "empty": b"",
        "list": pickle.dumps([1]),
        "none": pickle.dumps({"model": {}, "__author__": "x"}),
        "no arrays": pickle.dumps({"model": {"a": "b"}, "__author__": "x"}),
        "huge": b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b".",
    }[damage]
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pkl' (is truncated or damaged|holds)") as error:
        Checkpointer(build_model(tiny_cfg)).load(str(tmp_path / "a.pkl"))
    assert "\n" not in str(error.value)


CAFFE2 = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "shortcut": "branch1"}


def caffe2_name(name):
    """stem.conv1.norm.weight is res_conv1_bn_s, res2.0.conv1.weight is res2_0_branch2a_w."""
    *module, parameter = name.replace(".norm", "").split(".")
    suffix = f"bn_{'s' if parameter == 'weight' else 'b'}" if ".norm" in name else "w"
    if module[0] == "stem":
        return f"{'res_' if '.norm' in name else ''}conv1_{suffix}"
    return f"{module[0]}_{module[1]}_{CAFFE2[module[2]]}_{suffix}"


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("author", ["torchvision", "Caffe2"])
def test_files_of_the_model_zoo_load(tiny_cfg, tmp_path, protocol, author):
    """Torchvision's by Detectron2's names; Caffe2's by its own, without statistics."""
    tiny_cfg.MODEL.RESNETS.NORM = "FrozenBN"
    model = build_model(tiny_cfg)
    expected = {n: v + 1 for n, v in model.backbone.state_dict().items()}
    content = {
        "model": OrderedDict((n, v.numpy()) for n, v in expected.items()),
        "__author__": author,
        "matching_heuristics": True,
    }
    if author == "Caffe2":
        expected = {n: v for n, v in expected.items() if "running" not in n}
        content = {caffe2_name(n): v.numpy() for n, v in expected.items()}
        content["conv1_w_momentum"] = np.zeros(2, dtype=np.float32)
    data = pickle.dumps(content, protocol=protocol)
    # As NumPy 1 and NumPy 2 name their functions.
    other = data.replace(b"numpy._core", b"numpy.core") if protocol < 4 else data
    for written in {data, other}:
        (tmp_path / "R-50.pkl").write_bytes(written)
        model = build_model(tiny_cfg)
        Checkpointer(model).load(str(tmp_path / "R-50.pkl"))
        for name, value in expected.items():
            assert torch.equal(model.backbone.state_dict()[name], value), name


TAGS = {
    "apply": '!!python/object/apply:os.system ["touch MARK"]',
    "eval": "!!python/object/apply:eval [\"open('MARK', 'w')\"]",
    "new": '!!python/object/new:subprocess.Popen [["touch", "MARK"]]',
    "name": "!!python/name:os.system",
}


@pytest.mark.parametrize("above", [False, "one", "list"])
@pytest.mark.parametrize("tag", TAGS.values(), ids=TAGS)
def test_configs_do_not_run(tmp_path, mark, tag, above):
    path = tmp_path / "evil.yaml"
    path.write_text(f"SEED: {tag.replace('MARK', str(mark))}\nVERSION: 2\n")
    if above:
        path = tmp_path / "own.yaml"
        path.write_text(f"_BASE_: {'evil.yaml' if above == 'one' else '[evil.yaml]'}\nSEED: 1\n")
    with pytest.raises(ValueError, match=r"python/.*evil\.yaml.*write the value itself$") as error:
        load_config(path)
    assert "\n" not in str(error.value)
    assert not mark.exists()


# Thirty lists, each of which holds the one before twice.
ALIASES = functools.reduce(lambda text, i: f"&a{i} [{text}, *a{i - 1}]", range(1, 30), "&a0 [1]")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no keys"),
        (b"- 3\n", "holds no keys"),
        (b"_BASE_: 3\n", "_BASE_ is not the path of a file"),
        (b"_BASE_: a.yaml\n", "is its own _BASE_"),
        (b"\xff\xfe\x00", "codec can't decode|special characters"),
        (b"MODEL: 3\n", "not iterable"),
        (b"MODEL: {WEIGHTS: null}\n", "MODEL.WEIGHTS is null"),
        (b"_BASE_: gone.yaml\n", r"No such file or directory: '.*gone\.yaml"),
        (b"SEED: " + b"[" * 9999, "recursion"),
        (b"SEED: " + ALIASES.encode(), "100000 values or more"),
        (b"SOLVER: {BASE_LR: .nan}\n", "SOLVER.BASE_LR is nan"),
    ],
)
def test_malformed_configs(tmp_path, content, message):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^Config error in '.*a\.yaml': .*({message})"):
        load_config(tmp_path / "a.yaml")


FOUR_GB = b"\x8e" + (2**32).to_bytes(8, "little")  # the length of what follows
NUMBER = b"\x8a\x05" + (2**32).to_bytes(5, "little")
ARRAY, RECONSTRUCT = b"cnumpy\nndarray\n", b"cnumpy.core.multiarray\n_reconstruct\n"
SMALL_PICKLES = {
    "number of a memo entry": b"]r\xff\xff\xff\xff",
    "bytes": FOUR_GB,
    "text": b"\x8d" + FOUR_GB[1:],
    "byte array": b"\x96" + FOUR_GB[1:],
    "frame": b"\x95" + FOUR_GB[1:],
    "call of the array's type": ARRAY + NUMBER + b"\x85R",
    "new array": ARRAY + NUMBER + b"\x85\x81",
    "array to be filled": RECONSTRUCT + ARRAY + NUMBER + b"\x85C\x01b\x87R",
    # Not large, but of what is in the memory by chance.
    "array that is not filled": RECONSTRUCT + ARRAY + b"K\x04\x85C\x01b\x87R",
}


def torch_file(pickled=None, zeros=0, compression=zipfile.ZIP_STORED):
    """A file of torch.save with another pickle, or with so many zeros in place of a tensor."""
    buffer, changed = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.zeros(4)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(changed, "w", compression) as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                content = pickled or content
            target.writestr(name, bytes(zeros) if zeros and "/data/" in name else content)
    return changed.getvalue()


HEX = b"c_codecs\nencode\n" * 3 + b"X\x01\0\0\0aX\x05\0\0\0utf-8\x86R" + b"X\x03\0\0\0hex\x86R" * 2
SMALL_TORCH_FILES = {
    "byte array": torch_file(b"\x80\x02c__builtin__\nbytearray\n" + NUMBER + b"\x85R."),
    "tensor": torch_file(b"\x80\x02ctorch\nFloatTensor\n" + NUMBER + b"\x85R."),
    "codecs": torch_file(b"\x80\x02" + HEX + b"."),
    "old format": b"\x80\x02" + HEX + b".",
    "compressed": torch_file(zeros=2**28, compression=zipfile.ZIP_DEFLATED),
}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(pytest.param("a.pkl", b"\x80\x05" + c + b".", id=i) for i, c in SMALL_PICKLES.items()),
        *(pytest.param("a.pth", c, id=i) for i, c in SMALL_TORCH_FILES.items()),
    ],
)
def test_a_small_file_takes_little_memory(tmp_path, name, content):
    """Its size decides, not what it says."""
    path = tmp_path / name
    path.write_bytes(content)
    read = checkpoint_files.read_pickle if name == "a.pkl" else checkpoint_files.read
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=rf"'{path}'") as error:
        read(str(path))
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB
    assert not isinstance(error.value.__cause__, MemoryError)
