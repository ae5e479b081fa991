"""python -m moejax.hf import HF_DIR WORKDIR | export WORKDIR HF_DIR | upcycle WORKDIR NEW"""

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any, Sequence

from moejax.bounded import read_object
from moejax.config import MoEConfig, build_group, check, nearest
from moejax.exit_status import exit_status

USAGE = """
  python -m moejax.hf import HF_DIR WORKDIR     a checkpoint with config.json and *.safetensors becomes a workdir
  python -m moejax.hf export WORKDIR HF_DIR     and a workdir becomes such a checkpoint
  python -m moejax.hf upcycle WORKDIR NEW       a dense model becomes one with experts that computes the same at first

What an imported model is good for:
  python -m moejax.main --workdir=WORKDIR --mode=generate --prompt="..."
  python -m moejax.main --config=WORKDIR/config.json --workdir=runs/tuned --config.data.source="texts/*.txt"
"""


def import_checkpoint(source: Path, workdir: Path, dtype: str) -> None:
    """Makes a workdir of a checkpoint, or nothing. Raises `UserError` as `from_hf` does, or if the workdir is there."""
    check(source.is_dir(), f"{source}: no such folder; give that of a checkpoint, with config.json and *.safetensors")
    from moejax.checkpoint.made import (
        ORIGINAL,
        TOKENIZER_FILES,
        built_beside,
        check_free,
        copy_present,
        count,
        find_tokenizer,
        save_model,
    )
    from moejax.data.tokenizers import make_tokenizer
    from moejax.hf.load import read_config, read_variables
    from moejax.models import transformer
    check_free(workdir)
    family, config = read_config(source, dtype)
    tokenizer = find_tokenizer(source)
    with built_beside(workdir) as part:
        if tokenizer is not None:  # before the tensors, which take long to read
            (part / "data").mkdir()
            make_tokenizer(str(tokenizer), config.model.vocab_size, (), part / "data")
        variables = read_variables(source, family, transformer.build(config), None, progress=True)
        (part / ORIGINAL).mkdir()
        copy_present(source, part / ORIGINAL, ("config.json", *TOKENIZER_FILES))
        save_model(part, workdir, config, variables)
    print(f"{family.model_type}: {count(variables):,} parameters; {workdir}/config.json, checkpoints/ (step 0), "
          f"{ORIGINAL}/" + (", data/ (tokenizer)" if tokenizer else ""))
    if tokenizer is None:
        print(f"{source} has neither tokenizer.json nor a SentencePiece model; to train on text, set "
              "--config.data.tokenizer to one; to generate, put one there and import again")


def export_checkpoint(workdir: Path, target: Path, family: str | None, dtype: str | None, step: int | None) -> None:
    """Writes a checkpoint of a workdir for other libraries, or nothing. Raises `UserError` as `to_hf` does."""
    from moejax.checkpoint.made import check_free, find_tokenizer
    from moejax.checkpoint.origin import copy_tokenizer, origin_of, shares_tokenizer
    check_free(target)
    from moejax.evaluation.load import load
    from moejax.hf.families import FAMILIES
    from moejax.hf.save import DTYPES, to_hf
    check(family is None or family in FAMILIES, f"--family={family} must be one of {', '.join(FAMILIES)}"
          f"{nearest(family or '', list(FAMILIES))}")
    model, variables = load(workdir, step)
    check(bool(family or model.model.architecture.family), f"{workdir}: not an imported model; say what it should become "
          f"with --family, one of {', '.join(FAMILIES)}")
    original, options = origin_of(workdir), {}
    shared = original is not None and shares_tokenizer(workdir, original)
    if original is not None and (original / "config.json").is_file():
        options = read_object(original / "config.json", "check its permissions", "restore it, or delete it")
    stored = options.get("dtype") or options.get("torch_dtype")
    dtype = dtype or (stored if stored in DTYPES else "float32")
    to_hf(model, variables, target, family=family, dtype=dtype,
          options=extra(options, family or model.model.architecture.family, shared), more=partial(copy_tokenizer, workdir))
    print(f"{target}: config.json, *.safetensors ({dtype}{'' if dtype == 'float32' else '; float32 rounds nothing'})"
          + (", tokenizer" if find_tokenizer(target) else ""))


