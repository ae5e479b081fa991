"""Named rules of the top-k family: what each paper sets. Sizes (E, K, F) stay the user's unless the rule fixes them."""

import dataclasses
from typing import Any, Mapping

from moejax.moe.routing.base import Router
from moejax.moe.routing.topk import TOPK, Options

# Capacity factors here are of the pairs, K * T / E; a paper's factor of the tokens, T / E, is divided by its K.
UNNORMALISED = {"renormalize": False}
NO_LOSSES = {"balance_weight": 0.0, "z_weight": 0.0}


def preset(paper: str, arxiv: str, rule: str, defaults: Mapping[str, Any], **options: Any) -> Router:
    """The top-k router with other defaults."""
    return TOPK._replace(paper=paper, arxiv=arxiv, rule=rule, defaults=defaults,
                         options=dataclasses.replace(Options(), **options))


SWITCH = preset(
    "Switch", "2101.03961", "the best expert, weighted by its probability; capacity",
    UNNORMALISED | {"experts_per_token": 1, "jitter": 0.01, "router_init": 0.1**0.5, "balance_weight": 0.01,
                    "z_weight": 0.0, "capacity_factor": 1.25, "eval_capacity_factor": 2.0})
ST_MOE = preset(
    "ST-MoE", "2202.08906", "top-2 with router z-loss; capacity, first choices first",
    {"balance_weight": 0.01, "z_weight": 0.001, "capacity_factor": 0.625, "eval_capacity_factor": 1.0,
     "drop_policy": "choice_major"})
MIXTRAL = preset(
    "Mixtral", "2401.04088", "softmax over the top 2", {"balance_weight": 0.001, "z_weight": 0.0})
OLMOE = preset(
    "OLMoE", "2409.02060", "top-k of softmax, not renormalised", UNNORMALISED | {"balance_weight": 0.01,
                                                                                "z_weight": 0.001})
DEEPSEEK_MOE = preset(
    "DeepSeekMoE", "2401.06066", "many small experts, not renormalised, beside a shared one",
    UNNORMALISED | {"shared_experts": 1, "balance_weight": 0.01, "z_weight": 0.0})
DEEPSEEK_V2 = preset(
    "DeepSeek-V2", "2405.04434", "experts of 3 of 8 groups, those with the largest scores; three balance losses",
    UNNORMALISED | {"shared_experts": 2, "balance_weight": 0.003, "balance_scope": "sequence", "z_weight": 0.0},
    groups=8, kept_groups=3, group_balance_weight=0.05, communication_weight=0.02)
DEEPSEEK_V3 = preset(
    "DeepSeek-V3", "2412.19437", "sigmoid scores, biased choice within 4 of 8 groups, small sequence-wise loss",
    {"score": "sigmoid", "route_scale": 2.5, "shared_experts": 1, "bias_rate": 0.001, "balance_weight": 1e-4,
     "balance_scope": "sequence", "z_weight": 0.0}, groups=8, kept_groups=4, group_score="top2", unbiased_balance=True)
LOSS_FREE = preset(
    "Loss-free balancing", "2408.15664", "sigmoid scores, choice biased against the load",
    NO_LOSSES | {"score": "sigmoid", "bias_rate": 0.001})
LOSS_FREE_SOFTMAX = preset(
    "Loss-free balancing", "2408.15664", "the same with softmax scores, bias in proportion to the load error",
    NO_LOSSES | {"bias_rate": 0.001, "bias_rule": "proportional"})
QWEN_GLOBAL = preset(
    "Global-batch balance", "2501.11873", "top-k; load-balancing loss over the whole batch",
    {"balance_weight": 0.01, "balance_scope": "global", "z_weight": 0.0})
LLAMA4 = preset(
    "Llama 4", "", "the best expert; its sigmoid weight multiplies its input; one shared expert",
    UNNORMALISED | {"experts_per_token": 1, "score": "sigmoid", "shared_experts": 1, "balance_weight": 0.001,
                    "z_weight": 0.0}, gate="input")
LATENT_MOE = preset(
    "LatentMoE", "2601.18089", "top-k of experts that work in a space of a quarter of the width", {"latent_divisor": 4})
PR_MOE = preset(
    "PR-MoE residual", "2201.05596", "the best expert beside a dense layer, mixed by a learned softmax",
    UNNORMALISED | {"experts_per_token": 1, "shared_experts": 1, "shared_gate": "softmax", "balance_weight": 0.01,
                    "z_weight": 0.0, "capacity_factor": 1.0, "eval_capacity_factor": 2.0})
