"""Compares the policy with transformers' own model after loading, so that a wrong import of a model is noticed.

Up to `WHOLE_LIMIT` parameters: log-probs and entropies of a few hundred tokens under a float32 model on the CPU. Above:
the outputs of the first two layers. At any size: the settings of position encoding and attention of every layer.

Shapes: N rows, S positions, H hidden width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from echorl_nemo.engines.megatron.context import whole_sequences
from echorl_nemo.engines.megatron.model import PolicyModel
from echorl_nemo.engines.megatron.model_settings import (
    AttentionSettings,
    attention_settings,
    megatron_window,
    rotary_embeddings,
)
from echorl_nemo.engines.megatron.scorer import MegatronScorer
from echorl_nemo.errors import SharedError
from echorl_nemo.rollout.batch import RolloutBatch
from echorl_nemo.schema import ModelConfig

WHOLE_LIMIT = 2e9
"""Number of parameters above which only the first layers are compared. A float32 copy takes 4 bytes a parameter."""
ROWS, POSITIONS, LAYERS = 4, 96, 2
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.15}
"""Largest allowed mean absolute difference of log-probs and entropies, nats. A wrong position encoding costs tenths of
a nat or more."""
HIDDEN_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Largest allowed norm of the difference of hidden states, relative to their norm."""


def check_model(
    scorer: MegatronScorer, config: ModelConfig, prompts: Sequence[tuple[int, ...]], *, limit: float = WHOLE_LIMIT
) -> str:
    """Compare the model of ``scorer`` with transformers' model at `model.path`; return a sentence about the result.

    ``prompts``: token ids. The first of them fill half of the compared rows; the other rows are random. Every rank must
    call this. Raises UserError that says what differs.
    """
    model = scorer.model
    hf_config = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    settings = attention_settings(hf_config)
    wrong = settings_faults(model.module, settings) if settings is not None else []
    faults = model.parallel.all_gather_objects(wrong)
    if faults:
        raise SharedError(_message(config, sorted(set(faults))[0]))
    known = getattr(hf_config, "max_position_embeddings", None) or POSITIONS
    positions = min(POSITIONS, scorer.pack_tokens or POSITIONS, known)
    # the same on every rank, whatever data each of them has read
    prompts = model.parallel.run_on_main_rank(lambda: list(prompts[: ROWS * POSITIONS]))
    batch = _probe_batch(prompts, scorer.vocab_size or model.config.vocab_size, positions)
    parameters = sum(weight.numel() for weight in model.module.parameters())
    total = sum(model.parallel.all_gather_objects([parameters])) / model.parallel.replica_size
    if total <= limit:
        return _compare_scores(scorer, config, batch)
    return _compare_layers(model, config, batch, hf_config)


def settings_faults(module: Any, settings: AttentionSettings) -> list[str]:
    """The differences between ``settings`` and the position encodings, scales and windows of a Megatron model, as
    sentences; empty if there are none."""
    found = []
    for rotary in rotary_embeddings(module):
        own, expected = rotary.inv_freq.float().cpu(), settings.inverse_frequencies
        if own.shape != expected.shape or not torch.allclose(own, expected, rtol=1e-4, atol=1e-9):
            found.append("the inverse frequencies of its position encoding differ")
        if getattr(rotary, "seq_len_interpolation_factor", None) is not None:
            found.append("its positions are interpolated")
    for layer in getattr(unwrap(module).decoder, "layers", []):
        attention, window = layer.self_attention.core_attention, settings.windows[layer.layer_number - 1]
        scale = getattr(attention, "softmax_scale", None)
        if scale is not None and abs(scale - settings.scale) > 1e-4 * settings.scale:
            found.append(f"layer {layer.layer_number} scales attention by {scale:.5f}, not {settings.scale:.5f}")
        own_window = getattr(getattr(attention, "scale_mask_softmax", attention), "window_size", None)
        wanted = None if window is None else megatron_window(window)
        if _window(own_window) != wanted:
            found.append(f"layer {layer.layer_number} has the attention window {_window(own_window)}, not {wanted}")
        mask = getattr(getattr(attention, "attn_mask_type", None), "name", "causal")
        if "causal" not in mask:
            found.append(f"layer {layer.layer_number} has the attention mask {mask}, not a causal one")
    return found


def unwrap(module: Any) -> Any:
    """The model inside its wrappers for precision and data parallelism."""
    while hasattr(module, "module"):
        module = module.module
    return module


def _window(window: Any) -> tuple[int, int] | None:
    """``window`` as a pair; None without a window, for which Transformer Engine writes (-1, 0) and (-1, -1)."""
    return None if not window or window[0] < 0 else (int(window[0]), int(window[1]))


