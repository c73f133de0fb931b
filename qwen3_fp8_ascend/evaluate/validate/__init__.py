"""``qwen3-fp8-ascend validate``: judge a device, time it, and write one file to send back.

`run` starts a process for each step and keeps a journal; `child` is that process; `plan` says which steps there are;
`checks`, `probes`, `times` and `model` are what they do; `page` is what people read.
"""
