"""The module tree of a Llama-like checkpoint, built from its ``config.json`` alone.

Importing one of transformers' model classes takes seconds and some 130 MB, more than the weights
of a small compressed model. The native decoder needs of such a class where the matrices lie and a
few numbers, which for plain Llama-like models the config says. What is not as plain as that is
refused, and the caller lets transformers build the model.

The tree has transformers' paths and the attributes that :func:`rarefy.runtime.anatomy.dissect`
reads; it cannot be called.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rarefy.errors import RarefyError
from rarefy.maps.model_map import dims_of

if TYPE_CHECKING:
    from rarefy.checkpoint.reader import Checkpoint
    from rarefy.maps.model_map import Dims

# What each family has beside Llama's matrices: biases on q, k and v whatever the config says; norms
# on the heads' queries and keys; other fields without which the config is not understood.
_QKV_BIAS = {"qwen2"}
_HEAD_NORMS = {"qwen3"}
_DEMANDED: dict[str, tuple[str, ...]] = {
    "llama": (),
    "mistral": ("sliding_window",),
    "qwen2": (),
    "qwen3": ("head_dim",),
}
FAMILIES = tuple(_DEMANDED)
_FIELDS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "vocab_size", "rms_norm_eps", "max_position_embeddings", "hidden_act",
    "tie_word_embeddings",
)  # fmt: skip


def outline(checkpoint: Checkpoint) -> Outline:
    """The tree of a checkpoint, every parameter on the meta device.

    Raises:
        RarefyError: the config leaves open, or asks for, something that is not in every Llama.
    """
    given = checkpoint.config
    kind = given.get("model_type")
    if kind not in _DEMANDED:
        raise _refusal(f"model type {kind!r} is not built from its config alone")
    missing = [name for name in (*_FIELDS, *_DEMANDED[kind]) if name not in given]
    if missing:
        raise _refusal(f"{checkpoint.path / 'config.json'} does not say {missing[0]}")
    if given.get("use_sliding_window"):
        raise _refusal("some of its layers see a window only")
    fields = {name: value for name, value in given.items() if name != "quantization_config"}
    return Outline(Fields(**{**fields, "rope_parameters": _rope(given)}))


class Fields(SimpleNamespace):
    """The fields of a ``config.json``, in the place of transformers' config."""

    def get_text_config(self) -> Fields:
        """Itself: the model has no other parts."""
        return self


class Outline(nn.Module):
    """A causal language model without a forward; see :func:`outline`.

    Attributes:
        config: the fields of ``config.json``.
    """

    base_model_prefix = "model"

    def __init__(self, config: Fields) -> None:
        super().__init__()
        self.config: Any = config
        dims = dims_of(config)
        self.model = _Base(config, dims)
        self.lm_head = _linear(dims.hidden, config.vocab_size, bias=False)
        tied = {"lm_head.weight": "model.embed_tokens.weight"}
        self.all_tied_weights_keys = tied if config.tie_word_embeddings else {}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def get_input_embeddings(self) -> nn.Module:
        """The module that turns ids into rows."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The module that gives the logits."""
        return self.lm_head


