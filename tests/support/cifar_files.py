"""CIFAR's files, as Python 2 wrote them."""

import io
import struct

import numpy as np

RNG = np.random.default_rng(5)


NAMES = ["airplane", "bird", "cat"]


class Python2:
    """What cPickle of Python 2 writes with protocol 2, opcode by opcode: its str is SHORT_BINSTRING or BINSTRING."""

    def __init__(self):
        self.out, self.memos = io.BytesIO(), 0

    def dumps(self, value):
        self.out.write(b"\x80\x02")
        self.save(value)
        return self.out.getvalue() + b"."

    def put(self, opcodes):
        self.out.write(opcodes)
        long = self.memos > 255
        self.out.write(b"r" + struct.pack("<I", self.memos) if long else b"q" + bytes([self.memos]))
        self.memos += 1

    def save(self, value):
        if isinstance(value, dict):
            self.put(b"}")
            self.out.write(b"(")
            for item in (part for pair in value.items() for part in pair):
                self.save(item)
            self.out.write(b"u")
        elif isinstance(value, list):
            self.put(b"]")
            self.out.write(b"(")
            for item in value:
                self.save(item)
            self.out.write(b"e")
        elif isinstance(value, str):
            data = value.encode("latin-1")
            self.put((b"U" + bytes([len(data)]) if len(data) < 256 else b"T" + struct.pack("<i", len(data))) + data)
        elif isinstance(value, int):
            self.out.write(b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value))
        else:
            self.array(value)

    def array(self, array, shape=None):
        self.put(b"cnumpy.core.multiarray\n_reconstruct\n")
        self.put(b"cnumpy\nndarray\n")
        self.put(b"K\x00\x85")
        self.put(b"U\x01b")
        self.put(b"\x87R")
        self.out.write(b"(K\x01")
        for side in array.shape if shape is None else shape:
            self.save(side)
        self.put(b"\x86")
        self.put(b"cnumpy\ndtype\n")
        self.put(b"U\x02" + array.dtype.str[1:].encode())
        self.put(b"K\x00K\x01\x87R")
        self.out.write(b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89")
        self.save(array.tobytes().decode("latin-1"))
        self.out.write(b"tb")


def python2(value):
    return Python2().dumps(value)


def batch(rows, **labels):
    data = RNG.integers(0, 256, (rows, 3072), dtype=np.uint8)
    return {"batch_label": "one of some", **labels, "data": data, "filenames": [f"{row}.png" for row in range(rows)]}


def cifar10(folder, write=python2, rows=4):
    """Files as of CIFAR-10 in ``folder``; split -> (uint8[n, 3072], labels)."""
    folder.mkdir(exist_ok=True)
    splits = {"train": [], "test": []}
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        one = batch(rows, labels=[int(label) for label in RNG.integers(0, 3, rows)])
        (folder / name).write_bytes(write(one))
        splits["test" if name == "test_batch" else "train"].append((one["data"], one["labels"]))
    meta = {"num_cases_per_batch": rows, "label_names": NAMES, "num_vis": 3072}
    (folder / "batches.meta").write_bytes(write(meta))
    return {
        split: (np.concatenate([data for data, _ in parts]), [label for _, labels in parts for label in labels])
        for split, parts in splits.items()
    }


def cifar100(folder, write=python2, rows=6):
    folder.mkdir(exist_ok=True)
    splits = {}
    for split in ("train", "test"):
        splits[split] = batch(
            rows, fine_labels=[n % 3 for n in range(rows)], coarse_labels=[n % 2 for n in range(rows)]
        )
        (folder / split).write_bytes(write(splits[split]))
    (folder / "meta").write_bytes(write({"fine_label_names": NAMES, "coarse_label_names": ["thing", "animal"]}))
    return splits
