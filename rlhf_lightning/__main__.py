"""Entry point of `rlhf-lightning` and `python -m rlhf_lightning`: picks the subcommand; errors become exit codes."""

import os
import sys
import traceback
from collections.abc import Sequence

from rlhf_lightning import __version__
from rlhf_lightning.cli import stacks
from rlhf_lightning.cli.first_error import claim, code_of_another, forget_job
from rlhf_lightning.core.errors import Stopped, UserError

ALLOW_FLAGS = ("--allow_module", "--allow-module")

SUBCOMMANDS = {
    "fit": "train a stage: SFT, reward model, DPO, KTO, PPO, GRPO, online DPO, or your own",
    "validate": "run the validation set once",
    "test": "run the test set once",
    "predict": "run the prediction loop once",
    "generate": "answer prompts with the policy of a config",
    "plan": "predict the memory of a config's phases, without its weights, and say what fits",
    "preview": "print a few records as the stage will see them, every token coloured by what it counts for",
    "export": "write a checkpoint as a Hugging Face folder",
    "chain": "run stage after stage from one YAML; skip what is finished, resume what is broken",
}

OVERVIEW = """usage: rlhf-lightning [--version] [--debug] SUBCOMMAND [options]

{table}

Each has its own help:      rlhf-lightning fit --help
Options of a stage:         rlhf-lightning fit --model.help SFTModule
A config with every key:    rlhf-lightning fit --config configs/sft.yaml --print_config
Code of your own:           --allow_module mine (a module, my_rewards.py, or the folder of a model)
Show tracebacks of errors:  --debug
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line.

    Args:
        argv: the arguments after the program's name; default: those of this process.
    Returns:
        The exit code: 0 done, 2 a mistake of the user (one message on stderr), 130 interrupted, 143 terminated.
    """
    stacks.enable()
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    _set_import_path(args, own_process=argv is None)
    try:
        return _dispatch(args, debug)
    except UserError as error:
        return _report(error, debug)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Stopped as stop:
        if claim(int(stop.code)):
            print(stop, file=sys.stderr)
        return int(stop.code)
    except SystemExit as stop:
        if type(stop).__name__ == "SIGTERMException":  # of Lightning, which may not be imported; its code would be 0
            print("stopped by SIGTERM; the same command with --resume auto goes on", file=sys.stderr)
            return 143
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C into exit(1)
            return 130
        if isinstance(stop.__context__, UserError):
            return _report(stop.__context__, debug)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if not debug and (said := _out_of_memory(error)):
            return _report(UserError(said), debug)
        stacks.ask_the_first(error)
        code = code_of_another()
        if code is None or debug:
            raise
        return code  # what failed here is the connection to a process that has said why it ended
    finally:
        forget_job()


def _set_import_path(args: Sequence[str], own_process: bool) -> None:
    """Modules in the working directory are imported only if the user names some, and installed ones come first.

    `python -m` puts the directory first: a file there, named as a package is, would be taken for it.
    """
    here = os.getcwd()
    if own_process and sys.path[:1] in ([here], [""]):
        del sys.path[0]
    if here not in sys.path and any(arg.partition("=")[0] in ALLOW_FLAGS for arg in args):
        sys.path.append(here)


def _report(error: UserError, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    elif claim(2):
        print(f"error: {error}", file=sys.stderr)
    return 2


def _out_of_memory(error: Exception) -> str | None:
    """What to say where memory ran out in a place that cannot go on in smaller pieces."""
    if "rlhf_lightning.stages" not in sys.modules:
        return None
    from rlhf_lightning.stages.splitting import is_out_of_memory

    if not is_out_of_memory(error):
        return None
    return (
        f"out of memory: {str(error).splitlines()[0]}: lower data.batch_size or data.eval_batch_size (raise "
        "trainer.accumulate_grad_batches for the same loss); rlhf-lightning plan says what fits"
    )


def _dispatch(args: list[str], debug: bool) -> int:
    if not args or args[0] in ("-h", "--help"):
        width = max(map(len, SUBCOMMANDS)) + 2
        print(OVERVIEW.format(table="\n".join(f"  {name:<{width}}{text}" for name, text in SUBCOMMANDS.items())))
        return 0
    if args[0] == "--version":
        print(f"rlhf-lightning {__version__}")
        return 0
    if args[0] not in SUBCOMMANDS:
        from difflib import get_close_matches

        near = get_close_matches(args[0], SUBCOMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(SUBCOMMANDS)}"
        raise UserError(f"{args[0]!r} is not a subcommand; {hint} (the subcommand comes first, its options after it)")
    if args[0] == "chain":
        from rlhf_lightning.cli.chain import chain_command

        return chain_command(args[1:], launch=main, debug=debug)
    from rlhf_lightning.cli.app import RLHFCLI

    RLHFCLI(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
