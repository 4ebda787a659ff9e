"""Options of PEFT's LoRA that change where s B A acts: replicated layers, aLoRA, tied embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.variants import ALoraLinearVariant
from torch import Tensor, nn

from tests.tuner.models import TARGETS, base_model, batch, config, logits, train_steps
from uniproj import AdapterError
from uniproj.bank import mixed
from uniproj.exchange import export, from_peft, import_adapter
from uniproj.exchange.verify import verify
from uniproj.format.file import read
from uniproj.tuner import adapter_of

SPANS = [[0, 2], [1, 2]]
INVOCATION = [7, 8]


def of_peft(base: nn.Module, ours: PeftModel, **fields: Any) -> PeftModel:
    """PEFT's own LORA on a base model, with the A and B that `ours` has."""
    given = {"r": 4, "lora_alpha": 4, "target_modules": TARGETS["llama"], "task_type": "CAUSAL_LM", **fields}
    model = get_peft_model(base, LoraConfig(**given)).eval()
    P, theta_d = adapter_of(ours)
    with torch.no_grad():
        for block, factor in zip(P.layout.blocks, P.layout.split(P(theta_d)), strict=True):
            layer = model.base_model.model.get_submodule(block.module)
            if hasattr(layer, "lora_embedding_A") and len(layer.lora_embedding_A):
                getattr(layer, f"lora_embedding_{block.factor}")["default"].copy_(factor)
            else:
                getattr(layer, f"lora_{block.factor}")["default"].weight.copy_(factor)
    return model


def moved(model: PeftModel) -> PeftModel:
    """With a theta_d that is no start."""
    with torch.no_grad():
        theta_d = adapter_of(model).theta_d
        theta_d.copy_(torch.linspace(-0.5, 0.5, len(theta_d)))
    return model.eval()


def near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


def gradient_by_peft(ours: PeftModel, theirs: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    """P^T of the gradient that PEFT's LORA has on A and B."""
    theirs(**inputs).loss.backward()
    P = adapter_of(ours).P
    found = torch.zeros(P.D)
    for block, view in zip(P.layout.blocks, P.layout.split(found), strict=True):
        layer = theirs.base_model.model.get_submodule(block.module)
        if hasattr(layer, "lora_embedding_A") and len(layer.lora_embedding_A):
            view.copy_(getattr(layer, f"lora_embedding_{block.factor}")["default"].grad)
        else:
            view.copy_(getattr(layer, f"lora_{block.factor}")["default"].weight.grad)
    return P.adjoint(found)


def test_replicated_layers_have_factors_of_their_own_and_compute_as_in_peft() -> None:
    model = moved(get_peft_model(base_model("llama"), config("llama", layer_replication=SPANS)))
    names = {block.module.split(".")[2] for block in adapter_of(model).P.layout.blocks}
    assert names == {"0", "1", "2"} and model.config.num_hidden_layers == 3
    theirs = of_peft(base_model("llama"), model, layer_replication=SPANS)
    near(logits(model), logits(theirs))
    model(**batch("llama")).loss.backward()
    near(adapter_of(model).theta_d.grad, gradient_by_peft(model, theirs, batch("llama")))
    weights = [sum(p.numel() for p in base.parameters()) for base in (model.get_base_model(), base_model("llama"))]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("projection", ["unilora", "lora_xs"])
def test_an_adapter_of_replicated_layers_is_saved_loaded_verified_and_exported(tmp_path: Path, projection: str) -> None:
    base_model("llama").save_pretrained(tmp_path / "base")
    d = None if projection == "lora_xs" else 60
    model = get_peft_model(base_model("llama"), config("llama", projection, d, layer_replication=SPANS))
    train_steps(model, "llama")
    model.eval().save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(PeftModel.from_pretrained(base_model("llama"), tmp_path / "ours")), logits(model))
    assert "its 9 modules" in verify(tmp_path / "ours", str(tmp_path / "base"))[-1]
    export(tmp_path / "ours", tmp_path / "lora", base=str(tmp_path / "base"))
    near(logits(PeftModel.from_pretrained(base_model("llama"), tmp_path / "lora")), logits(model))
    with pytest.raises(AdapterError, match="vLLM has no layer_replication"):
        export(tmp_path / "ours", tmp_path / "vllm", "vllm", base=str(tmp_path / "base"))


