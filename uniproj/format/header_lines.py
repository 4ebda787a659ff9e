"""How each field of a header is written as a line of text, and read."""

from __future__ import annotations

import base64
import json
import lzma
import zlib
from collections.abc import Callable
from typing import Any

from uniproj import limits
from uniproj.format.schema import Lines, parse_json
from uniproj.layout import LoRALayout

_MEMORY = 2**25
_LZMA = [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**20}]


def pack(value: Any) -> str:
    """JSON, packed by LZMA and base64: names that differ in a number take a byte or two each."""
    text = value.to_json() if isinstance(value, LoRALayout) else _dump(value)
    return base64.b64encode(lzma.compress(text.encode(), lzma.FORMAT_ALONE, filters=_LZMA)).decode()


def unpack(text: str, limit: str) -> str:
    """What `pack` packed, or zlib, as format 1 did. Raises ValueError for anything else, and beyond a limit's bytes."""
    packed = base64.b64decode(text, validate=True)
    of_format_1 = packed[:1] == b"x"
    inflate: Any = zlib.decompressobj() if of_format_1 else lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_MEMORY)
    try:
        unpacked: bytes = inflate.decompress(packed, getattr(limits, limit) + 1)
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        raise ValueError(error) from None
    limits.check(limit, len(unpacked), "the bytes it unpacks to", "packed")
    if not inflate.eof:
        raise ValueError("cut off")
    return unpacked.decode()


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _layout(text: str) -> LoRALayout:
    rows = unpack(text, "header_bytes")
    limits.check("modules", rows.count("[") - 1, "modules", "rows")
    return LoRALayout.from_json(rows)


_JSON = (_dump, parse_json)
# what the values may be, `uniproj.format.schema.Lines` says
LINES: dict[str, tuple[Callable[[Any], str], Callable[[str], Any]]] = {
    **dict.fromkeys(Lines.model_fields, _JSON),
    "layout": (pack, _layout),
    "settings": (pack, lambda text: parse_json(unpack(text, "config_bytes"))),
}
