// The words and numbers around the two pictures.
const CHIP_LIMIT = 64;

function chip(task, id, tag = "button") {
  const el = document.createElement(tag);
  el.className = "chip" + (task && task.colour >= 0 ? "" : " none") + (task?.state === "preempted" ? " pre" : "");
  paintChip(el, task);
  el.textContent = label(id);
  if (tag === "button") {
    el.type = "button";
    el.dataset.task = id;
    el.setAttribute("aria-label", `Request ${id}`);
  }
  return el;
}

function paintChip(el, task) {
  el.style.background = colourOf(task) || "";
  el.style.color = inkOf(task) || "";
}

// Replace children only when what they show has changed, so that focus and screen readers stay.
function refill(el, key, make) {
  if (el.dataset.key === key) return;
  el.dataset.key = key;
  const focus = el.contains(document.activeElement) ? document.activeElement.dataset.task : null;
  el.replaceChildren(...make());
  if (focus) el.querySelector(`[data-task="${focus}"]`)?.focus();
}

function item(...children) {
  const li = document.createElement("li");
  li.append(...children);
  return li;
}

function setText(id, text) {
  const el = $(id);
  if (el.textContent !== text) el.textContent = text;
}

const panels = {
  draw() {
    const tasks = [...engine.tasks.values()], live = tasks.filter(isLive);
    const running = live.filter((task) => task.slot >= 0), waiting = live.filter((task) => task.slot < 0);
    setText("tick", engine.known ? big(engine.tick) : "–");
    const rate = rates.of("tick");
    setText("rate", rate < 10 ? rate.toFixed(rate ? 1 : 0) : big(Math.round(rate)));
    this.stations(running, waiting);
    this.sum();
    this.slots(running);
    this.groups();
    this.queue(waiting);
    this.table();
    if ($("mask-box").open) setText("mask", pool.mask());
  },

  stations(running, waiting) {
    const prefilling = running.filter((task) => task.state === "prefill");
    const left = prefilling.reduce((sum, task) => sum + Math.max(0, task.nPrompt - task.computed), 0);
    const facts = {
      "s-cleanup": [engine.ended, "ended"], "s-refill": [waiting.length, "waiting"],
      "s-prefill": [prefilling.length, left ? `prompts, ${big(left)} tokens to go` : prefilling.length === 1 ? "prompt" : "prompts"],
      "s-decode": [running.length - prefilling.length, "running"],
    };
    for (const [id, [n, word]] of Object.entries(facts)) {
      const [b, span] = $(id).querySelector(".fact").children;
      if (b.textContent !== big(n)) b.textContent = big(n);
      if (span.textContent !== word) span.textContent = word;
    }
  },

  sum() {
    const [free, cached, held] = engine.counts, total = engine.config.n_pages || 0;
    setText("n-free", big(free)); setText("n-cached", big(cached)); setText("n-held", big(held));
    setText("n-total", big(total));
    const right = free + cached + held === total;
    setText("balance", !engine.known ? "" : right ? "✓" : "✗ does not add up");
    $("balance").classList.toggle("off", !right);
    $("b-held").style.width = `${100 * held / (total || 1)}%`;
    $("b-cached").style.width = `${100 * cached / (total || 1)}%`;
    const per = pool.per(), size = engine.config.page_size;
    setText("pool-about", !engine.known ? "" : (per > 1 ? `Each cell stands for ${per} pages of ${size} tokens` : `Each cell is a page of ${size} tokens`)
      + " in the KV cache. Requests hold pages of their own and share equal beginnings.");
  },

  slots(running) {
    const n = engine.config.max_slots || 0, of = new Array(n).fill(null);
    for (const task of running) of[task.slot] = task;
    $("slots").classList.toggle("many", n > 32);
    refill($("slots"), of.map((task) => (task ? `${task.id}.${task.colour}` : "")).join(), () => of.map((task) => {
      if (task) return item(chip(task, task.id));
      const empty = chip(null, 0, "span");
      empty.textContent = "";
      empty.setAttribute("aria-label", "free slot");
      empty.setAttribute("role", "img");
      return item(empty);
    }));
    const bits = of.map((task) => (task ? 0 : 1)).join("");
    setText("slot-mask", n ? `free ${n <= 64 ? bits : `${bits.slice(0, 64)}… (${of.filter((t) => !t).length} of ${n})`}` : "");
  },

  groups() {
    const kind = engine.config.group_decode;
    setText("groups-about", kind === "off" ? "Every running request gets one token."
      : `Every running request gets one token. A box is one dense matmul: requests of ${kind === "position" ? "equal position" : "similar length"}.`);
    const shownGroups = kind === "off" ? (engine.groups.length ? [engine.groups.flat()] : []) : engine.groups;
    refill($("groups"), JSON.stringify(shownGroups), () => {
      let room = CHIP_LIMIT;
      const items = [];
      for (const group of shownGroups) {
        if (room <= 0) break;
        items.push(item(...group.slice(0, room).map((id) => chip(engine.tasks.get(id), id))));
        room -= group.length;
      }
      if (room < 0) items.push(item(`and ${-room} more`));
      return items.length ? items : [emptied("No decode step in this tick.")];
    });
  },

  queue(waiting) {
    const why = engine.wait ? `The first waits because ${WAITS[engine.wait] || engine.wait}; those behind it wait with it.` : "";
    setText("queue-why", waiting.length ? why : "");
    const first = waiting.slice(0, 6);
    refill($("queue"), first.map((t) => t.id + t.state).join() + waiting.length, () => [
      ...first.map((task) => {
        const time = document.createElement("span");
        time.className = "t";
        time.dataset.since = task.spans.length ? task.spans[task.spans.length - 1][1] : task.arrived;
        const words = document.createElement("span");
        words.textContent = task.state === "preempted" ? "preempted, comes back" : `${plural(task.nPrompt, "prompt token")}`;
        return item(chip(task, task.id), words, time);
      }),
      ...(waiting.length > first.length ? [emptied(`and ${waiting.length - first.length} more`)] : []),
      ...(waiting.length ? [] : [emptied("Nobody waits.")]),
    ]);
    for (const el of $("queue").querySelectorAll(".t")) el.textContent = seconds(Math.max(0, engine.time - el.dataset.since));
  },

  table() {
    const id = shown(), task = id == null ? null : engine.tasks.get(id);
    const table = (task && engine.tables.get(id)) || [];
    setText("table-h", task ? `Page table of request ${id}` : "Page table");
    const key = task ? `${id}:${table.map((f) => `${f}x${engine.pages[f]}`).join()}` : "none";
    refill($("table"), key, () => {
      if (!task) return [emptied("Point at a request or a page to see which page frames it holds, in order.")];
      if (!table.length) return [emptied(isLive(task) ? "It holds no pages now." : "It has ended and gave its pages back.")];
      const items = table.slice(0, 256).map((frame, i) => {
        const li = item();
        const logical = document.createElement("span");
        logical.textContent = `${i} → `;
        li.append(logical, `${frame}${engine.pages[frame] > 1 ? ` ×${engine.pages[frame]}` : ""}`);
        return li;
      });
      if (table.length > 256) items.push(emptied(`and ${table.length - 256} more`));
      return items;
    });
  },
};

