// The page: one state, one request under way at a time, and who is told when it is answered.

import { call, photoForm } from "./api.js";
import { cards, moveFocus, skeletons } from "./cards.js";
import { remember, showChips } from "./chips.js";
import { announce, button, byId, make } from "./dom.js";
import { fillGalleries, readFilters, showFilters, showGallery } from "./filters.js";
import { showLocal } from "./local.js";
import * as notices from "./notices.js";
import {
  asksSomething, fromHash, NOTHING, numFilters, options, toHash, toRequest, withoutTerm, withTerm,
} from "./state.js";
import { uploadsInto } from "./uploads.js";
import { Viewer } from "./viewer.js";
import { count, degraded, timings } from "./words.js";

const TYPING_MS = 300;
const SLOW_MS = 2000;
const ENGLISH_ONLY = "This does not read like English, the only language that the model knows.";
const EVEN = 0.5; // below this presence, the object is more likely absent than present
const TITLE = document.title;
const NUM_BOXES = 5; // of a photo of the user's
const NUM_EXAMPLES = 6;
const LEAST_TYPED = 3; // characters of a sentence that is searched for while it is typed

let state = NOTHING;
let upload = null; // {file, box}: a photo of the user's; with a box, what is in it is searched for
let shown = { hits: [], cursor: "" };
let galleries = [];
let running = null; // AbortController of the request under way
let typing = null;

const more = (instance) => addTerm("more", instance);
const not = (instance) => addTerm("not", instance);
const viewer = new Viewer({
  more, not,
  removed: () => Promise.all([run(), countAgain()]),
  closed: (rank) => byId("grid").children[rank - 1]?.querySelector(".open")?.focus(),
});

/** Ask something else: show it, put it into the address, and answer it. */
function ask(changes, { typed = false } = {}) {
  clearTimeout(typing);
  state = { ...state, ...changes };
  const address = `#${toHash(state)}`;
  if (typed) history.replaceState(null, "", address);
  else if (address !== location.hash) history.pushState(null, "", address);
  return run();
}

function addTerm(kind, instance) {
  remember([instance]);
  ask(withTerm(state, kind, instance.instance_id));
}

const thisGallery = () => galleries.find((each) => each.name === state.gallery);

/** Bring the controls to what the state says. */
function showState() {
  document.title = state.sentence ? `${state.sentence} \u2013 REIR` : TITLE;
  const sentence = byId("sentence");
  if (sentence.value.trim() !== state.sentence) sentence.value = state.sentence;
  showFilters(state);
  showGallery(thisGallery());
  showChips(state, upload, {
    drop: (id) => ask(withoutTerm(state, id)),
    dropPhoto: () => bring(null),
  });
}

