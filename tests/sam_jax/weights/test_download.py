"""Downloads from a server on this machine that behaves well, badly or not at all."""

import contextlib
import hashlib
import http.client
import http.server
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from sam_jax.weights import download
from sam_jax.weights.download import DownloadError, fetch

CONTENT = bytes(range(256)) * 4096 * 3 + b"end"  # 3 MiB and a bit: several reads, the last short
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = "model.pth"


@pytest.fixture(autouse=True)
def official(monkeypatch, tmp_path):
    """One small official file, and neither a proxy nor the user's own cache."""
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("SAM_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(
        download.OFFICIAL, "small", download.OfficialFile(NAME, len(CONTENT), SHA256)
    )


@pytest.fixture
def site():
    """A server whose `answer` each test sets; `ranges` lists the Range header of each request."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.ranges.append(self.headers.get("Range"))
            self.server.answer(self)

        def log_message(self, format, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.ranges = []
        server.answer = send
        server.url = f"http://127.0.0.1:{server.server_port}/"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def send(request, content=CONTENT, *, cut=None, ranges=True, content_range=None, length=True):
    """Answers as a web server does: all bytes, or those asked for; `cut` ends it too early."""
    start = 0
    if ranges and "Range" in request.headers:
        start = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        request.send_response(206)
        proper = f"bytes {start}-{len(content) - 1}/{len(content)}"
        request.send_header("Content-Range", content_range or proper)
    else:
        request.send_response(200)
    if length:
        request.send_header("Content-Length", str(len(content) - start))
    request.end_headers()
    with contextlib.suppress(ConnectionError):  # where the client has had enough
        request.wfile.write(content[start:cut])
    request.close_connection = True


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


def files(cache) -> dict[str, int]:
    """Sizes by name, without the lock, which stays."""
    found = {path.name: path.stat().st_size for path in cache.iterdir()}
    found.pop(f"{NAME}.lock", None)
    return found


def test_the_table():
    assert list(download.OFFICIAL)[:3] == ["sam_vit_b", "sam_vit_l", "sam_vit_h"]
    parameters = {"sam_vit_b": 93_735_472, "sam_vit_l": 312_342_832, "sam_vit_h": 641_090_608}
    for name, count in parameters.items():
        official = download.OFFICIAL[name]
        assert re.fullmatch(rf"{name}_[0-9a-f]{{6}}\.pth", official.name)
        assert len(bytes.fromhex(official.sha256)) == 32
        assert 0 < official.size - 4 * count < 200_000  # float32, and a little of pickle and zip


def test_full_download(site, tmp_path, capsys):
    path = fetch("small", base_url=site.url)
    assert path == tmp_path / "cache" / NAME
    assert path.read_bytes() == CONTENT
    assert files(path.parent) == {NAME: len(CONTENT)}
    assert site.ranges == [None]
    assert capsys.readouterr().err == ""  # no progress bar outside a terminal


def test_progress_on_a_terminal(site, cache, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    (cache / f"{NAME}.part").write_bytes(CONTENT[: len(CONTENT) // 2])
    fetch("small", base_url=site.url)
    first, *_, last = terminal.getvalue().strip().split("\r")
    assert f"{NAME}:  50%" in first
    assert f"{NAME}: 100%" in last
    assert "3.15M" in last


def test_cached_file_needs_no_request(site, cache):
    (cache / NAME).write_bytes(bytes(len(CONTENT)))  # its digest was verified long ago
    assert fetch("small", base_url=site.url) == cache / NAME
    assert site.ranges == []
    assert files(cache) == {NAME: len(CONTENT)}


def test_cached_file_of_wrong_size(site, cache):
    (cache / NAME).write_bytes(b"half")
    with pytest.raises(DownloadError, match=r"model\.pth has 4 bytes.* 3,145,731; delete it"):
        fetch("small", base_url=site.url)
    assert site.ranges == []
    assert files(cache) == {NAME: 4}


def test_cut_connection_is_continued(site, cache):
    site.answer = lambda request: send(request, cut=1_234_567)
    with pytest.raises(DownloadError, match=r"closed after 1,234,567 of 3,145,731 bytes.*again"):
        fetch("small", base_url=site.url)
    assert files(cache) == {f"{NAME}.part": 1_234_567}
    site.answer = send
    assert fetch("small", base_url=site.url).read_bytes() == CONTENT
    assert site.ranges == [None, "bytes=1234567-"]


def test_half_file_of_an_earlier_run(site, cache):
    (cache / f"{NAME}.part").write_bytes(CONTENT[:100])
    assert fetch("small", base_url=site.url).read_bytes() == CONTENT
    assert site.ranges == ["bytes=100-"]
    assert files(cache) == {NAME: len(CONTENT)}


def test_whole_file_that_was_not_renamed_yet(site, cache):
    (cache / f"{NAME}.part").write_bytes(CONTENT)
    assert fetch("small", base_url=site.url).read_bytes() == CONTENT
    assert site.ranges == []


def test_too_long_file_is_started_over(site, cache):
    (cache / f"{NAME}.part").write_bytes(CONTENT + b"?")
    site.answer = not_satisfiable
    assert fetch("small", base_url=site.url).read_bytes() == CONTENT


def test_bytes_are_on_disk_before_the_name(site, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, n=name, f=real: (calls.append(n), f(*args)))
    fetch("small", base_url=site.url)
    assert calls == ["fsync", "replace"]


def without_ranges(request):
    send(request, ranges=False)


def not_satisfiable(request):
    if "Range" in request.headers:
        request.send_response(416)
        request.send_header("Content-Range", "bytes */100")
        request.send_header("Content-Length", "0")
        request.end_headers()
    else:
        send(request)


def other_start(request):
    send(request, content_range=f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}")


def other_total(request):
    send(request, content_range=f"bytes 100-{len(CONTENT) - 2}/{len(CONTENT) - 1}")


@pytest.mark.parametrize("answer", [without_ranges, not_satisfiable, other_start, other_total])
def test_starts_over_where_the_server_cannot_continue(site, cache, answer):
    (cache / f"{NAME}.part").write_bytes(bytes(100))  # would spoil the digest if it were kept
    site.answer = answer
    assert fetch("small", base_url=site.url).read_bytes() == CONTENT
    assert site.ranges == ["bytes=100-", None]


@pytest.mark.parametrize("start", [0, 100, len(CONTENT)])
def test_wrong_digest(site, cache, start):
    spoilt = bytes([1]) + CONTENT[1:]
    (cache / f"{NAME}.part").write_bytes(spoilt[:start])
    site.answer = lambda request: send(request, spoilt)
    with pytest.raises(DownloadError) as error:
        fetch("small", base_url=site.url)
    got = hashlib.sha256(spoilt).hexdigest()
    assert str(error.value).endswith(f"SHA-256 is {got}, expected {SHA256}")  # no advice to retry
    assert files(cache) == {}


@pytest.mark.parametrize("start", [0, 100])
@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"?", CONTENT[:50], b""])
def test_wrong_length_is_refused_unread(site, cache, content, start):
    (cache / f"{NAME}.part").write_bytes(CONTENT[:start])
    site.answer = lambda request: send(request, content)
    if start > len(content):
        site.answer = lambda request: send(request, content, ranges=False)
    with pytest.raises(DownloadError, match=f"has {len(content)} bytes, the official .* 3145731"):
        fetch("small", base_url=site.url)
    assert files(cache) == {f"{NAME}.part": start}


def test_no_length_is_given(site):
    site.answer = lambda request: send(request, length=False)
    assert fetch("small", base_url=site.url).read_bytes() == CONTENT


def test_never_writes_more_than_the_official_size(site, cache):
    site.answer = lambda request: send(request, CONTENT * 2, length=False)
    assert fetch("small", base_url=site.url).read_bytes() == CONTENT
    site.answer = lambda request: send(request, b"?" * 2 * len(CONTENT), length=False)
    (cache / NAME).unlink()
    with pytest.raises(DownloadError, match="SHA-256"):
        fetch("small", base_url=site.url)


def redirect(request, location):
    request.send_response(302)
    request.send_header("Location", location)
    request.send_header("Content-Length", "0")
    request.end_headers()


@pytest.mark.parametrize(
    "location",
    [
        "ftp://127.0.0.1/model.pth",
        "file:///etc/passwd",
        "data:,model",
        "http://example.invalid/model.pth",
    ],
)
def test_redirect_to_another_scheme(site, cache, location):
    site.answer = lambda request: redirect(request, location)
    with pytest.raises(DownloadError, match="redirect"):
        fetch("small", base_url=site.url)
    assert files(cache) == {}


def test_redirect_on_this_machine(site, cache):
    def answer(request):
        return redirect(request, "/new/model.pth") if request.path == f"/{NAME}" else send(request)

    (cache / f"{NAME}.part").write_bytes(CONTENT[:100])
    site.answer = answer
    assert fetch("small", base_url=site.url).read_bytes() == CONTENT
    assert site.ranges == ["bytes=100-", "bytes=100-"]


@pytest.mark.parametrize("target", ["http://example.com/x", "http://127.0.0.1/x", "ftp://a/x"])
def test_redirect_never_leaves_https(target):
    request = urllib.request.Request("https://example.com/x")
    with pytest.raises(DownloadError, match="only https is allowed"):
        redirect_request(request, target)


def redirect_request(request, target):
    headers = http.client.HTTPMessage()
    return download._SafeRedirects().redirect_request(request, None, 302, "Found", headers, target)


def test_redirect_within_https():
    request = urllib.request.Request("https://example.com/x")
    target = "https://example.org/y"
    followed = redirect_request(request, target)
    assert followed.full_url == target


@pytest.mark.parametrize(
    "base_url", ["http://example.com/", "ftp://127.0.0.1/", "file:///tmp/", "model/", ""]
)
def test_only_https(base_url):
    with pytest.raises(ValueError, match="must start with https"):
        fetch("small", base_url=base_url)


def test_unknown_name(site):
    with pytest.raises(ValueError, match=r"one of sam_vit_b, sam_vit_l, sam_vit_h.*'sam_vit_x'"):
        fetch("sam_vit_x", base_url=site.url)


def test_offline(cache):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
    with pytest.raises(DownloadError) as error:
        fetch("small", base_url=url)
    message = str(error.value)
    for part in (f"{url}{NAME}", "refused", f"put it at exactly {cache / NAME}", "sam_jax.load"):
        assert part in message
    assert files(cache) == {}


def test_http_error(site, cache):
    site.answer = lambda request: request.send_error(404)
    with pytest.raises(DownloadError, match=r"404: Not Found.* with a browser"):
        fetch("small", base_url=site.url)
    (cache / f"{NAME}.part").write_bytes(CONTENT[:100])
    with pytest.raises(DownloadError, match="404: Not Found"):
        fetch("small", base_url=site.url)
    assert files(cache) == {f"{NAME}.part": 100}


def test_silent_server(site, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUT", 0.2)
    done = threading.Event()
    site.answer = lambda request: done.wait(10)
    with pytest.raises(DownloadError, match="timed out"):
        fetch("small", base_url=site.url)
    done.set()


def test_nonsense_instead_of_http(site):
    site.answer = lambda request: request.wfile.write(b"nonsense\r\n\r\n")
    with pytest.raises(DownloadError, match="nonsense"):
        fetch("small", base_url=site.url)


def test_folder_that_cannot_be_made(site, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="Not a directory"):
        fetch("small", base_url=site.url, cache_dir=tmp_path / "file" / "cache")


def test_cache_folder(site, tmp_path, monkeypatch):
    assert fetch("small", base_url=site.url, cache_dir=str(tmp_path / "a")).parent == tmp_path / "a"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch("small", base_url=site.url).parent == tmp_path / "cache"
    monkeypatch.setenv("SAM_JAX_CACHE", "~/own")
    assert fetch("small", base_url=site.url).parent == tmp_path / "home/own"
    monkeypatch.setenv("SAM_JAX_CACHE", "")
    assert fetch("small", base_url=site.url).parent == tmp_path / "xdg/sam_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert fetch("small", base_url=site.url).parent == tmp_path / "home/.cache/sam_jax"
    assert len(site.ranges) == 5


CHILD = f"""
import sys
from sam_jax.weights import download
download.OFFICIAL["small"] = download.OfficialFile({NAME!r}, {len(CONTENT)}, {SHA256!r})
download.fetch("small", base_url=sys.argv[1])
"""


def start_child(url) -> subprocess.Popen:
    root = Path(download.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.Popen([sys.executable, "-c", CHILD, url], env=environment)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_in_the_middle(site, cache):
    done = threading.Event()

    def stall(request):
        request.send_response(200)
        request.send_header("Content-Length", str(len(CONTENT)))
        request.end_headers()
        request.wfile.write(CONTENT[: 2 * 2**20 + 100])
        done.wait(30)

    site.answer = stall
    child = start_child(site.url)
    part = cache / f"{NAME}.part"
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done.set()
    assert list(files(cache)) == [part.name]
    have = part.stat().st_size
    assert 0 < have < len(CONTENT)
    site.answer = send
    assert fetch("small", base_url=site.url).read_bytes() == CONTENT
    assert site.ranges == [None, f"bytes={have}-"]
    assert list(files(cache)) == [NAME]


@pytest.mark.skipif(sys.platform == "win32", reason="needs fcntl")
def test_two_processes_download_once(site, cache):
    """Both are started before the server sends a byte; the second waits for the first's file."""
    both = threading.Event()

    def answer(request):
        both.wait(30)
        send(request)

    site.answer = answer
    children = [start_child(site.url) for _ in range(2)]
    time.sleep(1)
    both.set()
    assert [child.wait(timeout=30) for child in children] == [0, 0]
    assert site.ranges == [None]
    assert (cache / NAME).read_bytes() == CONTENT
    assert list(files(cache)) == [NAME]
