"""
The trainer behind `memplan train`. Importing this package imports no torch; the child process does.

* `launch.py`      child processes, after the checks of `refusals.py` and `output_folder.py`
* `worker.py`      the child: how a run ends, in words, exit code and record
* `run.py`         one run, from the plan to the final weights
* `build.py`       the model: weights, adapters, NPT blocks, activation checkpointing
* `optimizer.py`   optimizer and learning rate
* `loop.py`        the steps, in the order that the planner mirrors
* `loss.py`        full and chunked cross-entropy
* `data.py`        documents, samples, micro batches; `tokens.py` the tokenizers
* `checkpoint.py`  checkpoints that are complete or absent
* `measure.py`     peaks per phase
* `record.py`      `record.json` and `metrics.jsonl`; `report.py` what is printed
"""

from memplan.train.launch import launch

__all__ = ["launch"]