def _probe_batch(prompts: Sequence[tuple[int, ...]], vocabulary: int, positions: int) -> RolloutBatch:
    """[ROWS, positions] tokens, all but the first of each row a response."""
    tokens = torch.randint(vocabulary, (ROWS, positions), generator=torch.Generator().manual_seed(0))
    flat = [token for prompt in prompts for token in prompt][: ROWS // 2 * positions]
    tokens.view(-1)[: len(flat)] = torch.tensor(flat, dtype=torch.long)
    mask = torch.ones(tokens.shape, dtype=torch.bool)
    mask[:, 0] = False
    return RolloutBatch(
        tokens=tokens,
        response_mask=mask,
        lengths=torch.full((ROWS,), positions),
        finished=torch.ones(ROWS, dtype=torch.bool),
        group_ids=torch.arange(ROWS),
    )


def _compare_scores(scorer: MegatronScorer, config: ModelConfig, batch: RolloutBatch) -> str:
    model = scorer.model
    logprobs, entropies = scorer.score(batch)

    def compare() -> tuple[float, float]:
        expected = _reference_scores(config, batch.tokens, scorer.temperature, scorer.vocab_size)
        gaps = [
            (own - other).abs()[batch.response_mask] for own, other in zip((logprobs, entropies), expected, strict=True)
        ]
        return max(float(gap.mean()) for gap in gaps), max(float(gap.max()) for gap in gaps)

    mean, largest = model.parallel.run_on_main_rank(compare)
    tolerance = TOLERANCE[model.config.params_dtype]
    if not mean <= tolerance:
        raise SharedError(
            _message(config, f"log-probs and entropies differ by {mean:.3g} nats on average, {largest:.3g} at most")
        )
    return f"scores equal transformers' to {largest:.1e} nats on {int(batch.response_mask.sum())} tokens"


def _reference_scores(
    config: ModelConfig, tokens: Tensor, temperature: float, vocabulary: int | None
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [N, S] of transformers' float32 model, 0 in the first column."""
    reference = _reference(config)
    with torch.no_grad():
        logits = reference(tokens).logits[..., :vocabulary].float() / temperature
    scores = logits.log_softmax(-1)
    logprobs = scores[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    entropies = -(scores.exp() * scores).nan_to_num(0.0).sum(-1)[:, :-1]
    return torch.nn.functional.pad(logprobs, (1, 0)), torch.nn.functional.pad(entropies, (1, 0))


def _reference(config: ModelConfig, **changes: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        config.path, dtype=torch.float32, attn_implementation="eager", trust_remote_code=config.trust_remote_code,
        **changes,
    ).eval()  # fmt: skip


def _compare_layers(model: PolicyModel, config: ModelConfig, batch: RolloutBatch, hf_config: Any) -> str:
    """Compare the output of the first layers, on the first tensor-parallel rank of the first pipeline stage."""
    own = _own_hidden(model, batch.tokens)
    layers = min(LAYERS, len(unwrap(model.module).decoder.layers)) if own is not None else 0
    (layers,) = {count for count in model.parallel.all_gather_objects([layers]) if count}

    def compare() -> float:
        assert own is not None
        changes: dict[str, Any] = {"num_hidden_layers": layers}
        if getattr(hf_config, "layer_types", None):
            changes["layer_types"] = hf_config.layer_types[:layers]
        reference = _reference(config, **changes)
        seen: list[Tensor] = []
        hook = reference.model.layers[-1].register_forward_hook(_keeping_output(seen))
        with torch.no_grad():
            reference(batch.tokens)
        hook.remove()
        expected = seen[0].transpose(0, 1)[: own.shape[0]]  # sequence parallelism holds the first positions here
        return float((own - expected).norm() / expected.norm())

    difference = model.parallel.run_on_main_rank(compare)
    if not difference <= HIDDEN_TOLERANCE[model.config.params_dtype]:
        raise SharedError(_message(config, f"the output of its first {layers} layers differs by {difference:.1%}"))
    return f"the first {layers} layers equal transformers' to {difference:.1e}, and the settings of every layer"


def _own_hidden(model: PolicyModel, tokens: Tensor) -> Tensor | None:
    """[S, N, H] float32 on the host: the output of the first stage's first layers; None on other stages."""
    if not model.parallel.is_first_stage:
        return None
    seen: list[Tensor] = []
    stack = unwrap(model.module).decoder.layers
    layer = stack[min(LAYERS, len(stack)) - 1]
    hook = layer.register_forward_hook(_keeping_output(seen))
    device_tokens = tokens.to(model.parallel.device)
    positions = torch.arange(tokens.shape[1], device=device_tokens.device).expand_as(device_tokens)
    model.ddp.eval()
    with torch.no_grad(), whole_sequences(model):
        model.module(device_tokens, positions, None)
    hook.remove()
    return seen[0].float().cpu()


def _keeping_output(seen: list[Tensor]) -> Callable[[Any, Any, Any], None]:
    """A hook that appends the hidden states of a layer's output to ``seen``."""

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).detach())

    return keep


def _message(config: ModelConfig, what: str) -> str:
    return (
        f"model.path={config.path}: the loaded model differs from transformers': {what}; report the model, or set "
        "model.verify=off to train it anyway"
    )
