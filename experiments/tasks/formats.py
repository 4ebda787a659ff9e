"""Rows as a file holds them: what is written as text stays text, whatever it looks like."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import pandas as pd

Line = tuple[int, list[str]]
# a field that csv writes around quotes, which it doubles
_QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')
NUMBER = re.compile(r"-?[0-9]{1,300}(\.[0-9]+)?([eE][-+]?[0-9]{1,2})?")
CODE = re.compile(r"-?0[0-9]+")
# a text may be a whole document
csv.field_size_limit(2**31 - 1)


def _read_jsonl(path: Path) -> pd.DataFrame:
    """One object per line. Raises ValueError that names the line for anything else."""
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no object but a {type(row).__name__}")
            rows.append(row)
    return pd.DataFrame(rows)


def read_csv(path: Path) -> pd.DataFrame:
    """Comma-separated values (RFC 4180): quotes stand around a whole field, and are doubled inside.

    All fields are texts but `label`, and an empty one is a missing value: "NA" is a text. Raises ValueError that names
    the line for stray quotes and for lines of another length than the header.
    """
    return _table(_unquoted(_text(path), ","))


def read_tsv(path: Path) -> pd.DataFrame:
    """Tab-separated values (IANA): every line is a row, and a quote is a character like any other.

    pandas and spreadsheets write such files as csv with tabs. That shows in a quoted header, in doubled quotes within
    quotes, or in lines of unequal length: then quotes are read as in csv. The rest is as in `read_csv`.
    """
    text = _text(path)
    ended = enumerate((line.removesuffix("\r") for line in text.split("\n" if "\n" in text else "\r")), 1)
    lines = [(number, line.split("\t")) for number, line in ended if line]
    is_quoted = any(_QUOTED.fullmatch(field) for _, fields in lines for field in fields if field.startswith('"'))
    if is_quoted or text.startswith('"') or len({len(fields) for _, fields in lines}) > 1:
        with suppress(ValueError):  # then the lines themselves say what is wrong with them
            rows = _unquoted(text, "\t")
            # where a stray quote opened a field, whole rows would be in it
            if not any("\t" in field and "\n" in field for _, fields in rows for field in fields):
                return _table(rows)
    return _table(lines)


def _text(path: Path) -> str:
    """UTF-8, with a byte order mark or without."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"text that is not UTF-8 ({error})") from error


def _unquoted(text: str, delimiter: str) -> list[Line]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        return [(reader.line_num, fields) for fields in reader if fields]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error


def _table(lines: list[Line]) -> pd.DataFrame:
    if not lines:
        return pd.DataFrame()
    (_, names), *rows = lines
    if len(set(names)) < len(names):
        raise ValueError(f"columns of one name: {names}")
    for number, fields in rows:
        if len(fields) != len(names):
            raise ValueError(f"{len(fields)} fields in line {number} under a header of {len(names)}")
    table = pd.DataFrame([fields for _, fields in rows], columns=names, dtype=str)
    table = table.mask(table == "")
    return table.assign(label=_labels(table["label"])) if "label" in table else table


def _labels(fields: pd.Series) -> pd.Series:
    """What labels are, which alone have no type in such a file: 3 and 0.5 are numbers, without spaces around them.

    Where one is written with a leading zero, they are codes and all of them texts. So is what merely can be read as a
    number: inf, 1_2, other scripts' digits.
    """
    bare = fields.map(lambda field: field.strip() if isinstance(field, str) else field).astype(object)
    texts = bare.dropna()
    if texts.map(CODE.fullmatch).any():
        return bare
    return bare.map(_number_or_text)


def _number_or_text(label: str | float) -> str | float:
    if isinstance(label, str) and NUMBER.fullmatch(label):
        return float(label) if set(label) & set(".eE") else int(label)
    return label


FORMATS: Mapping[str, Callable[[Path], pd.DataFrame]] = {
    ".jsonl": _read_jsonl,
    ".tsv": read_tsv,
    ".parquet": pd.read_parquet,
    ".csv": read_csv,
}
