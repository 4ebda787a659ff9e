"""Mixed batches: each row gives what it gives alone; K users trained at once are K users trained one by one."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.bank.models import adapted
from tests.compatibility.quantised import quantised
from tests.tuner.models import TARGETS, base_model, batch, config
from uniproj import AdapterError
from uniproj.bank import mixed
from uniproj.tuner import adapter_of

ROWS = [1, 0, 1]


def _thetas(model: nn.Module, users: int = 2) -> torch.Tensor:
    d = adapter_of(model).P.d
    return torch.randn(users, d, generator=torch.Generator().manual_seed(5))


def _use(model: nn.Module, theta: torch.Tensor) -> None:
    with torch.no_grad():
        adapter_of(model).theta_d.copy_(theta)


def _inputs(kind: str, rows: int = 3) -> dict[str, torch.Tensor]:
    return {k: v for k, v in batch(kind, rows).items() if k != "labels"}


@pytest.mark.parametrize("projection, d", [("unilora", 60), ("fastfood", 60), ("vera", None), ("lora_xs", None)])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_each_row_gives_what_its_user_gives_alone(kind: str, projection: str, d: int | None) -> None:
    # BERT's head is no factor: one for all rows
    model = adapted(kind, projection, d)
    thetas, inputs = _thetas(model), _inputs(kind)
    with torch.no_grad():
        plain = model(**inputs).logits
        with mixed(model, thetas, ROWS):
            found = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, plain)
        for row, user in enumerate(ROWS):
            _use(model, thetas[user])
            alone = model(**{k: v[row : row + 1] for k, v in inputs.items()}).logits[0]
            torch.testing.assert_close(found[row], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-2)


def test_a_row_of_zeros_is_the_base_model() -> None:
    model, inputs = adapted(), _inputs("llama")
    thetas = _thetas(model)
    thetas[1] = 0
    with torch.no_grad(), mixed(model, thetas, ROWS):
        found = model(**inputs).logits
    base = base_model("llama")(**inputs).logits
    torch.testing.assert_close(found[[0, 2]], base[[0, 2]], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[1], base[1], atol=1e-2)


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_generation_with_a_cache_and_left_padding(inference, monkeypatch) -> None:
    model = adapted()
    ids = _inputs("llama")["input_ids"]
    lengths = [9, 5, 7]
    mask = torch.stack([torch.arange(9) >= 9 - n for n in lengths]).long()
    generation = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    projection = adapter_of(model).P
    calls = []
    original = type(projection)._matvec
    monkeypatch.setattr(
        type(projection), "_matvec", lambda self, x, dtype: calls.append(len(x)) or original(self, x, dtype)
    )
    with inference():
        thetas = _thetas(model) + 0.0
        with mixed(model, thetas, ROWS):
            found = model.generate(input_ids=ids * mask, attention_mask=mask, **generation)
    assert calls == [2]  # both users, once for all tokens
    for row, (user, n) in enumerate(zip(ROWS, lengths, strict=True)):
        _use(model, thetas[user])
        own = ids[row : row + 1, 9 - n :]
        alone = model.generate(input_ids=own, attention_mask=torch.ones_like(own), **generation)
        assert torch.equal(found[row, 9:], alone[0, n:])


def test_a_beam_search_takes_a_row_per_beam() -> None:
    model = adapted()
    thetas, inputs = _thetas(model), _inputs("llama", 2)
    generation = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    rows = torch.tensor([1, 0]).repeat_interleave(3)
    with mixed(model, thetas, rows):
        found = model.generate(**inputs, **generation)
    with mixed(model, thetas, [1, 0]), pytest.raises(AdapterError, match=r"per beam in a beam search"):
        model.generate(**inputs, **generation)
    for row, user in enumerate([1, 0]):
        _use(model, thetas[user])
        alone = model.generate(**{k: v[row : row + 1] for k, v in inputs.items()}, **generation)
        assert torch.equal(found[row, : alone.shape[1]], alone[0])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_k_users_trained_at_once_are_k_users_trained_alone(kind: str, checkpointing: bool) -> None:
    """SGD on the sum of the users' losses: the users share nothing, so each moves as it does alone."""
    users, rows = 3, [0, 1, 2, 0, 1, 2]
    data = batch(kind, len(rows))
    model = adapted(kind).train()
    starts = _thetas(model, users) * 0.1
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def loss(chosen: list[int]) -> torch.Tensor:
        mine = {k: v[chosen] for k, v in data.items()}
        logits = model(input_ids=mine["input_ids"], attention_mask=mine["attention_mask"]).logits
        return nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), mine["labels"][:, 1:].flatten(), reduction="sum"
        )

    together = nn.Parameter(starts.clone())
    optimizer = torch.optim.SGD([together], lr=1e-2)
    for _ in range(3):
        with mixed(model, together, rows):
            loss(list(range(len(rows)))).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert adapter_of(model).theta_d.grad is None

    theta_d = adapter_of(model).theta_d
    for user in range(users):
        _use(model, starts[user])
        optimizer = torch.optim.SGD([theta_d], lr=1e-2)
        for _ in range(3):
            loss([i for i, u in enumerate(rows) if u == user]).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert (theta_d - starts[user]).norm() > 1e-2 * starts[user].norm()
        torch.testing.assert_close(together[user], theta_d, rtol=1e-4, atol=1e-5)


