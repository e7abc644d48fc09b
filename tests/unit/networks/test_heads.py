"""Reductions of logits a part at a time, against whole logits and autograd."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaletrain.config import AdapterSpec
from scaletrain.networks import causal_lm, heads
from scaletrain.networks._states import before_head, reduce_with
from scaletrain.networks.adapters import add_adapter
from scaletrain.networks.heads import CrossEntropy, Head, judged, reduce, takes_reduction

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {"model_type": "llama", "intermediate_size": 32, "num_key_value_heads": 2, **SIZES}
PLACES, WIDTH, VOCABULARY = 37, 8, 50
IDS = torch.arange(24).view(2, 12)
LEARNED = torch.tensor([1, 2, 5, 11, 12, 13, 20])


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 5 places: the last has fewer."""
    monkeypatch.setitem(heads.ELEMENTS, "cpu", 5 * VOCABULARY)
    monkeypatch.setattr(heads, "_FEWEST", 1)


def network(**config: Any) -> Any:
    torch.manual_seed(0)
    module = causal_lm.build(causal_lm.Config(**{**LLAMA, **config}))
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.5)
    return module.eval()


def by_autograd(logits: Tensor, targets: Tensor, smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """The cross-entropy of whole logits, as torch has it."""
    z = logits.exp().sum(-1).log().square().sum()
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing) + z_loss * z


def gradients(module: nn.Module, *more: Tensor) -> list[Tensor]:
    found = [t.grad for t in (*module.parameters(), *more) if t.grad is not None]
    for tensor in (*module.parameters(), *more):
        tensor.grad = None
    return found


def assert_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor], error: float) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=error, atol=error * float(b.abs().max()))


def capped(logits: Tensor) -> Tensor:
    return 2 * torch.tanh(logits / 2)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [None, capped])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.1), (0.2, 0.1)])
def test_gradients_equal_those_of_whole_logits(
    dtype: torch.dtype, error: float, bias: bool, shape: Any, smoothing: float, z_loss: float
) -> None:
    torch.manual_seed(0)
    head = Head(WIDTH, VOCABULARY, bias=bias, dtype=dtype)
    hidden = (3 * torch.randn(PLACES, WIDTH, dtype=dtype)).requires_grad_()
    targets = torch.randint(VOCABULARY, (PLACES,))
    logits = head(hidden) if shape is None else shape(head(hidden))
    expected = by_autograd(logits, targets, smoothing, z_loss)
    (3 * expected).backward()
    theirs = gradients(head, hidden)

    def generic(logits: Tensor, targets: Tensor) -> Tensor:
        return by_autograd(logits, targets, smoothing, z_loss)[None]

    for reduction in (CrossEntropy(smoothing, z_loss), generic):
        sums = head(hidden, reduction, (targets,), shape=shape)
        assert float(sums.detach()[0]) == pytest.approx(float(expected.detach()), rel=error)
        (3 * sums[0]).backward()
        assert_equal(gradients(head, hidden), theirs, error)
    with torch.no_grad():
        sums = head(hidden, CrossEntropy(smoothing, z_loss), (targets,), shape=shape)
    plain = F.cross_entropy(logits.detach(), targets, reduction="sum")
    assert_equal([sums], [torch.stack([expected.detach(), plain])], error)


