"""Keys: never kept in clear, compared as a whole, taken back at run time."""

import hashlib
import json
import os
import stat

import pytest

from opensala.server import KeyFile, list_keys, new_key, revoke_key


def test_a_key_is_known_by_its_hash_only(tmp_path):
    path = tmp_path / "keys.json"
    key, secret = new_key(path, "ada")
    assert secret.startswith("sala-") and len(secret) > 45
    assert secret not in path.read_text() and key.sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    other, second = new_key(path, "bob")
    keys = KeyFile(path)
    assert keys.owner(secret) == key and keys.owner(second) == other
    for wrong in ("", "sala-", secret[:-1], secret + "x", key.sha256, secret.upper(), "\udcff"):
        assert keys.owner(wrong) is None
    assert [k.name for k in list_keys(path)] == ["ada", "bob"] and len({key.id, other.id}) == 2


def test_a_key_can_be_taken_back(tmp_path):
    path = tmp_path / "keys.json"
    _, secret = new_key(path, "ada")
    keys = KeyFile(path)
    assert keys.owner(secret) is not None
    revoke_key(path, "ada")
    os.utime(path, ns=(1, 1))
    assert keys.owner(secret) is None
    with pytest.raises(ValueError, match="no key named 'ada'; it has none"):
        revoke_key(path, "ada")


def test_every_stored_key_is_compared(tmp_path, monkeypatch):
    """As long for a wrong key as for a right one, and never with ==."""
    path = tmp_path / "keys.json"
    secrets = [new_key(path, name)[1] for name in "abc"]
    keys, seen = KeyFile(path), []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: seen.append((a, b)) or a == b)
    for presented in (secrets[0], secrets[2], "wrong"):
        del seen[:]
        keys.owner(presented)
        assert len(seen) == 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "5",
        "{}5",
        '[{"id": "a"}]',
        '[{"id": "a", "name": "b", "sha256": "abc", "created": 1}]',
        '["a"]',
        "[5]",
    ],
)
def test_what_is_no_key_file(tmp_path, text):
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="not a key file"):
        KeyFile(path)
    with pytest.raises(ValueError, match="not a key file"):
        new_key(path, "ada")
    assert path.read_text() == text


def test_names_and_missing_files(tmp_path):
    path = tmp_path / "keys.json"
    with pytest.raises(ValueError, match="cannot be read"):
        KeyFile(path)
    with pytest.raises(ValueError, match="name is empty"):
        new_key(path, " ")
    new_key(path, "ada")
    with pytest.raises(ValueError, match="'ada' is in use"):
        new_key(path, "ada")
    assert len(json.loads(path.read_text())) == 1
