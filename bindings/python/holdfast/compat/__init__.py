"""The names of other libraries, on Holdfast's kernels: a module for each, with the semantics of the system it names
(the decays, what the scale multiplies, the layout of states and axes). docs/compat.md lists what is exact and what
differs.

    pygpukit             retention_parallel, retention_recurrent, retention_chunkwise, ... for arrays of any kind
    yet_another_retnet   the functions, MultiScaleRetention and RetNet
    retention            power_retention, power_retention_inference, power_full
    fla                  chunk_retention, chunk_simple_gla, ... and RetNet with its checkpoints
    torchscale           MultiScaleRetention, RetNetDecoder with its checkpoints
    power_retention_mlx  PowerRetention, as a module of PyTorch

All but `pygpukit` need PyTorch. Import the module: nothing is loaded by `import holdfast.compat` alone.
"""
