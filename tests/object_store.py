"""A fake object store in memory. Like real ones, it cannot append, lock or rename."""

import fsspec
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem


class ObjectStore(MemoryFileSystem):
    """A file system that only supports the operations of object stores.

    Objects are written completely, read completely or in part, and listed.
    """

    protocol = ("gs", "gcs")

    def __init__(self, *args, finalize_on_close=True, **kwargs):
        super().__init__(*args, **kwargs)

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("gs://"))

    def unstrip_protocol(self, name):
        return f"gs://{self._strip_protocol(name).lstrip('/')}"

    def open(self, path, mode="rb", **kwargs):
        assert mode in ("r", "rb", "w", "wb"), f"an object store cannot {mode}"
        return super().open(path, mode, **kwargs)

    def mv(self, *args, **kwargs):
        raise AssertionError("an object store cannot rename")

    mv_file = rename = move = touch = mv


def install(monkeypatch):
    """Installs an empty store for gs:// during a test, and returns a bucket in it."""
    for name in ObjectStore.protocol:
        fsspec.register_implementation(name, ObjectStore, clobber=True)
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    ObjectStore.clear_instance_cache()
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    return epath.Path("gs://bucket")
