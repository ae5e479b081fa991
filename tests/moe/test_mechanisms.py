"""What balancing and routing are for, on a task that needs experts: each kind of token has its own function to learn.

Tokens come in kinds, some more frequent than others: a vector around the kind's centre, ids of its own, and a target that
is a random linear function, another for each kind. A layer of experts learns it in a few hundred steps.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from moe_reference import context, initial_state

from moejax.config import MoEConfig
from moejax.moe import routing
from moejax.moe.layer import mixture
from moejax.moe.routing import get_router
from moejax.moe.types import Totals

KINDS, IDS, D, E, F, T, STEPS = 12, 5, 16, 6, 8, 256, 400

RNG = np.random.default_rng(0)
CENTRE_KD, TASK_KDD = 1.5 * RNG.normal(size=(KINDS, D)), RNG.normal(size=(KINDS, D, D)) * D**-0.5
SHARE_K = 1 / np.arange(1, KINDS + 1)**0.5
SHARE_K /= SHARE_K.sum()


def draw(key):
    """A batch: x_TD, ids_T and targets [T, D]."""
    kind_key, id_key, noise_key = jax.random.split(key, 3)
    kind_T = jax.random.choice(kind_key, KINDS, (T,), p=jnp.asarray(SHARE_K))
    ids_T = kind_T * IDS + jax.random.randint(id_key, (T,), 0, IDS)
    x_TD = jnp.asarray(CENTRE_KD, jnp.float32)[kind_T] + jax.random.normal(noise_key, (T, D))
    return x_TD, ids_T, jnp.einsum("td,tdo->to", x_TD, jnp.asarray(TASK_KDD, jnp.float32)[kind_T])


@functools.partial(jax.jit, static_argnums=0)
def train(config, rate):
    """Squared error by step, mean load of each expert over the last quarter, and the largest final logit."""
    router = get_router(config.router)
    keys = jax.random.split(jax.random.key(1), 4)
    own = router.parameters(config, D)
    params = {"router": {name: p.mean + p.stddev * jax.random.normal(jax.random.fold_in(keys[0], i), p.shape)
                         for i, (name, p) in enumerate(own.items())},
              "w_in": jax.random.normal(keys[1], (E, D, 2, F)) * D**-0.5, "w_out": jax.random.normal(keys[2], (E, F, D))}
    optimizer = optax.adam(rate)

    def loss(params, state, x_TD, ids_T, y_TD, key):
        where = context(jnp.ones(T, bool), ids_T, sequences=1, key=key, totals=Totals(jnp.float32(T), jnp.float32(1)))
        got_TD, record, *_ = mixture(config, params["router"], state, params["w_in"], params["w_out"], x_TD, where, None)
        error = jnp.mean((got_TD - y_TD)**2)
        weights = router.loss_weights(config)
        total = error + sum(weights[name] * value for name, value in record.losses.items())
        return total, (error, record, router.update(config, state, record.statistics))

    def step(carry, key):
        params, state, memory = carry
        batch_key, noise_key = jax.random.split(key)
        gradients, (error, record, state) = jax.grad(loss, has_aux=True)(params, state, *draw(batch_key), noise_key)
        updates, memory = optimizer.update(gradients, memory)
        return (optax.apply_updates(params, updates), state, memory), (error, record.load.assigned_E)

    start = params, initial_state(config), optimizer.init(params)
    (params, *_), (error_S, load_SE) = jax.lax.scan(step, start, jax.random.split(keys[3], STEPS))
    x_TD, *_ = draw(jax.random.key(2))
    largest = jnp.max(jnp.abs(x_TD @ params["router"]["w_DE"])) if "w_DE" in params["router"] else 0.0
    return error_S, jnp.mean(load_SE[-STEPS // 4:], axis=0), largest


def result(name, rate=0.01, **changes):
    """Final error, MaxVio, largest logit."""
    config = routing.resolve(MoEConfig(**({"router": name, "num_experts": E, "experts_per_token": 1, "renormalize": False,
                                           "balance_weight": 0.0, "z_weight": 0.0, "dispatch": "dense",
                                           "routing_group": "global"} | changes)))
    error_S, load_E, largest = train(config, rate)
    return float(error_S[-STEPS // 4:].mean()), float(load_E.max() / load_E.mean() - 1), float(largest)


TWO = dict(experts_per_token=2, renormalize=True)


@pytest.mark.slow
def test_learned_routing_beats_hash_beats_random():
    """At equal operations: only the choice of the one expert differs."""
    (learned, *_), (hashed, *_), (chance, *_) = result("topk"), result("hash"), result("random")
    assert learned < 0.8 * hashed and hashed < 0.9 * chance


def test_the_load_balancing_loss_lowers_max_vio():
    (_, free, _), (_, balanced, _) = result("topk", **TWO), result("topk", balance_weight=0.5, **TWO)
    assert balanced < 0.6 * free


@pytest.mark.slow
@pytest.mark.parametrize("score, rule", [
    ("sigmoid", "sign"), pytest.param("softmax", "proportional", marks=pytest.mark.slow)])
def test_loss_free_bias_lowers_max_vio_and_leaves_the_error_within_one_percent(score, rule):
    free, unbalanced, _ = result("topk", score=score, **TWO)
    error, balanced, _ = result("topk", score=score, bias_rate=0.01, bias_rule=rule, **TWO)
    assert balanced < 0.2 * unbalanced and error < 1.01 * free


@pytest.mark.slow
def test_the_z_loss_brings_large_logits_down_at_a_high_learning_rate():
    """Ten times the usual initial size and the learning rate of the other tests."""
    (*_, free), (*_, bound) = (result("topk", rate=0.1, router_init=10.0, z_weight=weight, **TWO) for weight in (0.0, 0.3))
    assert bound < free / 10
