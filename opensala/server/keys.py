"""API keys: random, kept as their SHA-256 only, compared in constant time.

A key file is JSON, one object for each key: {"id", "name", "sha256", "created"}. The id is no secret; it is
the namespace of what its owner had read.
"""

import hashlib
import hmac
import json
import os
import re
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PREFIX = "sala-"
_HEX = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Key:
    """What is kept of a key."""

    id: str
    name: str
    sha256: str
    created: int


class KeyFile:
    """The keys in a file; read again when the file changes, so that a key can be taken back at run time.

    Raises:
        ValueError: the file is missing or is no key file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int] | None = None
        self._keys: list[Key] = []
        self.keys()

    def keys(self) -> list[Key]:
        try:
            found = self.path.stat()
        except OSError as error:
            raise ValueError(f"{self.path}: the key file cannot be read ({error.strerror})") from error
        stamp = (found.st_mtime_ns, found.st_size)
        if stamp != self._stamp:
            self._keys, self._stamp = _read(self.path), stamp
        return self._keys

    def owner(self, presented: str) -> Key | None:
        """The key that was presented, or None. It takes as long for a wrong key as for a right one."""
        digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).hexdigest()
        owner = None
        for key in self.keys():
            if hmac.compare_digest(key.sha256, digest):
                owner = key
        return owner


def new_key(path: Path, name: str) -> tuple[Key, str]:
    """Make a key, add it to the file (made if need be, readable by its owner only); returns it with the
    secret, which is not kept anywhere.

    Raises:
        ValueError: an empty name, or one in use; a file that is no key file.
    """
    keys = _read(path) if path.exists() else []
    if not name.strip():
        raise ValueError("name is empty: say whose key it is")
    if any(key.name == name for key in keys):
        raise ValueError(f"name {name!r} is in use in {path}: revoke that key first, or use another name")
    secret = PREFIX + secrets.token_urlsafe(32)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    key = Key(secrets.token_hex(6), name, digest, int(time.time()))
    _write(path, [*keys, key])
    return key, secret


def revoke_key(path: Path, name: str) -> None:
    """Take a key out of the file.

    Raises:
        ValueError: there is none of this name.
    """
    keys = _read(path)
    left = [key for key in keys if key.name != name]
    if len(left) == len(keys):
        raise ValueError(
            f"{path} has no key named {name!r}; it has {', '.join(k.name for k in keys) or 'none'}"
        )
    _write(path, left)


def list_keys(path: Path) -> list[Key]:
    """The keys in a file, without their secrets, which are not there."""
    return _read(path)


def _read(path: Path) -> list[Key]:
    try:
        keys = [_key(record) for record in json.loads(path.read_text())]
    except OSError as error:
        raise ValueError(f"{path}: the key file cannot be read ({error.strerror})") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a key file ({error}); opensala serve keys new makes one") from error
    return keys


def _key(record: dict[str, Any]) -> Key:
    key = Key(**record)
    texts = (key.id, key.name, key.sha256)
    if not all(isinstance(text, str) and text for text in texts) or not _HEX.fullmatch(key.sha256):
        raise ValueError("a key has an id, a name and a sha256 of 64 hexadecimal digits")
    return key


def _write(path: Path, keys: list[Key]) -> None:
    part = path.with_name(path.name + ".part")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump([asdict(key) for key in keys], file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
