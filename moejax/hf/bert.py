"""BERT (Devlin et al. 2019, arXiv 1810.04805): an encoder with norms on the sums, with one of three heads.

The head of a masked language model; of a classifier; or only the pooled first token, as sentence encoders have it.
"""

from functools import partial
from typing import Any, Iterator

from moejax.config import ModelConfig, MoEConfig
from moejax.hf.common import SIZES
from moejax.hf.family import Family, Options
from moejax.hf.tensors import Tensor

DESIGN = {"norm": "layer", "norm_place": "sum", "embedding_norm": True, "final_norm": False, "positions": "learned",
          "qkv_bias": True, "output_bias": True, "ffn_bias": True}
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


def read(head: str, options: Options) -> dict[str, Any]:
    """See `Family.read`; `head` as in `config.model.head`."""
    model = {ours: options.take(theirs) for theirs, ours in SIZES.items()}
    options.only("hidden_act", *ACTIVATIONS)
    options.only("position_embedding_type", "absolute")
    options.only("is_decoder", False)
    options.only("add_cross_attention", False)
    design = DESIGN | {"activation": ACTIVATIONS[options.take("hidden_act")],
                       "token_types": options.take("type_vocab_size")}
    model |= {"kind": "encoder", "kv_heads": model["heads"], "head_dim": model["embed"] // model["heads"], "head": head,
              "ffn": options.take("intermediate_size"), "norm_eps": options.take("layer_norm_eps", 1e-12)}
    tied = options.take("tie_word_embeddings", True)
    if head == "tokens":
        return {"model": model | {"tie_embeddings": tied, "architecture": design | {"head_bias": True, "head_layer": True}}}
    if head == "classes":
        model["classes"] = options.take("num_labels", None) or len(options.take("id2label", None) or "01")
    return {"model": model | {"architecture": design | {"pooler": True}}}


def write(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """See `Family.write`."""
    design = model.architecture
    theirs = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
    labels = {"id2label": {str(i): f"LABEL_{i}" for i in range(model.classes)},
              "label2id": {f"LABEL_{i}": i for i in range(model.classes)}} if model.head == "classes" else {}
    return {name: getattr(model, ours) for name, ours in SIZES.items()} | labels | {
        "hidden_act": theirs[design.activation], "type_vocab_size": design.token_types, "layer_norm_eps": model.norm_eps,
        "intermediate_size": model.ffn} | ({"tie_word_embeddings": model.tie_embeddings} if model.head == "tokens" else {})


def tensors(model: ModelConfig, moe: MoEConfig, other: bool) -> Iterator[Tensor]:
    """The table. In the second layout, that of the first released files, norms have gamma and beta."""
    scale, shift = ("gamma", "beta") if other else ("weight", "bias")
    top = "" if model.head == "none" else "bert."

    def norm(disk: str, *path: str, layer: int | None = None) -> Iterator[Tensor]:
        yield Tensor(f"{disk}.LayerNorm.{scale}", ("params", *path, "scale"), "d -> d", layer)
        yield Tensor(f"{disk}.LayerNorm.{shift}", ("params", *path, "bias"), "d -> d", layer)

    def dense(disk: str, w: str, b: str, *path: str, layer: int | None = None, weight: str = "f d -> d f",
              bias: str = "f -> f", at_w: tuple = (), at_b: tuple = ()) -> Iterator[Tensor]:
        yield Tensor(f"{disk}.weight", ("params", *path, w), weight, layer, at=at_w)
        yield Tensor(f"{disk}.bias", ("params", *path, b), bias, layer, at=at_b)

    for name, ours in (("word", "table"), ("position", "positions"), ("token_type", "types")):
        yield Tensor(f"{top}embeddings.{name}_embeddings.weight", ("params", "embedding", ours), "v d -> v d")
    yield from norm(f"{top}embeddings", "embedding", "norm")
    for i in range(model.layers):
        disk = f"{top}encoder.layer.{i}"
        for name in ("query", "key", "value"):
            yield from dense(f"{disk}.attention.self.{name}", f"w_{name[0]}", f"b_{name[0]}", "attention", layer=i,
                             weight="(q h) d -> d q h", bias="(q h) -> q h")
        yield from dense(f"{disk}.attention.output.dense", "w_o", "b_o", "attention", layer=i, weight="d (q h) -> q h d",
                         bias="d -> d")
        yield from norm(f"{disk}.attention.output", "attention_norm", layer=i)
        yield from dense(f"{disk}.intermediate.dense", "w_in", "b_in", "feed_forward", layer=i, at_w=(None, 0), at_b=(0,))
        yield from dense(f"{disk}.output.dense", "w_out", "b_out", "feed_forward", layer=i)
        yield from norm(f"{disk}.output", "feed_forward_norm", layer=i)
    if model.head == "tokens":
        yield from dense("cls.predictions.transform.dense", "w_head", "b_head", "embedding")
        yield from norm("cls.predictions.transform", "embedding", "head_norm")
        yield Tensor("cls.predictions.bias", ("params", "embedding", "head_bias"), "v -> v")
        if not model.tie_embeddings:
            yield Tensor("cls.predictions.decoder.weight", ("params", "embedding", "head"), "v d -> d v")
        return
    yield from dense(f"{top}pooler.dense", "w_pooler", "b_pooler", "pooled")
    if model.head == "classes":
        yield from dense("classifier", "classes", "classes_bias", "pooled")


def family(name: str, architecture: str, head: str, embedding: str) -> Family:
    """BERT with a head."""
    unused = ("embeddings.position_ids", "cls.predictions.decoder.bias", "cls.seq_relationship.weight",
              "cls.seq_relationship.bias")
    pooler = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")  # which the first released files have beside this head
    return Family("bert", architecture, partial(read, head), write, tensors, name=name, unused=unused + (
        pooler if head == "tokens" else ()), tied=("cls.predictions.decoder.weight", embedding))


BERT = family("bert", "BertForMaskedLM", "tokens", "bert.embeddings.word_embeddings.weight")
BERT_CLASSIFIER = family("bert_classifier", "BertForSequenceClassification", "classes",
                         "bert.embeddings.word_embeddings.weight")
BERT_ENCODER = family("bert_encoder", "BertModel", "none", "embeddings.word_embeddings.weight")