def test_a_base_in_memory_is_replicated_and_stays_as_it_was(tmp_path: Path) -> None:
    model = moved(get_peft_model(base_model("llama"), config("llama", "lora_xs", None, layer_replication=SPANS)))
    model.save_pretrained(tmp_path / "ours")
    base = base_model("llama")
    layers = list(base.model.layers)
    export(tmp_path / "ours", tmp_path / "lora", base=base)
    assert list(base.model.layers) == layers and base.config.num_hidden_layers == 2
    near(logits(PeftModel.from_pretrained(base, tmp_path / "lora")), logits(model))
    base = base_model("llama")
    del base.model.layers[1]
    with pytest.raises(AdapterError, match=r"base: must have the layers of layer_replication = \[\[0, 2\], \[1, 2\]\]"):
        export(tmp_path / "ours", tmp_path / "lora", base=base)


def test_replicated_layers_are_merged_where_each_has_a_weight_of_its_own() -> None:
    once = moved(get_peft_model(base_model("llama"), config("llama", layer_replication=[[1, 2], [0, 1]])))
    before = logits(once)
    near(logits(once.merge_and_unload()), before)
    twice = moved(get_peft_model(base_model("llama"), config("llama", layer_replication=SPANS)))
    with pytest.raises(AdapterError, match=r"merge: the weight of model.layers.1.* must be its own, got one that is"):
        twice.merge_adapter()


def test_all_adapters_of_a_model_share_its_replicated_layers() -> None:
    model = get_peft_model(base_model("llama"), config("llama", layer_replication=SPANS))
    model.add_adapter("same", config("llama", layer_replication=[tuple(span) for span in SPANS], init_seed=1))
    assert len(model.base_model.model.model.layers) == 3
    for other in (None, [[0, 2]]):
        with pytest.raises(AdapterError, match=r"layer_replication must be as the model's first adapter has it"):
            model.add_adapter("other", config("llama", layer_replication=other))
    plain = get_peft_model(base_model("llama"), config("llama"))
    with pytest.raises(AdapterError, match=r"layer_replication must be as the model's first adapter has it.*None"):
        plain.add_adapter("other", config("llama", layer_replication=SPANS))


@pytest.mark.parametrize("change", [{"d": 10**6}, {"layer_replication": [[0, 3]]}, {"target_modules": ["none"]}])
def test_a_refused_replication_leaves_the_base_as_it_was(change: dict[str, Any]) -> None:
    base = base_model("llama")
    layers, before = list(base.model.layers), logits(base)
    with pytest.raises((AdapterError, ValueError)):
        get_peft_model(base, config("llama", **{"layer_replication": SPANS, **change}))
    assert list(base.model.layers) == layers and base.config.num_hidden_layers == 2
    assert torch.equal(logits(base), before)


@pytest.mark.parametrize("spans", [[], [[1, 1]], [[2, 1]], [[-1, 1]], [[0]], [[0, 10**6]], [[0, 600]] * 2, "0-2"])
def test_spans_of_layers_are_checked_before_any_is_copied(spans: Any) -> None:
    with pytest.raises(AdapterError, match="layer_replication must be a list of pairs"):
        config("llama", layer_replication=spans)


def invoked() -> dict[str, Tensor]:
    """A batch of which row 0 has the invocation twice, row 1 at its end, and row 2 not at all."""
    inputs = batch("llama")
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == INVOCATION[0], 1)
    ids[0, 1:3] = ids[0, 4:6] = ids[1, 7:] = torch.tensor(INVOCATION)
    return {**inputs, "input_ids": ids, "labels": ids}


def of_invoked(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**invoked()).logits


def test_alora_adds_the_update_from_the_last_invocation_on_and_learns_as_in_peft() -> None:
    model = moved(get_peft_model(base_model("llama"), config("llama", alora_invocation_tokens=INVOCATION)))
    plain, found = of_invoked(base_model("llama")), of_invoked(model)
    assert torch.equal(found[0, :4], plain[0, :4]) and torch.equal(found[1, :7], plain[1, :7])
    assert torch.equal(found[2], plain[2]) and not torch.equal(found[0, 4:], plain[0, 4:])
    theirs = of_peft(base_model("llama"), model, alora_invocation_tokens=INVOCATION)
    near(found, of_invoked(theirs))
    model(**invoked()).loss.backward()
    near(adapter_of(model).theta_d.grad, gradient_by_peft(model, theirs, invoked()))


