"""A small run that faults are done to, and whether what came of it is bit for bit the run that met none.

Runs are processes of their own, which a server that has imported jax already forks, so that one takes seconds. They call
`moejax.main.main` and end as the command does, but do not start themselves again for another allocator, and their compiled
code is not optimised.
"""

import atexit
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from launch.local import free_port
from moejax.checkpoint import arrays, manifest
from moejax.checkpoint.store import step_folders
from moejax.checkpoint.verify import verify
from moejax.exit_status import INTERRUPTED
from moejax.metrics.record import Recorder, read

STEPS, EVERY = 16, 2
CONFIG = f"""\
from moejax import config


def get_config():
    c = config.default()
    c.model.update(dict(vocab_size=257, layers=1, embed=16, heads=4, kv_heads=4, head_dim=4, ffn=16, dropout=0.1))
    c.moe.update(dict(num_experts=4, experts_per_token=2, ffn=12, block_rows=4, jitter=0.1, bias_rate=0.01))
    c.data.update(dict(source="*.jsonl", tokenizer="bytes", length=16, batch_size=8, eval_fraction=0.3))
    c.train.update(dict(steps={STEPS}, checkpoint_every={EVERY}, keep=99, log_every=1, eval_every=4, eval_batches=1,
                        sample_prompt=""))
    return c
"""
ROW = "{:<36} {:>8} {:>8}  {}"
TIMED = ("tokens_per_second", "utilisation", "seconds")


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
      fault: what was done.
      injected: how often.
      survived: how often nothing was lost but what `lost` says, and nothing went on unnoticed.
      lost: in words.
      problems: what went wrong, one text each.
    """

    fault: str
    injected: int
    survived: int
    lost: str
    problems: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ROW.format(self.fault, self.injected, self.survived, self.lost)


def row(fault: str, outcomes: Sequence[Sequence[str]], lost: str) -> Row:
    """A line from what was wrong after each fault, which is nothing where it was survived."""
    return Row(fault, len(outcomes), sum(not one for one in outcomes), lost, tuple(one[0] for one in outcomes if one))


def set_scene(folder: Path) -> Path:
    """Makes a folder with a config file and a corpus. Returns it."""
    folder.mkdir(parents=True)
    (folder / "c.py").write_text(CONFIG)
    lines = [json.dumps({"text": f"document number {i}, about the number {i * i}"}) for i in range(40)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


@functools.cache
def _server() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moejax.commands", __name__])
    return context


def begin(folder: Path, *arguments: str, name: str = "run", devices: int = 1, before: Callable[[], None] | None = None,
          keep_compiled: bool = True) -> BaseProcess:
    """Starts moejax in a process of its own.

    Args:
      folder: where; `set_scene` made it. Compiled programs are kept beside it.
      arguments: of the command, beside --config.
      name: of the files NAME.out and NAME.err in that folder, which get what it prints.
      devices: simulated ones.
      before: called in the process before all else; picklable.
      keep_compiled: whether to use compiled programs of other runs, and leave ours to them.
    """
    process = _server().Process(target=_run, args=(folder, arguments, name, devices, before, keep_compiled), daemon=True)
    process.start()
    return process


def _run(folder: Path, arguments: tuple[str, ...], name: str, devices: int, before: Callable[[], None] | None,
         keep_compiled: bool) -> None:
    os.chdir(folder)
    for stream, end in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        with open(f"{name}.{end}", "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ["XLA_FLAGS"] = (f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
                               "--xla_llvm_disable_expensive_passes=true")
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", keep_compiled)
    jax.config.update("jax_compilation_cache_dir", str(folder.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if before is not None:
        before()
    from moejax.main import main
    try:
        status = main(["main", "--config=c.py", *arguments])
    except BaseException:
        import traceback
        traceback.print_exc()
        status = 1
    if status not in (1, INTERRUPTED):  # as the command ends, which then waits for other processes
        with contextlib.suppress(RuntimeError):  # there are none
            jax.distributed.shutdown()
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextlib.contextmanager
def running(folder: Path, *arguments: str, **how: Any) -> Iterator[BaseProcess]:
    """A process as `begin` starts it, which has ended, one way or the other, when the block is left."""
    process = begin(folder, *arguments, **how)
    try:
        yield process
    finally:
        process.kill()
        process.join()


def send(process: BaseProcess, number: signal.Signals) -> None:
    """Sends a signal, unless the process has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)


