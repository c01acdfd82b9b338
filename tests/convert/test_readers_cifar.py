"""CIFAR's pickles: what is read is what was written, and of what a pickle asks for nothing is ever run."""

import json
import os
import pickle
import pickletools
import struct
import tracemalloc
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cifar_files import NAMES, Python2, batch, cifar10, cifar100, python2
from support.commands import run

from infobatch_stream.convert.readers import read_source
from infobatch_stream.convert.readers.cifar_pickle import PickledArray, read_plain_pickle
from infobatch_stream.errors import ConfigError, DataError


def with_bytes(value):
    """The same with texts as bytes: what a user has who read a file with encoding="bytes" and wrote it anew."""
    if isinstance(value, dict):
        return {with_bytes(key): with_bytes(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_bytes(item) for item in value]
    return value.encode("latin-1") if isinstance(value, str) else value


WRITERS = {
    "python 2": python2,
    **{f"python 3, protocol {n}": lambda value, n=n: pickle.dumps(value, n) for n in (2, 3, 4)},
    **{f"bytes, protocol {n}": lambda value, n=n: pickle.dumps(with_bytes(value), n) for n in (2, 3, 4)},
}


def pixels(rows):
    """uint8[n, 32, 32, 3] of rows as CIFAR describes them: 1024 red, 1024 green, 1024 blue, row by row."""
    return np.stack([rows[:, 1024 * c : 1024 * (c + 1)].reshape(-1, 32, 32) for c in range(3)], axis=-1)


# ---- what is there


@pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")  # the name in pickles of older NumPy
def test_the_pickles_of_these_tests_are_those_of_python_2():
    value = {"labels": [1, 300, -1], "data": np.arange(6, dtype=np.uint8).reshape(2, 3), "long": "x" * 300}
    found = pickle.loads(python2(value), encoding="bytes")
    assert found[b"labels"] == value["labels"]
    assert found[b"long"] == b"x" * 300
    assert np.array_equal(found[b"data"], value["data"])
    assert {"BINSTRING", "SHORT_BINSTRING"} <= {opcode.name for opcode, *_ in pickletools.genops(python2(value))}


@pytest.mark.parametrize("writer", WRITERS)
def test_cifar_10_is_read_as_it_was_written(tmp_path, writer):
    splits = cifar10(tmp_path, WRITERS[writer])
    found = read_source(tmp_path)
    assert [one.name for one in found] == ["test", "train"]
    for one in found:
        images, labels = splits[one.name]
        assert np.array_equal([sample["image"] for sample in map(one.__getitem__, range(len(one)))], pixels(images))
        assert [one[n]["label"] for n in range(len(one))] == labels
        assert one.classes == NAMES


@pytest.mark.parametrize("writer", WRITERS)
def test_cifar_100_has_fine_and_coarse_labels(tmp_path, writer):
    splits = cifar100(tmp_path, WRITERS[writer])
    for one in read_source(tmp_path):
        split = splits[one.name]
        assert np.array_equal([one[n]["image"] for n in range(len(one))], pixels(split["data"]))
        assert [one[n]["label"] for n in range(len(one))] == split["fine_labels"]
        assert [one[n]["coarse_label"] for n in range(len(one))] == split["coarse_labels"]
        assert one.classes == NAMES


def test_an_array_in_fortrans_order_is_read_in_its_own(tmp_path):
    array = np.asfortranarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    assert np.array_equal(read_plain_pickle(pickle.dumps({"data": array}, 4))["data"].values(), array)


@pytest.mark.parametrize("format", ["mds", "wds"])
@pytest.mark.usefixtures("few_open_files", "no_stale_shared_memory")
def test_cifar_becomes_shards_that_other_libraries_read(tmp_path, format):
    splits = cifar100(tmp_path / "src")
    code, out, err = run("convert", tmp_path / "src", tmp_path / "dst", "--format", format, "--no-shuffle")
    assert code == 0, err
    assert "6 samples of 3 classes" in out
    for split, wanted in splits.items():
        assert json.loads((tmp_path / "dst" / split / "classes.json").read_text()) == NAMES
        if format == "mds":
            from streaming import StreamingDataset

            dataset = StreamingDataset(local=str(tmp_path / "dst" / split), batch_size=1)
            found = [(s["image"], s["label"], s["coarse_label"]) for s in (dataset[n] for n in range(6))]
        else:
            import webdataset

            tars = sorted(map(str, (tmp_path / "dst" / split).glob("*.tar")))
            stream = webdataset.WebDataset(tars, shardshuffle=False).decode().to_tuple("npy", "cls", "coarse_label.cls")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)  # webdataset does not close the tars it has read
                found = list(stream)
        images, fine, coarse = zip(*found, strict=True)
        assert np.array_equal(images, pixels(wanted["data"]))
        assert (list(fine), list(coarse)) == (wanted["fine_labels"], wanted["coarse_labels"])