def test_alora_with_checkpointing_has_the_same_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = moved(get_peft_model(base_model("llama"), config("llama", alora_invocation_tokens=INVOCATION))).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**invoked()).loss.backward()
        gradients.append(adapter_of(model).theta_d.grad)
    near(*gradients)


def test_alora_generates_as_in_peft() -> None:
    model = moved(get_peft_model(base_model("llama"), config("llama", alora_invocation_tokens=INVOCATION)))
    theirs = of_peft(base_model("llama"), model, alora_invocation_tokens=INVOCATION)
    inputs = {key: value for key, value in invoked().items() if key != "labels"}
    sampling = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **sampling), theirs.generate(**inputs, **sampling))


def test_an_alora_is_saved_loaded_and_exported_with_its_invocation(tmp_path: Path) -> None:
    model = moved(get_peft_model(base_model("llama"), config("llama", alora_invocation_tokens=INVOCATION)))
    model.save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(base_model("llama"), tmp_path / "ours")
    assert torch.equal(of_invoked(again), of_invoked(model))
    export(tmp_path / "ours", tmp_path / "lora")
    near(of_invoked(PeftModel.from_pretrained(base_model("llama"), tmp_path / "lora")), of_invoked(model))
    for to, who in (("vllm", "vLLM"), ("unilora", "UNILORA")):
        with pytest.raises(AdapterError, match=f"{who} has no alora_invocation_tokens"):
            export(tmp_path / "ours", tmp_path / to, to)
    get_peft_model(base_model("llama"), config("llama")).save_pretrained(tmp_path / "plain")
    headers = [read(tmp_path / name).header for name in ("ours", "plain")]
    assert headers[0].difference(headers[1]) == "alora_invocation_tokens must be [7, 8], got null"


def test_numbers_of_an_alora_are_not_taken_for_those_of_another_or_of_a_plain_adapter() -> None:
    makes = [config("llama", alora_invocation_tokens=tokens) for tokens in (INVOCATION, [7], None)]
    models = [get_peft_model(base_model("llama"), given) for given in makes]
    for other in models[1:]:
        with pytest.raises(AdapterError, match=r"must be as that of the state dict: scale must be another"):
            other.load_state_dict(models[0].state_dict())
    models[0].load_state_dict(models[0].state_dict())


def test_what_an_alora_cannot_do_is_refused_in_a_sentence() -> None:
    model = moved(get_peft_model(base_model("llama"), config("llama", alora_invocation_tokens=INVOCATION)))
    before = of_invoked(model)
    with pytest.raises(AdapterError, match="must get s B A at every token"):
        model.merge_adapter()
    thetas = torch.ones(2, adapter_of(model).P.d)
    with (
        pytest.raises(AdapterError, match="mixed: an adapter must act on every token"),
        mixed(model, thetas, [0, 1, 0]),
    ):
        pass
    assert torch.equal(of_invoked(model), before)
    for tokens in ([], [-1], "ab"):
        with pytest.raises(AdapterError, match="alora_invocation_tokens must be a list of one or more"):
            config("llama", alora_invocation_tokens=tokens)


def test_a_layer_that_drops_an_alora_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ALoraLinearVariant, "forward", staticmethod(lambda *_, result, **__: result))
    with pytest.raises(AdapterError, match="output or gradient stayed 0"):
        get_peft_model(base_model("llama"), config("llama", alora_invocation_tokens=INVOCATION))


TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    "wanted", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"], r".*(embed_tokens|lm_head|q_proj)"], ids=str
)
def test_tied_embeddings_share_the_A_and_B_of_one_site(wanted: Any, tmp_path: Path) -> None:
    fields = {"target_modules": wanted, "ensure_weight_tying": True, "lora_alpha": 8}
    model = moved(get_peft_model(base_model("llama", **TIED), config("llama", **fields)))
    sites = [site.name for site in adapter_of(model).P.layout.sites]
    assert sites == ["model.embed_tokens", *(f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))]
    theirs = of_peft(base_model("llama", **TIED), model, **fields)  # whose lm_head shares the memory of both factors
    near(logits(model), logits(theirs))

    model(**batch("llama")).loss.backward()
    base = base_model("llama", **TIED)  # by hand: one weight W + s (B A)^T for both
    P, theta_d = adapter_of(model)
    theta = theta_d.detach().clone().requires_grad_()
    factors = P.layout.split(P(theta))
    updates = {f"{name}.weight": 2.0 * factors[2 * i] @ factors[2 * i + 1] for i, name in enumerate(sites)}
    updates["model.embed_tokens.weight"] = updates["model.embed_tokens.weight"].T
    weights = {name: weight.detach() + updates.get(name, 0.0) for name, weight in base.named_parameters()}
    out = torch.func.functional_call(base, weights, kwargs=batch("llama"), tie_weights=True)
    near(out.logits.detach(), logits(model))
    out.loss.backward()
    near(theta_d.grad, theta.grad)

    base_model("llama", **TIED).save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(PeftModel.from_pretrained(base_model("llama", **TIED), tmp_path / "ours")), logits(model))
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(AdapterError, match="every module must have an A and a B of its own"):
        import_adapter(tmp_path / "theirs", tmp_path / "imported")
    assert "its 3 modules" in verify(tmp_path / "ours", str(tmp_path / "base"))[-1]


