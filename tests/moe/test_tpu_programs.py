"""The sparse layer's TPU programs, compiled ahead of time on the CPU: they do the work that was asked for, no more."""

import json
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("libtpu", reason='needs libtpu: pip install -e ".[tpu-aot]"')

ROOT = pathlib.Path(__file__).parent.parent.parent
GENERATIONS = ("v5p", "v5e", "v6e")
SMALL, TYPICAL = (512, 512, 256, 8, 2), (8192, 1024, 512, 64, 8)


@pytest.mark.parametrize("dispatch, shape", [
    pytest.param("sort", SMALL, id="sort"),
    pytest.param("sort", TYPICAL, id="sort-typical", marks=pytest.mark.slow),
    pytest.param("all_gather", SMALL, id="all_gather", marks=pytest.mark.slow)])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_work_is_within_five_percent_of_the_ideal(generation, dispatch, shape):
    # A process of its own, because libtpu and XLA read their environment once.
    command = [sys.executable, "-m", "benchmarks.tpu_flops", "--generations", generation, "--dispatch", dispatch,
               "--shapes", ",".join(map(str, shape))]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-4000:]
    (result,) = json.loads(run.stdout.splitlines()[-1])["results"]

    tokens, width, hidden, experts, choices = shape
    rows = tokens * choices * (4 if dispatch == "all_gather" else 1)  # what the layer has room for on a device
    ideal = 2 * rows * 3 * width * hidden + 2 * tokens * width * experts
    # Less than the ideal would mean that the compiler does not count the kernels.
    assert ideal <= result["forward_flops"] <= 1.05 * ideal
    assert 3 * ideal <= result["both_flops"] <= 1.05 * 3 * ideal