def test_training_refuses_reentrant_checkpointing() -> None:
    model = adapted().train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    thetas = _thetas(model)
    with mixed(model, thetas, ROWS):
        model(**batch("llama")).loss.backward()  # vectors that are not trained have no graph
    message = r"`mixed` .*need the non-reentrant kind.*\"use_reentrant\": False"
    with mixed(model, nn.Parameter(thetas), ROWS), pytest.raises(AdapterError, match=message):
        model(**batch("llama"))


def test_two_steps_within_one_block() -> None:
    model = adapted().train()
    thetas = nn.Parameter(_thetas(model))
    gradients = []
    with mixed(model, thetas, ROWS):
        for _ in range(2):
            model(**batch("llama")).loss.backward()
            gradients.append(thetas.grad.clone())
            thetas.grad = None
            thetas.data.mul_(0.5)
    assert not torch.allclose(*gradients)


def test_bfloat16_autocast_and_quantised_dtypes_follow_the_tuner() -> None:
    model, inputs = adapted(), _inputs("llama")
    A = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    with torch.no_grad(), mixed(model, _thetas(model), ROWS), torch.autocast("cpu", dtype=torch.bfloat16):
        model(**inputs)
        assert A.weight.dtype == torch.bfloat16 and A.weight.shape == (3, 4, 32)


@pytest.mark.parametrize(
    "kind", ["bitsandbytes, 4 bits (NF4)", "bitsandbytes, 8 bits", "torchao, 8 bits", "HQQ, 8 bits", "AQLM"]
)
def test_rows_share_a_quantised_base(kind: str, tmp_path) -> None:
    model, inputs = get_peft_model(quantised(tmp_path, kind), config("llama")).eval(), _inputs("llama")
    thetas, alone = _thetas(model), []
    with torch.no_grad():
        with mixed(model, thetas, ROWS):
            found = model(**inputs).logits
        for theta in thetas:
            _use(model, theta)
            alone.append(model(**inputs).logits)
    wanted = torch.stack([alone[user][row] for row, user in enumerate(ROWS)])
    other = torch.stack([alone[1 - user][row] for row, user in enumerate(ROWS)])
    # the 8-bit layers of bitsandbytes round activations too, in which a last bit can move a whole step
    tolerance = 0.1 if kind == "bitsandbytes, 8 bits" else 1e-3
    assert (found - wanted).abs().max() < tolerance * (found - other).abs().max()


