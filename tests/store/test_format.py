"""What docs/format.md says of a store's bytes, compared with the files; and its reader, run as it stands there."""

import json
import re
import struct

import google_crc32c
import numpy as np
import pytest
from support.paths import ROOT

from infobatch_stream.store import header, layout
from infobatch_stream.store.header import Header, write_header
from infobatch_stream.store.score_store import ScoreStore

TEXT = (ROOT / "docs" / "format.md").read_text()
CHUNK = 1 << 22
SIZES = [1, 10, CHUNK, CHUNK + 1]
sizes = pytest.mark.parametrize("size", SIZES)
arrays = pytest.mark.parametrize("array", ["scores", "pending"])
NAN = 0x7FC00000


@pytest.fixture(scope="module")
def read_scores():
    """The reader of the page."""
    (code,) = re.findall(r"^<!-- test: reader -->\n```python\n(.*?)^```", TEXT, re.M | re.S)
    imported = set(re.findall(r"^(?:import|from) (\w+)", code, re.M))
    assert imported == {"json", "pathlib", "numpy"}
    names = {}
    exec(compile(code, "docs/format.md", "exec"), names)
    return names["read_scores"]


def store_of(path, size, epoch=3):
    """-> a store in the middle of an epoch, its scores, and those after its commit."""
    rng = np.random.default_rng(size)
    scores = rng.random(size, dtype=np.float32)
    scores[rng.random(size) < 0.1] = np.nan
    store = ScoreStore.create(path, size, "digits", scores=scores, epoch=epoch)
    seen = rng.permutation(size)[: size // 2 + 1]
    losses = rng.random(seen.size, dtype=np.float32)
    store.record(seen, losses)
    after = scores.copy()
    after[seen] = losses
    return store, scores, after


def same(found, epoch, scores):
    assert found[0] == epoch
    assert found[1].dtype == np.float32
    np.testing.assert_array_equal(found[1], scores)


@sizes
def test_the_reader_of_the_page_reads_what_a_store_holds(tmp_path, read_scores, size):
    store, scores, after = store_of(tmp_path / "scores.zarr", size)
    same(read_scores(store.path), 3, scores)
    store.commit()
    same(read_scores(store.path), 4, after)


@pytest.mark.parametrize("size", [1, 10, CHUNK + 1])
@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("state", ["apply", "reset"])
def test_the_reader_of_the_page_reads_a_store_whose_commit_was_broken_off(tmp_path, read_scores, size, state, part):
    """However far the step came; and the library takes it for the same."""
    store, _, after = store_of(tmp_path / "scores.zarr", size)
    done = int(size * part)
    if state == "apply":
        layout.map_array(store.path, "scores", size, "r+")[:done] = after[:done]
    else:
        layout.map_array(store.path, "scores", size, "r+")[:] = after
        layout.map_array(store.path, "pending", size, "r+")[:done] = np.nan
    write_header(store.path, Header(size, "digits", 3 if state == "apply" else 4, state))
    same(read_scores(store.path), 4, after)
    again = ScoreStore.open(store.path)
    same((again.epoch, again.scores), 4, after)
    assert np.isnan(again.pending).all()


def test_the_reader_of_the_page_reads_format_1_and_refuses_a_newer_one(tmp_path, read_scores):
    store, scores, _ = store_of(tmp_path / "scores.zarr", 10)
    group = json.loads((store.path / "zarr.json").read_text())
    fields = group["attributes"]["infobatch_stream"]
    del fields["checksum"]
    for version in (1, 3):
        fields["format"] = version
        (store.path / "zarr.json").write_text(json.dumps(group))
        if version == 1:
            same(read_scores(store.path), 3, scores)
    with pytest.raises(ValueError, match="format 3"):
        read_scores(store.path)


def test_the_folder_is_as_drawn(tmp_path):
    store, *_ = store_of(tmp_path / "scores.zarr", 10)
    tree = re.search(r"^    scores\.zarr/\n(.*?)\n\n", TEXT, re.M | re.S)[1]
    drawn = {line.split()[0] for line in tree.splitlines()}
    found = {str(file.relative_to(store.path)) for file in store.path.rglob("*") if file.is_file()}
    assert drawn - {"pending/owner.json", "history/"} == found


@sizes
@arrays
def test_each_byte_of_a_shard_file_is_as_stated(tmp_path, size, array):
    store, *_ = store_of(tmp_path / "scores.zarr", size)
    file = store.path / array / "c" / "0"
    c = min(size, CHUNK)
    k = -(-size // c)
    data = file.read_bytes()
    assert len(data) == k * (4 * c + 16) + 4
    values = np.frombuffer(data, "<f4", c * k)
    np.testing.assert_array_equal(values[:size], getattr(store, array))
    bits = values.view("<u4")
    assert set(bits[np.isnan(values)]) <= {NAN}
    assert np.isnan(values[size:]).all()
    assert np.isfinite(values[~np.isnan(values)]).all()
    index = data[4 * c * k : -4]
    assert index == b"".join(struct.pack("<QQ", 4 * c * chunk, 4 * c) for chunk in range(k))
    assert data[-4:] == struct.pack("<I", google_crc32c.value(index))


def test_the_example_of_a_shard_file_is_one(tmp_path):
    store, *_ = store_of(tmp_path / "scores.zarr", 10)
    assert "For N = 10: 40 bytes of values, offset 0, length 40, checksum, 60 bytes." in TEXT
    data = (store.path / "scores" / "c" / "0").read_bytes()
    assert (len(data), struct.unpack("<QQ", data[40:56])) == (60, (0, 40))


def crc32c(data):
    """Bit by bit, from the parameters on the page."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def test_the_checksum_is_the_one_described(tmp_path):
    example, value = re.search(r"^    (\{.*\})\n\nhas the checksum (\d+)", TEXT, re.M).groups()
    assert crc32c(example.encode()) == int(value)
    assert crc32c(b"123456789") == 0xE3069283
    assert "reflected polynomial 0x82F63B78" in TEXT
    store = ScoreStore.create(tmp_path / "scores.zarr", 10, "digits")
    fields = json.loads((store.path / "zarr.json").read_text())["attributes"]["infobatch_stream"]
    assert fields.pop("checksum") == int(value)
    assert json.dumps(fields, sort_keys=True, separators=(",", ":")) == example


def test_a_checksum_of_other_characters_is_that_of_their_escapes():
    fields = {"fingerprint": "zoë\u2028\U0001f600\x7f\n"}
    assert header.checksum(fields) == crc32c(b'{"fingerprint":"zo\\u00eb\\u2028\\ud83d\\ude00\\u007f\\n"}')


def test_a_header_of_a_later_program_with_another_field_is_read(tmp_path):
    """The checksum covers it; a writer of today drops it."""
    store, scores, _ = store_of(tmp_path / "scores.zarr", 10)
    group = json.loads((store.path / "zarr.json").read_text())
    fields = group["attributes"]["infobatch_stream"]
    fields["later"] = ["é", 1]
    fields["checksum"] = header.checksum(fields)
    (store.path / "zarr.json").write_text(json.dumps(group))
    again = ScoreStore.open(store.path)
    np.testing.assert_array_equal(again.scores, scores)
    again.commit()
    assert "later" not in (store.path / "zarr.json").read_text()


def test_the_metadata_have_the_parts_that_readers_may_depend_on(tmp_path):
    size = CHUNK + 1
    store, *_ = store_of(tmp_path / "scores.zarr", size)
    group = json.loads((store.path / "zarr.json").read_text())
    assert (group["zarr_format"], group["node_type"]) == (3, "group")
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    for array in ("scores", "pending"):
        found = json.loads((store.path / array / "zarr.json").read_text())
        assert found["shape"] == [size]
        assert found["data_type"] == "float32"
        assert found["fill_value"] == "NaN"
        assert found["chunk_grid"] == {"name": "regular", "configuration": {"chunk_shape": [2 * CHUNK]}}
        assert found["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
        (sharding,) = found["codecs"]
        assert sharding["name"] == "sharding_indexed"
        assert sharding["configuration"] == {
            "chunk_shape": [CHUNK],
            "codecs": [little],
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        }


def test_the_bounds_are_those_of_the_code():
    assert header.MAX_SAMPLES == 1 << 40
    assert header.MAX_EPOCH == (1 << 48) - 1
    assert TEXT.startswith(f"# The format of a score store\n\nFormat {header.FORMAT}. ")
    for stated in ("1 to 2^40", "0 to 2^48 - 1", "65,536 characters", "2^20 bytes", "deeper than 64", "1,000 digits"):
        assert stated in TEXT
    limits = (header._FINGERPRINT_LIMIT, header.METADATA_LIMIT, header._DEPTH_LIMIT, header._DIGITS_LIMIT)
    assert limits == (65_536, 1 << 20, 64, 1000)


def test_a_token_that_was_left_behind_is_not_a_loss(tmp_path, read_scores):
    store, scores, _ = store_of(tmp_path / "scores.zarr", 10)
    store.discard_pending()
    for low in (1, (1 << 22) - 1):
        store.token = NAN + low
        assert np.isnan(store.pending[0])
        store.commit()
        same(read_scores(store.path), store.epoch, scores)


def test_the_leftovers_that_the_page_names_do_no_harm(tmp_path, read_scores):
    store, scores, _ = store_of(tmp_path / "scores.zarr", 10)
    left = [store.path / ".zarr.json.x1", tmp_path / ".scores.zarr.new-1" / "f", tmp_path / ".scores.zarr.old-1" / "f"]
    for file in left:
        file.parent.mkdir(exist_ok=True)
        file.write_text("{")
    (store.path / "pending" / "owner.json").write_text("{")
    again = ScoreStore.open(store.path)
    same((again.epoch, again.scores), 3, scores)
    same(read_scores(store.path), 3, scores)
    assert not left[0].exists()
