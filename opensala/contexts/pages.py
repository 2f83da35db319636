"""Between the engine's memory and a context's segments: pages and states out of it, and into it."""

from array import array
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..engine import Engine, SamplingParams
from ..engine.holds import Hold
from ..engine.request import Sequence as Running
from ..model.tiers import Tiers
from .checks import damaged
from .folder import ContextFolder
from .manifest import Manifest, page_sources
from .segment import Part, SegmentFile, expected

Note = Callable[[Running], None]


def read_tokens(
    engine: Engine, tokens: array, on_step: Note | None = None, on_stop: Note | None = None
) -> Hold:
    """Read a text, from where it is at hand already, and keep it at hand.

    Args:
        on_step: called after each step but the last with the running sequence.
        on_stop: called with it if reading is interrupted, before it is given up.

    Raises:
        ValueError: it does not fit into memory; other requests are under way.
    """
    if engine.num_requests:
        raise ValueError(f"{engine.num_requests} other requests are under way: call step() for them first")
    sparse = engine.config.attends_sparsely(len(tokens))
    found = engine.scheduler.holds.hold(tokens, sparse)
    if found is not None:
        return found
    params = SamplingParams(max_tokens=1, ignore_eos=True, speculate=0)
    request = engine.add(tokens, params, marks=[len(tokens)])
    error = None
    try:
        while (running := engine.sequence(request)) is not None:
            for event in engine.step():
                error = error or (event.completion.error if event.completion else None)
            if on_step is not None and engine.sequence(request) is not None:
                on_step(running)
    except BaseException:
        stopped = engine.sequence(request)
        if stopped is not None:
            try:
                if on_stop is not None:
                    on_stop(stopped)
            finally:
                engine.abort(request)
        raise
    if error is not None:
        raise ValueError(error)
    hold = engine.scheduler.holds.hold(tokens, sparse)
    assert hold is not None, "a mark keeps what was read"
    return hold


