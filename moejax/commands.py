"""What the command line does, one function a mode: train, evaluate, generate, benchmark.

All processes of a run compute; process 0 prints and writes records.
"""

import contextlib
import json
from pathlib import Path
from typing import Any, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from moejax import processes, sharding
from moejax.checkpoint.lock import one_writer
from moejax.checkpoint.origin import end_tokens, origin_of
from moejax.checkpoint.workdir import check_continues, read_config, unchanged_on_user_error
from moejax.config import Config, UserError, check, to_dict
from moejax.data.asking import answers, encode_prompts, new_text, reads_prefix
from moejax.data.baselines import unigram_bits_per_byte, xz_bits_per_byte
from moejax.data.prepared import Prepared, load_prepared, load_references
from moejax.data.rows import shorten
from moejax.data.tokenizers import load_tokenizer
from moejax.evaluation.load import load, load_sharded
from moejax.generation.beam import beam_search
from moejax.generation.generate import generate as generate_tokens
from moejax.metrics.record import Recorder
from moejax.metrics.text import scorers, text_metrics
from moejax.mixture import number, part, parts
from moejax.models import transformer
from moejax.models.tasks import for_task
from moejax.task import PAIRS, normal
from moejax.train import benchmark as timing
from moejax.train import loop, memory
from moejax.train import replay as replaying
from moejax.train.held_out import evaluation_line, run_evaluation
from moejax.train.setup import set_up

SAMPLE_TOKENS = 64
"""New tokens at most of the sample at the end of a run."""


def train(config: Config, workdir: Path) -> None:
    """Trains or goes on, then prints the result beside its baselines, a sample, and where things are."""
    check_text(config.train.sample_prompt, "--config.train.sample_prompt")
    with contextlib.ExitStack() as ours:
        with processes.same_fate():
            if jax.process_index() == 0:
                ours.enter_context(one_writer(workdir))
        if jax.process_index() == 0:
            ours.enter_context(unchanged_on_user_error(workdir))
        finished = loop.train(config, workdir)
    if finished.stopped:
        say(f"stopped at step {finished.step}, all saved; the same command goes on")
        return
    with processes.same_fate():
        if jax.process_index() == 0:
            print(comparison(finished.evaluation, finished.prepared))
    if config.train.sample_prompt:
        say(sample(config, finished, end_tokens(workdir, config.model.vocab_size)))
    say(f"done: {workdir}/config.json, metrics.jsonl, tensorboard/, checkpoints/ (step {finished.step}), data/")


def evaluate(config: Config | None, workdir: Path, step: int | None, inputs: int | None = None, **options: Any) -> None:
    """Evaluates a checkpoint on the held-out split, appends the record to metrics.jsonl and prints it.

    A model of pairs also answers held-out inputs, of each task that has some, and its texts are scored against the targets.

    Args:
      config: the workdir's own if None; else only keys that may change in a run may differ.
      workdir: of the run.
      step: which checkpoint; None takes the newest.
      inputs: to answer, the first ones; None takes all.
      options: as of `generate_tokens` or `beam_search`.
    """
    with processes.same_fate():
        setup = set_up(config_of_run(config, workdir))
        prepared = load_prepared(workdir / "data")
        restored = load_sharded(workdir, setup.mesh, step)
        pairs = {name: own for name, own in parts(setup.config).items() if own.data.task.data == PAIRS}
        check(bool(pairs) or inputs is None, "--answers is for models of pairs; leave it out")
        references = {name: references_of(own, workdir / "data" / name, inputs, options.get("max_new_tokens", 0))
                      for name, own in pairs.items()}
        options["ends"] = end_tokens(workdir, setup.config.model.vocab_size)
    variables = restored.items["model"]
    with jax.set_mesh(setup.mesh):
        record = run_evaluation(setup, prepared, variables["params"], variables["router"], restored.step)
    scores = {}
    for name, told in references.items():
        if told:
            knowing = for_task(setup.model, variables, number(setup.config, name))
            scores[name] = answered(pairs[name], *knowing, setup.mesh, prepared.tasks.get(name, prepared),
                                    answers_file(workdir, name), told, options)
    for name, found in scores.items():
        record |= {f"task/{name}/{metric}" if name else metric: value for metric, value in found.items()}
    with processes.same_fate():
        if jax.process_index() == 0:
            recorder = Recorder(workdir)
            recorder.write(record)
            recorder.close()
            print(evaluation_line(record))
            print(comparison(record, prepared))
            for name, found in scores.items():
                print((f"{name}: " if name else "") + "  ".join(f"{metric} {found[metric]:.4g}" for metric in TEXT_METRICS)
                      + f"  ({found['answers']:,} answers: {answers_file(workdir, name)})")


