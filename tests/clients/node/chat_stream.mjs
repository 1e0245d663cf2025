import { all, client, MODEL, tell } from './client.mjs';

const messages = [{ role: 'user', content: 'to be or not' }];
const stream_options = { include_usage: true };
tell(await all(await client.chat.completions.create({ model: MODEL, messages, max_tokens: 6, stream: true, stream_options })));