function emptied(text) {
  const li = item(text);
  li.className = "empty more";
  return li;
}

// What just happened, in words: the newest first, slowly enough to be read.
const story = {
  lines: [], waiting: [], last: 0,
  add(marks) {
    for (const mark of marks) {
      const text = this.tell(mark);
      if (text) this.waiting.push([mark[0], text]);
    }
    if (this.waiting.length > 4) this.waiting.splice(0, this.waiting.length - 4);
  },
  tell([, kind, id, about]) {
    const list = (frames) => `${frames.length > 1 ? "pages" : "page"} ${frames.slice(0, 6).join(", ")}${frames.length > 6 ? " …" : ""}`;
    switch (kind) {
      case "arrive": return `Request ${id} arrives with ${plural(about, "prompt token")}`;
      case "refuse": return `Refused: ${about}`;
      case "admit": return about ? `Request ${id} gets a slot; ${about} of its tokens are in the cache already` : `Request ${id} gets a slot`;
      case "take": return `Request ${id} takes ${list(about)}`;
      case "share": return `Request ${id} shares ${list(about)} of an equal beginning`;
      case "evict": return `Cached ${list(about)} evicted to make room`;
      case "copy": return `Request ${id} copies page ${about[0]} to ${about[1]} before writing to it`;
      case "fork": return `Request ${id} branches off request ${about}`;
      case "preempt": return `Request ${id} is preempted, its pages go to request ${about}; it will come back`;
      case "end": return about === "stop" || about === "length" ? `Request ${id} is done${about === "length" ? ": its length is reached" : ""}` : `Request ${id} ends: ${about}`;
      default: return null;
    }
  },
  draw(now) {
    if (!this.waiting.length || now - this.last < 350) return;
    this.last = now;
    this.lines.unshift(this.waiting.shift());
    this.lines.length = Math.min(this.lines.length, 3);
    $("story").replaceChildren(...this.lines.map(([tick, text]) => {
      const at = document.createElement("span");
      at.className = "at";
      at.textContent = big(tick);
      return item(at, text);
    }));
  },
};

