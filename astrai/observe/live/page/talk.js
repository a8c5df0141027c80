// The chat box and the burst: ordinary requests to the server's own API.
const SUBJECTS = [
  "You are a patient teacher who explains how computers work to curious people. You answer in short, clear sentences, you prefer everyday examples to jargon, you never talk down to anybody, and when you are not sure you say so. You begin with the one thing that matters most, then add what helps, and stop when the question is answered.",
  "You are the editor of a small travel magazine. You know the railways, harbours and mountain paths of Europe well, you care about food, weather and the names of birds, and you write two or three vivid sentences rather than a list. Prices and opening hours you leave out, because they change; what a place sounds and smells like, you put in.",
  "You are a careful cook. You give amounts in grams, temperatures in degrees Celsius and times in minutes, you name what can go wrong and how to save it, and you suggest one substitute for anything that is hard to find. Your readers have one pot, one pan and not much time, so every step has to earn its place on the page.",
];
const ASKS = ["Where do I begin?", "Tell me about the sea.", "What is the most common mistake, and how would I notice that I had made it?", "Give me a short example."];
const talk = {
  messages: [], model: null, busy: false,

  async send(text) {
    this.busy = true;
    $("talk").querySelector(".empty")?.remove();
    $("ask").querySelector(".main").disabled = true;
    this.bubble("me", text);
    this.messages.push({ role: "user", content: text });
    if (this.messages.length > 12) this.messages.splice(0, this.messages.length - 12);
    const bubble = this.bubble("it", "…");
    try {
      const answer = await post("v1/chat/completions", { messages: this.messages, stream: true, max_tokens: 200 });
      this.tie(bubble, answer.headers.get("x-request-id"));
      let said = "";
      for await (const chunk of lines(answer.body)) {
        if (chunk === "[DONE]") break;
        const part = JSON.parse(chunk);
        if (part.error) throw new Error(part.error.message);
        said += part.choices?.[0]?.delta?.content ?? "";
        bubble.textContent = said || "…";
        $("talk").scrollTop = $("talk").scrollHeight;
      }
      this.messages.push({ role: "assistant", content: said });
      say("Answer complete: " + said.slice(0, 400));
    } catch (error) {
      bubble.textContent = error.message;
      bubble.classList.add("bad");
      this.messages.pop();
      say("The request failed: " + error.message);
    }
    this.busy = false;
    $("ask").querySelector(".main").disabled = false;
  },

  bubble(who, text) {
    const p = document.createElement("p");
    p.className = who;
    p.textContent = text;
    $("talk").append(p);
    while ($("talk").children.length > 24) $("talk").firstChild.remove();
    $("talk").scrollTop = $("talk").scrollHeight;
    return p;
  },

  ties: new Map(), // request name → the bubble that wears its colour
  tie(bubble, name) {
    if (name) this.ties.set(name, bubble);
    if (this.ties.size > 8) this.ties.delete(this.ties.keys().next().value);
  },
  paint() {
    if (!this.ties.size) return;
    for (const task of engine.tasks.values()) {
      const bubble = this.ties.get(task.request);
      if (!bubble || task.colour < 0) continue;
      bubble.style.borderLeftColor = colourOf(task);
      bubble.title = `Request ${task.id}`;
      this.ties.delete(task.request);
    }
  },

  async burst() {
    $("burst").disabled = true;
    say("Sending twelve sample requests");
    // Few calls with many prompts: a browser opens no more than six connections to a server.
    // The later ones find the beginnings of the first in the cache; n: 2 branches off and copies.
    const calls = [
      { max_tokens: 60, subjects: [0, 1, 2] }, { max_tokens: 160, subjects: [0, 1, 2, 1, 0] },
      { max_tokens: 110, subjects: [2, 0], n: 2 },
    ];
    const sends = calls.map(async ({ subjects, ...call }, i) => {
      await new Promise((resolve) => setTimeout(resolve, 800 * i));
      const prompt = subjects.map((subject, j) => `${SUBJECTS[subject]}\n\n${ASKS[(i + j) % ASKS.length]}\n`);
      return (await post("v1/completions", { ...call, prompt, temperature: 0.9, ignore_eos: true })).json();
    });
    const failed = (await Promise.allSettled(sends)).filter((done) => done.status === "rejected");
    say(failed.length ? `${failed.length} of three calls failed: ${failed[0].reason.message}` : "All twelve are answered");
    if (failed.length) this.bubble("it", failed[0].reason.message).classList.add("bad");
    $("burst").disabled = false;
  },
};

async function post(path, body) {
  const answer = await fetch(path, {
    method: "POST",
    headers: { "content-type": "application/json", ...keyed() },
    body: JSON.stringify({ model: talk.model, ...body }),
  });
  if (!answer.ok) {
    const error = await answer.json().catch(() => null);
    throw new Error(error?.error?.message ?? `HTTP ${answer.status}`);
  }
  return answer;
}

// The data lines of a stream of server-sent events.
async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const line of parts) if (line.startsWith("data: ")) yield line.slice(6);
  }
}
