"""Merging of neighbouring segments: a context that was extended a hundred times is not a hundred files.

A merged segment is written beside the others and flushed, the manifest is replaced, and only then do the old
files go: whatever interrupts it, the folder holds one of the two. Every page is checked on the way. States
between merged segments are gone with the boundaries they stood at, so the youngest segments are left as they
are: turns can be undone there without reading anything again. It knows files only, no engine.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from .folder import ContextFolder
from .manifest import Manifest, page_sources
from .segment import Part, SegmentFile, Written, as_bytes

_log = logging.getLogger("opensala")
FULL_PAGES = 1000  # of a segment; one of half as many is merged no more, for every merge writes it again
YOUNGEST = 8  # segments that stay as they are
SURPLUS = 8  # segments that merging must save to be worth it


def groups_to_merge(manifest: Manifest, full_pages: int, youngest: int = YOUNGEST) -> list[list[Written]]:
    """Neighbouring small segments that become one each, of `full_pages` at most; none across the end of the
    documents while questions were kept behind it, for that is where all turns are undone to."""
    groups: list[list[Written]] = [[]]
    for segment in manifest.segments[: len(manifest.segments) - youngest]:
        small = segment.pages < full_pages // 2
        if not small or sum(s.pages for s in groups[-1]) + segment.pages > full_pages:
            groups.append([])
        if small:
            groups[-1].append(segment)
        if manifest.turns and segment.end_token == manifest.document_tokens:
            groups.append([])
    return [group for group in groups if len(group) > 1]


def merge_if_worth_it(folder: ContextFolder, full_pages: int = FULL_PAGES) -> Manifest:
    """Merge when that saves `SURPLUS` files or more; returns the folder's manifest. What stands in the way
    (a full disk, damage in what is old) is said in the log: all is saved, in more files."""
    groups = groups_to_merge(folder.manifest, full_pages)
    if sum(len(group) - 1 for group in groups) < SURPLUS:
        return folder.manifest
    try:
        return merge(folder, groups)
    except ValueError as error:
        _log.warning("segments stay as they are: %s", error)
        return folder.manifest


def merge(folder: ContextFolder, groups: Sequence[Sequence[Written]]) -> Manifest:
    """Make one segment of each group; returns the folder's manifest.

    Raises:
        DamagedContext: a page is not what was written; the context is as it was.
        ValueError: they cannot be written; the context is as it was.
    """
    segments = list(folder.manifest.segments)
    for group in groups:
        new = _merged(folder, group)
        place = segments.index(group[0])
        segments[place : place + len(group)] = [new]
    if groups:
        folder.put(replace(folder.manifest, segments=segments))
    return folder.manifest


def _merged(folder: ContextFolder, group: Sequence[Written]) -> Written:
    files: list[SegmentFile] = []
    try:
        for known in group:
            files.append(folder.segment(known))
        sources = page_sources(group)
        parts = {layer: _part(files, sources, layer) for layer in files[0].layers()}
        tokens = np.concatenate([file.tensor("tokens").numpy() for file in files])
        states = {layer: files[-1].tensor(f"state.{layer}") for layer in _state_layers(files[-1])}
    finally:
        for file in files:
            file.close()
    return folder.add_segment(tokens, parts, states, group[0].first_token, group[0].first_page)


def _part(files: Sequence[SegmentFile], sources: Sequence[tuple[int, int]], layer: int) -> Part:
    """The pages of one layer, each from the last file that holds it."""
    found = files[0].shape(f"kv.{layer}")
    assert found is not None, "one of the layers that it has"
    kv = torch.empty((len(sources), *found[1][1:]), dtype=found[0])
    for row, (number, index) in zip(as_bytes(kv), sources, strict=True):
        half = row.size // 2
        files[number].read_page(layer, index, row[:half].data, row[half:].data)
    compressed = []
    for name in ("k1", "k2"):
        each = [file.tensor(f"{name}.{layer}") for file in files]
        compressed.append(torch.stack([each[number][index] for number, index in sources]))
    return Part(kv, *compressed)


def _state_layers(file: SegmentFile) -> Iterator[int]:
    return (int(n.removeprefix("state.")) for n in file.known.sums if n.startswith("state."))


__all__ = ["groups_to_merge", "merge", "merge_if_worth_it"]
