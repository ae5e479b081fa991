"""Damage to checkpoints of a run: found by name, passed over for the newest good one, and never read as other values."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from tqdm import tqdm

from benchmarks.faults import damage, scene
from moejax.checkpoint import Restored, Store, arrays, place, read_config
from moejax.checkpoint.verify import verify
from moejax.config import UserError
from moejax.train.loop import items
from moejax.train.setup import set_up


def damage_newest(straight: Path, kind: str, times: int, rng: np.random.Generator) -> scene.Row:
    """Injures the newest checkpoint of a copy of the run, again and again, and reads it as a run that goes on would.

    Args:
      straight: a workdir with two checkpoints or more, which stays as it is.
      kind: in `damage.KINDS`.
      times: how often.
      rng: draws what is injured and where.
    """
    device = jax.devices("cpu")[0]
    setup = set_up(read_config(straight), [device])
    like = place(items(setup.shapes), jax.tree.map(lambda _: SingleDeviceSharding(device), items(setup.shapes)))
    second, newest = scene.saved(straight)[-2:]
    known = {step: scene.values(straight, step) for step in (second, newest)}
    outcomes, passed_over, named = [], 0, 0
    for number in tqdm(range(times), unit="fault", desc=kind, leave=False):
        workdir = Path(shutil.copytree(straight, straight.with_name(f"{kind.replace(' ', '_')}{number}")))
        what = damage.KINDS[kind](workdir / "checkpoints" / str(newest), rng)
        lines, wrong = [], []
        store = Store(workdir, read_only=True, say=lines.append)
        try:
            restored = store.restore(like)
            passed_over += restored.step == second
            wrong += misread(restored, known, lines, second)
        except UserError as error:
            wrong.append(f"no checkpoint was taken: {error}")
        finally:
            store.close()
        if verify(workdir / "checkpoints" / str(newest)).wrong:
            named += 1
        else:
            wrong.append("not found by `python -m moejax.checkpoint verify`")
        outcomes.append([f"{what}: {one}" for one in wrong])
        if not wrong:
            shutil.rmtree(workdir)
    return scene.row(kind, outcomes, f"{passed_over} met on reading: a checkpoint each; others in nothing that is read; "
                     f"{named} found by verify")


def misread(restored: Restored, known: dict[int, dict[str, bytes]], lines: Sequence[str], second: int) -> list[str]:
    """What is wrong with a state that was read: values that were not saved, or a word too many or too few."""
    own = {f"{item}/{name}": np.asarray(leaf).tobytes() for item, tree in restored.items.items()
           for name, leaf in arrays.named(tree).items()} | {"data": scene.canonical(restored.data)}
    saved = known[restored.step]
    wrong = [f"{name} of step {restored.step} was read as another" for name in sorted(own.keys() | saved.keys())
             if own.get(name) != saved.get(name)]
    if (len(lines) == 1) != (restored.step == second):
        wrong.append(f"step {restored.step} was taken, and said was: {lines}")
    return wrong
