"""Reading GGUF files that may be anything: clear errors, bounded memory, nothing written."""

import struct
import tracemalloc
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli_tools import tree
from gguf_tools import plan_of, write_tiny
from sleb.checkpoints.gguf_file import GGUFFile
from sleb.core.errors import DataError, InputError, SlebError, UnsupportedModel
from sleb.surgery.gguf_cut import cut_gguf

PLAN = plan_of("llama", 8, 3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> bytes:
    return write_tiny(tmp_path_factory.mktemp("gguf") / "m.gguf").read_bytes()


def test_the_depth_is_read_without_the_rest_of_the_header(tmp_path):
    path = write_tiny(tmp_path / "m.gguf", blocks=5)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"block_count") + 40].ljust(len(whole), b"\xff"))
    assert GGUFFile.depth(path) == 5


def test_the_header_is_what_the_gguf_package_reads(tiny, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny)
    file, reader = GGUFFile.open(path), gguf.GGUFReader(path)
    fields = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert list(file.fields) == list(fields)
    for key, field in fields.items():
        if field.types[-1] != gguf.GGUFValueType.STRING or len(field.types) == 1:
            assert file.value(key) == field.contents(), key
    assert {t.name: (t.kind, list(t.shape), t.start, t.nbytes) for t in file.tensors.values()} == {
        t.name: (t.tensor_type, t.shape.tolist(), t.data_offset, t.n_bytes) for t in reader.tensors
    }


def attempt(folder: Path, raw: bytes) -> SlebError | None:
    """Cut what may not be a model; the error, and a check that it has left nothing behind."""
    (folder / "m.gguf").write_bytes(raw)
    for path in folder.iterdir():
        if path.name != "m.gguf":
            path.unlink()
    found: SlebError | None = None
    try:
        cut_gguf(PLAN, folder / "m.gguf", folder / "cut.gguf", other_weights=True)
    except (DataError, InputError, UnsupportedModel) as error:
        found = error
    if found:
        assert "\n" not in str(found)
        assert list(tree(folder)) == ["m.gguf"]
    return found


def test_every_truncation_is_refused(tiny, tmp_path):
    header = GGUFFile.open(write_tiny(tmp_path / "x.gguf"))
    start = min(tensor.start for tensor in header.tensors.values())
    (tmp_path / "x.gguf").unlink()
    for keep in [*range(0, start, 97), *range(start, len(tiny), 9001), len(tiny) - 257]:
        assert isinstance(attempt(tmp_path, tiny[:keep]), DataError), keep
        with pytest.raises(DataError, match=r"corrupt or truncated|does not start as a GGUF"):
            GGUFFile.open(tmp_path / "m.gguf")  # not only once a tensor is read


@settings(max_examples=300)
@given(data=st.data())
def test_mutated_headers_are_refused_or_cut(tiny, tmp_path, data):
    """Any byte of the header may be any other, and numbers may be huge."""
    raw = bytearray(tiny)
    end = tiny.index(b"output_norm.weight") + 50
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(4, end - 8))
        new = data.draw(
            st.one_of(
                st.binary(min_size=1, max_size=8),
                st.sampled_from([2**63, 2**64 - 1, 2**40, 2**31, 0]).map(
                    lambda n: struct.pack("<Q", n)
                ),
            )
        )
        raw[at : at + len(new)] = new
    attempt(tmp_path, bytes(raw[: len(tiny)]))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (8, 2**60, "counts .* fields and 1152921504606846976 tensors"),
        (16, 2**60, "counts 1152921504606846976 fields"),
        (24, 2**40, "has a name of 1099511627776 bytes"),
        (24, 60_000, "is not text|ends inside its header"),
    ],
)
def test_lengths_are_not_trusted(tiny, tmp_path, at, value, message):
    raw = bytearray(tiny)
    raw[at : at + 8] = struct.pack("<Q", value)
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(DataError, match=message):
        GGUFFile.open(tmp_path / "m.gguf")


def test_memory_stays_small_whatever_the_lengths_say(tmp_path):
    text = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**26)
    path = tmp_path / "m.gguf"
    with open(path, "wb") as stream:  # 256 MiB of numbers in one array, on a sparse disk
        stream.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text)
        stream.truncate(stream.tell() + 2**28)
    tracemalloc.start()
    file = GGUFFile.open(path)
    with pytest.raises(DataError, match="k is not a value that can be read here"):
        file.value("k")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert file.fields["k"].count == 2**26
    assert peak < 2**20


def test_other_formats_and_versions_say_so(tiny, tmp_path):
    path = tmp_path / "m.gguf"
    for raw, error, message in [
        (b"", DataError, "does not start as a GGUF file"),
        (b"PK\x03\x04" + tiny[4:], DataError, "does not start as a GGUF file: fetch it again"),
        (tiny[:4] + struct.pack("<I", 1) + tiny[8:], UnsupportedModel, "is GGUF version 1, and sl"),
        (tiny[:4] + struct.pack(">I", 3) + tiny[8:], UnsupportedModel, "is a big-endian GGUF file"),
    ]:
        path.write_bytes(raw)
        with pytest.raises(error, match=message):
            GGUFFile.open(path)
    with pytest.raises(InputError, match=r"no model at .*none\.gguf; check the path"):
        GGUFFile.open(tmp_path / "none.gguf")


def test_tensors_that_overlap_are_refused(tiny, tmp_path):
    """One whose offset is another's would let a small file stand for a large model."""
    at = tiny.index(b"blk.1.attn_norm.weight") + len(b"blk.1.attn_norm.weight") + 4 + 8 + 4
    raw = bytearray(tiny)
    raw[at : at + 8] = struct.pack("<Q", 0)
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(DataError, match="has no room for tensor"):
        GGUFFile.open(tmp_path / "m.gguf")