def test_columns_are_chosen_and_renamed(tmp_path):
    cifar100(tmp_path)
    (_, train) = read_source(tmp_path, columns={"image": "image", "label": "coarse_label"})
    assert [train[n]["label"] for n in range(6)] == [0, 1, 0, 1, 0, 1]


# ---- what is not


class Calls:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def hostile(tmp_path):
    """Name -> pickle; those that call something would make the file "ran"."""
    ran = str(tmp_path / "ran")
    touch = Calls(os.system, f"touch {ran}")
    good = batch(4, labels=[0] * 4)
    objects = np.array([touch] * 4, dtype=object)
    builtin = f"open({ran!r}, 'w').close()"
    command = b"X" + struct.pack("<I", len(ran) + 6) + f"touch {ran}".encode()
    chain = b"\x80\x04cbuiltins\ngetattr\n(cbuiltins\n__import__\n(X\x02\x00\x00\x00ostRX\x06\x00\x00\x00systemtR"
    return {
        "os.system": pickle.dumps({"data": touch}),
        "os.system by protocol 0": pickle.dumps({"data": touch}, 0),
        "os.system by Python 2's name": b"\x80\x02cposix\nsystem\n(" + command + b"tR.",
        "eval": pickle.dumps({"data": Calls(eval, builtin)}),
        "exec": pickle.dumps({"data": Calls(exec, builtin)}),
        "getattr of an import": chain + b"(" + command + b"tR.",
        "a call in the arguments of an array": pickle.dumps({**good, "labels": [Calls(bytes, touch)]}),
        "an array of objects": pickle.dumps({**good, "data": objects}),
        "INST": b"(S'touch " + ran.encode() + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'touch " + ran.encode() + b"'\no.",
        "NEWOBJ": b"\x80\x02cos\nsystem\n" + command + b"\x85\x81.",
        "a persistent id": b"\x80\x02U\x01xQ.",
        "an extension": b"\x80\x02\x82\x01.",
        "numpy.load": pickle.dumps({"data": Calls(np.load, ran)}),
        "another codec": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x06\x00\x00\x00rot_13\x86R.",
        "the state of a function": b"\x80\x02}X\x01\x00\x00\x00ac_codecs\nencode\n}X\x0c\x00\x00\x00__defaults__)sbs.",
        "an attribute of NumPy": b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93)R.",
    }  # fmt: skip


