"""Laws of scoring and generating on tiny random models: cached equals uncached, and a row never depends on the rest."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config, sharding
from moejax.generation import begin as beginning
from moejax.generation import cache, generate, prompts, score
from moejax.models import transformer
from moejax.moe.routing import resolve

V, CONTEXT = 31, 20
SPARSE = {"first_dense": 1, "num_experts": 6, "ffn": 10, "block_rows": 2, "capacity_factor": 0.5}
BIASED = {"every": 2, "num_experts": 5, "ffn": 10, "block_rows": 2, "score": "sigmoid", "bias_rate": 0.1,
          "shared_experts": 1}
PROMPTS = [[4, 9, 2], [7], [4, 9, 2], [1, 30, 12, 5, 8, 8, 3]]
SAMPLED = {"temperature": 2.5, "top_k": 12, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 3}


def make(moe, layers=4):
    """A model with random parameters, so large that its choices are no ties, and a random selection bias."""
    tree = config.default()
    tree.data.length = 8
    tree.model.update(vocab_size=V, layers=layers, embed=12, heads=4, kv_heads=2, head_dim=6, ffn=22,
                      max_length=CONTEXT)
    tree.moe.update(moe)
    built = transformer.resolve(config.build(tree))
    model = transformer.build(built)
    state = transformer.initial_router_state(built.model, built.moe)
    row = jnp.zeros((1, 1), jnp.int32)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(scale=0.5, size=a.shape).astype(a.dtype), nn.meta.unbox(
        jax.eval_shape(model.init, jax.random.key(0), row, row, row, state))["params"])
    params["embedding"]["head"] *= 3
    state = jax.tree.map(lambda a: a + 0.2 * rng.normal(size=a.shape).astype(a.dtype), state)
    return model, {"params": params, "router": state}


@pytest.fixture(scope="module")
def sparse():
    return make(SPARSE)


@pytest.fixture(scope="module")
def biased():
    return make(BIASED)


@pytest.fixture(params=["sparse", "biased"])
def any_model(request):
    return request.getfixturevalue(request.param)


def padded(rows, sides, columns, seed=0):
    """Rows in wider arrays, with ids at the padding that no vocabulary holds; `sides`: left, right or between."""
    rng = np.random.default_rng(seed)
    tokens_BL = rng.integers(-V, 2 * V, (len(rows), columns))
    mask_BL = np.zeros((len(rows), columns), bool)
    for b, (row, side) in enumerate(zip(rows, sides, strict=True)):
        places = {"left": np.arange(columns - len(row), columns), "right": np.arange(len(row)),
                  "between": np.sort(rng.permutation(columns)[:len(row)])}[side]
        tokens_BL[b, places] = row
        mask_BL[b, places] = True
    return tokens_BL, mask_BL


def reference(model, params, rows, count, penalty):
    """Greedy decoding by full forward passes, with the repetition penalty by its definition."""
    rows = [list(row) for row in rows]
    for _ in range(count):
        # In a causal model, what stands behind a row changes nothing.
        logits_BLV = np.array(score.logits(model, params, *padded(rows, ["right"] * len(rows), CONTEXT)))
        for row, logits_LV in zip(rows, logits_BLV, strict=True):
            logits_V = logits_LV[len(row) - 1]
            for token in set(row):
                logits_V[token] *= 1 / penalty if logits_V[token] > 0 else penalty
            row.append(int(logits_V.argmax()))
    return [row[-count:] for row in rows]


@pytest.mark.parametrize("penalty", [1.0, 1.6])
def test_cached_greedy_decoding_is_the_argmax_of_full_forward_passes(any_model, penalty):
    count = CONTEXT - max(map(len, PROMPTS))  # a row may fill the context
    tokens_BN, lengths_B = generate.generate(*any_model, PROMPTS, max_new_tokens=count, repetition_penalty=penalty)
    assert tokens_BN.dtype == lengths_B.dtype == np.int32
    np.testing.assert_array_equal(lengths_B, count)
    np.testing.assert_array_equal(tokens_BN, reference(*any_model, PROMPTS, count, penalty))
    assert len(np.unique(tokens_BN)) > 4, "a model that says one thing tests nothing"


@pytest.mark.parametrize("unrolled_layers", [0, 4])
def test_a_scan_over_layers_and_layers_one_by_one_generate_the_same(any_model, unrolled_layers, monkeypatch):
    model, params = any_model
    monkeypatch.setattr(beginning, "UNROLLED_LAYERS", unrolled_layers)
    got = generate.generate(model, params, PROMPTS, max_new_tokens=6)
    np.testing.assert_array_equal(got.tokens, reference(model, params, PROMPTS, 6, 1.0))


def test_cached_logits_are_those_of_the_forward_pass(sparse):
    model, params = sparse
    lengths, known = (17, 20, 18, 15), 6
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, V, length) for length in lengths]
    tokens_BS, mask_BS = padded(rows, ["left"] * 4, CONTEXT)
    tokens_BS = np.where(mask_BS, tokens_BS, 0)
    positions_BS = prompts.count_positions(mask_BS)
    full_BSV = score.logits(model, params, tokens_BS, mask_BS)
    extend = jax.jit(cache.extend, static_argnames="model")
    memory = cache.empty(model, 4, CONTEXT)
    for begin, end in ((0, known), *((at, at + 1) for at in range(known, CONTEXT))):
        now = slice(begin, end)
        logits_BLV, memory = extend(model, params, memory, tokens_BS[:, now], positions_BS[:, now], mask_BS[:, now],
                                    begin)
        real_BL = mask_BS[:, now]
        np.testing.assert_allclose(logits_BLV[real_BL], full_BSV[:, now][real_BL], atol=1e-5)


@pytest.mark.parametrize("rule", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_prompt_yields_the_same_whatever_its_row_neighbours_and_padding(any_model, rule):
    def run(tokens, mask=None):
        return generate.generate(*any_model, tokens, mask, max_new_tokens=11, **rule)

    base = run(PROMPTS)
    others = [[20, 21], PROMPTS[1], [22] * 8, PROMPTS[3]]
    order = [3, 0, 1, 2]
    arrangements = [
        (run([PROMPTS[i] for i in order]), order, range(4)),
        (run(others), [1, 3], [1, 3]),
        (run(*padded(PROMPTS, ["left"] * 4, 7)), range(4), range(4)),
        (run(*padded(PROMPTS, ["right", "left", "between", "right"], 12)), range(4), range(4)),
        (run(*padded(PROMPTS, ["between", "right", "between", "between"], 33)), range(4), range(4)),
    ]
    for result, rows, places in arrangements:
        np.testing.assert_array_equal(result.tokens[list(places)], base.tokens[list(rows)])
        np.testing.assert_array_equal(result.lengths[list(places)], base.lengths[list(rows)])
    assert (base.tokens[0] == base.tokens[2]).all() == (not rule), "equal prompts: one argmax, but two samples"


@pytest.mark.parametrize("rule", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_yields_what_its_prompts_yield_alone(sparse, rule):
    together = generate.generate(*sparse, PROMPTS, max_new_tokens=11, **rule)
    for b in (0, 1, 3):  # prompt 2 is the second of its kind
        alone = generate.generate(*sparse, PROMPTS[b:b + 1], max_new_tokens=11, **rule)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[b])


def test_samples_follow_the_seed(sparse):
    runs = [generate.generate(*sparse, PROMPTS, max_new_tokens=11, **(SAMPLED | {"seed": seed})).tokens
            for seed in (3, 3, -4, 2**40)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert all((runs[0] != other).any(axis=1).sum() >= 3 for other in runs[2:])
    even_BN = generate.generate(*sparse, PROMPTS, max_new_tokens=11, temperature=1e6).tokens
    assert all(len(np.unique(even_N)) > 4 for even_N in even_BN), "each step draws anew"


@pytest.mark.parametrize("rule", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_stop_token_cuts_a_row_and_fills_it(sparse, rule):
    free_BN = generate.generate(*sparse, PROMPTS, max_new_tokens=12, **rule).tokens
    stops = (int(free_BN[0, 4]), int(free_BN[1, 0]))
    tokens_BN, lengths_B = generate.generate(*sparse, PROMPTS, max_new_tokens=12, stop_tokens=stops, **rule)
    for free_N, tokens_N, length in zip(free_BN, tokens_BN, lengths_B, strict=True):
        hits = np.flatnonzero(np.isin(free_N, stops))
        assert length == (hits[0] + 1 if len(hits) else 12)
        np.testing.assert_array_equal(tokens_N[:length], free_N[:length])
        np.testing.assert_array_equal(tokens_N[length:], tokens_N[length - 1])
    assert lengths_B.min() == 1 and lengths_B.max() > 1


def test_nothing_is_traced_again_and_the_loop_ends_with_the_last_row(monkeypatch):
    model = make({"every": 0})
    traces, calls = [], []
    extend = cache.extend

    def counted(*args, **kwargs):
        traces.append(1)
        jax.debug.callback(lambda: calls.append(1))
        return extend(*args, **kwargs)

    monkeypatch.setattr(cache, "extend", counted)
    base = generate.generate(*model, PROMPTS, max_new_tokens=9, **SAMPLED)
    jax.effects_barrier()
    once = len(traces)
    assert once > 0 and len(calls) == 1 + 9, "one prefill, then one call a token"
    first = set(base.tokens[:, 0].tolist())
    stopped = generate.generate(*model, PROMPTS, max_new_tokens=12, stop_tokens=first, **SAMPLED)
    jax.effects_barrier()
    assert len(calls) == 1 + 9 + 1 + 1, "all rows have stopped after one token"
    np.testing.assert_array_equal(stopped.tokens, np.repeat(base.tokens[:, :1], 12, axis=1))
    generate.generate(*model, [[1] * 17] * 4, max_new_tokens=1, temperature=1, top_k=3, top_p=0.5, seed=9)
    generate.generate(model[0].clone(), jax.tree.map(lambda a: 2 * a, model[1]), PROMPTS, max_new_tokens=np.int64(4))
    assert len(traces) == once


def test_padded_sizes_do_not_show(sparse, monkeypatch):
    rules = ({}, SAMPLED, {"temperature": 1.0, "seed": 1}, {"temperature": 2.0, "seed": 2})
    bucketed = [generate.generate(*sparse, PROMPTS, max_new_tokens=9, **rule).tokens for rule in rules]
    monkeypatch.setattr(beginning, "bucket", lambda count, most: max(count, 1))
    for rule, expected in zip(rules, bucketed, strict=True):
        np.testing.assert_array_equal(generate.generate(*sparse, PROMPTS, max_new_tokens=9, **rule).tokens, expected)


def test_a_bucket_is_enough_and_no_more_than_the_context():
    for count in range(49):
        assert count <= beginning.bucket(count, 48) <= max(16, min(48, 2 * count))


def test_a_mesh_of_all_devices_yields_the_same(sparse):
    batch = padded(PROMPTS, ["right"] * 4, CONTEXT)
    expected = generate.generate(*sparse, *batch, max_new_tokens=6, **SAMPLED)
    expected_logits = score.logits(*sparse, *batch)
    expert = 2 if jax.device_count() % 2 == 0 else 1
    with jax.set_mesh(sharding.make_mesh(config.MeshConfig(data=-1, expert=expert))):
        result = generate.generate(*sparse, *batch, max_new_tokens=6, **SAMPLED)
        logits = score.logits(*sparse, *batch)
    np.testing.assert_array_equal(result.tokens, expected.tokens)
    np.testing.assert_allclose(logits[batch[1]], expected_logits[batch[1]], atol=1e-5)


def test_padding_changes_no_score(any_model):
    model, params = any_model
    prompt = np.array([PROMPTS[3]])
    alone_LV = model.apply({"params": params["params"]}, prompt, np.arange(7)[None], np.ones((1, 7), np.int32),
                           params["router"]).logits_BLV[0]
    for seed in (0, 1):
        tokens_BL, mask_BL = padded([PROMPTS[3]] * 4, ["left", "right", "between", "between"], CONTEXT, seed)
        logits_BLV = np.asarray(score.logits(model, params, tokens_BL, mask_BL))
        assert logits_BLV.shape == (4, CONTEXT, V) and logits_BLV.dtype == np.float32
        assert np.isfinite(logits_BLV).all()
        for b in range(4):
            np.testing.assert_allclose(logits_BLV[b, mask_BL[b]], alone_LV, atol=1e-6 * np.abs(alone_LV).max())


def test_lists_of_unequal_length_are_rows_padded_on_the_right():
    expected_tokens_BL, expected_mask_BL = prompts.read(*padded(PROMPTS, ["right"] * 4, 7), V)
    tokens_BL, mask_BL = prompts.read(PROMPTS, None, V)
    np.testing.assert_array_equal(tokens_BL, expected_tokens_BL)
    np.testing.assert_array_equal(mask_BL, expected_mask_BL)


GOOD = {"tokens": [[1, 2], [3]], "mask": None}
BAD_TOKENS = [
    ({"tokens": [[1], [V]]}, f"token id {V} in row 1, column 0 .* vocabulary of {V} .*tokenizer"),
    ({"tokens": [[1, -1]]}, "token id -1 in row 0, column 1"),
    ({"tokens": [1, 2]}, "list of lists"),
    ({"tokens": np.zeros((1, 2, 3), int)}, "list of lists"),
    ({"tokens": [[0.5]]}, "integers"),
    ({"tokens": []}, "empty"),
    ({"tokens": [[1, 2]], "mask": [[True]]}, r"mask has shape \(1, 1\), but tokens \(1, 2\)"),
    ({"tokens": [[1, 2]], "mask": [[0.0, -1e9]]}, "mask must be bool"),
]
BAD_PROMPTS = [
    ({"tokens": [[1], []]}, "row 1 is empty"),
    ({"tokens": [[1, 2], [3, 4]], "mask": [[True, False], [False, False]]}, "row 1 is empty"),
    ({"tokens": [[1], [1] * 18], "max_new_tokens": 3}, "prompt of 18 tokens and max_new_tokens=3 .* context of 20"),
    ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    ({"temperature": -0.1}, "temperature=-0.1 must be at least 0"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"top_k": -1}, "top_k=-1"),
    ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
    ({"top_p": 1.01}, "top_p=1.01"),
    ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    ({"stop_tokens": [V]}, f"stop token {V} "),
]


def assert_refused(function, message):
    with pytest.raises(config.UserError, match=message) as error:
        function()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad, message", BAD_TOKENS + BAD_PROMPTS)
def test_bad_input_is_refused_in_one_line(sparse, bad, message):
    assert_refused(lambda: generate.generate(*sparse, **(GOOD | bad)), message)


@pytest.mark.parametrize("bad, message", BAD_TOKENS + [({"tokens": [[1] * 21]}, "21 tokens .* context of 20")])
def test_bad_input_is_not_scored(sparse, bad, message):
    assert_refused(lambda: score.logits(*sparse, **(GOOD | bad)), message)


@pytest.mark.parametrize("moe, message", [
    ({"router": "expert_choice", "allow_noncausal_routing": True}, "router=expert_choice .*no rule for generating"),
    ({"eval_capacity_factor": 1.0, "routing_group": "global"}, "eval_capacity_factor.*None"),
])
def test_a_model_that_cannot_decode_is_refused(sparse, moe, message):
    model = sparse[0].clone(moe=resolve(config.MoEConfig(**moe)))
    assert_refused(lambda: generate.generate(model, sparse[1], [[1]]), message)
    dense = sparse[0].clone(moe=resolve(config.MoEConfig(every=0, **moe)))
    beginning.check_decodable(dense)
