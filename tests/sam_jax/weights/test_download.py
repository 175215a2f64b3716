"""Tests downloads from a local server that answers correctly, wrongly or not at all."""

import contextlib
import hashlib
import http.client
import http.server
import io
import logging
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

# The content is slightly longer than 3 MiB, so that the last read is short.
CONTENT = bytes(range(256)) * 4096 * 3 + b"end"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = "model.pth"


@pytest.fixture(autouse=True)
def official(monkeypatch, tmp_path):
    """Adds a small official file, and disables proxies and the cache of the user."""
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("SAM_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(
        download.OFFICIAL, "small", download.OfficialFile(NAME, len(CONTENT), SHA256)
    )


@pytest.fixture
def site():
    """Yields a server. Tests set its `answer`, and `ranges` lists the Range headers of requests."""

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
    """Sends all bytes or the requested range. `cut` is the end of an incomplete answer."""
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
    with contextlib.suppress(ConnectionError):  # the client may close the connection first
        request.wfile.write(content[start:cut])
    request.close_connection = True


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


def files(cache) -> dict[str, int]:
    """Returns the sizes of files by name, except for the lock file, which is kept."""
    found = {path.name: path.stat().st_size for path in cache.iterdir()}
    found.pop(f"{NAME}.lock", None)
    return found


def test_official_files_have_the_sizes_of_their_models():
    assert list(download.OFFICIAL)[:3] == ["sam_vit_b", "sam_vit_l", "sam_vit_h"]
    parameters = {"sam_vit_b": 93_735_472, "sam_vit_l": 312_342_832, "sam_vit_h": 641_090_608}
    for name, count in parameters.items():
        official = download.OFFICIAL[name]
        assert re.fullmatch(rf"{name}_[0-9a-f]{{6}}\.pth", official.name)
        assert len(bytes.fromhex(official.sha256)) == 32
        # The values are float32. Pickle and zip add a small overhead.
        assert 0 < official.size - 4 * count < 200_000


def test_a_file_is_downloaded_to_the_cache(site, tmp_path, capsys):
    path = fetch("small", base_url=site.url)
    assert path == tmp_path / "cache" / NAME
    assert path.read_bytes() == CONTENT
    assert files(path.parent) == {NAME: len(CONTENT)}
    assert site.ranges == [None]
    assert capsys.readouterr().err == ""  # no progress bar outside a terminal


