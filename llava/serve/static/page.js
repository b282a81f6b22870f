"use strict";
/* What the page does in the browser: sends the fields, reads the answers line by line, draws the tokens.
   Everything that a model said is put in as text, never as markup. */

const WAYS = 3; // all visual tokens, then two methods
const FATES = ["gone", "target", "merged", "rest", "dropped"];
const GONE = 0, TARGET = 1;
const VEIL = { merged: 0.62, rest: 0.72, dropped: 0.72, gone: 0.92 };
const RAMP = [[22, 11, 57], [120, 28, 109], [237, 105, 37], [252, 255, 164]];
const FIELDS = ["picture", "question", "share", "way0", "way1"];
const byId = (id) => document.getElementById(id);
const isNarrow = () => window.matchMedia("(max-width: 1000px)").matches; // as in page.css: the answers stand below

const state = {
  about: null,
  picture: null, // {send, name, known, image}: what is sent for it, and what is drawn
  turns: [], // of this conversation: {question, answers}
  running: null, // an AbortController
  views: [],
  pictures: [], // of the views, loaded
  shade: "fate",
};
const cards = [];

function element(kind, text, className) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

/* --- the fields --- */

function mistakes(found) {
  for (const field of FIELDS) {
    const place = byId(`mistake-${field}`);
    place.textContent = found[field] || "";
    place.hidden = !found[field];
    const input = byId(field === "picture" ? "file" : field);
    if (found[field]) input.setAttribute("aria-invalid", "true");
    else input.removeAttribute("aria-invalid");
  }
  const first = FIELDS.find((field) => found[field]);
  if (first && first !== "picture" && first !== "question") byId("settings").open = true;
}

function load(source) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("the browser cannot show this picture; give a PNG, JPEG or WebP file"));
    image.src = source;
  });
}

async function choosePicture(source, send, name, known) {
  const image = await load(source);
  state.picture = { send, name, known, image };
  byId("picture").src = source;
  byId("picture").hidden = false;
  byId("drop-hint").hidden = true;
  newConversation();
}

function chooseFile(file) {
  if (!file) return;
  const reader = new FileReader();
  reader.onload = async () => {
    try {
      await choosePicture(reader.result, reader.result, file.name, "");
      mistakes({});
      for (const button of byId("examples").querySelectorAll("button")) button.setAttribute("aria-pressed", "false");
    } catch (error) {
      mistakes({ picture: error.message });
    }
  };
  reader.readAsDataURL(file);
}

async function chooseExample(number) {
  const example = state.about.examples[number];
  await choosePicture(`example/${number}`, `example:${number}`, "", example.answer);
  state.picture.question = example.question;
  byId("question").value = example.question;
  byId("file").value = "";
  byId("examples").querySelectorAll("button").forEach((button, i) => {
    button.setAttribute("aria-pressed", String(i === number));
  });
  mistakes({});
}

function newConversation() {
  state.turns = [];
  byId("fresh").hidden = true;
}

function fields() {
  return {
    picture: state.picture && state.picture.send,
    name: state.picture && state.picture.name,
    question: byId("question").value,
    share: Number(byId("share").value),
    ways: [0, 1].map((i) => ({ choice: byId(`way${i}`).value, layers: byId(`layers${i}`).value.trim() })),
    turns: state.turns,
  };
}

/* --- what the server says --- */

async function send(path, heard) {
  const running = new AbortController();
  state.running = running;
  busy(true);
  mistakes({});
  try {
    const answer = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(fields()),
      signal: running.signal,
    });
    if (!answer.ok) {
      const said = await answer.json().catch(() => ({}));
      throw new Error((said.error && said.error.message) || `the server answers ${answer.status}`);
    }
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) await heard(JSON.parse(line));
    }
  } catch (error) {
    if (error.name !== "AbortError") mistakes({ question: error.message });
  } finally {
    state.running = null;
    busy(false);
  }
}

function busy(is) {
  byId("ask").disabled = byId("measure").disabled = is;
  byId("stop").hidden = !is;
  if (!is) byId("status").textContent = "";
}

