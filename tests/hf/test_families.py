"""Every family against what transformers computes (golden files, made by `make_golden.py`), and back to disk bit by bit."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open

from moejax.generation.generate import generate
from moejax.generation.prompts import count_positions
from moejax.hf import save
from moejax.hf.families import FAMILIES
from moejax.hf.load import from_hf, read_config
from moejax.models import transformer
from moejax.models.stacks import kinds
from moejax.models.transformer import in_order
from moejax.moe.layer import DECISIONS, weights_of

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.name for path in GOLDEN.iterdir())
NO_LEFT_PADDING = ("llama4", "llama4_square")
"""Where transformers itself gives something else for a prompt padded on the left than for the prompt alone."""


def test_there_is_a_golden_checkpoint_of_every_family():
    found = {read_config(GOLDEN / name)[1].model.architecture.family for name in NAMES}
    assert found == set(FAMILIES)


def kind_of(name):
    model = read_config(GOLDEN / name)[1].model
    return model.kind, model.head


@partial(jax.jit, static_argnums=0)
def forward(model, params, batch):
    output, found = transformer.apply_batch(model, params["params"], params["router"], batch, mutable=[DECISIONS])
    return output, found.get(DECISIONS, {})


def both_sides(golden):
    """The rows padded on the right, and behind them those padded on the left."""
    real_BL = np.concatenate([golden["mask"], golden["left_mask"]]) == 1
    batch = {"tokens": np.concatenate([golden["ids"], golden["left_ids"]]), "positions": count_positions(real_BL),
             "segments": real_BL.astype(np.int32)}
    return batch | ({"types": np.concatenate([golden["types"], golden["left_types"]])} if "types" in golden else {})


def check_combine(golden, decisions, num_experts, masks):
    """Each sparse layer's weights against those of transformers, of the real tokens among the first of each trunk."""
    wanted = [golden[key] for key in sorted(key for key in golden if key.startswith("combine"))]
    runs = [jax.tree.leaves(stack, is_leaf=lambda node: hasattr(node, "weight_N")) for _, stack in sorted(
        decisions.items())]
    found = [jax.tree.map(lambda a, r=r: a[r], tree) for trees in runs for r in range(len(trees[0].token_N))
             for tree in trees]
    assert len(found) == len(wanted) == len(masks)
    for got, want_TE, mask_T in zip(found, wanted, masks):
        got_TE = np.asarray(weights_of(got, len(got.token_N) // max(got.choices, 1), num_experts))[:len(mask_T)]
        yield got_TE[mask_T], want_TE[mask_T, :num_experts]  # behind them are those that only copy


def mean_nll(logits_BLV, targets_BL, counted_BL):
    log_probs_BLV = jax.nn.log_softmax(logits_BLV)
    return -np.take_along_axis(log_probs_BLV, targets_BL[..., None], axis=-1)[..., 0][counted_BL].mean()


FAST = ("gpt2", "llama3_tied", "mixtral", "qwen2_moe", "olmoe", "deepseek_v2_lite", "deepseek_v3", "gpt_oss",
        "granitemoeshared", "phimoe", "llama4", "ernie4_5_moe", "longcat_flash", "jetmoe", "bert", "bert_classifier",
        "bert_encoder", "t5", "t5_v1_1", "switch_transformers")
"""Between them these have every option that some family has."""
DECODERS, ENCODERS, BOTH = ([pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in NAMES
                             if kind_of(name)[0] == kind] for kind in ("decoder", "encoder", "encoder_decoder"))


@pytest.mark.parametrize("name", DECODERS)
def test_logits_loss_and_routing_are_those_of_transformers(name):
    """Of a batch padded on the right and the same padded on the left."""
    model, params = from_hf(GOLDEN / name)
    golden = np.load(GOLDEN / name / "golden.npz")
    mask_BL, left_BL = golden["mask"] == 1, golden["left_mask"] == 1
    output, decisions = forward(model, params, both_sides(golden))
    right_BLV, left_BLV = np.split(np.asarray(output.logits_BLV), 2)
    np.testing.assert_allclose(right_BLV[mask_BL], golden["logits"][mask_BL], atol=1e-4)
    if name not in NO_LEFT_PADDING:
        np.testing.assert_allclose(left_BLV[left_BL], golden["left_logits"][left_BL], atol=1e-4)
    np.testing.assert_allclose(mean_nll(right_BLV[:, :-1], golden["ids"][:, 1:], mask_BL[:, 1:]), golden["loss"], atol=1e-4)

    scale = (lambda a: a != 0) if name.startswith("llama4") else (lambda a: a)  # whose weight is on the input
    each = 2 if model.model.architecture.expert_heads else 1  # of attention, then of the feed-forward layer
    masks = [mask_BL.reshape(-1)] * (each * sum(kind.sparse for kind in kinds(model.model, model.moe)))
    for got_TE, want_TE in check_combine(golden, decisions, model.moe.num_experts, masks):
        np.testing.assert_allclose(scale(got_TE), scale(want_TE), atol=1e-5)
    for n, record in enumerate(in_order(output.records) if name not in NO_LEFT_PADDING else ()):
        chosen_TE = golden[f"combine_{n ^ (each - 1)}"][mask_BL.reshape(-1)] != 0
        np.testing.assert_array_equal(record.statistics["assigned_E"], 2 * chosen_TE.sum(axis=0))  # padded on either side


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_scores_and_pools_as_in_transformers(name):
    """Of a batch padded on the right and the same padded on the left."""
    model, params = from_hf(GOLDEN / name)
    golden = np.load(GOLDEN / name / "golden.npz")
    output, _ = forward(model, params, both_sides(golden))
    for n, side in enumerate(("", "left_")):
        def own(array, n=n):
            return np.split(np.asarray(array), 2)[n]
        mask_BL = golden[f"{side}mask"] == 1
        if model.model.head == "none":
            np.testing.assert_allclose(own(output.x_BLD)[mask_BL], golden[f"{side}hidden"][mask_BL], atol=1e-4)
            if not side:  # transformers takes the first slot, real or not
                np.testing.assert_allclose(own(output.pooled_BD), golden["pooled"], atol=1e-4)
        elif model.model.head == "classes":
            if not side:
                np.testing.assert_allclose(own(output.logits_BC), golden["logits"], atol=1e-4)
                loss = mean_nll(own(output.logits_BC), np.arange(3), np.ones(3, bool))
                np.testing.assert_allclose(loss, golden["loss"], atol=1e-4)
        else:
            logits_BLV = own(output.logits_BLV)
            np.testing.assert_allclose(logits_BLV[mask_BL], golden[f"{side}logits"][mask_BL], atol=1e-4)
            loss = mean_nll(logits_BLV, golden[f"{side}ids"], mask_BL)
            np.testing.assert_allclose(loss, golden[f"{side}loss"], atol=1e-4)


@pytest.mark.parametrize("name", BOTH)
def test_an_encoder_with_a_decoder_scores_as_in_transformers(name):
    """Of sources padded on the right and on the left; but where padding takes places in experts, as in theirs, not so."""
    model, params = from_hf(GOLDEN / name)
    golden = np.load(GOLDEN / name / "golden.npz")
    source = {f"source_{key}": array for key, array in both_sides(golden).items()}
    real_BL = np.concatenate([golden["decoder_mask"]] * 2) == 1
    output, decisions = forward(model, params, source | {
        "tokens": np.concatenate([golden["decoder_ids"]] * 2), "positions": count_positions(real_BL),
        "segments": real_BL.astype(np.int32)})
    sparse, mask_BL = model.moe.every > 0, golden["decoder_mask"] == 1
    for side, logits_BLV in zip(("",) if sparse else ("", "left_"), np.split(np.asarray(output.logits_BLV), 2)):
        np.testing.assert_allclose(logits_BLV[mask_BL], golden[f"{side}logits"][mask_BL], atol=1e-4)
        np.testing.assert_allclose(mean_nll(logits_BLV, golden["targets"], mask_BL), golden[f"{side}loss"], atol=1e-4)

    masks = [(golden["decoder_mask" if kind.cross else "mask"] == 1).reshape(-1) for kind in kinds(model.model, model.moe)
             if kind.sparse]
    for got_TE, want_TE in check_combine(golden, decisions, model.moe.num_experts, masks) if sparse else ():
        chosen = want_TE > 0  # of what is dropped, the list of choices still tells the weight
        np.testing.assert_allclose(got_TE[chosen], want_TE[chosen], atol=1e-5)
        assert (~chosen.any(axis=1)).sum() <= len(chosen) // 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if kind_of(name)[0] != "encoder"])
def test_greedy_tokens_with_the_cache_are_those_of_transformers(name):
    model, params = from_hf(GOLDEN / name)
    golden = np.load(GOLDEN / name / "golden.npz")
    prompts = [row[real == 1].tolist() for row, real in zip(golden["ids"], golden["mask"])]
    made = generate(model, params, prompts, max_new_tokens=golden["greedy"].shape[1])
    np.testing.assert_array_equal(made.tokens, golden["greedy"])


def tensors_of(folder):
    held = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            held |= {name: file.get_tensor(name) for name in file.keys()}
    return held


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name.endswith("_square") else [])
                                  for name in NAMES])
def test_what_is_written_is_what_was_read(name, tmp_path):
    """The same tensors bit by bit, in several files too, and a config.json that gives the same settings."""
    model, params = from_hf(GOLDEN / name)
    dtype = "bfloat16" if name.endswith("_square") else "float32"
    shards = {"shard_bytes": 20_000} if name in ("mixtral", "mixtral_square") else {}
    save.to_hf(model, params, tmp_path / "out", dtype=dtype, **shards)
    before, after = tensors_of(GOLDEN / name), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, array in before.items():
        assert array.dtype == after[key].dtype and array.tobytes() == after[key].tobytes(), key
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == bool(shards)
    assert read_config(tmp_path / "out")[1] == read_config(GOLDEN / name)[1]
