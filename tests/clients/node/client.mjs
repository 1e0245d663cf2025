// The client of every script here: which gateway, whose key and what the request is called stand in the environment.
import OpenAI from 'openai';

const { GATEWAY, KEY, CALLED } = process.env;

export const { MODEL } = process.env;
export const user = CALLED;
export const client = new OpenAI({
  baseURL: `${GATEWAY}/v1`,
  apiKey: KEY,
  defaultHeaders: { 'x-request-id': CALLED },
});

export async function all(stream) {
  const events = [];
  for await (const event of stream) events.push(event);
  return events;
}

// An error as a caller finds it, by what fails; or nothing, where nothing does.
export async function failure(promise) {
  try {
    await promise;
    return null;
  } catch (error) {
    const { name, status, code, type, param, requestID, message } = error;
    return { name, status, code, type, param, requestID, message, retry: error.headers?.get('x-should-retry') };
  }
}

export function tell(what) {
  console.log(JSON.stringify(what));
}
