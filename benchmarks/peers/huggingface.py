"""The train step, or cached generation, of Hugging Face's Mixtral in the shape of experiments/bench_mixtral_small.py.

    python -m venv peer && peer/bin/pip install torch transformers
    peer/bin/python benchmarks/peers/huggingface.py --experts=grouped_mm --compile

The last line is a JSON object with `tokens_per_second`. It runs in an environment of its own and needs nothing of moejax.
"""

import argparse
import json
import statistics
import time

import torch
import transformers


def build(experts: str) -> torch.nn.Module:
    """Mixtral with 4 layers of width 256, 8 experts of width 512, top-2, vocabulary 8192, random float32 weights."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=64, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=1024,
        tie_word_embeddings=False)
    model = transformers.MixtralForCausalLM(config)
    model.set_experts_implementation(experts)
    return model


def train_seconds(model: torch.nn.Module, compiled: bool, steps: int) -> float:
    """Median seconds of a step on 8 sequences of 256 tokens: forward, backward, clipping, AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    forward = torch.compile(model) if compiled else model
    tokens = torch.randint(0, 8192, (8, 256))
    seconds = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        forward(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def generate_seconds(model: torch.nn.Module, steps: int) -> float:
    """Median seconds to continue 8 prompts of 32 tokens by 64 tokens, greedily and with the cache."""
    model.eval()
    tokens = torch.randint(0, 8192, (8, 32))
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        with torch.no_grad():
            out = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=64,
                                 min_new_tokens=64, do_sample=False, pad_token_id=0)
        seconds.append(time.perf_counter() - start)
        assert out.shape == (8, 96)
    return statistics.median(seconds[1:])


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", default="grouped_mm", choices=["grouped_mm", "eager", "batched_mm"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--generate", action="store_true", help="time generation rather than the train step")
    parser.add_argument("--steps", type=int, default=9)
    options = parser.parse_args()
    model = build(options.experts)
    tokens = 8 * 64 if options.generate else 8 * 256
    seconds = (generate_seconds(model, options.steps) if options.generate
               else train_seconds(model, options.compile, options.steps))
    print(json.dumps({"tokens_per_second": tokens / seconds, "seconds": seconds, "experts": options.experts,
                      "compile": options.compile, "torch": torch.__version__,
                      "transformers": transformers.__version__, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
