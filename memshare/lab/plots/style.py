"""What all pictures have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from memshare.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart by colour-blind readers too; brown and grey are not of it.
_COLOURS = {
    "dense": "#000000",
    "twins": "#0072b2",
    "oldest": "#e69f00",
    "random": "#cc79a7",
    "paper": "#009e73",
    "compaction": "#d55e00",
    "control": "#8c564b",
    "watermark": "#666666",
    "fp8": "#56b4e9",
    "twins-fp8": "#f0e442",
}
_OTHER = "#999999"


def colour(arm: str) -> str:
    """Colour of an arm; without one of its own, ``twins 0.25`` and ``twins-x`` have ``twins``'s."""
    name = arm.split(maxsplit=1)[0]
    return _COLOURS.get(name) or _COLOURS.get(name.split("-")[0], _OTHER)


def require_format(path: Path) -> None:
    """Look at the ending of a picture's file.

    Raises:
        UserError: matplotlib is missing, or cannot write such a file.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise UserError("pictures need matplotlib: pip install 'memshare[plots]'") from None
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in formats:
        raise UserError(f"--output {path}: its ending must be one of {', '.join(formats)}")


@contextmanager
def figure(
    path: Path, rows: int = 1, columns: int = 1, width: float = 8.0, height: float = 3.2
) -> Iterator[list[Axes]]:
    """Draw into axes ``[rows * columns]``, row by row; the file is written at the end.

    Args:
        path: the picture; its ending decides the format.
        rows: of axes.
        columns: of axes.
        width: of the whole, inches.
        height: of a row, inches.

    Raises:
        UserError: matplotlib is missing, or the file's ending names no format that it can write.
    """
    require_format(path)
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    made, axes = pyplot.subplots(
        rows, columns, figsize=(width, height * rows), squeeze=False, layout="constrained"
    )
    try:
        yield list(axes.flat)
        # Without a date, and with ids that do not change: the same data give the same file.
        matplotlib.rcParams["svg.hashsalt"] = "memshare"
        made.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    finally:
        pyplot.close(made)
