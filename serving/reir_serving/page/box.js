// Drawing a box on a photo: with the pointer, or by four numbers.

import { button, make } from "./dom.js";

const SIDES = ["Left", "Top", "Right", "Bottom"];
/** Smallest width and height of a box, as a share of the photo; a click alone draws none. */
const MIN_SIDE = 0.005;

/**
 * Let the user draw a box on a photo.
 * @param canvas the ".canvas" of a photo that is shown, see `photoFrame`
 * @param start box to begin with, xyxy in [0, 1]
 * @param on.done(box) the box was drawn; on.cancelled()
 * @returns a form with the four numbers, which work without a pointer
 */
export function drawBox(canvas, start, on) {
  let box = start;
  const drawn = make("span", { class: "mark hit" });
  const sheet = make("div", { class: "drawing" }, drawn);
  const inputs = SIDES.map((_, side) => make("input", {
    type: "number", min: 0, max: 100, step: 0.1, required: true, input: read,
    "data-side": side,
  }));
  const save = make("button", { type: "submit", class: "main" }, "Record this box");
  const form = make("form", { class: "box-form", novalidate: true, submit: finish, keydown: onKey },
    make("p", { class: "faint" }, "Draw a box around the object on the photo, or enter its sides in percent."),
    ...SIDES.map((name, side) => make("label", {}, name, inputs[side])),
    save, button({ class: "quiet", click: () => leave(on.cancelled) }, "Cancel"));

  function show(changed) {
    box = changed;
    const [x1, y1, x2, y2] = box;
    const sides = { left: x1, top: y1, width: Math.max(x2 - x1, 0), height: Math.max(y2 - y1, 0) };
    for (const [name, share] of Object.entries(sides)) drawn.style[name] = `${100 * share}%`;
    save.disabled = !(x2 - x1 >= MIN_SIDE && y2 - y1 >= MIN_SIDE);
  }
  function write() {
    for (const [side, input] of inputs.entries()) input.value = (100 * box[side]).toFixed(1);
  }
  function read() {
    show(inputs.map((input) => clamp(Number(input.value) / 100)));
  }
  function point({ clientX, clientY }) {
    const { left, top, width, height } = sheet.getBoundingClientRect();
    return [clamp((clientX - left) / width), clamp((clientY - top) / height)];
  }
  function press(event) {
    event.preventDefault();
    sheet.setPointerCapture(event.pointerId);
    const [x, y] = point(event);
    const stretch = (moved) => {
      const [toX, toY] = point(moved);
      show([Math.min(x, toX), Math.min(y, toY), Math.max(x, toX), Math.max(y, toY)]);
      write();
    };
    sheet.onpointermove = stretch;
    sheet.onpointerup = sheet.onpointercancel = () => { sheet.onpointermove = null; };
    stretch(event);
  }
  function finish(event) {
    event.preventDefault();
    if (!save.disabled) leave(() => on.done(box));
  }
  function leave(then) {
    sheet.remove();
    form.remove();
    then();
  }
  function onKey(event) {
    event.stopPropagation(); // the arrow keys change a number here, and not the hit of the viewer
    if (event.key !== "Escape") return;
    event.preventDefault(); // the dialog stays open
    leave(on.cancelled);
  }

  sheet.addEventListener("pointerdown", press);
  canvas.append(sheet);
  show(start);
  write();
  return form;
}

const clamp = (share) => Math.min(Math.max(share || 0, 0), 1);
