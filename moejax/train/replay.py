"""One step of a run over again, to see what was wrong with it. Writes nothing."""

from pathlib import Path
from typing import Any, Iterator

import jax
import numpy as np

from moejax.checkpoint import Store
from moejax.config import Config, check
from moejax.data.mixing import open_loader
from moejax.data.prepared import load_prepared
from moejax.data.tokenizers import Tokenizer
from moejax.train.diagnosis import first_unsound
from moejax.train.loop import start
from moejax.train.setup import check_trainable, set_up
from moejax.train.teacher import with_teacher

LETTERS = 100
"""Of a row's text that are shown."""


def replay(config: Config, workdir: Path, step: int) -> Iterator[str]:
    """Goes from the newest checkpoint before a step up to it, as the run did.

    Args:
      config: of the run.
      workdir: of the run.
      step: which one, from 1.

    Yields:
      Lines for people: where it begins; the step's loss and gradient; what was no finite number; the rows of this process.

    Raises:
      UserError: there is no such step, or no data.
    """
    check(1 <= step <= config.train.steps, f"--step={step} must be from 1 to config.train.steps={config.train.steps}")
    setup = set_up(config)
    check_trainable(setup.config)
    config = setup.config
    prepared = load_prepared(workdir / "data")
    loader = open_loader(prepared, config, setup.rows(config.data.batch_size))
    store = Store(workdir, read_only=True)
    try:
        with jax.set_mesh(setup.mesh):
            state, done, _, watch = start(setup, store, loader, before=step)
            taught = with_teacher(config, setup.mesh, workdir)
            yield f"from {f'the checkpoint of step {done}' if done else 'the beginning'} to step {step} ..."
            for _ in range(done, step - 1):
                state, means, _ = setup.train_step(state, taught(setup.put(next(loader))), *watch.limit())
                watch.add(means)
            rows = next(loader)
            batch = taught(setup.put(rows))
            reason = first_unsound(config, setup.examine(state, batch))
            limit = watch.limit()
            _, means, _ = setup.train_step(state, batch, *limit)
            found = {name: float(means[name]) for name in ("loss", "gradient_norm", "skipped")}
    finally:
        store.close()
    yield (f"step {step}: loss {found['loss']:.6g}, gradient norm {found['gradient_norm']:.6g}, "
           + ("skipped" if found["skipped"] else "not skipped") + "".join(f", limit {value:.6g}" for value in limit))
    yield reason
    yield from described(prepared.tokenizer, rows)


def described(tokenizer: Tokenizer, rows: dict[str, np.ndarray]) -> Iterator[str]:
    """A line with the beginning of each row's text."""
    prefix = "source_" if "source_tokens" in rows else ""
    for number, (tokens_L, segments_L) in enumerate(zip(rows[f"{prefix}tokens"], rows[f"{prefix}segments"])):
        text: Any = tokenizer.decode(tokens_L[segments_L > 0].tolist())
        yield f"row {number}: {text[:LETTERS]!r}"