TEXT_METRICS = ("bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact_match", "token_f1")


def answers_file(workdir: Path, name: str) -> Path:
    """With the last evaluation's inputs, answers and references of a task; "" is the only one."""
    return workdir / (f"answers_{name}.jsonl" if name else "answers.jsonl")


def answered(config: Config, model: Any, variables: Any, mesh: Mesh, prepared: Prepared, path: Path,
             references: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """Answers held-out inputs, writes them beside their references, and returns the scores."""
    stream, tokenizer = prepared.eval, prepared.tokenizer
    if jax.process_count() == 1:  # one device is quicker than many for short texts
        variables, mesh = jax.device_put(variables, jax.local_devices()[0]), None
    room = input_room(config, options["max_new_tokens"])
    inputs = [shorten(np.asarray(stream.document(i)), room).tolist() for i in range(len(references))]
    size, made = config.data.eval_batch_size or config.data.batch_size, []
    for begin in tqdm(range(0, len(inputs), size), unit="batch", disable=jax.process_index() != 0):
        batch = inputs[begin:begin + size]
        batch += [batch[-1]] * (size - len(batch))  # so that all are of one size, and compiled once
        made += written(model, variables, mesh, tokenizer, config, batch, **options)
    made = made[:len(inputs)]
    with processes.same_fate():
        if jax.process_index() == 0:
            write_answers(path, [tokenizer.decode(ids) for ids in inputs], made, references)
    return {"answers": len(made)} | text_metrics(made, references)


def input_room(config: Config, new_tokens: int) -> int:
    """Tokens of an input that is to be answered. Raises `UserError` if a decoder's context has no room for one."""
    if config.model.kind == "encoder_decoder":
        return config.data.encoder_length
    room = min(config.data.length, config.model.max_length - new_tokens)
    check(room > 1, f"--max_new_tokens={new_tokens} leaves no room for an input in config.model.max_length="
          f"{config.model.max_length}; lower it")
    return room


def references_of(config: Config, folder: Path, inputs: int | None, new_tokens: int) -> list[str]:
    """The targets of the held-out inputs that are to be answered; none if nothing asks for answers that cannot be scored.

    Raises:
      UserError: --answers was given, and there are no packages to score by.
    """
    if inputs == 0:
        return []
    input_room(config, new_tokens)
    try:
        scorers()
        return load_references(folder)[:inputs]
    except UserError as error:
        if inputs is not None:
            raise
        say(f"no answers: {error}")
        return []


def write_answers(path: Path, inputs: list[str], answers: list[str], references: list[str]) -> None:
    """One line of JSON for each. Raises `UserError` if the file cannot be written."""
    lines = (json.dumps({"input": given, "answer": answer, "reference": reference}, ensure_ascii=False)
             for given, answer, reference in zip(inputs, answers, references))
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def generate(config: Config | None, workdir: Path, step: int | None, prompts: Sequence[str], task: str | None = None,
             **options: Any) -> None:
    """Continues each prompt with the model of a workdir; config as in `evaluate`, options as in `generate_tokens`.

    A model of several tasks must be told which one the prompts are of.
    One process uses one device; several use all, on the mesh of the config.
    """
    for prompt in prompts:
        check_text(prompt, "--prompt")
    with processes.same_fate():
        config = config_of_run(config, workdir)
        own = part(config, task)
        check((workdir / "data" / "tokenizer_config.json").is_file() or origin_of(workdir) is None,
              f"--workdir={workdir}: has no tokenizer; put a tokenizer.json or a SentencePiece model beside the checkpoint "
              "and import it again, or give token ids to moejax.generate")
        tokenizer = load_tokenizer(workdir / "data")
        ends = end_tokens(workdir, config.model.vocab_size)
        if jax.process_count() == 1:
            model, variables = load(workdir, step)
            model, mesh = model.clone(moe=config.moe), None
        else:
            setup = set_up(config)
            model, mesh = setup.model, setup.mesh
            variables = load_sharded(workdir, mesh, step).items["model"]
        model, variables = for_task(model, variables, number(config, task))
        prompts = [normal(own.data.task, prompt) for prompt in prompts]
        texts = continuations(model, variables, mesh, tokenizer, own, prompts, ends=ends, **options)
    for prompt, text in zip(prompts, texts):
        say(text if answers(own.data.task) else prompt + text)


def shardings(config: Config) -> None:
    """Prints where every parameter would lie, and what the whole training state takes on one device."""
    with processes.same_fate():
        setup = set_up(config)
    state = sum(one.bytes for one in memory.held(setup))
    say(sharding.table(setup.placements))
    say(f"training state, optimizer included: {state:,} bytes on a device; mesh "
        + " x ".join(f"{name}={size}" for name, size in setup.mesh.shape.items()))


def replay(config: Config | None, workdir: Path, step: int) -> None:
    """Does a step of a run over again and prints what was wrong with it."""
    with processes.same_fate():
        config = config_of_run(config, workdir)
    for line in replaying.replay(config, workdir, step):
        if jax.process_index() == 0:
            print(line, flush=True)


def benchmark(config: Config) -> None:
    """Times the train step and prints the result, one JSON object."""
    say(json.dumps(timing.benchmark(config)))


def stored_config(workdir: Path) -> dict[str, Any]:
    """The config of the run in a workdir as nested dicts, in which keys may be overridden."""
    return to_dict(read_config(workdir))


def config_of_run(config: Config | None, workdir: Path) -> Config:
    """The given config, if it may go with the run in the workdir, or the one stored there."""
    if config is None:
        return transformer.resolve(read_config(workdir))
    config = transformer.resolve(config)
    check_continues(workdir, config)
    return config


def check_text(text: str, flag: str) -> None:
    """Raises `UserError` if a text of the command line was not UTF-8; Python keeps such bytes as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{flag}: not valid UTF-8 at letter {error.start}; set the terminal's encoding to UTF-8, or "
                        "leave that letter out") from None


def say(line: str) -> None:
    """Prints a line on process 0."""
    if jax.process_index() == 0:
        print(line)


def sample(config: Config, finished: loop.Finished, ends: tuple[int, ...]) -> str:
    """A line with what the trained model makes of config.train.sample_prompt, or why it makes nothing of it; `ends` as of
    `written`."""
    variables, mesh = finished.variables, finished.mesh
    if jax.process_count() == 1:  # one device is quicker than many, and serves after every mesh
        variables, mesh = jax.device_put(variables, jax.local_devices()[0]), None
    try:
        own = part(transformer.resolve(config), None)
        prompt = normal(own.data.task, config.train.sample_prompt)
        text, = continuations(finished.model, variables, mesh, finished.prepared.tokenizer, own, [prompt],
                              max_new_tokens=min(SAMPLE_TOKENS, config.model.max_length // 2), temperature=0.8,
                              seed=config.seed, ends=ends)
    except UserError as error:  # the run itself is done and well
        return f"no sample: {error}"
    return f"sample: {prompt}|{text}"


def continuations(model: Any, variables: Any, mesh: Mesh | None, tokenizer: Any, config: Config, prompts: Sequence[str],
                  **options: Any) -> list[str]:
    """What the model writes after each prompt, or of it; ends where the model ends it, or at max_new_tokens.

    The mesh is that on which the variables lie; None if they are on one device. Prompts are laid out as in training, by the
    resolved config.
    """
    return written(model, variables, mesh, tokenizer, config, encode_prompts(tokenizer, config, prompts), **options)


def written(model: Any, variables: Any, mesh: Mesh | None, tokenizer: Any, config: Config, encoded: list[list[int]],
            ends: tuple[int, ...] = (), **options: Any) -> list[str]:
    """What the model writes after rows of tokens; arguments are those of `continuations`.

    `ends` are tokens beside the separator with which it may end, and which are no text.
    """
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        generated = (beam_search if "beams" in options else generate_tokens)(
            model, variables, encoded, stop_tokens=(tokenizer.separator_id, *ends), prefix=reads_prefix(config), **options)
    return [new_text(tokenizer, config.data.task, ids, row[:n].tolist(), ends)
            for ids, row, n in zip(encoded, generated.tokens, generated.lengths)]


def comparison(record: dict[str, Any], prepared: Prepared) -> str:
    """The held-out bits per byte beside what simpler methods need on the same bytes; or the loss of other objectives."""
    if "bits_per_byte" not in record:
        return f"held-out loss: {record['loss']:.4f}"
    simpler = [f"xz -9e {xz_bits_per_byte(prepared):.4f}"]
    if prepared.samplings == 1:  # the training text cut at random has other tokens than the held-out one
        simpler.append(f"unigram tokens {unigram_bits_per_byte(prepared):.4f}")
    return f"held-out bits per byte: {record['bits_per_byte']:.4f}  ({', '.join(simpler)})"
