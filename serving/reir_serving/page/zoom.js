// Where a search looked in a photo: a row of small pictures, one for each look.

import { make } from "./dom.js";
import { place } from "./format.js";
import { photoFrame } from "./photo.js";

const WIDTH_PX = 160;

/** The looks at the photo of a hit, in order; null if it was not searched by zooming in. */
export function looks({ zoom, image_url }) {
  if (!zoom) return null;
  const number = zoom.steps.length;
  return make("div", { class: "looks" },
    make("p", { class: "faint" }, "Where it looked"),
    make("ol", { role: "list" }, ...zoom.steps.map(({ frame, box }, n) => make("li", {},
      photoFrame({
        source: `${image_url}&width=${WIDTH_PX}${frame.map((side) => `&frame=${side}`).join("")}`,
        marks: String(box) === String(frame) ? [] : [{ box: within(frame, box) }], // nothing found
        alt: `Look ${n + 1} of ${number}: ${n ? place(frame) : "the whole photo"}`,
        aspect: 1,
      })))));
}

/** A box of the photo relative to a frame of it. */
const within = ([left, top, right, bottom], [x1, y1, x2, y2]) => [
  (x1 - left) / (right - left), (y1 - top) / (bottom - top),
  (x2 - left) / (right - left), (y2 - top) / (bottom - top),
];
