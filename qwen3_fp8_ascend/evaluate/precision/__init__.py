"""How far two runs of the same prompts are apart: `prompts`, `runs` and their files, `metrics`, `compare`, `render`."""
