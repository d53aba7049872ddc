"""
Real steps beside their plans, on the GPU at hand. `python -m benchmarks.record --output DIR --minutes 9`

    __main__     the command
    matrix       the jobs, which are data (matrix.yaml)
    runner       one cell after the other, each in a process, as long as there is time
    probes       what single operations allocate (operations), and what the process takes outside of torch
    loading      the ways of getting a checkpoint onto the device
    analysis     records against what memplan says today
"""