def killed(process: BaseProcess) -> bool:
    """Kills a process. Returns whether it was still running."""
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def linger() -> None:
    """From now on waits after each record, so that what happens meanwhile meets the run in the middle."""
    write = Recorder.write

    def slowly(self: Recorder, record: dict) -> None:
        write(self, record)
        time.sleep(0.2)

    Recorder.write = slowly


def end(process: BaseProcess, seconds: float = 300) -> int:
    """Waits for a process; returns its exit status, negative for a signal. One that takes too long is killed."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode


def words(folder: Path, name: str = "run") -> str:
    """The last lines that a process left on stderr."""
    return " | ".join((folder / f"{name}.err").read_text(errors="replace").splitlines()[-3:])


def finished(folder: Path, *arguments: str, devices: int = 1, status: int = 0) -> str | None:
    """Runs moejax to its end. Returns what is wrong, or None if it ended with that status."""
    found = end(begin(folder, *arguments, devices=devices))
    return None if found == status else f"exit status {found} where {status} was wanted: {words(folder)}"


def wait_for(true: Callable[[], bool], processes: list[BaseProcess], seconds: float = 300) -> bool:
    """Waits until something is so; False if a process ends before, or it takes too long."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline or any(process.exitcode is not None for process in processes):
            return False
        time.sleep(0.01)
    return True


def recorded(workdir: Path) -> int:
    """The last step that metrics.jsonl tells of; 0 if there is none. Lines may be torn."""
    return max((record["step"] for record in read(workdir)), default=0) if (workdir / "metrics.jsonl").exists() else 0


def saved(workdir: Path) -> list[int]:
    """Steps of the checkpoints."""
    return [int(path.name) for path in step_folders(workdir / "checkpoints")]


def values(workdir: Path, step: int) -> dict[str, bytes]:
    """All arrays of a checkpoint, and under `data` its position in the data and what else is no array."""
    folder = workdir / "checkpoints" / str(step)
    found = {f"{item}/{name}": arrays.read_whole(folder / item, name).tobytes()
             for item, named in manifest.read(folder).arrays.items() for name in named}
    return found | {"data": canonical(manifest.read_json(folder / "data" / "metadata"))}


def canonical(data: Any) -> bytes:
    """The same bytes for the same JSON."""
    return json.dumps(data, sort_keys=True).encode()


def differences(workdir: Path, straight: Path) -> Iterator[str]:
    """Where a run is not bit for bit the straight one: checkpoints that both should have, or records."""
    for step in saved(straight):
        if step not in saved(workdir):
            yield f"there is no checkpoint of step {step}"
            continue
        if wrong := verify(workdir / "checkpoints" / str(step)).wrong:
            yield from (f"step {step}: {one}" for one in wrong)
            continue
        ours, theirs = values(workdir, step), values(straight, step)
        yield from (f"step {step}: {name} is another" for name in sorted(ours.keys() | theirs.keys())
                    if ours.get(name) != theirs.get(name))
    try:
        ours, theirs = records(workdir), records(straight)
    except (OSError, ValueError) as error:
        yield f"metrics.jsonl cannot be read: {error}"
        return
    yield from () if ours == theirs else ("metrics.jsonl tells of another run",)


def records(workdir: Path) -> list[dict]:
    """All lines of metrics.jsonl but what they say of speed. Raises `ValueError` for a torn one."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


def losses(workdir: Path) -> dict[tuple[int, str], float]:
    """By step and split."""
    return {(record["step"], record["split"]): record["loss"] for record in read(workdir)}


def address() -> str:
    """A port of this machine that nothing listens on, for --coordinator."""
    return f"localhost:{free_port()}"
