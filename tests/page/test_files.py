"""The page's files: served without a key, under a strict policy, unchanged libraries, part of the wheel."""

import hashlib
import re
from importlib.resources import files
from pathlib import Path

import httpx2
import pytest

from opensala.server import KeyFile, new_key

ROOT = Path(__file__).parents[2]
STATIC = files("opensala.server.page").joinpath("static")
MODULES = sorted(path.name for path in Path(str(STATIC)).glob("*.js"))


def get(live, path, **headers):
    return httpx2.get(f"{live.url}{path}", headers=headers, trust_env=False)


def test_the_page_is_served_under_a_strict_policy(live):
    page = get(live, "/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["style-src"] == policy["connect-src"] == policy["img-src"] == "'self'"
    assert re.fullmatch(r"'self' 'sha256-[\w+/]{43}='", policy["script-src"]), "no inline script but the map"
    assert page.headers["x-content-type-options"] == "nosniff"
    again = get(live, "/", **{"if-none-match": page.headers["etag"]})
    assert again.status_code == 304 and not again.content


@pytest.mark.parametrize("name", [*MODULES, "page.css", "icon.svg", "vendor/preact.mjs", "vendor/htm.mjs"])
def test_every_file_is_served_as_it_is(live, name):
    answer = get(live, f"/page/{name}")
    assert answer.content == STATIC.joinpath(name).read_bytes()
    kind = {"css": "text/css", "svg": "image/svg+xml"}.get(name.rpartition(".")[2], "text/javascript")
    assert answer.headers["content-type"].startswith(kind)


@pytest.mark.parametrize(
    "name", ["nothing.js", "__init__.py", "../guard.py", "%2e%2e/guard.py", "vendor", ""]
)
def test_nothing_else_is(live, name):
    answer = get(live, f"/page/{name}")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"


def test_the_page_needs_no_key_but_what_it_asks_for_does(start, tmp_path):
    path = tmp_path / "keys.json"
    new_key(path, "ada")
    live = start(keys=KeyFile(path))
    assert get(live, "/").status_code == get(live, "/page/main.js").status_code == 200
    assert get(live, "/v1/server").status_code == get(live, "/page").status_code == 401


def test_the_libraries_are_those_that_the_list_names():
    listed = re.findall(
        r"^\| `(\S+)` \|.*\(`(LICENSE-\w+)`\) \| `(\w{64})` \|$",
        STATIC.joinpath("vendor/README.md").read_text(),
        re.M,
    )
    vendor = Path(str(STATIC)) / "vendor"
    assert {name for name, _, _ in listed} == {path.name for path in vendor.glob("*.mjs")}
    for name, licence, digest in listed:
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == digest
        assert (vendor / licence).stat().st_size > 1000


def test_nothing_is_loaded_from_elsewhere():
    """Modules import the page's own files and the libraries; no address of another place is in them."""
    for name in (*MODULES, "index.html", "page.css"):
        text = STATIC.joinpath(name).read_text()
        assert not re.search(r"(?:https?:)?//\w", text.replace("http://www.w3.org/2000/svg", "")), name
        for wanted in re.findall(r'from "([^"]+)"', text):
            known = wanted in ("preact", "preact/hooks", "htm")
            assert known or STATIC.joinpath(wanted.removeprefix("/page/")).is_file(), wanted


def test_the_wheel_has_the_page():
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    listed = {
        entry.distribution_path for entry in wheel.WheelBuilder(str(ROOT)).recurse_selected_project_files()
    }
    for path in Path(str(STATIC)).rglob("*"):
        if path.is_file():
            assert path.relative_to(ROOT).as_posix() in listed
