// A photo with boxes and masks over it: on cards, in the viewer and where a photo was dropped.
// Boxes are xyxy in [0, 1] of the photo and become shares of it, so they fit at every size.

import { loadImage } from "./api.js";
import { make, makeSvg } from "./dom.js";

const share = (value) => `${(100 * value).toFixed(3)}%`;

/**
 * Show a photo once it has loaded.
 * @param source address or Blob
 * @param marks of boxes, see `markOf`; or a promise of them
 * @param crop a box: fill the frame around it where it fits in, instead of showing the whole photo
 * @param alt what a screen reader says
 * @param aspect width / height of the frame; null takes the photo's own
 */
export function photoFrame({ source, marks = [], crop = null, alt = "", aspect = null }) {
  const frame = make("span", { class: "frame", "data-state": "loading" });
  const canvas = make("span", { class: "canvas" });
  frame.append(canvas);
  Promise.all([loadImage(source), marks]).then(([image, all]) => {
    image.alt = alt;
    const ratio = image.naturalWidth / image.naturalHeight;
    frame.style.setProperty("--ratio", String(aspect ?? ratio));
    lay(canvas, ratio, aspect ?? ratio, crop);
    draw(canvas, image, all);
    frame.dataset.state = "shown";
  }, () => {
    frame.dataset.state = "failed";
    canvas.replaceChildren(make("span", { class: "no-photo" }, "This photo cannot be shown."));
  });
  return frame;
}

/**
 * A box to draw.
 * @param mark.box xyxy; mark.tone "hit" or "other"; mark.label tag at its corner;
 *   mark.polygons outlines of its mask; mark.title for screen readers; mark.id into data-instance
 * @param mark.click, mark.enter make it a button: pressed; pointed at or focused
 */
function markOf({ box: [x1, y1, x2, y2], tone = "hit", label = "", title = "", id = "", clear = 1, click, enter }) {
  const tag = label && make("span", { class: "tag" }, label);
  const attributes = { class: `mark ${tone}`, "data-instance": id };
  const mark = click
    ? make("button", { ...attributes, type: "button", "aria-label": title, click, focus: enter, pointerenter: enter }, tag)
    : make("span", attributes, tag);
  Object.assign(mark.style, { left: share(x1), top: share(y1), width: share(x2 - x1), height: share(y2 - y1) });
  mark.style.setProperty("--clear", String(clear));
  if (y1 < 0.07) mark.classList.add("at-top");
  if (x1 > 0.75) mark.classList.add("at-right");
  return mark;
}

/** Put image, masks and boxes onto the canvas; smaller boxes lie on top, so that all can be reached. */
function draw(canvas, image, marks) {
  const area = ({ box: [x1, y1, x2, y2] }) => (x2 - x1) * (y2 - y1);
  const sorted = [...marks].sort((a, b) => area(b) - area(a));
  canvas.replaceChildren(image, outlines(sorted), ...sorted.map(markOf));
}

/** One path a mask, whose holes stay open. */
function outlines(marks) {
  const shapes = marks.filter(({ polygons }) => polygons?.length).map(({ polygons, tone = "hit" }) =>
    makeSvg("path", { d: polygons.map((points) => `M${points.join("L")}Z`).join(""), "fill-rule": "evenodd", class: tone }));
  return makeSvg("svg", { class: "masks", viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": "true" }, ...shapes);
}

/** Size and place the canvas, whose sides are as `ratio`, in a frame whose sides are as `aspect`. */
function lay(canvas, ratio, aspect, crop) {
  const [wide, high] = [ratio / aspect, aspect / ratio]; // of the side that overflows when filled
  const needs = crop && (wide > 1 ? crop[2] - crop[0] : crop[3] - crop[1]);
  const fills = crop !== null && needs * Math.max(wide, high) <= 0.9;
  const width = fills ? Math.max(wide, 1) : Math.min(wide, 1);
  const height = fills ? Math.max(high, 1) : Math.min(high, 1);
  const middle = crop ? [(crop[0] + crop[2]) / 2, (crop[1] + crop[3]) / 2] : [0.5, 0.5];
  Object.assign(canvas.style, {
    width: share(width), height: share(height), left: share(offset(width, middle[0])), top: share(offset(height, middle[1])),
  });
}

/** Start of a side, in frames: the middle of the crop in the middle, without a gap at either end. */
const offset = (side, middle) => side <= 1 ? (1 - side) / 2 : Math.min(0, Math.max(1 - side, 0.5 - middle * side));
