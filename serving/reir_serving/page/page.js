// The page: holds the state, sends one request at a time, and shows its answer.

import { call, photoForm } from "./api.js";
import { cards, moveFocus, skeletons } from "./cards.js";
import { remember, showChips } from "./chips.js";
import { announce, button, byId, make } from "./dom.js";
import { galleryFeedback } from "./feedback.js";
import { fillGalleries, readFilters, showFilters, showGallery } from "./filters.js";
import { showLocal } from "./localize.js";
import * as notices from "./notices.js";
import {
  hasQuery, fromHash, EMPTY_STATE, numFilters, options, toHash, toRequest, withoutTerm, withTerm,
} from "./state.js";
import { showPhotos } from "./start.js";
import { listenForPhotos } from "./uploads.js";
import { Viewer } from "./viewer.js";
import { count, degraded, timings } from "./format.js";

const TYPING_MS = 300;
const SLOW_MS = 2000;
const ENGLISH_ONLY =
  "This does not look like English, the only language that the models understand.";
const TITLE = document.title;
const NUM_BOXES = 5; // to show in a photo of the user
const NUM_EXAMPLES = 3;
const NOTHING = Object.freeze({ hits: [], cursor: "", described: "", gallery: "" });
const MIN_TYPED_CHARS = 3; // shorter sentences are not searched for while the user types

let state = fromHash(location.hash);
let hasStarted = false; // whether the galleries are known, without which nothing can be searched
let inField = ""; // the sentence of the state when its field was last set to it; null: set it anew
let upload = null; // {file, box}: a photo of the user; with a box, the search is for its content
let shown = NOTHING;
let galleries = [];
let takesFeedback = false; // whether the server records it
let running = null; // AbortController of the request in progress
let typing = null;

// Their gallery is not always that of the state: the user may have chosen another one since.
const more = (instance, gallery = shown.gallery) => addTerm("more", instance, gallery);
const not = (instance, gallery = shown.gallery) => addTerm("not", instance, gallery);
const viewer = new Viewer({
  more, not,
  removed: () => Promise.all([run(), updateCounts()]),
  closed: (rank) => byId("grid").children[rank - 1]?.querySelector(".open")?.focus(),
});

/** Change the state, put it into the address, and search. */
function update(changes, { typed = false } = {}) {
  if (typed && !hasStarted) return; // `start` takes what was typed until then
  const before = state.sentence;
  state = { ...state, ...changes };
  // Otherwise, what was typed just before is still searched for.
  if (state.sentence !== before) clearTimeout(typing);
  const address = `#${toHash(state)}`;
  // While the user types, "back" must not step through every letter.
  if (typed) history.replaceState(null, "", address);
  else if (address !== location.hash) history.pushState(null, "", address);
  return run();
}

function addTerm(kind, instance, gallery) {
  remember([instance]);
  // The terms of the state are instances of its gallery, which may be another one.
  const before = gallery === state.gallery ? state : { ...state, gallery, terms: [] };
  update(withTerm(before, kind, instance.instance_id));
}

const galleryOf = (name) => galleries.find((each) => each.name === name);

/** Set the controls to the state. */
function showState() {
  document.title = state.sentence ? `${state.sentence} \u2013 REIR` : TITLE;
  showSentence();
  showFilters(state);
  showGallery(galleryOf(state.gallery));
  showDrawing();
  showChips(state, upload, {
    drop: (id) => update(withoutTerm(state, id)),
    dropPhoto: () => setUpload(null),
  });
}

/** Put the sentence into its field if it is a new one; otherwise, the user may go on typing. */
function showSentence() {
  const field = byId("sentence");
  if (state.sentence !== inField && field.value.trim() !== state.sentence) {
    field.value = state.sentence;
  }
  inField = state.sentence;
}

const hasMasks = () => shown.hits.some((hit) => hit.mask);

/** Set the controls above the hits; draw hits as masks or as boxes. */
function showDrawing() {
  document.body.dataset.draw = state.draw;
  byId("draw").hidden = shown.hits.length === 0;
  byId("zoom-choice").hidden = shown.hits.length === 0 || state.sentence === "";
  byId("zoom").checked = state.zoom;
  for (const radio of byId("draw").querySelectorAll("input")) {
    radio.checked = radio.value === state.draw;
  }
}

/** Send the request for the state, or for the next page of its hits; abort the one before. */
async function run({ next = false } = {}) {
  if (!hasStarted) return; // the notice of `start`, with its "Try again", has to stay
  running?.abort();
  const own = running = new AbortController();
  if (!next) showState();
  notices.clear();
  const view = upload && !upload.box ? "local" : hasQuery(state) || upload ? "hits" : "start";
  document.body.dataset.view = view;
  if (view === "start") return showStart();
  if (view === "local" && !state.sentence) {
    setBusy(false); // the request that was aborted is not followed by another one
    return showUpload(null);
  }
  const slow = setTimeout(notices.slow, SLOW_MS);
  setBusy(true, view === "hits" && !next);
  try {
    const answer = await request(view, next ? shown.cursor : "", own.signal);
    notices.clear();
    if (view === "hits") showHits(answer, next);
    else showUpload(answer);
  } catch (error) {
    if (error.name !== "AbortError") showProblem(error, () => run({ next }), next);
  } finally {
    clearTimeout(slow);
    // An aborted request ends after its successor has started, which is still busy.
    if (running === own) setBusy(false);
  }
}

