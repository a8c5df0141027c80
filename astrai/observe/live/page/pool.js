// The page pool: a cell per page frame, or per run of frames when there are too many to tell apart.
const MAX_CELLS = 4096;
const pool = {
  canvas: $("pool"), flashes: new Map(), arrows: [], cursor: -1, dirty: true, pattern: null,

  restart() { this.flashes.clear(); this.arrows = []; this.dirty = true; this.grid = null; },

  changed(frame, before, after) {
    this.dirty = true;
    const kind = after > before && after > 1 ? "share" : after > 0 && before <= 0 ? "take" : "leave";
    if (this.flashes.size < 2000) this.flashes.set(this.cellOf(frame), { kind, at: performance.now() });
  },

  mark([, kind, , about]) {
    const now = performance.now();
    if (kind === "evict") for (const frame of about) this.flashes.set(this.cellOf(frame), { kind, at: now });
    if (kind === "copy" && this.arrows.length < 32) {
      this.arrows.push({ from: about[0], to: about[1], at: now });
      this.flashes.set(this.cellOf(about[1]), { kind, at: now });
    }
  },

  cellOf(frame) { return Math.floor(frame / this.per()); },
  per() { return Math.max(1, Math.ceil(engine.pages.length / MAX_CELLS)); },

  layout() {
    const w = this.canvas.clientWidth, per = this.per(), n = Math.ceil(engine.pages.length / per);
    if (this.grid && this.grid.w === w && this.grid.n === n) return this.grid;
    let columns = 8, size = 0;
    for (columns of [8, 16, 32, 64, 128]) { // rows end where words of the mask do
      size = Math.min(34, w / columns);
      if ((w / columns <= 36 && Math.ceil(n / columns) * size <= 290) || w / (2 * columns) < 5) break;
    }
    this.grid = { w, n, per, columns, size, rows: Math.ceil(n / columns) };
    this.canvas.style.height = `${Math.max(24, Math.ceil(this.grid.rows * size) + 2)}px`;
    return this.grid;
  },

  // State of a cell: of its one frame, or of most of its frames.
  cell(i, per) {
    if (per === 1) {
      const refs = engine.pages[i];
      return { refs, holders: engine.holders[i] || [], held: refs > 0 ? 1 : 0, cached: refs === CACHED ? 1 : 0, n: 1 };
    }
    let held = 0, cached = 0, most = 0, n = 0;
    const holders = new Set();
    for (let f = i * per; f < Math.min(engine.pages.length, (i + 1) * per); f++, n++) {
      const refs = engine.pages[f];
      if (refs > 0) { held++; most = Math.max(most, refs); if (holders.size < 2) for (const id of engine.holders[f] || []) holders.add(id); }
      else if (refs === CACHED) cached++;
    }
    return { refs: held ? most : cached ? CACHED : FREE, holders: [...holders], held, cached, n };
  },

  draw(now) {
    const g = this.layout(), [ctx] = surface(this.canvas), style = colours();
    const pick = shown(), table = pick == null ? null : new Set((engine.tables.get(pick) || []).map((f) => this.cellOf(f)));
    const inset = g.size > 12 ? 1.5 : 0.75, edge = g.size - 2 * inset;
    for (let i = 0; i < g.n; i++) {
      const x = (i % g.columns) * g.size + inset, y = Math.floor(i / g.columns) * g.size + inset;
      this.paint(ctx, style, this.cell(i, g.per), x, y, edge, table && table.size && !table.has(i));
    }
    this.flash(ctx, style, g, now);
    this.arrow(ctx, style, g, now);
    if (this.cursor >= 0 && (document.activeElement === this.canvas || this.hover)) {
      const i = this.cursor;
      ctx.strokeStyle = style.ink; ctx.lineWidth = 2;
      ctx.strokeRect((i % g.columns) * g.size + 1, Math.floor(i / g.columns) * g.size + 1, g.size - 2, g.size - 2);
    }
    this.dirty = this.flashes.size > 0 || this.arrows.length > 0;
  },

  paint(ctx, style, cell, x, y, edge, dim) {
    const radius = Math.min(4, edge / 5);
    const box = () => { ctx.beginPath(); ctx.roundRect(x, y, edge, edge, radius); };
    ctx.globalAlpha = dim ? 0.34 : 1;
    box();
    ctx.fillStyle = style.cell;
    ctx.fill();
    if (cell.refs > 0) {
      const [first, second] = cell.holders.map((id) => engine.tasks.get(id));
      ctx.globalAlpha = (dim ? 0.34 : 1) * (cell.n > 1 ? 0.3 + 0.7 * cell.held / cell.n : 1);
      ctx.fillStyle = colourOf(first) || style.soft;
      ctx.fill();
      if (cell.refs > 1 && second) {
        ctx.save(); box(); ctx.clip();
        ctx.beginPath(); ctx.moveTo(x + edge, y); ctx.lineTo(x + edge, y + edge); ctx.lineTo(x, y + edge);
        ctx.fillStyle = colourOf(second) || style.soft; ctx.fill(); ctx.restore();
      }
      if (cell.refs > 1 && edge >= 10) {
        const small = edge < 13, cx = x + edge / 2, cy = y + edge / 2;
        ctx.textAlign = "center"; ctx.textBaseline = "middle";
        ctx.font = `700 ${small ? 9 : Math.min(11, edge * 0.5)}px system-ui, sans-serif`;
        if (small) { ctx.strokeStyle = style.card; ctx.lineWidth = 3; ctx.strokeText(cell.refs, cx, cy + 0.5); }
        else { ctx.beginPath(); ctx.arc(cx, cy, Math.min(8, edge * 0.36), 0, 7); ctx.fillStyle = style.card; ctx.fill(); }
        ctx.fillStyle = style.ink;
        ctx.fillText(cell.refs, cx, cy + 0.5);
      } else if (cell.refs > 1) {
        box(); ctx.lineWidth = 1.2; ctx.strokeStyle = style.ink; ctx.stroke();
      } else if (edge >= 20 && first) {
        ctx.fillStyle = inkOf(first) || style.card; ctx.textAlign = "center"; ctx.textBaseline = "middle";
        ctx.font = "600 10px system-ui, sans-serif";
        ctx.fillText(label(first.id), x + edge / 2, y + edge / 2 + 0.5);
      }
    } else if (cell.refs === CACHED) {
      ctx.save(); box(); ctx.clip();
      ctx.globalAlpha = (dim ? 0.34 : 1) * (cell.n > 1 ? 0.3 + 0.7 * cell.cached / cell.n : 1);
      ctx.strokeStyle = style.cached; ctx.lineWidth = edge > 12 ? 2 : 1.2;
      ctx.beginPath();
      for (let d = -edge; d < edge; d += edge > 12 ? 5 : 3.2) { ctx.moveTo(x + d, y + edge); ctx.lineTo(x + d + edge, y); }
      ctx.stroke(); ctx.restore();
    }
    ctx.globalAlpha = 1;
  },

  flash(ctx, style, g, now) {
    for (const [i, { kind, at }] of this.flashes) {
      const age = (now - at) / (kind === "evict" || kind === "copy" ? 1300 : 700);
      if (age >= 1) { this.flashes.delete(i); continue; }
      const x = (i % g.columns) * g.size, y = Math.floor(i / g.columns) * g.size;
      ctx.globalAlpha = 1 - Math.max(0, age);
      ctx.strokeStyle = kind === "evict" ? style.bad : kind === "copy" ? style.good : kind === "leave" ? style.soft : style.ink;
      ctx.lineWidth = g.size > 12 ? 2.2 : 1.4;
      ctx.beginPath(); ctx.roundRect(x + 1, y + 1, g.size - 2, g.size - 2, 4); ctx.stroke();
    }
    ctx.globalAlpha = 1;
  },

  arrow(ctx, style, g, now) {
    const middle = (frame) => {
      const i = this.cellOf(frame);
      return [(i % g.columns + 0.5) * g.size, (Math.floor(i / g.columns) + 0.5) * g.size];
    };
    this.arrows = this.arrows.filter(({ at }) => now - at < 1500);
    for (const { from, to, at } of this.arrows) {
      const [x0, y0] = middle(from), [x1, y1] = middle(to);
      ctx.globalAlpha = 1 - (now - at) / 1500;
      ctx.strokeStyle = ctx.fillStyle = style.good; ctx.lineWidth = 2.5;
      ctx.beginPath(); ctx.moveTo(x0, y0); ctx.quadraticCurveTo((x0 + x1) / 2, Math.min(y0, y1) - 26, x1, y1); ctx.stroke();
      ctx.beginPath(); ctx.arc(x1, y1, 4, 0, 7); ctx.fill();
    }
    ctx.globalAlpha = 1;
  },

  point(i) { // the cursor is on cell i: say what it is
    const g = this.layout();
    if (!g.n) return;
    this.cursor = i < 0 ? -1 : Math.min(Math.max(i, 0), g.n - 1);
    this.dirty = touched = true;
    $("cell").textContent = this.cursor < 0 ? "" : this.describe(this.cursor, g);
  },

  describe(i, g) {
    const cell = this.cell(i, g.per), last = Math.min(engine.pages.length, (i + 1) * g.per) - 1;
    const name = g.per === 1 ? `Page ${i}` : `Pages ${i * g.per} to ${last}`;
    if (g.per > 1) return `${name}: ${cell.held} held, ${cell.cached} cached, ${cell.n - cell.held - cell.cached} free`;
    if (cell.refs === FREE) return `${name}: free`;
    if (cell.refs === CACHED) return `${name}: cached, refs 0`;
    const where = cell.holders.map((id) => `request ${id} (its page ${engine.tables.get(id).indexOf(i)})`);
    return `${name}: refs ${cell.refs}, held by ${where.join(", ")}`;
  },

  holderAt(i) { return i < 0 ? null : this.cell(i, this.per()).holders[0] ?? null; },
  cellAt(event) {
    const box = this.canvas.getBoundingClientRect(), g = this.layout();
    const column = Math.floor((event.clientX - box.left) / g.size), row = Math.floor((event.clientY - box.top) / g.size);
    const i = row * g.columns + column;
    return column < g.columns && row >= 0 && i < g.n ? i : -1;
  },

  listen() {
    const c = this.canvas;
    c.addEventListener("pointermove", (event) => {
      this.hover = true;
      const i = this.cellAt(event);
      if (i !== this.cursor) { this.point(i); hover(this.holderAt(i)); }
    });
    c.addEventListener("pointerleave", () => { this.hover = false; this.point(-1); hover(null); });
    c.addEventListener("click", () => { const id = this.holderAt(this.cursor); if (id != null) select(id); });
    c.addEventListener("blur", () => { this.point(-1); hover(null); });
    c.addEventListener("keydown", (event) => {
      const g = this.layout(), step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: g.columns, ArrowUp: -g.columns }[event.key];
      if (step) { event.preventDefault(); this.point(this.cursor < 0 ? 0 : Math.max(0, this.cursor + step)); hover(this.holderAt(this.cursor)); }
      if (event.key === "Home") { event.preventDefault(); this.point(0); }
      if (event.key === "End") { event.preventDefault(); this.point(g.n - 1); }
      if (event.key === "Enter") { const id = this.holderAt(this.cursor); if (id != null) select(id); }
    });
  },

  mask() { // the free mask as text: bit i belongs to page i
    const n = engine.pages.length, wide = innerWidth > 640 ? 64 : 32, lines = [];
    const bit = (f) => (engine.pages[f] === FREE ? 1 : 0);
    if (n <= 2048) {
      for (let start = 0; start < n; start += wide) {
        let line = String(start).padStart(5) + "  ";
        for (let f = start; f < Math.min(n, start + wide); f++) line += bit(f) + (f % 8 === 7 ? " " : "");
        lines.push(line);
      }
      return lines.join("\n");
    }
    for (let start = 0; start < Math.min(n, 64 * 512); start += 64) { // words of 64 bits
      let word = 0n;
      for (let f = Math.min(n, start + 64) - 1; f >= start; f--) word = (word << 1n) | BigInt(bit(f));
      lines.push(String(start).padStart(7) + "  0x" + word.toString(16).padStart(16, "0"));
    }
    if (n > 64 * 512) lines.push(`and ${big(n - 64 * 512)} pages more`);
    return lines.join("\n");
  },
};
