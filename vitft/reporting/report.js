const data = JSON.parse(document.getElementById("data").textContent);
const make = (name, text) => { const one = document.createElement(name); if (text !== undefined) one.textContent = text; return one; };
const percent = (value) => `${(100 * value).toFixed(1)}\u00a0%`;

const count = (number, name) => `${number.toLocaleString("en")} ${name}${number === 1 ? "" : "s"}`;

const look = document.getElementById("look"), looking = () => look?.checked;
look?.addEventListener("change", () => {
  for (const picture of document.querySelectorAll("img[data-number]")) {
    const image = data.images[picture.dataset.number];
    picture.src = looking() && image.look ? image.look : image.src;
  }
});

function figure(number, about) {
  const image = data.images[number], item = make("li"), picture = make("img");
  const truth = data.classes[image.truth], said = data.classes[image.said];
  picture.addEventListener("load", () => { picture.style.imageRendering = picture.naturalWidth < 48 ? "pixelated" : ""; });
  picture.src = looking() && image.look ? image.look : image.src;
  picture.dataset.number = number;
  picture.alt = said === undefined ? truth : image.truth === image.said ? `${truth}, found` : `${truth}, taken for ${said}`;
  item.append(picture);
  if (about === "training") item.append(make("b", truth));
  else if (about === "label") item.append(make("b", truth), ` wrong with ${percent(image.wrong)}`, make("br"), `looks like ${data.classes[image.likely]}`);
  else {
    item.append(make("b", said), ` ${percent(image.sure)}`);
    if (image.truth !== image.said) item.append(make("br"), `is ${truth}`);
  }
  const name = make("div", image.name); name.className = "soft"; item.append(name);
  return item;
}

const FIRST = 18;
for (const list of document.querySelectorAll("ul[data-images]")) {
  const numbers = JSON.parse(list.dataset.images), rest = numbers.slice(FIRST);
  const figures = (some) => some.map((number) => figure(number, list.dataset.about));
  list.append(...figures(numbers.slice(0, FIRST)));
  if (!rest.length) continue;
  const button = make("button", `Show ${count(rest.length, "more image")}`);
  button.type = "button"; button.className = "open";
  button.addEventListener("click", () => { list.append(...figures(rest)); button.remove(); });
  list.after(button);
}

const dialog = document.querySelector("dialog");
for (const button of document.querySelectorAll("[data-cell]"))
  button.addEventListener("click", () => {
    const cell = button.dataset.cell, [truth, said] = cell.split(",").map(Number), shown = data.cells[cell] || [];
    dialog.querySelector("h2").textContent = data.classes[truth] + (truth === said ? ", found" : `, taken for ${data.classes[said]}`);
    const all = Number(button.dataset.count);
    dialog.querySelector("p").textContent = count(all, "image") + (shown.length < all ? `, ${shown.length} of them shown` : "");
    dialog.querySelector("ul").replaceChildren(...shown.map((number) => figure(number, "answer")));
    dialog.showModal();
  });

// Of the confusion matrix, Tab stops at one number; arrow keys go to the next one in their direction.
const cells = [...document.querySelectorAll(".matrix button")];
for (const [number, cell] of cells.entries()) {
  cell.tabIndex = number ? -1 : 0;
  cell.addEventListener("keydown", (event) => {
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
    let row = cell.closest("tr"), column = cell.parentNode.cellIndex, next;
    while ((down || right) && !next) {
      if (down) row = down > 0 ? row.nextElementSibling : row.previousElementSibling;
      column += right;
      if (!row?.cells[column]) return;
      next = row.cells[column].querySelector("button");
    }
    if (!next) return;
    event.preventDefault();
    next.focus();
  });
  cell.addEventListener("focus", () => { for (const other of cells) other.tabIndex = other === cell ? 0 : -1; });
}
dialog.querySelector("button").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

for (const button of document.querySelectorAll(".sorts th button"))
  button.addEventListener("click", () => {
    const head = button.closest("th"), table = head.closest("table"), column = [...head.parentNode.children].indexOf(head);
    const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down === 1 ? "ascending" : "descending");
    const key = (row) => row.children[column].dataset.value ?? row.children[column].textContent;
    const compare = (a, b) => { const x = key(a), y = key(b);
      return down * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y); };
    table.tBodies[0].replaceChildren(...[...table.tBodies[0].rows].sort(compare));
  });
