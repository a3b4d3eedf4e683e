// Chips below the sentence: instances to be like or unlike, and a photo to search in.

import { call, imagePath } from "./api.js";
import { button, byId, icon, make } from "./dom.js";
import { photoFrame } from "./photo.js";
import { fileName } from "./format.js";

const known = new Map(); // instance id -> hit or instance that the page has shown
const NAMES = { more: "like", not: "not" };

/** Remember instances, so that a chip can show them. */
export function remember(instances) {
  for (const each of instances) known.set(each.instance_id, each);
}

/**
 * Show the terms of a state, and the photo of the user.
 * @param upload {file, box} or null
 * @param on.drop(id), on.dropPhoto()
 */
export function showChips({ gallery, terms }, upload, on) {
  const chips = terms.map((term) => termChip(gallery, term, on));
  if (upload) {
    const { file, box } = upload;
    const word = box ? "like" : "in photo";
    chips.unshift(chip(word, file.name || "photo", thumbnail(file, box), on.dropPhoto));
  }
  byId("chips").replaceChildren(...chips);
}

function termChip(gallery, { kind, id }, on) {
  const instance = known.get(id);
  const made = chip(NAMES[kind], instance ? fileName(instance.uri) : "an object",
    instance ? thumbnail(instance.thumbnail_url, instance.box) : null, () => on.drop(id));
  made.classList.add(kind);
  if (!instance) {
    lookUp(gallery, id).then((found) => {
      if (found) made.replaceWith(termChip(gallery, { kind, id }, on));
    });
  }
  return made;
}

/** Look up an instance from the address of the page; false if the gallery does not have it. */
async function lookUp(gallery, id) {
  const imageId = id.slice(0, id.lastIndexOf("#"));
  try {
    const { instances, uri, thumbnail_url } = await call(imagePath(gallery, imageId));
    remember(instances.map((each) => ({ ...each, uri, thumbnail_url })));
  } catch {
    return false; // the chip gets no name; the search itself reports what is wrong
  }
  return known.has(id);
}

function chip(word, name, picture, drop) {
  return make("li", { class: "chip" }, picture,
    make("span", {}, make("b", {}, word), " ", name),
    button({ class: "drop", "aria-label": `Remove: ${word} ${name}`, click: drop }, icon("close")));
}

const thumbnail = (source, box) =>
  photoFrame({ source, crop: box, marks: box ? [{ box }] : [], aspect: 1 });
