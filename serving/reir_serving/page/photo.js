// A photo with boxes and masks over it: on cards, in the viewer, and for a photo of the user.
// Boxes are xyxy in [0, 1] of the photo and become percentages, so they fit at every size.

import { loadImage } from "./api.js";
import { button, make, makeSvg } from "./dom.js";

/** Largest share of a frame that a box may take if the frame is to be filled around it. */
const MAX_FILLED = 0.9;

/**
 * Show a photo once it has loaded.
 * @param source address or Blob
 * @param marks boxes, see `drawMark`; or a promise of them
 * @param crop a box: fill the frame around it if it fits, instead of showing the whole photo
 * @param alt text for screen readers
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
 * Draw a box.
 * @param mark.box xyxy; mark.tone "hit" or "other"; mark.label tag at its corner;
 *   mark.polygons outlines of its mask; mark.title for screen readers; mark.id into data-instance
 * @param mark.clear opacity in [0, 1] of an "other" box until the pointer is over it
 * @param mark.click, mark.enter make the box a button: on a click; on each move of the pointer
 *   over it and on focus
 */
function drawMark({ box: [x1, y1, x2, y2], tone = "hit", ...mark }) {
  const tag = mark.label && make("span", { class: "tag" }, mark.label);
  const attributes = { class: `mark ${tone}`, "data-instance": mark.id };
  const { click, enter } = mark;
  // Not `pointerenter`: browsers fire it as well when a box appears under a pointer at rest.
  const listeners = { click, focus: enter, pointermove: enter };
  const drawn = click ? button({ ...attributes, "aria-label": mark.title, ...listeners }, tag)
    : make("span", attributes, tag);
  place(drawn, [x1, y1, x2 - x1, y2 - y1]);
  drawn.style.setProperty("--clear", String(mark.clear ?? 1));
  if (mark.polygons?.length) drawn.classList.add("has-mask");
  if (y1 < 0.07) drawn.classList.add("at-top");
  if (x1 > 0.75) drawn.classList.add("at-right");
  return drawn;
}

/** Place an element in its parent: left, top, width and height as shares. */
function place(element, sides) {
  const [left, top, width, height] = sides.map((side) => `${(100 * side).toFixed(3)}%`);
  Object.assign(element.style, { left, top, width, height });
}

/** Put image, masks and boxes onto the canvas, smaller boxes on top, so that all can be reached. */
function draw(canvas, image, marks) {
  const area = ({ box: [x1, y1, x2, y2] }) => (x2 - x1) * (y2 - y1);
  const sorted = [...marks].sort((a, b) => area(b) - area(a));
  canvas.replaceChildren(image, outlines(sorted), ...sorted.map(drawMark));
}

/** One path for each mask; the holes of a mask stay open. */
function outlines(marks) {
  const line = (points) => `M${points.join("L")}Z`;
  const shapes = marks.filter(({ polygons }) => polygons?.length).map((mark) => makeSvg("path", {
    d: mark.polygons.map(line).join(""), "fill-rule": "evenodd", class: mark.tone ?? "hit",
  }));
  return makeSvg("svg", {
    class: "masks", viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": "true",
  }, ...shapes);
}

/** Size and place a canvas with the aspect ratio `ratio` in a frame with the ratio `aspect`. */
function lay(canvas, ratio, aspect, crop) {
  const [wide, high] = [ratio / aspect, aspect / ratio]; // of the side that overflows when filled
  const needs = crop && (wide > 1 ? crop[2] - crop[0] : crop[3] - crop[1]);
  const fills = crop !== null && needs * Math.max(wide, high) <= MAX_FILLED;
  const width = fills ? Math.max(wide, 1) : Math.min(wide, 1);
  const height = fills ? Math.max(high, 1) : Math.min(high, 1);
  const [x, y] = crop ? [(crop[0] + crop[2]) / 2, (crop[1] + crop[3]) / 2] : [0.5, 0.5];
  place(canvas, [start(width, x), start(height, y), width, height]);
}

/** Start of a side, in frame sizes: centers the point `middle`, without a gap at either end. */
const start = (side, middle) =>
  side <= 1 ? (1 - side) / 2 : Math.min(0, Math.max(1 - side, 0.5 - middle * side));
