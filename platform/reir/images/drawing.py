"""Draws boxes and masks on photos, and contact sheets of search results."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from reir.errors import ConfigError, DataError, ImageError, ReirError
from reir.images.decode import decode
from reir.images.rle import decode as decode_mask
from reir.records import Box, MaskRle

PAPER, CARD, INK, FAINT, GROUND = "#eceef2", "#ffffff", "#16181d", "#667085", "#dfe3ea"
HIT_COLORS = ("#ff4d2e", "#00a6fb", "#8ac926", "#ffca3a", "#c77dff", "#ff70a6")
MARGIN_PX, GAP_PX, CAPTION_PX = 28, 18, 48
MASK_OPACITY = 115  # of 255


@dataclass(frozen=True)
class Tile:
    """The content of one tile of a contact sheet, which shows one hit.

    Attributes:
        name: name of the photo, written under it.
        box: xyxy in [0, 1].
        score: score of the hit, written under the photo.
        mask: shaded on the photo, if there is one.
        read: returns the bytes of the photo.
        word: written before the score; may be empty.
    """

    name: str
    box: Box
    score: float
    mask: MaskRle | None
    read: Callable[[], bytes]
    word: str = ""


@dataclass(frozen=True)
class Sheet:
    """The content of a contact sheet.

    Attributes:
        title: the expression.
        notes: written below the title, side by side.
        tiles: one for each hit, best first.
        if_empty: text that is shown if there are no tiles.
    """

    title: str
    notes: Sequence[str]
    tiles: Sequence[Tile]
    if_empty: str


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Box],
    labels: Sequence[str],
    masks: Sequence[MaskRle | None] = (),
) -> Image.Image:
    """Return a copy of a photo with labeled boxes and shaded masks; the first lies on top.

    Args:
        image: the upright photo.
        boxes: xyxy in [0, 1].
        labels: one text for each box; if it is empty, only the box is drawn.
        masks: one mask for each box, of any size, or no masks at all.

    Raises:
        ValueError: the number of labels or masks differs from the number of boxes.
    """
    if len(boxes) != len(labels):
        raise ValueError(f"{len(boxes)} boxes need as many labels, got {len(labels)}")
    if len(masks) not in (0, len(boxes)):
        raise ValueError(f"{len(boxes)} boxes need as many masks or none, got {len(masks)}")
    # `convert` returns a copy even if the photo is RGB already, so the photo itself is not changed.
    canvas = image.convert("RGB")
    for number in reversed(range(len(masks))):
        _shade(canvas, masks[number], HIT_COLORS[number % len(HIT_COLORS)])
    draw = ImageDraw.Draw(canvas)
    for number in reversed(range(len(boxes))):
        _draw_box(draw, canvas.size, boxes[number], HIT_COLORS[number % len(HIT_COLORS)])
    # After all boxes, so that no box is drawn across a label.
    tags: list[_Tag] = []
    # In this order, so that later labels make room for earlier ones.
    for number, label in enumerate(labels):
        if label:
            color = HIT_COLORS[number % len(HIT_COLORS)]
            tags.append(_place_tag(canvas.size, boxes[number], label, color, tags))
    for tag in reversed(tags):
        _draw_tag(draw, tag)
    return canvas


def contact_sheet(sheet: Sheet, columns: int = 4, tile_px: int = 320) -> Image.Image:
    """Return one picture of an answer: the title, then a tile for each hit, best first.

    A tile shows the photo with the box, its rank and score, and the name of the photo. A photo that
    cannot be read, or an answer without hits, gets a card that says so.

    Args:
        sheet: the content.
        columns: maximum number of tiles side by side; fewer hits make a narrower sheet.
        tile_px: side of the square into which each photo is fitted.

    Raises:
        ValueError: `columns` or `tile_px` is too small.
    """
    if columns < 1 or tile_px < 64:
        raise ValueError(
            f"a sheet needs columns >= 1 and tile_px >= 64, got {columns} and {tile_px}"
        )
    cards = [_card(tile, rank, tile_px) for rank, tile in enumerate(sheet.tiles, 1)]
    cards = cards or [_notice("nothing found", sheet.if_empty, tile_px)]
    return _lay_out(sheet, cards, min(columns, max(len(cards), 2)))


def contact_sheets(sheets: Sequence[Sheet], columns: int = 4, tile_px: int = 320) -> Image.Image:
    """Return the contact sheets of several answers, one below the other.

    Raises:
        ValueError: there is no sheet.
    """
    if not sheets:
        raise ValueError("contact_sheets needs at least one sheet, got none")
    pictures = [contact_sheet(sheet, columns, tile_px) for sheet in sheets]
    width = max(picture.width for picture in pictures)
    page = Image.new("RGB", (width, sum(picture.height for picture in pictures)), PAPER)
    top = 0
    for number, picture in enumerate(pictures):
        page.paste(picture, (0, top))
        if number:
            line = (MARGIN_PX, top, width - MARGIN_PX, top)
            ImageDraw.Draw(page).line(line, fill=GROUND, width=2)
        top += picture.height
    return page


def check_ending(path: Path) -> None:
    """Check that there is a format for the ending of a file, and that it can hold a picture.

    Raises:
        ConfigError: there is none, or it cannot.
    """
    # Pillow can only read some formats, and others cannot hold a picture in color. It does not list
    # which, so this tries it.
    form = Image.registered_extensions().get(path.suffix.lower(), "")
    try:
        Image.new("RGB", (1, 1)).save(io.BytesIO(), form)
    except (KeyError, OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot write {path.suffix or 'a file without a suffix'}; use .png, .jpg or "
            f".webp"
        ) from error


def save_picture(picture: Image.Image, path: str | Path, advice: str = "use .png") -> None:
    """Write a picture to a file; the ending chooses the format.

    Args:
        picture: the picture.
        path: the file.
        advice: what to do if the format cannot hold the picture.

    Raises:
        ConfigError: there is no format for the ending.
        ReirError: the format cannot hold a picture of this size.
        OSError: the file cannot be written.
    """
    check_ending(Path(path))
    try:
        picture.save(path)
    # What Pillow raises depends on the format. Errors of the operating system have a number.
    except (OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        size = f"{picture.width} x {picture.height} pixels"
        ending = Path(path).suffix
        raise ReirError(
            f"{path}: a picture of {size} cannot be written as {ending}: {error}; {advice}"
        ) from error


def _lay_out(sheet: Sheet, cards: Sequence[Image.Image], columns: int) -> Image.Image:
    """Lay out the title and the cards of one answer."""
    card_width, card_height = cards[0].size
    width = 2 * MARGIN_PX + columns * card_width + (columns - 1) * GAP_PX
    title_font, note_font = _font(26), _font(15)
    title = _wrap(f"\u201c{_plain(sheet.title)}\u201d", title_font, width - 2 * MARGIN_PX)
    head = MARGIN_PX + 34 * len(title) + 42
    rows = -(-len(cards) // columns)
    height = head + rows * card_height + (rows - 1) * GAP_PX + MARGIN_PX
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(title):
        draw.text((MARGIN_PX, MARGIN_PX + 34 * number), line, INK, title_font, anchor="la")
    draw.text(
        (MARGIN_PX, head - 16), "   \u00b7   ".join(sheet.notes), FAINT, note_font, anchor="ls"
    )
    for number, card in enumerate(cards):
        row, column = divmod(number, columns)
        left = MARGIN_PX + column * (card_width + GAP_PX)
        page.paste(card, (left, head + row * (card_height + GAP_PX)))
    return page


def _card(tile: Tile, rank: int, tile_px: int) -> Image.Image:
    """Return the tile of one hit: the photo with its box, then rank, file name and score."""
    try:
        # A large JPEG is decoded at a fraction of its size, which is several times faster.
        photo = Image.fromarray(decode(tile.read(), at_least_px=tile_px).pixels)
    # A sheet with one missing photo is still useful.
    except DataError as error:
        why = error.reason.value if isinstance(error, ImageError) else "not a local file"
        card = _notice("photo not readable", why.replace("_", " "), tile_px)
    else:
        scale = tile_px / max(photo.size)
        size = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
        photo = draw_boxes(
            photo.resize(size, Image.Resampling.LANCZOS), [tile.box], [""], [tile.mask]
        )
        card = _blank(tile_px)
        card.paste(photo, ((tile_px - size[0]) // 2, (tile_px - size[1]) // 2))
    return _add_caption(card, rank, tile, tile_px)


def _blank(tile_px: int) -> Image.Image:
    """Return an empty card: a gray square for the photo and a white strip for the caption."""
    card = Image.new("RGB", (tile_px, tile_px + CAPTION_PX), CARD)
    ImageDraw.Draw(card).rectangle((0, 0, tile_px, tile_px - 1), fill=GROUND)
    return card


def _notice(headline: str, detail: str, tile_px: int) -> Image.Image:
    """Return a card without a photo that says why there is none."""
    card = _blank(tile_px)
    draw = ImageDraw.Draw(card)
    middle = tile_px // 2
    big, small = _font(max(15, tile_px // 14)), _font(15)
    draw.text((middle, middle - 4), headline, INK, big, anchor="ms")
    draw.text(
        (middle, middle + 8), _shorten(detail, small, tile_px - 24), FAINT, small, anchor="ma"
    )
    return card


def _add_caption(card: Image.Image, rank: int, tile: Tile, tile_px: int) -> Image.Image:
    """Write rank, file name and score under the photo, and the ground line of the card."""
    draw = ImageDraw.Draw(card)
    middle = tile_px + CAPTION_PX // 2
    number, score = str(rank), f"{tile.word} {tile.score:.3f}".lstrip()
    chip_font, name_font, score_font = _font(16), _font(15), _font(16)
    chip = 14 + round(chip_font.getlength(number)) + 8
    draw.rounded_rectangle((12, middle - 14, 12 + chip, middle + 14), 7, fill=HIT_COLORS[0])
    draw.text((12 + chip / 2, middle), number, CARD, chip_font, anchor="mm")
    draw.text((tile_px - 12, middle), score, INK, score_font, anchor="rm")
    left = 12 + chip + 10
    room = tile_px - 12 - round(score_font.getlength(score)) - 12 - left
    draw.text((left, middle), _shorten(_plain(tile.name), name_font, room), FAINT, name_font, "lm")
    return card


def _shade(canvas: Image.Image, mask: MaskRle | None, color: str) -> None:
    """Lay a translucent color over the pixels of a mask."""
    if mask is None:
        return
    shade = Image.fromarray(decode_mask(mask).astype(np.uint8) * MASK_OPACITY)
    shade = shade.resize(canvas.size, Image.Resampling.BILINEAR)
    canvas.paste(color, (0, 0, *canvas.size), shade)


def _draw_box(draw: ImageDraw.ImageDraw, size: tuple[int, int], box: Box, color: str) -> None:
    """Draw a colored frame with dark hairlines around the box, so that small ones stay visible."""
    left, top, right, bottom = _to_px(box, size)
    # The colored frame lies outside the box. The dark one starts a pixel further out and is two
    # pixels wider, so that a hairline of it remains visible on each side.
    thick = max(3, round(max(size) / 110))
    for out, width, line in ((thick + 1, thick + 2, INK), (thick, thick, color)):
        frame = (
            max(0, left - out),
            max(0, top - out),
            min(size[0] - 1, right + out),
            min(size[1] - 1, bottom + out),
        )
        draw.rectangle(frame, outline=line, width=width)


class _Tag(NamedTuple):
    """A label on a plate, and the rectangle of the plate in pixels."""

    label: str
    color: str
    font: ImageFont.FreeTypeFont
    left: int
    top: int
    right: int
    bottom: int

    def overlaps(self, other: _Tag) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


def _place_tag(
    size: tuple[int, int], box: Box, label: str, color: str, placed: Sequence[_Tag]
) -> _Tag:
    """Place a label at the box's upper left corner, or below the labels that are already there.

    A photo that has no room below keeps the label at the corner.
    """
    font = _font(max(13, round(max(size) / 38)))
    left, top, _, _ = _to_px(box, size)
    width, height = round(font.getlength(label)) + 14, round(font.size * 1.5)
    left, top = min(left, max(0, size[0] - width)), max(0, top - height)
    at_corner = tag = _Tag(label, color, font, left, top, left + width, top + height)
    # Every step moves the label below one that it overlapped, so the loop comes to an end.
    while taken := [other.bottom for other in placed if tag.overlaps(other)]:
        top = max(taken)
        tag = tag._replace(top=top, bottom=top + height)
    return tag if tag.bottom <= size[1] else at_corner


def _draw_tag(draw: ImageDraw.ImageDraw, tag: _Tag) -> None:
    """Draw a plate, and write the label on it."""
    plate = (tag.left, tag.top, tag.right, tag.bottom)
    draw.rounded_rectangle(plate, 4, INK, tag.color, 2)
    middle = ((tag.left + tag.right) / 2, (tag.top + tag.bottom) / 2)
    draw.text(middle, tag.label, CARD, tag.font, anchor="mm")


def _to_px(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the pixel corners of a normalized box, within the photo."""
    # 1.0 becomes the last pixel, not the one after it, which would lie outside the photo.
    width, height = size[0] - 1, size[1] - 1
    x1, y1, x2, y2 = (min(1.0, max(0.0, side)) for side in box)
    return round(x1 * width), round(y1 * height), round(x2 * width), round(y2 * height)


def _font(size_px: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's built-in font; no file of the machine is needed.

    Raises:
        ConfigError: this Pillow was built without FreeType.
    """
    font = ImageFont.load_default(size_px)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ConfigError("drawing needs Pillow with FreeType; install Pillow's own wheel")
    return font


def _plain(text: str) -> str:
    """Return text that can be written on one line."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def _shorten(text: str, font: ImageFont.FreeTypeFont, width_px: float) -> str:
    """Return `text`, with its middle left out if it is wider than `width_px`."""
    if font.getlength(text) <= width_px:
        return text
    for kept in range(len(text) - 1, 0, -1):
        short = text[: kept - kept // 2] + "\u2026" + text[len(text) - kept // 2 :]
        if font.getlength(short) <= width_px:
            return short
    return "\u2026"


def _wrap(text: str, font: ImageFont.FreeTypeFont, width_px: float) -> list[str]:
    """Break `text` into lines of at most `width_px`; a longer word is shortened."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width_px:
            lines[-1] = joined
        else:
            lines.append(_shorten(word, font, width_px))
    return lines
