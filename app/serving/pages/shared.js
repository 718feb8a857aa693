// As in app/datasets/overlay.py: vivid, and far apart from one another.
const PALETTE = [
  [0, 150, 255], [255, 140, 0], [60, 220, 60], [255, 60, 170], [255, 230, 0], [0, 225, 225],
  [190, 110, 255], [255, 70, 50], [170, 255, 160], [255, 190, 210], [150, 120, 30],
  [120, 150, 255],
];

const MARKS = { like: [60, 220, 60], unlike: [255, 70, 50] }; // colors of the boxes drawn

const FINEST = 600; // cells of a mask's longer side that its outline on the screen is made of

const CLICK = 5; // CSS pixels that a pointer may move in a click

const COMMAS = /[,，、،]/;

const $ = (id) => document.getElementById(id);

/** Return an element with attributes (a function is a listener) and children, never HTML. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// ---- masks ---------------------------------------------------------------------------------

/** Return where runs of set pixels start and end, in turn, down the columns of a COCO RLE. */
function toBounds({ counts }) {
  const runs = [], bounds = [];
  let at = 0, place = 0;
  while (at < counts.length) {
    let run = 0, shift = 0, digit; // five bits a character: an image of 2^27 pixels takes six
    do {
      digit = counts.charCodeAt(at++) - 48;
      run |= (digit & 31) << shift;
      shift += 5;
    } while (digit & 32);
    if (digit & 16) run |= -1 << shift;
    if (runs.length > 2) run += runs[runs.length - 2];
    runs.push(run);
    bounds.push(place += run);
  }
  bounds.length -= bounds.length % 2;
  return bounds;
}

/** Return how many pixels are set. */
function areaOf(bounds) {
  let area = 0;
  for (let i = 0; i < bounds.length; i += 2) area += bounds[i + 1] - bounds[i];
  return area;
}

/** Return whether a pixel, numbered down the columns, is set. */
function isSet(bounds, pixel) {
  let low = 0, high = bounds.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (bounds[middle] <= pixel) low = middle + 1; else high = middle;
  }
  return low % 2 === 1;
}

/** Call `visit(x, top, bottom)` for each piece of a run, which lies in one column. */
function eachColumn(bounds, height, visit) {
  for (let i = 0; i < bounds.length; i += 2) {
    for (let at = bounds[i]; at < bounds[i + 1];) {
      const x = Math.floor(at / height), stop = Math.min(bounds[i + 1], (x + 1) * height);
      visit(x, at - x * height, stop - x * height);
      at = stop;
    }
  }
}

/** Return the part of a mask that holds its pixels, every `step`-th of them.
 *
 * `cells` has a border of one empty cell, so that a ring needs no checks.
 */
function toGrid(bounds, height, most) {
  let left = Infinity, right = 0, top = Infinity, bottom = 0;
  eachColumn(bounds, height, (x, first, stop) => {
    left = Math.min(left, x); right = Math.max(right, x + 1);
    top = Math.min(top, first); bottom = Math.max(bottom, stop);
  });
  const step = Math.max(1, Math.ceil(Math.max(right - left, bottom - top) / most));
  const stride = Math.ceil((right - left) / step) + 2, rows = Math.ceil((bottom - top) / step) + 2;
  const cells = new Uint8Array(stride * rows);
  eachColumn(bounds, height, (x, first, stop) => {
    if ((x - left) % step) return;
    const column = (x - left) / step + 1;
    for (let row = Math.ceil((first - top) / step); row * step < stop - top; row++) {
      cells[(row + 1) * stride + column] = 1;
    }
  });
  return { cells, stride, rows, left, top, step };
}

/** Return the rings around a mask, along its pixels' edges: corners [x, y, x, y, …] each.
 *
 * The mask lies to the right of each edge; where two pixels touch at a corner, a ring turns right,
 * so that parts share sides. Holes are rings too: fill by the even-odd rule.
 */
function trace({ cells, stride, rows, left, top, step }) {
  const DX = [1, 0, -1, 0], DY = [0, 1, 0, -1]; // right, down, left, up
  const ahead = [0, -1, -1 - stride, -stride], beside = [-stride, 0, -1, -1 - stride];
  const seen = new Uint8Array(cells.length), rings = []; // seen: upper edges that a ring has passed
  for (let y = 1; y < rows - 1; y++) {
    for (let x = 1; x < stride - 1; x++) {
      const cell = y * stride + x;
      if (!cells[cell] || cells[cell - stride] || seen[cell]) continue;
      const ring = [];
      let px = x, py = y, heading = 0;
      do {
        ring.push(left + (px - 1) * step, top + (py - 1) * step);
        let turn = 0;
        while (turn === 0) {
          if (heading === 0) seen[py * stride + px] = 1;
          px += DX[heading]; py += DY[heading];
          const corner = py * stride + px;
          turn = !cells[corner + ahead[heading]] ? 1 : cells[corner + beside[heading]] ? 3 : 0;
        }
        heading = (heading + turn) % 4;
      } while (px !== x || py !== y || heading !== 0);
      rings.push(ring);
    }
  }
  return rings;
}

/** Return a path along rings whose corners are cut by `cut` pixels: stairs become slopes. */
function toPath(rings, cut) {
  const path = new Path2D();
  for (const ring of rings) {
    for (let i = 0; i < ring.length; i += 2) {
      const x = ring[i], y = ring[i + 1], before = (i || ring.length) - 2;
      const after = (i + 2) % ring.length;
      const toward = (other) =>
        [x + cut * Math.sign(ring[other] - x), y + cut * Math.sign(ring[other + 1] - y)];
      if (i === 0) path.moveTo(...toward(before)); else path.lineTo(...toward(before));
      path.lineTo(...toward(after));
    }
    path.closePath();
  }
  return path;
}

