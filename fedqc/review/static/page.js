// The review page: the worklist, one case in NiiVue, and what a person decides. Everything is asked of the
// server that sent this page; a decision counts as made once the server has it on disk.

import { attach, overlay } from "/static/drawing.js";
import { ask, enter, send } from "/static/loopback.js";

const library = import("/static/niivue.js"); // large, and the list is there without it

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
const SHOWN_FROM = 25; // per cent from which an error is drawn
const WHOLE = [0, 0, 0, 1]; // where the planes are moved to in mm, and how much they are enlarged
const MOST_ENLARGED = 8;
const CROSS_WIDTH = 0.4; // per cent, as long as nothing is enlarged

let overview = null;
let filter = "all";
let sought = "";
let current = null; // number of the case that is wanted
let shown = null; // what the server said of the case on the screen; decisions are about this one
let modality = null;
let errorMap = "errors"; // or that of a class, errors-CLASS
let drawn = []; // what is on the screen of it
let placed = null; // number of the case whose worst place was gone to
let opening = 0; // counts, so that a slow case does not appear after a faster one
let ready = new Map(); // by address, a promise of the volume: of this case and the next
let saving = Promise.resolve(); // one decision after the other
const failures = new Map(); // by number, why a decision about a case is not saved
const drafts = new Map(); // by number, a reason that was begun
let viewer = null; // once there is something to be drawn
let attached = null; // a promise of it

// --------------------------------------------------------------------------------------------- the list

function wanted() {
  return overview.cases
    .map((one, number) => ({ ...one, number }))
    .filter((one) => FILTERS[filter][1](one) && one.id.toLowerCase().includes(sought));
}

function drawFilters() {
  for (const button of $("filters").children) {
    const [label, matches] = FILTERS[button.dataset.name];
    button.textContent = `${label} ${overview.cases.filter(matches).length}`;
    button.setAttribute("aria-pressed", String(button.dataset.name === filter));
  }
}

function makeFilters() {
  for (const name of Object.keys(FILTERS)) {
    const button = document.createElement("button");
    button.dataset.name = name;
    button.addEventListener("click", () => {
      filter = name;
      drawFilters();
      drawList();
    });
    $("filters").append(button);
  }
}

function fillLine(button, one) {
  const [id, outcome, what, who] = button.children;
  id.textContent = one.id;
  outcome.className = `outcome ${one.outcome}`;
  outcome.textContent = OUTCOMES[one.outcome];
  what.textContent = one.stars === null ? `predicted DSC ${one.quality.toFixed(3)}` : `${one.stars.toFixed(1)} stars`;
  who.textContent = failures.has(one.number) ? "not saved" : one.overruled ? `by ${one.overruled.by}` : "";
  button.setAttribute("aria-current", String(one.number === current));
}

function line(one) {
  const button = document.createElement("button");
  button.dataset.number = one.number;
  for (const name of ["id", "outcome", "what", "what"]) {
    const part = document.createElement("span");
    part.className = name;
    button.append(part);
  }
  fillLine(button, one);
  const item = document.createElement("li");
  item.append(button);
  return item;
}

function drawList() {
  $("cases").replaceChildren(...wanted().map(line));
  drawProgress();
}

function drawProgress() {
  const decided = overview.cases.filter((one) => one.overruled !== null).length;
  $("progress").textContent = `${decided} of ${overview.cases.length} decided by a person`;
}

const lineOf = (number) => $("cases").querySelector(`button[data-number="${number}"]`);

function markCurrent() {
  for (const button of $("cases").querySelectorAll("[aria-current=true]")) button.setAttribute("aria-current", "false");
  const button = lineOf(current);
  button?.setAttribute("aria-current", "true");
  button?.scrollIntoView({ block: "nearest" });
}

// The next or previous one of those in the list, also from a case that has left it.
function neighbour(by) {
  const numbers = wanted().map((one) => one.number);
  return by > 0 ? numbers.find((number) => number > current) : numbers.findLast((number) => number < current);
}

function step(by) {
  const number = neighbour(by);
  if (number !== undefined) open(number);
}

// --------------------------------------------------------------------------------------------- one case