async function begin(told, question) {
  state.views = told.views;
  state.pictures = await Promise.all(
    told.views.map((view) => {
      if (view.picture === null) return state.picture.image;
      return view.picture ? load(view.picture) : null;
    }),
  );
  mistakes(told.note ? { picture: `note: ${told.note}` } : {});
  cards.forEach((card, i) => startTurn(card, told.titles[i], question, state.turns.length === 0));
  showKnown(question);
}

function showKnown(question) {
  const known = state.picture.known && question === state.picture.question ? state.picture.known : "";
  byId("known").hidden = !known;
  byId("known").replaceChildren(element("strong", "The right answer: "), known);
  state.known = known;
}

async function hear(event, question) {
  if (event.error) mistakes({ [event.error.field]: event.error.message });
  if (event.begin) await begin(event.begin, question);
  if (event.text) {
    const [number, piece] = event.text;
    cards[number].answer.append(piece);
    byId("status").textContent = `answering: ${cards[number].title.textContent} …`;
  }
  if (event.done) finish(...event.done);
}

function ask() {
  const question = byId("question").value.trim();
  byId("status").textContent = "waiting for the model …";
  let done = 0;
  return send("ask", async (event) => {
    await hear(event, question);
    if (event.begin && isNarrow()) byId("cards").scrollIntoView();
    if (event.done) done += 1;
    if (done === WAYS) {
      done = 0;
      state.turns.push({ question, answers: cards.map((card) => card.text) });
      byId("fresh").hidden = false;
    }
  });
}

/* --- the cards --- */

function makeCard(number) {
  const root = element("article", undefined, "card");
  const card = { number, root, stages: [], place: 0, token: null, text: "" };
  card.title = element("h2", number ? "" : "all visual tokens");
  card.title.id = `title${number}`;
  root.setAttribute("aria-labelledby", card.title.id);
  card.how = element("p", "", "how");
  card.turns = element("div", undefined, "turns");
  root.append(card.title, card.how, card.turns);
  if (number) makeDrawing(card);
  card.figures = element("dl");
  root.append(card.figures);
  byId("cards").append(root);
  return card;
}

function makeDrawing(card) {
  card.drawing = element("div");
  card.drawing.hidden = true;
  card.canvas = element("canvas");
  const slide = element("div", undefined, "place");
  card.slider = element("input");
  Object.assign(card.slider, { type: "range", min: 0, step: 1, id: `place${card.number}` });
  card.label = element("label", "Place");
  card.label.htmlFor = card.slider.id;
  card.where = element("output");
  card.told = element("p", "", "token");
  slide.append(card.label, card.slider, card.where);
  card.drawing.append(card.canvas, slide, card.told);
  card.root.append(card.drawing);

  const canvas = card.canvas;
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "slider");
  canvas.setAttribute("aria-label", `Visual tokens, ${card.number === 1 ? "first" : "second"} method`);
  canvas.setAttribute("aria-valuemin", "0");
  card.slider.addEventListener("input", () => {
    card.place = Number(card.slider.value);
    show(card);
  });
  canvas.addEventListener("pointermove", (event) => choose(card, tokenAt(card, event)));
  canvas.addEventListener("pointerdown", (event) => choose(card, tokenAt(card, event)));
  canvas.addEventListener("pointerleave", () => choose(card, null));
  canvas.addEventListener("keydown", (event) => {
    const row = card.columns || 1;
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -row, ArrowDown: row };
    const count = card.stages[card.place].fate.length;
    let next = null;
    if (event.key in steps) next = (card.token === null ? -Math.min(1, steps[event.key]) : card.token) + steps[event.key];
    if (event.key === "Home") next = 0;
    if (event.key === "End") next = count - 1;
    if (next === null) return;
    event.preventDefault();
    choose(card, Math.max(0, Math.min(count - 1, next)));
  });
}

function startTurn(card, title, question, isNew) {
  for (const turn of card.turns.children) turn.classList.add("old");
  card.title.textContent = title.name;
  card.how.textContent = title.how;
  const turn = element("div", undefined, "turn");
  if (isNew && card.turns.children.length) turn.classList.add("new");
  card.answer = element("p", "", "answer");
  card.verdict = element("p", "", "verdict");
  turn.append(element("p", question, "asked"), card.answer, card.verdict);
  card.turns.append(turn);
}

