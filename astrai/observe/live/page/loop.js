// The loop as a picture: every task is a dot that follows its place; places move, dots catch up.
const loop = {
  canvas: $("loop"), dots: new Map(), phase: 0, last: 0, pulse: [0, 0, 0, 0], moving: true,

  flow(frame, restart) {
    if (restart) { this.dots.clear(); return; }
    const { ended, admitted, prefill, decode } = frame.flow;
    [ended, admitted, prefill, decode].forEach((n, i) => { if (n) this.pulse[i] = 1; });
    this.moving = true;
  },

  // Turns per second that the eye can follow, and how many real ones each stands for.
  pace() {
    const real = engine.player && !engine.player.playing ? 0
      : engine.player ? Math.min(engine.player.speed, 1e6) : rates.of("tick");
    const seen = engine.running && real ? Math.min(real, 0.2) : 0;
    return { seen, each: seen ? Math.round(real / seen) : 0 };
  },

  layout(w, h) {
    const narrow = w < 520, gap = narrow ? 5 : 12, panel = (w - 3 * gap) / 4;
    const x = [0, 1, 2, 3].map((i) => i * (panel + gap) + panel / 2);
    const top = narrow ? 92 : 86, bottom = h - 16, radius = 26;
    const left = x[0], right = x[3];
    // Clockwise from Cleanup: along the stations, down, back, up.
    const straight = right - left, side = bottom - top - 2 * radius, arc = Math.PI * radius / 2;
    const length = 2 * straight + 2 * side + 4 * arc;
    return { narrow, x, panel, top, bottom, radius, left, right, straight, side, arc, length };
  },

  at(g, s) { // the point at distance s from Cleanup along the track
    s = ((s % g.length) + g.length) % g.length;
    const turn = (cx, cy, from, d) => {
      const a = from + d / g.radius;
      return [cx + g.radius * Math.cos(a), cy + g.radius * Math.sin(a)];
    };
    if (s < g.straight) return [g.left + s, g.top];
    s -= g.straight;
    if (s < g.arc) return turn(g.right, g.top + g.radius, -Math.PI / 2, s);
    s -= g.arc;
    if (s < g.side) return [g.right + g.radius, g.top + g.radius + s];
    s -= g.side;
    if (s < g.arc) return turn(g.right, g.bottom - g.radius, 0, s);
    s -= g.arc;
    if (s < g.straight) return [g.right - s, g.bottom];
    s -= g.straight;
    if (s < g.arc) return turn(g.left, g.bottom - g.radius, Math.PI / 2, s);
    s -= g.arc;
    if (s < g.side) return [g.left - g.radius, g.bottom - g.radius - s];
    return turn(g.left, g.top + g.radius, Math.PI, s - g.side);
  },

  places(g) { // task id → where it belongs: a point, or a distance behind the head of the train
    const of = new Map(), decoding = [], prefilling = [], waiting = [];
    for (const task of engine.tasks.values()) {
      if (task.state === "decode") decoding.push(task);
      else if (task.state === "prefill") prefilling.push(task);
      else if (isLive(task)) waiting.push(task);
    }
    const r = Math.max(3.5, Math.min(11, g.length / 2.6 / Math.max(1, decoding.length),
      g.panel / 2.4 / Math.sqrt(Math.max(1, prefilling.length))));
    this.r = r;
    const step = Math.min(2.5 * r, g.length * 0.8 / Math.max(1, decoding.length));
    const head = reduced.matches ? g.straight + (decoding.length - 1) * step / 2 : this.phase * g.length;
    this.head = head;
    decoding.forEach((task, i) => of.set(task.id, { mode: "decode", behind: i * step }));
    const columns = Math.max(1, Math.floor((g.panel - 8) / (2.5 * r)));
    prefilling.forEach((task, i) => {
      const row = Math.floor(i / columns), n = Math.min(columns, prefilling.length - row * columns);
      of.set(task.id, { mode: "prefill", x: g.x[2] + (i % columns - (n - 1) / 2) * 2.5 * r, y: g.top + 29 - row * 2.4 * r });
    });
    const y = (g.top + 46 + g.bottom) / 2 + 2, end = g.right - 12;
    const most = Math.max(3, Math.floor((end - g.x[1]) / 25) - 5);
    waiting.slice(0, most + 1).forEach((task, i) => of.set(task.id, { mode: "queued", x: g.x[1] + i * 25, y }));
    this.queue = { x: g.x[1] + (Math.min(waiting.length - 1, most) + 0.7) * 25, y, n: waiting.length, more: waiting.length - 1 - most };
    return of;
  },

  follow(g, of, dt) {
    const ease = reduced.matches ? 1 : 1 - Math.exp(-dt * 8);
    for (const [id, place] of of) {
      let dot = this.dots.get(id);
      if (!dot) this.dots.set(id, dot = { x: this.queue.x + 40, y: this.queue.y, mode: null, age: 0 });
      dot.age += dt;
      if (dot.mode !== place.mode) Object.assign(dot, { mode: place.mode, fromX: dot.x, fromY: dot.y, way: reduced.matches ? 1 : 0, behind: place.behind });
      dot.goes = 0;
      let { x, y } = place;
      if (place.mode === "decode") {
        dot.behind += (place.behind - dot.behind) * ease;
        [x, y] = this.at(g, this.head - dot.behind);
      }
      if (dot.way < 1) { // on its way from one place to another
        dot.way = Math.min(1, dot.way + dt / 0.8);
        const part = dot.way * dot.way * (3 - 2 * dot.way);
        dot.x = dot.fromX + (x - dot.fromX) * part;
        dot.y = dot.fromY + (y - dot.fromY) * part;
      } else if (place.mode === "decode") [dot.x, dot.y] = [x, y];
      else { dot.x += (x - dot.x) * ease; dot.y += (y - dot.y) * ease; }
      dot.still = place.mode === "decode" || Math.hypot(x - dot.x, y - dot.y) < 0.5;
    }
    for (const [id, dot] of this.dots) {
      if (of.has(id)) continue;
      this.leave(g, dot, engine.tasks.get(id), dt);
      if (dot.goes <= 0 || reduced.matches) this.dots.delete(id);
    }
  },

  leave(g, dot, task, dt) { // along the track to Cleanup, there up and away
    if (!dot.goes) {
      const s = (((this.head - dot.behind) % g.length) + g.length) % g.length;
      Object.assign(dot, { goes: 1, task, reason: task?.reason, fromX: dot.x, fromY: dot.y,
        riding: dot.mode === "decode" && dot.way >= 1, from: s, left: g.length - s });
    }
    dot.goes -= dt / 1.7;
    const part = Math.min(1, (1 - dot.goes) / 0.5), soft = part * part * (3 - 2 * part);
    if (part < 1 && dot.riding) [dot.x, dot.y] = this.at(g, dot.from + dot.left * soft);
    else if (part < 1) {
      dot.x = dot.fromX + (g.x[0] - dot.fromX) * soft;
      dot.y = dot.fromY + (g.top - dot.fromY) * soft;
    } else [dot.x, dot.y] = [g.x[0], g.top - (0.5 - dot.goes) * 84];
  },

  draw(now) {
    const dt = Math.min(0.1, (now - this.last) / 1000 || 0);
    this.last = now;
    const { seen, each } = this.pace();
    if (!reduced.matches) this.phase = (this.phase + dt * seen) % 1;
    const [ctx, w, h] = surface(this.canvas);
    const g = this.layout(w, h), style = colours();
    const of = this.places(g);
    this.follow(g, of, dt);
    this.track(ctx, g, style);
    for (const [id, dot] of this.dots) this.dot(ctx, dot, engine.tasks.get(id) || dot.task, style);
    this.words(ctx, g, style);
    this.lights(dt);
    const text = each > 1 ? `${plural(engine.running, "request")} circling; one turn here is about ${big(each)} ticks` : "";
    if ($("shown").textContent !== text) $("shown").textContent = text;
    this.moving = seen > 0 || this.dots.size !== of.size || this.pulse.some((p) => p > 0)
      || [...this.dots.values()].some((dot) => dot.way < 1 || !dot.still);
  },

  track(ctx, g, style) {
    ctx.lineWidth = 2;
    ctx.strokeStyle = style.track;
    ctx.beginPath();
    for (let s = 0; s <= g.length; s += 4) ctx.lineTo(...this.at(g, s));
    ctx.closePath();
    ctx.stroke();
    ctx.fillStyle = style.track;
    const arrow = (x, y, a) => {
      ctx.save(); ctx.translate(x, y); ctx.rotate(a);
      ctx.beginPath(); ctx.moveTo(6, 0); ctx.lineTo(-5, -5); ctx.lineTo(-5, 5); ctx.fill(); ctx.restore();
    };
    for (const i of [0, 1, 2]) arrow((g.x[i] + g.x[i + 1]) / 2, g.top, 0);
    arrow((g.left + g.right) / 2 + 62, g.bottom, Math.PI);
    // From the queue up into Refill, and out of Cleanup.
    ctx.setLineDash([3, 4]);
    ctx.beginPath(); ctx.moveTo(g.x[1], this.queue.y - 14); ctx.lineTo(g.x[1], g.top); ctx.stroke();
    ctx.setLineDash([]);
  },

  dot(ctx, dot, task, style) {
    const r = this.r, colour = colourOf(task);
    ctx.globalAlpha = dot.goes ? Math.max(0, Math.min(1, dot.goes * 2.2)) : Math.min(1, dot.age * 5);
    ctx.beginPath();
    ctx.arc(dot.x, dot.y, r, 0, 7);
    ctx.fillStyle = colour || style.card;
    ctx.fill();
    const picked = task && task.id === shown();
    if (!colour || picked || task.state === "preempted") {
      ctx.lineWidth = picked ? 3 : 1.6;
      ctx.strokeStyle = picked ? style.ink : task?.state === "preempted" ? style.bad : style.soft;
      ctx.setLineDash(task?.state === "preempted" ? [3, 3] : []);
      ctx.stroke();
      ctx.setLineDash([]);
    }
    if (task?.state === "prefill" && !dot.goes) { // how much of the prompt is computed
      ctx.beginPath();
      ctx.arc(dot.x, dot.y, r + 3.5, -Math.PI / 2, -Math.PI / 2 + 2 * Math.PI * Math.min(1, task.computed / Math.max(1, task.nPrompt)));
      ctx.lineWidth = 2.5; ctx.strokeStyle = style.ink; ctx.stroke();
    }
    if (r >= 7.5 && task) {
      ctx.fillStyle = inkOf(task) || style.soft;
      const text = dot.goes ? (["stop", "length"].includes(dot.reason) ? "✓" : dot.reason ? "✕" : "") : label(task.id);
      ctx.font = `650 ${Math.min(11, text.length > 2 ? r * 0.85 : r)}px system-ui, sans-serif`;
      ctx.textAlign = "center"; ctx.textBaseline = "middle";
      ctx.fillText(text, dot.x, dot.y + 0.5);
    }
    ctx.globalAlpha = 1;
  },

  words(ctx, g, style) {
    ctx.font = "12.5px system-ui, -apple-system, 'DejaVu Sans', sans-serif";
    ctx.textBaseline = "middle"; ctx.textAlign = "center";
    const text = "once per token", x = (g.left + g.right) / 2;
    ctx.fillStyle = style.card;
    const wide = ctx.measureText(text).width / 2 + 8;
    ctx.fillRect(x - wide, g.bottom - 9, wide * 2, 18);
    if (!this.covered(x, g.bottom, wide)) { ctx.fillStyle = style.soft; ctx.fillText(text, x, g.bottom); }
    else for (const [id, dot] of this.dots) if (Math.abs(dot.y - g.bottom) < 12 && Math.abs(dot.x - x) < wide + 12) this.dot(ctx, dot, engine.tasks.get(id) || dot.task, style);
    ctx.textAlign = "left";
    ctx.fillStyle = style.soft;
    const { n, more, x: qx, y } = this.queue;
    const why = engine.wait ? `: ${WAITS[engine.wait] || engine.wait}` : "";
    const said = n ? `${more > 0 ? `+${more} ` : ""}waiting${g.narrow ? "" : why}` : g.narrow ? "nobody waits" : "nobody waits";
    ctx.fillText(said, n ? qx : g.x[1] + 12, y);
  },

  covered(x, y, wide) {
    for (const dot of this.dots.values()) if (Math.abs(dot.y - y) < 12 && Math.abs(dot.x - x) < wide + 12) return true;
    return false;
  },

  lights(dt) {
    ["s-cleanup", "s-refill", "s-prefill", "s-decode"].forEach((id, i) => {
      this.pulse[i] = Math.max(0, this.pulse[i] - dt / 0.6);
      $(id).classList.toggle("on", this.pulse[i] > 0);
    });
  },

  nearest(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    let best = null, within = Math.max(16, this.r + 6);
    for (const [id, dot] of this.dots) {
      const far = Math.hypot(dot.x - x, dot.y - y);
      if (far < within && engine.tasks.has(id)) { best = id; within = far; }
    }
    return best;
  },
};

// A canvas as large as it is shown, in CSS pixels.
function surface(canvas) {
  const w = canvas.clientWidth, h = canvas.clientHeight, dpr = Math.min(2, devicePixelRatio || 1);
  if (canvas.width !== Math.round(w * dpr) || canvas.height !== Math.round(h * dpr)) {
    canvas.width = Math.round(w * dpr);
    canvas.height = Math.round(h * dpr);
  }
  const ctx = canvas.getContext("2d");
  ctx.setTransform(dpr, 0, 0, dpr, 0, 0);
  ctx.clearRect(0, 0, w, h);
  return [ctx, w, h];
}

let palette = null;
function colours() {
  if (palette) return palette;
  const style = getComputedStyle(document.documentElement);
  palette = {};
  for (const name of ["ink", "soft", "line", "cell", "cached", "accent", "good", "bad", "track", "card"]) {
    palette[name] = style.getPropertyValue(`--${name}`).trim();
  }
  return palette;
}
