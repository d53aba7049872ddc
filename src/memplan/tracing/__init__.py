"""
The trace writer: real training steps, run on meta tensors with the libraries at hand, written down as a tape.

* `writer.py`     from a job to its tape
* `build.py`      the job's model on meta tensors, cut to the blocks that have to be run
* `load.py`       how the model gets its memory; `loops.py` the training loops; `optimizers.py` those of bitsandbytes
* `recorder.py`   allocations and frees of whatever runs; `places.py` which module they belong to
* `cuda.py`       what runs on CUDA instead of what meta tensors would run; `sdpa.py`; `autocast.py`; `scratch.py`
* `specs.py`      outputs of operations, remembered by the shapes of their inputs
* `shadow.py`     values of the small tensors that decide what runs
* `calibrate.py`  the recorder for the torch at hand, with its reference counts
* `lean.py`       what a process that only traces does not import; `lazy.py`, `sizes.py`, `model_names.py` how

Importing this package imports no torch; its modules do.
"""
