"""The HTTP edge: text in, text out. The engine behind it speaks token ids.

A chat request on its way, and where to look:

    connection   the socket: bounds on what is not yet a request
    access       the account of it: a log line, a metric, a span
    guard        keys, tenants, limits of headers and of a body's parts
    routes/      which path is whose
    fields       JSON into checked fields, refusals by name; errors: what a refusal looks like
    openai, messages, structured, tools/     what each field means
    (dialects, responses, anthropic: the same said in another API's words)
    prompts      through the chat template, in a timebox, to token ids; chat: what that one knows
    edge         into the book of requests, to the engine, and its deltas out
    engine_process ⇄ pipes ⇄ engine_child    the engine's inbox, in its own process, and back
    parts, reasoning, tools/reader           the text read into thought, text and calls
    replies      those written as OpenAI's bodies or chunks; streaming: as events, until the client
                 is gone
"""
