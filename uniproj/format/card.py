"""README.md of what goes to the Hub: the fields that the Hub reads, then what a header says, in words.

Pure text. A fact that is not known has no line, and the name of a place on this machine is never told.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, EvalResult, ModelCardData, RepoCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from uniproj.claims import Measurement
from uniproj.errors import AdapterError, printable, shown
from uniproj.format.disk import exists
from uniproj.format.header import Header
from uniproj.format.keys import HEADS
from uniproj.registry import get

CARD, TAG = "README.md", "uniproj"
_HUB = "https://huggingface.co"
# what is quoted as code, which Markdown leaves alone, or a letter by which a link, picture, tag or code could begin
_MARKUP = re.compile(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)|[\\<\[`]")
_SIGNED = re.compile(r"(.*)\n<!-- uniproj wrote this card: (\w{16})\. [^\n]*-->\n", re.DOTALL)
# PEFT's types of tasks: the class of Transformers that loads a base, and the Hub's word
_TASKS: Mapping[Any, tuple[str, str]] = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "text2text-generation"),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
}
_MOST_NAMES = 8


# ---- any card -------------------------------------------------------------------------------------


def page(data: CardData, title: str, sections: Mapping[str, str | None]) -> str:
    """A whole card: what the Hub reads, a title, each section that there is under its heading ("" has none), and a last
    line by which `is_ours` knows it again."""
    parts = [f"## {heading}\n\n{text}" if heading else text for heading, text in sections.items() if text]
    text = "\n\n".join([f"---\n{data.to_yaml()}\n---", f"# {printable(title)}", *parts]) + "\n"
    return f"{text}\n<!-- uniproj wrote this card: {_digest(text)}. Once you change it, it is never written over. -->\n"


def is_ours(text: str) -> bool:
    """Whether a card is as `page` made it, so that another may take its place."""
    found = _SIGNED.fullmatch(text)
    return found is not None and found[2] == _digest(found[1])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; integers are shown with commas, other numbers with five digits."""
    lines = (heads, ["---"] * len(heads), *rows)
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def facts(known: Mapping[str, object]) -> str:
    """A table of two columns, of the facts that are known."""
    return table(("", ""), [(name, value) for name, value in known.items() if value is not None and value != ""])


def code(*lines: str) -> str:
    """Lines of Python."""
    return "\n".join(("```python", *lines, "```"))