@pytest.mark.parametrize("name", hostile(Path()))
def test_what_a_pickle_calls_is_never_called(tmp_path, name):
    cifar10(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(hostile(tmp_path)[name])
    with pytest.raises(DataError, match="data_batch_3 is no such file as CIFAR's authors publish"):
        read_source(tmp_path)
    assert not (tmp_path / "ran").exists()


def write_array(array, shape):
    writer = Python2()
    writer.out.write(b"\x80\x02}U\x04data")
    writer.array(array, shape)
    return writer.out.getvalue() + b"s."


RECURSIONS = {
    "a list in itself": b"\x80\x02}(U\x04data]q\x00h\x00aU\x06labelsh\x00u.",
    "a dict in itself": b"\x80\x02}q\x00(U\x04datah\x00U\x06labelsh\x00u.",
    "a batch in itself": b"\x80\x02}q\x00U\x04datah\x00s.",
    "many lists in each other": b"\x80\x02}U\x04data" + b"]" * 300_000 + b"a" * 299_999 + b"s.",
    "many tuples in each other": b"\x80\x02}U\x04data)" + b"\x85" * 300_000 + b"s.",
    "many tuples in each other as a key": b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.",
    "an array that is filled with itself": write_array(np.zeros((1, 1), np.uint8), (1, 1))[:-2] + b"q\x00h\x00bs.",
    "a call of itself": b"\x80\x02c_codecs\nencode\nq\x00h\x00h\x00\x86R.",
}


@pytest.mark.parametrize("name", RECURSIONS)
def test_what_holds_itself_is_refused(tmp_path, name):
    cifar10(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(RECURSIONS[name])
    with pytest.raises(DataError, match="data_batch_3 is no such file as CIFAR's authors publish"):
        read_source(tmp_path)


@pytest.mark.parametrize(
    "name", ["os system", "builtins eval", "numpy load", "numpy.core.multiarray fromfile", "numpy fromfile"]
)
def test_no_name_but_those_of_arrays_is_looked_up(name):
    with pytest.raises(ValueError, match=f"it calls '{name}', which is never done"):
        read_plain_pickle(b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n.")


def test_no_state_is_set_but_that_of_an_array():
    for target in (b"c_codecs\nencode\n", b"cnumpy\nndarray\n", b"]", b"}", b"U\x01a"):
        with pytest.raises(ValueError, match="it sets the state of a"):
            read_plain_pickle(b"\x80\x02" + target + b"}U\x0c__defaults__)sb.")


@pytest.mark.parametrize("name", ["os.system", "os.system by Python 2's name", "eval", "getattr of an import", "INST"])
def test_such_pickles_would_run_in_pythons_own_unpickler(tmp_path, name):
    pickle.loads(hostile(tmp_path)[name])
    assert (tmp_path / "ran").exists()


BOMBS = {
    "a huge memo": b"\x80\x02}r\xff\xff\xff\xff0.",
    "a huge text": b"\x80\x02T\xff\xff\xff\x7fabc.",
    "huge bytes": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
    "a huge number": b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
    "nested tuples as a key": b"\x80\x02}(NNt" + b"q\x00h\x00\x86" * 3000 + b"Ns.",
    "many marks": b"\x80\x02" + b"(" * 100_000 + b".",
    "a number of 255 bytes as a side": write_array(np.zeros((1, 1), np.uint8), (1, 1)).replace(
        b"K\x01K\x01\x86", b"K\x01\x8a\xff" + b"\x7f" * 255 + b"\x86"
    ),
    "a shape of 4 GB": write_array(np.zeros((1, 1), np.uint8), (1 << 16, 1 << 16)),
    "a negative shape": write_array(np.zeros((1, 1), np.uint8), (-1, -1)),
    "an array of float64": write_array(np.zeros((1, 1)), (1, 1)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_a_pickle_claims_takes_no_memory(name):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            read_plain_pickle(BOMBS[name])
        assert tracemalloc.get_traced_memory()[1] < (1 << 20) + 20 * len(BOMBS[name])
    finally:
        tracemalloc.stop()


def test_a_file_of_more_opcodes_than_any_has_is_refused(monkeypatch):
    data = python2({"labels": [1] * 100})
    assert read_plain_pickle(data) == {"labels": [1] * 100}
    monkeypatch.setattr("infobatch_stream.convert.readers.cifar_pickle._MOST", 100)
    with pytest.raises(ValueError, match="more than 100 opcodes"):
        read_plain_pickle(data)


def test_references_to_a_long_text_do_not_multiply_it():
    text = b"T" + struct.pack("<i", 1 << 20) + bytes(1 << 20)
    call = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n\x85R"
    array += b"(K\x01J\x00\x00\x10\x00\x85cnumpy\ndtype\nU\x02u1\x85R\x89h\x00tb"
    data = b"\x80\x02" + text + b"q\x00" + (call + array) * 500 + b"0."
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="POP"):
            read_plain_pickle(data)
        assert tracemalloc.get_traced_memory()[1] < 6 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("writer", WRITERS)
def test_a_pickle_that_was_cut_anywhere_is_refused(writer):
    data = WRITERS[writer]({"labels": [1, 2], "data": np.zeros((2, 3), np.uint8), "names": ["a", "b"]})
    assert isinstance(read_plain_pickle(data)["data"], PickledArray)
    for end in range(len(data)):
        with pytest.raises(ValueError):
            read_plain_pickle(data[:end])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_pickle_is_read_or_refused_and_nothing_else(data):
    content = bytearray(python2({"labels": [1, 2, 300], "data": np.zeros((2, 3), np.uint8), "names": ["a", "b"]}))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ValueError):
        assert isinstance(read_plain_pickle(bytes(content)), dict)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": np.zeros((4, 3071), np.uint8)}, r"shape \(4, 3071\) and not uint8\[n, 3072\]"),
        ({"data": np.zeros((0, 3072), np.uint8)}, "not uint8"),
        ({"data": "text"}, "'data' is a str"),
        ({"labels": [0, 1, 2]}, "no list of 4 labels"),
        ({"labels": [0, 1, 2, 3]}, "no label from 0 to 2"),
        ({"labels": [0, 1, 2, -1]}, "no label from 0 to 2"),
        ({"labels": ["0", "1", "2", "0"]}, "no label from 0 to 2"),
    ],
)
def test_a_batch_of_something_else_is_refused_with_what_it_is(tmp_path, change, words):
    cifar10(tmp_path)
    (tmp_path / "test_batch").write_bytes(python2({**batch(4, labels=[0, 1, 2, 0]), **change}))
    with pytest.raises(DataError, match=f"test_batch is no .*{words}"):
        read_source(tmp_path)


def test_a_page_of_an_error_in_place_of_a_file_is_refused(tmp_path):
    cifar10(tmp_path)
    (tmp_path / "batches.meta").write_text("<html>404</html>")
    with pytest.raises(DataError, match=r"batches\.meta"):
        read_source(tmp_path)


def test_missing_files_are_named(tmp_path):
    cifar10(tmp_path)
    (tmp_path / "data_batch_4").unlink()
    (tmp_path / "test_batch").unlink()
    with pytest.raises(ConfigError, match=r"but no data_batch_4, test_batch; unpack it again"):
        read_source(tmp_path)


def test_cifar_beside_other_kinds_is_refused(tmp_path):
    cifar10(tmp_path)
    (tmp_path / "some.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"tables \(some.csv\) and CIFAR's Python files \(batches.meta\)"):
        read_source(tmp_path)
