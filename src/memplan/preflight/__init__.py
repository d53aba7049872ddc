"""
Budget against capacity, and everything on this machine that a job could trip over.

* `verdict`: `judge` a result on a capacity
* `environment`: the allocator settings as variables, by torch version
* `lints`: what costs memory or fails
* `live`, `disk`: what is on the card, what is free on the disk
* `run`: `run_preflight`, all of it together

Nothing is imported here: an estimate needs the verdict alone, and its start is counted in milliseconds.
"""
