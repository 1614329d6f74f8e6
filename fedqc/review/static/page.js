// The review page: the worklist, one case in NiiVue, and what a person decides. Everything is asked of the
// server that sent this page; a decision counts as made once the server has it on disk.

import { ask, enter, send } from "/static/loopback.js";
import { Niivue, NVImage, SLICE_TYPE } from "/static/niivue.js";

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
const LABELS = 1002; // NIfTI's intent code of labels
const SMALL_WHOLE_NUMBERS = new Set([2, 4, 256, 512]); // its types of voxels that the viewer takes for labels
const INT16 = 4;

let overview = null;
let filter = "all";
let sought = "";
let current = null; // number of the case that is wanted
let shown = null; // what the server said of the case on the screen; decisions are about this one
let modality = null;
let opening = 0; // counts, so that a slow case does not appear after a faster one
let ready = new Map(); // by address, a promise of the volume: of this case and the next
let saving = Promise.resolve(); // one decision after the other
const failures = new Map(); // by number, why a decision about a case is not saved
const drafts = new Map(); // by number, a reason that was begun
const viewer = new Niivue({
  show3Dcrosshair: false,
  isColorbar: false,
  loadingText: "",
  crosshairColor: [0.3, 0.75, 1, 1],
  crosshairWidth: 0.4,
  crosshairWidthUnit: "percent",
  crosshairGap: 3,
  multiplanarPadPixels: 4,
  isRadiologicalConvention: true, // the patient's right is at the left, as radiologists see it
  sliceType: SLICE_TYPE.MULTIPLANAR,
  multiplanarShowRender: 0, // three planes, no rendering
  dragAndDropEnabled: false,
  logLevel: "error",
});

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
    if (mine === opening) prepareNext();
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
  const names = modalities(shown);
  if (!names.includes(modality)) modality = names[0] ?? null;
  $("modality").replaceChildren(
    ...names.map((name) => {
      const option = document.createElement("option");
      option.value = option.textContent = name;
      option.selected = name === modality;
      return option;
    }),
  );
  const hasErrors = shown.volumes.some((one) => one.name === "errors");
  $("errors-opacity").disabled = !hasErrors;
  $("no-errors").hidden = hasErrors;
}

