"""`python -m uniproj verify PATH`: is P still the one that was trained on, and does the adapter fit a base model?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from uniproj.errors import AdapterError
from uniproj.exchange import bases
from uniproj.format.compatibility import check_layout, warn_of_another_base
from uniproj.format.file import locate, read
from uniproj.format.heads import check_heads, check_tokens
from uniproj.format.places import layout_on
from uniproj.format.remap import rename
from uniproj.format.tensors import check_numbers, check_shapes, shapes_of
from uniproj.registry import get
from uniproj.tuner.config import UniProjConfig
from uniproj.tuner.files import heads_by_new_names


def verify(
    path: str | Path,
    base: str | None = None,
    remap: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
) -> list[str]:
    """What was checked of a saved adapter, a sentence each.

    base: name or folder of a model, of which only the configuration is loaded; trust_remote_code: whether Python code
    that comes with it may run. Raises AdapterError for the first thing that does not hold.
    """
    saved = read(locate(path))
    header, said = saved.header, [f"{path}: the file is as it was written"]
    if header is None:
        raise AdapterError(
            f"{path}: verify needs a file with a header, got one from before format 1. Load it on the base model it "
            "was trained on and save it again."
        )
    renames, on_base = list((remap or {}).items()), []
    if renames:
        saved = replace(saved, config=rename(saved.config, header.layout, renames))
    if base is not None:
        config = UniProjConfig.of_saved(saved, path)
        bare = bases.load(base, config, weights=False, trust_remote_code=trust_remote_code)
        check_tokens(config.trainable_token_indices, bare)
        names = check_layout(header, layout_on(bare, config), config.remap or [])
        heads = check_heads(heads_by_new_names(saved.tensors, renames), bare, config.modules_to_save)
        warn_of_another_base(header, base, bare.config)
        on_base.append(f"{base} has its {len(names)} modules, with their shapes and ranks")
        if heads:
            rest = f" and {len(heads) - 3} more" if len(heads) > 3 else ""
            on_base.append(f"{base} has what is trained beside them, with its shapes: {', '.join(heads[:3])}{rest}")
    if get(header.projection).needs_base_weights:
        said.append(f"P is made of the base weights: its checksum {header.checksum[:12]}.. is checked on loading")
    else:
        P = header.build(where=str(path), on_base=base is not None)
        check_shapes(saved.tensors, shapes_of(P), header.projection)
        check_numbers(saved.tensors, header.projection, has_offset=P.offset is not None)
        said.append(f"P {P.shape} of {header.projection} has its checksum {header.checksum[:12]}..")
    return [*said, *on_base]
