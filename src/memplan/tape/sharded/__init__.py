"""How several GPUs share a job: FSDP1, FSDP2, DDP, DeepSpeed's ZeRO, and how models are loaded under each."""
