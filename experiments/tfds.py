"""Public data sets through TensorFlow Datasets (no TensorFlow needed): text, GLUE, translation, summaries, questions.

Command   python -m moejax.main --config=experiments/tfds.py:glue_sst2 --workdir=runs/sst2
          forms: lm1b (the default), c4, glue_sst2, glue_mnli, glue_stsb, wmt14_de_en, cnn_dailymail, squad
Hardware  one GPU or TPU chip with 16 GB; the network, or a TFDS_DATA_DIR that holds the set as array_record
Time      not measured: these sets have to be downloaded
Result    not measured
"""

from moejax import config


def base(source, eval_source, **task):
    """6 layers of width 512, every second with 8 experts of which 2 see a token, bfloat16."""
    c = config.default()
    c.model.update(dict(vocab_size=32000, layers=6, embed=512, heads=8, kv_heads=8, head_dim=64, ffn=1024, dropout=0.1))
    c.moe.update(dict(every=2, num_experts=8, experts_per_token=2))
    c.data.update(dict(source=source, eval_source=eval_source, task=task or None, length=256, batch_size=64))
    c.optimizer.learning_rate = 1e-3
    c.train.update(dict(steps=20_000, dtype="bfloat16", eval_every=1000, checkpoint_every=1000, eval_batches=100))
    return c


def text(name, split):
    """A decoder on running text."""
    return base(f"tfds:{name}:train", f"tfds:{name}:{split}", objective="next_token")


def glue(name, split, template, classes, objective="classification"):
    """An encoder with scores of classes, from scratch; --config.train.init_from takes a trained one."""
    c = base(f"tfds:glue/{name}:train", f"tfds:glue/{name}:{split}", objective=objective, input=template)
    c.model.update(dict(kind="encoder", head="classes", classes=classes))
    c.moe.allow_noncausal_routing = True
    c.data.length = 128
    c.train.eval_batches = None
    return c


def pairs(name, split, template, target, source_length, length):
    """An encoder that reads and a decoder that writes."""
    c = base(f"tfds:{name}:train", f"tfds:{name}:{split}", objective="seq2seq", input=template, target=target)
    c.model.update(dict(kind="encoder_decoder", max_length=max(source_length, length)))
    c.data.update(dict(source_length=source_length, length=length))
    return c


FORMS = {
    "lm1b": lambda: text("lm1b", "test"),
    "c4": lambda: text("c4/en", "validation[:10%]"),
    "glue_sst2": lambda: glue("sst2", "validation", "{sentence}", 2),
    "glue_mnli": lambda: glue("mnli", "validation_matched", "premise: {premise} hypothesis: {hypothesis}", 3),
    "glue_stsb": lambda: glue("stsb", "validation", "{sentence1} || {sentence2}", 1, "regression"),
    "wmt14_de_en": lambda: pairs("wmt14_translate/de-en", "validation", "German: {de}", "{en}", 128, 128),
    "cnn_dailymail": lambda: pairs("cnn_dailymail", "validation", "summarize: {article}", "{highlights}", 1024, 128),
    "squad": lambda: pairs("squad", "validation", "question: {question} context: {context}", "{answers.text.0}", 512, 32),
}


def get_config(form="lm1b"):
    """One of `FORMS`."""
    if form not in FORMS:
        raise ValueError(f"{form!r} is none of {', '.join(FORMS)}")
    return FORMS[form]()
