// What the page knows: the engine's state, rebuilt from the frames of the stream.
const $ = (id) => document.getElementById(id);
const FREE = 0, CACHED = -1;
const FIELDS = ["id", "request", "nPrompt", "maxTokens", "priority", "state", "slot", "colour",
  "computed", "nOutput", "nCached", "nPreempted", "reason", "arrived", "firstToken", "spans"];
const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7f6bc4"];
const INKS = ["#fff", "#1b2330", "#fff", "#1b2330", "#1b2330", "#fff", "#1b2330", "#fff"];
const WAITS = {
  slots: "every slot is taken", pages: "not enough pages are free",
  prefill: "this tick's prompt budget is used up", results: "its last token is still on the device",
  grammar: "its grammar is being compiled",
};
const engine = {
  known: false, config: {}, tick: 0, time: 0, running: 0, waiting: 0, counts: [0, 0, 0], wait: null,
  groups: [], ended: 0, player: null, tasks: new Map(), tables: new Map(), pages: new Int32Array(0),
  holders: [], // page frame → ids of the tasks whose tables name it
  marks: [], flow: { ended: 0, admitted: 0, prefill: 0, decode: 0, preempted: 0 },
};
const reduced = matchMedia("(prefers-reduced-motion: reduce)");
const colourOf = (task) => (task && task.colour >= 0 ? COLOURS[task.colour] : null);
const inkOf = (task) => (task && task.colour >= 0 ? INKS[task.colour] : null);
const label = (id) => (id < 10000 ? String(id) : "…" + (id % 1000));
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const isLive = (task) => task.state !== "ended";
const seconds = (s) => (s < 0.0995 ? `${Math.round(s * 1000)} ms` : s < 100 ? `${s.toFixed(s < 10 ? 2 : 1)} s` : `${Math.round(s)} s`);
const big = (n) => n.toLocaleString("en-US").replaceAll(",", " ");

function setTable(id, table) {
  for (const frame of engine.tables.get(id) || []) {
    const holders = engine.holders[frame];
    if (holders) holders.splice(holders.indexOf(id), 1);
  }
  for (const frame of table) (engine.holders[frame] ||= []).push(id);
  if (table.length) engine.tables.set(id, table); else engine.tables.delete(id);
}

function readRow(row) {
  const task = engine.tasks.get(row[0]) || {};
  FIELDS.forEach((name, i) => { task[name] = row[i]; });
  engine.tasks.set(task.id, task);
}

function readWhole(frame) {
  engine.known = frame.known;
  engine.config = frame.config;
  engine.tasks.clear();
  engine.tables.clear();
  engine.holders = [];
  frame.tasks.forEach(readRow);
  for (const [id, table] of frame.tables) setTable(id, table);
  const pages = new Int32Array(frame.config.n_pages || 0);
  let at = 0;
  for (let i = 0; i < frame.pages.length; i += 2) {
    pages.fill(frame.pages[i], at, at + frame.pages[i + 1]);
    at += frame.pages[i + 1];
  }
  engine.pages = pages;
  engine.marks = [];
}

function readChanges(frame) {
  frame.tasks.forEach(readRow);
  for (let i = 0; i < frame.steps.length; i += 3) {
    const task = engine.tasks.get(frame.steps[i]);
    if (task) { task.computed = frame.steps[i + 1]; task.nOutput = frame.steps[i + 2]; }
  }
  for (const [id, keep, more] of frame.tables) {
    setTable(id, (engine.tables.get(id) || []).slice(0, keep).concat(more));
  }
  for (const id of frame.gone) { engine.tasks.delete(id); setTable(id, []); }
  for (let i = 0; i < frame.pages.length; i += 2) {
    pool.changed(frame.pages[i], engine.pages[frame.pages[i]], frame.pages[i + 1]);
    engine.pages[frame.pages[i]] = frame.pages[i + 1];
  }
  engine.marks = frame.marks;
  engine.flow = frame.flow;
}

function readFrame(frame) {
  const restart = frame.kind === "whole";
  if (restart) readWhole(frame); else readChanges(frame);
  for (const name of ["tick", "time", "running", "waiting", "counts", "wait", "groups", "ended", "player"]) {
    engine[name] = frame[name];
  }
  rates.add(frame, restart);
  if (restart) pool.restart();
  for (const mark of engine.marks) pool.mark(mark);
  story.add(engine.marks);
  loop.flow(frame, restart);
  touched = true;
}

// Ticks and tokens per second. A recording has its own clock; a running engine that stands still
// sends nothing, so its rate falls with the clock on the wall.
const rates = {
  points: [],
  history: [], // {tokens, held, cached} twice a second
  firsts: [], // seconds to the first token, of the last requests
  seen: new Set(),
  now: () => (engine.player ? engine.time : performance.now() / 1000),
  add(frame, restart) {
    if (restart) { this.points = []; this.seen.clear(); this.firsts = []; }
    this.points.push({ at: this.now(), tick: engine.tick, made: frame.made });
    if (this.points.length > 400) this.points.splice(0, 200);
    for (const task of engine.tasks.values()) {
      if (task.firstToken != null && !this.seen.has(task.id)) {
        this.seen.add(task.id);
        this.firsts.push(Math.max(0, task.firstToken - task.arrived));
      }
    }
    if (this.firsts.length > 80) this.firsts.splice(0, this.firsts.length - 80);
    if (this.seen.size > 4000) this.seen = new Set([...engine.tasks.keys()]);
  },
  of(name) {
    const now = this.now(), last = this.points[this.points.length - 1];
    const first = this.points.find((point) => point.at >= now - 2);
    if (!last || !first || now - first.at < 0.05) return 0;
    return Math.max(0, (last[name] - first[name]) / Math.max(now - first.at, 0.25));
  },
  sample() {
    const [free, cached, held] = engine.counts, total = free + cached + held || 1;
    this.history.push({ tokens: this.of("made"), held: held / total, cached: cached / total });
    if (this.history.length > 160) this.history.shift();
  },
};
let touched = true; // something was read since the panels were drawn
let selected = null; // id of the task whose pages and facts are shown
let hovered = null;
const shown = () => hovered ?? selected;
