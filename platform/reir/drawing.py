"""Pictures of answers: boxes and masks drawn on photos, and contact sheets of hits.

Knows Pillow, photos by URI and `SearchResult`; no model and no store.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from reir.errors import ConfigError, DataError, ImageError
from reir.images import decode, path_of_uri, read_bytes
from reir.records import Hit, MaskRle, SearchResult
from reir.rle import decode as decode_mask

Box = tuple[float, float, float, float]

PAPER, CARD, INK, FAINT, GROUND = "#eceef2", "#ffffff", "#16181d", "#667085", "#dfe3ea"
HIT_COLOURS = ("#ff4d2e", "#00a6fb", "#8ac926", "#ffca3a", "#c77dff", "#ff70a6")
MARGIN_PX, GAP_PX, CAPTION_PX = 28, 18, 48
MASK_OPACITY = 115  # of 255


def draw_hits(image: Image.Image, hits: Sequence[Hit], *, first_rank: int = 1) -> Image.Image:
    """Return a copy of a photo with the box, rank, score and, where it has one, mask of each hit.

    Args:
        image: the upright photo.
        hits: hits in this photo, best first; the best one is drawn last, on top.
        first_rank: rank written on the first hit.
    """
    labels = [f"{first_rank + n}  {hit.score:.2f}" for n, hit in enumerate(hits)]
    return draw_boxes(image, [hit.box for hit in hits], labels, [hit.mask for hit in hits])


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Box],
    labels: Sequence[str],
    masks: Sequence[MaskRle | None] = (),
) -> Image.Image:
    """Return a copy of a photo with labelled boxes and shaded masks; the first lies on top.

    Args:
        image: the upright photo.
        boxes: xyxy in [0, 1].
        labels: one text a box; an empty one draws the box alone.
        masks: one a box, of any size, or none at all.

    Raises:
        ValueError: there are not as many labels as boxes, or masks that are not as many.
    """
    if len(boxes) != len(labels):
        raise ValueError(f"{len(boxes)} boxes need as many labels, got {len(labels)}")
    if len(masks) not in (0, len(boxes)):
        raise ValueError(f"{len(boxes)} boxes need as many masks or none, got {len(masks)}")
    canvas = image.convert("RGB")
    for number in reversed(range(len(masks))):
        _shade(canvas, masks[number], HIT_COLOURS[number % len(HIT_COLOURS)])
    draw = ImageDraw.Draw(canvas)
    for number in reversed(range(len(boxes))):
        _draw_box(draw, canvas.size, boxes[number], HIT_COLOURS[number % len(HIT_COLOURS)])
    for number in reversed(range(len(boxes))):
        if labels[number]:
            colour = HIT_COLOURS[number % len(HIT_COLOURS)]
            _draw_tag(draw, canvas.size, boxes[number], labels[number], colour)
    return canvas


def contact_sheet(result: SearchResult, columns: int = 4, tile_px: int = 320) -> Image.Image:
    """Return one picture of an answer: the expression, then a tile a hit, best first.

    A tile shows the photo with the box, its rank and score, and the file name. A photo that cannot
    be read, or an answer without hits, gets a card that says so.

    Args:
        result: the answer.
        columns: most tiles side by side; fewer hits make a narrower sheet.
        tile_px: side of the square that each photo is fitted into.

    Raises:
        ValueError: `columns` or `tile_px` is too small.
    """
    if columns < 1 or tile_px < 64:
        raise ValueError(
            f"a sheet needs columns >= 1 and tile_px >= 64, got {columns} and {tile_px}"
        )
    cards = [_card(hit, rank, tile_px) for rank, hit in enumerate(result.hits, 1)]
    cards = cards or [_notice("nothing found", f"in gallery '{result.gallery}'", tile_px)]
    return _sheet(result, cards, min(columns, max(len(cards), 2)))


def contact_sheets(
    results: Sequence[SearchResult], columns: int = 4, tile_px: int = 320
) -> Image.Image:
    """Return the contact sheets of several answers, one below the other.

    Raises:
        ValueError: there is no result.
    """
    if not results:
        raise ValueError("contact_sheets needs at least one result, got none")
    sheets = [contact_sheet(result, columns, tile_px) for result in results]
    width = max(sheet.width for sheet in sheets)
    page = Image.new("RGB", (width, sum(sheet.height for sheet in sheets)), PAPER)
    top = 0
    for number, sheet in enumerate(sheets):
        page.paste(sheet, (0, top))
        if number:
            line = (MARGIN_PX, top, width - MARGIN_PX, top)
            ImageDraw.Draw(page).line(line, fill=GROUND, width=2)
        top += sheet.height
    return page


def _sheet(result: SearchResult, cards: Sequence[Image.Image], columns: int) -> Image.Image:
    """Lay out the title and the cards of one answer."""
    card_width, card_height = cards[0].size
    width = 2 * MARGIN_PX + columns * card_width + (columns - 1) * GAP_PX
    title_font, note_font = _font(26), _font(15)
    title = _wrapped(f"\u201c{_plain(result.expression)}\u201d", title_font, width - 2 * MARGIN_PX)
    head = MARGIN_PX + 34 * len(title) + 42
    rows = -(-len(cards) // columns)
    height = head + rows * card_height + (rows - 1) * GAP_PX + MARGIN_PX
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(title):
        draw.text((MARGIN_PX, MARGIN_PX + 34 * number), line, INK, title_font, anchor="la")
    draw.text((MARGIN_PX, head - 16), _subtitle(result), FAINT, note_font, anchor="ls")
    for number, card in enumerate(cards):
        row, column = divmod(number, columns)
        left = MARGIN_PX + column * (card_width + GAP_PX)
        page.paste(card, (left, head + row * (card_height + GAP_PX)))
    return page


def _subtitle(result: SearchResult) -> str:
    num_hits = len(result.hits)
    parts = [f"gallery {result.gallery}", f"{num_hits} hit{'' if num_hits == 1 else 's'}"]
    if result.timings_ms:
        parts.append(f"{sum(result.timings_ms.values()):.0f} ms")
    if result.degraded:
        parts.append("without " + ", ".join(result.degraded))
    return "   \u00b7   ".join(parts)


def _card(hit: Hit, rank: int, tile_px: int) -> Image.Image:
    """Return the tile of one hit: the photo with its box, then rank, file name and score."""
    try:
        data = read_bytes(path_of_uri(hit.uri))
        photo = Image.fromarray(decode(data, at_least_px=tile_px).pixels)
    except DataError as error:
        why = error.reason.value if isinstance(error, ImageError) else "not a local file"
        card = _notice("photo not readable", why.replace("_", " "), tile_px)
    else:
        scale = tile_px / max(photo.size)
        size = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
        photo = draw_boxes(
            photo.resize(size, Image.Resampling.LANCZOS), [hit.box], [""], [hit.mask]
        )
        card = _blank(tile_px)
        card.paste(photo, ((tile_px - size[0]) // 2, (tile_px - size[1]) // 2))
    return _captioned(card, rank, hit, tile_px)


def _blank(tile_px: int) -> Image.Image:
    """Return an empty card: a grey square for the photo and a white strip for the caption."""
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
    draw.text((middle, middle + 8), _fitted(detail, small, tile_px - 24), FAINT, small, anchor="ma")
    return card


def _captioned(card: Image.Image, rank: int, hit: Hit, tile_px: int) -> Image.Image:
    """Write rank, file name and score under the photo, and the ground line of the card."""
    draw = ImageDraw.Draw(card)
    middle = tile_px + CAPTION_PX // 2
    number, score = str(rank), f"{hit.score:.3f}"
    chip_font, name_font, score_font = _font(16), _font(15), _font(16)
    chip = 14 + round(chip_font.getlength(number)) + 8
    draw.rounded_rectangle((12, middle - 14, 12 + chip, middle + 14), 7, fill=HIT_COLOURS[0])
    draw.text((12 + chip / 2, middle), number, CARD, chip_font, anchor="mm")
    draw.text((tile_px - 12, middle), score, INK, score_font, anchor="rm")
    left = 12 + chip + 10
    room = tile_px - 12 - round(score_font.getlength(score)) - 12 - left
    draw.text((left, middle), _fitted(_file_name(hit.uri), name_font, room), FAINT, name_font, "lm")
    return card


def _shade(canvas: Image.Image, mask: MaskRle | None, colour: str) -> None:
    """Lay a colour, half see-through, over the pixels of a mask."""
    if mask is None:
        return
    shade = Image.fromarray(decode_mask(mask).astype(np.uint8) * MASK_OPACITY)
    shade = shade.resize(canvas.size, Image.Resampling.BILINEAR)
    canvas.paste(colour, (0, 0, *canvas.size), shade)


def _draw_box(draw: ImageDraw.ImageDraw, size: tuple[int, int], box: Box, colour: str) -> None:
    """Draw a coloured frame with dark hairlines around the box, so that small ones stay visible."""
    left, top, right, bottom = _to_px(box, size)
    thick = max(3, round(max(size) / 110))
    for out, width, line in ((thick + 1, thick + 2, INK), (thick, thick, colour)):
        frame = (
            max(0, left - out),
            max(0, top - out),
            min(size[0] - 1, right + out),
            min(size[1] - 1, bottom + out),
        )
        draw.rectangle(frame, outline=line, width=width)


def _draw_tag(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], box: Box, label: str, colour: str
) -> None:
    """Write a label on a plate at the box's upper left corner, kept within the photo."""
    font = _font(max(13, round(max(size) / 38)))
    left, top, _, _ = _to_px(box, size)
    width, height = round(font.getlength(label)) + 14, round(font.size * 1.5)
    left = min(left, max(0, size[0] - width))
    top = max(0, top - height)
    draw.rounded_rectangle((left, top, left + width, top + height), 4, INK, colour, 2)
    draw.text((left + width / 2, top + height / 2), label, CARD, font, anchor="mm")


def _to_px(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the pixel corners of a normalised box, within the photo."""
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


def _file_name(uri: str) -> str:
    return _plain(unquote(uri.rsplit("/", 1)[-1], errors="replace"))


def _fitted(text: str, font: ImageFont.FreeTypeFont, width_px: float) -> str:
    """Return `text`, with its middle left out where it is wider than `width_px`."""
    if font.getlength(text) <= width_px:
        return text
    for kept in range(len(text) - 1, 0, -1):
        short = text[: kept - kept // 2] + "\u2026" + text[len(text) - kept // 2 :]
        if font.getlength(short) <= width_px:
            return short
    return "\u2026"


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width_px: float) -> list[str]:
    """Break `text` into lines of at most `width_px`; a longer word is shortened."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width_px:
            lines[-1] = joined
        else:
            lines.append(_fitted(word, font, width_px))
    return lines
