"""GGUF files that are not what their header says: each is a sentence, before a library follows the header."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from experiments import models
from experiments.errors import ExperimentError
from experiments.models import gguf_header

# after magic and version: how many tensors and fields
COUNTS = 8
NAME = b"token_embd.weight"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A whole file, of a model with one block."""
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    for add in (writer.add_block_count, writer.add_head_count, writer.add_head_count_kv):
        add(1)
    for add in (writer.add_context_length, writer.add_feed_forward_length, writer.add_embedding_length):
        add(32)
    writer.add_vocab_size(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c", "d"])
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _at(data: bytes, place: int, number: int, size: int = 8) -> bytes:
    return data[:place] + number.to_bytes(size, "little") + data[place + size :]


def _after(data: bytes, text: bytes) -> int:
    return data.index(text) + len(text)


def _fields(data: bytes, *added: bytes) -> bytes:
    """The file with these fields before its own."""
    (fields,) = struct.unpack("<Q", data[COUNTS + 8 : COUNTS + 16])
    return _at(data, COUNTS + 8, fields + len(added))[: COUNTS + 16] + b"".join(added) + data[COUNTS + 16 :]


def _list(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<Q", 1) + b"x" + struct.pack("<IIQ", 9, kind, count) + values


MALFORMED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "an empty one"),
    "a header that is cut off": (lambda data: data[:20], "an entry of 8 bytes in its header where 4 are left"),
    "fields that are cut off": (lambda data: data[: _after(data, b"llama.block") + 2], "10 fields in the 66 bytes"),
    "another magic": (lambda data: b"GGML" + data[4:], "other bytes at its start"),
    "version 99": (lambda data: _at(data, 4, 99, 4), "version 99"),
    "the other order of bytes": (lambda data: data[:4] + data[7:3:-1] + data[8:], "version 50331648"),
    "2^60 tensors": (lambda data: _at(data, COUNTS, 2**60), f"{2**60} tensors in the"),
    "2^60 fields": (lambda data: _at(data, COUNTS + 8, 2**60), f"{2**60} fields in the"),
    "a text of 2^60 letters": (lambda data: _at(data, COUNTS + 16, 2**60), f"an entry of {2**60} bytes"),
    "a list of 2^60 bytes": (lambda data: _fields(data, _list(0, 2**60)), f"{2**60} values in the"),
    "a list of 2^60 texts": (lambda data: _fields(data, _list(8, 2**60)), f"{2**60} values in the"),
    "a list of 5 million bytes": (
        lambda data: _fields(data, _list(0, 5 * 10**6, bytes(5 * 10**6))),
        "more than 4194304",
    ),
    "lists of lists": (lambda data: _fields(data, _list(9, 1, struct.pack("<IQ", 9, 1) * 5000)), "unknown type 9"),
    "an unknown type of field": (lambda data: _fields(data, _list(13, 1)), "a field of the unknown type 13"),
    "a thousand million blocks": (
        lambda data: _at(data, _after(data, b"llama.block_count") + 4, 10**9, 4),
        "1000000000 blocks of 1 tensors",
    ),
    "2^30 dimensions": (lambda data: _at(data, _after(data, NAME), 2**30, 4), "a tensor of 1073741824 dimensions"),
    "a tensor of 2^60 numbers": (lambda data: _at(data, _after(data, NAME) + 4, 2**60), "tensors of"),
    "an unknown quantisation": (
        lambda data: _at(data, _after(data, NAME) + 20, 99, 4),
        "a tensor of the unknown type 99",
    ),
    "an offset beyond the end": (
        lambda data: _at(data, _after(data, NAME) + 24, 2**40),
        "tensors of 1099511628288 bytes",
    ),
    "tensors that are cut off": (lambda data: data[:-64], "where 448 are left"),
}


def test_a_whole_file_is_read(path: Path) -> None:
    assert models.model_config(str(path)).hidden_size == 32


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_a_sentence(name: str, path: Path) -> None:
    change, got = MALFORMED[name]
    path.write_bytes(change(path.read_bytes()))
    tracemalloc.start()
    try:
        with pytest.raises(
            ExperimentError, match=f"model.gguf must be a whole GGUF file, got .*{got}.*Download it again"
        ):
            gguf_header.check(path)
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()
    for read in (models.model_config, models.load_tokenizer, lambda path: models.load_causal(models.BaseModel(path))):
        with pytest.raises(ExperimentError, match="must be a whole GGUF file"):
            read(str(path))


def test_what_a_library_cannot_read_in_a_whole_file_is_a_sentence_too(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b"llama", b"nolla"))
    with pytest.raises(ExperimentError, match=r"must be one of .* got: "):
        models.model_config(str(path))