function request(view, cursor, signal) {
  if (view === "local") {
    const fields = { expression: state.sentence, k: NUM_BOXES, masks: true };
    return call("v1/localize", { form: photoForm(upload.file, fields), signal });
  }
  if (upload) {
    const body = { ...options(state, cursor), box: upload.box, expression: state.sentence || null };
    const form = photoForm(upload.file, { request: JSON.stringify(body) });
    return call("v1/search/similar", { form, signal });
  }
  const [path, json] = toRequest(state, cursor);
  return call(path, { json, signal });
}

const isBusy = () => byId("results").getAttribute("aria-busy") === "true";

function setBusy(is, first = false) {
  byId("results").setAttribute("aria-busy", String(is));
  byId("next").disabled = is;
  if (first && shown.hits.length === 0) byId("grid").replaceChildren(...skeletons(8));
}

/** Show what went wrong; keep the hits if only their next page failed. */
function showProblem(error, retry, keepsHits = false) {
  if (!keepsHits) clearAnswer();
  notices.problem(error, retry);
}

function clearAnswer() {
  shown = NOTHING;
  byId("local").replaceChildren();
  byId("grid").replaceChildren();
  byId("absent").replaceChildren();
  byId("next").hidden = true;
  showDrawing();
  announce("");
}

function showStart() {
  clearAnswer();
  setBusy(false);
  return showPhotos(state.gallery, running.signal);
}

/** Show the photo of the user. A box belongs to this photo, also after another one was chosen. */
function showUpload(answer) {
  const { file } = upload;
  showLocal(file, answer, { similar: (box) => setUpload({ file, box }) });
}

function showHits(answer, isNext) {
  const grid = byId("grid");
  const hadFocus = grid.contains(document.activeElement);
  const { hits } = answer;
  const before = isNext ? shown.hits : [];
  shown = {
    hits: [...before, ...hits], cursor: answer.cursor, described: described(),
    gallery: state.gallery,
  };
  remember(hits);
  showDrawing();
  const made = cards(hits, {
    first: before.length + 1, tied: answer.equally_good,
    on: { open: openViewer, more, not },
  });
  if (isNext) grid.append(...made);
  else grid.replaceChildren(...made);
  if (isNext || hadFocus) made[0]?.querySelector(".open").focus();
  byId("next").hidden = !answer.cursor;
  if (!isNext) {
    showVerdict(answer);
    showGalleryFeedback();
  }
  announce([summary(answer), missing(), degraded(answer.degraded)].filter(Boolean).join(" "));
}

/** A sentence about masks that the user asked for, but that no hit has. */
const missing = () =>
  state.draw === "masks" && shown.hits.length > 0 && !hasMasks()
    ? "No masks: the model of this gallery has none." : "";

const isZoomed = (answer) => answer.hits.some((hit) => hit.zoom);

function showVerdict(answer) {
  const absent = !answer.found && shown.hits.length > 0;
  byId("grid").classList.toggle("absent", absent);
  if (absent) notices.notFound(answer.presence, isZoomed(answer));
  else if (shown.hits.length === 0) notices.empty(numFilters(state) > 0, clearFilters);
  else if (answer.equally_good > 1) showTie(answer);
}

function showTie({ hits, equally_good }) {
  const photos = new Set(hits.slice(0, equally_good).map((hit) => hit.image_id));
  notices.ambiguous(equally_good, photos.size === equally_good ? "photos" : "hits");
}

/** What users can give feedback on: a sentence that says by itself what the object is. */
const described = () =>
  takesFeedback && !upload && state.terms.every((term) => term.kind !== "more")
    ? state.sentence : "";

/** Offer to say that the object is not in the gallery, if filters have left nothing out. */
function showGalleryFeedback() {
  const about = { gallery: state.gallery, expression: shown.described };
  const offers = shown.described && numFilters(state) === 0;
  byId("absent").replaceChildren(...(offers ? [galleryFeedback(about)] : []));
}

function summary(answer) {
  const number = count(shown.hits.length, "hit");
  const rest = answer.cursor ? ", more below" : "";
  const isDoubtful = shown.hits.length > 0 && ["possible", "unlikely"].includes(answer.likelihood);
  const doubt = isDoubtful ? ", but the object may not be there" : "";
  const isFound = answer.found || shown.hits.length === 0 || isZoomed(answer);
  const found = isFound ? number + rest + doubt : "Probably not in this gallery";
  const known = answer.english === false ? `${ENGLISH_ONLY} ` : "";
  return `${known}${found} \u00b7 ${timings(answer.timings_ms)}.`;
}

