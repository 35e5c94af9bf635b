// n answers and their vote, with the official OpenAI SDK for Node. In TypeScript, the two fields that
// OpenAI does not have need a cast: `custom_params` in the request, `metadata` in the reply.
import OpenAI from "openai";

const url = process.env.SGLANG_URL ?? "http://localhost:30000";
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const request = {
  model: "default",
  messages: [{ role: "user", content: "What is 19 + 32 + 37 + 47 ?" }],
  n: 8,
  seed: 5,
  max_tokens: 700,
  custom_params: { deepprune: { preset: "balanced" } },
};

// All n choices come back, in order; the record says which of them ran to their end.
const reply = await client.chat.completions.create(request);
const group = reply.metadata.deepprune;

// In a stream the record is the last chunk; it has no choices.
const texts = Array(8).fill("");
let streamed = null;
for await (const chunk of await client.chat.completions.create({ ...request, stream: true })) {
  for (const choice of chunk.choices) texts[choice.index] += choice.delta.content ?? "";
  streamed = chunk.metadata?.deepprune ?? streamed;
}

console.log(
  JSON.stringify({
    answer: group.answer,
    votes: group.votes,
    states: group.choices.map((choice) => choice.state),
    finish_reasons: reply.choices.map((choice) => choice.finish_reason),
    texts: reply.choices.map((choice) => choice.message.content),
    completion_tokens: reply.usage.completion_tokens,
    streamed,
    streamed_texts: texts,
  }),
);
