import { all, client, MODEL, tell } from './client.mjs';

tell(await all(await client.responses.create({ model: MODEL, input: 'to be or not #tokens=6', stream: true })));
