"""attn_ext as an attention implementation of transformers, against eager attention, on small models."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

from attn_ext.integrations.transformers import attention_forward, check, register  # noqa: E402

VOCABULARY = 61
BATCH, LENGTH = 2, 13

DECODERS: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 2},
    "Mistral": {"num_key_value_heads": 2, "sliding_window": 5},
    "GPT2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "DeepseekV3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "first_k_dense_replace": 2,
    },
    "Gemma2": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "sliding_window": 5,
    },
    "GptOss": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 5,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
        "experts_implementation": "eager",  # the only one that takes float64
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
    "ModernBert": {"local_attention": 6, "global_attn_every_n_layers": 2},
}
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "T5": {"d_kv": 8, "d_ff": 32, "dropout_rate": 0.0, "num_decoder_layers": 2},
    "Bart": {
        "dropout": 0.0,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    },
}
HEADS = {"Bert": "ForMaskedLM", "ModernBert": "ForMaskedLM", "GPT2": "LMHeadModel"} | dict.fromkeys(
    ENCODER_DECODERS, "ForConditionalGeneration"
)
MODELS = {**DECODERS, **ENCODERS, **ENCODER_DECODERS}


def make_model(name: str, head: str = "", implementation: str = "attn_ext", **options: Any) -> Any:
    """A model of 2 layers of 4 heads with random weights, in float64."""
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        **{"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None},
        **({} if name in ("GPT2", "T5", "Bart", "Bloom") else {"intermediate_size": 48}),
        **options,
    )
    torch.manual_seed(1)
    model = getattr(transformers, name + (head or HEADS.get(name, "ForCausalLM")))._from_config(
        config, attn_implementation=implementation
    )
    # Larger than models start with, so that attention is far from uniform, and sinks from each other.
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
        elif parameter_name.endswith("sinks"):
            parameter.data.normal_()
    return model.double().eval()


def make_inputs(name: str, padding: str) -> tuple[dict[str, Tensor], Tensor]:
    """Token ids and masks, and which of the positions that have logits are not padding."""
    ids = torch.randint(2, VOCABULARY, (BATCH, LENGTH))
    is_token = torch.ones_like(ids)
    if padding == "left":
        is_token[0, :4] = 0
    elif padding == "right":
        is_token[1, -5:] = 0
    inputs = {"input_ids": ids * is_token}
    if padding != "none":
        inputs["attention_mask"] = is_token
    if name not in ENCODER_DECODERS:
        return inputs, is_token.bool()
    inputs["decoder_input_ids"] = torch.randint(2, VOCABULARY, (BATCH, LENGTH - 4))
    return inputs, torch.ones_like(inputs["decoder_input_ids"], dtype=torch.bool)


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


@pytest.fixture(autouse=True)
def precise_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention takes its softmax in float32, whatever the model's dtype: not so here."""
    softmax = torch.nn.functional.softmax

    def without_dtype(scores: Tensor, dim: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(scores, dim=dim)

    monkeypatch.setattr(torch.nn.functional, "softmax", without_dtype)


@pytest.fixture
def calls(registered: None) -> Iterator[list[dict[str, Any]]]:
    """What each call of the attention function was given, in order."""
    seen: list[dict[str, Any]] = []

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        seen.append({"query": query, "key": key, "value": value, "mask": mask, **kwargs})
        return attention_forward(module, query, key, value, mask, **kwargs)

    transformers.AttentionInterface.register("attn_ext", record)
    yield seen
    register()


def set_implementation(model: Any, implementation: str) -> None:
    """In all parts: the method of a T5 does not reach its encoder and decoder, whose configs are copies."""
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel):
            part.set_attn_implementation(implementation)
            assert part.config._attn_implementation == implementation


