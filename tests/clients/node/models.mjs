import { all, client, MODEL, tell } from './client.mjs';

tell({ listed: await all(client.models.list()), found: await client.models.retrieve(MODEL) });
