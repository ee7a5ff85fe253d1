// openai for Node against the server at TOKENPLANE_URL: what a JavaScript application relies on.

import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";

const url = process.env.TOKENPLANE_URL;
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const { messages, schema, response_format, tool, tooHot } = JSON.parse(process.env.TOKENPLANE_CASES);
const ask = (options) => client.chat.completions.create({ model: "tgi", messages, max_tokens: 300, ...options });

const fits = (city) => {
  assert.deepEqual(Object.keys(city).sort(), Object.keys(schema.properties).sort());
  assert.ok(schema.properties.kind.enum.includes(city.kind));
  assert.ok([...city.name].length <= schema.properties.name.maxLength);
};

test("chat with logprobs", async () => {
  const answer = await ask({ max_tokens: 8, temperature: 0, logprobs: true, top_logprobs: 2 });
  const [choice] = answer.choices;
  assert.equal(choice.finish_reason, "length");
  assert.equal(choice.logprobs.content.length, 8);
  const bytes = choice.logprobs.content.flatMap((token) => token.bytes);
  assert.equal(new TextDecoder().decode(new Uint8Array(bytes)), choice.message.content);
  assert.ok(choice.logprobs.content.every((token) => token.top_logprobs[0].logprob === token.logprob));
});

test("a stream is the same answer", async () => {
  const whole = await ask({ max_tokens: 8, seed: 3 });
  let text = "";
  let usage;
  const options = { stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await ask({ max_tokens: 8, seed: 3, ...options })) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.deepEqual(usage.completion_tokens, whole.usage.completion_tokens);
});

test("forced tools, whole and streamed", async () => {
  const options = { tools: [tool], tool_choice: "required", parallel_tool_calls: false, seed: 1 };
  const [choice] = (await ask(options)).choices;
  assert.equal(choice.finish_reason, "tool_calls");
  const [call] = choice.message.tool_calls;
  assert.equal(call.function.name, "find_city");
  fits(JSON.parse(call.function.arguments));
  const stream = client.chat.completions.stream({ model: "tgi", messages, max_tokens: 300, ...options });
  const final = await stream.finalMessage();
  assert.equal(final.tool_calls[0].function.arguments, call.function.arguments);
});

test("runTools calls our function with what the model wrote", async () => {
  const seen = [];
  const find = { ...tool.function, parse: JSON.parse, function: (city) => void seen.push(city) };
  const tools = [{ type: "function", function: find }];
  const forced = { tools, tool_choice: "required", parallel_tool_calls: false };
  const request = { model: "tgi", messages, max_tokens: 300, seed: 1, ...forced };
  const runner = client.chat.completions.runTools(request, { maxChatCompletions: 1 });
  await runner.done();
  assert.equal(seen.length, 1);
  fits(seen[0]);
});

test("structured output", async () => {
  const request = { model: "tgi", messages, max_tokens: 200, response_format, seed: 1 };
  const answer = await client.chat.completions.parse(request);
  fits(JSON.parse(answer.choices[0].message.content));
});

test("responses, whole and streamed", async () => {
  const options = { model: "tgi", input: messages[0].content, max_output_tokens: 20, temperature: 0 };
  const whole = await client.responses.create(options);
  assert.ok(whole.output_text);
  let text = "";
  for await (const event of await client.responses.create({ ...options, stream: true })) {
    if (event.type === "response.output_text.delta") text += event.delta;
  }
  assert.equal(text, whole.output_text);
});

test("models are listed", async () => {
  const models = [];
  for await (const model of client.models.list()) models.push(model);
  assert.equal(models.length, 1);
  assert.equal((await client.models.retrieve(models[0].id)).id, models[0].id);
});

test("errors have their class, message and field", async () => {
  const { BadRequestError, NotFoundError } = OpenAI;
  await assert.rejects(ask({ temperature: 9 }), (error) => {
    assert.ok(error instanceof BadRequestError);
    assert.equal(error.message, `400 ${tooHot}`);
    assert.deepEqual([error.param, error.code, error.type], ["temperature", "invalid_value", "invalid_request_error"]);
    assert.match(error.requestID, /./);
    return true;
  });
  await assert.rejects(ask({ model: "gpt-none" }), NotFoundError);
});
