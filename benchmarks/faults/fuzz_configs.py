"""A fuzz of configs: flags of the command line, config.json of a workdir, and groups of options."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from benchmarks.faults.fuzz_inputs import SCALARS, TEXT, VALUES, Reader, json_file, json_of, write
from moejax import config as config_lib
from moejax.architecture import Architecture
from moejax.commands import config_of_run
from moejax.faults import Faults
from moejax.finetune import Finetune
from moejax.main import main
from moejax.mixture import Mixture
from moejax.models import transformer
from moejax.moe.routing import ROUTERS
from moejax.task import Task

TINY = {"model": dict(vocab_size=259, layers=1, embed=8, heads=2, kv_heads=1, head_dim=4, ffn=12, max_length=40),
        "moe": dict(num_experts=6, experts_per_token=2), "train": dict(steps=1, eval_batches=1),
        "data": dict(source="corpus.jsonl", tokenizer="bytes", length=32, batch_size=8, eval_fraction=0.3)}
"""A config whose model is made in no time."""
LITERALS = st.sampled_from((
    "", "1", "-1", "0", "2.5", "1e400", "nan", "inf", "-inf", "None", "auto", "True", "maybe", "[1, 2]", "(1,)", "{}",
    "...", "{1: 2}", "{'a': 1}", "{'tasks': {1: {}}}", "{'tasks': {'a': {}, 2: {}}}", "b'x'", "1j", "{1, 2}",
    "\ud800", "[" * 300, "[" * 100_000, "-" * 100_000 + "1", "9" * 5000, "0x" + "f" * 5000, "1" + "0" * 400, "'\\ud800'",
    "'a\\0b'", "2147483648", "4294967296", "{'objective': 'seq2seq'}", "{None: None}", "{'labels': ('a', 'a')}",
    "((1,), (2,))", "{'rope': {'factor': 0}}", "[" * 90 + "]" * 90))
"""Values of flags, of which the command line makes what Python literals are."""


@functools.cache
def stored() -> dict[str, Any]:
    """All keys, as config.json has them."""
    return config_lib.to_dict(transformer.resolve(config_lib.build(TINY)))


def names() -> list[str]:
    """Of keys, options and what is neither."""
    options = [f"{group}.{field.name}" for group, kind in GROUPS.items() for field in dataclasses.fields(kind)]
    return [*config_lib.fields(), *options, "", ".", "model", "model.layerz", "moe.options.x", "moe.options.a.b", "a.b.c.d"]


GROUPS = {"model.architecture": Architecture, "data.task": Task, "train.finetune": Finetune, "train.faults": Faults}
"""Keys that hold options by name, and what these are."""


def flags(values: list[tuple[str, str]], folder: Path) -> Callable[[], Any]:
    """Flags over the config of a file."""
    write(folder, {"config.json": json_of(TINY)})
    given = [f"--config.{name}={value}" for name, value in values]
    return lambda: main(["main", f"--config={folder}/config.json", "--mode=shardings", *given])


def workdir(content: bytes, folder: Path) -> Callable[[], Any]:
    """config.json of a run."""
    write(folder, {"config.json": content})
    return lambda: config_of_run(None, folder)


def set_up(content: bytes, folder: Path) -> Callable[[], int]:
    """config.json as the config of a command that makes the whole model, on no device."""
    write(folder, {"config.json": content})
    return lambda: main(["main", f"--config={folder}/config.json", "--mode=shardings"])


def generate(values: tuple[bytes, list[tuple[str, Any]]], folder: Path) -> Callable[[], int]:
    """A command on a workdir that has no checkpoint, with flags of its own."""
    content, given = values
    write(folder, {"config.json": content, "data/tokenizer_config.json": b'{"kind": "bytes"}'})
    return lambda: main(["main", f"--workdir={folder}", "--mode=generate", "--prompt=a",
                         *(f"--{name}={value}" for name, value in given)])


@st.composite
def options(draw: st.DrawFn) -> bytes:
    """config.json with options of one group, known and unknown, of any value."""
    group = draw(st.sampled_from((*GROUPS, "moe.options", "data.task.tasks")))
    if group == "moe.options":
        router = draw(st.sampled_from(sorted(ROUTERS)))
        known = [field.name for field in dataclasses.fields(ROUTERS[router].options)]
        tree = {"moe": {**TINY["moe"], "router": router, "options": draw(_by_name(known))}}
    elif group == "data.task.tasks":
        task = _by_name([field.name for field in dataclasses.fields(Task)])
        more = draw(_by_name([field.name for field in dataclasses.fields(Mixture)]))
        more = more if isinstance(more, dict) else {}
        tree = {"data": {**TINY["data"], "task": {**more, "tasks": draw(st.dictionaries(TEXT, task, max_size=3))}}}
    else:
        above, _, key = group.partition(".")
        tree = {above: {**TINY[above], key: draw(_by_name([field.name for field in dataclasses.fields(GROUPS[group])]))}}
    return json_of({**TINY, **tree})


def _by_name(known: list[str]) -> st.SearchStrategy:
    chosen = st.dictionaries(st.one_of(st.sampled_from([*known, "x"]), TEXT) if not known else st.sampled_from(known),
                             st.one_of(VALUES, st.sampled_from((1, 0.5, True, (), [[1]], ["a"]))), max_size=3)
    return st.one_of(chosen, chosen, chosen, VALUES)


FLAGS = st.lists(st.tuples(st.sampled_from((
    "step", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "beams", "task", "answers", "repetition_penalty",
    "length_penalty", "prompt", "mode", "x")), st.one_of(SCALARS, LITERALS)), max_size=2)

READERS = {
    "flags": Reader(st.lists(st.tuples(st.sampled_from(names()), st.one_of(LITERALS, SCALARS.map(str))), min_size=1,
                             max_size=3), flags, share=3),
    "config.json": Reader(st.deferred(lambda: json_file(stored())), workdir, share=3),
    "options": Reader(options(), set_up, share=3),
    "set-up": Reader(st.deferred(lambda: json_file(TINY)), set_up, share=0.3),
    "generate": Reader(st.tuples(st.deferred(lambda: st.one_of(st.just(json_of(stored())), json_file(stored()))), FLAGS),
                       generate, share=0.3),
}
