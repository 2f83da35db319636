"""Operations and bytes that the work cannot avoid, counted from shapes alone.

A multiplication and an addition are two operations. Element-wise steps are not counted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import MiniCPMSALAConfig
from ..ops import BlockSpec
from ..ops.sparse import num_windows


def lightning_flops(tokens: int, heads: int, dim: int, value_dim: int) -> float:
    """Of the recurrence: k v^T into the state, q times the state."""
    return 4.0 * tokens * heads * dim * value_dim


def lightning_bytes(tokens: int, heads: int, dim: int, itemsize: int) -> float:
    """q, k, v read once, the output written once."""
    return 4.0 * tokens * heads * dim * itemsize


def selection_flops(tokens: int, heads: int, dim: int, spec: BlockSpec) -> float:
    """Scores of both levels of compressed keys (the coarse one gives the softmax denominator), exact
    search."""
    pairs = sum(
        _pairs(tokens, size, stride)
        for size, stride in ((spec.kernel_size, spec.kernel_stride), (spec.coarse_size, spec.coarse_stride))
    )
    return 2.0 * heads * dim * pairs


def _pairs(tokens: int, size: int, stride: int) -> float:
    """Pairs of a query and a full window that ends at or before it."""
    windows = num_windows(tokens, size, stride)
    return windows * (tokens - size + 1) - stride * windows * (windows - 1) / 2


def sparse_flops(tokens: int, heads: int, dim: int, spec: BlockSpec) -> float:
    """Scores and weighted values of the keys in the chosen blocks."""
    whole = spec.num_blocks * spec.block_size
    early = min(tokens, whole)
    keys = early * (early + 1) / 2 + (tokens - early) * (whole - (spec.block_size - 1) / 2)
    return 4.0 * heads * dim * keys


def dense_flops(tokens: int, heads: int, dim: int) -> float:
    """Causal softmax attention over all keys."""
    return 2.0 * heads * dim * tokens * (tokens + 1)


def product_weights(config: MiniCPMSALAConfig) -> float:
    """Weights of the layers' matrix products: without embeddings, head and norms."""
    assert (
        config.head_dim
        and config.num_key_value_heads
        and config.lightning_nh
        and config.lightning_nkv
        and config.lightning_head_dim
    )
    hidden, sparse = config.hidden_size, sparse_layers(config)
    inner = config.num_attention_heads * config.head_dim
    outer = config.lightning_nh * config.lightning_head_dim
    sparse_weights = hidden * (
        (2 + config.attn_use_output_gate) * inner + 2 * config.num_key_value_heads * config.head_dim
    )
    linear_weights = hidden * (
        (2 + config.use_output_gate) * outer + 2 * config.lightning_nkv * config.lightning_head_dim
    )
    return float(
        sparse * sparse_weights
        + (config.num_hidden_layers - sparse) * linear_weights
        + 3 * config.num_hidden_layers * hidden * config.intermediate_size
    )


def sparse_layers(config: MiniCPMSALAConfig) -> int:
    """How many layers attend to selected blocks."""
    return sum(config.is_sparse(i) for i in range(config.num_hidden_layers))


def prefill_flops(config: MiniCPMSALAConfig, tokens: int) -> float:
    """Of reading a prompt: products with weights (one logit row), Lightning, selection and sparse
    attention."""
    assert config.head_dim and config.lightning_nh and config.lightning_head_dim, (
        "filled by the configuration"
    )
    spec, sparse = config.block_spec, sparse_layers(config)
    total = 2.0 * tokens * product_weights(config) + 2.0 * config.vocab_size * config.hidden_size
    total += (config.num_hidden_layers - sparse) * lightning_flops(
        tokens, config.lightning_nh, config.lightning_head_dim, config.lightning_head_dim
    )
    total += sparse * selection_flops(tokens, config.num_attention_heads, config.head_dim, spec)
    return total + sparse * sparse_flops(tokens, config.num_attention_heads, config.head_dim, spec)


@dataclass(frozen=True)
class Work:
    """What a kernel has to do: operations of matrix products, exponentials, bytes of memory."""

    flops: float = 0.0
    exponentials: float = 0.0
    moved: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops, self.exponentials + other.exponentials, self.moved + other.moved
        )

    def times(self, count: float) -> "Work":
        return Work(self.flops * count, self.exponentials * count, self.moved * count)


@dataclass(frozen=True)
class Sharing:
    """How a tile of neighbouring queries shares far blocks (those before the window), from real block lists.

    Attributes:
        shared: share of the (query, far block) pairs whose block at least half of the tile's queries chose.
        users: queries of the tile that chose such a block, on average.
        tile: queries of a tile.
    """

    shared: float
    users: float
    tile: int = 8


