"""Names of models: a folder of ours, or an id on a hub."""

from pathlib import Path

from rlhf_lightning.core.errors import UserError


def resolve_path(path: str, what: str = "model") -> str:
    """A folder that exists, or a name that can only be a hub id; a folder that is missing is the user's mistake.

    Args:
        path: folder or hub id, as the user wrote it.
        what: what the message calls it.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.is_file():
        raise UserError(f"{what} {path!r} is a file: name the folder that holds it")
    if looks_like_a_path(path):
        raise UserError(
            f"{what} folder {path!r} does not exist (looked for {folder.absolute()}): "
            "has the stage that writes it run? A hub id has the form name or owner/name"
        )
    return path


def looks_like_a_path(path: str) -> bool:
    """Whether a name without a folder behind it was meant as a folder and not as owner/name on a hub."""
    parts = Path(path).parts
    return (
        path.startswith((".", "/", "~"))
        or "\\" in path
        or path.endswith("/")
        or len(parts) > 2
        or (len(parts) == 2 and Path(parts[0]).is_dir())
    )


def check_model_folder(path: str) -> None:
    """A local folder must hold a config and weights that are plain numbers; pickles run code when they are opened."""
    folder = Path(path)
    if not folder.is_dir():
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"{path!r} holds no config.json: it is not a Hugging Face model folder")
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{path!r} holds its weights as a pickle ({pickles[0]}), which can run code when opened: convert them to "
            "safetensors once, with a transformers that you trust: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )
    raise UserError(f"{path!r} holds no weights (*.safetensors)")
