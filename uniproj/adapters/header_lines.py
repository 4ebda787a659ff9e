"""How each field of a header is written as a line of text, and read."""

from __future__ import annotations

import base64
import json
import lzma
import zlib
from collections.abc import Callable
from typing import Any

from uniproj.adapters.schema import Lines, parse_json
from uniproj.layout import LoRALayout

# more than the Block list of any model; what unpacks to more was not written by us
_UNPACKED = 2**24
_MEMORY = 2**25
_LZMA = [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**20}]


def pack(value: Any) -> str:
    """JSON, packed by LZMA and base64: names that differ in a number take a byte or two each."""
    text = value.to_json() if isinstance(value, LoRALayout) else _dump(value)
    return base64.b64encode(lzma.compress(text.encode(), lzma.FORMAT_ALONE, filters=_LZMA)).decode()


def unpack(text: str) -> str:
    """What `pack` packed, or zlib, as format 1 did. Raises ValueError for anything else."""
    packed = base64.b64decode(text, validate=True)
    of_format_1 = packed[:1] == b"x"
    inflate: Any = zlib.decompressobj() if of_format_1 else lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_MEMORY)
    try:
        unpacked: bytes = inflate.decompress(packed, _UNPACKED)
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        raise ValueError(error) from None
    if not inflate.eof:
        raise ValueError("cut off, or too long")
    return unpacked.decode()


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


_JSON = (_dump, parse_json)
# what the values may be, `uniproj.adapters.schema.Lines` says
LINES: dict[str, tuple[Callable[[Any], str], Callable[[str], Any]]] = {
    **dict.fromkeys(Lines.model_fields, _JSON),
    "layout": (pack, lambda text: LoRALayout.from_json(unpack(text))),
    "settings": (pack, lambda text: parse_json(unpack(text))),
}
