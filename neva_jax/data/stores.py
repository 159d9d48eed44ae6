"""Where the images of a source lie: found by the names that rows give, and never outside of it."""

from pathlib import Path

from neva_jax.data.rows import BadRow


def find_image(folder: str | Path | None, name: str, field: str = "image") -> Path:
    """The file `name` inside `folder`; `field` stands in messages.

    Raises:
      BadRow: no folder is given, the file is missing or no regular file, or it lies outside the folder.
    """
    path = _find(folder, name, field)
    if not path.is_file():
        raise BadRow(f"field {field}: {name} in {folder} is no regular file")
    return path


def find_frames(folder: str | Path | None, name: str) -> list[Path]:
    """The frames of the video `name` inside `folder`: a folder's files, sorted by name; hidden ones do not count.

    Raises:
      BadRow: as `find_image`, or it is no folder, or one without files.
    """
    path = _find(folder, name, "video")
    if not path.is_dir():
        raise BadRow(f"field video: {name} in {folder} is no folder; a video is given as a folder of its frames")
    frames = sorted(frame.name for frame in path.iterdir() if not frame.name.startswith("."))
    if not frames:
        raise BadRow(f"field video: {name} in {folder} holds no frames")
    return [find_image(folder, f"{name}/{frame}", "video") for frame in frames]


def _find(folder: str | Path | None, name: str, field: str) -> Path:
    if folder is None:
        raise BadRow(f"field {field} names {name}, but its source has no images folder")
    root = Path(folder).resolve()
    try:
        path = (root / name).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        raise BadRow(f"field {field}: {name} is not in {folder}") from None
    if not path.is_relative_to(root):
        raise BadRow(f"field {field}: {name} leads out of {folder}")
    return path
