// The start page: some photos of the gallery, so that one sees what can be searched for.

import { call, imagePath } from "./api.js";
import { byId, make } from "./dom.js";
import { photoFrame } from "./photo.js";
import { explain, fileName } from "./format.js";

const NUM_PHOTOS = 12;
const MIDDLE = [0.5, 0.5, 0.5, 0.5]; // a point: the frame is filled around it

/** Show some photos of a gallery; nothing if it has none. */
export async function showPhotos(gallery, signal) {
  if (!gallery) return;
  let photos = [];
  let note = "";
  try {
    photos = (await call(`${imagePath(gallery)}?limit=${NUM_PHOTOS}`, { signal })).images;
  } catch (error) {
    if (error.name === "AbortError") return;
    note = `The photos cannot be shown: ${explain(error).title.toLowerCase()}.`;
  }
  byId("photos").hidden = photos.length === 0 && !note;
  byId("photo-note").textContent = note;
  byId("photo-list").replaceChildren(...photos.map(({ thumbnail_url, uri }) =>
    make("li", {}, photoFrame({
      source: thumbnail_url, crop: MIDDLE, aspect: 1, alt: `Photo ${fileName(uri)}`,
    }))));
}
