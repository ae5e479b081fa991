"""Which GPUs are recognised."""

import types

import jax
import pytest

from moejax import gpus


@pytest.mark.parametrize("backend, capability, wanted", [
    ("gpu", "9.0", (9, 0)), ("gpu", "10.0", (10, 0)), ("gpu", "gfx90a", (0, 0)), ("tpu", "9.0", (0, 0)),
    ("cpu", "9.0", (0, 0))])
def test_capability(monkeypatch, backend, capability, wanted):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    assert gpus.cuda_capability() == wanted
