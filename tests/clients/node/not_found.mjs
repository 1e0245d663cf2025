import { client, failure, tell } from './client.mjs';

tell(await failure(client.completions.create({ model: 'nobodys', prompt: 'to be or not' })));