function clearFilters() {
  const { gallery, sentence, terms, draw, zoom } = state;
  update({ ...EMPTY_STATE, gallery, sentence, terms, draw, zoom });
}

function openViewer(rank) {
  const { hits, gallery, described: expression } = shown;
  viewer.open(hits, rank, { gallery, mayWrite: galleryOf(gallery)?.writable === true, expression });
}

/** Search in a photo of the user, or with a part of it; null goes back to the gallery. */
function setUpload(photo) {
  if (photo?.file !== upload?.file) clearAnswer(); // it is about another photo
  upload = photo;
  if (photo) byId("sentence").focus();
  run();
}

/** Request the counts of the galleries again, after photos were added or deleted. */
async function updateCounts() {
  try {
    galleries = (await call("v1/galleries")).galleries;
  } catch {
    return; // the old counts stay
  }
  showGallery(galleryOf(state.gallery));
}

/** Request the galleries from the server and show them; offer to try again if that fails. */
async function start() {
  notices.clear();
  try {
    const [about, listed] = await Promise.all([call("v1/about"), call("v1/galleries")]);
    galleries = listed.galleries;
    takesFeedback = about.feedback;
    const linked = fromHash(location.hash);
    state = { ...linked, gallery: fillGalleries(galleries, linked.gallery) };
    showExamples(about.examples ?? []);
    byId("release").textContent =
      `REIR ${about.release}. The models of this server compute in ${about.cpu_path}.`;
    hasStarted = true;
    const typed = byId("sentence").value.trim(); // while the page was loading
    if (typed) inField = state.sentence; // the field keeps it, even if it is not searched for
    await (typed.length >= MIN_TYPED_CHARS
      ? update({ sentence: typed }, { typed: true }) : run());
  } catch (error) {
    showProblem(error, start);
  }
}

function showExamples(sentences) {
  byId("examples").hidden = sentences.length === 0;
  byId("example-list").replaceChildren(...sentences.slice(0, NUM_EXAMPLES).map((text) =>
    make("li", {}, button({ click: () => update({ sentence: text }) }, text))));
}

function listen() {
  const sentence = byId("sentence");
  byId("search").addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(typing);
    const text = sentence.value.trim();
    if (!text && !hasStarted) return; // the field does not have the sentence of the link yet
    // A pause in typing may have started this search already.
    if (text !== state.sentence || !isBusy()) update({ sentence: text });
  });
  sentence.addEventListener("input", () => {
    clearTimeout(typing);
    const text = sentence.value.trim();
    if (text.length >= MIN_TYPED_CHARS || text === "") {
      typing = setTimeout(() => update({ sentence: text }, { typed: true }), TYPING_MS);
    }
  });
  byId("filters").addEventListener("change", () => update(readFilters()));
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("clear-filters").addEventListener("click", clearFilters);
  byId("draw").addEventListener("change", ({ target }) => {
    if (target.value === "masks" && !hasMasks()) return update({ draw: "masks" });
    state = { ...state, draw: target.value };
    history.replaceState(null, "", `#${toHash(state)}`); // the hits stay the same
    showDrawing();
  });
  byId("zoom").addEventListener("change", ({ target }) => update({ zoom: target.checked }));
  byId("gallery").addEventListener("change", ({ target }) => {
    update({ gallery: target.value, terms: [] });
  });
  byId("next").addEventListener("click", () => run({ next: true }));
  byId("skip").addEventListener("click", (event) => {
    event.preventDefault(); // following the link would replace the search, which is behind "#"
    sentence.focus();
  });
  byId("home").addEventListener("click", (event) => {
    event.preventDefault();
    upload = null;
    clearTimeout(typing);
    sentence.value = "";
    update({ ...EMPTY_STATE, gallery: state.gallery, draw: state.draw, zoom: state.zoom });
    sentence.focus();
  });
  window.addEventListener("popstate", () => {
    const { gallery, ...rest } = fromHash(location.hash);
    state = { ...rest, gallery: gallery || state.gallery };
    clearTimeout(typing);
    inField = null; // what was typed belongs to the search that the user has left
    run();
  });
  document.addEventListener("keydown", onKey);
  listenForPhotos({
    localize: (file) => setUpload({ file, box: null }),
    gallery: () => state.gallery,
    added: updateCounts,
  });
}

/** Keyboard shortcuts of the page; the viewer has its own. */
function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("viewer").open) return;
  const writing = event.target.matches("input, textarea, select");
  if (event.key === "/" && !writing) {
    event.preventDefault();
    byId("sentence").select();
  } else if (event.key === "ArrowDown" && event.target === byId("sentence")) {
    byId("grid").querySelector(".open")?.focus();
  } else if (!writing) {
    const id = event.target.closest(".card")?.dataset.instance;
    const hit = shown.hits.find((each) => each.instance_id === id);
    if (moveFocus(byId("grid"), event.key)) event.preventDefault();
    else if (hit && event.key === "m") more(hit);
    else if (hit && event.key === "n") not(hit);
  }
}

listen();
start();