async function open(number) {
  const mine = ++opening;
  if (shown && $("reason").value !== (shown.overruled?.reason ?? "")) drafts.set(shown.number, $("reason").value);
  current = number;
  markCurrent();
  allowDecisions(false);
  say(failures.get(number) ?? "", failures.has(number));
  try {
    const found = await ask(`/api/cases/${number}`);
    if (mine !== opening) return;
    $("viewer").style.visibility = "hidden"; // nobody shall see one patient under another's name
    shown = found;
    drawCase();
    await drawVolumes(mine);
    const next = neighbour(1);
    if (mine === opening && next !== undefined) prepare(next);
  } catch (error) {
    if (mine === opening) say(error.message, true);
  }
}

function allowDecisions(may) {
  for (const id of ["keep", "drop"]) $(id).disabled = !may;
  $("rule").disabled = !may || !shown?.overruled;
}

function drawCase() {
  $("name").textContent = shown.id;
  const by = shown.overruled;
  const verdict = document.createElement("span");
  verdict.className = `outcome ${shown.outcome}`;
  verdict.textContent = OUTCOMES[shown.outcome];
  const why = by ? ` by ${by.by}, ${by.when.slice(0, 16).replace("T", " ")}; the rule: ${shown.reason}` : `: ${shown.reason}`;
  $("verdict").replaceChildren(verdict, why);
  $("diagnosis").textContent = shown.diagnosis ?? "";
  const facts = [];
  if (shown.stars === null) facts.push(["predicted DSC", shown.quality.toFixed(3)]);
  else facts.push(["stars, of 6", shown.stars.toFixed(1)]);
  if (shown.interval) facts.push(["expected", shown.interval.map((end) => end.toFixed(2)).join(" to ")]);
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
  $("reason").value = drafts.get(shown.number) ?? by?.reason ?? "";
  for (const choice of ["keep", "drop"]) {
    $(choice).setAttribute("aria-pressed", String(Boolean(by) && by.decision === choice));
  }
  modality = modalityOf(shown);
  offer("modality", modalities(shown).map((name) => [name, name]), modality);
  const maps = errorMaps(shown);
  offer("error-map", maps.map((name) => [name, name.slice("errors-".length) || "all classes"]), errorMapOf(shown));
  $("error-map").parentElement.hidden = maps.length < 2;
  $("errors-opacity").disabled = maps.length === 0;
  $("no-errors").hidden = maps.length > 0;
}

function offer(id, choices, chosen) {
  $(id).replaceChildren(
    ...choices.map(([value, text]) => {
      const option = document.createElement("option");
      option.value = value;
      option.textContent = text;
      option.selected = value === chosen;
      return option;
    }),
  );
}

// Each in a file of its own, or all in one file, which is called image.
function modalities(found) {
  const images = found.volumes.filter((one) => one.kind === "image").map((one) => one.name);
  return images.length === 1 && images[0] === "image" ? overview.modalities : images;
}

const errorMaps = (found) => found.volumes.filter((one) => one.kind === "errors").map((one) => one.name);

// What is chosen, as far as the case has it.
const modalityOf = (found) => (modalities(found).includes(modality) ? modality : modalities(found)[0] ?? null);
const errorMapOf = (found) => (errorMaps(found).includes(errorMap) ? errorMap : errorMaps(found)[0] ?? null);

// ------------------------------------------------------------------------------------------- the viewer

async function start() {
  const { DRAG_MODE, Niivue, SLICE_TYPE } = await library;
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done))); // what is there already is seen first
  const niivue = new Niivue({
    show3Dcrosshair: false,
    isColorbar: false,
    loadingText: "",
    crosshairColor: [0.3, 0.75, 1, 1],
    crosshairWidth: CROSS_WIDTH,
    crosshairWidthUnit: "percent",
    crosshairGap: 3,
    multiplanarPadPixels: 4,
    isRadiologicalConvention: true, // the patient's right is at the left, as radiologists see it
    sliceType: SLICE_TYPE.MULTIPLANAR,
    multiplanarShowRender: 0, // three planes, no rendering
    mouseEventConfig: {
      leftButton: { primary: DRAG_MODE.crosshair, withShift: DRAG_MODE.pan },
      rightButton: DRAG_MODE.contrast,
      centerButton: DRAG_MODE.pan,
    },
    dragAndDropEnabled: false,
    logLevel: "error",
  });
  niivue.onLocationChange = tellPlace;
  await attach(niivue, $("viewer"));
  viewer = niivue;
}

