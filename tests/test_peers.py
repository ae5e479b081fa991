"""Processes notice what is different between them, and who of them is silent."""

import threading
import time

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax import peers
from moejax.config import UserError


class Memory:
    """A key-value store of one process."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in list(self.values.items()) if key.startswith(folder)]

    def key_value_delete(self, key):
        self.values.pop(key)

    def blocking_key_value_get(self, key, milliseconds):
        end = time.monotonic() + milliseconds / 1000
        while key not in self.values:
            if time.monotonic() > end:
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
            time.sleep(0.01)
        return self.values[key]

    def wait_at_barrier(self, name, milliseconds):
        pass


def compare(*settings):
    """What each of the processes says; None if it goes on."""
    store, said = Memory(), [None] * len(settings)

    def one(index):
        try:
            peers.check_alike(settings[index], store, index, len(settings))
        except UserError as error:
            said[index] = str(error)
    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(settings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_equal_processes_go_on_and_one_alone_asks_nobody():
    assert compare({"config.seed": 1}, {"config.seed": 1}, {"config.seed": 1}) == [None] * 3
    peers.check_alike({"config.seed": 1})


@pytest.mark.parametrize("other, name", [
    ({"config.seed": 2, "--mode": "train"}, "config.seed"), ({"config.seed": 1, "--mode": "eval"}, "--mode"),
    ({"config.seed": 1}, "--mode"), ({"config.seed": 1, "--mode": "train", "config.x": None}, "config.x")])
def test_all_processes_name_what_differs(other, name):
    usual = {"config.seed": 1, "--mode": "train"}
    said = compare(usual, usual, other)
    assert said[0] == said[1] == said[2] and f"process 2 has another {name} than process 0" in said[0]


def test_code_and_versions_are_compared(monkeypatch):
    own = peers.described({})
    for name in ("version of jax", "version of Python", "moejax's code", "kind of devices"):
        assert own[name]
    store = Memory()
    store.key_value_set("moejax/alike/1", '{"moejax\'s code": "older"}')
    with pytest.raises(UserError, match="process 1 has another kind of devices|process 1 has another moejax's code"):
        peers.check_alike({}, store, 0, 2)


def test_a_process_that_says_nothing_is_named(monkeypatch):
    monkeypatch.setattr(peers, "MEET_SECONDS", 0.1)
    with pytest.raises(UserError, match="process 1 did not say"):
        peers.check_alike({}, Memory(), 0, 2)


@given(st.lists(st.sets(st.sampled_from("012")), max_size=12))
def test_silent_is_who_has_not_been_heard_of_for_so_long(heard_of):
    """At each second some processes give a new beat; all have begun."""
    silence, last = peers.Silence(3, now=0), dict.fromkeys("012", 0)
    beats = {name: f"0 host, pid {name}" for name in "012"}
    silence.heard(beats, 0)
    for now, names in enumerate(heard_of, 1):
        for name in names:
            beats, last[name] = beats | {name: f"{now} host, pid {name}"}, now
        silence.heard(beats, now)
        quiet = sorted(name for name in "012" if now - last[name] > 3)
        assert silence.silent(now) == (f"process {quiet[0]} (host, pid {quiet[0]})" if quiet else None)


def test_who_ended_is_not_missed_and_process_0_is():
    silence = peers.Silence(3, now=0)
    silence.heard({"0": "1 a", "1": "1 b"}, 1)
    for now in range(2, 9):
        silence.heard({"0": f"{now} a"}, now)
        assert silence.silent(now) is None
    assert silence.silent(11) is None and "process 0" in silence.silent(11.1)  # nothing was heard since 8


def test_the_watch_names_a_process_that_stands_still():
    store, named = Memory(), []
    store.key_value_set("moejax/alive/1", "7 elsewhere, pid 12")
    with peers.watched(store, 0, 2, named.append, seconds=0.5):
        deadline = time.monotonic() + 20
        while not named and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "moejax/alive/0" in store.values
    assert named == ["process 1 (elsewhere, pid 12)"] and "moejax/alive/0" not in store.values


def test_the_process_that_keeps_the_connection_ends_last():
    store, named = Memory(), []
    store.key_value_set("moejax/alive/2", "7 elsewhere, pid 12")

    def watch(index: int) -> None:
        with peers.watched(store, index, 3, lambda name: named.append((index, name)), seconds=2):
            time.sleep(5)

    threads = [threading.Thread(target=watch, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert named == [(1, "process 2 (elsewhere, pid 12)"), (0, "process 2 (elsewhere, pid 12)")]
