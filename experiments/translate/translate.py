"""English user-interface strings into German, French and Spanish by one encoder-decoder with experts.

Command   python -m experiments.translate.prepare runs/translate/data
          python -m moejax.main --config=experiments/translate/translate.py --workdir=runs/translate/all
          (and translate.py:dense, translate.py:german and so on); README.md beside this file has what follows
Hardware  2 CPU cores
Time      37 minutes
Result    held-out BLEU: German 30.0, French 32.2, Spanish 41.6; translation memory 24.7, 24.7, 30.2
"""

from moejax import config

DATA = "runs/translate/data"
LANGUAGES = {"german": ("German", "de", 0.42), "french": ("French", "fr", 0.22), "spanish": ("Spanish", "es", 0.36)}
"""Name, field, and share of the rows: near the square root of the pairs, and German more, which is learnt slowest."""
STEPS = 1300


def task(name: str) -> dict[str, str | float]:
    """One language's pairs, with its prefix."""
    language, field, rate = LANGUAGES[name]
    return {"source": f"{DATA}/{name}_train.jsonl", "eval_source": f"{DATA}/{name}_eval.jsonl", "objective": "seq2seq",
            "input": f"translate to {language}: {{en}}", "target": f"{{{field}}}", "rate": rate}


def get_config(form: str = "all"):
    """3 layers of width 192 that read and 3 that write, each with 8 experts of which 2 see a token.

    `all` learns the languages together, `dense` too, with as many operations and no experts; the name of a language learns
    that one alone, in a third of the steps.
    """
    if form not in ("all", "dense", *LANGUAGES):
        raise ValueError(f"{form!r} is none of all, dense, {', '.join(LANGUAGES)}")
    c = config.default()
    c.model.kind = "encoder_decoder"
    c.model.update(dict(vocab_size=4000, layers=3, encoder_layers=3, embed=192, heads=6, kv_heads=6, head_dim=32, ffn=512,
                        dropout=0.1))
    c.moe.update(dict(every=1, ffn=256, num_experts=8, experts_per_token=2))
    c.data.task = {"tasks": {name: task(name) for name in LANGUAGES if form in ("all", "dense", name)},
                   "rates": "fixed"}
    c.data.source_length = 24
    c.data.length = 26
    c.data.batch_size = 128
    c.optimizer.name = "muon"  # after 200 steps of 64 rows a held-out loss of 4.86, and 5.54 with AdamW
    c.optimizer.learning_rate = 1e-2
    c.optimizer.adam_learning_rate = 3e-3
    c.optimizer.warmup_steps = 70
    c.train.finetune = {"metric": "tasks/loss"}
    c.train.steps = STEPS if form in ("all", "dense") else STEPS // len(LANGUAGES)
    c.train.log_every = 25
    c.train.eval_every = 325
    c.train.checkpoint_every = 325
    if form == "dense":
        c.moe.every = 0
    return c
