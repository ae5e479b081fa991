"""A disk that is full while a run goes on: a small tmpfs where Linux lets one be made, else a limit on the size of files.

    unshare -rm python -m benchmarks.faults.full_disk STRAIGHT mount ... FOLDER

is how `fill` calls this file: it mounts the tmpfs, and prints what was lost and, in the last line, what went wrong.
"""

import contextlib
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.faults import scene
from moejax.checkpoint.verify import verify

ROOM = 16 * 2**20
"""Bytes of the tmpfs."""
LIMIT = 7000
"""Bytes of a file, where there is no tmpfs; less than a checkpoint needs."""


def fill(straight: Path) -> scene.Row:
    """A run whose disk is full for a while: it goes on, warns, keeps its older checkpoints, and saves again later.

    Args:
      straight: the workdir of a run that met no fault, in a scene.
    """
    disk = straight.parent / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(disk)]
    if shutil.which("unshare") and not subprocess.run(["unshare", "-rm", *mount], capture_output=True).returncode:
        program = [sys.executable, "-m", "benchmarks.faults.full_disk", str(straight), *mount]
        inside = subprocess.run(["unshare", "-rm", *program], capture_output=True, text=True, timeout=600)
        *lost, problems = inside.stdout.splitlines() or ["", inside.stderr[-500:]]
        return scene.row("disk full (tmpfs)", [[problems] if problems != "none" else []], "; ".join(lost))
    return scene.row("disk full (limit on files)", [limited(straight)], "the checkpoints, each with a warning; the older "
                     "one stays, and the same command goes on")


def limited(straight: Path) -> list[str]:
    """What is wrong after a run whose files cannot grow once it has a checkpoint."""
    folder = straight.parent
    workdir = Path(shutil.copytree(straight, folder / "limited"))
    for step in scene.saved(workdir)[1:]:
        shutil.rmtree(workdir / "checkpoints" / str(step))
    status = scene.end(scene.begin(folder, f"--workdir={workdir.name}", before=limit_files))
    problems = [] if status == 2 and warnings(folder) else [f"exit status {status}: {scene.words(folder)}"]
    problems += [] if scene.saved(workdir) == scene.saved(straight)[:1] else ["the older checkpoint was lost"]
    problem = scene.finished(folder, f"--workdir={workdir.name}")
    return [*problems, problem] if problem else problems + list(scene.differences(workdir, straight))


def warnings(folder: Path) -> int:
    """Checkpoints of which a run has said that they could not be written."""
    return (folder / "run.err").read_text().count("WARNING: the checkpoint of step ")


def limit_files() -> None:
    """From now on no file of this process can become longer than `LIMIT`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def crowded(straight: Path, disk: Path) -> tuple[str, list[str]]:
    """What was lost, and what is wrong, after a run whose disk is full from its first checkpoint until two more are due."""
    folder, workdir = straight.parent, disk / "w"
    with scene.running(folder, "--workdir=disk/w", before=scene.linger) as process:
        if not scene.wait_for(lambda: bool(scene.saved(workdir)), [process]):
            return "", [f"ended before its first checkpoint: {scene.words(folder)}"]
        first, ballast = scene.saved(workdir)[-1], disk / "ballast"
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        if not scene.wait_for(lambda: warnings(folder) >= 2, [process]):
            return "", [f"no two warnings: {scene.words(folder)}"]
        problems = [] if first in scene.saved(workdir) else ["the older checkpoint was lost"]
        ballast.unlink()
        if status := scene.end(process):
            problems.append(f"exit status {status}: {scene.words(folder)}")
    missing = [step for step in scene.saved(straight) if step not in scene.saved(workdir)]
    if len(missing) < 2 or scene.STEPS in missing:
        problems.append(f"checkpoints of steps {missing} are missing")
    problems += [f"step {step}: {wrong}" for step in scene.saved(workdir)
                 for wrong in verify(workdir / "checkpoints" / str(step)).wrong]
    ours, theirs = scene.values(workdir, scene.STEPS), scene.values(straight, scene.STEPS)
    problems += [f"{name} is another at the end" for name in theirs if ours.get(name) != theirs[name]]
    records, wanted = scene.records(workdir), scene.records(straight)
    problems += [] if all(record in wanted for record in records) else ["metrics.jsonl tells of another run"]
    return (f"the checkpoints of steps {missing}, each with a warning, and {len(wanted) - len(records)} records; older "
            "ones stay, later ones are written"), problems


if __name__ == "__main__":
    subprocess.run(sys.argv[2:], check=True)
    lost, found = crowded(Path(sys.argv[1]), Path(sys.argv[-1]))
    print(lost, " | ".join(found) or "none", sep="\n")
