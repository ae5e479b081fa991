"""Whether experts made of a dense model learn more from further text than that model does.

    python experiments/upcycling/compare.py runs/upcycling

For each seed a dense model is trained (experiments/tiny_dense.py), its layers become 8 copies of which a token reaches 2,
and both are trained on with the same steps, batches and schedule. A folder that is there already is gone on with.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from moejax.metrics.record import read

BASE = "experiments/tiny_dense.py"


def run(*arguments: str) -> None:
    """One command, shown before it runs."""
    print("+ python " + " ".join(arguments), flush=True)
    subprocess.run([sys.executable, *arguments], check=True)


def last(workdir: Path) -> float:
    """Held-out bits per byte of a finished run."""
    return [record for record in read(workdir) if record["split"] == "eval"][-1]["bits_per_byte"]


def one_seed(folder: Path, seed: int, steps: int, rate: float) -> tuple[float, float, float]:
    """Held-out bits per byte of the dense model, of the dense model after further steps, and of the upcycled one."""
    dense, upcycled = folder / "dense", folder / "upcycled"
    run("-m", "moejax.main", f"--config={BASE}", f"--workdir={dense}", f"--config.seed={seed}",
        "--config.train.sample_prompt=")
    if not upcycled.exists():
        run("-m", "moejax.hf", "upcycle", str(dense), str(upcycled), "--experts=8", "--choices=2", f"--seed={seed}")
    for name, start in (("dense_on", dense), ("upcycled_on", upcycled)):
        # Another seed, so other batches than before; the tokenizer must stay.
        run("-m", "moejax.main", f"--config={start}/config.json", f"--workdir={folder / name}",
            f"--config.train.init_from={start}", f"--config.data.tokenizer={dense}/data/tokenizer.model",
            f"--config.seed={seed + 1000}", f"--config.train.steps={steps}", f"--config.train.eval_every={steps}",
            f"--config.train.checkpoint_every={steps}", f"--config.optimizer.learning_rate={rate}",
            "--config.optimizer.warmup_steps=20", "--config.train.sample_prompt=")
    return last(dense), last(folder / "dense_on"), last(folder / "upcycled_on")


def main() -> None:
    """Runs all seeds and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="further steps (default: 200)")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="peak of the further steps (default: 2e-3)")
    given = parser.parse_args()
    rows = ["| seed | dense | dense, trained on | upcycled, trained on | difference |", "| --- | --- | --- | --- | --- |"]
    for seed in range(given.seeds):
        before, dense, sparse = one_seed(given.folder / f"seed{seed}", seed, given.steps, given.learning_rate)
        rows.append(f"| {seed} | {before:.4f} | {dense:.4f} | {sparse:.4f} | {sparse - dense:+.4f} |")
        print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