def run(model: Any, implementation: str, inputs: dict[str, Tensor], **options: Any) -> Any:
    set_implementation(model, implementation)
    return model(**inputs, **options)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_equal_eager(name: str, padding: str) -> None:
    model = make_model(name, **MODELS[name])
    check(model)
    inputs, is_token = make_inputs(name, padding)
    results = {}
    for implementation in ("eager", "attn_ext"):
        model.zero_grad()
        logits = run(model, implementation, inputs).logits[is_token]
        logits.square().mean().backward()
        results[implementation] = logits, {k: p.grad for k, p in model.named_parameters()}
    assert_equal(results["attn_ext"][0], results["eager"][0])
    for parameter_name, expected in results["eager"][1].items():
        assert_equal(results["attn_ext"][1][parameter_name], expected)
    of_scores = [k for k in results["eager"][1] if "relative_attention_bias" in k or k.endswith("sinks")]
    assert len(of_scores) == (2 if name in ("T5", "GptOss") else 0)
    for parameter_name in of_scores:
        assert results["eager"][1][parameter_name].abs().max() > 1e-4


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_generation_equals_eager(name: str, padding: str, cache: str, calls: list[dict[str, Any]]) -> None:
    model = make_model(name, **MODELS[name])
    inputs, _ = make_inputs(name, padding)
    inputs.pop("decoder_input_ids", None)
    options = {
        "max_new_tokens": 9,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    generated = {}
    for implementation in ("eager", "attn_ext"):
        set_implementation(model, implementation)
        assert not calls
        generated[implementation] = model.generate(
            **inputs, **options, cache_implementation=cache, decoder_start_token_id=1
        )
    assert calls
    assert len(generated["attn_ext"].logits) == 9
    assert torch.equal(generated["attn_ext"].sequences, generated["eager"].sequences)
    for logits, expected in zip(generated["attn_ext"].logits, generated["eager"].logits, strict=True):
        assert_equal(logits, expected)
    if (
        name == "Llama" and padding == "none" and cache == "static"
    ):  # a mask that is not there is aligned top-left
        assert calls[0]["mask"] is None
        assert calls[0]["key"].shape[2] > calls[0]["query"].shape[2] > 1


@pytest.mark.parametrize("name", [name for name in MODELS if name != "GPT2"])
def test_output_attentions_equal_eager(name: str) -> None:
    model = make_model(name, **MODELS[name])
    inputs, is_query = make_inputs(name, "right")
    if name in ENCODER_DECODERS:
        queries = {"encoder_attentions": inputs["attention_mask"].bool()}
        queries |= {"decoder_attentions": is_query, "cross_attentions": is_query}
    else:
        queries = {"attentions": is_query}
    with torch.no_grad():
        expected, actual = (run(model, i, inputs, output_attentions=True) for i in ("eager", "attn_ext"))
    for kind, is_token in queries.items():
        assert len(actual[kind]) == 2
        for weights, expected_weights in zip(actual[kind], expected[kind], strict=True):
            assert_equal(weights.transpose(1, 2)[is_token], expected_weights.transpose(1, 2)[is_token])


def test_gpt2_does_not_pass_output_attentions_on() -> None:
    model = make_model("GPT2", **MODELS["GPT2"])
    inputs, _ = make_inputs("GPT2", "none")
    assert run(model, "sdpa", inputs, output_attentions=True).attentions == ()
    assert run(model, "attn_ext", inputs, output_attentions=True).attentions == ()


def test_packed_sequences_equal_eager() -> None:
    model = make_model("Llama", **DECODERS["Llama"])
    ids = torch.randint(2, VOCABULARY, (1, 12))
    inputs = {"input_ids": ids, "position_ids": torch.tensor([[*range(5), *range(7)]])}
    packed = run(model, "attn_ext", inputs, use_cache=False).logits
    assert_equal(packed, run(model, "eager", inputs, use_cache=False).logits)
    assert_equal(packed[:, 5:], run(model, "attn_ext", {"input_ids": ids[:, 5:]}).logits)


def test_masks_of_the_caller_are_used() -> None:
    model = make_model("Llama", **DECODERS["Llama"])
    visible = torch.rand(BATCH, 1, LENGTH, LENGTH) < 0.5
    visible |= torch.eye(LENGTH, dtype=torch.bool)
    additive = torch.randn(visible.shape, dtype=torch.float64)
    additive.masked_fill_(~visible, torch.finfo(torch.float64).min)
    ids = torch.randint(2, VOCABULARY, (BATCH, LENGTH))
    inputs = {"input_ids": ids, "attention_mask": additive}
    assert_equal(run(model, "attn_ext", inputs).logits, run(model, "eager", inputs).logits)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Bart"])
def test_keys_are_not_repeated_and_outputs_not_copied(name: str, calls: list[dict[str, Any]]) -> None:
    model = make_model(name, **MODELS[name])
    run(model, "attn_ext", make_inputs(name, "none")[0])
    assert {call["key"].shape[1] for call in calls} == {4 if name == "Bart" else 2}
    for call in calls:
        arguments = {k: call.get(k) for k in ("query", "key", "value", "scaling", "softcap")}
        with (
            torch.no_grad(),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        ):
            out, _ = attention_forward(torch.nn.Module(), attention_mask=None, **arguments)
        assert out.is_contiguous()
        assert "aten::copy_" not in {event.name for event in profile.events()}


def test_register_returns_the_name_and_can_be_repeated() -> None:
    assert register() == register() == "attn_ext"
    assert register("another") == "another"
    model = make_model("Llama", implementation="another", **DECODERS["Llama"])
    check(model)
    inputs, _ = make_inputs("Llama", "left")
    logits = run(model, "another", inputs).logits
    assert torch.equal(logits, run(model, "attn_ext", inputs).logits)


@pytest.mark.parametrize("name", ["", "eager", "my_sdpa", "flash_attention_9", "paged|attn_ext", "me/attn"])
def test_register_rejects_reserved_names(name: str) -> None:
    with pytest.raises(ValueError, match="name must be a word that"):
        register(name)


def test_register_rejects_what_is_not_a_name() -> None:
    with pytest.raises(TypeError, match="name must be a str, got int"):
        register(3)


def test_missing_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", None)
    for call in (register, lambda: check(torch.nn.Module())):
        with pytest.raises(ImportError, match=r'pip install "transformers>=5"'):
            call()


def train(model: Any, inputs: dict[str, Tensor], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients of all parameters, of a step from this seed."""
    torch.manual_seed(seed)
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    logits.square().mean().backward()
    return logits.detach(), {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("Llama", "attention_dropout"),
        ("Bert", "attention_probs_dropout_prob"),
        ("GptOss", "attention_dropout"),
        ("T5", "dropout_rate"),
    ],
)
def test_training_with_dropout(name: str, option: str, calls: list[dict[str, Any]]) -> None:
    model = make_model(name, **MODELS[name] | {option: 0.5}).train()
    inputs, _ = make_inputs(name, "right")
    logits, gradients = train(model, inputs, seed=3)
    assert {call["dropout"] for call in calls} == {0.5}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert torch.equal(train(model, inputs, seed=3)[0], logits)
    assert not torch.allclose(train(model, inputs, seed=4)[0], logits)

    count = len(calls) // 3
    model.gradient_checkpointing_enable()
    again, checkpointed = train(model, inputs, seed=3)
    assert len(calls) == (3 + 2) * count
    assert torch.equal(again, logits)
    assert checkpointed.keys() == gradients.keys()
    for parameter_name, gradient in gradients.items():
        assert_equal(checkpointed[parameter_name], gradient)

    calls.clear()
    model.eval()(**inputs)
    assert {call["dropout"] for call in calls} == {0.0}


@pytest.mark.parametrize(
    ("name", "options"), [("Longformer", {"attention_window": 4}), ("BigBird", {}), ("Bloom", {})]
)
def test_check_rejects_models_that_never_ask(name: str, options: dict[str, Any]) -> None:
    model = make_model(name, "Model", **options)
    with pytest.raises(NotImplementedError, match=f"{name}Model computes its attention itself"):
        check(model)


def test_check_looks_at_each_part() -> None:
    encoder = make_model("Longformer", "Model", attention_window=4)
    decoder = make_model("Bert", "LMHeadModel", is_decoder=True, add_cross_attention=True)
    model = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config._attn_implementation = "attn_ext"
    with pytest.raises(NotImplementedError, match="LongformerModel computes its attention itself"):
        check(model)
    encoder.config._attn_implementation = "eager"
    check(model)


def test_check_rejects_parts_that_were_not_reached() -> None:
    model = make_model("T5", implementation="eager", **MODELS["T5"])
    model.set_attn_implementation("attn_ext")
    assert model.config._attn_implementation == "attn_ext"
    with pytest.raises(ValueError, match=r"parts of T5ForConditionalGeneration .*'eager' in T5Stack"):
        check(model)
    set_implementation(model, "attn_ext")
    check(model)


def test_check_rejects_other_models() -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM must be configured to attn_ext, got .*'eager'"):
        check(make_model("Llama", implementation="eager", **DECODERS["Llama"]))
    with pytest.raises(TypeError, match=r"model must be a transformers\.PreTrainedModel, got Linear"):
        check(torch.nn.Linear(2, 2))