function load(name) {
  try { return sessionStorage.getItem(name) ?? ""; } catch { return ""; }
}

const css = ([red, green, blue]) => `rgb(${red} ${green} ${blue})`;

/** Return black or white, whichever stands out from a color. */
const edgeOf = ([red, green, blue]) =>
  0.299 * red + 0.587 * green + 0.114 * blue > 110 ? "#000" : "#fff";

function say(text) {
  $("spoken").textContent = text;
}

/** A failure in the server's own words: a sentence, and problems with a remedy each. */
class Failure extends Error {
  constructor(sentence, problems = [], status = 0, answer = null) {
    super(sentence);
    Object.assign(this, { problems, status, answer }); // status 0: there was no answer
  }
}

const access = { key: load("sam3-key") };

/** Return what the server answers, as JSON, a blob or a stream; ask for a key if it wants one. */
async function call(path, { blob = false, stream = false, ...options } = {}) {
  const headers = { ...options.headers };
  if (access.key) headers.Authorization = `Bearer ${access.key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server does not answer.", [
      { remedy: "See whether it still runs and whether you are connected, then try again." },
    ]);
  }
  if (response.status === 401) {
    await askKey(access.key !== "");
    return call(path, { blob, stream, ...options });
  }
  if (response.ok && blob) return response.blob();
  if (response.ok && stream) return response.body;
  const answer = await response.json().catch((error) => {
    if (error.name === "AbortError") throw error;
    return null;
  });
  if (response.ok && answer) return answer;
  const sentence = `The server answered ${response.status} ${response.statusText}`.trim();
  throw new Failure(answer?.error ?? sentence, answer?.problems ?? [], response.status, answer);
}

let keyAsked = null; // two requests at once ask for one key

function askKey(refused) {
  keyAsked ??= new Promise((resolve, reject) => {
    $("key-why").textContent = refused
      ? "The server refused that key. Ask whoever runs it."
      : "Ask whoever runs it. It is kept until this tab is closed.";
    $("key-value").value = "";
    $("key").showModal();
    $("key").onclose = () => {
      keyAsked = null;
      if ($("key").returnValue === "") {
        const remedy = "Ask whoever runs it for one, then try again.";
        reject(new Failure("This server answers with a key alone.", [{ remedy }]));
        return;
      }
      access.key = $("key").returnValue;
      try { sessionStorage.setItem("sam3-key", access.key); } catch { /* kept until a reload */ }
      resolve();
    };
  });
  return keyAsked;
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

/** Show a failure, and a way to try again where there is one; a page has its own `subject`. */
function fail(error, again) {
  const list = make("ul");
  for (const { field = "", message, remedy } of error.problems ?? []) {
    const parts = [message, remedy].filter((part) => part && part !== error.message);
    const text = `${subject(field)}${parts.join("; ")}.`;
    if (parts.length) list.append(make("li", {}, field ? text : capital(text)));
  }
  const children = [make("b", { dir: "auto" }, error.message)];
  if (list.children.length) children.push(list);
  if (again) children.push(make("button", { type: "button", click: again }, "Try again"));
  $("problem").replaceChildren(...children);
  $("problem").hidden = false;
}

/** Return whether something that asks the server has succeeded; show why not. */
async function attempt(task) {
  try {
    await task();
    $("problem").hidden = true;
    return true;
  } catch (error) {
    fail(error, () => attempt(task));
    return false;
  }
}

/** Return a point of an image, in its pixels, from an event's over its canvas. */
function pointIn(canvas, { width, height }, event) {
  const area = canvas.getBoundingClientRect();
  const clamp = (value, most) => Math.max(0, Math.min(most, value));
  return {
    x: clamp(((event.clientX - area.left) / area.width) * width, width),
    y: clamp(((event.clientY - area.top) / area.height) * height, height),
  };
}

/** Draw a path so that it is seen on any ground; `line` is a CSS pixel, as are the lengths. */
function strokeOn(context, line, path, color, thick, dash = []) {
  context.setLineDash(dash.map((part) => part * line));
  for (const [style, extra] of [[edgeOf(color), 2], [css(color), 0]]) {
    context.strokeStyle = style;
    context.lineWidth = (thick + extra) * line;
    context.stroke(path);
  }
  context.setLineDash([]);
}

/** Draw + or − at a box's corner: the color alone does not tell. */
function badge(context, [x, y], like, color, line) {
  const side = 16 * line;
  context.fillStyle = css(color);
  context.fillRect(x, y, side, side);
  context.fillStyle = edgeOf(color);
  context.fillRect(x + side * 0.2, y + side * 0.43, side * 0.6, side * 0.14);
  if (like) context.fillRect(x + side * 0.43, y + side * 0.2, side * 0.14, side * 0.6);
}

/** Return the box between two points, in whole pixels. */
function boxOf(one, other) {
  const left = Math.floor(Math.min(one.x, other.x)), right = Math.ceil(Math.max(one.x, other.x));
  const top = Math.floor(Math.min(one.y, other.y)), bottom = Math.ceil(Math.max(one.y, other.y));
  return [left, top, right - left, bottom - top];
}

const STEPS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };

function iou([x, y, w, h], [left, top, width, height]) {
  const across = Math.min(x + w, left + width) - Math.max(x, left);
  const down = Math.min(y + h, top + height) - Math.max(y, top);
  const common = Math.max(0, across) * Math.max(0, down);
  return common / Math.max(w * h + width * height - common, 1e-9);
}

$("key").querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  $("key").close($("key-value").value);
});
$("key-cancel").addEventListener("click", () => $("key").close(""));
$("key").addEventListener("cancel", () => { $("key").returnValue = ""; });
