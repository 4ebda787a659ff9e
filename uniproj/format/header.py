"""`Header`: everything that makes P again, in the metadata of adapter_model.safetensors."""

from __future__ import annotations

import base64
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

import uniproj
from uniproj import limits
from uniproj.errors import AdapterError, ProjectionError
from uniproj.format import schema
from uniproj.format.fields import Configuration, Role, fields_of
from uniproj.format.keys import OF_P, THETA_D
from uniproj.format.patterns import of_sites
from uniproj.format.remap import new_names
from uniproj.format.tensors import shapes_without_P
from uniproj.layout import LoRALayout
from uniproj.projection import Projection
from uniproj.registry import build, get

# that of layouts of plain matrices, and the last one, which has words for stacks and axes
PLAIN_VERSION, FORMAT_VERSION = 3, 4
PREFIX = "uniproj."
_MEMORY = 2**25
_LZMA = [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**20}]
_COUNT = re.compile(r",\d+,\d+,\d+,(\d{1,18})\d*[\],]")  # of a stack, in a row of a layout
_ALTERED = "The file was altered: copy or download it again."


@dataclass(frozen=True)
class Header:
    """What the numbers of an adapter belong to.

    `layout` has the module names of the base that the adapter was trained on. `checksum` is that of the fresh P, before
    its own Parameters, if any, are trained. `settings` are the fields of the configuration that decide what the model
    computes, beyond P: alpha, ranks, targets, heads.
    """

    projection: str
    projection_version: int
    projection_kwargs: dict[str, Any]
    d: int
    projection_seed: int
    layout: LoRALayout
    checksum: str
    base_model: str | None = None
    base_revision: str | None = None
    base_quantisation: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    library_version: str = uniproj.__version__
    format_version: int = PLAIN_VERSION

    @classmethod
    def of(cls, config: Mapping[str, Any], projection: Projection, base: nn.Module | None = None) -> Header:
        """The header of an adapter that the fields of a configuration describe and `projection` makes.

        base: its name, revision and quantisation are noted where the configuration has none.
        """
        of_base = getattr(base, "config", None)
        checksum = config["projection_checksum"]
        if not checksum:  # of P before its Parameters are trained
            checksum = (projection.rebuild() if projection.learned else projection).checksum()
        return cls(
            projection=config["projection"],
            projection_version=projection.version,
            projection_kwargs=json.loads(json.dumps(config["projection_kwargs"])),
            d=projection.d,
            projection_seed=config["projection_seed"],
            layout=projection.layout,
            checksum=checksum,
            base_model=config["base_model_name_or_path"] or getattr(base, "name_or_path", None) or None,
            base_revision=config["revision"] or getattr(of_base, "_commit_hash", None),
            base_quantisation=quantisation(of_base),
            settings=beyond_P(config),
            format_version=format_of(projection.layout),
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What makes the updates s B A out of theta_d, so that two adapters of equal identity share P and scale.

        The scale of an aLoRA, which is 0 before its invocation tokens, includes these.
        """
        scales = list(self.scales.values())
        scale = scales[0] if len(set(scales)) == 1 else scales
        tokens = self.settings.get("alora_invocation_tokens")
        return {
            "projection": self.projection,
            "projection_version": self.projection_version,
            "projection_kwargs": self.projection_kwargs,
            "projection_seed": self.projection_seed,
            "d": self.d,
            "layout_fingerprint": self.layout.fingerprint,
            "scale": scale if tokens is None else [scale, tokens],
            "checksum": self.checksum,
        }

    @property
    def scales(self) -> dict[str, float]:
        """s of every site, by its name in `layout`: alpha / r, or alpha / sqrt(r) under use_rslora."""
        given, names = self.settings, new_names(self.layout, self.settings.get("remap") or [])
        alphas = of_sites("alpha_pattern", given.get("alpha_pattern"), names.values(), given.get("lora_alpha"))
        found = {}
        for site in self.layout.sites:
            alpha = alphas[names[site.name]]
            found[site.name] = scale(site.rank if alpha is None else alpha, site.rank, given.get("use_rslora"))
        return found

    def to_metadata(self) -> dict[str, str]:
        """One line of text per field: JSON, or packed JSON for the two long ones."""
        lines = {f"{PREFIX}{f.name}": _LINES[f.name][0](getattr(self, f.name)) for f in fields(self)}
        return {**lines, f"{PREFIX}layout_fingerprint": self.layout.fingerprint}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], where: str = "adapter") -> Header | None:
        """The header in a file's metadata, or None for a file without one, as uniproj wrote before format 1.

        Raises AdapterError for a header of a later format, for a field that is missing or not as uniproj writes it, and
        for a Block list that does not have the fingerprint beside it.
        """
        if not any(key.startswith(PREFIX) for key in metadata):
            return None
        _check_format(metadata, where)
        values = {}
        for f in fields(cls):
            text = metadata.get(f"{PREFIX}{f.name}")
            limits.check("config_bytes", len(text or ""), f"the letters of the header's {f.name}", where)
            try:
                values[f.name] = _LINES[f.name][1]("" if text is None else text)
            except AdapterError as error:
                raise AdapterError(f"{where}: the header's {f.name}: {error}") from None
            except (ValueError, TypeError, RecursionError) as error:
                got = "none" if text is None else repr(text[:40])
                raise AdapterError(
                    f"{where}: the header's {f.name} must be what uniproj wrote, got {got} ({error}). {_ALTERED}"
                ) from None
        schema.check(schema.Lines, values, f"{where}: the header's ", _ALTERED)
        schema.check(Configuration, values["settings"], f"{where}: the header's ", _ALTERED)
        header = cls(**values)
        if max(header.format_version, PLAIN_VERSION) != (needed := format_of(header.layout)):
            raise AdapterError(
                f"{where}: the header's format_version must be {needed}, that of its Block list, got "
                f"{header.format_version}. {_ALTERED}"
            )
        saved, found = metadata.get(f"{PREFIX}layout_fingerprint"), header.layout.fingerprint
        if saved != found:
            raise AdapterError(
                f"{where}: the header's Block list must have the fingerprint {str(saved)[:12]}.., got {found[:12]}... "
                f"{_ALTERED}"
            )
        return header

    def check_version(self, where: str = "adapter") -> None:
        """Raises AdapterError for a projection that this library does not know, or computes differently now."""
        try:
            version = get(self.projection).version
        except ProjectionError as error:
            raise AdapterError(f"{where}: {error} {_remedy_for_name(self.projection)}") from None
        if version != self.projection_version:
            raise AdapterError(
                f"{where}: {self.projection} must be of version {version}, as uniproj {uniproj.__version__} makes it, "
                f"got version {self.projection_version}, another P. Install uniproj {self.library_version}."
            )

    def shapes(self, tensors: Mapping[str, Tensor], where: str = "adapter") -> dict[str, torch.Size]:
        """The trained tensors of the file, by their names there, without making P.

        tensors: those of the file; the numbers of a learned P that does not tell their shapes are taken as they are.
        Raises AdapterError for a d or hyperparameters that the method refuses.
        """
        with self._refused(where):
            cls = get(self.projection)
            cls.check_d(self.layout, self.d)
            own = cls.parameter_shapes(self.layout, self.d, **self.projection_kwargs)
            if own is None:
                return shapes_without_P(tensors, self.projection, self.d)
            return {THETA_D: torch.Size([self.d])} | {f"{OF_P}{name}": torch.Size(own[name]) for name in own}

    def check_cost(self, where: str = "adapter", on_base: bool = False) -> None:
        """Raises AdapterError for a D beyond `limits.rows`, and for a P that takes more numbers than `limits.draws`.

        on_base: whether a base model is known to have the modules of `layout`: a D up to the count of their weights is
        then never too large.
        """
        of_base = sum(out * in_ for out, in_ in self.layout.shapes().values()) if on_base else 0
        limits.check("rows", self.layout.D, "D", where, also=of_base)
        with self._refused(where):
            draws = get(self.projection).draws(self.layout, self.d, **self.projection_kwargs)
        limits.check("draws", draws, f"the random numbers that {self.projection} takes", where)

    def build(
        self, base_weights: Mapping[str, Tensor] | None = None, where: str = "adapter", on_base: bool = False
    ) -> Projection:
        """P, on the CPU, checked against version and checksum.

        base_weights: W (out, in) by the module names of `layout`, for methods made of them. on_base: see `check_cost`.
        Raises AdapterError for another version or checksum, for hyperparameters that the method refuses, and beyond
        `limits`. A P whose Parameters lie on the meta device (`low_cpu_mem_usage`) has no numbers to check yet.
        """
        self.check_version(where)
        self.check_cost(where, on_base)
        options = dict(self.projection_kwargs)
        if get(self.projection).needs_base_weights:
            if base_weights is None:
                raise AdapterError(
                    f"{where}: {self.projection} is made of the base model's weights, got none. Pass the base model."
                )
            options["base_weights"] = base_weights
        with self._refused(where):
            P = build(self.projection, layout=self.layout, d=self.d, seed=self.projection_seed, **options)
        if not any(p.is_meta for p in P.parameters()) and (found := P.checksum()) != self.checksum:
            made_of = "other base weights" if base_weights is not None else "another P"
            raise AdapterError(
                f"{where}: P must have the checksum {self.checksum[:12]}.., got {found[:12]}..: {made_of}. Load it "
                f"on the base model (and dtype) it was trained on, with uniproj {self.library_version}, which wrote it."
            )
        return P

    @contextmanager
    def _refused(self, where: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a method raises for hyperparameters that it does not know
            raise AdapterError(f"{where}: P cannot be made from its header: {error}") from error

    def difference(self, other: Header) -> str | None:
        """The first entry of `identity` in which `other` differs, as a clause, or None."""
        for key, mine in self.identity.items():
            if (theirs := other.identity[key]) != mine:
                if key == "scale":
                    key, mine, theirs = self._setting_of_the_scale(other, mine, theirs)
                return f"{key} must be {_short(mine)}, got {_short(theirs)}"
        return None

    def _setting_of_the_scale(self, other: Header, mine: Any, theirs: Any) -> tuple[str, Any, Any]:
        """The setting that makes two scales differ, and its two values; the scales themselves where several do it."""
        for key in fields_of(Role.SCALE):
            if self.settings.get(key) != other.settings.get(key):
                return key, self.settings.get(key), other.settings.get(key)
        return "scale", mine, theirs


def beyond_P(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that decide what the model computes, beyond P, as JSON gives them back."""
    kept_apart = fields_of(Role.P, Role.BASE, Role.STATE)
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return json.loads(json.dumps({key: value for key, value in plain.items() if key not in kept_apart}))


def format_of(layout: LoRALayout) -> int:
    """The version of the format in which a layout is written."""
    return PLAIN_VERSION if all(site.is_plain for site in layout.sites) else FORMAT_VERSION


def scale(alpha: float, r: int, use_rslora: bool | None) -> float:
    """s of delta W = s B A: alpha / r, or alpha / sqrt(r) under use_rslora."""
    return alpha / (r**0.5 if use_rslora else r)


def quantisation(config: Any) -> str | None:
    """`bitsandbytes 4-bit nf4` and the like, from the base model's configuration; None for plain weights."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    given = dict(found) if isinstance(found, Mapping) else found.to_dict()
    method = str(getattr(given.get("quant_method"), "value", given.get("quant_method") or "quantised"))
    bits = 4 if given.get("load_in_4bit") else 8 if given.get("load_in_8bit") else given.get("bits")
    kind = given.get("bnb_4bit_quant_type") if given.get("load_in_4bit") else None
    return " ".join([method, *([f"{bits}-bit"] if bits else []), *([str(kind)] if kind else [])])


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:16]}..{text[-1]}"


def _remedy_for_name(name: str) -> str:
    if any(mark in name for mark in "/\\:") or name.endswith(".py"):
        return "A file names a projection, never a path; code that an adapter brings along is not run."
    return "Import or install the package that registers it."


def _check_format(metadata: Mapping[str, str], where: str) -> None:
    version = metadata.get(f"{PREFIX}format_version", "")
    if version.isdecimal() and len(version) < 9 and int(version) > FORMAT_VERSION:
        raise AdapterError(
            f"{where}: the format must be at most {FORMAT_VERSION}, got {version} (written by uniproj "
            f"{metadata.get(f'{PREFIX}library_version', 'of a later version')}). Install that version."
        )


# ---- the lines ------------------------------------------------------------------------------------


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
    limits.check("modules", rows.count("[") - 1 + sum(map(int, _COUNT.findall(rows))), "modules", "rows")
    return LoRALayout.from_json(rows)


_JSON = (_dump, schema.parse_json)
# `schema.Lines` says what the values may be
_LINES: dict[str, tuple[Callable[[Any], str], Callable[[str], Any]]] = {
    **dict.fromkeys(schema.Lines.model_fields, _JSON),
    "layout": (pack, _layout),
    "settings": (pack, lambda text: schema.parse_json(unpack(text, "config_bytes"))),
}