function finish(number, done) {
  const card = cards[number];
  card.text = done.text;
  card.answer.replaceChildren(...(number ? marked(done.text, cards[0].text) : [done.text || "(nothing)"]));
  const same = done.text === cards[0].text;
  let verdict = number ? (same ? "the same answer" : "differs from all visual tokens") : "";
  if (state.known) {
    const right = done.text.trim().toLowerCase() === state.known.trim().toLowerCase();
    verdict = `${right ? "✓ right" : "✗ wrong"}${verdict ? `, ${verdict}` : ""}`;
    card.verdict.classList.add(right ? "right" : "wrong");
  }
  card.verdict.textContent = verdict;
  card.done = done;
  showFigures(card);
  if (!number) return;
  card.stages = done.stages;
  card.drawing.hidden = !done.stages.length;
  if (!done.stages.length) return;
  card.slider.max = done.stages.length - 1;
  card.place = Math.min(card.place, done.stages.length - 1);
  card.slider.value = card.place;
  card.slider.disabled = done.stages.length === 1;
  card.token = null;
  show(card);
}

/* The words of a text as nodes: marked where the other text has others, with the words that it lacks struck
   through. Equal words are those of the longest common sequence. */
function marked(text, other) {
  const ours = text.split(/\s+/).filter(Boolean), theirs = other.split(/\s+/).filter(Boolean);
  const longest = Array.from({ length: ours.length + 1 }, () => new Array(theirs.length + 1).fill(0));
  for (let i = ours.length - 1; i >= 0; i--) {
    for (let j = theirs.length - 1; j >= 0; j--) {
      longest[i][j] = ours[i] === theirs[j]
        ? longest[i + 1][j + 1] + 1
        : Math.max(longest[i + 1][j], longest[i][j + 1]);
    }
  }
  const nodes = [];
  for (let i = 0, j = 0; i < ours.length || j < theirs.length;) {
    if (i < ours.length && j < theirs.length && ours[i] === theirs[j]) {
      nodes.push(ours[i++], " ");
      j++;
    } else if (i < ours.length && (j === theirs.length || longest[i + 1][j] >= longest[i][j + 1])) {
      nodes.push(element("mark", ours[i++]), " ");
    } else {
      nodes.push(element("del", theirs[j++]), " ");
    }
  }
  return nodes.length ? nodes : ["(nothing)"];
}

function stagesOf(counts) {
  return counts.filter((count, i) => i === 0 || count !== counts[i - 1]).map((count) => count.toLocaleString("en"));
}

function percent(part, whole) {
  return `${(100 * part / whole).toFixed(part === whole ? 0 : 1)}%`;
}

