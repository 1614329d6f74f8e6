// The review page: the worklist, one case in NiiVue, and what a person decides. Everything is asked of the
// server that sent this page; a decision counts as made once the server has it on disk.

import { Niivue, SLICE_TYPE } from "/static/niivue.js";

const $ = (id) => document.getElementById(id);
const FILTERS = {
  all: ["all", () => true],
  review: ["to decide", (one) => one.outcome === "review"],
  drop: ["dropped", (one) => one.outcome === "drop"],
  keep: ["kept", (one) => one.outcome === "keep"],
  decided: ["decided by a person", (one) => one.overruled !== null],
};
const OUTCOMES = { keep: "kept", drop: "dropped", review: "to decide" };
const ERRORS = "#D55E00";
const LABELS = 1002; // NIfTI's intent code of labels
const WHOLE_NUMBERS = new Set([2, 4, 256, 512]); // its types of voxels that labels have

let overview = null;
let filter = "all";
let current = null; // number of the case that is shown
let shown = null; // what the server said of it
let modality = null;
let opening = 0; // counts, so that a slow case does not appear after a faster one
const viewer = new Niivue({
  show3Dcrosshair: false,
  isColorbar: false,
  loadingText: "",
  crosshairColor: [0.3, 0.75, 1, 1],
  crosshairWidth: 0.4,
  crosshairWidthUnit: "percent",
  crosshairGap: 3,
  multiplanarPadPixels: 4,
  sliceType: SLICE_TYPE.MULTIPLANAR,
  multiplanarShowRender: 0, // three planes, no rendering
  dragAndDropEnabled: false,
  logLevel: "error",
});

async function ask(address, options) {
  const response = await fetch(address, options);
  const text = await response.text();
  let body;
  try {
    body = JSON.parse(text);
  } catch {
    body = { error: text };
  }
  if (!response.ok) throw new Error(body.error ?? response.statusText);
  return body;
}

// ------------------------------------------------------------------------------------------- the list

function wanted() {
  return overview.cases.map((one, number) => ({ ...one, number })).filter((one) => FILTERS[filter][1](one));
}

function drawFilters() {
  $("filters").replaceChildren(
    ...Object.entries(FILTERS).map(([name, [label, matches]]) => {
      const button = document.createElement("button");
      button.textContent = `${label} ${overview.cases.filter(matches).length}`;
      button.setAttribute("aria-pressed", String(name === filter));
      button.addEventListener("click", () => {
        filter = name;
        drawFilters();
        drawList();
      });
      return button;
    }),
  );
}

function line(one) {
  const button = document.createElement("button");
  button.dataset.number = one.number;
  const id = document.createElement("span");
  id.className = "id";
  id.textContent = one.id;
  const outcome = document.createElement("span");
  outcome.className = `outcome ${one.outcome}`;
  outcome.textContent = OUTCOMES[one.outcome];
  const what = document.createElement("span");
  what.className = "what";
  what.textContent = `predicted DSC ${one.quality.toFixed(3)}`;
  const who = document.createElement("span");
  who.className = "what";
  who.textContent = one.overruled ? `by ${one.overruled.by}` : "";
  button.append(id, outcome, what, who);
  button.setAttribute("aria-current", String(one.number === current));
  const item = document.createElement("li");
  item.append(button);
  return item;
}

function drawList() {
  $("cases").replaceChildren(...wanted().map(line));
  const decided = overview.cases.filter((one) => one.overruled !== null).length;
  $("progress").textContent = `${decided} of ${overview.cases.length} decided by a person`;
}

function markCurrent() {
  for (const button of $("cases").querySelectorAll("button")) {
    const isCurrent = Number(button.dataset.number) === current;
    button.setAttribute("aria-current", String(isCurrent));
    if (isCurrent) button.scrollIntoView({ block: "nearest" });
  }
}

function step(by) {
  const numbers = wanted().map((one) => one.number);
  if (numbers.length === 0) return;
  const place = numbers.indexOf(current);
  const at = place === -1 ? numbers.findIndex((number) => number > current) : place + by;
  open(numbers[Math.min(Math.max(at, 0), numbers.length - 1)]);
}

// ------------------------------------------------------------------------------------------- one case

async function open(number) {
  const mine = ++opening;
  current = number;
  markCurrent();
  $("saved").textContent = "";
  $("saved").className = "";
  try {
    const found = await ask(`/api/cases/${number}`);
    if (mine !== opening) return;
    shown = found;
    drawCase();
    await drawVolumes(mine);
  } catch (error) {
    if (mine === opening) say(error.message, true);
  }
}

