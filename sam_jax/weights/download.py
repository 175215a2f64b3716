"""Downloads the official weights once, into a cache folder.

Source: the links in the README of facebookresearch/segment-anything dca509f. The table pins the
size and the SHA-256 of each file. A download gets the file's name only after its digest has been
verified, so a file under that name is complete.

Differences: pooch, the usual library for this, neither resumes a partial file, which may be 2.5 GB,
nor lets several processes wait for one download.
"""

import contextlib
import hashlib
import http.client
import logging
import os
import queue
import socket
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tqdm import tqdm

if sys.platform != "win32":
    import fcntl

BASE_URL = "https://dl.fbaipublicfiles.com/segment_anything/"


class OfficialFile(NamedTuple):
    """A published weights file.

    Attributes:
      name: Its name on the server and in the cache.
      size: Its size in bytes.
      sha256: Its digest, in hexadecimal digits.
    """

    name: str
    size: int
    sha256: str


OFFICIAL = {
    "sam_vit_b": OfficialFile(
        "sam_vit_b_01ec64.pth",
        375_042_383,
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "sam_vit_l": OfficialFile(
        "sam_vit_l_0b3195.pth",
        1_249_524_607,
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "sam_vit_h": OfficialFile(
        "sam_vit_h_4b8939.pth",
        2_564_550_879,
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
}
# A server must send something within this many seconds and, over such a time, this many bytes a
# second. It must begin to answer, with all redirects, within three times as many seconds.
_TIMEOUT, _MIN_SPEED = 60, 1000
_CHUNK_SIZE = 2**20  # bytes
_POLL = 0.5  # seconds between attempts to get a lock

log = logging.getLogger("sam_jax")


class DownloadError(OSError):
    """A file that cannot be downloaded, or that is not the official one."""


def fetch(name: str, *, cache_dir: str | Path | None = None, base_url: str = BASE_URL) -> Path:
    """Returns the path of an official file, and downloads it if it is not in the cache.

    A file in the cache is neither requested nor read: either it was verified before it was renamed,
    or the user put it there. A partial download is kept as `<file>.part`, and the next call resumes
    it. While another process downloads the file, this one waits, and logs which process it waits
    for.

    Args:
      name: A key of `OFFICIAL`.
      cache_dir: The cache folder. By default $SAM_JAX_CACHE, else $XDG_CACHE_HOME/sam_jax, else
        ~/.cache/sam_jax.
      base_url: The URL of the folder of the files on a mirror: https, or http on this machine.

    Returns:
      The path of the file.

    Raises:
      ValueError: If the name is unknown or the URL is not allowed.
      DownloadError: If the file cannot be downloaded, has another size or digest, or if the server
        sends nothing or very little for a minute.
    """
    if name not in OFFICIAL:
        raise ValueError(f"name must be one of {', '.join(OFFICIAL)}; got {name!r}")
    official = OFFICIAL[name]
    url = f"{base_url.rstrip('/')}/{official.name}"
    if not (_is_https(url) or _is_local(url)):
        raise ValueError(f"base_url must start with https://; got {base_url!r}")

    path = _cache_folder(cache_dir) / official.name
    if not path.exists():
        try:
            _fetch(url, path, official)
        except DownloadError:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise DownloadError(
                f"could not download {url}: {error}. Call again to continue; or download it with "
                f"a browser and put it at exactly {path}, or pass its path as the weights."
            ) from error
    if (size := path.stat().st_size) != official.size:
        raise DownloadError(
            f"{path} has {size:,} bytes, the official file has {official.size:,}; delete it and "
            "call again"
        )
    return path


def _fetch(url: str, path: Path, official: OfficialFile) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(f"{path.name}.lock")):
        if path.exists():  # another process downloaded it while this one waited
            return
        part = path.with_name(f"{path.name}.part")
        _download(url, part, official.size)
        _publish(part, path, official.sha256)


def _cache_folder(cache_dir: str | Path | None) -> Path:
    folder = cache_dir or os.environ.get("SAM_JAX_CACHE")
    if not folder:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "sam_jax"
    return Path(folder).expanduser()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock, so that other processes wait and then find the complete file.

    The file tells who holds the lock. Those who wait log it, first at once and then every minute.
    The lock is a separate file, which is never deleted, because a lock on the partial file would
    become one on the complete file when that is renamed. Without locks (on Windows and some network
    file systems) two processes can corrupt each other's download, which its digest or size detects.
    """
    with open(path, "a+") as file:
        if sys.platform != "win32":
            with contextlib.suppress(OSError):
                _wait_for_lock(file, path)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _wait_for_lock(file: TextIO, path: Path) -> None:
    started, next_report = time.monotonic(), 0.0
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            waited = time.monotonic() - started
        if waited >= next_report:
            file.seek(0)
            holder = file.read(200) or "another process"
            log.warning(
                "waiting for %s, which downloads %s (%.0f s so far)", holder, path.stem, waited
            )
            next_report = waited + _TIMEOUT
        time.sleep(_POLL)


def _download(url: str, part: Path, size: int) -> None:
    """Appends to a partial file until it has `size` bytes, and never writes more."""
    have = part.stat().st_size if part.exists() else 0
    if have == size:
        return
    response = _open_from(url, have, size) if have else None
    if response is None:
        have, response = 0, _open_from_start(url, size)
    bar = tqdm(
        desc=part.stem,
        initial=have,
        total=size,
        unit="B",
        unit_scale=True,
        disable=None,  # except on a terminal
    )
    with response, open(part, "ab" if have else "wb") as file, bar:
        since, received = time.monotonic(), 0
        while have < size and (chunk := response.read1(min(_CHUNK_SIZE, size - have))):
            file.write(chunk)
            have += len(chunk)
            bar.update(len(chunk))
            received += len(chunk)
            if (elapsed := time.monotonic() - since) >= _TIMEOUT:
                if received < _MIN_SPEED * elapsed:
                    raise TimeoutError(f"only {received:,} bytes arrived in {elapsed:.0f} s")
                since, received = time.monotonic(), 0
    if have < size:
        raise ConnectionError(f"the connection was closed after {have:,} of {size:,} bytes")


def _publish(part: Path, path: Path, sha256: str) -> None:
    """Verifies a file and renames it; deletes it if its digest is wrong."""
    with open(part, "r+b") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(
            file.fileno()
        )  # before the name, which after a power cut must mean a complete file
    if digest != sha256:
        part.unlink()
        raise DownloadError(
            f"the download of {path.name} was deleted: its SHA-256 is {digest}, expected {sha256}"
        )
    os.replace(part, path)


def _open_from(url: str, start: int, size: int) -> http.client.HTTPResponse | None:
    """Requests the bytes from `start`; returns None if the server does not offer exactly those."""
    try:
        response = _open(url, {"Range": f"bytes={start}-"})
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return None
        raise
    offered = response.headers.get("Content-Range")
    exact = f"bytes {start}-{size - 1}/{size}"
    if response.status == HTTPStatus.PARTIAL_CONTENT and offered == exact:
        return response
    response.close()
    return None


def _open_from_start(url: str, size: int) -> http.client.HTTPResponse:
    response = _open(url, {})
    announced = response.headers.get("Content-Length", str(size))
    if announced != str(size):
        response.close()
        raise DownloadError(f"{url} has {announced} bytes, the official file has {size}")
    return response


def _open(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - `fetch` checked the scheme
    opener = urllib.request.build_opener(_SafeRedirects)
    answers: queue.SimpleQueue[http.client.HTTPResponse | BaseException] = queue.SimpleQueue()

    def open_url() -> None:
        try:
            answers.put(opener.open(request, timeout=_TIMEOUT))
        except BaseException as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it is also the response, with an open connection
            answers.put(error)

    # A thread, because the time-out of a socket is one for each byte, and finding the address of a
    # host has none.
    threading.Thread(target=open_url, daemon=True).start()
    try:
        answer = answers.get(timeout=3 * _TIMEOUT)
    except queue.Empty:
        raise TimeoutError(f"the server did not answer in {3 * _TIMEOUT} s") from None
    if isinstance(answer, BaseException):
        try:
            raise answer
        finally:
            del answer  # whose traceback refers to this frame
    return answer


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https only, and from this machine to itself."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: Any,  # the response, which is not an IO[bytes]
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """Raises DownloadError for a redirect to another scheme."""
        if not (_is_https(newurl) or (_is_local(req.full_url) and _is_local(newurl))):
            raise DownloadError(f"{req.full_url} redirects to {newurl}; only https is allowed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _is_https(url: str) -> bool:
    return urllib.parse.urlsplit(url).scheme == "https"


def _is_local(url: str) -> bool:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost")