function showFigures(card) {
  const { done } = card, plain = cards[0].done;
  const average = done.tokens.reduce((sum, count) => sum + count, 0) / done.tokens.length;
  const rows = [["tokens", stagesOf(done.tokens).join(" → ")]];
  if (card.number) {
    rows.push(["average", `${average.toFixed(1)} of ${plain.tokens[0].toLocaleString("en")} in a layer`]);
  }
  if (done.flops !== null) {
    const share = card.number ? ` (${percent(done.flops, plain.flops)})` : "";
    rows.push(["FLOPs", `${large(done.flops)}${share}`]);
  }
  if (done.cache !== null) {
    const share = card.number ? ` (${percent(done.cache, plain.cache)})` : "";
    rows.push(["KV cache", `${done.cache.toLocaleString("en")} bytes${share}`]);
  }
  card.figures.replaceChildren(...rows.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
}

function large(number) {
  const units = [[1e12, "T"], [1e9, "G"], [1e6, "M"]];
  const [unit, name] = units.find(([size]) => number >= size) || [1, ""];
  return `${(number / unit).toFixed(2)} ${name}`.trim();
}

/* --- the drawing --- */

/* Where each view is drawn: its frame holds the picture and all boxes. */
function layout(card) {
  const width = card.canvas.clientWidth || 300, gap = 8;
  const frames = state.views.map((view, i) => {
    const picture = state.pictures[i];
    let [left, top, right, bottom] = [0, 0, 1, 1];
    for (const box of view.boxes) {
      if (!box) continue;
      left = Math.min(left, box[0]); top = Math.min(top, box[1]);
      right = Math.max(right, box[2]); bottom = Math.max(bottom, box[3]);
    }
    const columns = new Set(view.boxes.filter(Boolean).map((box) => box[0])).size;
    const rows = new Set(view.boxes.filter(Boolean).map((box) => box[1])).size;
    const shape = picture ? picture.naturalWidth / picture.naturalHeight : columns / Math.max(1, rows);
    return { left, top, width: right - left, height: bottom - top, shape, columns, ratio: shape * (right - left) / (bottom - top) };
  });
  const inLine = Math.ceil(Math.sqrt(frames.length));
  let y = 0;
  for (let start = 0; start < frames.length; start += inLine) {
    const line = frames.slice(start, start + inLine);
    const room = width - gap * (line.length - 1);
    const height = Math.min(room / line.reduce((sum, frame) => sum + frame.ratio, 0), 1.25 * width);
    let x = 0;
    for (const frame of line) {
      Object.assign(frame, { x, y, height2: height, width2: height * frame.ratio });
      x += frame.width2 + gap;
    }
    y += height + gap;
  }
  return { frames, height: Math.max(1, y - gap), width };
}

function placed(frame, box) {
  const across = frame.width2 / frame.width, down = frame.height2 / frame.height;
  return [
    frame.x + (box[0] - frame.left) * across,
    frame.y + (box[1] - frame.top) * down,
    (box[2] - box[0]) * across,
    (box[3] - box[1]) * down,
  ];
}

function colours() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(["target", "merged", "rest", "dropped", "gone"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

function ramp(share) {
  const place = share * (RAMP.length - 1), k = Math.min(RAMP.length - 2, Math.floor(place));
  const mixed = RAMP[k].map((value, i) => Math.round(value + (RAMP[k + 1][i] - value) * (place - k)));
  return `rgb(${mixed.join(",")})`;
}

function show(card) {
  const stage = card.stages[card.place];
  if (!stage) return;
  const { frames, height, width } = layout(card), scale = window.devicePixelRatio || 1;
  card.canvas.width = Math.round(width * scale);
  card.canvas.height = Math.round(height * scale);
  card.canvas.style.height = `${height}px`;
  card.columns = frames[0].columns;
  const pen = card.canvas.getContext("2d");
  pen.scale(scale, scale);
  card.boxes = [];
  frames.forEach((frame, i) => {
    pen.fillStyle = "#808080";
    pen.fillRect(frame.x, frame.y, frame.width2, frame.height2);
    if (state.pictures[i]) {
      pen.imageSmoothingQuality = "high";
      pen.drawImage(state.pictures[i], ...placed(frame, [0, 0, 1, 1]));
    }
    for (const box of state.views[i].boxes) card.boxes.push(box && placed(frame, box));
  });
  if (state.shade === "heat") paintHeat(pen, card, stage);
  else paintFates(pen, card, stage);
  if (card.token !== null) paintToken(pen, card, stage);
  const where = `${stage.where}: ${stage.left.toLocaleString("en")} of ${stage.fate.length.toLocaleString("en")} tokens left`;
  card.where.textContent = where;
  card.slider.setAttribute("aria-valuetext", where);
  tell(card, stage);
}

function paintFates(pen, card, stage) {
  const colour = colours();
  const edge = (box) => Math.max(1, Math.min(2.5, box[2] / 7));
  card.boxes.forEach((box, i) => {
    const fate = FATES[stage.fate[i]];
    if (!box || fate === "target") return;
    pen.globalAlpha = VEIL[fate];
    pen.fillStyle = colour[fate];
    pen.fillRect(...box);
  });
  pen.globalAlpha = 1;
  card.boxes.forEach((box, i) => {
    if (!box || stage.fate[i] !== TARGET) return;
    const line = edge(box);
    pen.strokeStyle = colour.target;
    pen.lineWidth = line;
    pen.strokeRect(box[0] + line / 2, box[1] + line / 2, box[2] - line, box[3] - line);
  });
}

function paintHeat(pen, card, stage) {
  const known = stage.importance.filter((value) => value !== null);
  const ordered = Float64Array.from(known).sort();
  const below = (value) => {
    let low = 0, high = ordered.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (ordered[middle] < value) low = middle + 1;
      else high = middle;
    }
    return low / Math.max(1, ordered.length - 1);
  };
  card.boxes.forEach((box, i) => {
    if (!box) return;
    const value = stage.importance[i];
    pen.globalAlpha = value === null ? VEIL.gone : 0.78;
    pen.fillStyle = value === null ? "#000" : ramp(Math.min(1, below(value)));
    pen.fillRect(...box);
  });
  pen.globalAlpha = 1;
}

function paintToken(pen, card, stage) {
  const own = stage.interval && stage.interval[card.token] >= 0 ? stage.interval[card.token] : null;
  const outline = (box, colour, line) => {
    pen.strokeStyle = colour;
    pen.lineWidth = line;
    pen.strokeRect(box[0], box[1], box[2], box[3]);
  };
  if (own !== null) {
    card.boxes.forEach((box, i) => {
      if (!box || stage.interval[i] !== own) return;
      outline(box, "#000", 3.5);
      outline(box, "#fff", 1.5);
    });
  }
  const box = card.boxes[card.token], to = card.boxes[stage.slot[card.token]];
  if (!box) return;
  outline(box, "#000", 5);
  outline(box, "#fff", 2.5);
  if (!to || to === box) return;
  for (const [colour, line] of [["#000", 5], ["#fff", 2]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = line;
    pen.beginPath();
    pen.moveTo(box[0] + box[2] / 2, box[1] + box[3] / 2);
    pen.lineTo(to[0] + to[2] / 2, to[1] + to[3] / 2);
    pen.stroke();
  }
}

function tokenAt(card, event) {
  const frame = card.canvas.getBoundingClientRect();
  const x = event.clientX - frame.left, y = event.clientY - frame.top;
  const found = (card.boxes || []).findIndex(
    (box) => box && x >= box[0] && x < box[0] + box[2] && y >= box[1] && y < box[1] + box[3],
  );
  return found < 0 ? null : found;
}

function choose(card, token) {
  if (card.token === token) return;
  card.token = token;
  show(card);
}

function tell(card, stage) {
  const canvas = card.canvas;
  canvas.setAttribute("aria-valuemax", String(stage.fate.length - 1));
  canvas.setAttribute("aria-valuenow", String(card.token === null ? 0 : card.token));
  let text = "Point at a token, or use the arrow keys, to see its interval and where it went.";
  if (card.token !== null) {
    const i = card.token, fate = stage.fate[i];
    const weight = stage.weight[i] === null ? "" : `, ${percent(stage.weight[i], 1)} of it`;
    const ends = [
      "gone at an earlier place",
      `kept${weight ? `, itself ${percent(stage.weight[i], 1)} of what it became` : ""}`,
      `merged into token ${stage.slot[i]}${weight}`,
      `in the compensation token${weight}`,
      "dropped",
    ];
    text = `Token ${i}: ${ends[fate]}.`;
    if (fate !== GONE && stage.importance[i] !== null) text += ` Importance ${stage.importance[i]}.`;
    if (stage.interval && stage.interval[i] >= 0) {
      const size = stage.interval.filter((number) => number === stage.interval[i]).length;
      text += ` Interval ${stage.interval[i]}, of ${size} token${size > 1 ? "s" : ""}.`;
    }
  }
  card.told.textContent = text;
  canvas.setAttribute("aria-valuetext", text);
}

/* --- time --- */

function seconds(values) {
  const unit = values[0] < 1 ? [1000, "ms"] : [1, "s"];
  const shown = values.map((value) => (value * unit[0]).toPrecision(3));
  return `${shown[0]} ${unit[1]} (${shown[1]} to ${shown[2]})`;
}

function measure() {
  const note = byId("times-note");
  note.textContent = "measuring …";
  return send("time", async (event) => {
    if (event.error) mistakes({ [event.error.field]: event.error.message });
    if (event.round) note.textContent = `measuring, ${event.round[0]} of ${event.round[1]} runs …`;
    if (event.times) showTimes(event, note);
  }).then(() => {
    if (note.textContent.startsWith("measuring")) note.textContent = "stopped before it was measured";
  });
}

function showTimes(event, note) {
  const names = ["all visual tokens", ...[0, 1].map((i) => byId(`way${i}`).value)];
  const table = element("table"), head = element("tr");
  for (const name of ["", "to the first token", "of the time with all tokens"]) {
    const cell = element("th", name);
    cell.scope = "col";
    head.append(cell);
  }
  const body = element("tbody");
  event.times.forEach((one, i) => {
    const row = element("tr"), name = element("th", names[i]);
    name.scope = "row";
    const [median, low, high] = one.ratio.map((value) => value.toFixed(2));
    row.append(name, element("td", seconds(one.seconds)), element("td", i ? `${median} (${low} to ${high})` : "1"));
    body.append(row);
  });
  const top = element("thead");
  top.append(head);
  table.append(top, body);
  byId("times").replaceChildren(table);
  note.textContent = `Medians of ${event.rounds} rounds in which the three took turns, every other round backwards, after one that does not count; `
    + `in brackets where the true median lies with ${Math.round(100 * event.coverage)}%. Vision tower included.`;
}

/* --- the start --- */

function fillChoices(about) {
  [0, 1].forEach((i) => {
    const select = byId(`way${i}`);
    const groups = [["Methods, at the share above", about.methods], ["Rows of the tables, as they are", about.rows]];
    for (const [label, choices] of groups) {
      if (!choices.length) continue;
      const group = element("optgroup");
      group.label = label;
      for (const one of choices) group.append(new Option(one.name, one.name));
      select.append(group);
    }
    select.value = about.first[i];
    const describe = () => {
      const one = [...about.methods, ...about.rows].find((choice) => choice.name === select.value);
      byId(`about-way${i}`).textContent = one ? one.about : "";
      byId(`layers${i}`).disabled = about.rows.some((row) => row.name === select.value);
    };
    select.addEventListener("change", describe);
    describe();
  });
  const shares = () => { byId("share-shown").textContent = `${byId("share").value}%`; };
  byId("share").value = about.share;
  byId("share").addEventListener("input", shares);
  shares();
}

function fillExamples(about) {
  byId("examples-field").hidden = !about.examples.length;
  about.examples.forEach((example, i) => {
    const item = element("li"), button = element("button"), image = element("img");
    button.type = "button";
    button.setAttribute("aria-pressed", "false");
    image.src = `example/${i}`;
    image.alt = example.question;
    button.title = example.question;
    button.append(image);
    button.addEventListener("click", () => chooseExample(i));
    item.append(button);
    byId("examples").append(item);
  });
}

function listen() {
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!state.running) ask();
  });
  byId("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!state.running) ask();
  });
  byId("stop").addEventListener("click", () => state.running && state.running.abort());
  byId("fresh").addEventListener("click", newConversation);
  byId("measure").addEventListener("click", measure);
  byId("file").addEventListener("change", (event) => chooseFile(event.target.files[0]));
  for (const id of ["share", "way0", "way1", "layers0", "layers1"]) byId(id).addEventListener("change", newConversation);
  const drop = byId("drop");
  drop.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    chooseFile(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
    if (file) chooseFile(file);
  });
  for (const radio of document.querySelectorAll("input[name=shade]")) {
    radio.addEventListener("change", () => {
      state.shade = radio.value;
      byId("legend").classList.toggle("hot", state.shade === "heat");
      cards.forEach(show);
    });
  }
  new ResizeObserver(() => cards.forEach(show)).observe(byId("cards"));
}

async function start() {
  if (isNarrow()) byId("settings").open = false;
  for (let i = 0; i < WAYS; i++) cards.push(makeCard(i));
  const about = state.about = await (await fetch("start")).json();
  byId("model").textContent = `Model: ${about.model}, ${about.layers} layers.`;
  fillChoices(about);
  fillExamples(about);
  listen();
  if (!about.shown) {
    cards[1].title.textContent = about.first[0];
    cards[2].title.textContent = about.first[1];
    byId("status").textContent = "Choose a picture, write a question, and ask.";
    return;
  }
  await chooseExample(about.shown.example);
  const question = byId("question").value;
  for (const event of about.shown.events) await hear(event, question);
  byId("status").textContent = "";
}

start();