def test_a_second_adapter_of_tied_embeddings_is_tied_too_and_leaves_the_first() -> None:
    fields = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    model = moved(get_peft_model(base_model("llama", **TIED), config("llama", **fields)))
    before = logits(model)
    model.add_adapter("other", config("llama", init_seed=1, **fields))
    model.set_adapter("other")
    head, embedding = model.base_model.model.lm_head, model.base_model.model.model.embed_tokens
    model(**batch("llama"))
    assert torch.equal(head.lora_A["other"].weight, embedding.lora_embedding_B["other"].T)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base_model("llama", **TIED)))
    model.set_adapter("default")
    assert torch.equal(logits(model), before)
    model.delete_adapter("other")
    assert torch.equal(logits(model), before) and "other" not in head.lora_A


@torch.no_grad()
def test_tied_embeddings_in_a_mixed_batch_and_rows_that_the_output_cannot_tell_apart() -> None:
    fields = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    model = get_peft_model(base_model("llama", **TIED), config("llama", **fields)).eval()
    theta_d, ids = adapter_of(model).theta_d, batch("llama")["input_ids"]
    thetas = torch.randn(2, len(theta_d), generator=torch.Generator().manual_seed(0))
    with mixed(model, thetas, [1, 0, 1]):
        found = model(ids).logits
        for hidden in (torch.ones(3, 32), torch.ones(1, 2, 32)):
            with pytest.raises(AdapterError, match=r"embed_tokens must get \(rows .*features\) = \(3, \.\., 32\)"):
                model.base_model.model.lm_head(hidden)
    for row, user in enumerate([1, 0, 1]):
        theta_d.copy_(thetas[user])
        near(found[row], model(ids[row : row + 1]).logits[0])


def test_tied_embeddings_that_are_saved_whole_or_merged_are_refused() -> None:
    fields = {"ensure_weight_tying": True}
    with pytest.raises(AdapterError, match="modules_to_save must hold no embedding that is tied"):
        get_peft_model(base_model("llama", **TIED), config("llama", modules_to_save=["lm_head"], **fields))
    model = moved(get_peft_model(base_model("llama", **TIED), config("llama", target_modules=["lm_head"], **fields)))
    with pytest.raises(AdapterError, match=r"merge: the weight of model.embed_tokens must be its own"):
        model.merge_adapter()


def test_tied_embeddings_are_exported_as_peft_scales_them(tmp_path: Path) -> None:
    fields = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    model = moved(get_peft_model(base_model("llama", **TIED), config("llama", lora_alpha=8, **fields)))
    export(model, tmp_path / "lora")
    near(logits(PeftModel.from_pretrained(base_model("llama", **TIED), tmp_path / "lora")), logits(model))
    patterns = {"alpha_pattern": {"embed_tokens": 16}, "rank_pattern": {"q_proj": 2}}
    model = moved(get_peft_model(base_model("llama", **TIED), config("llama", **patterns, **fields)))
    with pytest.raises(AdapterError, match="export: of a tied output embedding PEFT takes the rank and alpha that"):
        export(model, tmp_path / "none")
    export(model, tmp_path / "padded", rank=4)
    near(logits(PeftModel.from_pretrained(base_model("llama", **TIED), tmp_path / "padded")), logits(model))


def test_tied_factors_of_peft_are_no_projection() -> None:
    fields = {"r": 4, "target_modules": ["embed_tokens"], "ensure_weight_tying": True, "task_type": "CAUSAL_LM"}
    model = get_peft_model(base_model("llama", **TIED), LoraConfig(**fields))
    with pytest.raises(AdapterError, match="from_peft: every module must have an A and a B of its own, got lm_head"):
        from_peft(model)
