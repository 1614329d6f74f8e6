// The coordinator's live page: asks every two seconds how the run stands, and behind each phase for the report.

import { ask, enter, send } from "/static/loopback.js";

const $ = (id) => document.getElementById(id);
const EVERY = 2000; // milliseconds
let reported = null; // the phases that the report on the page is about

function text(tag, content, name = "") {
  const element = document.createElement(tag);
  element.textContent = content;
  if (name) element.className = name;
  return element;
}

function inWords(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

const shown = (value) => (typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(3) : value);

const since = (moment, now) => inWords((new Date(now) - new Date(moment)) / 1000);

function drawHead(run) {
  document.title = `fedqc: ${run.federation}`;
  $("name").textContent = run.federation;
  const begun = run.started ? `, begun ${since(run.started, run.now)} ago` : "";
  const why = run.reason ? `: ${run.reason}` : "";
  $("state").textContent = run.finished ? `${run.outcome}${why}` : `${run.outcome}${begun}`;
  $("state").className = run.outcome === "failed" ? "failed" : "";
  const phases = run.phase && !run.done.includes(run.phase) ? [...run.done, run.phase] : run.done;
  $("phases").replaceChildren(
    ...phases.map((phase) => text("li", phase, run.done.includes(phase) ? "done" : "now")),
  );
}

function drawTraining(run) {
  const training = run.training;
  $("rounds").hidden = !training;
  if (!training) {
    $("training").textContent = "No network is in training.";
  } else {
    const left = run.seconds_left === null ? "" : `, about ${inWords(run.seconds_left)} left of this training`;
    $("training").textContent = `${training.title}: ${training.done} of ${training.rounds} rounds are done${left}`;
    $("rounds").max = training.rounds;
    $("rounds").value = training.done;
  }
  const told = Object.values(run.trainings).map((one) => ({ ...one, losses: one.losses.filter((loss) => loss !== null) }));
  $("curves").replaceChildren(...told.filter((one) => one.losses.length > 1).map(curve));
}

function curve(training) {
  const { losses, rounds, title } = training;
  const [low, high] = [Math.min(...losses), Math.max(...losses)];
  const points = losses.map((loss, index) => {
    const x = (100 * index) / Math.max(1, rounds - 1);
    const y = 95 - (90 * (loss - low)) / Math.max(high - low, 1e-12);
    return `${x.toFixed(2)},${y.toFixed(2)}`;
  });
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 100 100");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `Loss of ${title}`);
  const line = document.createElementNS(space, "polyline");
  line.setAttribute("points", points.join(" "));
  svg.append(line);
  const figure = document.createElement("figure");
  const last = losses.at(-1).toPrecision(3);
  figure.append(svg, text("figcaption", `${title}: loss ${last} after ${losses.length} rounds, from ${high.toPrecision(3)} to ${low.toPrecision(3)}`));
  return figure;
}

function drawSites(run) {
  $("sites").replaceChildren(
    ...Object.entries(run.sites).map(([name, site]) => {
      const row = document.createElement("tr");
      const heard = site.seen ? `${since(site.seen, run.now)} ago` : "-";
      row.append(text("td", name), text("td", site.state, site.state), text("td", heard), text("td", site.what));
      return row;
    }),
  );
}

function drawEvents(run) {
  $("events").replaceChildren(
    ...run.events.toReversed().map((one) => {
      const item = document.createElement("li");
      const details = Object.entries(one.details).map(([key, value]) => `${key} ${shown(value)}`);
      item.append(text("time", (one.time ?? "").slice(11, 19)), `${one.event}${details.length ? `: ${details.join(", ")}` : ""}`);
      return item;
    }),
  );
}

async function drawReport(run) {
  const basis = JSON.stringify([run.done, run.outcome]);
  if (run.done.length === 0 || basis === reported) return;
  const page = await (await send("/api/report")).text();
  reported = basis;
  const place = $("pages").contentWindow?.scrollY ?? 0;
  $("pages").addEventListener("load", () => $("pages").contentWindow.scrollTo(0, place), { once: true });
  $("pages").srcdoc = page;
}

async function look() {
  try {
    const run = await ask("/api/now");
    drawHead(run);
    drawTraining(run);
    drawSites(run);
    drawEvents(run);
    document.body.dataset.ready = run.outcome;
    await drawReport(run);
  } catch (error) {
    $("state").className = "failed";
    $("state").textContent = error instanceof TypeError ? "fedqc server does not answer any more" : error.message;
  }
  setTimeout(look, EVERY);
}

enter()
  .catch((error) => {
    $("state").textContent = error.message;
  })
  .then(look);
