import { client, MODEL, tell } from './client.mjs';

tell(await client.completions.create({ model: MODEL, prompt: 'to be or not', max_tokens: 6 }));
