"""The list of modules that a config may name, on the command line and in the parser that imports them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jsonargparse import set_parsing_settings
from jsonargparse._common import parsing_settings

from rlhf_lightning.core import trust
from rlhf_lightning.core.errors import UserError

FLAGS = (trust.FLAG, trust.FLAG.replace("_", "-"))


def split_allowed(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line without its `--allow_module NAME`, and the names.

    Args:
        args: options; a name may hold several, separated by commas.
    """
    rest: list[str] = []
    named: list[str] = []
    words = iter(args)
    for word in words:
        option, equals, value = word.partition("=")
        if option not in FLAGS:
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value or value.startswith("-"):
            raise UserError(f"{option} needs a name: a module (mine), a file (my_rewards.py) or a model's folder")
        named += [name.strip() for name in value.split(",") if name.strip()]
    return rest, named


@contextmanager
def only_from(named: Sequence[str]) -> Iterator[None]:
    """While inside, neither we nor jsonargparse import for a config what is not on the list.

    Args:
        named: what the user allows beside `trust.FAMILY`.
    """
    with trust.only_from(named):
        before = dict(parsing_settings)
        # an option of type Any must not build whatever class its value names; what is named is checked before it is
        # imported, and by the name under which it was defined after
        set_parsing_settings(
            instantiate_subclass_spec_in_any=False,
            config_read_mode_urls_enabled=False,
            config_read_mode_fsspec_enabled=False,
            import_path_denylist=["*", *trust.DENIED],
            import_path_allowlist=[*trust.FAMILY, *trust.PLAIN, *trust.named_modules()],
        )
        try:
            yield
        finally:
            set_parsing_settings(config_read_mode_fsspec_enabled=True)  # as Lightning's own command line wants it
            parsing_settings.clear()
            parsing_settings.update(before)