def quoted(value: object) -> str:
    """A text of anybody's as code, whatever letters it has."""
    text = printable(value)
    marks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{marks} {text} {marks}" if "`" in text else f"{marks}{text}{marks}"


def plain(value: object) -> str:
    """A text of anybody's as words, in which nothing but what is quoted means anything to Markdown."""
    return _MARKUP.sub(lambda found: found[0] if found[1] else f"\\{found[0]}", printable(value))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return f"{value:,}" if type(value) is int else plain(value).replace("|", "\\|")


# ---- names ----------------------------------------------------------------------------------------


def public(name: str | None) -> str | None:
    """The name of a repository on the Hub; None for a place on this machine, which may tell who its user is."""
    if not name or exists(Path(name)):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def published(header: Header, base_model: str | None = None) -> Header:
    """A header as strangers get it: with the name of its base on the Hub, given or its own, or with none."""
    if base_model is not None:
        check_name(base_model, "base_model")
    return replace(header, base_model=base_model or public(header.base_model))


def check_name(name: str, what: str) -> None:
    """Raises AdapterError unless this may be the name of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise AdapterError(
            f"{what} must be the name of a repository on the Hub, such as user/name, got {shown(name)}: {error}"
        ) from None


def without_place(text: str, name: str | None) -> str:
    """A card of somebody else without the place of a base model on this machine, which PEFT and Trainer write there."""
    if not name or public(name):
        return text
    last = Path(name).name

    def words(text: str) -> str:
        return text.replace(f"[{name}]({_HUB}/{name})", last).replace(name, last)

    if not text.startswith("---"):
        return words(text)
    try:
        card = RepoCard(text)
    except Exception:  # metadata that are no YAML, or no object: errors of two libraries
        return words(text)
    known = card.data.to_dict()
    if name not in text and _without(known, name) == known:  # YAML may break a name into lines
        return text
    card.data, card.text = CardData(**_without(known, name)), words(card.text)
    return str(card)


def _without(value: Any, name: str) -> Any:
    """Metadata without a place: None for the place itself and for a tag of it, which no list keeps."""
    if isinstance(value, Mapping):
        return {key: _without(each, name) for key, each in value.items()}
    if isinstance(value, list):
        kept = [found for each in value if (found := _without(each, name)) is not None]
        return kept if kept or not value else None
    if not isinstance(value, str) or name not in value:
        return value
    is_base = value == name or (value.startswith("base_model:") and value.endswith(f":{name}"))
    return None if is_base else value.replace(name, Path(name).name)


# ---- an adapter, and a bank of many ---------------------------------------------------------------


def of_adapter(
    header: Header,
    fields: Mapping[str, Any],
    repo: str,
    trained: int,
    *,
    title: str | None = None,
    labels: int | None = None,
    beside: Mapping[str, Sequence[int]] | None = None,
    size: int | None = None,
    measured: Mapping[str, Measurement | None] | None = None,
    results: Sequence[EvalResult] = (),
    sections: Mapping[str, str] | None = None,
    tags: Sequence[str] = (),
) -> str:
    """The card of one adapter.

    fields: of its configuration; repo: where it loads from; trained: numbers of theta_d and P; labels: those of a
    classifier, else told by its head; beside: shapes of what is trained besides, such as a head, by name; size: bytes
    of the file; measured: the claims of P, each with None where P is too large to decide it; results and sections: what
    is known of its training.
    """
    beside = beside or {}
    heads = sum(math.prod(shape) for shape in beside.values())
    also = f", and {heads:,} beside P: {_listed(name.removeprefix(HEADS) for name in beside)}" if heads else ""
    matrices = [shape for name, shape in beside.items() if name.endswith(".weight") and len(shape) == 2]
    labels = labels or min((shape[0] for shape in matrices), default=None)
    title = title or repo.rpartition("/")[2]
    data = ModelCardData(
        base_model=header.base_model,
        library_name="peft",
        pipeline_tag=_TASKS.get(fields.get("task_type"), (None, None))[1],
        tags=[TAG, header.projection, *tags],
        model_name=title if results else None,
        eval_results=list(results) or None,
    )
    of_P = _of_P(header) | {
        "trained": f"{trained:,} numbers{also}",
        "file": None if size is None else f"{size:,} bytes",
    }
    return page(
        data,
        title,
        {
            "": f"An adapter that trains one short vector: {_sentence(header)}",
            "Method": facts(of_P),
            "Claims of P": _claims(measured),
            **(sections or {}),
            "How to load it": loading(fields, repo, header, labels),
        },
    )


def of_bank(
    header: Header, repo: str, count: int, size: int, measured: Mapping[str, Measurement | None] | None = None
) -> str:
    """The card of a bank of `count` adapters in `size` bytes. None of their names is on it."""
    each = {
        "adapters": count,
        "bytes of an adapter": 4 * header.d,
        "bytes of the bank": size,
    }
    lines = code(
        "from huggingface_hub import snapshot_download",
        "from uniproj.bank import AdapterBank",
        f'bank = AdapterBank(snapshot_download("{repo}"))  # to read: bank.backup(FOLDER) makes one to write',
        'bank.export(bank.names()[0], "adapter")  # a folder for PeftModel.from_pretrained; or, for a model with',
        "bank.select(model, bank.names()[0])  # an adapter of this P: another user's numbers in its place",
    )
    return page(
        ModelCardData(base_model=header.base_model, library_name=TAG, tags=[TAG, header.projection, "adapter-bank"]),
        repo.rpartition("/")[2],
        {
            "": f"A bank of adapters, each one short vector of the same P: {_sentence(header)}",
            "Bank": facts(each),
            "Method": facts(_of_P(header)),
            "Claims of P": _claims(measured),
            "How to load it": lines,
        },
    )


def loading(fields: Mapping[str, Any], repo: str, header: Header, labels: int | None = None) -> str:
    """Five lines of Python that load an adapter on its base; four where the base has no name that others know."""
    lines = of_peft(fields, repo, header.base_model, header.base_revision, labels)
    return code("import uniproj  # PEFT then knows the method UNIPROJ: pip install uniproj", *lines)


def of_peft(
    fields: Mapping[str, Any], repo: str, base: str | None, revision: str | None, labels: int | None
) -> list[str]:
    """The lines that load an adapter of any method that PEFT knows. labels: those of a classifier."""
    kind, known = _class_of(fields), ""
    if base and kind:
        options = [f"revision={json.dumps(revision)}"] if revision else []
        # the base may have a head of another size, in whose place that of the adapter comes
        of_labels = labels and kind.endswith("Classification")
        options += [f"num_labels={labels}, ignore_mismatched_sizes=True"] if of_labels else []
        known = f"base = {kind}.from_pretrained({', '.join([json.dumps(base), *options])})"
    return [
        "from peft import PeftModel",
        *([f"from transformers import {kind}", known] if known else ["base = ...  # the model that it was trained on"]),
        f"model = PeftModel.from_pretrained(base, {json.dumps(repo)})",
    ]


def _class_of(fields: Mapping[str, Any]) -> str | None:
    """The class of Transformers that loads a base."""
    of_task = _TASKS.get(fields.get("task_type"))
    mapped = given if isinstance(given := fields.get("auto_mapping"), Mapping) else {}
    name, library = str(mapped.get("base_model_class")), str(mapped.get("parent_library"))
    own = name if library.startswith("transformers.") and name.isidentifier() else None
    return of_task[0] if of_task else own


def _sentence(header: Header) -> str:
    d, D, cls, base = header.d, header.layout.D, get(header.projection), header.base_model
    where = f" of [{base}]({_HUB}/{base})" if base else ""
    # the numbers of P that are trained, of which a learned one may have none
    of_P = cls.parameter_shapes(header.layout, d, **header.projection_kwargs)
    made = "P itself is trained" if of_P != {} else "P is made again from the base's weights"
    made = made if of_P != {} or cls.needs_base_weights else "P is made again from its seed and is in no file"
    c = "" if "linear" in cls.claims else " + c"
    return (
        f"theta_D = P theta_d{c}, where the {D:,} numbers of LoRA's factors{where} are made out of d = {d:,} "
        f"by {quoted(header.projection)}. {made}."
    )


def _of_P(header: Header) -> dict[str, object]:
    """What a header says of P and of where it acts."""
    cls, sites = get(header.projection), header.layout.sites
    ranks, scales = sorted({site.rank for site in sites}), sorted(set(header.scales.values()))
    kinds = _listed(dict.fromkeys(site.name.rpartition(".")[2] for site in sites))
    version = f"version {header.projection_version} ({cls.source or 'no source given'})"
    return {
        "method": f"{quoted(header.projection)}, {version}",
        "formula": quoted(cls.formula) if cls.formula else None,
        "d, D": f"{header.d:,}, {header.layout.D:,}: 1 to {header.layout.D / header.d:.4g}",
        "hyperparameters": quoted(json.dumps(header.projection_kwargs)) if header.projection_kwargs else None,
        "seed of P": str(header.projection_seed),
        "adapted": f"{len(header.layout.modules):,} modules: {kinds}",
        "rank": _listed(map(str, ranks)),
        "scale of the update": _listed(f"{scale:.4g}" for scale in scales),
        "base model": header.base_model,
        "revision": header.base_revision and quoted(header.base_revision),
        "quantisation": header.base_quantisation and quoted(header.base_quantisation),
        "written by": f"uniproj {quoted(header.library_version)}",
        "checksum of P": quoted(header.checksum[:16]),
    }


def _claims(measured: Mapping[str, Measurement | None] | None) -> str | None:
    if measured is None:
        return None
    said = {
        claim: "claimed by the method, not decided for this P"
        if found is None
        else f"{'holds' if found.holds else 'does not hold'}: {found.what} = {found.value:.2g}"
        for claim, found in measured.items()
    }
    return table(("claim", "this P"), [(quoted(claim), what) for claim, what in said.items()])


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    rest = f" and {len(found) - _MOST_NAMES} more" if len(found) > _MOST_NAMES else ""
    return ", ".join(map(quoted, found[:_MOST_NAMES])) + rest