/** Answer the state, or the next page of it; a request under way is given up. */
async function run({ next = false } = {}) {
  running?.abort();
  const mine = running = new AbortController();
  if (!next) showState();
  notices.clear();
  const view = upload && !upload.box ? "local" : asksSomething(state) || upload ? "hits" : "start";
  document.body.dataset.view = view;
  if (view === "start") return showStart();
  if (view === "local" && !state.sentence) return showLocal(upload.file, null, {});
  const slow = setTimeout(notices.slow, SLOW_MS);
  busy(true, view === "hits" && !next);
  try {
    const answer = await request(view, next ? shown.cursor : "", mine.signal);
    notices.clear();
    if (view === "hits") showHits(answer, next);
    else showLocal(upload.file, answer, { similar: (box) => bring({ ...upload, box }) });
  } catch (error) {
    if (error.name !== "AbortError") fail(error, () => run({ next }), next);
  } finally {
    clearTimeout(slow);
    if (running === mine) busy(false);
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

function busy(is, first = false) {
  byId("results").setAttribute("aria-busy", String(is));
  byId("next").disabled = is;
  if (first && shown.hits.length === 0) byId("grid").replaceChildren(...skeletons(8));
}

/** Say what went wrong; hits stay where only their next page failed. */
function fail(error, retry, keepsHits = false) {
  if (!keepsHits) dropHits();
  notices.problem(error, retry);
}

function dropHits() {
  shown = { hits: [], cursor: "" };
  byId("grid").replaceChildren();
  byId("next").hidden = true;
  announce("");
}

function showStart() {
  dropHits();
  busy(false);
}

function showHits(answer, isNext) {
  const grid = byId("grid");
  const hadFocus = grid.contains(document.activeElement);
  const { hits } = answer;
  const before = isNext ? shown.hits : [];
  shown = { hits: [...before, ...hits], cursor: answer.cursor };
  remember(hits);
  const made = cards(hits, {
    first: before.length + 1, tied: answer.equally_good,
    on: { open: openViewer, more, not },
  });
  if (isNext) grid.append(...made);
  else grid.replaceChildren(...made);
  if (isNext || hadFocus) made[0]?.querySelector(".open").focus();
  byId("next").hidden = !answer.cursor;
  if (!isNext) showVerdict(answer);
  announce([summary(answer), degraded(answer.degraded)].filter(Boolean).join(" "));
}

function showVerdict(answer) {
  const disclose = (open) => {
    byId("grid").hidden = !open;
    byId("next").hidden = !open || !shown.cursor;
  };
  const absent = !answer.found && shown.hits.length > 0;
  byId("grid").classList.toggle("nearest", absent);
  disclose(!absent);
  if (absent) notices.notFound(`in \u201c${state.gallery}\u201d`, answer.presence, disclose);
  else if (shown.hits.length === 0) notices.empty(numFilters(state) > 0, dropFilters);
  else if (answer.equally_good > 1) notices.ambiguous(answer.equally_good);
}

function summary(answer) {
  const number = count(shown.hits.length, "hit");
  const rest = answer.cursor ? ", more below" : "";
  const isDoubtful = shown.hits.length > 0 && answer.presence !== null && answer.presence < EVEN;
  const doubt = isDoubtful ? ", but it may well not be there" : "";
  const found = answer.found || shown.hits.length === 0 ? number + rest + doubt : "Probably not there";
  const known = answer.english === false ? `${ENGLISH_ONLY} ` : "";
  return `${known}${found} \u00b7 ${timings(answer.timings_ms)}.`;
}

function dropFilters() {
  ask({ ...NOTHING, gallery: state.gallery, sentence: state.sentence, terms: state.terms });
}

function openViewer(rank) {
  const mayWrite = thisGallery()?.writable === true;
  viewer.open(shown.hits, rank, { gallery: state.gallery, mayWrite });
}

/** Look into a photo of the user's, search with a part of it, or (null) go back to the gallery. */
function bring(photo) {
  upload = photo;
  if (photo) byId("sentence").focus();
  run();
}

/** Ask again what the galleries hold, after photos came or went. */
async function countAgain() {
  try {
    galleries = (await call("v1/galleries")).galleries;
  } catch {
    return; // the old counts stay
  }
  showGallery(thisGallery());
}

/** Ask the server what it has; on trouble say so, and start again when asked to. */
async function start() {
  notices.clear();
  try {
    const [about, listed] = await Promise.all([call("v1/about"), call("v1/galleries")]);
    galleries = listed.galleries;
    const asked = fromHash(location.hash);
    state = { ...asked, gallery: fillGalleries(galleries, asked.gallery) };
    showExamples(about.examples ?? []);
    byId("release").textContent = `REIR ${about.release}, models compute in ${about.cpu_path} on the server.`;
    await run();
  } catch (error) {
    fail(error, start);
  }
}

function showExamples(sentences) {
  byId("examples").hidden = sentences.length === 0;
  byId("example-list").replaceChildren(...sentences.slice(0, NUM_EXAMPLES).map((text) =>
    make("li", {}, button({ click: () => ask({ sentence: text }) }, text))));
}

function listen() {
  const sentence = byId("sentence");
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask({ sentence: sentence.value.trim() });
  });
  sentence.addEventListener("input", () => {
    clearTimeout(typing);
    const text = sentence.value.trim();
    if (text.length >= LEAST_TYPED || text === "") {
      typing = setTimeout(() => ask({ sentence: text }, { typed: true }), TYPING_MS);
    }
  });
  byId("filters").addEventListener("change", () => ask(readFilters()));
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("drop-filters").addEventListener("click", dropFilters);
  byId("gallery").addEventListener("change", ({ target }) => {
    ask({ gallery: target.value, terms: [] });
  });
  byId("next").addEventListener("click", () => run({ next: true }));
  byId("skip").addEventListener("click", (event) => {
    event.preventDefault(); // the part of the address behind "#" is the search
    sentence.focus();
  });
  byId("home").addEventListener("click", (event) => {
    event.preventDefault();
    upload = null;
    ask({ ...NOTHING, gallery: state.gallery });
    sentence.focus();
  });
  window.addEventListener("popstate", () => {
    const { gallery, ...rest } = fromHash(location.hash);
    state = { ...rest, gallery: gallery || state.gallery };
    run();
  });
  document.addEventListener("keydown", pressed);
  uploadsInto({
    look: (file) => bring({ file, box: null }), gallery: () => state.gallery, added: countAgain,
  });
}

/** Keys of the page; the viewer has its own. */
function pressed(event) {
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
