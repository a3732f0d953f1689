// Stock clients of npm against a running server: `node stock.mjs BASE_URL MODEL`, next to their node_modules.
// Prints one line of JSON: of each client its version, and what went wrong ("" for nothing).
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import OpenAI from "openai";
import { generateText, streamText } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";

const [base, model] = process.argv.slice(2);
const question = "Name three colours.";
const version = (name) => JSON.parse(readFileSync(`node_modules/${name}/package.json`, "utf8")).version;

const clients = {
  openai: async () => {
    const client = new OpenAI({ baseURL: base, apiKey: "none" });
    const asked = { model, messages: [{ role: "user", content: question }], max_tokens: 24, temperature: 0 };
    const whole = (await client.chat.completions.create(asked)).choices[0].message.content;
    let streamed = "";
    for await (const piece of await client.chat.completions.create({ ...asked, stream: true }))
      streamed += piece.choices[0]?.delta?.content ?? "";
    assert.ok(whole);
    assert.equal(streamed, whole);
    await assert.rejects(client.chat.completions.create({ ...asked, model: "none" }), OpenAI.NotFoundError);
  },
  ai: async () => {
    const provider = createOpenAICompatible({ name: "lab", baseURL: base, apiKey: "none", includeUsage: true });
    const asked = { model: provider(model), prompt: question, maxOutputTokens: 24, temperature: 0, maxRetries: 0 };
    const whole = await generateText(asked);
    const stream = streamText(asked);
    let streamed = "";
    for await (const piece of stream.textStream) streamed += piece;
    assert.ok(whole.text);
    assert.equal(streamed, whole.text);
    assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
  },
};

const found = [];
for (const [name, use] of Object.entries(clients)) {
  let fault = "";
  try {
    await use();
  } catch (error) {
    console.error(error);
    fault = String(error).replace(/\s+/g, " ").slice(0, 200);
  }
  found.push({ client: `npm ${name}`, version: version(name), fault });
}
console.log(JSON.stringify(found));
