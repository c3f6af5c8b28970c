"""The letters for array dims, used in einsum equations, variable suffixes and weight declarations alike.

`axis` always means a mesh axis and `dim` an array dim. Some letters stand for the same size in two
layouts: T, S and Z are all positions of a sequence, cut over different mesh axes (see rules.py), V and I both ids,
M and Y both microbatches.
"""

AXES = ("replica", "stage", "fsdp", "expert", "tensor", "context")
# What the devices of one pipeline stage differ in, so what the code of a layer sees of the mesh.
LAYER_AXES = tuple(axis for axis in AXES if axis != "stage")

DIMS = {
    "M": "microbatches of a step",
    "Y": "microbatches of a step, each at one pipeline stage",
    "B": "sequences of a microbatch",
    "T": "positions, in the residual stream",
    "S": "positions, as attention's queries",
    "Z": "positions, as attention's keys",
    "L": "layers of one stack",
    "D": "hidden_size",
    "Q": "q_lora_rank",
    "C": "kv_lora_rank",
    "J": "kv_lora_rank + qk_rope_head_dim",
    "H": "num_attention_heads",
    "N": "qk_nope_head_dim",
    "R": "qk_rope_head_dim",
    "K": "qk_nope_head_dim + qk_rope_head_dim",
    "U": "v_head_dim",
    "G": "qk_nope_head_dim + v_head_dim",
    "F": "width of an FFN: dense, shared or one expert",
    "E": "n_routed_experts, as owners of weights",
    "X": "n_routed_experts, as the router's scores",
    "A": "num_experts_per_tok",
    "V": "vocab_size, as the head's outputs",
    "I": "vocab_size, as the embedding's rows",
}
