"""Where compiled programs are kept."""

import jax
import pytest

from sam_jax.io.compilation_cache import use_compilation_cache


@pytest.fixture
def without_cache():
    """Lets JAX keep no programs; the tests have a folder of their own otherwise."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_in_the_home_folder_by_kind_of_device(
    without_cache, monkeypatch, tmp_path
):
    monkeypatch.setenv("HOME", str(tmp_path))
    use_compilation_cache()
    (folder,) = (tmp_path / ".cache" / "sam_jax" / "compiled").iterdir()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert folder.name.startswith("cpu_")


def test_a_folder_that_was_chosen_before_is_used(without_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "other"))
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "other")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_kept_if_the_folder_cannot_be_created(without_cache, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
