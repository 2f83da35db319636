"""The numbers that define block selection, and the counting rules that follow from them."""

from typing import NamedTuple

REGION = 16  # blocks of a region of hierarchical selection
REGIONS = 64  # regions that a query of a hierarchical selection looks into unless told otherwise
LSE_KINDS = ("coarse", "exact")
SEARCHES = ("exact", "hierarchical")
LIMIT = 100.0  # there, exponents of 2 are cut at this value before they are summed over heads


class BlockSpec(NamedTuple):
    """Sizes of InfLLM-V2 block selection, all in tokens but `topk` and `init_blocks` (in blocks).

    The second level of compressed keys has 4 times the kernel and the stride of the first.
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    init_blocks: int = 1
    window_size: int = 2048
    topk: int = 64

    @property
    def window_blocks(self) -> int:
        """Blocks before a query's own block that are always taken."""
        return self.window_size // self.block_size

    @property
    def num_blocks(self) -> int:
        """Blocks a query attends to in all: topk + window_size / block_size (96 in the release)."""
        return self.topk + self.window_blocks

    @property
    def ratio(self) -> int:
        """First-level compressed keys that start in one block."""
        return self.block_size // self.kernel_stride

    @property
    def coarse_size(self) -> int:
        return 4 * self.kernel_size

    @property
    def coarse_stride(self) -> int:
        return 4 * self.kernel_stride


def num_windows(length: int, kernel_size: int, kernel_stride: int) -> int:
    """Full windows of `kernel_size` tokens, one every `kernel_stride`, in `length` tokens."""
    return max(0, (length - kernel_size) // kernel_stride + 1)


def check_search(spec: BlockSpec, lse: str, search: str, regions: int) -> None:
    """The options of a selection.

    Raises:
        ValueError: unknown `lse` or `search`, or too few regions for the blocks that are to come from them.
    """
    if lse not in LSE_KINDS:
        raise ValueError(f"lse must be one of {', '.join(LSE_KINDS)}, got {lse!r}")
    if search not in SEARCHES:
        raise ValueError(f"search must be one of {', '.join(SEARCHES)}, got {search!r}")
    if search == "hierarchical" and regions * REGION < spec.num_blocks:
        raise ValueError(
            f"regions must be at least {-(-spec.num_blocks // REGION)}, got {regions}: "
            f"{spec.num_blocks} blocks are to be chosen from them, and each has {REGION}"
        )