def test_terminals_show_progress(site, cache, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    (cache / f"{NAME}.part").write_bytes(CONTENT[: len(CONTENT) // 2])
    fetch("small", base_url=site.url)
    first, *_, last = terminal.getvalue().strip().split("\r")
    assert f"{NAME}:  50%" in first
    assert f"{NAME}: 100%" in last
    assert "3.15M" in last


def test_cached_files_need_no_request(site, cache):
    (cache / NAME).write_bytes(bytes(len(CONTENT)))  # the digest is not verified again
    assert fetch("small", base_url=site.url) == cache / NAME
    assert site.ranges == []
    assert files(cache) == {NAME: len(CONTENT)}


def test_cached_files_of_wrong_size_are_errors(site, cache):
    (cache / NAME).write_bytes(b"half")
    with pytest.raises(DownloadError, match=r"model\.pth has 4 bytes.* 3,145,731; delete it"):
        fetch("small", base_url=site.url)
    assert site.ranges == []
    assert files(cache) == {NAME: 4}


def test_a_closed_connection_is_resumed(site, cache):
    site.answer = lambda request: send(request, cut=1_234_567)
    with pytest.raises(DownloadError, match=r"closed after 1,234,567 of 3,145,731 bytes.*again"):
        fetch("small", base_url=site.url)
    assert files(cache) == {f"{NAME}.part": 1_234_567}
    site.answer = send
    assert fetch("small", base_url=site.url).read_bytes() == CONTENT
    assert site.ranges == [None, "bytes=1234567-"]


def test_a_partial_file_is_resumed(site, cache):
    (cache / f"{NAME}.part").write_bytes(CONTENT[:100])
    assert fetch("small", base_url=site.url).read_bytes() == CONTENT
    assert site.ranges == ["bytes=100-"]
    assert files(cache) == {NAME: len(CONTENT)}


def test_a_complete_partial_file_needs_no_request(site, cache):
    (cache / f"{NAME}.part").write_bytes(CONTENT)
    assert fetch("small", base_url=site.url).read_bytes() == CONTENT
    assert site.ranges == []


def test_a_partial_file_that_is_too_long_is_restarted(site, cache):
    (cache / f"{NAME}.part").write_bytes(CONTENT + b"?")
    site.answer = not_satisfiable
    assert fetch("small", base_url=site.url).read_bytes() == CONTENT


def test_bytes_are_synced_before_the_file_is_renamed(site, monkeypatch):
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
def test_the_download_restarts_if_the_server_cannot_resume(site, cache, answer):
    (cache / f"{NAME}.part").write_bytes(bytes(100))  # these would change the digest
    site.answer = answer
    assert fetch("small", base_url=site.url).read_bytes() == CONTENT
    assert site.ranges == ["bytes=100-", None]


@pytest.mark.parametrize("start", [0, 100, len(CONTENT)])
def test_wrong_digests_are_errors(site, cache, start):
    damaged = bytes([1]) + CONTENT[1:]
    (cache / f"{NAME}.part").write_bytes(damaged[:start])
    site.answer = lambda request: send(request, damaged)
    with pytest.raises(DownloadError) as error:
        fetch("small", base_url=site.url)
    got = hashlib.sha256(damaged).hexdigest()
    assert str(error.value).endswith(f"SHA-256 is {got}, expected {SHA256}")  # no advice to retry
    assert files(cache) == {}


@pytest.mark.parametrize("start", [0, 100])
@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"?", CONTENT[:50], b""])
def test_wrong_lengths_are_refused_before_reading(site, cache, content, start):
    (cache / f"{NAME}.part").write_bytes(CONTENT[:start])
    site.answer = lambda request: send(request, content)
    if start > len(content):
        site.answer = lambda request: send(request, content, ranges=False)
    with pytest.raises(DownloadError, match=f"has {len(content)} bytes, the official .* 3145731"):
        fetch("small", base_url=site.url)
    assert files(cache) == {f"{NAME}.part": start}


def test_answers_without_a_length_are_read(site):
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
def test_redirects_to_other_schemes_are_errors(site, cache, location):
    site.answer = lambda request: redirect(request, location)
    with pytest.raises(DownloadError, match="redirect"):
        fetch("small", base_url=site.url)
    assert files(cache) == {}


def test_redirects_within_the_server_are_followed(site, cache):
    def answer(request):
        return redirect(request, "/new/model.pth") if request.path == f"/{NAME}" else send(request)

    (cache / f"{NAME}.part").write_bytes(CONTENT[:100])
    site.answer = answer
    assert fetch("small", base_url=site.url).read_bytes() == CONTENT
    assert site.ranges == ["bytes=100-", "bytes=100-"]


@pytest.mark.parametrize("target", ["http://example.com/x", "http://127.0.0.1/x", "ftp://a/x"])
def test_redirects_from_https_to_other_schemes_are_errors(target):
    request = urllib.request.Request("https://example.com/x")
    with pytest.raises(DownloadError, match="only https is allowed"):
        redirect_request(request, target)


def redirect_request(request, target):
    headers = http.client.HTTPMessage()
    return download._SafeRedirects().redirect_request(request, None, 302, "Found", headers, target)


def test_redirects_within_https_are_followed():
    request = urllib.request.Request("https://example.com/x")
    target = "https://example.org/y"
    followed = redirect_request(request, target)
    assert followed.full_url == target


@pytest.mark.parametrize(
    "base_url", ["http://example.com/", "ftp://127.0.0.1/", "file:///tmp/", "model/", ""]
)
def test_base_urls_must_start_with_https(base_url):
    with pytest.raises(ValueError, match="must start with https"):
        fetch("small", base_url=base_url)


def test_unknown_names_are_errors(site):
    with pytest.raises(ValueError, match=r"one of sam_vit_b, sam_vit_l, sam_vit_h.*'sam_vit_x'"):
        fetch("sam_vit_x", base_url=site.url)


def test_refused_connections_are_errors_with_instructions(cache):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
    with pytest.raises(DownloadError) as error:
        fetch("small", base_url=url)
    message = str(error.value)
    for part in (f"{url}{NAME}", "refused", f"put it at exactly {cache / NAME}", "as the weights"):
        assert part in message
    assert files(cache) == {}


def test_http_errors_are_reported(site, cache):
    site.answer = lambda request: request.send_error(404)
    with pytest.raises(DownloadError, match=r"404: Not Found.* with a browser"):
        fetch("small", base_url=site.url)
    (cache / f"{NAME}.part").write_bytes(CONTENT[:100])
    with pytest.raises(DownloadError, match="404: Not Found"):
        fetch("small", base_url=site.url)
    assert files(cache) == {f"{NAME}.part": 100}


def test_a_server_that_does_not_answer_times_out(site, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUT", 0.2)
    done = threading.Event()
    site.answer = lambda request: done.wait(10)
    with pytest.raises(DownloadError, match="timed out"):
        fetch("small", base_url=site.url)
    done.set()


def trickle(request, start, pause):
    """Sends a part of the content, and then one byte at a time."""
    request.send_response(200)
    request.send_header("Content-Length", str(len(CONTENT)))
    request.end_headers()
    with contextlib.suppress(ConnectionError):
        request.wfile.write(CONTENT[:start])
        for byte in CONTENT[start:]:
            if pause.wait(0.02):
                break
            request.wfile.write(bytes([byte]))
    request.close_connection = True


def test_a_slow_server_is_given_up(site, cache, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUT", 0.3)
    done = threading.Event()
    site.answer = lambda request: trickle(request, 5000, done)
    with pytest.raises(DownloadError, match=r"only \d+ bytes arrived in \d+ s.*again to continue"):
        fetch("small", base_url=site.url)
    done.set()
    (part,) = files(cache).items()
    assert part[0] == f"{NAME}.part"
    assert part[1] >= 5000
    site.answer = send  # the lock is free, and the download goes on where it ended
    assert fetch("small", base_url=site.url).read_bytes() == CONTENT
    assert site.ranges == [None, f"bytes={part[1]}-"]


def test_slow_headers_are_given_up(site, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUT", 0.2)
    done = threading.Event()

    def answer(request):
        with contextlib.suppress(ConnectionError):
            request.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            while not done.wait(0.02):
                request.wfile.write(b"x")
        request.close_connection = True

    site.answer = answer
    with pytest.raises(DownloadError, match=r"did not answer in 0\.6"):
        fetch("small", base_url=site.url)
    done.set()


@pytest.mark.skipif(sys.platform == "win32", reason="needs fcntl")
def test_those_who_wait_say_for_whom(site, cache, monkeypatch, caplog):
    monkeypatch.setattr(download, "_POLL", 0.01)
    started, go_on = threading.Event(), threading.Event()

    def answer(request):
        started.set()
        go_on.wait(60)
        send(request)

    def report(record):
        go_on.set()  # the first download ends as soon as the second has said that it waits
        return True

    site.answer = answer
    monkeypatch.setattr(download.log, "filters", [report])
    first = threading.Thread(target=fetch, args=["small"], kwargs={"base_url": site.url})
    first.start()
    assert started.wait(60)
    with caplog.at_level(logging.WARNING, logger="sam_jax"):
        assert fetch("small", base_url=site.url).read_bytes() == CONTENT
    first.join()
    message = rf"waiting for process {os.getpid()} on .+, which downloads {re.escape(NAME)} \(0 s"
    assert re.match(message, caplog.messages[0])
    assert site.ranges == [None]


def test_answers_that_are_not_http_are_errors(site):
    site.answer = lambda request: request.wfile.write(b"nonsense\r\n\r\n")
    with pytest.raises(DownloadError, match="nonsense"):
        fetch("small", base_url=site.url)


def test_a_cache_folder_that_cannot_be_created_is_an_error(site, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="Not a directory"):
        fetch("small", base_url=site.url, cache_dir=tmp_path / "file" / "cache")


def test_the_cache_folder_is_chosen_by_argument_or_environment(site, tmp_path, monkeypatch):
    assert fetch("small", base_url=site.url, cache_dir=str(tmp_path / "a")).parent == tmp_path / "a"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch("small", base_url=site.url).parent == tmp_path / "cache"
    monkeypatch.setenv("SAM_JAX_CACHE", "~/custom")
    assert fetch("small", base_url=site.url).parent == tmp_path / "home/custom"
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
def test_a_killed_download_is_resumed(site, cache):
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
    """Starts both before the server sends a byte. The second waits for the file of the first."""
    both_started = threading.Event()

    def answer(request):
        both_started.wait(30)
        send(request)

    site.answer = answer
    children = [start_child(site.url) for _ in range(2)]
    time.sleep(1)
    both_started.set()
    assert [child.wait(timeout=30) for child in children] == [0, 0]
    assert site.ranges == [None]
    assert (cache / NAME).read_bytes() == CONTENT
    assert list(files(cache)) == [NAME]