@pytest.mark.parametrize("shape", [None, capped])
def test_values_of_tokens_are_differentiable(shape: Any) -> None:
    torch.manual_seed(0)
    head = Head(WIDTH, VOCABULARY, dtype=torch.float64)
    hidden = torch.randn(PLACES, WIDTH, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(VOCABULARY, (PLACES,)), torch.rand(PLACES)

    def log_p(logits: Tensor, targets: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)

    logits = head(hidden) if shape is None else shape(head(hidden))
    expected = log_p(logits, targets)
    (expected.square() * weights).sum().backward()
    theirs = gradients(head, hidden)
    values = head(hidden, log_p, (targets,), per_token=True, shape=shape)
    assert_equal([values.detach()], [expected.detach()], 1e-10)
    (values.square() * weights).sum().backward()
    assert_equal(gradients(head, hidden), theirs, 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_with_whole_logits(dtype: torch.dtype) -> None:
    """At a scale of the loss that would overflow fp16, and with probabilities that it has no numbers for."""
    torch.manual_seed(0)
    head = Head(64, 5000)
    hidden = torch.randn(PLACES, 64, requires_grad=True)
    targets = torch.randint(5000, (PLACES,))
    F.cross_entropy(head(hidden), targets, reduction="sum").backward()
    theirs = gradients(head, hidden)
    with torch.autocast("cpu", dtype):
        sums = head(hidden, CrossEntropy(), (targets,))
    assert sums.dtype == torch.float32
    scale = 1.001 * 2**17
    with torch.autocast("cpu", dtype):  # whole logits, with a scale that does not overflow
        logits = head(hidden).float()
    (F.cross_entropy(logits, targets, reduction="sum") * 64).backward()
    whole = [g / 64 for g in gradients(head, hidden)]
    (sums[0] * scale).backward()
    ours = [g / scale for g in gradients(head, hidden)]
    for a, b, exact in zip(ours, whole, theirs, strict=True):
        assert a.dtype == torch.float32
        assert (a - exact).norm() <= 1.5 * (b - exact).norm() + 1e-7 * exact.norm()


def test_a_frozen_matrix_gets_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    head = Head(WIDTH, VOCABULARY).requires_grad_(False)
    hidden = torch.randn(PLACES, WIDTH, requires_grad=True)
    monkeypatch.setattr(heads, "_add_product", None)
    head(hidden, CrossEntropy(), (torch.zeros(PLACES, dtype=torch.long),))[0].backward()
    assert hidden.grad is not None
    assert head.weight.grad is None


def test_an_evaluation_makes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    monkeypatch.setattr(heads, "_differentiate", None)
    targets = IDS.flatten()[LEARNED]
    with torch.no_grad():
        loss, right = reduce(model, {"input_ids": IDS}, LEARNED, judged, [targets])
        logits = model(input_ids=IDS).logits.flatten(0, 1)[LEARNED]
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits, targets, reduction="sum")), rel=1e-5)
    assert int(right) == int((logits.argmax(-1) == targets).sum())


@pytest.mark.parametrize("per_token", [False, True])
def test_nothing_learned_reaches_every_weight(per_token: bool) -> None:
    model = network(tie_word_embeddings=False)

    def nothing(logits: Tensor, targets: Tensor) -> Tensor:
        return logits.sum(-1)

    none = LEARNED[:0]
    found = reduce(model, {"input_ids": IDS}, none, nothing if per_token else CrossEntropy(), [none], per_token)
    assert found.shape == ((0,) if per_token else (2,))
    found.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


