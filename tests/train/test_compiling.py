"""All processes have compiled a program before the first of them runs it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.train import compiling
from k2jax.train.compiling import compiled_when_called

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def events(monkeypatch):
    """"compiled", "barrier" and "ran", as they happen."""
    events = []

    def listen(event: str, seconds: float, **known) -> None:
        if event == COMPILED and "twice" in known["fun_name"]:
            events.append("compiled")

    monkeypatch.setattr(compiling, "is_joined", lambda: True)
    monkeypatch.setattr(compiling, "barrier", lambda name, seconds: events.append("barrier"))
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def test_once_for_each_shape_and_layout(events, mesh_of):
    @jax.jit
    def twice(x, y):
        jax.debug.callback(lambda: events.append("ran"))
        return {"sum": 2 * x["a"] + y}

    call, short, long = compiled_when_called(twice), np.arange(4.0, dtype=np.float32), np.ones(8, np.float32)
    for values in (short, short, long, jax.device_put(long, jax.NamedSharding(mesh_of(fsdp=8), jax.P("fsdp")))):
        found = jax.block_until_ready(call({"a": values}, np.int64(3))["sum"])
        jax.effects_barrier()
        np.testing.assert_array_equal(found, 2 * np.asarray(values) + 3)
    rest = events[7:]
    assert events[:7] == ["compiled", "barrier", "ran", "ran", "compiled", "barrier", "ran"]
    assert rest[:2] == ["compiled", "barrier"] and {*rest[2:]} == {"ran"} and jnp.shape(found) == (8,)


def test_alone_there_is_nothing_beside_the_function():
    function = jax.jit(jnp.sin)
    assert compiled_when_called(function) is function
