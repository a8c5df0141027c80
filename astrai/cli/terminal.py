"""`astrai chat`: a conversation in the terminal, streamed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import aclosing
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from astrai.front.async_engine import AsyncEngine
    from astrai.front.sampling_params import SamplingParams

_COMMANDS = ("/exit", "/reset")


class Chat:
    """Owns the conversation; does not own the engine's configuration.

    An answer that was stopped stays in the conversation as far as it got.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        params: SamplingParams,
        system: str | None,
        console: Console | None = None,
    ) -> None:
        if not engine.tokenizer.has_chat_template:
            raise ValueError(f"{engine.model_name} has no chat template: use astrai generate")
        self._engine = engine
        self._params = params
        self._first = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._first)
        self._console = console or Console(highlight=False)
        self._answers = 0

    def loop(self) -> None:
        """Until /exit, the end of the input, or Ctrl-C at the prompt."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
        self._note(f"{self._engine.model_name}: {', '.join(_COMMANDS)}, Ctrl-C stops an answer")
        with asyncio.Runner() as runner:
            self._engine.start()
            try:
                while (said := self._read()) is not None:
                    self._turn(runner, said)
            finally:
                runner.run(self._engine.shutdown())

    def _read(self) -> str | None:
        try:
            said = self._console.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            self._console.print()
            return None
        return None if said == "/exit" else said

    def _turn(self, runner: asyncio.Runner, said: str) -> None:
        if said == "/reset":
            self._messages = list(self._first)
            self._note("forgotten")
        elif said.startswith("/"):
            self._note(f"unknown command {said}; there are: {', '.join(_COMMANDS)}")
        elif said:
            self._messages.append({"role": "user", "content": said})
            texts: list[str] = []
            try:
                runner.run(self._answer(texts))
            except KeyboardInterrupt:
                self._console.print()
                self._note("stopped")
            except ValueError as error:
                self._messages.pop()
                self._note(f"{error} (/reset forgets the conversation)")
                return
            self._messages.append({"role": "assistant", "content": "".join(texts)})

    async def _answer(self, texts: list[str]) -> None:
        ids = self._engine.tokenizer.apply_chat_template(self._messages)
        self._answers += 1
        stream = self._engine.stream(ids, self._params, request_id=f"chat-{self._answers}")
        first = 0.0
        async with aclosing(stream) as deltas:
            async for delta in deltas:
                first = first or time.perf_counter()
                texts.append(delta.text)
                self._say(delta.text)
                if delta.finish_reason is not None:
                    self._console.print()
                if delta.error is not None:
                    self._note(f"error: {delta.error}")
                elif delta.usage is not None and delta.finish_reason is not None:
                    n, seconds = delta.usage.completion_tokens, time.perf_counter() - first
                    rate = f", {(n - 1) / seconds:.0f} tokens/s" if n > 1 and seconds > 0 else ""
                    cut = ", cut at the limit" if delta.finish_reason == "length" else ""
                    self._note(f"{n} tokens{rate}{cut}")

    def _say(self, text: str) -> None:
        self._console.print(text, end="", markup=False, soft_wrap=True)

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False)
