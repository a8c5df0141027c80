"""How a server meets the world: who may come in, from where, and what is written down of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.middleware.cors import CORSMiddleware

from astrai.config import DoorConfig
from astrai.server.http.access import Access
from astrai.server.http.guard import Guard
from astrai.server.http.keys import KeyRing

if TYPE_CHECKING:
    from fastapi import FastAPI

    from astrai.observe.metrics import Metrics
    from astrai.observe.tracing import Tracing


@dataclass(frozen=True, slots=True)
class Door:
    keys: KeyRing = field(default_factory=KeyRing)
    open_metrics: bool = False  # /metrics without a key
    cors_origins: tuple[str, ...] = ()  # "*": any; none: browsers keep other sites' pages out
    log_prompts: bool = False
    tracing: Tracing | None = None

    @classmethod
    def of(cls, config: DoorConfig, keys: KeyRing, tracing: Tracing | None) -> Door:
        return cls(
            keys=keys,
            open_metrics=config.open_metrics,
            cors_origins=config.cors_origins,
            log_prompts=config.log_prompts,
            tracing=tracing,
        )

    def guard(self, app: FastAPI, metrics: Metrics) -> None:
        """Put the middlewares around `app`: the account sees all, CORS also sees refusals."""
        app.add_middleware(Guard, keys=self.keys, open_metrics=self.open_metrics)
        if self.cors_origins:
            app.add_middleware(
                CORSMiddleware,
                allow_origins=list(self.cors_origins),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
        app.add_middleware(
            Access, metrics=metrics, tracing=self.tracing, log_prompts=self.log_prompts
        )


OPEN = Door()
