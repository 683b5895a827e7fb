"""How a step runs on one process or many: plain torch, DDP, DeepSpeed ZeRO; the optimizer."""