function tellPlace({ string, vox: [x, y, z] }) {
  if (!viewer?.back) return;
  const [, nx, ny] = viewer.back.dimsRAS;
  const at = x + nx * (y + ny * z);
  const name = overview.classes[partOf("label")?.values?.[at] - 1]?.name ?? "";
  const error = partOf("errors")?.values?.[at];
  $("place").textContent = [string, name, error ? `error ${error} %` : ""].filter(Boolean).join(" ");
}

// ------------------------------------------------------------------------------------------ the volumes

// The volumes of a case that are to be shown, by name, as promises; those of no other case are kept.
function volumesOf(found) {
  const shownNames = ["image", modalityOf(found), "label", errorMapOf(found)];
  const result = new Map();
  for (const one of found.volumes.filter(({ name }) => shownNames.includes(name))) {
    const address = `/api/cases/${found.number}/volumes/${one.file}?${found.seen}`;
    if (!ready.has(address)) ready.set(address, load(one, address));
    result.set(one.name, [address, ready.get(address)]);
  }
  return result;
}

// An image as the viewer wants it; of a label and of errors only what is drawn of them, and where.
async function load({ name, kind, file }, address) {
  const content = await (await send(address)).arrayBuffer();
  const { NVImage } = await library;
  const volume = await NVImage.loadFromUrl({ url: content, name: file, colormap: "gray" });
  if (kind === "image") return { name, kind, volume };
  const values = kind === "label" ? classesOf(volume) : volume.img2RAS();
  const [, ...sides] = volume.dimsRAS;
  const voxel = middle(values, sides, kind === "errors" ? 50 : 1);
  return { name, kind, values, worst: voxel && volume.vox2mm(voxel, volume.matRAS) };
}

// Numbers of the classes from 1 on, whatever type of numbers the file has.
function classesOf(volume) {
  const numbers = new Map(overview.classes.flatMap(({ values }, at) => values.map((value) => [value, at + 1])));
  const table = new Uint8Array(Math.max(...numbers.keys()) + 1);
  for (const [value, number] of numbers) table[value] = number;
  const [slope, inter] = [volume.hdr.scl_slope || 1, volume.hdr.scl_inter || 0];
  const values = volume.img2RAS();
  const classes = new Uint8Array(values.length);
  for (let at = 0; at < classes.length; at++) classes[at] = table[Math.round(values[at] * slope + inter)] ?? 0;
  return classes;
}

async function drawVolumes(mine) {
  $("loading").textContent = "opening the files";
  $("loading").hidden = false;
  const wantedNow = volumesOf(shown);
  const names = [...wantedNow.keys()];
  const settled = await Promise.allSettled([...wantedNow.values()].map(([, volume]) => volume));
  await (attached ??= start());
  if (mine !== opening) return;
  const failed = names.filter((_, index) => settled[index].status === "rejected");
  drawn = settled.filter((one) => one.status === "fulfilled").map((one) => one.value);
  for (const name of failed) ready.delete(wantedNow.get(name)[0]);
  const kept = new Set([...wantedNow.values()].map(([address]) => address));
  ready = new Map([...ready].filter(([address]) => kept.has(address)));
  const place = shown.volumes.some((one) => one.name === "image") ? overview.modalities.indexOf(modality) : 0;
  const image = partOf("image")?.volume;
  const why = settled.filter((one) => one.status === "rejected").map((one) => one.reason.message);
  for (const one of drawn.filter(({ values }) => image && values && values.length !== image.nVox3D)) {
    failed.push(one.name);
    why.push("its grid is not the image's");
    one.values = null;
  }
  if (image) {
    if (image.nFrame4D > 1) image.frame4D = Math.max(0, Math.min(place, image.nFrame4D - 1));
    viewer.volumes = [image];
    viewer.back = image;
    viewer.overlays = [image]; // there is something over it: not a volume of the viewer's, but the colours
    if (placed !== shown.number) goToWorst();
    placed = shown.number;
    colour();
    viewer.updateGLVolume();
    $("viewer").style.visibility = "visible";
  }
  $("loading").hidden = failed.length === 0;
  if (failed.length > 0) {
    $("loading").textContent = `not shown: ${failed.join(", ")} (${why[0]})`;
  }
  allowDecisions(true);
  document.body.dataset.ready = String(shown.number); // for whoever waits for it
}

