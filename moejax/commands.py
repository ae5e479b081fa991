"""What the command line does, one function a mode: train, evaluate, generate."""

from pathlib import Path
from typing import Any, Sequence

import jax

from moejax.checkpoint import read_config
from moejax.config import Config, changed, check
from moejax.data.baselines import unigram_bits_per_byte, xz_bits_per_byte
from moejax.data.prepare import Prepared, load_prepared
from moejax.data.tokenizers import load_tokenizer
from moejax.evaluation.load import load, load_sharded
from moejax.generation.generate import generate as generate_tokens
from moejax.metrics.record import Recorder
from moejax.train import loop
from moejax.train.setup import set_up


def train(config: Config, workdir: Path) -> None:
    """Trains or goes on, then prints the result beside its baselines, a sample, and where things are."""
    finished = loop.train(config, workdir)
    if jax.process_index() != 0:
        return
    if finished.stopped:
        print(f"stopped at step {finished.step}, all saved; the same command goes on")
        return
    print(comparison(finished.evaluation, finished.prepared))
    prompt = config.train.sample_prompt
    if prompt and jax.process_count() == 1:
        variables = jax.device_put(finished.variables, jax.local_devices()[0])
        model = set_up(config).model
        text = continuations(model, variables, finished.prepared.tokenizer, [prompt],
                             max_new_tokens=config.train.sample_tokens, temperature=0.8, seed=config.seed)[0]
        print(f"sample: {prompt}|{text}")
    print(f"done: {workdir}/config.json, metrics.jsonl, tensorboard/, checkpoints/ (step {finished.step}), data/")


def evaluate(config: Config | None, workdir: Path, step: int | None) -> None:
    """Evaluates a checkpoint on the held-out split, appends the record to metrics.jsonl and prints it.

    Without a config the workdir's own is used; with one, only keys that may change in a run may differ.
    """
    stored = read_config(workdir)
    if config is not None:
        forbidden, _ = changed(stored, config)
        check(not forbidden, f"--workdir={workdir} was trained with other values of "
              f"{', '.join(f'config.{name}' for name in forbidden)}; leave out --config to use its own")
    setup = set_up(config or stored)
    prepared = load_prepared(workdir / "data")
    restored = load_sharded(workdir, setup.model, setup.mesh, step)
    variables = restored.items["model"]
    with jax.set_mesh(setup.mesh):
        record = loop.run_evaluation(setup, prepared, variables["params"], variables["router"], restored.step)
    if jax.process_index() == 0:
        recorder = Recorder(workdir)
        recorder.write(record)
        recorder.close()
        print(loop.evaluation_line(record))
        print(comparison(record, prepared))


def generate(workdir: Path, step: int | None, prompts: Sequence[str], **options: Any) -> None:
    """Continues each prompt with the model of a workdir."""
    model, variables = load(workdir, step)
    tokenizer = load_tokenizer(workdir / "data")
    for prompt, text in zip(prompts, continuations(model, variables, tokenizer, prompts, **options)):
        print(prompt + text)


def continuations(model: Any, variables: Any, tokenizer: Any, prompts: Sequence[str], **options: Any) -> list[str]:
    """Texts that follow the prompts; each ends where the model ends the document, or at max_new_tokens."""
    separator = tokenizer.separator_id
    encoded = [[separator, *tokenizer.encode(prompt)] for prompt in prompts]
    generated = generate_tokens(model, variables, encoded, stop_tokens=(separator,), **options)
    whole = [tokenizer.decode(ids + row[:n].tolist()) for ids, row, n in
             zip(encoded, generated.tokens, generated.lengths)]
    return [text[len(tokenizer.decode(ids)):] for text, ids in zip(whole, encoded)]


def comparison(record: dict[str, Any], prepared: Prepared) -> str:
    """The held-out bits per byte beside what simpler methods need on the same bytes."""
    return (f"held-out bits per byte: {record['bits_per_byte']:.4f}  (xz -9e {xz_bits_per_byte(prepared):.4f}, "
            f"unigram tokens {unigram_bits_per_byte(prepared):.4f})")
