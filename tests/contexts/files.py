"""What lies in a context's files, bit for bit."""

import torch

from opensala.contexts.folder import ContextFolder


def content(path):
    """Tokens, keys, values, compressed keys and last states of a context, as bytes."""
    folder = ContextFolder.open(path)
    files = [folder.segment(known) for known in folder.manifest.segments]
    tokens = b"".join(file.tensor("tokens").numpy().tobytes() for file in files)
    rows = []
    for number, index in folder.manifest.page_sources():
        for layer in files[number].layers():
            page = [memoryview(bytearray(files[number]._page_place(layer, 0)[1] // 2)) for _ in range(2)]
            files[number].read_page(layer, index, *page)
            rows += [page[0].tobytes(), page[1].tobytes()]
            levels = [files[number].tensor(f"{n}.{layer}")[index] for n in ("k1", "k2")]
            rows += [level.view(torch.uint8).numpy().tobytes() for level in levels]
    states = [files[-1].tensor(n).numpy().tobytes() for n in files[-1].known.sums if n.startswith("state.")]
    return tokens, rows, states, [d.name for batch in folder.texts() for d in batch]
