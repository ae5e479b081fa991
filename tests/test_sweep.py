"""The routers' sweep: its quick form runs, goes on where it stopped, and compares at equal operations."""

import dataclasses
import json
import math

import pytest

from experiments.routing import sweep
from moejax.main import load_config_file
from moejax.models.count import forward_flops
from moejax.moe.routing import ROUTERS

QUICK = "experiments/routing/base.py:quick"


@pytest.mark.slow
def test_the_quick_form_runs(tmp_path):
    """One router, and a second time, when there is nothing left to run."""
    for _ in range(2):
        table = sweep.sweep(QUICK, tmp_path, ["topk"], seeds=1, jobs=1, fast_compile=True)
        (row,) = sweep.rows(tmp_path / "rows.jsonl")
    assert row["router"] == "topk" and math.log(257) - 1 > row["loss"] > 0 and row["tokens_per_second"] > 0
    assert "| `topk` | 1 |" in table and (tmp_path / "plot.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_quick_form_goes_on(tmp_path):
    for names, said in ((["topk"], 1), (["topk", "soft_moe"], 2)):
        table = sweep.sweep(QUICK, tmp_path, names, seeds=1, jobs=1, fast_compile=True)
        rows = sweep.rows(tmp_path / "rows.jsonl")
        assert [row["router"] for row in rows] == names[:said]
    by_name = {row["router"]: row for row in rows}
    assert all(math.log(257) - 1 > row["loss"] > 0 and row["tokens_per_second"] > 0 for row in rows)
    assert by_name["topk"]["leak"] < 1e-5 < by_name["soft_moe"]["leak"] and 0 < by_name["topk"]["flips"] < 1
    assert "| `topk` | 1 |" in table and (tmp_path / "table.md").read_text() == table + "\n"
    assert (tmp_path / "plot.png").stat().st_size > 5000


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_gets_the_operations_of_plain_top_k(name):
    tree = load_config_file(QUICK)
    config, base = sweep.for_router(tree, name, seed=3), sweep.for_router(tree, "topk", seed=0)
    wider = (dataclasses.replace(config, model=dataclasses.replace(config.model, ffn=config.model.ffn + 1))
             if ROUTERS[name].level == "block" else
             dataclasses.replace(config, moe=dataclasses.replace(config.moe, ffn=config.moe.ffn + 1)))
    flops, more, wanted = (forward_flops(c.model, c.moe, c.data.length) for c in (config, wider, base))
    assert abs(flops - wanted) <= 0.51 * (more - flops), "no other width is nearer"
    assert config.seed == 3 and config.moe.router == name


def test_a_table_has_means_over_seeds_best_first():
    row = dict.fromkeys(sweep.COLUMNS, 0.5)
    done = [row | {"router": "a", "seed": 0, "loss": 2.0}, row | {"router": "b", "seed": 0, "loss": 1.0, "flips": math.nan},
            row | {"router": "a", "seed": 1, "loss": 4.0}]
    lines = sweep.table(json.loads(json.dumps(done))).splitlines()
    assert lines[2].startswith("| `b` | 1 | 1.0000 |") and "| - |" in lines[2] and "1.0000 to 1.0000" in lines[2]
    assert lines[3].startswith("| `a` | 2 | 3.0000 |") and "2.0000 to 4.0000" in lines[3]
    assert list(sweep.missing(done, ["a", "b"], 2)) == [("b", 1)]
