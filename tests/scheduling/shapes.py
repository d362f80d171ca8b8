"""Sizes of models as they exist, for tests of what fits."""

from __future__ import annotations

from scheduling.modelsize import ModelShape


def llama(
    layers: int,
    width: int,
    feed_forward: int,
    heads: int,
    kv_heads: int,
    *,
    vocab: int = 128_256,
    bits: float = 4.5,
    trained: int | None = 131_072,
) -> ModelShape:
    """A llama with so many bits a weight."""
    head = width // heads
    values = 2 * width * width + 2 * width * kv_heads * head + 3 * width * feed_forward
    matrix = int(vocab * width * bits / 8)
    return ModelShape(
        layer_bytes=(int(values * bits / 8),) * layers,
        input_bytes=matrix,
        output_bytes=matrix,
        cache_values=((kv_heads * head, kv_heads * head),) * layers,
        cache_known=True,
        width=width,
        feed_forward=feed_forward,
        heads=heads,
        key_length=head,
        value_length=head,
        vocab_tokens=vocab,
        train_ctx_tokens=trained,
    )


B1 = llama(16, 2048, 8192, 32, 8, bits=8.5)
B8 = llama(32, 4096, 14_336, 32, 8)
B70 = llama(80, 8192, 28_672, 64, 8)
