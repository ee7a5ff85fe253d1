"""What OpenAI's older routes take. Shapes only: ranges and combinations are checked in convert.py.

Unknown fields are refused, as OpenAI does: a misspelt option must not be ignored in silence. Fields of servers that
users come from (TGI, vLLM) are listed where we honour them, and in `NEUTRAL` where we cannot.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from ..meaning import means, only

OBJECT = ["object", "null"]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    include_usage: Annotated[bool | None, means("one more chunk at the end, with the usage")] = None
    include_obfuscation: Annotated[bool | None, means("padding of the chunks: only false")] = None


class TextPart(msgspec.Struct, frozen=True):
    """One part of a message's content."""

    type: Annotated[str, means("`text`; other types are refused by name")]
    text: Annotated[str | None, means("the part's text")] = None


class CalledFunction(msgspec.Struct, frozen=True):
    name: Annotated[str, means("the function's name")]
    arguments: Annotated[Any, means("a string of JSON; clients of TGI send the object itself")] = None


class ToolCall(msgspec.Struct, frozen=True):
    """A call of an earlier answer, as the client gives it back."""

    function: CalledFunction
    id: Annotated[str | None, means("what the tool's message names in `tool_call_id`")] = None
    type: Annotated[str, means("`function`")] = "function"


class Message(msgspec.Struct, frozen=True):
    role: Annotated[str, means("system, developer, user, assistant or tool; templates may know others")]
    content: Annotated[str | list[TextPart] | None, means("the text, whole or in parts")] = None
    name: Annotated[str | None, means("who speaks, for templates that show it")] = None
    tool_call_id: Annotated[str | None, means("of a tool's message: the call that it answers")] = None
    refusal: Annotated[str | None, means("stands in for the content of an assistant that refused")] = None
    tool_calls: Annotated[list[ToolCall] | None, means("of an assistant's message: its calls")] = None
    reasoning_content: Annotated[str | None, means("thoughts of an earlier answer, for templates that show them")] = (
        None
    )
    function_call: Annotated[Any, means("OpenAI's older form of `tool_calls`: refused unless null")] = None
    audio: Annotated[Any, means("refused unless null")] = None


class Function(msgspec.Struct, frozen=True, kw_only=True):
    name: Annotated[str, means("up to 64 of A-Z a-z 0-9 _ . -")]
    description: Annotated[str | None, means("what it does, for the model")] = None
    parameters: Annotated[dict[str, Any] | None, means("JSON Schema of the arguments")] = None
    arguments: Annotated[dict[str, Any] | None, means("TGI's other name for `parameters`")] = None
    strict: Annotated[
        bool | None,
        means("makes no difference: forced calls always fit the parameters, of free ones nothing can be promised"),
    ] = None


class Tool(msgspec.Struct, frozen=True):
    type: Annotated[str, means("`function`")]
    function: Function | None = None