class _Base(nn.Module):
    def __init__(self, config: Any, dims: Dims) -> None:
        super().__init__()
        # Not nn.Embedding(...): drawing values on the meta device imports torch's compiler.
        rows = torch.empty(config.vocab_size, dims.hidden, device="meta")
        self.embed_tokens: nn.Module = nn.Embedding.from_pretrained(rows)  # type: ignore[no-untyped-call]
        blocks = (_Block(config, dims) for _ in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(blocks)
        self.norm = _Norm(dims.hidden, config.rms_norm_eps)
        self.rotary_emb = Rotary(config.rope_parameters, dims.head_dim)


class _Block(nn.Module):
    def __init__(self, config: Any, dims: Dims) -> None:
        super().__init__()
        self.input_layernorm = _Norm(dims.hidden, config.rms_norm_eps)
        self.self_attn = _Attention(config, dims)
        self.post_attention_layernorm = _Norm(dims.hidden, config.rms_norm_eps)
        self.mlp = _MLP(config, dims)


class _Attention(nn.Module):
    def __init__(self, config: Any, dims: Dims) -> None:
        super().__init__()
        kind, hidden, head = config.model_type, dims.hidden, dims.head_dim
        asked = kind in ("llama", "qwen3") and bool(getattr(config, "attention_bias", False))
        biased = asked or kind in _QKV_BIAS
        self.q_proj = _linear(hidden, dims.heads * head, biased)
        self.k_proj = _linear(hidden, dims.kv * head, biased)
        self.v_proj = _linear(hidden, dims.kv * head, biased)
        self.o_proj = _linear(dims.heads * head, hidden, asked)
        self.q_norm = _Norm(head, config.rms_norm_eps) if kind in _HEAD_NORMS else None
        self.k_norm = _Norm(head, config.rms_norm_eps) if kind in _HEAD_NORMS else None
        self.scaling = head**-0.5
        self.sliding_window = config.sliding_window if kind == "mistral" else None


class _MLP(nn.Module):
    def __init__(self, config: Any, dims: Dims) -> None:
        super().__init__()
        bias = config.model_type == "llama" and bool(getattr(config, "mlp_bias", False))
        self.gate_proj = _linear(dims.hidden, dims.intermediate, bias)
        self.up_proj = _linear(dims.hidden, dims.intermediate, bias)
        self.down_proj = _linear(dims.intermediate, dims.hidden, bias)


class _Norm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, device="meta"), requires_grad=False)
        self.variance_epsilon = epsilon


class Rotary(nn.Module):
    """Tables of rotary positions (Su et al., RoFormer), plain or scaled.

    Args:
        rope: transformers' ``rope_parameters``: type "default", "linear" (positions divided by a
            factor) or "llama3" (low frequencies divided by it, with a ramp in between).
        width: channels of a head.
    """

    def __init__(self, rope: dict[str, Any], width: int) -> None:
        super().__init__()
        self.rope_type = rope["rope_type"]
        steps = torch.arange(0, width, 2, dtype=torch.float) / width
        frequencies = 1.0 / (rope["rope_theta"] ** steps)
        if self.rope_type == "linear":
            frequencies = frequencies / rope["factor"]
        elif self.rope_type == "llama3":
            frequencies = _llama3(frequencies, rope)
        self.frequencies = frequencies

    def forward(self, x: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines at positions [1, T]: two tensors [1, T, width] in the type of x."""
        angles = places[..., None].float() * self.frequencies
        both = torch.cat((angles, angles), -1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)


def _llama3(frequencies: torch.Tensor, rope: dict[str, Any]) -> torch.Tensor:
    """Llama 3.1's: waves shorter than a bound stay, longer than another are stretched."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    waves = 2 * math.pi / frequencies
    kept = (context / waves - low) / (high - low)
    between = (1 - kept) * frequencies / factor + kept * frequencies
    stretched = torch.where(waves > context / low, frequencies / factor, between)
    return torch.where(waves < context / high, frequencies, stretched)


def _rope(given: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters, in whichever of its two spellings the config has them."""
    found = dict(given.get("rope_parameters") or given.get("rope_scaling") or {})
    if "rope_theta" not in found and "rope_theta" in given:
        found["rope_theta"] = given["rope_theta"]
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
        ),
    }.get(found["rope_type"])  # fmt: skip
    partial = found.get("partial_rotary_factor", given.get("partial_rotary_factor", 1.0))
    if needed is None or partial != 1.0:
        raise _refusal(f"its rotary positions are {found}")
    missing = [name for name in ("rope_theta", *needed) if found.get(name) is None]
    if missing:
        raise _refusal(f"its config.json does not say {missing[0]}")
    return found


def _linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias, device="meta")


def _refusal(why: str) -> RarefyError:
    return RarefyError(f"the model cannot be opened without transformers' classes: {why}")
