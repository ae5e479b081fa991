"""The causality audit: through a whole decoder, a router looks ahead exactly if it says so."""

import jax
import jax.numpy as jnp
import pytest
from tiny import tiny_batch, tiny_config, tiny_model

from moejax.evaluation.causality import leak
from moejax.moe.routing import ROUTERS

OPTIONS = {"lory": {"segment": 2}, "token_rounding": {"tile": 8}, "mixture_of_depths": {"share": 0.3}}
FAST = ("topk", "mixture_of_depths")
"""Other routers are audited with `--slow`; their layers alone are in tests/moe/test_routers.py."""


def audit(batch, **moe):
    """The largest change of a loss in training and in evaluation."""
    config = tiny_config(model__layers=2, moe__first_dense=0, moe__num_experts=8, moe__experts_per_token="auto",
                         moe__allow_noncausal_routing=True, **{f"moe__{name}": value for name, value in moe.items()})
    model, params, state = tiny_model(config)
    variables = {"params": params, "router": state}
    return [float(jnp.abs(leak(model, variables, batch, train)).max()) for train in (True, False)]


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in ROUTERS])
def test_the_loss_of_a_token_changes_with_later_tokens_exactly_if_the_router_says_so(name):
    batch = jax.tree.map(jnp.asarray, tiny_batch(tiny_config(), padded=1))
    dropless = {"capacity_factor": None, "eval_capacity_factor": None}
    router = ROUTERS[name]
    train, evaluation = audit(batch, router=name, options=OPTIONS.get(name), **dropless)
    assert train < 1e-6 if router.causal else train > 1e-4
    assert evaluation < 1e-6 if router.causal or router.generates else evaluation > 1e-4


@pytest.mark.parametrize("policy, ahead", [("token_major", False), ("choice_major", True)])
def test_a_capacity_lets_later_tokens_displace_earlier_ones_unless_it_goes_by_tokens(policy, ahead):
    batch = jax.tree.map(jnp.asarray, tiny_batch(tiny_config(), padded=0))
    changes = audit(batch, router="topk", capacity_factor=0.5, eval_capacity_factor=0.5, drop_policy=policy)
    assert all(change > 1e-4 for change in changes) if ahead else max(changes) < 1e-6
