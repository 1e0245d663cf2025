import { client, failure, MODEL, tell, user } from './client.mjs';

const asked = { model: MODEL, prompt: 'to be or not', user };
tell([await failure(client.completions.create(asked)), await failure(client.completions.create(asked))]);
