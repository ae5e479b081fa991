"""moejax against other programs on the same task, run in turn, so that the drift of a noisy machine hits all alike.

    python -m benchmarks.against --rounds=5 \\
        --run 'moejax=python -m moejax.main --config=experiments/bench_mixtral_small.py --mode=benchmark' \\
        --run 'grouped_mm=peer/bin/python benchmarks/peers/huggingface.py --experts=grouped_mm' \\
        --run 'grouped_mm compiled=peer/bin/python benchmarks/peers/huggingface.py --experts=grouped_mm --compile'

Each command prints a JSON object with `tokens_per_second` on its last line. The table gives the median of each, and the
median over the rounds of the first command's speed over it in the same round. The last line is a JSON object.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys

from benchmarks.timing import machine, table


def speed(command: str) -> float:
    """Runs a command and returns the `tokens_per_second` that it prints last."""
    run = subprocess.run(shlex.split(command), capture_output=True, text=True)
    if run.returncode != 0:
        sys.exit(f"{command}\nended with status {run.returncode}:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.strip().splitlines()[-1])["tokens_per_second"]


def main() -> None:
    """Prints the table and the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", required=True, metavar="NAME=COMMAND", help="may be given several times")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    commands = dict(run.split("=", 1) for run in options.run)
    speeds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(options.rounds):
        for name, command in commands.items():
            speeds[name].append(speed(command))
            print(f"round {number + 1}: {name} {speeds[name][-1]:,.0f} tokens/s", file=sys.stderr, flush=True)
    first = next(iter(speeds.values()))
    results = [{"name": name, "tokens_per_second": statistics.median(own), "first_over_this": statistics.median(
        a / b for a, b in zip(first, own)), "all": own} for name, own in speeds.items()]
    print(table([(r["name"], f"{r['tokens_per_second']:,.0f}", r["first_over_this"]) for r in results],
                ("program", "tokens/s", f"{next(iter(commands))} over it")))
    print(json.dumps({"benchmark": "against", "rounds": options.rounds, "results": results, "machine": machine()}))


if __name__ == "__main__":
    main()
