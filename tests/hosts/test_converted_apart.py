"""The bundled model, converted where this process must not start JAX."""

from __future__ import annotations

import pytest

from glmjax import bundled
from glmjax.errors import CheckpointError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GLMJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bundled, "_convert", None)  # this process converts nothing
    return tmp_path / "cache"


def test_a_process_of_its_own_that_ends_early_ends_it(cache, capfd):
    cache.write_text("a file")
    with pytest.raises(CheckpointError, match="exit code 1"):
        bundled.converted(apart=True)
    said = capfd.readouterr().err
    assert "Set GLMJAX_CACHE" in said
    assert "Traceback" not in said


def test_what_is_there_is_not_converted(cache):
    home = cache / f"{bundled.NAME}-{bundled._digest(bundled.ASSET)}"
    home.mkdir(parents=True)
    assert bundled.converted(apart=True) == home / bundled.NAME
