// ---- films: the server follows them, the browser plays them, tracks are drawn above ---------

const FILMS = /\.(avi|m2ts|m4v|mkv|mov|mp4|mpe?g|mts|ts|webm|wmv)$/i;

const isFilm = (file) => file.type.startsWith("video/") || FILMS.test(file.name);

/** Show a film, and follow the words that are there. */
function takeFilm(file) {
  state.running?.abort();
  leaveFilm();
  if (state.image?.url) URL.revokeObjectURL(state.image.url);
  state.image = state.asked = null;
  state.boxes = [];
  arrange(0);
  listBoxes();
  const url = URL.createObjectURL(file);
  state.film = { file, name: file.name || "film.mp4", url, ...NEW_FILM() };
  $("player").src = url;
  $("film").hidden = false;
  $("empty").hidden = $("tools").hidden = true;
  $("problem").hidden = true;
  $("film-unplayed").hidden = true;
  $("file-label").textContent = "Another file";
  $("image-name").replaceChildren(make("bdi", { title: state.film.name }, state.film.name));
  listTracks();
  refresh();
  if (state.words.length) follow();
}

/** What is known of a film: what the server said first, frames, what it said last, and the words. */
const NEW_FILM = () => ({ info: null, frames: [], tracks: new Map(), end: null, asked: null });

function leaveFilm() {
  if (!state.film) return;
  $("player").removeAttribute("src");
  $("player").load(); // or it goes on to hold the file
  URL.revokeObjectURL(state.film.url);
  state.film = null;
  $("film").hidden = true;
  $("tools").hidden = false;
}

/** Return the body of the request, as the API and the programs shown have it. */
function filmQuestion() {
  const model = $("model").value, prompts = state.words.map((text) => ({ text }));
  return {
    ...(model && { model }), ...(prompts.length && { prompts }), threshold: state.threshold,
  };
}

/** Let the server follow the film; to stop, or to leave the page, ends that. */
async function follow() {
  takeWord();
  if (!state.models.length && !(await attempt(loadModels))) return;
  state.running?.abort();
  const running = state.running = new AbortController(), { film } = state;
  Object.assign(film, NEW_FILM(), { asked: JSON.stringify(filmQuestion()) });
  const body = new FormData();
  body.append("film", film.file, film.name);
  body.append("request", film.asked);
  listTracks();
  busy(true);
  try {
    const options = { method: "POST", body, signal: running.signal, stream: true };
    for await (const [name, value] of events(await call("/v1/follow", options))) {
      if (running !== state.running) return;
      takeEvent(film, name, value);
    }
    $("problem").hidden = true;
  } catch (error) {
    if (running === state.running && error.name !== "AbortError") fail(error, follow);
  } finally {
    if (running === state.running) {
      state.running = null;
      busy(false);
      listTracks();
      refresh();
    }
  }
}

/** Yield the name and the value of each server-sent event. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const [, name, data] = /^event: (.*)\ndata: (.*)$/.exec(part);
      yield [name, JSON.parse(data)];
    }
  }
}

function takeEvent(film, name, value) {
  if (name === "error") throw new Failure(value.error, value.problems);
  if (name === "film") {
    film.info = value;
    return;
  }
  if (name === "end") {
    film.end = value;
    for (const { track, prompt } of value.tracks) film.tracks.get(track).prompt = prompt;
    return;
  }
  film.frames.push(value);
  for (const { track, prompt } of value.found) {
    if (!film.tracks.has(track)) film.tracks.set(track, { prompt, first: value.time, count: 0 });
    film.tracks.get(track).count++;
  }
  const count = film.info.count ? ` of about ${film.info.count}` : "";
  $("status").replaceChildren(`Frame ${film.frames.length}${count}, ${counted(film.tracks.size)}.`);
  const player = $("player");
  if (player.paused && !player.seeking) player.currentTime = value.time; // it is seen as it comes
  listTracks();
}

const counted = (tracks) => `${tracks} track${tracks === 1 ? "" : "s"}`;

/** List the tracks; a click shows where one begins. */
function listTracks() {
  const tracks = [...(state.film?.tracks ?? [])];
  $("legend").replaceChildren();
  $("lists").replaceChildren(make("ul", { id: "tracks", class: "list", "aria-label": "Tracks" },
    ...tracks.map(([id, { prompt, first, count }]) => make("li", {},
      make("button", {
        type: "button",
        click: () => { $("player").pause(); $("player").currentTime = first; },
      }, trackSwatch(id), make("bdi", {}, `#${id} ${prompt}`),
      make("small", {}, `${count} frame${count === 1 ? "" : "s"}`))))));
}

const trackColor = (id) => PALETTE[(id - 1) % PALETTE.length];

function trackSwatch(id) {
  const element = make("span", { class: "swatch", "aria-hidden": "true" });
  element.style.background = css(trackColor(id));
  return element;
}

/** Return the frame that the player shows: the last one that is not after its time. */
function frameShown({ frames }) {
  const time = $("player").currentTime + 1e-3;
  let low = 0, high = frames.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (frames[middle].time <= time) low = middle + 1; else high = middle;
  }
  return frames[low - 1] ?? null;
}

