"use strict";
const AT_ONCE = 4, SHOWN = 5, FAINT = 0.005, MOST = 50, SIDE = 208;
const get = (id) => document.getElementById(id);
const make = (name, kind, text) => {
  const one = document.createElement(name);
  if (kind) one.className = kind;
  if (text !== undefined) one.textContent = text;
  return one;
};
const percent = (value) => `${(100 * value).toFixed(1)} %`;
const count = (number, name) => `${number.toLocaleString("en")} ${name}${number === 1 ? "" : "s"}`;
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
const pause = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

let model = { labels: [], limits: { upload_bytes: Infinity }, threshold: null, none_of_these: null };
const loaded = (async () => {
  const answer = await fetch("model");
  if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
  model = await answer.json();
  document.title = get("name").textContent = model.model;
  const [height, width] = model.image_size, facts = [count(model.labels.length, "class").replace(/classs$/, "classes")];
  facts.push(`${height} × ${width} pixels`);
  for (const split of ["test", "validation"])
    if (model.scores && model.scores[split]) {
      const score = model.scores[split];
      facts.push(`${percent(score.accuracy)} of ${score.count.toLocaleString("en")} ${split} images are right`);
      break;
    }
  if (model.threshold !== null) facts.push(`unsure below ${percent(model.threshold)}`);
  if (model.none_of_these !== null) facts.push("says what is none of its classes");
  if (model.calibrated) facts.push("calibrated");
  get("about").textContent = facts.join(" · ");
})();
loaded.catch((error) => { get("about").textContent = `The server cannot be reached: ${error.message}`; });
get("curl").textContent = `curl -F file=@photo.jpg ${new URL("predict?top_k=3", location.href)}`;

const line = [];
let busy = 0;
const tally = { done: 0, failed: 0, waiting: 0 };

function report() {
  const parts = [];
  if (tally.waiting) parts.push(`${count(tally.waiting, "photo")} waiting`);
  if (tally.done) parts.push(`${count(tally.done, "photo")} classified`);
  if (tally.failed) parts.push(`${tally.failed.toLocaleString("en")} failed`);
  get("status").textContent = parts.join(", ");
  get("hint").hidden = !tally.done;
  get("clear").hidden = !get("results").children.length;
}

function add(files) {
  const newest = get("results").firstChild;
  for (const file of files) {
    const item = make("li", "photo waiting"), picture = make("div", "picture"), said = make("div", "said");
    const name = make("div", "name", file.name || "pasted photo");
    const head = make("div", "head");
    name.title = name.textContent;
    head.append(name);
    said.append(head);
    item.append(picture, said);
    get("results").insertBefore(item, newest);
    line.push({ file, item, picture, said });
    tally.waiting += 1;
  }
  report();
  while (busy < AT_ONCE && line.length) work();
}

async function work() {
  busy += 1;
  while (line.length) {
    const job = line.shift();
    const shown = preview(job);
    try {
      show(job, await ask(job.file));
      if (job.item.isConnected) tally.done += 1;
    } catch (error) {
      job.said.append(make("p", "wrong", error.message));
      if (job.item.isConnected) tally.failed += 1;
    }
    job.item.classList.remove("waiting");
    if (job.item.isConnected) tally.waiting -= 1;
    report();
    await shown;
  }
  busy -= 1;
}

async function preview({ file, picture }) {
  try {
    const whole = await createImageBitmap(file), scale = Math.min(1, SIDE / Math.max(whole.width, whole.height));
    const canvas = make("canvas"), larger = SIDE / 2 / Math.max(whole.width, whole.height);
    canvas.width = Math.max(1, Math.round(whole.width * scale));
    canvas.height = Math.max(1, Math.round(whole.height * scale));
    canvas.style.width = `${Math.round(whole.width * larger)}px`;
    if (larger > 1) canvas.className = "small";
    canvas.getContext("2d").drawImage(whole, 0, 0, canvas.width, canvas.height);
    whole.close();
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", file.name || "pasted photo");
    picture.append(canvas);
  } catch {
    picture.textContent = "no preview";
  }
}

async function ask(file) {
  await loaded.catch(() => {});
  if (file.size > model.limits.upload_bytes)
    throw new Error(`It has ${megabytes(file.size)}; this server takes up to ${megabytes(model.limits.upload_bytes)}.`);
  const body = new FormData();
  body.append("file", file, file.name || "pasted photo");
  for (let attempt = 1; ; attempt += 1) {
    let answer, document;
    try {
      answer = await fetch(`predict?top_k=${Math.max(1, Math.min(MOST, model.labels.length))}`, { method: "POST", body });
      document = await answer.json();
    } catch {
      throw new Error("The server cannot be reached, or the file cannot be read.");
    }
    if (answer.ok) return document.predictions[0];
    if (answer.status !== 503 || attempt === 5) {
      const why = document.predictions ? `It ${document.predictions[0].error}.` : document.error;
      throw new Error(why);
    }
    await pause(Number(answer.headers.get("retry-after")) || 1);
  }
}