class RequestFields(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What all routes that generate take."""

    model: Annotated[str | None, means("the served model's name, `tgi`, or nothing; others are a 404")] = None
    stream: Annotated[bool | None, means("send the answer in events while it is generated")] = None
    stream_options: Annotated[StreamOptions | None, means("only with `stream`")] = None
    temperature: Annotated[
        float | None, means("0 to 2, 0 always takes the likeliest token; 1 if absent", minimum=0, maximum=2)
    ] = None
    top_p: Annotated[
        float | None,
        means("draw from the likeliest tokens that make up this share; 1 if absent", exclusiveMinimum=0, maximum=1),
    ] = None

    # Accepted: they do not concern the answer.
    metadata: Annotated[dict[str, Any] | None, means("no effect on the answer")] = None
    prompt_cache_key: Annotated[str | None, means("no effect: all prompts share one prefix cache")] = None
    prompt_cache_options: Annotated[dict[str, Any] | None, means("no effect")] = None
    prompt_cache_retention: Annotated[str | None, means("no effect")] = None
    safety_identifier: Annotated[str | None, means("no effect")] = None
    user: Annotated[str | None, means("no effect")] = None

    service_tier: Annotated[Any, only("there is one tier", NEUTRAL["service_tier"])] = None
    store: Annotated[Any, only("nothing is stored", NEUTRAL["store"])] = None


class SamplingFields(RequestFields, frozen=True, kw_only=True):
    """What the two completion routes take."""

    frequency_penalty: Annotated[
        float | None, means("-2 to 2, for each time that a token was generated", minimum=-2, maximum=2)
    ] = None
    logit_bias: Annotated[dict[str, float] | None, means("token id to what is added to its logit, -100 to 100")] = None
    max_tokens: Annotated[
        int | None, means("how many tokens at most; absent: until the context is full", minimum=1)
    ] = None
    n: Annotated[
        int | None, means("how many choices, 1 to 16; their seeds are `seed`, `seed` + 1, ...", minimum=1, maximum=16)
    ] = None
    presence_penalty: Annotated[
        float | None, means("-2 to 2, once for each token that was generated", minimum=-2, maximum=2)
    ] = None
    seed: Annotated[
        int | None,
        means("the same seed gives the same answer, whatever else is running", minimum=-(2**63), maximum=2**64 - 1),
    ] = None
    stop: Annotated[str | list[str] | None, means("strings that end the answer; they are not part of it")] = None

    response_format: Annotated[
        Any,
        means("OpenAI's text, json_object and json_schema, or TGI's `{type, value}` with json or regex", type=OBJECT),
    ] = None
    guided_choice: Annotated[Any, means("vLLM's: a list of the answers that are allowed", type=["array", "null"])] = (
        None
    )
    guided_grammar: Annotated[Any, means("vLLM's: a Lark grammar", type=["string", "null"])] = None
    guided_json: Annotated[Any, means("vLLM's: a JSON Schema, or a string that holds one")] = None
    guided_regex: Annotated[
        Any, means("vLLM's: a regular expression for the whole answer", type=["string", "null"])
    ] = None
    structured_outputs: Annotated[
        Any, means("vLLM's: one of `json`, `regex`, `choice`, `grammar`, or `json_object: true`", type=OBJECT)
    ] = None

    # Not OpenAI's, but asked for by users of other servers.
    ignore_eos: Annotated[bool | None, means("go on when the model wants to end")] = None
    min_p: Annotated[
        float | None, means("0 to 1: drop tokens less likely than this part of the likeliest", minimum=0, maximum=1)
    ] = None
    min_tokens: Annotated[int | None, means("no end before so many tokens", minimum=0)] = None
    repetition_penalty: Annotated[
        float | None, means("0.01 to 100, above 1 against what prompt and answer hold", minimum=0.01, maximum=100)
    ] = None
    top_k: Annotated[int | None, means("draw from so many likeliest tokens; 0 or -1: from all", minimum=-1)] = None


class ChatRequest(SamplingFields, frozen=True, kw_only=True):
    messages: Annotated[list[Message], means("the conversation; at least one")]
    logprobs: Annotated[bool | None, means("tell the tokens and their log-probabilities")] = None
    max_completion_tokens: Annotated[int | None, means("OpenAI's newer name for `max_tokens`", minimum=1)] = None
    reasoning_effort: Annotated[
        str | None, means("none, minimal, low, medium, high, xhigh or max, for templates that know thoughts")
    ] = None
    top_logprobs: Annotated[
        int | None, means("so many alternatives for each token, 0 to 20; needs `logprobs`", minimum=0, maximum=20)
    ] = None

    parallel_tool_calls: Annotated[bool | None, means("false: one call at most")] = None
    tool_choice: Annotated[
        str | dict[str, Any] | None, means("auto, none, required, a function by name, or OpenAI's allowed_tools")
    ] = None
    tool_prompt: Annotated[str | None, means("TGI's: words about the tools, put behind the last message")] = None
    tools: Annotated[list[Tool] | None, means("functions that the model may call, up to 128")] = None

    add_generation_prompt: Annotated[bool | None, means("false: the prompt ends with the last message")] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, means("variables for the model's chat template")] = None
    continue_final_message: Annotated[
        bool | None, means("absent: exactly if the last message is the assistant's, as in TGI")
    ] = None

    audio: Annotated[Any, only("text only", NEUTRAL["audio"])] = None
    best_of: Annotated[Any, only("only on /v1/completions", (1,))] = None
    function_call: Annotated[Any, only("use `tool_choice`", NEUTRAL["function_call"])] = None
    functions: Annotated[Any, only("use `tools`", NEUTRAL["functions"])] = None
    modalities: Annotated[Any, only("text only", NEUTRAL["modalities"])] = None
    prediction: Annotated[Any, only("not supported", NEUTRAL["prediction"])] = None
    verbosity: Annotated[Any, only("say it in the prompt", NEUTRAL["verbosity"])] = None
    web_search_options: Annotated[Any, only("the server searches nothing", NEUTRAL["web_search_options"])] = None


class CompletionRequest(SamplingFields, frozen=True, kw_only=True):
    prompt: Annotated[
        str | list[str | int | list[int]], means("a text, token ids, or a list of either, which is a batch")
    ]
    best_of: Annotated[
        int | None, means("generate so many for each prompt and answer with the `n` likeliest", minimum=1, maximum=16)
    ] = None
    echo: Annotated[bool | None, means("put the prompt in front of the answer")] = None
    logprobs: Annotated[
        int | None,
        means("so many alternatives for each token, 0 to 20; with `echo` also for the prompt's", minimum=0, maximum=20),
    ] = None
    max_tokens: Annotated[
        int | None,
        means("how many tokens at most; absent: until the context is full; 0 with `echo`: the prompt alone", minimum=0),
    ] = None

    suffix: Annotated[Any, only("the model continues text, it does not fill gaps", NEUTRAL["suffix"])] = None


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields that cannot be honoured, with the values, besides null, that ask for nothing."""