const charts = {
  draw() {
    const last = rates.history[rates.history.length - 1];
    if (!last) return;
    setText("c-rate", last.tokens < 10 ? last.tokens.toFixed(last.tokens ? 1 : 0) : big(Math.round(last.tokens)));
    const sorted = [...rates.firsts].sort((a, b) => a - b);
    setText("c-first", sorted.length ? `${seconds(sorted[Math.floor(sorted.length / 2)])} median` : "–");
    setText("c-used", `${Math.round(100 * last.held)} % held, ${Math.round(100 * last.cached)} % cached`);
    const style = colours();
    this.area($("chart-rate"), rates.history.map((h) => h.tokens), style.accent, null, style);
    this.dots($("chart-first"), rates.firsts, style);
    this.area($("chart-used"), rates.history.map((h) => h.held + h.cached), style.cached, 1, style);
    this.area($("chart-used"), rates.history.map((h) => h.held), style.accent, 1, style, true);
    $("chart-rate").setAttribute("aria-label", `Throughput over the last minute, now ${Math.round(last.tokens)} tokens per second`);
    $("chart-first").setAttribute("aria-label", `Time to first token of the last ${sorted.length} requests`);
    $("chart-used").setAttribute("aria-label", `Occupancy: ${$("c-used").textContent}`);
  },
  area(canvas, values, colour, top, style, over = false) {
    const [ctx, w, h] = over ? [canvas.getContext("2d"), canvas.clientWidth, canvas.clientHeight] : surface(canvas);
    const most = top ?? Math.max(1, ...values) * 1.1, step = w / 159, x0 = w - (values.length - 1) * step;
    const y = (v) => h - 2 - (h - 6) * v / most;
    if (!over) { ctx.strokeStyle = style.line; ctx.lineWidth = 1; ctx.beginPath(); ctx.moveTo(0, h - 1.5); ctx.lineTo(w, h - 1.5); ctx.stroke(); }
    ctx.beginPath();
    ctx.moveTo(x0, h - 2);
    values.forEach((v, i) => ctx.lineTo(x0 + i * step, y(v)));
    ctx.lineTo(w, h - 2);
    ctx.fillStyle = colour; ctx.globalAlpha = 0.18; ctx.fill(); ctx.globalAlpha = 1;
    ctx.beginPath();
    values.forEach((v, i) => ctx.lineTo(x0 + i * step, y(v)));
    ctx.strokeStyle = colour; ctx.lineWidth = 1.8; ctx.stroke();
  },
  dots(canvas, values, style) {
    const [ctx, w, h] = surface(canvas), most = Math.max(0.01, ...values) * 1.1, step = w / 80;
    ctx.strokeStyle = style.line; ctx.lineWidth = 1;
    ctx.beginPath(); ctx.moveTo(0, h - 1.5); ctx.lineTo(w, h - 1.5); ctx.stroke();
    ctx.fillStyle = style.accent;
    values.forEach((v, i) => {
      ctx.beginPath();
      ctx.arc(w - (values.length - i - 0.5) * step, h - 5 - (h - 12) * v / most, 2.6, 0, 7);
      ctx.fill();
    });
  },
};
