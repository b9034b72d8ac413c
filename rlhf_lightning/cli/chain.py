"""The `chain` subcommand: options of `pipelines.chain`."""

import argparse
from collections.abc import Callable, Sequence

from rlhf_lightning.cli.imports import only_from, split_allowed
from rlhf_lightning.cli.secrets import remedy, secret_in
from rlhf_lightning.cli.sources import ConfigSources
from rlhf_lightning.core import trust
from rlhf_lightning.core.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"chain: {message} (rlhf-lightning chain --help)")


def chain_command(args: Sequence[str], *, launch: Callable[[list[str]], int], debug: bool = False) -> int:
    """Runs `rlhf-lightning chain ARGS`.

    Args:
        args: options after the subcommand.
        launch: runs `fit` command lines of the stages.
        debug: whether their errors show tracebacks.
    """
    parser = _Parser(
        prog="rlhf-lightning chain",
        description="Run stage after stage from one YAML. A stage that is finished, and whose config, inputs and "
        "outputs are as they were, is skipped; one that broke goes on from its last checkpoint.",
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", required=True, metavar="FILE", help="the chain's YAML")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable of the chain (seed=2), run_dir, or an option of a stage (sft.trainer.max_epochs=2)",
    )
    parser.add_argument("--from", dest="start_at", metavar="STAGE", help="run this stage and all later ones anew")
    parser.add_argument("--force", action="store_true", help="run all stages anew")
    args, named = split_allowed(args)
    options = parser.parse_args(args)
    for setting in options.set:
        if (secret := secret_in(setting)) is not None:
            raise UserError(f"--set {setting.partition('=')[0]}: {remedy(secret[0])}")
    with only_from(named):
        return _run(options, [f"{trust.FLAG}={name}" for name in named], launch, debug)


def _run(options: argparse.Namespace, allowed: Sequence[str], launch: Callable[[list[str]], int], debug: bool) -> int:

    from rlhf_lightning.cli.app import check_command_line
    from rlhf_lightning.pipelines.chain import run_chain
    from rlhf_lightning.pipelines.chain_spec import read_chain

    def check_yaml(file: str) -> None:
        ConfigSources.of_command_line(["--config", file]).check()

    spec = read_chain(options.config, options.set, check_yaml)

    def launch_stage(command: list[str]) -> int:
        return launch([*command, "--debug"] if debug else command)

    return run_chain(
        spec,
        launch_stage,
        check=check_command_line,
        start_at=options.start_at,
        force=options.force,
        options=allowed,
    )
