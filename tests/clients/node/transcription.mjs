import { toFile } from 'openai';
import { client, MODEL, tell } from './client.mjs';

// In this order the model's name stands behind the whole file.
const file = await toFile(Buffer.alloc(1_000_000, 'sound'), 'a.wav');
tell(await client.audio.transcriptions.create({ file, model: MODEL, prompt: 'to be or not #tokens=6' }));
