import { client, MODEL, tell } from './client.mjs';

const asked = { model: MODEL, input: ['to be', 'or not'], dimensions: 3 };
tell({
  unpacked: await client.embeddings.create(asked), // asks for base64, and unpacks it
  floats: await client.embeddings.create({ ...asked, encoding_format: 'float' }),
});
