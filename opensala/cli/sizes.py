"""Sizes as people write them: tokens (`4096`, `64K`, `1M`) and bytes (`512MB`, `32GB`)."""

_BYTES = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3, "TIB": 2**40, "GIB": 2**30, "MIB": 2**20}
_BYTES |= {"KIB": 2**10, "B": 1}


def token_count(text: str, option: str) -> int:
    """`4096`, `64K` or `1M` (of 1,024 and 1,024 x 1,024).

    Raises:
        ValueError: something else, naming the option.
    """
    number, factor = text.strip().upper(), 1
    if number[-1:] in ("K", "M"):
        number, factor = number[:-1], 1024 if number[-1] == "K" else 2**20
    if not (number.isascii() and number.isdigit()) or not 0 < int(number) * factor < 2**40:
        raise ValueError(f"{option}: must be whole numbers of tokens like 4096,64K,1M, got {text!r}")
    return int(number) * factor


def byte_count(text: str, option: str) -> int:
    """`800MB`, `32GB` (of 1,000) or `32GiB` (of 1,024).

    Raises:
        ValueError: something else, naming the option.
    """
    written = text.strip().upper()
    unit = next((u for u in _BYTES if written.endswith(u) and written != u), "")
    number = written.removesuffix(unit).strip()
    try:
        value = float(number) * _BYTES.get(unit, 0)
        if not unit or not number[-1:].isdigit() or not 1 <= value < 2**62:
            raise ValueError
    except ValueError:
        raise ValueError(f"{option}: must be a size like 800MB or 32GB, got {text!r}") from None
    return int(value)