def upcycle_workdir(workdir: Path, new: Path, changes: dict[str, Any], how: dict[str, Any], seed: int) -> None:
    """Makes a workdir with experts of one with a dense model, or nothing. Raises `UserError` as `upcycle` does."""
    import jax

    from moejax.checkpoint.made import built_beside, check_free, copy_data, count, save_model
    from moejax.checkpoint.workdir import read_config
    from moejax.evaluation.load import load
    from moejax.models import transformer
    from moejax.models.upcycle import Upcycling, upcycle
    check_free(new)
    model, variables = load(workdir)
    moe = build_group(MoEConfig, {name: value for name, value in changes.items() if value is not None}, "config.moe")
    sparse, upcycled = upcycle(model, variables, moe, Upcycling(**how), jax.random.key(seed))
    design = dataclasses.replace(sparse.model.architecture, family="")
    config = transformer.resolve(dataclasses.replace(
        read_config(workdir), model=dataclasses.replace(sparse.model, architecture=design), moe=sparse.moe))
    with built_beside(new) as part:
        copy_data(workdir, part)
        save_model(part, new, config, upcycled)
    print(f"{new}: {sparse.moe.num_experts} experts of {sparse.moe.ffn} units a layer; {count(variables):,} parameters "
          f"became {count(upcycled):,}")


def extra(options: dict[str, Any], family: str, shared: bool) -> dict[str, Any]:
    """Options of the original config.json that say nothing of the model's computation.

    Ids of special tokens go with the tokenizer (`shared`), into another family too; the rest stays with its family.
    """
    from moejax.hf.families import FAMILIES
    from moejax.hf.family import WITHOUT_EFFECT
    same = options.get("model_type") == FAMILIES[family].model_type
    return {name: value for name, value in options.items() if name in WITHOUT_EFFECT and (
        shared if name in SPECIAL else same and (shared or not name.endswith("token_id")))}


SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status; see `exit_status`."""
    parser = argparse.ArgumentParser(prog="python -m moejax.hf", description="Open models in and out.", epilog=USAGE,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("import", help="a checkpoint becomes a workdir")
    one.add_argument("source", metavar="HF_DIR", type=Path)
    one.add_argument("workdir", metavar="WORKDIR", type=Path)
    one.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"),
                     help="compute type (default: float32); parameters are float32")
    other = commands.add_parser("export", help="a workdir becomes a checkpoint")
    other.add_argument("workdir", metavar="WORKDIR", type=Path)
    other.add_argument("target", metavar="HF_DIR", type=Path)
    other.add_argument("--family", help="model_type to write (default: that of the imported model)")
    other.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the tensors (default: as imported)")
    other.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    third = commands.add_parser("upcycle", help="a dense model becomes one with experts")
    third.add_argument("workdir", metavar="WORKDIR", type=Path)
    third.add_argument("new", metavar="NEW", type=Path)
    third.add_argument("--experts", type=int, default=8, help="experts in a layer (default: 8)")
    third.add_argument("--choices", type=int, default=2, help="experts a token (default: 2)")
    third.add_argument("--router", default="topk", help="a name of python -m moejax.moe.routing (default: topk)")
    third.add_argument("--every", type=int, default=1, help="every n-th block becomes sparse (default: 1)")
    third.add_argument("--shared", type=int, help="hidden units of a layer that become a shared expert (default: none)")
    third.add_argument("--granularity", type=int, default=1, help="shards into which a layer is cut (default: 1)")
    third.add_argument("--drop", type=float, default=0.0, help="share of each expert's units to draw anew (default: 0)")
    third.add_argument("--noise", type=float, default=0.0, help="noise over the weights' deviation (default: 0)")
    third.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)

    def work() -> None:
        if given.command == "import":
            import_checkpoint(given.source, given.workdir, given.dtype)
        elif given.command == "upcycle":
            changes = {"num_experts": given.experts, "experts_per_token": given.choices, "router": given.router,
                       "every": given.every, "shared_ffn": given.shared, "renormalize": True,
                       "shared_experts": 1 if given.shared else None}
            how = {"granularity": given.granularity, "drop": given.drop, "noise": given.noise}
            upcycle_workdir(given.workdir, given.new, changes, how, given.seed)
        else:
            export_checkpoint(given.workdir, given.target, given.family, given.dtype, given.step)
    return exit_status(work, "nothing was written")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
