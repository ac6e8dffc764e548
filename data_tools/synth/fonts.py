"""Which font faces synthetic text is drawn in: finding, filtering and opening them.

Pillow's own scalable face (Aileron) draws the quickstart's pages. A base model that had seen it in
training would make that demonstration worthless, so `find_faces` never returns it.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

from data_tools.errors import ConfigError

PRINTABLE = "".join(chr(code) for code in range(33, 127))  # the 94 ASCII characters with ink
BUILTIN = ""  # the path that stands for Pillow's own face

# Faces whose glyphs are not plain upright text, by file or family name.
_UNSUITABLE_NAME = re.compile(
    r"math|symbol|dingbat|icon|emoji|awesome|ornament|music|braille|barcode|wingding|webding"
    r"|kristi|femke|breip|isabella|chancery|z003|d050000l",
    re.IGNORECASE,
)
_UNSUITABLE_CUT = re.compile(r"italic|oblique|thin|hairline|outline|inverted", re.IGNORECASE)
# The weight "Light" is trusted from the file name only: some families give it to every cut.
_LIGHT_FILE = re.compile(r"light", re.IGNORECASE)
_PROBE_SIZE_PX = 24


@dataclass(frozen=True, order=True)
class Face:
    """One font file: its path (`BUILTIN` for Pillow's own) and the names it carries."""

    path: str
    family: str
    style: str


@lru_cache(maxsize=256)
def open_font(path: str, size_px: int) -> ImageFont.FreeTypeFont:
    """Return a font at a size in pixels; `BUILTIN` as path gives Pillow's own face.

    The basic layout engine is fixed so that pixels do not depend on whether raqm is installed.
    """
    if path == BUILTIN:
        font = ImageFont.load_default(size_px)
        if not isinstance(font, ImageFont.FreeTypeFont):
            raise ConfigError(
                "this Pillow was built without FreeType and cannot scale its own font; "
                "install a Pillow wheel, or give --fonts"
            )
        return font
    return ImageFont.truetype(path, size_px, layout_engine=ImageFont.Layout.BASIC)


def builtin_face() -> Face:
    """Return Pillow's own face."""
    return _face(BUILTIN, open_font(BUILTIN, _PROBE_SIZE_PX))


def is_builtin_face(font: str | ImageFont.FreeTypeFont) -> bool:
    """Tell whether a font, or the font file at a path, is of the family of Pillow's own face."""
    if isinstance(font, str):
        font = open_font(font, _PROBE_SIZE_PX)
    builtin = builtin_face().family
    return _squash(str(font.getname()[0])) == _squash(builtin)


def find_faces(folders: list[str]) -> list[Face]:
    """Return the usable faces (.ttf, .otf) below some folders, sorted by file name.

    Left out: italic, oblique, light and thin cuts, symbol and script faces, faces that lack a
    printable ASCII character, Pillow's own family, and further copies of a file of the same name.

    Raises:
        ConfigError: if a folder does not exist or no usable face is found.
    """
    found: dict[str, Face] = {}
    for folder in folders:
        if not Path(folder).is_dir():
            raise ConfigError(f"--fonts {folder}: no such folder; give folders with .ttf or .otf")
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix.lower() in (".ttf", ".otf") and path.stem not in found:
                face = _usable_face(path)
                if face is not None:
                    found[path.stem] = face
    if not found:
        raise ConfigError(
            f"--fonts {' '.join(folders)}: no usable upright text face (.ttf, .otf) below; on "
            "Debian, fonts-dejavu-core and fonts-liberation are a start"
        )
    return [found[stem] for stem in sorted(found)]


def divide_faces(faces: list[Face], heldout: list[str]) -> tuple[list[Face], list[Face]]:
    """Return (faces for training, faces for validation).

    Args:
        faces: all faces.
        heldout: beginnings of family or file names, blanks, hyphens and case ignored. With none,
            both splits get all faces.

    Raises:
        ConfigError: if a name fits no face, or nothing is left to train with.
    """
    if not heldout:
        return faces, faces
    held = [face for face in faces if any(_has_name(face, name) for name in heldout)]
    for name in heldout:
        if not any(_has_name(face, name) for face in held):
            families = sorted({face.family for face in faces})
            near = get_close_matches(name, families, n=3, cutoff=0.3)
            raise ConfigError(
                f"--heldout {name}: no such family among the fonts found; "
                f"near it: {', '.join(near) or ', '.join(families[:5])}"
            )
    rest = [face for face in faces if face not in held]
    if not rest:
        raise ConfigError("--heldout holds out every font found; leave some to train with")
    return rest, held


def _has_name(face: Face, name: str) -> bool:
    wanted = _squash(name)
    return _squash(face.family).startswith(wanted) or _squash(Path(face.path).stem).startswith(
        wanted
    )


def _squash(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _face(path: str, font: ImageFont.FreeTypeFont) -> Face:
    family, style = font.getname()
    return Face(path, str(family), str(style))


def _usable_face(path: Path) -> Face | None:
    try:
        font = open_font(str(path), _PROBE_SIZE_PX)
    except OSError:  # not a scalable font, whatever its name says
        return None
    face = _face(str(path), font)
    names = f"{path.stem} {face.family}"
    unsuitable = (
        _UNSUITABLE_NAME.search(names)
        or _UNSUITABLE_CUT.search(f"{path.stem} {face.style}")
        or _LIGHT_FILE.search(path.stem)
        or is_builtin_face(font)
        or missing_characters(font)
    )
    return None if unsuitable else face


def missing_characters(font: ImageFont.FreeTypeFont, alphabet: str = PRINTABLE) -> str:
    """Return the characters that a font draws as nothing or as its placeholder glyph."""
    placeholder = _drawing(font, "\U0010ffff")
    drawings = {character: _drawing(font, character) for character in alphabet}
    return "".join(
        character
        for character, drawing in drawings.items()
        if drawing == placeholder or not any(drawing[1])
    )


def _drawing(font: ImageFont.FreeTypeFont, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)