def sharing(blocks: Tensor, spec: BlockSpec, tile: int = 8, first: int = 0) -> Sharing:
    """Count the sharing in block lists `[T, Hkv, K]` of queries `first` ... `first + T - 1` (-1: none).

    Raises:
        ValueError: no query has a far block.
    """
    position = first + torch.arange(blocks.shape[0])
    far = (blocks >= 0) & (blocks < (position // spec.block_size - spec.window_blocks)[:, None, None])
    whole = blocks.shape[0] // tile * tile
    pairs = shared = wide = 0
    for head in range(blocks.shape[1]):
        rows, chosen = blocks[:whole, head], far[:whole, head]
        tiles = (torch.arange(whole) // tile)[:, None].expand_as(rows)[chosen]
        keys = tiles.long() * (1 << 32) + rows[chosen].long()
        users = keys.unique(return_counts=True)[1]
        popular = users * 2 >= tile
        pairs += int(users.sum())
        shared += int(users[popular].sum())
        wide += int(popular.sum())
    if not pairs:
        raise ValueError(
            f"none of {blocks.shape[0]} queries has a block before its window: give longer texts"
        )
    return Sharing(shared / pairs, shared / wide if wide else float(tile), tile)


def lightning_work(tokens: int, heads: int, dim: int, itemsize: int, chunk: int = 64) -> Work:
    """Of the chunked form: products within chunks, a float32 state of every 512 tokens written and read."""
    flops = tokens * heads * (4.0 * chunk * dim + 4.0 * dim * dim)
    states = 2.0 * heads * dim * dim * 4 * (tokens / 512)
    return Work(flops, 0.0, lightning_bytes(tokens, heads, dim, itemsize) + states)


def selection_work(tokens: int, heads: int, kv_heads: int, dim: int, spec: BlockSpec) -> Work:
    """Of exact selection: both levels scored, an exponential for each score, scores of blocks written and
    read as float32, queries read twice."""
    flops = selection_flops(tokens, heads, dim, spec)
    scores = 4.0 * kv_heads * tokens * (tokens / spec.block_size + 1) / 2
    lists = 4.0 * tokens * kv_heads * spec.num_blocks
    return Work(flops, flops / (2 * dim), 2 * scores + lists + 4.0 * tokens * heads * dim)


def listed(tokens: int, spec: BlockSpec) -> tuple[float, float]:
    """What the lists of a text hold: (keys within the window and the own block, pairs of a query and a block
    before them)."""
    size, keys, far = spec.block_size, 0.0, 0.0
    for own in range(-(-tokens // size)):
        queries = min(size, tokens - own * size)
        near = min(own, spec.window_blocks)
        keys += queries * near * size + queries * (queries + 1) / 2
        far += queries * (min(own + 1, spec.num_blocks) - near - 1)
    return keys, far


def attention_work(
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    spec: BlockSpec,
    lists: Sharing | None,
    itemsize: int = 2,
) -> tuple[Work, Work]:
    """Of attention over chosen blocks in tiles and pairs: (band, pairs with their merging).

    The band goes over the window tile by tile and, with `lists`, over the far blocks that at least half of
    the tile chose, for all of its queries. Each other (query, far block) pair writes and reads a partial
    result; the keys and values of a block are read once for every 64 pairs, and the queries of a chunk stay
    in the L2 cache.
    """
    group, size = heads // kv_heads, spec.block_size
    window, far = listed(tokens, spec)
    shared, spread = (lists.shared, lists.tile / lists.users) if lists else (0.0, 1.0)
    keys = kv_heads * (window + far * shared * spread * size)
    row = group * dim * itemsize
    once = 2.0 * tokens * kv_heads * row  # queries read, results written
    band = Work(4.0 * group * dim * keys, group * keys, once)
    pairs = kv_heads * far * (1 - shared)
    partial = group * (dim * itemsize + 4.0)
    moved = pairs * (2 * partial + 2.0 * size * dim * itemsize / 64) + 0.5 * once
    return band, Work(4.0 * group * dim * size * pairs, group * size * pairs, moved)


def elementwise_bytes(config: MiniCPMSALAConfig, tokens: int, itemsize: int = 2) -> float:
    """Of what lies between the products of all layers, fused: residuals with their norms, SwiGLU, heads
    split from one product, gates."""
    assert config.lightning_nh and config.lightning_head_dim and config.head_dim, (
        "filled by the configuration"
    )
    sparse = sparse_layers(config)
    linear = config.num_hidden_layers - sparse
    shared = 2 * 4 * config.hidden_size + 3 * config.intermediate_size
    inner = config.num_attention_heads * config.head_dim
    outer = config.lightning_nh * config.lightning_head_dim
    per_token = config.num_hidden_layers * shared + sparse * 5 * inner + linear * (6 + 3) * outer
    return float(tokens) * itemsize * per_token


def decode_work(config: MiniCPMSALAConfig, context: int, weights: float, itemsize: int = 2) -> Work:
    """Of one decoding step: weights, compressed keys and the chosen blocks read, states read and written."""
    assert config.num_key_value_heads and config.head_dim, "filled by the configuration"
    assert config.lightning_nh and config.lightning_head_dim, "likewise"
    spec = config.block_spec
    sparse = sparse_layers(config)
    width = config.num_key_value_heads * config.head_dim * itemsize
    windows = num_windows(context, spec.kernel_size, spec.kernel_stride)
    windows += num_windows(context, spec.coarse_size, spec.coarse_stride)
    keys = 2 * min(context, spec.num_blocks * spec.block_size)
    states = 8.0 * config.lightning_nh * config.lightning_head_dim**2 * (config.num_hidden_layers - sparse)
    return Work(weights / itemsize * 2, 0.0, weights + sparse * width * (windows + keys) + states)
