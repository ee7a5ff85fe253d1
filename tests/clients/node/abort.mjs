// Leaves a long answer in the middle, as a page does that is closed.

import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.TOKENPLANE_URL}/v1`, apiKey: "none", maxRetries: 0 });
const { messages } = JSON.parse(process.env.TOKENPLANE_CASES);
const request = { model: "tgi", messages, max_tokens: 1500, ignore_eos: true, stream: true };
const stream = await client.chat.completions.create(request);
let chunks = 0;
for await (const _ of stream) if (++chunks === 3) break;
await new Promise((ready) => setTimeout(ready, 500)); // the process lives on, only the request has ended
console.log(chunks);