def test_blocks_nest_and_an_error_inside_leaves_the_model_as_it_was() -> None:
    model, inputs = adapted(), _inputs("llama")
    thetas = _thetas(model)
    with torch.no_grad():
        plain = model(**inputs).logits
        with mixed(model, thetas, [0, 0, 0]):
            outer = model(**inputs).logits
            with mixed(model, thetas, [1, 1, 1]):
                assert not torch.equal(model(**inputs).logits, outer)
            assert torch.equal(model(**inputs).logits, outer)
        message = r"rows of the batch, tokens, features\) = \(2, \.\., 32\), got \(3, 9, 32\)"
        with pytest.raises(AdapterError, match=message), mixed(model, thetas, [0, 1]):
            model(**inputs)
        assert torch.equal(model(**inputs).logits, plain)


def test_a_mixed_batch_is_not_merged() -> None:
    model = adapted()
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    before = weight.clone()
    with mixed(model, _thetas(model), ROWS):
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(AdapterError, match=r"merge: .*got a block of `mixed`.*Leave the block"):
                merge()
    assert torch.equal(weight, before)


class _TokensWithoutABatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(0, -2)).view_as(x)


def test_a_layer_that_sees_tokens_without_a_batch_axis_is_refused() -> None:
    model = get_peft_model(_TokensWithoutABatch(), config("llama", d=5, target_modules=["linear"], task_type=None))
    # as many tokens as rows: no size tells them apart
    with mixed(model, _thetas(model, 3), [0, 1, 2]), pytest.raises(AdapterError, match="without a batch axis"):
        model(torch.randn(3, 1, 8))


def test_images_keep_the_axes_between_batch_and_features() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), config("llama", d=5, target_modules=["0"], task_type=None))
    thetas, x = _thetas(model), torch.randn(2, 4, 5, 8)
    with torch.no_grad(), mixed(model, thetas, [1, 0]):
        found = model(x)
    for row, user in enumerate([1, 0]):
        _use(model, thetas[user])
        torch.testing.assert_close(found[row], model(x[row]), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_mixed_is_refused() -> None:
    model = adapted()
    thetas = _thetas(model)
    refused = {
        r"thetas must be floats of shape \(K, d\) = \(K, 60\), got torch.float32 of shape \(60,\)": (thetas[0], [0]),
        r"got torch.int64 of shape": (thetas.long(), [0]),
        r"rows must be integers in \[0, K\) = \[0, 2\)": (thetas, [0, 2]),
        r"got \[-1\]": (thetas, [-1]),
        r"got \[0\.5\]": (thetas, [0.5]),
        r"got \[\]": (thetas, []),
        r"got 'abc'\. Name the row": (thetas, "abc"),
        r"got None\. Name the row": (thetas, None),
        r"got \[\[0\], \[0, 1\]\]\. Name the row": (thetas, [[0], [0, 1]]),
        r"got \[1j\]\. Name the row": (thetas, [1j]),
        r"thetas must be one tensor of shape \(K, d\) = \(K, 60\), got a list\. Pass torch.stack": (list(thetas), [0]),
    }
    for message, arguments in refused.items():
        with pytest.raises(AdapterError, match=message), mixed(model, *arguments):
            pass
    with (
        model.disable_adapter(),
        pytest.raises(AdapterError, match="mixed: the adapter must be enabled"),
        mixed(model, thetas, ROWS),
    ):
        pass
    model.merge_adapter()
    with pytest.raises(AdapterError, match="mixed: the adapter must not be merged"), mixed(model, thetas, ROWS):
        pass
    model.unmerge_adapter()
    model.add_adapter("other", config("llama"))
    model.base_model.set_adapter(["default", "other"])
    message = r"one adapter must be active, got \['default', 'other'\]"
    with pytest.raises(AdapterError, match=message), mixed(model, thetas, ROWS):
        pass
    lora = get_peft_model(base_model("llama"), LoraConfig(r=2, target_modules=TARGETS["llama"]))
    with pytest.raises(AdapterError, match="must hold a uniproj adapter, got a LoraModel"), mixed(lora, thetas, ROWS):
        pass