CAP, GEMMA = 3.0, {"head_dim": 8, "num_key_value_heads": 1}
SHAPED = {
    "gemma2": {"model_type": "gemma2", "final_logit_softcapping": CAP, **GEMMA},
    "gemma3": {"model_type": "gemma3_text", "final_logit_softcapping": CAP, **GEMMA},
    "cohere": {"model_type": "cohere", "logit_scale": 0.3, "eos_token_id": 1, "bos_token_id": 0},
    "granite": {"model_type": "granite", "logits_scaling": 7.0},
    "phi": {"model_type": "phi"},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("name", SHAPED)
def test_whole_networks(name: str) -> None:
    """Loss and every gradient, whatever follows the matrix."""
    model = network(**SHAPED[name])
    for p in model.get_output_embeddings().parameters():
        p.data.mul_(4)  # so that a cap would be seen
    targets = IDS.flatten()[LEARNED]
    expected = by_autograd(model(input_ids=IDS).logits.flatten(0, 1)[LEARNED], targets)
    expected.backward()
    theirs = gradients(model)
    sums = reduce(model, {"input_ids": IDS}, LEARNED, CrossEntropy(), [targets])
    sums[0].backward()
    assert model.agrees
    assert float(sums.detach()[0]) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert_equal(gradients(model), theirs, 2e-5)


def test_a_network_with_a_way_of_its_own_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    plain = type(model).__mro__[2].forward

    def louder(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, *args, **kwargs)
        found.logits = found.logits * 1.5
        return found

    model.__class__ = heads._reducing_class(type("Louder", (type(model).__mro__[2],), {"forward": louder}))
    targets = IDS.flatten()[LEARNED]
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            sums = reduce(model, {"input_ids": IDS}, LEARNED, CrossEntropy(), [targets])
    assert caplog.text.count("makes logits in a way of its own") == 1
    assert torch.equal(torch.get_rng_state(), state)
    expected = by_autograd(model(input_ids=IDS).logits.flatten(0, 1)[LEARNED], targets)
    assert float(sums.detach()[0]) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model_type": "bert", "is_decoder": True},
        {"model_type": "recurrent_gemma", "logits_soft_cap": 2.0, "num_hidden_layers": 3, "use_cache": False},
    ],
)
def test_distillation_finds_it_out_too(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """A head with layers before its matrix, and one whose logits are capped under a name of its own."""
    torch.manual_seed(0)
    sizes = {"intermediate_size": 32, **SIZES} if options else LLAMA
    own = causal_lm.build(causal_lm.Config(**{**sizes, **options})).eval()
    with torch.no_grad():
        for p in own.parameters():
            p.normal_(0, 0.5)
    models = [heads.reducing(copy.deepcopy(own)) for _ in range(2)]
    expected = own(input_ids=IDS).logits.flatten(0, 1)[LEARNED].detach()
    with torch.no_grad():
        values, logits_of, _ = before_head(models[0], {"input_ids": IDS}, LEARNED)
        torch.testing.assert_close(logits_of(values), expected)
    targets = IDS.flatten()[LEARNED]
    sums, states = reduce_with(models[1], {"input_ids": IDS}, LEARNED, judged, [targets], ["hidden_states"])
    torch.testing.assert_close(sums.detach(), judged(expected, targets))
    assert len(states["hidden_states"]) > SIZES["num_hidden_layers"]
    assert caplog.text.count("makes logits in a way of its own") == 2 * bool(options)


def adapted(**options: Any) -> Any:
    return add_adapter(network(), AdapterSpec.model_validate({"type": "lora", "r": 2, **options}))


def test_under_adapters() -> None:
    targets = IDS.flatten()[LEARNED]
    cases = {
        "frozen": adapted(targets=["q_proj"]),
        "trained": adapted(targets=["q_proj"], train_also=["lm_head"]),
        "adapted": adapted(targets=["q_proj", "lm_head"]),
    }
    for name, model in cases.items():
        for p in model.parameters():
            p.data = p.data + 0.1 * torch.rand_like(p)
        by_autograd(model(input_ids=IDS).logits.flatten(0, 1)[LEARNED], targets).backward()
        theirs = gradients(model)
        reduce(model, {"input_ids": IDS}, LEARNED, CrossEntropy(), [targets])[0].backward()
        assert_equal(gradients(model), theirs, 2e-5)
        assert takes_reduction(model) == (name != "adapted")


def test_a_prompt_s_adapter_adds_no_places() -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(network(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    wrapped = nn.ModuleDict({"module": model})
    assert not takes_reduction(model)
    assert not takes_reduction(wrapped)
    targets = IDS.flatten()[LEARNED]
    sums = reduce(model, {"input_ids": IDS}, LEARNED, CrossEntropy(), [targets])
    expected = by_autograd(model(input_ids=IDS).logits[:, 3:].flatten(0, 1)[LEARNED], targets)
    assert float(sums.detach()[0]) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_it_stays_what_it_was() -> None:
    model = network()
    again = copy.deepcopy(model)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert isinstance(again.lm_head, Head)
    assert torch.equal(again.generate(IDS, max_new_tokens=3), model.generate(IDS, max_new_tokens=3))


def test_noise() -> None:
    """Uniform, as wide as asked for at each place, from torch's generator, and in what the layers see."""
    model = network(hidden_size=64)
    seen: list[Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    noise = torch.tensor([[4.0] * 12, [1.0] * 6 + [0.0] * 6])

    def run(**more: Any) -> Tensor:
        torch.manual_seed(1)
        reduce(model, {"input_ids": IDS, **more}, LEARNED, judged, [LEARNED])
        return seen[-1]

    run()
    added = run(noise=noise) - run()
    assert torch.equal(run(noise=noise) - run(), added)
    scaled = added[noise > 0] / (noise[noise > 0] / 8)[:, None]
    assert not added[noise == 0].any()
    assert float(scaled.abs().max()) == pytest.approx(1, abs=0.01)
    assert float(scaled.abs().max()) <= 1 + 1e-5
    assert float(scaled.mean()) == pytest.approx(0, abs=0.06)
    assert float(scaled.square().mean()) == pytest.approx(1 / 3, abs=0.03)