function row({ label, score }, first, isProbability) {
  const one = make("button", first ? "class first" : "class");
  one.type = "button";
  one.title = `what speaks for ${label}?`;
  one.dataset.label = label;
  one.setAttribute("aria-pressed", "false");
  one.append(make("span", "label", label), make("span", "number", isProbability ? percent(score) : score.toFixed(3)));
  if (isProbability) {
    const track = make("div", "track"), fill = make("span", "fill");
    fill.style.width = `${100 * score}%`;
    track.append(fill);
    if (first && model.threshold !== null) {
      const mark = make("span", "mark");
      mark.style.left = `calc(${100 * model.threshold}% - 1px)`;
      mark.title = `unsure below ${percent(model.threshold)}`;
      track.append(mark);
    }
    one.append(track);
  }
  return one;
}

function show(job, { top, unsure, novelty, none_of_these }) {
  const { item, said } = job;
  said.addEventListener("click", ({ target }) => {
    const pressed = target.closest("button.class");
    if (pressed) look(job, pressed);
  });
  const isProbability = top.every(({ score }) => score >= 0 && score <= 1);
  if (unsure || none_of_these) {
    item.classList.add("unsure");
    const chip = make("span", "chip", none_of_these ? "none of these" : "unsure");
    if (none_of_these) chip.title = `stranger than ${percent(novelty)} of the validation images`;
    said.firstChild.append(chip);
  }
  const shown = top.filter(({ score }, place) => place < 2 || (place < SHOWN && (score >= FAINT || !isProbability))).length;
  said.append(...top.slice(0, shown).map((one, place) => row(one, place === 0, isProbability)));
  if (top.length > shown) {
    const more = make("details", "more");
    more.append(make("summary", "", `${top.length - shown} more`));
    more.append(...top.slice(shown).map((one) => row(one, false, isProbability)));
    said.append(more);
  }
}

async function look(job, pressed) {
  const again = pressed.getAttribute("aria-pressed") === "true", turn = (job.turn ?? 0) + 1;
  job.turn = turn; // of several that were pressed meanwhile, the last one is answered
  for (const other of job.item.querySelectorAll(".class")) other.setAttribute("aria-pressed", "false");
  job.picture.querySelector(".look")?.remove();
  job.said.querySelector(".wrong")?.remove();
  if (again) return;
  pressed.setAttribute("aria-pressed", "true");
  const body = new FormData(), label = pressed.dataset.label;
  body.append("file", job.file, job.file.name || "pasted photo");
  try {
    const answer = await fetch(`explain?${new URLSearchParams({ label })}`, { method: "POST", body });
    if (!answer.ok) throw new Error((await answer.json()).error);
    const drawn = await createImageBitmap(await answer.blob());
    if (job.turn !== turn) return;
    const canvas = make("canvas", "look");
    canvas.width = drawn.width;
    canvas.height = drawn.height;
    canvas.getContext("2d").drawImage(drawn, 0, 0);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `what speaks for ${label}`);
    job.picture.append(canvas);
  } catch (error) {
    if (job.turn !== turn) return;
    pressed.setAttribute("aria-pressed", "false");
    job.said.append(make("p", "wrong", error.message));
  }
}

async function inside(entry) {
  if (entry.isFile) return new Promise((done) => entry.file((file) => done([file]), () => done([])));
  const reader = entry.createReader(), found = [];
  for (;;) {
    const part = await new Promise((done) => reader.readEntries(done, () => done([])));
    if (!part.length) return found;
    for (const one of part) found.push(...(await inside(one)));
  }
}

async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry && item.webkitGetAsEntry());
  if (!entries.some((entry) => entry && entry.isDirectory)) return [...transfer.files];
  const files = [];
  for (const entry of entries.filter(Boolean)) files.push(...(await inside(entry)));
  return files.filter((file) => !file.name.startsWith("."));
}

let depth = 0;
addEventListener("dragenter", (event) => { event.preventDefault(); depth += 1; get("drop").classList.add("over"); });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("dragleave", () => { depth -= 1; if (depth <= 0) get("drop").classList.remove("over"); });
addEventListener("drop", async (event) => {
  event.preventDefault();
  depth = 0;
  get("drop").classList.remove("over");
  add(await dropped(event.dataTransfer));
});
addEventListener("paste", (event) => add(event.clipboardData.files));
for (const id of ["files", "camera"])
  get(id).addEventListener("change", (event) => { add(event.target.files); event.target.value = ""; });
get("clear").addEventListener("click", () => {
  line.length = 0;
  Object.assign(tally, { done: 0, failed: 0, waiting: 0 });
  get("results").replaceChildren();
  report();
  get("files").focus();
});
