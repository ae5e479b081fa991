"""One sparse layer in PyTorch on a GPU, forward and backward in bfloat16: `grouped_mm` around a sort, and ScatterMoE.

    peer/bin/python benchmarks/peers/torch_layer.py                             # OLMoE's layer, as benchmarks/layer.py
    PYTHONPATH=scattermoe peer/bin/python benchmarks/peers/torch_layer.py       # with a checkout of shawntan/scattermoe

The router, its softmax and the K largest weights are included; losses are not. It needs torch 2.10 or newer and nothing of
moejax. The last line is a JSON object.
"""

import argparse
import json
import statistics

import torch
import torch.nn.functional as F


def route(x_TD, router_DE, choices):
    """The weights and the experts of each token."""
    probability_TE = torch.softmax((x_TD @ router_DE).float(), dim=-1)
    weight_TK, expert_TK = torch.topk(probability_TE, choices)
    return (weight_TK / weight_TK.sum(-1, keepdim=True)).to(x_TD.dtype), expert_TK


def grouped_layer(x_TD, router_DE, w_in_EDH, w_out_EFD, choices):
    """Tokens sorted by expert, two grouped products, each token's rows gathered back and summed."""
    weight_TK, expert_TK = route(x_TD, router_DE, choices)
    expert_N, order_N = torch.sort(expert_TK.flatten(), stable=True)
    back_N = torch.empty_like(order_N)
    back_N[order_N] = torch.arange(len(order_N), device=x_TD.device)
    end_E = torch.searchsorted(expert_N, torch.arange(len(w_in_EDH), device=x_TD.device), right=True).to(torch.int32)
    gate, up = F.grouped_mm(x_TD[order_N // choices], w_in_EDH, offs=end_E).chunk(2, dim=-1)
    y_ND = F.grouped_mm(F.silu(gate) * up, w_out_EFD, offs=end_E)
    return (y_ND[back_N].view(*weight_TK.shape, -1) * weight_TK[..., None]).sum(1)


def scatter_layer(experts, router_DE, choices):
    """ScatterMoE's gated experts behind the same router."""
    return lambda x_TD: experts(x_TD, *route(x_TD, router_DE, choices))


def main():
    """Prints a line for each variant and a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"tokens": 32768, "width": 2048, "hidden": 1024, "experts": 64, "choices": 8, "rounds": 9}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.manual_seed(0)
    T, D, hidden, E, K = (getattr(options, n) for n in ("tokens", "width", "hidden", "experts", "choices"))

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, device="cuda") * scale).to(torch.bfloat16).requires_grad_()

    x_TD, dy_TD, router_DE = draw(T, D), draw(T, D).detach(), draw(D, E, scale=D**-0.5)
    w_in, w_out = draw(E, D, 2 * hidden, scale=D**-0.5), draw(E, hidden, D, scale=hidden**-0.5)
    grouped = lambda: grouped_layer(x_TD, router_DE, w_in, w_out, K)  # noqa: E731
    compiled = torch.compile(grouped_layer)
    variants = {"grouped_mm": (grouped, (x_TD, router_DE, w_in, w_out)),
                "grouped_mm, compiled": (lambda: compiled(x_TD, router_DE, w_in, w_out, K), (x_TD, router_DE, w_in, w_out))}
    try:
        from scattermoe.mlp import GLUMLP
    except ImportError as error:
        print(f"no ScatterMoE: {error}")
    else:
        experts = GLUMLP(input_size=D, hidden_size=hidden, num_experts=E, top_k=K, activation=torch.nn.SiLU())
        experts = experts.to("cuda", torch.bfloat16)
        layer = scatter_layer(experts, router_DE, K)
        variants["ScatterMoE"] = (lambda: layer(x_TD), (x_TD, router_DE, *experts.parameters()))

    def run(forward, leaves):
        return torch.autograd.grad(forward(), leaves, dy_TD)

    failed, milliseconds = {}, {name: [] for name in variants}
    for number in range(options.rounds + 3):
        for name, (forward, leaves) in variants.items():
            if name in failed:
                continue
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            try:
                run(forward, leaves)
            except Exception as error:  # a peer that does not run is a result, too
                failed[name] = f"{type(error).__name__}: {error}"[:500]
                print(f"{name}: {failed[name]}")
                continue
            end.record()
            torch.cuda.synchronize()
            if number >= 3:
                milliseconds[name].append(begin.elapsed_time(end))
    flops = 18 * T * K * D * hidden
    results = [{"variant": name, "ms": statistics.median(taken), "tflops": flops / statistics.median(taken) / 1e9}
               for name, taken in milliseconds.items() if taken]
    for result in results:
        print(f"{result['variant']:24} {result['ms']:8.2f} ms {result['tflops']:7.1f} TFLOP/s")
    print(json.dumps({"benchmark": "torch_layer", "results": results, "failed": failed, "torch": torch.__version__,
                      "device": torch.cuda.get_device_name(), **vars(options)}))


if __name__ == "__main__":
    main()
