"""
What the user wants to run: reading, checking and writing job files. Knows nothing of bytes, GPUs or torch.

`spec.Job` is the contract; `load.load_job` reads one, `write.dump_job` writes one, `ready.list_jobs` lists
those that come with memplan, `schema.job_schema` is the JSON schema.
"""
