// The stream, the clock of the page, and what the visitor does.
let key = sessionStorage.getItem("astrai-key") || "";
const keyed = () => (key ? { authorization: `Bearer ${key}` } : {});
const say = (text) => { $("say").textContent = text; };
let stream = null;

function link(state, text) {
  $("link").dataset.state = state;
  if ($("link-text").textContent !== text) { setText("link-text", text); say(text); }
}

async function askKey(refused) {
  if (refused) $("key-text").setAttribute("aria-invalid", "true");
  $("key").showModal();
  await new Promise((resolve) => $("key").addEventListener("close", resolve, { once: true }));
  key = $("key-text").value.trim();
  sessionStorage.setItem("astrai-key", key);
  $("key-text").value = "";
}

async function watch() {
  for (let wait = 500; ; wait = Math.min(8000, wait * 2)) {
    while (document.hidden) await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
    stream = new AbortController();
    try {
      const answer = await fetch("live/events", { headers: keyed(), signal: stream.signal });
      if (answer.status === 401) {
        link("off", "needs a key");
        await askKey(key !== "");
        wait = 250;
        continue;
      }
      if (!answer.ok) {
        const error = await answer.json().catch(() => null);
        throw new Error(error?.error?.message ?? `HTTP ${answer.status}`);
      }
      name();
      for await (const data of lines(answer.body)) {
        readFrame(JSON.parse(data));
        link("on", engine.player ? "recording" : "live");
        wait = 500;
      }
      throw new Error("connection lost");
    } catch (error) {
      if (document.hidden) continue;
      link("off", `${error.name === "TypeError" ? "no answer" : error.message}, trying again`);
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }
}

async function name() {
  if (talk.model) return;
  try {
    const answer = await fetch("v1/models", { headers: keyed() });
    if (!answer.ok) return;
    talk.model = (await answer.json()).data[0].id;
    setText("model", talk.model);
  } catch { /* the stream says what is wrong */ }
}

// ── the clock ────────────────────────────────────────────────────────────────────────────────────
let panelsAt = 0, sampledAt = 0, timelineAt = 0;
function turn(now) {
  requestAnimationFrame(turn);
  if (touched || loop.moving) loop.draw(now);
  if (pool.dirty && engine.pages.length) pool.draw(now);
  story.draw(now);
  if (now - sampledAt > 500) {
    sampledAt = now;
    rates.sample();
    charts.draw();
    touched = touched || !engine.player; // the rates fall when nothing comes
  }
  if (touched && now - panelsAt > 140) {
    panelsAt = now;
    touched = false;
    panels.draw();
    talk.paint();
    player.draw();
    if (!$("detail").hidden) detail.draw();
    if (pool.cursor >= 0) { const g = pool.layout(); setText("cell", pool.describe(pool.cursor, g)); }
    if (now - timelineAt > 190) { timelineAt = now; timeline.draw(); }
  }
}

const player = {
  draw() {
    const state = engine.player;
    $("player").hidden = !state;
    document.querySelector(".try").hidden = Boolean(state);
    if (!state) return;
    setText("play", state.playing ? "Pause" : "Play");
    $("seek").max = state.last;
    if (document.activeElement !== $("seek") || state.playing) $("seek").value = state.at;
    $("seek").setAttribute("aria-valuetext", `tick ${state.tick}`);
    setText("seek-at", `tick ${big(state.tick)}`);
    if (document.activeElement !== $("speed")) $("speed").value = String(state.speed);
  },
  seek() { // the slider moves more often than anybody can see
    this.wanted = Number($("seek").value);
    this.due ||= setTimeout(() => { this.due = 0; this.send({ at: this.wanted, playing: false }); }, 60);
  },
  send(change) {
    fetch("live/player", { method: "POST", headers: { "content-type": "application/json", ...keyed() }, body: JSON.stringify(change) });
  },
  listen() {
    $("play").addEventListener("click", () => this.send({ playing: !engine.player.playing }));
    $("back").addEventListener("click", () => this.send({ step: -1 }));
    $("next").addEventListener("click", () => this.send({ step: 1 }));
    $("seek").addEventListener("input", () => this.seek());
    $("speed").addEventListener("change", () => this.send({ speed: Number($("speed").value) }));
    $("player").addEventListener("submit", (event) => event.preventDefault());
  },
};

function theme(toggle) {
  const root = document.documentElement;
  let wanted = localStorage.getItem("astrai-theme");
  if (toggle) {
    const dark = (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
    wanted = dark ? "light" : "dark";
    localStorage.setItem("astrai-theme", wanted);
  }
  if (wanted) root.dataset.theme = wanted;
  palette = null;
  touched = pool.dirty = loop.moving = true;
}

$("theme").addEventListener("click", () => theme(true));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme(false));
addEventListener("resize", () => { pool.grid = null; touched = pool.dirty = loop.moving = true; });
document.addEventListener("visibilitychange", () => { if (document.hidden) stream?.abort(); });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") detail.close(); });
$("detail-close").addEventListener("click", () => detail.close());
$("mask-box").addEventListener("toggle", () => { touched = true; });
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("ask-text").value.trim();
  if (!text || talk.busy) return;
  $("ask-text").value = "";
  talk.send(text);
});
$("ask-text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); $("ask").requestSubmit(); }
});
$("burst").addEventListener("click", () => talk.burst());
loop.canvas.addEventListener("pointermove", (event) => hover(loop.nearest(event)));
loop.canvas.addEventListener("pointerleave", () => hover(null));
loop.canvas.addEventListener("click", (event) => { const id = loop.nearest(event); if (id != null) select(id); });
for (const id of ["slots", "groups", "queue", "rows"]) {
  const of = (event) => event.target.closest?.("[data-task]")?.dataset.task;
  $(id).addEventListener("click", (event) => { const task = of(event); if (task) select(Number(task)); });
  $(id).addEventListener("pointerover", (event) => { const task = of(event); hover(task ? Number(task) : null); });
  $(id).addEventListener("pointerleave", () => hover(null));
  $(id).addEventListener("focusin", (event) => { const task = of(event); hover(task ? Number(task) : null); });
  $(id).addEventListener("focusout", () => hover(null));
}
globalThis.live = { engine, rates, pool, loop, timeline, talk }; // for the console
pool.listen();
player.listen();
theme(false);
requestAnimationFrame(turn);
watch();
