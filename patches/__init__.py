"""The SGLang side of deepprune: the only code that names SGLang. One seam a file, one table.

`register` is the entry point of the group `sglang.srt.plugins`. SGLang calls it in each process
that loads plugins, and catches and only logs what it raises; so nothing is checked here. It hooks
the parser and nothing else: every other seam is installed once a config says enabled
(`server_args.activate`), where an exception stops the start.
"""

from __future__ import annotations


def register() -> None:
    """Hook SGLang's argument parser, so that `--enable-deepprune` exists."""
    from sglang_deepprune.patches import seams, server_args

    seams.register(
        seams.PARSER,
        {
            "ServerArgs.add_cli_args": server_args.add_cli_args,
            "ServerArgs.from_cli_args": server_args.from_cli_args,
        },
    )
    server_args.hook_engine()