function drawCase() {
  $("name").textContent = shown.id;
  const by = shown.overruled;
  const verdict = document.createElement("span");
  verdict.className = `outcome ${shown.outcome}`;
  verdict.textContent = OUTCOMES[shown.outcome];
  const why = by ? ` by ${by.by}, ${by.when.slice(0, 16).replace("T", " ")}; the rule: ${shown.reason}` : `: ${shown.reason}`;
  $("verdict").replaceChildren(verdict, why);
  const facts = [["predicted DSC", shown.quality.toFixed(3)]];
  if (shown.interval) facts.push(["expected", shown.interval.map((end) => end.toFixed(2)).join(" to ")]);
  if (shown.stars !== null) facts.push(["stars", shown.stars.toFixed(1)]);
  for (const [name, value] of Object.entries(shown.regions)) facts.push([name, value.toFixed(3)]);
  facts.push(["patient", shown.patient]);
  $("facts").replaceChildren(
    ...facts.flatMap(([name, value]) => {
      const term = document.createElement("dt");
      const text = document.createElement("dd");
      term.textContent = name;
      text.textContent = value;
      return [term, text];
    }),
  );
  $("reason").value = by ? by.reason : "";
  for (const choice of ["keep", "drop"]) {
    $(choice).setAttribute("aria-pressed", String(Boolean(by) && by.decision === choice));
  }
  $("rule").disabled = !by;
  const images = shown.volumes.filter((one) => !["label", "errors"].includes(one.name));
  if (!images.some((one) => one.name === modality)) modality = images[0]?.name ?? null;
  $("modality").replaceChildren(
    ...images.map((one) => {
      const option = document.createElement("option");
      option.value = option.textContent = one.name;
      option.selected = one.name === modality;
      return option;
    }),
  );
}

function rgb(color) {
  return [1, 3, 5].map((at) => Number.parseInt(color.slice(at, at + 2), 16));
}

function labelColors() {
  const colors = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: ["background"] };
  const byValue = overview.classes.flatMap((one) => one.values.map((value) => ({ ...one, value })));
  for (const one of byValue.sort((first, second) => first.value - second.value)) {
    const [red, green, blue] = rgb(one.color);
    colors.R.push(red);
    colors.G.push(green);
    colors.B.push(blue);
    colors.A.push(255);
    colors.I.push(one.value);
    colors.labels.push(one.name);
  }
  return colors;
}

async function drawVolumes(mine) {
  const files = Object.fromEntries(shown.volumes.map((one) => [one.name, one.file]));
  const address = (name) => ({ url: `/api/cases/${current}/volumes/${files[name]}`, name: files[name] });
  const list = [];
  if (modality) list.push({ ...address(modality), colormap: "gray" });
  if (files.label) list.push({ ...address("label"), opacity: labelOpacity() });
  if (files.errors) list.push({ ...address("errors"), colormap: "errors", opacity: errorsOpacity(), cal_min: 25, cal_max: 100 });
  $("loading").textContent = "opening the files";
  $("loading").hidden = false;
  await viewer.loadVolumes(list);
  if (mine !== opening) return;
  const label = volumeOf("label");
  if (label) {
    label.setColormapLabel(labelColors());
    if (WHOLE_NUMBERS.has(label.hdr.datatypeCode)) label.hdr.intent_code = LABELS; // contours are drawn of such only
  }
  goToWorst();
  drawLabel();
  $("loading").hidden = true;
  document.body.dataset.ready = String(current); // for whoever waits for it
}

const volumeOf = (name) => viewer.volumes.find((one) => one.name.startsWith(`${name}.nii`));
const labelOpacity = () => Number($("label-opacity").value);
const errorsOpacity = () => Number($("errors-opacity").value);

// The cross goes to the middle of what is marked as wrong in the plane that has most of it; else to the label's.
function goToWorst() {
  const errors = volumeOf("errors");
  const label = volumeOf("label");
  const place = (errors && middle(errors, 50)) ?? (label && middle(label, 1));
  if (!place) return;
  const [volume, voxel] = place;
  viewer.scene.crosshairPos = viewer.mm2frac(volume.vox2mm(voxel, volume.matRAS));
}

function middle(volume, least) {
  const [nx, ny, nz] = volume.dimsRAS.slice(1, 4);
  const values = volume.img2RAS();
  const counts = new Uint32Array(nz);
  for (let z = 0, at = 0; z < nz; z++) {
    for (let index = 0; index < nx * ny; index++, at++) if (values[at] >= least) counts[z]++;
  }
  const z = counts.reduce((best, count, index) => (count > counts[best] ? index : best), 0);
  if (counts[z] === 0) return null;
  let sumX = 0;
  let sumY = 0;
  for (let y = 0, at = z * nx * ny; y < ny; y++) {
    for (let x = 0; x < nx; x++, at++) {
      if (values[at] >= least) {
        sumX += x;
        sumY += y;
      }
    }
  }
  return [volume, [Math.round(sumX / counts[z]), Math.round(sumY / counts[z]), z]];
}