// Each in a file of its own, or all in one file, which is called image.
function modalities(found) {
  const images = found.volumes.map((one) => one.name).filter((name) => !["label", "errors"].includes(name));
  return images.length === 1 && images[0] === "image" ? overview.modalities : images;
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

// ------------------------------------------------------------------------------------------ the volumes

const LOOK = {
  label: {},
  errors: { colormap: "errors", cal_min: SHOWN_FROM, cal_max: 100 },
};

// The volumes of a case that are to be shown, by name, as promises; those of no other case are kept.
function volumesOf(found) {
  const files = Object.fromEntries(found.volumes.map((one) => [one.name, one.file]));
  const image = "image" in files ? "image" : modality;
  const result = new Map();
  for (const name of [image, "label", "errors"]) {
    if (!(name in files)) continue;
    const address = `/api/cases/${found.number}/volumes/${files[name]}?${found.seen}`;
    if (!ready.has(address)) ready.set(address, load(name, files[name], address));
    result.set(name, [address, ready.get(address)]);
  }
  return result;
}

async function load(name, file, address) {
  const content = await (await send(address)).arrayBuffer();
  const volume = await NVImage.loadFromUrl({ url: content, name: file, colormap: "gray", ...LOOK[name] });
  if (name === "label") {
    asLabels(volume);
    volume.setColormapLabel(labelColors());
  }
  return volume;
}

// Contours and colours are those of whole numbers; labels also come as float or in long ones.
function asLabels(volume) {
  if (!SMALL_WHOLE_NUMBERS.has(volume.hdr.datatypeCode)) {
    const slope = volume.hdr.scl_slope || 1;
    volume.img = Int16Array.from(volume.img, (value) => Math.round(value * slope + volume.hdr.scl_inter));
    volume.hdr.datatypeCode = INT16;
    volume.hdr.numBitsPerVoxel = 16;
    volume.hdr.scl_slope = 1;
    volume.hdr.scl_inter = 0;
  }
  volume.hdr.intent_code = LABELS;
}

async function drawVolumes(mine) {
  $("loading").textContent = "opening the files";
  $("loading").hidden = false;
  const wantedNow = volumesOf(shown);
  const names = [...wantedNow.keys()];
  const settled = await Promise.allSettled([...wantedNow.values()].map(([, volume]) => volume));
  if (mine !== opening) return;
  const failed = names.filter((_, index) => settled[index].status === "rejected");
  const volumes = settled.filter((one) => one.status === "fulfilled").map((one) => one.value);
  for (const name of failed) ready.delete(wantedNow.get(name)[0]);
  const kept = new Set([...wantedNow.values()].map(([address]) => address));
  ready = new Map([...ready].filter(([address]) => kept.has(address)));
  const place = shown.volumes.some((one) => one.name === "image") ? overview.modalities.indexOf(modality) : 0;
  if (volumes[0] && volumes[0].nFrame4D > 1) volumes[0].frame4D = Math.max(0, Math.min(place, volumes[0].nFrame4D - 1));
  viewer.volumes = volumes;
  viewer.back = volumes[0] ?? null;
  viewer.overlays = volumes.slice(1);
  if (volumes.length > 0) {
    setLooks();
    viewer.updateGLVolume();
    goToWorst();
    viewer.drawScene();
    $("viewer").style.visibility = "visible";
  }
  $("loading").hidden = failed.length === 0;
  if (failed.length > 0) {
    const why = settled.find((one) => one.status === "rejected").reason.message;
    $("loading").textContent = `not shown: ${failed.join(", ")} (${why})`;
  }
  allowDecisions(true);
  document.body.dataset.ready = String(shown.number); // for whoever waits for it
}

async function prepareNext() {
  const number = neighbour(1);
  if (number === undefined) return;
  try {
    for (const [, volume] of volumesOf(await ask(`/api/cases/${number}`)).values()) await volume;
  } catch {
    // it is said when the case is opened
  }
}

const volumeOf = (name) => viewer.volumes.find((one) => one.name.startsWith(`${name}.nii`));
const labelOpacity = () => Number($("label-opacity").value);

// The label as an area, or as contours alone, which hide nothing of the image.
function setLooks() {
  const label = volumeOf("label");
  const isContour = $("outline").checked;
  viewer.opts.atlasOutline = isContour ? labelOpacity() : 0;
  if (label) label.opacity = isContour ? 0.001 : labelOpacity();
  const errors = volumeOf("errors");
  if (errors) errors.opacity = Number($("errors-opacity").value);
}

let isLooking = false;

function look() {
  if (isLooking) return;
  isLooking = true;
  requestAnimationFrame(() => {
    isLooking = false;
    setLooks();
    viewer.updateGLVolume();
  });
}

// The cross goes to the middle of what is marked as wrong in the plane that has most of it; else to the label's.
function goToWorst() {
  const errors = volumeOf("errors");
  const label = volumeOf("label");
  const place = (errors && middle(errors, 50)) ?? (label && middle(label, 1));
  if (!place) return;
  const [volume, voxel] = place;
  viewer.scene.crosshairPos = viewer.mm2frac(volume.vox2mm(voxel, volume.matRAS), 0, true);
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

function toggle(id, usual) {
  const range = $(id);
  if (range.disabled) return;
  range.value = Number(range.value) > 0 ? 0 : usual;
  look();
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
  escape: () => document.activeElement?.blur(),
};

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
    if (shown && shown.number === current) drawVolumes(++opening).catch((error) => say(error.message, true));
  });
  viewer.onLocationChange = (place) => {
    $("place").textContent = place.string;
  };
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
  const [red, green, blue] = rgb(ERRORS);
  viewer.addColormap("errors", { R: [red, red], G: [green, green], B: [blue, blue], A: [0, 255], I: [0, 255] });
  await viewer.attachToCanvas($("viewer"));
  if (overview.cases.length > 0) await open(0);
  else say("this site has no candidates");
}

begin().catch((error) => say(error.message, true));
