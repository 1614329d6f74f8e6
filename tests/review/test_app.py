"""Who is let in, and who is not."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedqc.config import load_site
from fedqc.curation.manifest import read_manifest
from fedqc.errors import ConfigError
from fedqc.review import app as module
from fedqc.review.app import ReviewApp
from fedqc.review.serve import serve_review
from fedqc.review.worklist import Worklist

PORT = 8123
HOME = f"http://127.0.0.1:{PORT}"


class Client:
    """A browser, as far as requests go."""

    def __init__(self, review: ReviewApp, home: str = HOME) -> None:
        self._app = review.app
        self._home = home
        self._secret = ""

    def get(self, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self._ask("GET", path, **options))

    def post(self, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self._ask("POST", path, **options))

    async def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self._app)
        headers = {"x-fedqc": self._secret} | options.pop("headers", {})
        async with httpx.AsyncClient(transport=transport, base_url=self._home) as client:
            return await client.request(method, path, headers=headers, **options)

    def enter(self, address: str) -> httpx.Response:
        """As the page does with what stands behind the `#`."""
        response = self.post("/api/enter", content=address.partition("#")[2], headers={"origin": self._home})
        if response.status_code == 200:
            self._secret = response.json()["secret"]
        return response


@pytest.fixture
def review(worklist: Worklist) -> ReviewApp:
    return ReviewApp(worklist, PORT)


@pytest.fixture
def stranger(review: ReviewApp) -> Client:
    return Client(review)


@pytest.fixture
def client(review: ReviewApp, stranger: Client) -> Client:
    """Someone who opened the address."""
    assert stranger.enter(review.address).status_code == 200
    return stranger


def decide(client: Client, body: Any, **headers: str) -> Any:
    if isinstance(body, dict) and body.get("seen") == "it":
        body = body | {"seen": client.get("/api/cases/3").json().get("seen", "")}
    return client.post("/api/cases/3/decision", content=json.dumps(body), headers={"origin": HOME} | headers)


KEEP = {"choice": "keep", "reason": "fine", "seen": "it"}


def test_the_address_opens_the_page_once(client: Client, review: ReviewApp) -> None:
    assert client.get("/api/worklist").json()["site"] == "hospital-a"
    refused = Client(review).enter(review.address)
    assert refused.status_code == 403
    assert "used already" in refused.json()["error"]


def test_the_page_itself_holds_nothing_of_the_site(stranger: Client) -> None:
    page = stranger.get("/")
    assert "<title>fedqc review</title>" in page.text
    assert "hospital-a" not in page.text


@pytest.mark.parametrize(
    "path", ["/api/worklist", "/api/cases/0", "/api/cases/0/volumes/label.nii.gz", "/api/cases/99"]
)
@pytest.mark.parametrize("secret", [None, "", "guess"])
def test_without_the_token_nothing_is_told(stranger: Client, path: str, secret: str | None) -> None:
    refused = stranger.get(path, headers={} if secret is None else {"x-fedqc": secret})
    assert refused.status_code == 403
    assert refused.json() == {
        "error": "open the address that the command printed; it works once for each start"
    }


def test_a_wrong_token_does_not_use_the_right_one_up(stranger: Client, review: ReviewApp) -> None:
    assert stranger.enter("#guess").status_code == 403
    assert stranger.enter("#").status_code == 403
    assert stranger.get("/api/enter").status_code == 405
    assert stranger.enter(review.address).status_code == 200


def test_another_host_name_is_refused(client: Client, review: ReviewApp) -> None:
    """A page elsewhere whose name was made to point to this machine."""
    for host in ("evil.example", f"evil.example:{PORT}", "127.0.0.1", f"127.0.0.1:{PORT + 1}", ""):
        for path in ("/", "/static/page.js", "/api/worklist"):
            assert client.get(path, headers={"host": host}).status_code == 421
    assert client.get("/api/worklist", headers={"host": f"localhost:{PORT}"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": f"https://127.0.0.1:{PORT}"},
        {"sec-fetch-site": "cross-site"},
    ],
)
def test_other_pages_are_refused(client: Client, site: Path, headers: dict[str, str]) -> None:
    assert client.get("/api/worklist", headers=headers).status_code == 403
    assert decide(client, KEEP, **headers).status_code == 403
    manifest = read_manifest(load_site(site).results / "manifest.json")
    assert not any(entry.overruled for entry in manifest.entries)


def test_a_decision_is_saved(client: Client, site: Path) -> None:
    saved = decide(client, KEEP)
    assert saved.status_code == 200
    assert saved.json()["outcome"] == "keep"
    manifest = read_manifest(load_site(site).results / "manifest.json")
    assert [entry.id for entry in manifest.entries if entry.overruled] == ["bad"]
    assert decide(client, {"choice": None, "reason": "", "seen": "it"}).json()["outcome"] == "drop"


@pytest.mark.parametrize(
    "change",
    [{"choice": "review"}, {"choice": ["keep"]}, {"reason": 3}, {"reason": "x" * 10_000}, {"seen": None},
     {"by": "someone else"}],
)  # fmt: skip
def test_what_is_no_decision_is_refused(client: Client, change: dict[str, Any]) -> None:
    refused = decide(client, KEEP | change)
    assert refused.status_code == 400
    assert refused.json()["error"]


@pytest.mark.parametrize("body", [None, [], {}, {"choice": "keep"}])
def test_what_is_no_request_is_refused(client: Client, body: Any) -> None:
    assert decide(client, body).status_code == 400


def test_a_reason_longer_than_a_manifest_holds_is_told(client: Client) -> None:
    refused = decide(client, KEEP | {"reason": "x" * 3000})
    assert refused.status_code == 409
    assert "2000" in refused.json()["error"]


def test_what_was_not_looked_at_is_not_decided(client: Client) -> None:
    refused = decide(client, KEEP | {"seen": "something else"})
    assert refused.status_code == 409
    assert "open it again" in refused.json()["error"]


def test_volumes_are_the_files_themselves(client: Client, site: Path) -> None:
    for name, path in (("t1", "data/1-t1.nii.gz"), ("errors", "results/error_maps/near.nii.gz")):
        sent = client.get(f"/api/cases/0/volumes/{name}.nii.gz")
        assert sent.content == (site.parent / path).read_bytes()
        assert sent.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "path",
    ["/api/cases/0/volumes/..%2Fsite.toml", "/api/cases/0/volumes/t9.nii", "/api/cases/9", "/api/cases/-1",
     "/static/..%2Fapp.py", "/static/app.py", "/api"],
)  # fmt: skip
def test_what_is_not_there_is_not_found(client: Client, path: str) -> None:
    assert client.get(path).status_code == 404


def test_a_file_that_is_gone_is_named(client: Client, site: Path) -> None:
    (site.parent / "data" / "1-t1.nii.gz").unlink()
    gone = client.get("/api/cases/0/volumes/t1.nii.gz")
    assert gone.status_code == 404
    assert "1-t1.nii.gz: No such file" in gone.json()["error"]


@pytest.mark.parametrize("path", ["/", "/nothing", "/api/worklist", "/api/cases/0/volumes/t9.nii"])
def test_nothing_may_be_kept_or_framed_or_come_from_elsewhere(client: Client, path: str) -> None:
    headers = client.get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'self'" in policy
    assert "http" not in policy
    assert headers["cache-control"] == "no-store"
    assert "set-cookie" not in headers


def test_the_page_asks_nothing_of_the_network() -> None:
    for name in ("page.html", "page.css", "page.js"):
        text = (module.STATIC / name).read_text()
        assert "http:" not in text
        assert "https:" not in text


def test_a_port_that_is_taken_is_told(worklist: Worklist, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(
        "fedqc.review.serve.VIEWER", module.STATIC / "page.js"
    )  # whether npm was there or not
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="name another one"):
            serve_review(worklist, taken.getsockname()[1], lambda address: None)


def test_an_installation_without_the_viewer_says_how_to_mend_it(
    worklist: Worklist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedqc.review.serve.VIEWER", tmp_path / "niivue.js")
    with pytest.raises(ConfigError, match=r"no viewer in this installation; install Node\.js"):
        serve_review(worklist, 0, lambda address: None)
