"""Llama and its relatives, step by step, with few and large operations.

Legend: N tokens, B rows of the batch, U prompts that differ, P prompt, S places of the cache,
H query heads, K key and value heads, E width of a head, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llm.rollout.products import Product, weights_of

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_MODULES = {f"transformers.models.{name}.modeling_{name}" for name in _FAMILIES}
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # whatever the length of the text
_PACKED_BYTES = 2**31  # weights above that are used where they are, in their own dtype
_PREFILL_SCORES = 2**24  # attention scores of a head computed at once while reading prompts


class _Layer(NamedTuple):
    norm: tuple[Tensor, float]
    qkv: Product
    head_norms: tuple[Tensor, float] | None
    out: Product
    mlp_norm: tuple[Tensor, float]
    gate: Product
    up: Product
    down: Product


class LlamaDecoder:
    """A copy of a model's weights, laid out for sampling, and a key-value cache.

    Adapters are taken in, and modules that peft trains whole. The residual stream keeps the dtype
    of the model's embeddings, as it does under autocast.

    Args:
        model: A model for which :func:`llama_like` holds, possibly wrapped by peft.
        dtype: Of the products; ``None`` is that of the weights.
    """

    def __init__(self, model: Any, dtype: torch.dtype | None) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        config, decoder = base.config, base.model
        self._embedding = _chosen(decoder.embed_tokens).weight.detach()
        dtype = dtype or self._embedding.dtype
        self._dtype = dtype
        size = sum(p.numel() * dtype.itemsize for p in base.parameters())
        in_place = size > _PACKED_BYTES
        self._heads = config.num_attention_heads
        self._kv_heads = config.num_key_value_heads
        self._width = decoder.layers[0].self_attn.head_dim
        self._scaling = decoder.layers[0].self_attn.scaling
        self._rotary = decoder.rotary_emb
        self._layers = [
            self._layer(layer, dtype, in_place)
            for layer in decoder.layers[: config.num_hidden_layers]
        ]
        self._norm = _norm(decoder.norm)
        self._head = _product([_chosen(base.lm_head)], dtype, in_place)

    def _layer(self, layer: Any, dtype: torch.dtype, in_place: bool) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        head_norms = None
        if hasattr(attention, "q_norm"):
            scale, eps = _norm(attention.q_norm)
            scales = [scale] * self._heads + [_norm(attention.k_norm)[0]] * self._kv_heads
            head_norms = torch.stack(scales), eps
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        return _Layer(
            norm=_norm(layer.input_layernorm),
            qkv=_product(qkv, dtype, in_place),
            head_norms=head_norms,
            out=_product([attention.o_proj], dtype, in_place),
            mlp_norm=_norm(layer.post_attention_layernorm),
            gate=_product([mlp.gate_proj], dtype, in_place),
            up=_product([mlp.up_proj], dtype, in_place),
            down=_product([mlp.down_proj], dtype, in_place),
        )

    def start(self, prompts: Sequence[Sequence[int]], new: int) -> Tensor:
        """Read prompts; see :class:`Decoder`. Prompts that occur several times are read once."""
        device, width = self._embedding.device, max(map(len, prompts))
        shape = (len(self._layers), len(prompts), 2 * self._kv_heads, width + new, self._width)
        self._set_cache(torch.zeros(shape, dtype=self._dtype, device=device))
        self._starts = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
        self._used = width
        self._set_angles(width + new)
        places = torch.arange(width + new, device=device)
        hidden_places = places < self._starts[:, None]
        self._mask: Tensor | None = None  # (B, 1, 1, S) added to the scores
        if bool(self._starts.any()):
            self._mask = _as_scores(hidden_places, self._dtype)[:, None, None]
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows_of.setdefault(tuple(prompt), []).append(row)
        unique = list(rows_of.items())
        at_once = max(1, _PREFILL_SCORES // width**2)
        last = self._embedding.new_empty(len(prompts), self._embedding.shape[1])
        for first in range(0, len(unique), at_once):
            some = unique[first : first + at_once]
            ends = self._read([prompt for prompt, _ in some], [rows for _, rows in some])
            for end, (_, rows) in zip(ends, some, strict=True):
                last[rows] = end
        return self._logits(last)

    def _read(self, prompts: list[tuple[int, ...]], rows_of: list[list[int]]) -> Tensor:
        """Hidden states (U, D) at the end of prompts, whose keys and values go into the cache."""
        device, heads = self._embedding.device, self._heads
        lengths = [len(prompt) for prompt in prompts]
        width = max(lengths)
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        row = torch.arange(len(prompts)).repeat_interleave(torch.tensor(lengths)).to(device)
        place = positions + (width - torch.tensor(lengths, device=device))[row]
        # Where the keys and values of each token belong: more than once for repeated prompts.
        ends = torch.tensor(lengths).cumsum(0).tolist()
        copies = [(u, copy) for u, rows in enumerate(rows_of) for copy in rows]
        token = torch.cat([torch.arange(ends[u] - lengths[u], ends[u]) for u, _ in copies])
        cache_row = torch.tensor([copy for _, copy in copies]).repeat_interleave(
            torch.tensor([lengths[u] for u, _ in copies])
        )
        token, cache_row = token.to(device), cache_row.to(device)
        cache_place = positions[token] + self._starts[cache_row]
        mask = None
        if len(set(lengths)) > 1:
            order = torch.arange(width, device=device)
            starts = width - torch.tensor(lengths, device=device)
            hidden_places = (order[None, :] > order[:, None]) | (order < starts[:, None])[:, None]
            mask = _as_scores(hidden_places, self._dtype)[:, None]
        cos, sin = self._cos[positions], self._sin[positions]
        x = F.embedding(ids, self._embedding)
        padded = torch.zeros(
            len(prompts), width, heads + 2 * self._kv_heads, self._width,
            dtype=self._dtype, device=device,
        )  # fmt: skip
        for index, layer in enumerate(self._layers):
            qkv = torch.cat(self._project(layer, x, cos, sin), dim=1)
            self._cache[index].transpose(1, 2)[cache_row, cache_place] = qkv[token, heads:]
            padded[row, place] = qkv
            q, k, v = padded.transpose(1, 2).split([heads, self._kv_heads, self._kv_heads], dim=1)
            groups = heads // self._kv_heads
            if groups > 1:
                k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
            seen = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self._scaling
            )
            x = _after_attention(layer, x, seen.transpose(1, 2)[row, place].flatten(1))
        return x[[end - 1 for end in ends]]

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token of every row; see :class:`Decoder`."""
        used, kv_heads = self._used, self._kv_heads
        self._used = end = used + 1
        positions = used - self._starts
        cos, sin = self._cos[positions], self._sin[positions]
        mask = None if self._mask is None else self._mask[..., :end]
        x = F.embedding(tokens, self._embedding)
        shape = (len(x), kv_heads, self._heads // kv_heads, self._width)
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            qk, v = self._project(layer, x, cos, sin)
            keys.select(2, used).copy_(qk[:, self._heads :])
            values.select(2, used).copy_(v)
            # The query heads of a key head stand where the tokens of a text would.
            seen = F.scaled_dot_product_attention(
                qk[:, : self._heads].reshape(shape),
                keys.narrow(2, 0, end),
                values.narrow(2, 0, end),
                attn_mask=mask,
                scale=self._scaling,
            )
            x = _after_attention(layer, x, seen.flatten(1))
        return self._logits(x)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only; see :class:`Decoder`."""
        for new, old in enumerate(rows):  # ascending, so nothing is read that was overwritten
            if new != old:
                self._cache[:, new, :, : self._used] = self._cache[:, old, :, : self._used]
        self._set_cache(self._cache[:, : len(rows)])
        kept = torch.tensor(rows, device=self._starts.device)
        self._starts = self._starts[kept]
        self._mask = None if self._mask is None else self._mask[kept]

    def _project(self, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (N, H + K, E), with their positions, and values (N, K, E)."""
        rows = F.rms_norm(x, x.shape[1:], *layer.norm).to(self._dtype)
        qkv = layer.qkv(rows).unflatten(1, (-1, self._width))
        qk, v = qkv.split([self._heads + self._kv_heads, self._kv_heads], dim=1)
        if layer.head_norms is not None:
            scale, eps = layer.head_norms
            qk = F.rms_norm(qk, (self._width,), eps=eps) * scale
        qk = qk.to(cos.dtype)
        # rotate_half, its sign in the sine.
        turned = torch.addcmul(qk * cos, qk.roll(self._width // 2, -1), sin)
        return turned.to(self._dtype), v

    def _logits(self, x: Tensor) -> Tensor:
        return self._head(F.rms_norm(x, x.shape[1:], *self._norm).to(self._dtype))

    def _set_angles(self, places: int) -> None:
        """Cosines and sines (S, 1, E) of all positions."""
        positions = torch.arange(places, device=self._embedding.device)[None]
        cos, sin = (table[0, :, None] for table in self._rotary(self._embedding[:1], positions))
        first, second = sin.chunk(2, dim=-1)
        self._cos, self._sin = cos, torch.cat([-first, second], dim=-1)

    def _set_cache(self, cache: Tensor) -> None:
        """Keys and values (L, B, 2 K, S, E) of all layers."""
        self._cache = cache
        self._keys = cache[:, :, : self._kv_heads].unbind()
        self._values = cache[:, :, self._kv_heads :].unbind()


def llama_like(model: Any) -> bool:
    """Whether :class:`LlamaDecoder` computes exactly what a model does."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if type(base).forward.__module__ not in _MODULES or not hasattr(base, "lm_head"):
        return False
    config = base.config
    if config.hidden_act != "silu" or config.rope_parameters.get("rope_type") not in _STATIC_ROPE:
        return False
    decoder = base.model
    if any(_is_changed(module) for module in base.modules()):
        return False
    blocks, linears = [base, decoder, decoder.norm, decoder.rotary_emb], []
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        blocks += [layer, attention, mlp, layer.input_layernorm, layer.post_attention_layernorm]
        blocks += [norm for name, norm in attention.named_children() if name.endswith("norm")]
        linears += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    embedding = _chosen(decoder.embed_tokens)
    return (
        all(type(block).forward.__module__ in _MODULES for block in blocks)
        and type(embedding).forward is nn.Embedding.forward
        and embedding.weight.is_floating_point()
        and all(weights_of(module) is not None for module in [*linears, _chosen(base.lm_head)])
    )


def _is_changed(module: nn.Module) -> bool:
    """Whether somebody made a module do more than its class does."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    # Those of transformers collect outputs where somebody asks for them.
    foreign = any(not hook.__module__.startswith("transformers.") for hook in hooks)
    return foreign or "forward" in vars(module)


def _chosen(module: Any) -> Any:
    """The module itself, or the one that stands in for it where peft trains it whole."""
    if not hasattr(module, "modules_to_save"):
        return module
    names = [name for name in module.active_adapters if name in module.modules_to_save]
    if module.disable_adapters or not names:
        return module.original_module
    return module.modules_to_save[names[0]]


def _product(modules: Sequence[nn.Module], dtype: torch.dtype, in_place: bool) -> Product:
    parts = [weights_of(module) for module in modules]
    return Product([part for part in parts if part is not None], dtype, in_place=in_place)


def _norm(module: Any) -> tuple[Tensor, float]:
    return module.weight.detach(), module.variance_epsilon


def _after_attention(layer: _Layer, x: Tensor, seen: Tensor) -> Tensor:
    x = layer.out.plus(seen, x)
    rows = F.rms_norm(x, x.shape[1:], *layer.mlp_norm).to(seen.dtype)
    return layer.down.plus(layer.up.times(rows, layer.gate.silu(rows)), x)


def _as_scores(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to attention scores: minus infinity at hidden places."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
        hidden, -torch.inf
    )
