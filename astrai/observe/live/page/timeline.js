// The waterfall of requests, and the facts of one of them.
const MAX_ROWS = 48;
const timeline = {
  rows: new Map(), // task id → its element

  draw() {
    const all = [...engine.tasks.values()].filter((task) => task.spans.length).sort((a, b) => b.arrived - a.arrived || b.id - a.id);
    const tasks = all.slice(0, MAX_ROWS), box = $("rows");
    if (!tasks.length) {
      if (!box.firstChild || this.rows.size) { this.rows.clear(); box.replaceChildren(emptied("No request yet. Send one above, or a dozen.")); }
      setText("axis", "");
      return;
    }
    const end = Math.max(engine.time, ...tasks.map((task) => task.spans[task.spans.length - 1][2] ?? 0));
    const begin = Math.max(Math.min(...tasks.map((task) => task.arrived)), end - this.window(tasks, end));
    const width = Math.max(end - begin, 1e-6);
    const keep = new Set(tasks.map((task) => task.id));
    for (const [id, row] of this.rows) if (!keep.has(id)) { row.remove(); this.rows.delete(id); }
    if (!this.rows.size) box.replaceChildren();
    let before = null;
    for (const task of tasks) {
      let row = this.rows.get(task.id);
      if (!row) this.rows.set(task.id, row = this.make(task));
      const wanted = before ? before.nextSibling : box.firstChild;
      if (wanted !== row) box.insertBefore(row, wanted);
      before = row;
      this.update(row, task, begin, width, end);
    }
    this.axis(width);
  },

  window(tasks, end) { // far enough back for what lives, and at least ten seconds
    const oldest = Math.min(end, ...tasks.filter(isLive).map((task) => task.arrived));
    return Math.max(10, (end - oldest) * 1.15);
  },

  make(task) {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.task = task.id;
    const lane = document.createElement("span"), said = document.createElement("span");
    lane.className = "lane";
    said.className = "said";
    button.append(chip(task, task.id, "span"), lane, said);
    return item(button);
  },

  update(row, task, begin, width, end) {
    const [button] = row.children, [tag, lane, said] = button.children;
    tag.className = "chip" + (task.colour >= 0 ? "" : " none") + (task.state === "preempted" ? " pre" : "");
    paintChip(tag, task);
    button.setAttribute("aria-pressed", String(selected === task.id));
    const spans = task.spans;
    while (lane.children.length > spans.length) lane.lastChild.remove();
    spans.forEach(([kind, from, to], i) => {
      const piece = lane.children[i] || lane.appendChild(document.createElement("i"));
      if (piece.className !== kind) piece.className = kind;
      const last = to ?? (isLive(task) ? end : from);
      piece.style.left = `${100 * (from - begin) / width}%`;
      piece.style.width = `${100 * Math.max(0, last - from) / width}%`;
      piece.style.background = kind === "prefill" || kind === "decode" ? colourOf(task) || "" : "";
    });
    const text = this.say(task, end);
    if (said.textContent !== text) said.textContent = text;
    const name = `Request ${task.id}, ${text}. Show why`;
    if (button.getAttribute("aria-label") !== name) button.setAttribute("aria-label", name);
  },

  say(task, end) {
    const since = (task.spans[task.spans.length - 1][2] ?? end) - task.arrived;
    const made = `${big(task.nOutput)} tokens, ${seconds(Math.max(0, since))}`;
    if (!isLive(task)) return ["stop", "length"].includes(task.reason) ? made : `${task.reason}, ${made}`;
    if (task.state === "decode") return `${big(task.nOutput)} of ${big(task.maxTokens)} tokens`;
    if (task.state === "prefill") return `prompt ${big(Math.min(task.computed, task.nPrompt))} of ${big(task.nPrompt)}`;
    return task.state === "preempted" ? "preempted" : "queued";
  },

  axis(width) {
    const marks = [];
    for (let i = 0; i <= 4; i++) {
      const span = document.createElement("span");
      span.textContent = i === 4 ? "now" : `−${seconds(width * (1 - i / 4))}`;
      marks.push(span);
    }
    const key = width.toFixed(1);
    if ($("axis").dataset.key !== key) { $("axis").dataset.key = key; $("axis").replaceChildren(...marks); }
  },
};

const detail = {
  from: null, asked: 0,

  async open(id) {
    const task = engine.tasks.get(id);
    if (!task) return;
    this.from = document.activeElement;
    selected = id;
    touched = pool.dirty = loop.moving = true;
    $("detail").hidden = false;
    $("why").textContent = "";
    this.draw();
    $("detail-h").focus({ preventScroll: true });
    await this.ask();
  },

  async ask() { // the engine's own account, not a guess of the page's
    const task = engine.tasks.get(selected);
    if (!task) return;
    this.asked = performance.now();
    const id = task.id;
    try {
      const [request, prompt] = task.request.split("/"); // one of several prompts of a request
      const answer = await fetch(`v1/requests/${encodeURIComponent(request)}/why`, { headers: keyed() });
      const body = await answer.json();
      if (selected !== id) return;
      setText("why", answer.ok ? this.part(body.text, prompt) : body.error?.message ?? `HTTP ${answer.status}`);
    } catch {
      if (selected === id) setText("why", "The server did not answer.");
    }
  },

  part(text, prompt) { // what is told of this prompt, of all that the request had
    const from = text.indexOf(`prompt ${prompt}: `);
    if (prompt === undefined || from < 0) return text;
    const to = text.indexOf(`\nprompt ${Number(prompt) + 1}: `);
    return text.slice(from + `prompt ${prompt}: `.length, to < 0 ? undefined : to);
  },

  close() {
    if ($("detail").hidden) return;
    selected = null;
    $("detail").hidden = true;
    touched = pool.dirty = loop.moving = true;
    if (this.from?.isConnected) this.from.focus({ preventScroll: true });
  },

  draw() {
    const task = engine.tasks.get(selected);
    if (!task) return;
    setText("detail-h", `Request ${task.id}`);
    const n = (engine.tables.get(task.id) || []).length;
    const facts = {
      "Name": task.request,
      "State": isLive(task) ? task.state : `ended: ${task.reason}`,
      "Prompt": `${big(task.nPrompt)} tokens, ${big(task.nCached)} from the cache`,
      "Output": `${big(task.nOutput)} of at most ${big(task.maxTokens)} tokens`,
      "First token": task.firstToken == null ? "not yet" : `after ${seconds(Math.max(0, task.firstToken - task.arrived))}`,
      "Slot, pages": task.slot >= 0 ? `slot ${task.slot}, ${plural(n, "page")}` : "none",
      "Preempted": plural(task.nPreempted, "time"),
    };
    refill($("facts"), JSON.stringify(facts), () => Object.entries(facts).flatMap(([name, value]) => {
      const dt = document.createElement("dt"), dd = document.createElement("dd");
      dt.textContent = name;
      dd.textContent = value;
      return [dt, dd];
    }));
    if (isLive(task) && performance.now() - this.asked > 1500) this.ask();
    else if (!isLive(task) && !task.asked) { task.asked = true; this.ask(); }
  },
};

function select(id) { detail.open(id); }
function hover(id) {
  if (hovered === id) return;
  hovered = id;
  touched = pool.dirty = loop.moving = true;
}