/** Draw the tracks of the frame that is shown. */
function drawFilm() {
  const { film } = state, canvas = $("film-canvas"), player = $("player");
  if (!film) return;
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(player.clientWidth * ratio);
  canvas.height = Math.round(player.clientHeight * ratio);
  const frame = film.info && frameShown(film);
  if (!frame || !canvas.width) return;
  const { width, height } = film.info, context = canvas.getContext("2d");
  const scale = Math.min(canvas.width / width, canvas.height / height); // it is shown whole
  context.translate((canvas.width - width * scale) / 2, (canvas.height - height * scale) / 2);
  context.scale(scale, scale);
  context.lineJoin = "round";
  const line = ratio / scale; // one CSS pixel
  for (const one of frame.found) {
    const color = trackColor(one.track);
    one.path ??= pathOf(one, height);
    context.globalAlpha = 0.35;
    context.fillStyle = css(color);
    context.fill(one.path, "evenodd");
    context.globalAlpha = 1;
    strokeOn(context, line, one.path, color, 2);
  }
  context.font = `600 ${13 * line}px system-ui, sans-serif`;
  context.textBaseline = "top";
  for (const { track, box: [x, y] } of frame.found) {
    const text = `#${track} ${film.tracks.get(track).prompt}`, color = trackColor(track);
    const wide = context.measureText(text).width + 8 * line, high = 18 * line;
    const left = Math.max(0, Math.min(x, width - wide)), top = Math.max(0, y - high);
    context.fillStyle = css(color);
    context.fillRect(left, top, wide, high);
    context.fillStyle = edgeOf(color);
    context.fillText(text, left + 4 * line, top + 2.5 * line);
  }
}

function pathOf({ mask, box }, height) {
  const bounds = mask ? toBounds(mask) : [];
  if (bounds.length) {
    const grid = toGrid(bounds, height, FINEST);
    return toPath(trace(grid), grid.step / 2);
  }
  const path = new Path2D();
  path.rect(...box);
  return path;
}

/** Show what there is of a film: status, downloads, program. */
function refreshFilm() {
  const { film } = state, status = $("status");
  $("found-none").hidden = film.tracks.size > 0;
  $("found-none").textContent = film.frames.length ? "Nothing is followed."
    : "What is followed is listed here.";
  $("save-coco").disabled = !film.frames.length || Boolean(state.running);
  $("save-png").disabled = $("save-yolo").disabled = true;
  $("save-what").textContent = "All tracks with their masks, as COCO-VID.";
  drawTicks();
  drawFilm();
  program();
  if (state.running) return;
  if (!film.asked) {
    status.replaceChildren(state.words.length ? "Press Find." : "Say what to follow, press Find.");
  } else if (film.asked !== JSON.stringify(filmQuestion())) {
    status.replaceChildren("What to follow has changed: press Find.");
  } else {
    const frames = `${film.frames.length} frame${film.frames.length === 1 ? "" : "s"}`;
    const why = film.end?.ended ? ` It ended early: ${film.end.ended}.`
      : film.end ? "" : " It was stopped.";
    const broken = film.end?.broken ? ` ${film.end.broken} could not be decoded.` : "";
    status.replaceChildren(`${counted(film.tracks.size)} in ${frames}.${broken}${why}`);
  }
}

/** Save the tracks as COCO-VID, as `infer.sh` writes them. */
function saveTracks() {
  const { name, info, frames, tracks } = state.film, { width, height, fps, prompts } = info;
  const length = frames.at(-1).frame + 1, annotations = [];
  for (const { frame, found } of frames) {
    for (const { track, score, box, mask, interpolated } of found) {
      annotations.push({
        id: annotations.length + 1, image_id: frame + 1, video_id: 1, track_id: track,
        category_id: prompts.indexOf(tracks.get(track).prompt) + 1, bbox: box,
        area: mask ? areaOf(toBounds(mask)) : box[2] * box[3], iscrowd: 0, score,
        ...(mask && { segmentation: mask }), ...(interpolated && { interpolated }),
      });
    }
  }
  const content = {
    videos: [{ id: 1, name, width, height, fps, length }],
    categories: prompts.map((prompt, index) => ({ id: index + 1, name: prompt })),
    images: frames.map(({ frame, time }) => ({
      id: frame + 1, video_id: 1, frame_id: frame, time, width, height,
      file_name: `${String(frame).padStart(6, "0")}.png`,
    })),
    annotations,
  };
  const stem = name.replace(/\.[^.]*$/, "") || "film";
  save(JSON.stringify(content), `${stem}.tracks.json`, "application/json");
}

/** Return the program that asks the same, in the language that is chosen. */
function filmProgram(language) {
  const { name } = state.film, address = `${location.origin}/v1/follow`;
  const request = JSON.stringify(filmQuestion());
  if (language === "curl") {
    return [
      `curl --no-buffer ${address}`,
      ...(access.key ? ['--header "Authorization: Bearer $SAM3_API_KEY"'] : []),
      `--form ${quoted(`film=@"${name.replace(/["\\]/g, "\\$&")}"`)}`,
      `--form-string ${quoted(`request=${request}`)}`,
    ].join(" \\\n  ");
  }
  const key = access.key
    ? ['    headers={"Authorization": "Bearer " + os.environ["SAM3_API_KEY"]},'] : [];
  return [
    "import json", ...(access.key ? ["import os"] : []), "", "import requests", "",
    "response = requests.post(", `    "${address}",`, ...key,
    `    files={"film": open(${JSON.stringify(name)}, "rb")},`,
    `    data={"request": ${JSON.stringify(request)}},`, "    stream=True,", ")",
    "for line in response.iter_lines():", '    if line.startswith(b"data: "):',
    "        print(json.loads(line[6:]))", "",
  ].join("\n");
}

for (const name of ["timeupdate", "seeked", "loadeddata"]) {
  $("player").addEventListener(name, drawFilm);
}
$("player").addEventListener("error", () => {
  $("film-unplayed").hidden = !state.film; // its tracks are listed and saved all the same
});
$("player").addEventListener("play", function step() {
  drawFilm();
  if (!$("player").paused) requestAnimationFrame(step);
});
new ResizeObserver(drawFilm).observe($("player"));
window.addEventListener("pagehide", () => state.running?.abort());
