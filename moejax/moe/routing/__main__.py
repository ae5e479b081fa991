"""Prints the table of all routers, or all about one of them: python -m moejax.moe.routing [NAME]."""

import dataclasses
import sys
from typing import Sequence

from moejax.config import ROUTED, MoEConfig, UserError
from moejax.moe.routing import ROUTERS, Router, get_router, resolve


def yes(value: bool) -> str:
    """A cell of the table."""
    return "yes" if value else ""


def link(router: Router) -> str:
    """The paper, with its address on arXiv if it has one."""
    return f"[{router.paper}](https://arxiv.org/abs/{router.arxiv})" if router.arxiv else router.paper


def table() -> str:
    """The Markdown table of all routers."""
    rows = ["| router | paper | what it does | causal | experts a token | ids | state | evaluation |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for name, router in ROUTERS.items():
        config = resolve(MoEConfig(router=name))
        count = "varies" if router.variable else str(config.experts_per_token)
        state = bool(router.initial_state(config, 2))
        rows.append(f"| `{name}` | {link(router)} | {router.rule} | {yes(router.causal)} | {count} | "
                    f"{yes(router.needs_token_ids)} | {yes(state)} | {router.evaluation or 'the same'} |")
    return "\n".join(rows)


def describe(name: str) -> str:
    """A router's metadata, the keys of `config.moe` that it sets, and its options, line by line."""
    router = get_router(name)
    config = resolve(MoEConfig(router=name))
    lines = [f"{name}: {router.rule}", f"paper: {router.paper} {router.arxiv}".rstrip(),
             f"causal: {'yes' if router.causal else 'no'}; evaluation: {router.evaluation or 'the same rule'}; "
             f"generates: {'yes' if router.generates else 'no'}",
             "keys of config.moe that are left to the router, as it sets them:"]
    lines += [f"  {key} = {getattr(config, key)!r}" for key in ROUTED]
    options = dataclasses.fields(config.options)
    lines.append("options, as --config.moe.options.NAME=VALUE:" if options else "options: none")
    for option in options:
        choices = ", ".join(map(str, option.metadata["choices"]))
        lines.append(f"  {option.name} = {getattr(config.options, option.name)!r}  {option.metadata['help']}"
                     + (f" ({choices})" if choices else ""))
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 0, or 2 if there is no such router."""
    try:
        print(describe(arguments[0]) if arguments else table())
    except UserError as error:
        print(f"moejax: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