def pages_of(engine: Engine, pages: Sequence[int], last: int) -> dict[int, Part]:
    """Pages of all sparse layers, on the CPU; the last of them holds `last` tokens, what lies behind them is
    zeroed."""
    spec = engine.config.block_spec
    strides = (1, 1, spec.kernel_stride, spec.coarse_stride)
    parts = {}
    for layer, pool in engine.storage.kv.items():
        index = torch.tensor(list(pages), device=pool.k1.device)
        taken = [*engine.tiers().read(layer, pages), *(x.index_select(0, index).cpu() for x in pool[2:])]
        for x, stride in zip(taken, strides, strict=True):
            x[-1, -(-last // stride) :] = 0
        keys, values, k1, k2 = taken
        parts[layer] = Part(torch.stack((keys, values), 1), k1, k2)
    return parts


def states_of(engine: Engine, slot: int) -> dict[int, Tensor]:
    """The states in a slot, on the CPU."""
    return {layer: states[slot].cpu().clone() for layer, states in engine.storage.states.items()}


def load(
    engine: Engine, folder: ContextFolder, namespace: str = "", manifest: Manifest | None = None
) -> Hold:
    """Put a context at hand for prompts of a namespace: its tokens, compressed keys and last states now, keys
    and values when wanted.

    Args:
        manifest: of the part of it that is wanted; None for all.

    Raises:
        ValueError: it does not fit into memory, or is damaged.
    """
    backing, manifest = engine.tiers(), manifest or folder.manifest
    files = [folder.segment(known, backing.counter) for known in manifest.segments]
    tokens = tokens_of(engine, files)
    if len(tokens) != manifest.tokens:
        raise damaged(folder.path, "tokens", f"{manifest.tokens:,}", f"{len(tokens):,}")
    found = engine.scheduler.holds.hold(tokens, manifest.sparse, namespace)
    if found is not None:
        return found
    hold = engine.scheduler.holds.place(tokens, manifest.sparse, namespace)
    try:
        _fill(engine, backing, files, hold)
        engine.scheduler.holds.settle(hold)
        # a device would wait for each choice of blocks, unless it does so anyway
        if engine.device.type != "cpu" and backing.device is None:
            backing.bring(hold.pages)
    except BaseException:
        engine.scheduler.holds.let_go(hold)
        raise
    return hold


def hand_over(engine: Engine, folder: ContextFolder, pages: Sequence[int]) -> None:
    """Let a text's pages give way in memory where they are on disk now, if memory for such pages is bounded.

    The last page stays if it is not full: it goes on growing in memory.

    Args:
        pages: of the folder's tokens, from the first on.

    Raises:
        DamagedContext: a segment is not there any more.
    """
    tiers, manifest = engine.tiers(), folder.manifest
    if tiers.budget is None:
        return
    full = pages[: manifest.tokens // manifest.page_size]
    places = manifest.page_sources()[: len(full)]
    new = np.flatnonzero(~tiers.on_disk(full)).tolist()
    numbers = sorted({places[i][0] for i in new})
    files = {n: folder.segment(manifest.segments[n], tiers.counter) for n in numbers}
    tiers.hand_over([full[i] for i in new], [(files[places[i][0]], places[i][1]) for i in new])


def restore(engine: Engine, files: Sequence[SegmentFile], sparse: bool, namespace: str, prompt: array) -> int:
    """Put a text of before a restart into the prefix tree, all of it read and checked; the files are not
    needed any more. Returns its number of tokens.

    Raises:
        ValueError: it does not fit into memory, is damaged, or `prompt` does not begin with it.
    """
    backing, tokens = engine.tiers(), tokens_of(engine, files)
    if tokens != prompt[: len(tokens)]:
        raise damaged(files[-1].path, "tokens", "those that its name is the hash of", "others")
    hold = engine.scheduler.holds.place(tokens, sparse, namespace)
    try:
        _fill(engine, backing, files, hold)
        backing.keep(hold.pages)
        engine.scheduler.holds.settle(hold, restored=True)
    finally:
        engine.scheduler.holds.let_go(hold)  # the tree keeps it as long as there is room
    return len(tokens)


def tokens_of(engine: Engine, files: Sequence[SegmentFile]) -> array:
    """The tokens of segments that follow one another, whose shapes are those of the engine's model.

    Raises:
        DamagedContext: they are not.
    """
    tokens = array("i")
    for file in files:
        _check_shapes(engine, file)
        tokens.frombytes(file.tensor("tokens").numpy().tobytes())
    ids = np.frombuffer(tokens, np.int32)
    if not len(ids) or ids.max() >= engine.config.vocab_size or ids.min() < 0:
        raise damaged(files[0].path.parent, "tokens", "some of the model's", f"{len(tokens):,} others")
    return tokens


def _fill(engine: Engine, backing: Tiers, files: Sequence[SegmentFile], hold: Hold) -> None:
    """Compressed keys and last states now; keys and values are expected from the files."""
    sources = page_sources([file.known for file in files])
    where, index = (np.array(x) for x in zip(*sources, strict=True))
    pages = np.array(hold.pages)
    for number, file in enumerate(files):
        mine = where == number
        for layer, pool in engine.storage.kv.items():
            to, rows = (torch.from_numpy(x[mine]).to(pool.k1.device) for x in (pages, index))
            for name, target in (("k1", pool.k1), ("k2", pool.k2)):
                target[to] = file.tensor(f"{name}.{layer}").to(target.device)[rows]
    for layer, states in engine.storage.states.items():
        states[hold.slot] = files[-1].tensor(f"state.{layer}").to(states.device)
    backing.expect(hold.pages, [(files[n], i) for n, i in sources])
    spec = engine.config.block_spec
    backing.hint(hold.pages[: spec.init_blocks] + hold.pages[-spec.window_blocks - 2 :])


def _check_shapes(engine: Engine, file: SegmentFile) -> None:
    """Refuse tensors of other shapes than the model's."""
    storage = engine.storage
    wanted: dict[str, tuple[torch.dtype, list[int]]] = {
        "tokens": (torch.int32, [file.known.end_token - file.known.first_token])
    }
    for layer, pool in storage.kv.items():
        shapes = expected(file.known.pages, pool.keys, {"k1": pool.k1, "k2": pool.k2})
        wanted |= {f"{name}.{layer}": shape for name, shape in shapes.items()}
    if file.known.state:
        wanted |= {f"state.{n}": (x.dtype, list(x.shape[1:])) for n, x in storage.states.items()}
    for name, shape in wanted.items():
        if file.shape(name) != shape:
            raise damaged(file.path, f"tensor {name}", f"{shape[0]} {shape[1]}", str(file.shape(name)))
