"""Tiny models with random weights that are sure of themselves, and tokenizers for them."""

import functools

import torch

from lit_llm.data.tokenizer import START_OF_TURN, train_tokenizer
from lit_llm.models.build import build_model
from lit_llm.models.config import BaseModelConfig

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog barks.",
    "A question is asked.\nAn answer is given: yes, no, or perhaps.",
    "Die Straße führt über den Fluß; déjà vu, naïve façade, 東京 and 😀 emoji.",
]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
CONFIGS = {
    "llama": {"model_type": "llama", **SIZES},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2},
    # Its logits are scaled: no plain projection.
    "granite": {"model_type": "granite", **SIZES, "logits_scaling": 2.0},
}


def tokenizer(kind="plain"):
    """plain: BOS is EOS and not added; bos: one of its own, added; eos: no BOS at all."""
    own = train_tokenizer(TEXTS, 320)
    if kind == "bos":
        from tokenizers.processors import TemplateProcessing

        own.bos_token = START_OF_TURN
        own.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{START_OF_TURN} $A", special_tokens=[(START_OF_TURN, own.bos_token_id)]
        )
    if kind == "eos":
        own.bos_token = None
    return own


@functools.cache
def model(kind="llama", positions=64, **options):
    """A model that no test may change."""
    torch.manual_seed(1)
    config = {**CONFIGS[kind], "initializer_range": 0.4, **options}
    return build_model(BaseModelConfig(config=config), vocab_size=320, seq_len=positions).eval()


@torch.no_grad()
def log_probs(network, ids):
    """(T, V) float64: what a plain forward makes of the token after each of these."""
    return network(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


@torch.no_grad()
def greedy(network, ids, count):
    """The most likely token, again and again, without a cache."""
    own = list(ids)
    for _ in range(count):
        own.append(
            int(network(input_ids=torch.tensor([own]), use_cache=False).logits[0, -1].argmax())
        )
    return own[len(ids) :]