// As an area, or as contours alone, which hide nothing of the image.
function drawLabel() {
  const isContour = $("outline").checked && volumeOf("label")?.hdr.intent_code === LABELS;
  viewer.opts.atlasOutline = isContour ? labelOpacity() : 0;
  setOpacity("label", isContour ? 0.001 : labelOpacity());
  viewer.updateGLVolume();
}

function setOpacity(name, value) {
  const place = viewer.volumes.findIndex((one) => one.name.startsWith(`${name}.nii`));
  if (place !== -1) viewer.setOpacity(place, value);
}

function toggle(id, usual) {
  const range = $(id);
  range.value = Number(range.value) > 0 ? 0 : usual;
  range.dispatchEvent(new Event("input"));
}

function resetWindow() {
  const image = viewer.volumes[0];
  if (!image) return;
  [image.cal_min, image.cal_max] = [image.robust_min, image.robust_max];
  viewer.updateGLVolume();
}

// -------------------------------------------------------------------------------------------- decisions

function say(text, failed = false) {
  $("saved").textContent = text;
  $("saved").className = failed ? "failed" : "";
}

async function decide(decision) {
  const number = current;
  if (number === null) return;
  say("saving");
  try {
    const found = await ask(`/api/cases/${number}/decision`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ decision, reason: $("reason").value.trim() }),
    });
    Object.assign(overview.cases[number], { outcome: found.outcome, overruled: found.overruled, gain: found.gain });
    drawFilters();
    drawList();
    if (number === current) {
      shown = found;
      drawCase();
      markCurrent();
      say(decision ? `saved: ${OUTCOMES[decision]}` : "saved: as the rule says");
    }
  } catch (error) {
    say(`not saved: ${error.message}`, true);
  }
}

// ------------------------------------------------------------------------------------------------ begin

const KEYS = {
  k: () => decide("keep"),
  d: () => decide("drop"),
  u: () => $("rule").disabled || decide(null),
  n: () => step(1),
  ArrowRight: () => step(1),
  p: () => step(-1),
  ArrowLeft: () => step(-1),
  l: () => toggle("label-opacity", 0.45),
  e: () => toggle("errors-opacity", 0.6),
  o: () => $("outline").click(),
  w: resetWindow,
};

function listen() {
  document.addEventListener("keydown", (event) => {
    const isTyping = ["TEXTAREA", "SELECT", "INPUT"].includes(event.target.tagName) && event.target.type !== "range";
    if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
    const act = KEYS[event.key] ?? KEYS[event.key.toLowerCase()];
    if (!act) return;
    event.preventDefault();
    act();
  });
  $("cases").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) open(Number(button.dataset.number));
  });
  for (const [id, choice] of [["keep", "keep"], ["drop", "drop"], ["rule", null]]) {
    $(id).addEventListener("click", () => decide(choice));
  }
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("label-opacity").addEventListener("input", drawLabel);
  $("errors-opacity").addEventListener("input", () => setOpacity("errors", errorsOpacity()));
  $("outline").addEventListener("change", drawLabel);
  $("window").addEventListener("click", resetWindow);
  $("modality").addEventListener("change", (event) => {
    modality = event.target.value;
    drawVolumes(++opening).catch((error) => say(error.message, true));
  });
}

function drawHead() {
  const run = overview;
  document.title = `fedqc review: ${run.site}`;
  $("site").textContent = run.site;
  $("run").textContent = `${run.federation}, ${run.created.slice(0, 10)}, ${run.method}, rule ${run.rule}`;
  const notes = [...(run.suspended ? [`Nothing was dropped: ${run.suspended}.`] : []), ...run.warnings];
  $("warnings").replaceChildren(
    ...notes.map((text) => {
      const note = document.createElement("p");
      note.textContent = text;
      return note;
    }),
  );
  const marks = [...run.classes, { name: "probably wrong", color: ERRORS }];
  $("legend").replaceChildren(
    ...marks.map((one) => {
      const item = document.createElement("span");
      const mark = document.createElement("i");
      mark.style.background = one.color;
      item.append(mark, one.name);
      return item;
    }),
  );
}

async function begin() {
  const [red, green, blue] = rgb(ERRORS);
  viewer.addColormap("errors", { R: [red, red], G: [green, green], B: [blue, blue], A: [0, 255], I: [0, 255] });
  overview = await ask("/api/worklist");
  drawHead();
  drawFilters();
  drawList();
  listen();
  await viewer.attachToCanvas($("viewer"));
  if (overview.cases.length > 0) await open(0);
  else say("this site has no candidates");
}

begin().catch((error) => say(error.message, true));
