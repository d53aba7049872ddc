"""
`memplan record`: a few real steps of a job, and what they took, in one file beside what was planned.

    launch    starts the measuring process, limits its time, completes the record (no torch)
    worker    the measuring process: model, steps, allocator statistics, events
    device    what is asked of a CUDA GPU, or of the CPU through the profiler
    steps     the three training loops that a job can name
    profile   the profiler's allocations with the operations that made them
    compact   a list of events in few bytes
    analyse   predicted against measured, event by event (no torch)
"""
