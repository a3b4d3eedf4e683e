// Elements without HTML strings: whatever a server or a file name holds, it is shown as text.

/**
 * Make an element. Text children become text nodes.
 * Attributes: functions are listeners ("click"), true is an empty attribute.
 * Children and attributes that are undefined, null or false are left out.
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  set(element, attributes);
  element.append(...children.filter(isGiven));
  return element;
}

/** The same within SVG. */
export function makeSvg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  set(element, attributes);
  element.append(...children);
  return element;
}

const isGiven = (value) => value !== undefined && value !== null && value !== false;

function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (isGiven(value)) element.setAttribute(name, String(value));
  }
}

/** Make a button that submits nothing. */
export const button = (attributes, ...children) =>
  make("button", { type: "button", ...attributes }, ...children);

/** The element of the page with an id. */
export const byId = (id) => document.getElementById(id);

/** A symbol of the sheet in index.html; decoration, so hidden from screen readers. */
export function icon(name) {
  return makeSvg("svg", { class: "icon", "aria-hidden": "true" },
    makeSvg("use", { href: `#icon-${name}` }));
}

/** Fill the page's live region; screen readers say it, others read it. */
export function announce(text) {
  byId("summary").textContent = text;
}
