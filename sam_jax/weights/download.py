"""Fetches the official weights, once, into a cache folder.

Source: the links in the README of facebookresearch/segment-anything dca509f. The table pins size
and SHA-256 of each file: a download gets the file's own name only after its digest was verified, so
a file under that name is complete.
"""

import contextlib
import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import IO, NamedTuple

from tqdm import tqdm

if sys.platform != "win32":
    import fcntl

BASE_URL = "https://dl.fbaipublicfiles.com/segment_anything/"


class OfficialFile(NamedTuple):
    """A published weights file."""

    name: str
    size: int  # bytes
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
_TIMEOUT = 60  # seconds without a byte
_CHUNK = 2**20  # bytes


class DownloadError(OSError):
    """A file that could not be fetched, or that is not the official one."""


def fetch(name: str, *, cache_dir: str | Path | None = None, base_url: str = BASE_URL) -> Path:
    """Returns the path of an official file, downloading it if it is not in the cache.

    A file that is there is returned without a request and without reading it: either it was
    verified before it got its name, or the user put it there. An unfinished download stays beside
    it as `<file>.part`, and the next call continues it.

    Args:
      name: a key of OFFICIAL.
      cache_dir: by default $SAM_JAX_CACHE, else $XDG_CACHE_HOME/sam_jax, else ~/.cache/sam_jax.
      base_url: the folder of the files on a mirror; https, or http on this machine.
    Returns:
      The path of the file.
    Raises:
      ValueError: if the name is unknown or the address is not allowed.
      DownloadError: if the file cannot be fetched, or has another size or digest.
    """
    if name not in OFFICIAL:
        raise ValueError(f"name must be one of {', '.join(OFFICIAL)}; got {name!r}")
    official = OFFICIAL[name]
    url = f"{base_url.rstrip('/')}/{official.name}"
    if not (_is_https(url) or _is_local(url)):
        raise ValueError(f"base_url must start with https://, got {base_url!r}")

    path = _cache_folder(cache_dir) / official.name
    if not path.exists():
        try:
            _fetch(url, path, official)
        except DownloadError:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise DownloadError(
                f"could not download {url}: {error}. Call again to continue; or download it with "
                f"a browser and put it at exactly {path}, or pass its path to sam_jax.load."
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
        if path.exists():  # another process fetched it while this one waited
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
    """Lets one process at a time in; the others wait for it and then find the finished file.

    The lock is on a file of its own which is never deleted: the unfinished file will be renamed,
    and a lock on it would then hold the finished one. Where there are no locks (Windows, some
    network file systems) two processes can spoil each other's download; its digest or size then
    refuses it.
    """
    with open(path, "ab") as file:
        if sys.platform != "win32":
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(url: str, part: Path, size: int) -> None:
    """Brings `part` to `size` bytes, continuing from those it has; never writes more than that."""
    have = part.stat().st_size if part.exists() else 0
    if have == size:
        return
    response = _open_rest(url, have, size) if have else None
    if response is None:
        have, response = 0, _open_whole(url, size)
    bar = tqdm(
        desc=part.stem,
        initial=have,
        total=size,
        unit="B",
        unit_scale=True,
        disable=None,  # shown on a terminal only
    )
    with response, open(part, "ab" if have else "wb") as file, bar:
        while have < size and (chunk := response.read(min(_CHUNK, size - have))):
            file.write(chunk)
            have += len(chunk)
            bar.update(len(chunk))
    if have < size:
        raise ConnectionError(f"the connection was closed after {have:,} of {size:,} bytes")


def _publish(part: Path, path: Path, sha256: str) -> None:
    """Gives a verified file its name, and deletes any other."""
    with open(part, "r+b") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())  # after a power cut the name must not stand on missing bytes
    if digest != sha256:
        part.unlink()
        raise DownloadError(
            f"the download of {path.name} was deleted: its SHA-256 is {digest}, expected {sha256}"
        )
    os.replace(part, path)


def _open_rest(url: str, start: int, size: int) -> http.client.HTTPResponse | None:
    """Opens the bytes from `start` on; None where the server does not offer exactly those."""
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


def _open_whole(url: str, size: int) -> http.client.HTTPResponse:
    response = _open(url, {})
    announced = response.headers.get("Content-Length", str(size))
    if announced != str(size):
        response.close()
        raise DownloadError(f"{url} has {announced} bytes, the official file has {size}")
    return response


def _open(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - `fetch` checked the scheme
    opener = urllib.request.build_opener(_SafeRedirects)
    try:
        response: http.client.HTTPResponse = opener.open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()  # it is also the response, with an open connection
        raise
    return response


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https alone, and from this machine to itself."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if not (_is_https(newurl) or (_is_local(req.full_url) and _is_local(newurl))):
            raise DownloadError(f"{req.full_url} redirects to {newurl}; only https is allowed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _is_https(url: str) -> bool:
    return urllib.parse.urlsplit(url).scheme == "https"


def _is_local(url: str) -> bool:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost")