async function prepare(number) {
  try {
    for (const [, volume] of volumesOf(await ask(`/api/cases/${number}`)).values()) await volume;
  } catch {
    // it is said when the case is opened
  }
}

const partOf = (kind) => drawn.find((one) => one.kind === kind);

// The label as an area, or as contours alone, which hide nothing of the image; the errors over it.
function colour() {
  const nothing = new Uint8Array(viewer.back.nVox3D);
  overlay(viewer, partOf("label")?.values ?? nothing, partOf("errors")?.values ?? nothing, {
    colors: overview.classes.map((one) => one.color),
    opacity: Number($("label-opacity").value),
    isContour: $("outline").checked,
    errorColor: ERRORS,
    errorOpacity: Number($("errors-opacity").value),
    from: SHOWN_FROM,
  });
}

let isLooking = false;

function look() {
  if (isLooking) return;
  isLooking = true;
  requestAnimationFrame(() => {
    isLooking = false;
    if (!viewer?.back) return;
    colour();
    viewer.drawScene();
  });
}

// The cross goes to the middle of what is marked as wrong in the plane that has most of it; else to the label's.
function goToWorst() {
  if (viewer.scene.pan2Dxyzmm[3] !== 1) viewer.setCrosshairWidth(CROSS_WIDTH);
  viewer.scene.pan2Dxyzmm = [...WHOLE];
  const worst = partOf("errors")?.worst ?? partOf("label")?.worst;
  if (worst) viewer.scene.crosshairPos = viewer.mm2frac(worst, 0, true);
}

// The cross stays where it is on the screen.
function enlarge(factor) {
  if (!viewer?.back) return;
  const [x, y, z, before] = viewer.scene.pan2Dxyzmm;
  const after = Math.min(MOST_ENLARGED, Math.max(1, before * factor));
  const cross = viewer.frac2mm(viewer.scene.crosshairPos);
  const moved = [x, y, z].map((one, axis) => one + (before - after) * cross[axis]);
  viewer.setCrosshairWidth(CROSS_WIDTH / after);
  viewer.setPan2Dxyzmm(after === 1 ? [...WHOLE] : [...moved, after]);
}

function onWheel(event) {
  if (!event.ctrlKey) return; // two fingers on a touchpad come as Ctrl, too
  event.preventDefault();
  event.stopImmediatePropagation();
  enlarge(Math.exp(-Math.sign(event.deltaY) * 0.15));
}

function middle(values, [nx, ny, nz], least) {
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
  return [Math.round(sumX / counts[z]), Math.round(sumY / counts[z]), z];
}

function toggle(id, usual) {
  const range = $(id);
  if (range.disabled) return;
  range.value = Number(range.value) > 0 ? 0 : usual;
  look();
}

function resetWindow() {
  const image = viewer?.volumes[0];
  if (!image) return;
  [image.cal_min, image.cal_max] = [image.robust_min, image.robust_max];
  viewer.updateGLVolume();
}

// -------------------------------------------------------------------------------------------- decisions

function say(text, failed = false) {
  $("saved").textContent = text;
  $("saved").className = failed ? "failed" : "";
}

function decide(choice) {
  if ($("keep").disabled || (choice === null && $("rule").disabled)) return;
  const { number, seen, id } = shown;
  const body = JSON.stringify({ choice, reason: $("reason").value.trim(), seen });
  say("saving");
  saving = saving.then(() => save(number, id, body, choice));
}

async function save(number, id, body, choice) {
  try {
    const headers = { "Content-Type": "application/json" };
    const found = await ask(`/api/cases/${number}/decision`, { method: "POST", headers, body });
    Object.assign(overview.cases[number], { outcome: found.outcome, overruled: found.overruled, gain: found.gain });
    failures.delete(number);
    drafts.delete(number);
    if (number === shown?.number && number === current) {
      shown = found;
      drawCase();
      allowDecisions(true);
      say(choice ? `saved: ${OUTCOMES[choice]}` : "saved: as the rule says");
    }
  } catch (error) {
    const why = `not saved: ${id}: ${error.message}`;
    failures.set(number, why);
    say(why, true);
  }
  drawFilters();
  drawProgress();
  const button = lineOf(number);
  if (button) fillLine(button, { ...overview.cases[number], number });
}

// ------------------------------------------------------------------------------------------------ begin

const KEYS = {
  k: () => decide("keep"),
  d: () => decide("drop"),
  u: () => decide(null),
  n: () => step(1),
  arrowright: () => step(1),
  p: () => step(-1),
  arrowleft: () => step(-1),
  l: () => toggle("label-opacity", 0.45),
  e: () => toggle("errors-opacity", 0.6),
  o: () => $("outline").click(),
  w: resetWindow,
  c: () => nextErrorMap(),
  "+": () => enlarge(1.25),
  "-": () => enlarge(0.8),
  0: () => enlarge(0),
  escape: () => document.activeElement?.blur(),
};

function show() {
  if (shown && shown.number === current) drawVolumes(++opening).catch((error) => say(error.message, true));
}

function nextErrorMap() {
  const choices = $("error-map");
  if (choices.options.length < 2) return;
  choices.selectedIndex = (choices.selectedIndex + 1) % choices.options.length;
  choices.dispatchEvent(new Event("change"));
}

// Before NiiVue, which has keys of its own.
function onKey(event) {
  const { tagName, type } = event.target;
  const key = event.key.toLowerCase();
  const isText = tagName === "TEXTAREA" || (tagName === "INPUT" && type === "search");
  const isArrow = key.startsWith("arrow") && (type === "range" || tagName === "SELECT");
  if ((isText && key !== "escape") || isArrow || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target === $("viewer")) event.stopImmediatePropagation();
  const act = KEYS[key];
  if (!act) return;
  event.preventDefault();
  if (!event.repeat) act();
}

function listen() {
  window.addEventListener("keydown", onKey, { capture: true });
  $("viewer").addEventListener("wheel", onWheel, { capture: true });
  $("viewer").focus = () => {}; // so that scrolling leaves the focus where somebody types
  $("cases").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) open(Number(button.dataset.number));
  });
  for (const [id, choice] of [["keep", "keep"], ["drop", "drop"], ["rule", null]]) {
    $(id).addEventListener("click", () => decide(choice));
  }
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  for (const id of ["label-opacity", "errors-opacity"]) $(id).addEventListener("input", look);
  $("outline").addEventListener("change", (event) => {
    look();
    event.target.blur();
  });
  $("window").addEventListener("click", resetWindow);
  $("sought").addEventListener("input", (event) => {
    sought = event.target.value.trim().toLowerCase();
    drawList();
  });
  $("modality").addEventListener("change", (event) => {
    modality = event.target.value;
    event.target.blur();
    show();
  });
  $("error-map").addEventListener("change", (event) => {
    errorMap = event.target.value;
    event.target.blur();
    show();
  });
}

function drawHead() {
  const run = overview;
  document.title = `fedqc review: ${run.site}`;
  $("site").textContent = run.site;
  $("run").textContent = `${run.federation}, ${run.created.slice(0, 10)}, ${run.method}, rule ${run.rule}`;
  $("by").textContent = `${run.by} decides`;
  const drawn = `${run.cases.length} cases drawn at random: keep those whose label you vouch for`;
  const notes = [...(run.is_pick ? [drawn] : []), ...(run.suspended ? [`Nothing was dropped: ${run.suspended}.`] : []), ...run.warnings];
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
  await enter();
  overview = await ask("/api/worklist");
  drawHead();
  makeFilters();
  drawFilters();
  drawList();
  listen();
  if (overview.cases.length > 0) await open(0);
  else say("this site has no candidates");
}

begin().catch((error) => say(error.message, true));
